# SPDX-License-Identifier: Apache-2.0
"""Training runs: intervals, files, resumption, kills, NaN, and errors of config and data."""

import concurrent.futures
import functools
import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers import chaos
from tests.helpers.parquet import NAMES, write_shards
from tests.helpers.smoke import SMOKE
from tnt_flax.core.errors import InputError, RunError, Stopped
from tnt_flax.core.trees import fingerprint
from tnt_flax.runtime import checkpoints
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.runtime.workdir import read_environments
from tnt_flax.training import device_randaugment
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.metrics import read_metrics_file
from tnt_flax.training.run import check_finite
from tnt_flax.training.train import train_and_evaluate
from tnt_flax.weights import names
from tnt_flax.weights.formats import torch
from tnt_flax.weights.read import read_checkpoint

STEPS = 29  # 1,437 digits in batches of 48


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run from start to end: (config, workdir, result)."""
    from configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE)
    workdir = tmp_path_factory.mktemp("finished")
    return config, workdir, train_and_evaluate(config, workdir)


def test_a_run_writes_all_its_files(finished):
    config, workdir, result = finished
    assert result["step"] == STEPS and result["images"] == 360 and result["skipped"] == 0
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert len(result["fingerprint"]) == 64
    saved = [int(p.name) for p in checkpoints.step_folders(workdir / "checkpoints")]
    assert saved == [10, 20, STEPS]
    for name in ("config.json", "weights.safetensors", "parameters.txt"):
        assert (workdir / name).stat().st_size > 0
    (start,) = read_environments(workdir)
    assert start["step"] == 0 and start["environment"]["jax"] == jax.__version__
    for name in ("curves.png", "predictions.png"):
        with Image.open(workdir / name) as plot:
            assert min(plot.size) > 200


def test_metrics_are_logged_at_their_intervals(finished):
    config, workdir, result = finished
    lines = read_metrics_file(workdir / "metrics.jsonl")
    assert [m["step"] for m in lines if "train/loss" in m] == [10, 20, STEPS]
    assert [m["step"] for m in lines if "eval/top1" in m] == [STEPS]
    assert lines[-1] == {"step": STEPS, "fingerprint": result["fingerprint"]}
    rates = [m["train/learning_rate"] for m in lines if "train/loss" in m]
    assert rates == pytest.approx([1e-3] * 3)  # epoch 0 of a cosine without warm-up
    assert lines[0]["train/epoch"] == pytest.approx(10 / STEPS)
    assert 0 <= lines[0]["train/data_wait"] <= 1


def test_the_first_loss_is_that_of_uniform_predictions(finished):
    _, workdir, _ = finished
    first = read_metrics_file(workdir / "metrics.jsonl")[0]["train/loss"]
    assert first == pytest.approx(np.log(10), abs=0.1)


def test_restarting_a_finished_run_changes_nothing_and_warns_again(finished, capsys):
    config, workdir, result = finished
    assert train_and_evaluate(config, workdir) == result
    assert "warning: after all 29 steps, 75% of the EMA will still be" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(finished, tmp_path, capsys):
    """It ends bit-identical to an uninterrupted run."""
    config, workdir, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    for step in (20, STEPS):
        state = copy / "checkpoints" / str(step) / "state"
        largest = max(state.rglob("d/*"), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    assert train_and_evaluate(config, copy) == result
    err = capsys.readouterr().err
    assert err.count("is damaged") == 2
    assert "from step 10 to 29" in err


@pytest.mark.slow
def test_final_files_that_cannot_be_written_are_one_line_and_lose_nothing(finished, tmp_path):
    config, workdir, result = finished
    shutil.copytree(workdir, tmp_path / "run")
    weights = tmp_path / "run/weights.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(RunError, match="cannot write to workdir .*/run: Is a directory: free some"):
        train_and_evaluate(config, tmp_path / "run")
    weights.rmdir()
    assert train_and_evaluate(config, tmp_path / "run") == result and weights.is_file()


@pytest.mark.slow
def test_every_evaluation_is_checkpointed(smoke_config, tmp_path):
    config = smoke_config(eval__every="14 steps", checkpoint__every="20 steps", checkpoint__keep=9)
    train_and_evaluate(config, tmp_path)
    folders = checkpoints.step_folders(tmp_path / "checkpoints")
    assert [int(p.name) for p in folders] == [14, 20, 28, STEPS]
    evaluated = [int(p.name) for p in folders if checkpoints.read_metrics(p)]
    assert evaluated == [14, 28, STEPS]


@pytest.mark.slow
def test_nan_stops_the_run_and_names_the_tensor(smoke_config, tmp_path):
    config = smoke_config(optimizer__learning_rate=1e30, checkpoint__every="1 steps")
    with pytest.raises(RunError) as caught:
        train_and_evaluate(config, tmp_path)
    message = str(caught.value)
    assert "the loss of step" in message and "at learning rate 1e+30" in message
    assert "first bad tensor: params/" in message or "first bad tensor: gradient of" in message
    last = checkpoints.find_checkpoint(tmp_path / "checkpoints", "last")
    assert message.endswith(f"the last good checkpoint is step {last.name}")
    for leaf in jax.tree.leaves(read_checkpoint(last, weights="raw").params):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    "loss, finite, tensor",
    [
        (np.nan, [True, True, True, False], "params/head/bias"),
        (np.nan, [True, False, True, True], "gradient of params/head/bias"),
        (np.nan, [True, True, False, True], "batch_stats/norm/mean"),
        (np.nan, [False, True, True, True], "new batch_stats/norm/mean"),
        (np.nan, [True] * 4, "the loss itself"),
        (2.5, [True] * 4, "the gradient norm"),
    ],
)
def test_the_error_names_the_first_tensor_that_is_not_finite(loss, finite, tensor):
    checkpoints = types.SimpleNamespace(wait_for_save=lambda: None, latest_step=lambda: 4)
    variables = {"params": {"head": {"bias": 0}}, "batch_stats": {"norm": {"mean": 0}}}
    shapes = types.SimpleNamespace(variables=variables)
    experiment = types.SimpleNamespace(state_shapes=shapes)
    metrics = {"loss": loss, "grad_norm": np.inf, "learning_rate": 0.1}
    metrics["finite"] = np.array(finite)
    with pytest.raises(RunError, match=f"first bad tensor: {tensor}; the last good .* step 4"):
        check_finite(experiment, checkpoints, 5, metrics)


@pytest.mark.slow
def test_training_starts_from_weights_of_any_framework(finished, smoke_config, tmp_path, capsys):
    """With a learning rate of zero, the final weights are the initial ones."""
    _, workdir, result = finished
    params = read_checkpoint(workdir, weights="raw", checkpoint="last").params
    torch.write(tmp_path / "x.pth", dict(names.export("huawei", params)))
    zero = dict(optimizer__learning_rate=0.0, optimizer__min_learning_rate=0.0)
    config = smoke_config(init_from=str(tmp_path / "x.pth"), **zero)
    again = train_and_evaluate(config, tmp_path / "run")
    assert again["fingerprint"] == result["fingerprint"]
    assert "official network, huawei names, torch file" in capsys.readouterr().err
    ema = read_checkpoint(tmp_path / "run", weights="ema").params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), ema, params)


@pytest.mark.slow
def test_other_classes_get_a_new_head(finished, smoke_config, capsys):
    config, workdir, _ = finished
    same, renamed = tuple("0123456789"), tuple("abcdefghij")
    params = read_checkpoint(workdir).params

    def load(class_names, config=config):
        variables, found = Experiment(config).load_variables(str(workdir), class_names)
        return variables["params"], found

    kept, _ = load(same)
    assert fingerprint(kept) == fingerprint(params)
    assert "a new head" not in capsys.readouterr().err
    new, _ = load(renamed)  # as many classes, with other names
    assert "a new head for 10 classes" in capsys.readouterr().err
    assert fingerprint(new["head"]) != fingerprint(params["head"])
    assert fingerprint(new["blocks_0"]) == fingerprint(params["blocks_0"])

    config = smoke_config(data__image_size=64)
    fewer, _ = load(same[:3], config)
    assert fewer["head"]["kernel"].shape == (24, 3)
    assert fewer["sentence_pos"].shape == (1, 17, 24)
    kept, found = load(None)  # to evaluate
    assert fingerprint(kept) != fingerprint(fewer) and found.class_names == same
    assert kept["head"]["kernel"].shape == (24, 10)
    with pytest.raises(InputError, match=r"not the tnt_ti_.* that the config describes \(depth: 1"):
        load(same, smoke_config(model__depth=2))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(init_from="none.pth"), "cannot read none.pth: No such file or directory"),
        (dict(batch_size=44), "batch_size=44 is not divisible by the 8 devices"),
        (dict(accumulate=4), "batch_size / accumulate=12 is not divisible by the 8 devices"),
        (dict(eval__batch_size=12), "eval.batch_size=12 is not divisible by the 8 devices"),
        (dict(batch_size=1440), "1437.*1440"),
        (dict(data__image_size=40), "data.image_size=40 is not divisible by the patch size 16"),
        (dict(data__image_size=0), "data.image_size=0"),
        (dict(data__source="digit"), "did you mean 'digits'"),
        (dict(data__corrupt="ignore"), "data.corrupt='ignore' is none of"),
        (dict(eval__weights="both"), "eval.weights='both' is none of"),
        (dict(eval__every="sometimes"), "eval.every='sometimes' is not a valid duration"),
        (dict(model__name="tnt_s_patch16_22"), "did you mean 'tnt_s_patch16_224'"),
        (dict(model__remat="all"), "remat='all'"),
        (dict(model__drop_path=1.0), "drop_path=1.0 is outside"),
        (dict(model__outer_heads=5), "width 24 is not divisible by 5 attention heads"),
        (dict(model__dtype="float12"), "dtype='float12'"),
        (dict(epochs=0), "epochs=0 is less than 1"),
        (dict(ema__decay=1.0), "ema.decay=1.0 is outside"),
        (dict(data__mean=(0.5,)), "data.mean=.* must have three values"),
        (dict(checkpoint__keep=0), "checkpoint.keep=0 is less than 1"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_bad_config_values_are_errors_of_one_line(smoke_config, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        train_and_evaluate(smoke_config(**overrides), tmp_path)
    assert "\n" not in str(caught.value)


def make_folder(root, classes=("cat", "dog"), splits=("train", "val"), count=24):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


SMALL_BATCHES = dict(
    data__eval_split="validation", batch_size=16, eval__batch_size=16, log__every="1 steps"
)


def folder_config(smoke_config, root, **overrides):
    data = dict(data__source="folder", data__root=str(root))
    return smoke_config(**data, **SMALL_BATCHES, **overrides)


def test_training_and_evaluation_classes_must_match(smoke_config, tmp_path):
    make_folder(tmp_path / "data", splits=("train",))
    make_folder(tmp_path / "data", classes=("cat", "fox"), splits=("val",))
    with pytest.raises(InputError, match="fox.*cat, dog"):
        train_and_evaluate(folder_config(smoke_config, tmp_path / "data"), tmp_path / "run")


@pytest.mark.slow
def test_a_failed_start_can_be_corrected_in_the_same_workdir(smoke_config, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        train_and_evaluate(folder_config(smoke_config, tmp_path / "nowhere"), tmp_path / "run")
    config = folder_config(smoke_config, make_folder(tmp_path / "data"))
    with pytest.raises(InputError, match="none.pth"):
        changed = folder_config(smoke_config, tmp_path / "data", init_from="none.pth")
        train_and_evaluate(changed, tmp_path / "run")
    assert train_and_evaluate(config, tmp_path / "run")["step"] == 3
    other = make_folder(tmp_path / "other", classes=("cat", "eel"))
    with pytest.raises(InputError, match=r"checkpoints/3 has 2 classes \(cat, dog\), the data"):
        train_and_evaluate(folder_config(smoke_config, other), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_image_stops_the_run_or_is_counted(smoke_config, tmp_path, split):
    make_folder(tmp_path / "data")
    broken = tmp_path / "data" / split / "dog" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{split}/dog/7.jpg.*data.corrupt"):
        train_and_evaluate(folder_config(smoke_config, tmp_path / "data"), tmp_path / "run")
    # The advice of the message works in the same workdir.
    config = folder_config(smoke_config, tmp_path / "data", data__corrupt="skip")
    result = train_and_evaluate(config, tmp_path / "run")
    lines = read_metrics_file(tmp_path / "run" / "metrics.jsonl")
    replaced = sum(m.get("train/replaced_images", 0) for m in lines)
    assert (replaced, result["skipped"]) == ((1, 0) if split == "train" else (0, 1))
    assert result["images"] == 48 - result["skipped"]


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical_to_an_undisturbed_one(tmp_path):
    """kill -9 at random times, with the published augmentation and drop path."""
    result = chaos.kills(tmp_path, types.SimpleNamespace(kills=2, processes=1, seed=0))
    assert result["bit_identical"], result


@pytest.fixture
def at(monkeypatch):
    """Function that registers an action for progress that starts with the given text."""

    def register(reached, action):
        original = Watchdog.progress

        def wrapped(self, what, **options):
            if what.startswith(reached):
                action()
            return original(self, what, **options)

        monkeypatch.setattr(Watchdog, "progress", wrapped)

    return register


@pytest.mark.slow
def test_a_run_stopped_by_signals_ends_bit_identical(finished, tmp_path, at):
    """Signals come in a step, in an evaluation, and while a save is in flight."""
    config, _, result = finished
    config = config.copy_and_resolve_references()
    config.eval.update(every="10 steps", batch_size=120)
    config.checkpoint.update(every="4 steps", keep=9)
    sent = []

    def send(number):
        if number not in sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    at("step 7 ", lambda: send(signal.SIGTERM))
    at("batch 2 ", lambda: send(signal.SIGINT))
    for step in (7, 10):
        with pytest.raises(Stopped, match=f"^step {step} is saved"):
            train_and_evaluate(config, tmp_path)
        assert checkpoints.find_checkpoint(tmp_path / "checkpoints", "last").name == str(step)
    assert checkpoints.read_metrics(tmp_path / "checkpoints" / "10") == {}
    assert train_and_evaluate(config, tmp_path)["fingerprint"] == result["fingerprint"]
    lines = read_metrics_file(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in lines if "eval/top1" in m] == [10, 20, STEPS]
    assert checkpoints.read_metrics(tmp_path / "checkpoints" / "10")["images"] == 360


@pytest.mark.slow
def test_imagenet_in_parquet_trains_evaluates_and_resumes(smoke_config, tmp_path, at, monkeypatch):
    """With repeated images, and RandAugment on the device by an operation that compiles fast."""
    brighten = lambda image, call, augment: image + call.level.astype(image.dtype)
    monkeypatch.setattr(device_randaugment, "_apply_op", brighten)
    make_folder(tmp_path / "data", classes=NAMES)
    for split, stored in (("train", "train"), ("val", "validation")):
        images = [path.read_bytes() for path in sorted((tmp_path / "data" / split).rglob("*.jpg"))]
        write_shards(tmp_path / "hub", images, stored, count=3)
    overrides = dict(epochs=2, data__source="table", data__workers=1, augment__repeats=3)
    overrides |= dict(augment__mix_groups=8, data__root=str(tmp_path / "hub"))
    overrides |= dict(augment__randaugment="rand-mstd9", augment__randaugment_on="device")
    config = smoke_config(**SMALL_BATCHES, **overrides)
    expected = train_and_evaluate(config, tmp_path / "whole")
    assert expected["images"] == 72 and expected["step"] == 8

    sent = []

    def stop():
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    at("step 5 ", stop)
    with pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path / "run")
    assert train_and_evaluate(config, tmp_path / "run") == expected


@pytest.mark.slow
def test_unavailable_data_end_the_run_with_its_state_saved(smoke_config, tmp_path, at):
    make_folder(tmp_path / "data")
    config = folder_config(smoke_config, tmp_path / "data", epochs=4, data__retry_seconds=0.0)
    expected = train_and_evaluate(config, tmp_path / "undisturbed")

    at("step 2 ", lambda: os.rename(tmp_path / "data", tmp_path / "away"))
    with pytest.raises(RunError, match=r"cannot be read: No such file.*\(data.retry_seconds\)"):
        train_and_evaluate(config, tmp_path / "run")
    saved = int(checkpoints.find_checkpoint(tmp_path / "run" / "checkpoints", "last").name)
    assert 2 <= saved < 9  # the regular checkpoint is every 10 steps
    os.rename(tmp_path / "away", tmp_path / "data")
    assert train_and_evaluate(config, tmp_path / "run")["fingerprint"] == expected["fingerprint"]


@pytest.mark.slow
def test_an_exhausted_device_is_one_line(smoke_config, tmp_path, at):
    at("step 2 ", lambda: jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(2**45))()))
    with pytest.raises(RunError, match="out of memory on the device .*reduce batch_size"):
        train_and_evaluate(smoke_config(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 20])
def test_64_bit_types_change_nothing(finished, tmp_path, start):
    """JAX_ENABLE_X64=1, in a run of its own and in one that resumes."""
    config, workdir, result = finished
    if start:
        shutil.copytree(workdir, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    with jax.enable_x64(True):
        assert train_and_evaluate(config, tmp_path / "run") == result


@pytest.mark.slow
def test_early_stopping_ends_a_resumed_run_at_the_same_step(smoke_config, tmp_path, at, caplog):
    """The learning rate is 0: the first evaluation stays the best."""
    keys = dict(eval__every="4 steps", eval__patience=2, checkpoint__best="loss")
    keys |= dict(optimizer__learning_rate=0.0, optimizer__min_learning_rate=0.0)
    config = smoke_config(**keys, checkpoint__every="3 steps")
    caplog.set_level("INFO", "tnt_flax")
    whole = train_and_evaluate(config, tmp_path / "whole")
    assert whole["step"] == 12 and whole["images"] == 360
    assert "stopping after 2 evaluations without a better loss than 2." in caplog.text
    assert " of step 4 (eval.patience)" in caplog.text
    assert train_and_evaluate(config, tmp_path / "whole") == whole  # a finished run stays so

    at("step 9 ", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path / "resumed")
    assert train_and_evaluate(config, tmp_path / "resumed") == whole
    longer = smoke_config(**keys | {"eval__patience": 3}, checkpoint__every="3 steps")
    assert train_and_evaluate(longer, tmp_path / "whole")["step"] == 16  # patience may change


@pytest.mark.slow
def test_a_deterministic_run_keeps_its_programs(finished, tmp_path, at):
    config, _, result = finished
    config = config.copy_and_resolve_references()
    config.deterministic = True
    at("step 7 ", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path)
    (step,) = (tmp_path / "compiled").glob("jit_train_step*-cache")
    written = step.stat().st_mtime_ns
    assert train_and_evaluate(config, tmp_path)["fingerprint"] == result["fingerprint"]
    assert [x.stat().st_mtime_ns for x in step.parent.glob("jit_train_step*-cache")] == [written]
    assert read_environments(tmp_path)[0]["environment"]["compiler_options"] == {}  # of a CPU


@pytest.mark.slow
def test_training_runs_in_any_thread(finished, tmp_path):
    config, _, result = finished
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(train_and_evaluate, config, tmp_path).result() == result


@pytest.mark.slow
def test_ctrl_c_in_a_notebook_saves_and_raises(finished, tmp_path, at):
    config, _, result = finished
    sent = []

    def interrupt(reached):
        if reached not in sent:
            sent.append(reached)
            os.kill(os.getpid(), signal.SIGINT)

    at("state ready", lambda: interrupt("set-up"))
    at("step 7 ", lambda: interrupt("step 7"))
    for kind in (KeyboardInterrupt, Stopped):
        with pytest.raises(kind):
            train_and_evaluate(config, tmp_path)
    assert train_and_evaluate(config, tmp_path) == result


def test_a_disk_too_small_for_the_state_is_an_error(smoke_config, tmp_path, monkeypatch):
    free = int(2.5 * 4 * 4 * 5_000)  # weights, EMA and two moments in float32, of 5,000 parameters
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    with pytest.raises(InputError, match="MB free, checkpoints need"):
        train_and_evaluate(smoke_config(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
