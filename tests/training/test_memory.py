# SPDX-License-Identifier: Apache-2.0
"""The number of micro-batches that fits into memory, and the message that names it."""

import jax
import pytest

from tnt_flax.core.errors import RunError
from tnt_flax.runtime import host
from tnt_flax.training import memory
from tnt_flax.training.experiment import Experiment


def make_experiment(smoke_config, **changes):
    config = smoke_config(**changes)
    return Experiment(config, num_classes=10, steps_per_epoch=29)


@pytest.mark.parametrize(
    "needed, batch_size, accumulate, fsdp, expected",
    [(8, 48, 1, 1, None), (3, 48, 1, 1, 3), (4, 48, 2, 8, 6), (2, 96, 1, 2, 2), (1, 96, 6, 1, 12)],
)
def test_the_smallest_valid_accumulate_is_found(
    smoke_config, monkeypatch, needed, batch_size, accumulate, fsdp, expected
):
    """On eight devices, 48 images are one micro-batch, or 2, 3 or 6; not 4."""
    monkeypatch.setattr(Experiment, "jit_train_step", lambda self, count: count)
    options = dict(batch_size=batch_size, accumulate=accumulate, mesh__fsdp=fsdp)
    experiment = make_experiment(smoke_config, **options)
    found = memory.smallest_accumulate(experiment, lambda count: count >= needed)
    assert found == expected


@pytest.mark.slow
def test_out_of_memory_names_the_accumulate_that_fits(smoke_config, monkeypatch):
    """By figures for this CPU; the limit is what the step with accumulate=3 needs."""
    experiment = make_experiment(smoke_config, model__depth=3)

    def needs(count):
        step = experiment.jit_train_step(count)
        return sum(memory.memory_of(step.lower(*experiment.step_shapes).compile()))

    assert needs(1) > needs(2) > needs(3)
    monkeypatch.setattr(memory, "device_memory", lambda device: needs(3))
    suggest = lambda: memory.suggest_accumulate(experiment)
    with pytest.raises(RunError) as error, host.explain_device_errors(suggest):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert str(error.value).endswith(
        "; accumulate=3 is the smallest that fits, by the compiler's figures"
    )
    monkeypatch.setattr(memory, "device_memory", lambda device: 0)
    assert suggest() == "no accumulate fits"


def test_without_the_memory_of_the_device_the_command_is_named(smoke_config):
    assert memory.suggest_accumulate(make_experiment(smoke_config)) == memory.FIND_ACCUMULATE
