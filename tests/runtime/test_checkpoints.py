# SPDX-License-Identifier: Apache-2.0
"""Intact checkpoints restore bit-identically; damaged ones are never restored."""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.trees import fingerprint
from tnt_flax.runtime import checkpoints as checkpoints_module
from tnt_flax.runtime.checkpoints import (
    MANIFEST,
    NOT_IN_MANIFEST,
    Checkpoints,
    find_checkpoint,
    integrity_error,
    read_info,
    read_metrics,
    read_param_shapes,
    read_weights,
    step_folders,
)
from tnt_flax.runtime.sharding import make_mesh, shardings
from tnt_flax.training.step import TrainState

INFO = {"config": {"batch_size": 4}, "class_names": ["a", "b"]}
TX = optax.adamw(1e-3)


def make_state(step):
    params = {"head": {"kernel": jax.random.normal(jax.random.key(step), (64, 32))}}
    ema = {"params": jax.tree.map(lambda x: x + 1, params)}
    return TrainState.create({"params": params}, TX).replace(
        step=jnp.asarray(step, jnp.int32), ema=ema
    )


def abstract():
    shapes = jax.eval_shape(lambda: make_state(0))
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings(shapes, make_mesh()))


@pytest.fixture
def folder(tmp_path):
    """Steps 1 to 4 saved with keep=2, which leaves 3, 4 and the best, 2."""
    with opened(tmp_path) as checkpoints:
        for step, top1 in enumerate([0.1, 0.5, None, 0.2], start=1):
            checkpoints.save_async(make_state(step), step, {"top1": top1} if top1 else None)
    return tmp_path


@contextlib.contextmanager
def opened(folder, keep=2):
    with contextlib.closing(Checkpoints(folder, keep=keep, info=INFO)) as checkpoints:
        yield checkpoints


def steps(folder):
    return [int(p.name) for p in step_folders(folder)]


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "tnt_flax"]


def largest_array_file(folder, step):
    return max((folder / str(step) / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_and_best_are_kept_and_restored_bit_identically(folder):
    assert steps(folder) == [2, 3, 4]
    with opened(folder) as checkpoints:
        state = checkpoints.restore_latest(abstract())
    assert int(state.step) == 4
    assert fingerprint(state) == fingerprint(make_state(4))
    assert find_checkpoint(folder, "best").name == "2"
    assert find_checkpoint(folder, "last").name == "4"
    assert read_metrics(folder / "2") == {"top1": 0.5}
    assert read_info(folder / "2") == INFO


def test_the_best_checkpoint_is_kept_after_a_restart(folder):
    with opened(folder) as checkpoints:
        for step in (5, 6):
            checkpoints.save_async(make_state(step), step, {"top1": 0.3})
    assert steps(folder) == [2, 5, 6]


def test_the_best_checkpoint_is_that_of_the_metric_of_the_config(tmp_path):
    info = INFO | {"config": {"checkpoint": {"best": "loss"}}}
    with contextlib.closing(Checkpoints(tmp_path, keep=1, info=info)) as checkpoints:
        for step, loss in enumerate([0.4, 0.2, 0.3], start=1):
            checkpoints.save_async(make_state(step), step, {"loss": loss, "top1": loss})
    assert steps(tmp_path) == [2, 3] and find_checkpoint(tmp_path, "best").name == "2"


def test_every_commit_contains_a_manifest_of_its_files(folder):
    for step_folder in step_folders(folder):
        listed = json.loads((step_folder / MANIFEST).read_text())
        files = {str(p.relative_to(step_folder)) for p in step_folder.rglob("*") if p.is_file()}
        unlisted = {f.rpartition("/")[2] for f in files - set(listed)}
        assert unlisted == NOT_IN_MANIFEST
        assert any("state" in name and "/d/" in name for name in listed)
        assert integrity_error(step_folder) is None


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda f: flip(largest_array_file(f, 4)), "has changed"),
        (lambda f: largest_array_file(f, 4).write_bytes(b""), "has changed"),
        (lambda f: largest_array_file(f, 4).unlink(), "is missing"),
        (lambda f: (f / "4" / "metrics" / "metrics").write_text("{"), "has changed"),
        (lambda f: (f / "4" / MANIFEST).unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "99").mkdir(), "MANIFEST.json is missing"),
    ],
    ids=["flipped bit", "emptied", "deleted", "metrics cut", "no manifest", "empty folder"],
)
def test_damage_is_reported_and_the_checkpoint_before_is_used(folder, damage, why, caplog):
    damage(folder)
    last_intact = 4 if (folder / "99").exists() else 3
    assert find_checkpoint(folder, "last").name == str(last_intact)
    assert why in caplog.text
    caplog.clear()
    with opened(folder) as checkpoints:
        (message,) = messages(caplog)
        assert why in message and "moved to" in message
        state = checkpoints.restore_latest(abstract())
        assert int(state.step) == last_intact
        assert fingerprint(state) == fingerprint(make_state(last_intact))
        checkpoints.save_async(make_state(last_intact + 1), last_intact + 1)  # the run can continue
    assert last_intact + 1 in steps(folder)
    assert len(list((folder / "damaged").iterdir())) == 1


def test_an_interrupted_deletion_is_finished(folder, caplog):
    """Step 2 is the best and would be kept. It is incomplete, and older than two intact ones."""
    (folder / "2" / MANIFEST).unlink()
    with opened(folder):
        pass
    assert steps(folder) == [3, 4] and not (folder / "damaged").exists()
    assert not messages(caplog)
    largest_array_file(folder, 3).unlink()  # among the newest two nothing was being deleted
    with opened(folder):
        pass
    assert steps(folder) == [4] and "3 is damaged" in caplog.text


