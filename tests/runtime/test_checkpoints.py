# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints come back bit for bit; damaged ones never do."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.trees import fingerprint
from tnt_flax.runtime import checkpoints as checkpoint
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.runtime.sharding import make_mesh, shardings
from tnt_flax.training.step import TrainState

INFO = {"config": {"batch_size": 4}, "class_names": ["a", "b"]}
TX = optax.adamw(1e-3)


def make_state(step):
    params = {"head": {"kernel": jax.random.normal(jax.random.key(step), (64, 32))}}
    ema = jax.tree.map(lambda x: x + 1, params)
    return TrainState.create(params, TX).replace(step=jnp.asarray(step, jnp.int32), ema=ema)


def layout():
    shapes = jax.eval_shape(lambda: make_state(0))
    return checkpoint.abstract(shapes, shardings(shapes, make_mesh()))


@pytest.fixture
def folder(tmp_path):
    """Steps 1..4 saved with two kept: 3, 4, and 2 as the best."""
    checkpoints = Checkpoints(tmp_path, keep=2, info=INFO)
    for step, top1 in enumerate([0.1, 0.5, None, 0.2], start=1):
        checkpoints.save(make_state(step), step, {"top1": top1} if top1 else None)
    checkpoints.close()
    return tmp_path


def steps(folder):
    return [int(p.name) for p in checkpoint.step_folders(folder)]


def largest_array_file(folder, step):
    return max((folder / str(step) / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_last_and_best_are_kept_and_restored_bit_for_bit(folder):
    assert steps(folder) == [2, 3, 4]
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    state = checkpoints.restore_latest(layout())
    assert int(state.step) == 4
    assert fingerprint(state) == fingerprint(make_state(4))
    checkpoints.close()
    assert checkpoint.find_checkpoint(folder, "best").name == "2"
    assert checkpoint.find_checkpoint(folder, "last").name == "4"
    assert checkpoint.read_metrics(folder / "2") == {"top1": 0.5}
    assert checkpoint.read_info(folder / "2") == INFO


def test_best_survives_a_restart(folder):
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    for step in (5, 6):
        checkpoints.save(make_state(step), step, {"top1": 0.3})
    checkpoints.close()
    assert steps(folder) == [2, 5, 6]


def test_every_commit_holds_the_digest_of_its_files(folder):
    for step_folder in checkpoint.step_folders(folder):
        listed = json.loads((step_folder / checkpoint.MANIFEST).read_text())
        files = {str(p.relative_to(step_folder)) for p in step_folder.rglob("*") if p.is_file()}
        unlisted = {f.rpartition("/")[2] for f in files - set(listed)}
        assert unlisted == checkpoint.NOT_IN_MANIFEST
        assert any("state" in name and "/d/" in name for name in listed)
        assert checkpoint.integrity_error(step_folder) is None


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda f: flip(largest_array_file(f, 4)), "has changed"),
        (lambda f: largest_array_file(f, 4).write_bytes(b""), "has changed"),
        (lambda f: largest_array_file(f, 4).unlink(), "is missing"),
        (lambda f: (f / "4" / "metrics" / "metrics").write_text("{"), "has changed"),
        (lambda f: (f / "4" / checkpoint.MANIFEST).unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "99").mkdir(), "MANIFEST.json is missing"),
    ],
    ids=["flipped bit", "emptied", "deleted", "metrics cut", "no manifest", "empty folder"],
)
def test_damage_is_found_named_and_passed_over(folder, damage, why, capsys):
    damage(folder)
    last_whole = 4 if (folder / "99").exists() else 3
    assert checkpoint.find_checkpoint(folder, "last").name == str(last_whole)
    assert why in capsys.readouterr().err
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    err = capsys.readouterr().err
    assert why in err and "moved to" in err and len(err.splitlines()) == 1
    state = checkpoints.restore_latest(layout())
    assert int(state.step) == last_whole
    assert fingerprint(state) == fingerprint(make_state(last_whole))
    checkpoints.save(make_state(last_whole + 1), last_whole + 1)  # the run can go on
    checkpoints.close()
    assert last_whole + 1 in steps(folder)
    assert len(list((folder / "damaged").iterdir())) == 1


def test_a_deletion_that_a_kill_interrupted_is_finished(folder, capsys):
    """2 is the best; behind two whole ones it would be kept, but it is beyond repair."""
    (folder / "2" / checkpoint.MANIFEST).unlink()
    Checkpoints(folder, keep=2, info=INFO).close()
    assert steps(folder) == [3, 4] and not (folder / "damaged").exists()
    assert capsys.readouterr().err == ""
    largest_array_file(folder, 3).unlink()  # of the last two nothing was to be deleted
    Checkpoints(folder, keep=2, info=INFO).close()
    assert steps(folder) == [4] and "3 is damaged" in capsys.readouterr().err


def test_an_uncommitted_save_is_ignored(folder):
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    (folder / "5.orbax-checkpoint-tmp" / "half").write_text("")
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    assert checkpoints.latest_step() == 4
    checkpoints.save(make_state(5), 5)
    checkpoints.close()
    assert checkpoint.integrity_error(folder / "5") is None


def test_never_starts_anew_where_every_checkpoint_is_damaged(folder):
    for step in (2, 3, 4):
        flip(largest_array_file(folder, step))
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoint.find_checkpoint(folder, "best")
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    with pytest.raises(RunError, match="every checkpoint in .* is damaged"):
        checkpoints.restore_latest(layout())
    checkpoints.close()


