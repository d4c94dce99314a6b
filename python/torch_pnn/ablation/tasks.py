"""What a network's outputs mean: how they are trained, and how they are measured over a whole test set.

A task follows from the data: one class for each image (accuracy), several (mean average precision), or boxes (mean
average precision at an overlap of 0.5). Every measurement is taken over the whole set at once, never as an average over
batches, so that it does not hang on the batch size.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import detection
from .data import CLASSIFICATION, DETECTION, MULTILABEL, Dataset

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Score:
    """What came of a test.

    Attributes:
        value: the headline, between 0 and 1.
        loss: mean over the images; None where the task has none in a test.
        correct: right answers, where answers are right or wrong; else None.
        total: images tested.
        per_class: accuracy or average precision of each class; None for a class that the test set doesn't show.
    """

    value: float
    loss: float | None
    correct: int | None
    total: int
    per_class: tuple[float | None, ...]


class Task(ABC):
    """What the outputs of a network mean.

    Attributes:
        metric: the name of ``Score.value``.
        test_batch: images of a batch in a test, so that they fit into memory; the score does not hang on it.
        classes: number of classes.
    """

    metric: str
    test_batch: int = 256

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def loss(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """The loss that is minimised: a mean over the batch."""
        return self.training_step(model, inputs, targets)[0]

    @abstractmethod
    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
        """The loss, and how many of the batch's answers were right (int64, no gradient; None where none are)."""

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Score:
        """Measures a network over a whole test set, in evaluation mode and without gradients.

        Args:
            model: left in the mode that it was in.
            batches: of (inputs, targets).

        Raises:
            ValueError: there is no image.
        """
        with _evaluation(model):
            return self._evaluate(model, batches)

    @abstractmethod
    def _evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Score: ...


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Classification(Task):
    """One class for each image: cross-entropy, and the share of right answers.

    Example:
        >>> images, labels = torch.eye(3).reshape(3, 3, 1, 1), torch.tensor([0, 1, 0])
        >>> score = Classification(3).evaluate(nn.Flatten(), [(images, labels)])
        >>> score.correct, score.total, score.per_class
        (2, 3, (0.5, 1.0, None))
    """

    metric = "accuracy"

    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy, and how many answers were right."""
        logits = model(inputs)
        return F.cross_entropy(logits, targets), (logits.detach().argmax(dim=1) == targets).sum()

    def _evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Score:
        losses, rights, labels = [], [], []
        for inputs, targets in batches:
            logits = model(inputs)
            losses.append(F.cross_entropy(logits.double(), targets, reduction="none").cpu())
            rights.append((logits.argmax(dim=1) == targets).cpu())
            labels.append(targets.cpu())
        right, label = _joined(rights), _joined(labels)
        shown = torch.bincount(label, minlength=self.classes).tolist()
        found = torch.bincount(label[right], minlength=self.classes).tolist()
        correct = int(right.sum())
        return Score(
            correct / len(label),
            float(_joined(losses).mean()),
            correct,
            len(label),
            tuple(good / count if count else None for good, count in zip(found, shown, strict=True)),
        )


class Multilabel(Task):
    """Several classes for each image: a logistic loss for each, and the mean of the classes' average precisions.

    Targets are 1 (shown), 0 (not shown) and -1 (shown, but too hard to see: it counts for nothing, as in VOC). Average
    precision is VOC's since 2010: the area under the curve of precision over recall, precision taken as the highest at
    this recall or a higher one. Images with equal scores are ranked together.
    """

    metric = "mAP"

    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
        """The mean logistic loss of everything that counts."""
        counts = targets >= 0
        losses = F.binary_cross_entropy_with_logits(model(inputs), targets.clamp(min=0), reduction="none")
        return (losses * counts).sum() / counts.sum().clamp(min=1), None

    def _evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Score:
        scores, answers = [], []
        for inputs, targets in batches:
            scores.append(model(inputs).double().cpu())
            answers.append(targets.cpu())
        score, answer = _joined(scores), _joined(answers)
        counts = answer >= 0
        losses = F.binary_cross_entropy_with_logits(score, answer.clamp(min=0).double(), reduction="none")
        loss = float(losses[counts].sum() / counts.sum().clamp(min=1))
        per_class = tuple(
            detection.average_precision(
                score[counts[:, number], number].numpy(), answer[counts[:, number], number].numpy() == 1
            )
            for number in range(self.classes)
        )
        return Score(detection.mean(per_class), loss, None, len(answer), per_class)


class Detection(Task):
    """Boxes: the detector's own losses, and VOC's mean average precision at an overlap of 0.5.

    Networks are called as torchvision's detectors are: in training with images and targets they return a dictionary of
    losses, in a test with images a dictionary of boxes, labels and scores for each. Label 0 is the background, so class
    c of the data has label c + 1.
    """

    metric = "mAP@0.5"
    test_batch = 8

    def training_step(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
        """The sum of the detector's losses."""
        losses = list(model(inputs, targets).values())
        return torch.stack([loss.reshape(()) for loss in losses]).sum(), None

    def _evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Score:
        evaluator = detection.Evaluator(self.classes)
        for inputs, targets in batches:
            for found, truth in zip(model(inputs), targets, strict=True):
                evaluator.add(
                    detection.Boxes.of(found["boxes"], found["labels"] - 1, found["scores"]),
                    detection.Boxes.of(truth["boxes"], truth["labels"] - 1),
                    truth["difficult"].cpu().numpy(),
                )
        if not evaluator.images:
            raise ValueError("a test needs at least one image")
        per_class = evaluator.average_precisions()
        return Score(detection.mean(per_class), None, None, evaluator.images, per_class)


def _joined(parts: list[Tensor]) -> Tensor:
    if not parts:
        raise ValueError("a test needs at least one image")
    return torch.cat(parts)


_TASKS: dict[str, type[Task]] = {CLASSIFICATION: Classification, MULTILABEL: Multilabel, DETECTION: Detection}


def find_task(data: Dataset) -> Task:
    """The task that a data set sets.

    Example:
        >>> from torch_pnn.ablation.data import load
        >>> from torch_pnn.ablation.study import DataSettings
        >>> find_task(load(DataSettings("digits"))).metric
        'accuracy'
    """
    return _TASKS[data.task](data.classes)