def test_an_uncommitted_save_is_ignored(folder):
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    (folder / "5.orbax-checkpoint-tmp" / "half").write_text("")
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step() == 4
        checkpoints.save_async(make_state(5), 5)
    assert integrity_error(folder / "5") is None


def test_training_does_not_start_over_if_every_checkpoint_is_damaged(folder):
    for step in (2, 3, 4):
        flip(largest_array_file(folder, step))
    with pytest.raises(InputError, match="no intact checkpoint"):
        find_checkpoint(folder, "best")
    with opened(folder) as checkpoints:
        with pytest.raises(RunError, match="every checkpoint in .* is damaged"):
            checkpoints.restore_latest(abstract())


def test_a_state_with_other_tensors_is_refused(folder):
    wider = {"head": {"kernel": jax.ShapeDtypeStruct((64, 33), "float32")}}
    more = abstract().ema | {"pos": abstract().step}
    different = r"/4 does.*! params/head/kernel float32\[64, 32\], not float32\[64, 33\]"
    with opened(folder) as checkpoints:
        with pytest.raises(InputError, match=different):
            checkpoints.restore_latest(abstract().replace(params=wider))
        with pytest.raises(InputError, match="/4 does not fit this model: - ema/pos"):
            checkpoints.restore_latest(abstract().replace(ema=more))
    with pytest.raises(InputError, match=r"\+ head/kernel"):
        read_weights(folder / "4", "ema", {})


def test_saving_a_step_twice_is_an_error(folder):
    with opened(folder) as checkpoints:
        with pytest.raises(RunError, match="refused to save step 4"):
            checkpoints.save_async(make_state(4), 4)


@pytest.fixture
def full_disk(monkeypatch):
    """Returns a list; each save removes one item from it and fails, until it is empty."""
    left, sha256 = [], checkpoints_module.sha256

    def failing(path):
        if left:
            left.pop()
            raise OSError(28, "No space left on device")
        return sha256(path)

    monkeypatch.setattr(checkpoints_module, "sha256", failing)
    monkeypatch.setattr(checkpoints_module, "RETRY_DELAY", 0)
    return left


def test_a_failed_save_is_logged_and_skipped(tmp_path, full_disk, caplog):
    """The one checkpoint to keep stays, and the next save is a new attempt."""
    with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save_blocking(make_state(1), 1)
        full_disk += [1, 2]
        for step in (2, 3):
            checkpoints.save_async(make_state(step), step)
            checkpoints.wait_for_save()
            message = messages(caplog)[-1]
            assert f"error: saving step {step} failed: " in message and "No space left" in message
            assert f"the last complete checkpoint is {tmp_path}/1; training continues" in message
        assert checkpoints.failed_saves == 2 and checkpoints.latest_step() == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]  # no partial files
        checkpoints.save_async(make_state(4), 4)
    assert steps(tmp_path) == [4] and integrity_error(tmp_path / "4") is None


def test_consecutive_failures_end_the_run(tmp_path, full_disk):
    full_disk += [1, 2, 3]
    message = "saving step 3 failed.*no checkpoint yet; 3 consecutive saves"
    with opened(tmp_path) as checkpoints, pytest.raises(RunError, match=message):
        for step in (1, 2, 3):
            checkpoints.save_async(make_state(step), step)
            checkpoints.wait_for_save()


def test_save_blocking_retries(tmp_path, full_disk):
    full_disk += [1, 2]
    message = "saving step 2 failed.*last complete checkpoint is .*/1; 3"
    with opened(tmp_path) as checkpoints:
        checkpoints.save_async(make_state(1), 1)
        checkpoints.save_blocking(make_state(1), 1)  # the first save and one retry fail
        assert steps(tmp_path) == [1] and checkpoints.failed_saves == 2
        checkpoints.save_blocking(make_state(1), 1)  # already committed
        full_disk += [1, 2, 3]
        with pytest.raises(RunError, match=message):
            checkpoints.save_blocking(make_state(2), 2)


def test_metrics_can_be_added_to_a_checkpoint(tmp_path):
    with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save_blocking(make_state(1), 1)
        assert checkpoints.metrics(1) == {}
        checkpoints.add_metrics(1, {"top1": 0.5})
        assert checkpoints.metrics(1) == {"top1": 0.5}
        assert integrity_error(tmp_path / "1") is None
        for step in (2, 3):  # step 1 is kept as the best
            checkpoints.save_async(make_state(step), step)
    assert steps(tmp_path) == [1, 3]
    assert find_checkpoint(tmp_path, "best").name == "1"


@pytest.mark.parametrize("kind, offset", [("raw", 0), ("ema", 1)])
def test_reading_weights_only_from_a_relative_path(folder, monkeypatch, kind, offset):
    monkeypatch.chdir(folder.parent)
    step = find_checkpoint(pathlib.Path(folder.name), "last")
    assert read_param_shapes(step).keys() == {"head"}
    params = read_weights(step, kind, {"params": abstract().params})["params"]
    expected = make_state(4).params["head"]["kernel"] + offset
    np.testing.assert_array_equal(params["head"]["kernel"], expected)


def test_reading_from_a_damaged_or_foreign_folder(folder, tmp_path):
    flip(largest_array_file(folder, 4))
    with pytest.raises(InputError, match="4 is damaged"):
        read_weights(folder / "4", "raw", abstract().params)
    with pytest.raises(InputError, match="is not a checkpoint of a training run"):
        read_info(tmp_path)