def test_an_empty_folder_restores_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", keep=2, info=INFO)
    assert checkpoints.restore_latest(layout()) is None
    checkpoints.close()


def test_a_state_of_another_shape_is_refused(folder):
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    wider = layout().replace(params={"head": {"kernel": jax.ShapeDtypeStruct((64, 33), "float32")}})
    with pytest.raises(
        InputError, match=r"/4 does.*! params/head/kernel float32\[64, 32\], not float32\[64, 33\]"
    ):
        checkpoints.restore_latest(wider)
    more = layout().replace(ema={"head": layout().ema["head"], "pos": layout().step})
    with pytest.raises(InputError, match="/4 does not fit this model: - ema/pos"):
        checkpoints.restore_latest(more)
    checkpoints.close()
    with pytest.raises(InputError, match=r"\+ head/kernel"):
        checkpoint.read_weights(folder / "4", "ema", {})


def test_saving_twice_is_an_error_not_a_silence(folder):
    checkpoints = Checkpoints(folder, keep=2, info=INFO)
    with pytest.raises(RunError, match="refused to save step 4"):
        checkpoints.save(make_state(4), 4)
    checkpoints.close()


@pytest.fixture
def full_disk(monkeypatch):
    """Returns a list: saving fails as long as there is something in it, one item a save."""
    left, digest = [], checkpoint.sha256

    def read(path):
        if left:
            left.pop()
            raise OSError(28, "No space left on device")
        return digest(path)

    monkeypatch.setattr(checkpoint, "sha256", read)
    monkeypatch.setattr(checkpoint, "RETRY", 0)
    return left


def test_a_failed_save_is_reported_and_left_out(tmp_path, full_disk, capsys):
    """Training goes on, the one checkpoint that is kept stays, and the next save is a new try."""
    checkpoints = Checkpoints(tmp_path, keep=1, info=INFO)
    checkpoints.save(make_state(1), 1)
    checkpoints.wait()
    full_disk += [1, 2]
    for step in (2, 3):
        checkpoints.save(make_state(step), step)
        checkpoints.wait()
        err = capsys.readouterr().err
        assert f"error: saving step {step} failed: " in err and "No space left" in err
        assert f"the last whole one is {tmp_path}/1; training goes on" in err
    assert checkpoints.failed_saves == 2 and checkpoints.latest_step() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]  # nothing half is left
    checkpoints.save(make_state(4), 4)
    checkpoints.close()
    assert steps(tmp_path) == [4] and checkpoint.integrity_error(tmp_path / "4") is None


def test_saves_that_keep_failing_end_the_run(tmp_path, full_disk, capsys):
    checkpoints = Checkpoints(tmp_path, keep=2, info=INFO)
    full_disk += [1, 2, 3]
    with pytest.raises(RunError, match="saving step 3 failed.*there is no whole one; 3 saves in"):
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), step)
            checkpoints.wait()
    checkpoints.close()


def test_a_save_that_must_be_is_tried_again(tmp_path, full_disk, capsys):
    checkpoints = Checkpoints(tmp_path, keep=2, info=INFO)
    full_disk += [1, 2]
    checkpoints.save(make_state(1), 1)
    checkpoints.ensure(make_state(1), 1)  # what is in flight fails, and so does the second try
    assert steps(tmp_path) == [1] and checkpoints.failed_saves == 2
    checkpoints.ensure(make_state(1), 1)  # it is there
    full_disk += [1, 2, 3]
    with pytest.raises(RunError, match="saving step 2 failed.*last whole one is .*/1; 3 saves"):
        checkpoints.ensure(make_state(2), 2)
    full_disk.clear()
    checkpoints.close()


def test_an_evaluation_can_be_added_to_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, info=INFO)
    checkpoints.save(make_state(1), 1)
    checkpoints.wait()
    assert checkpoints.metrics(1) == {}
    checkpoints.add_metrics(1, {"top1": 0.5})
    assert (
        checkpoints.metrics(1) == {"top1": 0.5}
        and checkpoint.integrity_error(tmp_path / "1") is None
    )
    for step in (2, 3):  # it counts: step 1 stays as the best
        checkpoints.save(make_state(step), step)
    checkpoints.close()
    assert steps(tmp_path) == [1, 3]
    assert checkpoint.find_checkpoint(tmp_path, "best").name == "1"


@pytest.mark.parametrize("kind, offset", [("raw", 0), ("ema", 1)])
def test_weights_alone(folder, kind, offset):
    params = checkpoint.read_weights(folder / "4", kind, layout().params)
    expected = make_state(4).params["head"]["kernel"] + offset
    np.testing.assert_array_equal(params["head"]["kernel"], expected)


def test_a_folder_is_found_by_a_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    step = checkpoint.find_checkpoint(pathlib.Path(folder.name), "last")
    assert checkpoint.stored_params(step).keys() == {"head"}
    params = checkpoint.read_weights(step, "raw", layout().params)
    np.testing.assert_array_equal(params["head"]["kernel"], make_state(4).params["head"]["kernel"])


def test_weights_of_a_damaged_or_foreign_folder(folder, tmp_path):
    flip(largest_array_file(folder, 4))
    with pytest.raises(InputError, match="4 is damaged"):
        checkpoint.read_weights(folder / "4", "raw", layout().params)
    with pytest.raises(InputError, match="is no checkpoint of a run"):
        checkpoint.read_info(tmp_path)
