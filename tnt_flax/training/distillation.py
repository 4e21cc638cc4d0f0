# SPDX-License-Identifier: Apache-2.0
"""Distillation: a trained network, the teacher, gives further targets for the same crops."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.labels import map_to_network
from tnt_flax.training.losses import LossFn
from tnt_flax.weights.load import adapt
from tnt_flax.weights.read import read_checkpoint

KINDS = ("soft", "hard")
Normalization = tuple[Sequence[float], Sequence[float]]  # mean and std of each channel


class Teacher(NamedTuple):
    """A trained network for the classes of the training data."""

    # (variables, batch) -> float32 [B, K]; the images of the batch are augmented and normalized.
    logits: Callable[[Any, dict[str, jax.Array]], jax.Array]
    variables: Any  # on the host


# Logits that `tnt-flax predict --logits` stored, of the evaluation view of each image.
STORED = Teacher(lambda variables, batch: batch["teacher_logits"], {})


def load_teacher(
    path: str,
    class_names: Sequence[str] | int,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
) -> Teacher:
    """Loads the weights at `path`, of any network and framework.

    Args:
        path: file, workdir or hf:// address.
        class_names: of the training data. The teacher may have further classes, in any order. A
            number selects the teacher's first classes.
        image_size: height and width of the images, to which positions are resampled.
        mean, std: normalization of the images; they are normalized again if the teacher's differs.
        dtype: of the computation.

    Raises:
        InputError: the weights cannot be read, or lack a class of the training data.
    """
    found = read_checkpoint(path)
    summary, num_classes = found.summary(), found.network.model.num_classes
    if not num_classes:
        raise InputError(f"distill.teacher={path!r} has no head: it cannot classify")
    model = adapt(found, image_size=image_size, in_channels=3).clone(dtype=dtype)
    if isinstance(class_names, int):
        columns = np.arange(class_names)
    else:
        columns = map_to_network(class_names, found.class_names, num_classes)
    found.notes.append("the teacher")
    found.log_notes(summary)
    theirs = tuple(found.preprocessing["mean"]), tuple(found.preprocessing["std"])
    renormalize = make_renormalize((tuple(mean), tuple(std)), theirs)

    def logits(variables, batch):
        found = model.apply(variables, renormalize(batch["image"]), train=False)
        whole = len(columns) == num_classes and (columns == np.arange(num_classes)).all()
        return found if whole else found[:, columns]

    return Teacher(logits, found.variables)


def make_renormalize(
    ours: Normalization, theirs: Normalization
) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from images normalized by `ours` to images normalized by `theirs`."""
    if ours == theirs:
        return lambda images: images
    (mean, std), (their_mean, their_std) = np.asarray(ours), np.asarray(theirs)
    scale = np.float32(std / their_std)[None, None, None]
    offset = np.float32((mean - their_mean) / their_std)[None, None, None]
    return lambda images: images * scale + offset


def add_teacher(augment: Callable[..., tuple[jax.Array, jax.Array]], teacher: Teacher) -> Callable:
    """Returns `augment`, see `step.make_augment`, with the teacher's variables as last argument.

    Its targets are (targets, teacher_logits). The teacher sees the whole batch: it needs less
    memory than a micro-batch of the student, as it has no gradient.
    """

    def augment_and_teach(batch, *args):
        *args, variables = args
        images, targets = augment(batch, *args)
        return images, (targets, teacher.logits(variables, batch | {"image": images}))

    return augment_and_teach


def make_distillation_loss(
    loss_fn: LossFn, *, kind: str, temperature: float, weight: float
) -> Callable[[jax.Array, tuple[jax.Array, jax.Array]], jax.Array]:
    """Returns `loss(logits, (targets, teacher_logits))`, float32 [B].

    It is (1 - weight) * loss_fn(logits, targets) + weight * d. For "soft", d is temperature**2 *
    KL(teacher || student) of the softmax of logits / temperature (Hinton et al., arXiv 1503.02531).
    For "hard" it is the cross entropy with the teacher's most probable class (Touvron et al., arXiv
    2012.12877). A weight of 1 is function matching (Beyer et al., arXiv 2106.05237).
    """

    def soft(logits, teacher_logits):
        ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
        return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1)

    def hard(logits, teacher_logits):
        best = jnp.argmax(teacher_logits, axis=1)[:, None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), best, axis=1)[:, 0]

    distilled = {"soft": soft, "hard": hard}[kind]

    def loss(logits, targets):
        targets, teacher_logits = targets
        losses = weight * distilled(logits, teacher_logits)
        return losses if weight == 1 else losses + (1 - weight) * loss_fn(logits, targets)

    return loss
