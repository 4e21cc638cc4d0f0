# SPDX-License-Identifier: Apache-2.0
"""What a network answers to every image of a split, and what that says about it."""

from typing import NamedTuple

import jax
import numpy as np

from tnt_flax.core.errors import RunError
from tnt_flax.training.experiment import Experiment


class Answers(NamedTuple):
    """One element per image that could be read, K images in the order of the split."""

    record: np.ndarray  # int [K], its place in the split
    label: np.ndarray  # int [K]
    predicted: np.ndarray  # int [K]
    confidence: np.ndarray  # float [K], of the predicted class
    loss: np.ndarray  # float [K], minus the logarithm of the label's probability
    rank: np.ndarray  # int [K], how many classes are likelier than the label

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.label


def collect(experiment: Experiment, model, variables) -> Answers:
    """Answers to the whole evaluation split of `experiment`.

    Raises:
        RunError: there is no image that can be read, or an answer is not finite.
    """
    predict_step = jax.jit(experiment.make_predict_step(model))
    parts, begin = [], 0
    for batch in experiment.eval_batches():
        probabilities = np.asarray(predict_step(variables, batch["image"]), np.float64)
        rows = np.flatnonzero(batch["mask"])
        labels, probabilities = batch["label"][rows], probabilities[rows]
        own = np.take_along_axis(probabilities, labels[:, None], axis=1)
        parts.append(
            Answers(
                begin + rows,
                labels,
                probabilities.argmax(axis=1),
                probabilities.max(axis=1),
                -np.log(np.maximum(own[:, 0], 1e-30)),
                (probabilities > own).sum(axis=1),
            )
        )
        begin += len(batch["mask"])
    answers = Answers(*map(np.concatenate, zip(*parts, strict=True)))
    if not len(answers.label):
        raise RunError("no image could be evaluated")
    if not np.isfinite(answers.confidence).all():
        raise RunError("an answer is not finite: these weights are not usable")
    return answers


def confusion(answers: Answers, classes: int) -> np.ndarray:
    """[classes, classes]: how many images of the class of the row were taken for the column's."""
    pairs = answers.label * classes + answers.predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def most_confused(answers: Answers, limit: int) -> list[tuple[int, int, int]]:
    """(label, predicted, images), the most frequent mistakes first."""
    wrong = np.flatnonzero(~answers.right)
    pairs = np.stack([answers.label[wrong], answers.predicted[wrong]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(int(found[i][0]), int(found[i][1]), int(counts[i])) for i in order]
