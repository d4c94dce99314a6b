"""Average precision by PASCAL VOC's rules, for images that show a class and for boxes around objects.

The rules are those of the VOC 2010 to 2012 development kits (Everingham et al., "The PASCAL Visual Object Classes
Challenge: A Retrospective", IJCV 2015). For boxes: detections of a class are taken in the order of their scores, each
is held against the object of that class that it overlaps most, and is right if the overlap (intersection over union) is
at least 0.5 and the object has not been found before; a second find is wrong. Objects marked as difficult neither have
to be found nor count when they are. Average precision is the area under the curve of precision over recall, precision
taken as the highest at this recall or a higher one. Equal scores are ranked together: no order of images or boxes can
change the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

OVERLAP = 0.5


def average_precision(scores: np.ndarray, right: np.ndarray, wanted: int | None = None) -> float | None:
    """The area under the curve of the highest precision over recall.

    Args:
        scores: float [N], the higher the surer.
        right: bool [N].
        wanted: how many there are to be found; None = as many as are right.

    Returns:
        Between 0 and 1; None where there is nothing to be found.

    Example:
        >>> average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]))
        0.8333333333333333
    """
    wanted = int(right.sum()) if wanted is None else wanted
    if not wanted:
        return None
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    found = np.cumsum(right[order])
    last = np.append(ranked[1:] != ranked[:-1], True)  # of those with equal scores
    found, taken = found[last], np.arange(1, len(ranked) + 1)[last]
    precision = np.maximum.accumulate((found / taken)[::-1])[::-1]
    return float(np.diff(found, prepend=0) @ precision / wanted)


def mean(values: Sequence[float | None]) -> float:
    """The mean over the classes that the test set shows; 0 where it shows none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image.

    Attributes:
        corners: float64 [N, 4]: left, top, right, bottom.
        classes: int64 [N].
        scores: float64 [N]; 1 for true objects.
    """

    corners: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, corners: Tensor, classes: Tensor, scores: Tensor | None = None) -> Boxes:
        """From tensors of any device and precision."""
        box = corners.detach().double().cpu().numpy().reshape(-1, 4)
        score = np.ones(len(box)) if scores is None else scores.detach().double().cpu().numpy()
        return cls(box, classes.detach().cpu().numpy(), score)


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every box with every other.

    Args:
        first: float64 [N, 4]: left, top, right, bottom.
        second: float64 [M, 4].

    Returns:
        float64 [N, M]; 0 where both are empty.

    Example:
        >>> overlaps(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [0, 0, 2, 2]]))
        array([[0.33333333, 1.        ]])
    """
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    opposite = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.clip(opposite - corner, 0, None), axis=2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class Evaluator:
    """Gathers the detections of a test set, image by image.

    Args:
        classes: number of classes, 0 … classes - 1.

    Example:
        >>> evaluator = Evaluator(1)
        >>> one = np.array([[0.0, 0, 10, 10]])
        >>> box = Boxes(one, np.array([0]), np.array([0.9]))
        >>> evaluator.add(box, box, np.array([False]))
        >>> evaluator.average_precisions()
        (1.0,)
    """

    def __init__(self, classes: int) -> None:
        self.images = 0
        self._wanted = [0] * classes
        self._scores: list[list[np.ndarray]] = [[] for _ in range(classes)]
        self._right: list[list[np.ndarray]] = [[] for _ in range(classes)]

    def add(self, found: Boxes, truth: Boxes, difficult: np.ndarray) -> None:
        """One image's detections.

        Args:
            found: what a detector says.
            truth: the objects.
            difficult: bool [objects].
        """
        self.images += 1
        for number in range(len(self._wanted)):
            mine, real = found.classes == number, truth.classes == number
            hard = difficult[real].astype(bool)
            self._wanted[number] += int((~hard).sum())
            order = np.argsort(-found.scores[mine], kind="stable")
            scores, boxes = found.scores[mine][order], found.corners[mine][order]
            right, counts = _match(overlaps(boxes, truth.corners[real]), hard)
            self._scores[number].append(scores[counts])
            self._right[number].append(right[counts])

    def average_precisions(self) -> tuple[float | None, ...]:
        """Each class's average precision; None for a class without an object that counts."""
        return tuple(
            average_precision(np.concatenate([np.empty(0), *scores]), np.concatenate([[], *right]).astype(bool), wanted)
            for scores, right, wanted in zip(self._scores, self._right, self._wanted, strict=True)
        )


def _match(overlap: np.ndarray, hard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which count.

    Args:
        overlap: float64 [detections, objects], the detections by falling score.
        hard: bool [objects].
    """
    count, objects = overlap.shape
    right, counts = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    if not count or not objects:
        return right, counts
    nearest = overlap.argmax(axis=1)
    near = overlap[np.arange(count), nearest] >= OVERLAP
    counts[near & hard[nearest]] = False
    candidates = np.flatnonzero(near & ~hard[nearest])
    # The first of each object's finds, which is its surest.
    right[candidates[np.unique(nearest[candidates], return_index=True)[1]]] = True
    return right, counts
