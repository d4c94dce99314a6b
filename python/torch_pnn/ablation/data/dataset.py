"""What every data set offers to a run: training batches in an order fixed by seeds, test sets, and a description."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import draws
from .augment import DIRECTIONS, Crop, move

Batch = tuple[Any, Any]
Device = str | torch.device

CLASSIFICATION, MULTILABEL, DETECTION = "classification", "multilabel", "detection"


def shift_name(pixels: int) -> str:
    """The name of the test set that is moved by so many pixels."""
    return f"shift {pixels}"


class Dataset(ABC):
    """Images and what is known of them, split once and for all.

    Attributes:
        name: a key of ``DATA_SETS``.
        description: what it is, where it is from, how it was split and prepared: sentences for the report.
        class_names: the classes, in the order of their numbers.
        train_count: images that train.
        test_count: images that test.
        validation_count: images held out to choose the best epoch by.
        sha256: equal digests mean equal images, labels and split; ``description`` says what it is taken over.
        image_shape: (channels, height, width) of one image.
        task: "classification", "multilabel" or "detection"; ``tasks.find_task`` has what goes with it.
        shifts: pixels by which the test images are moved in the further test sets.
    """

    def __init__(
        self,
        name: str,
        description: str,
        class_names: Sequence[str],
        *,
        counts: tuple[int, int, int],
        sha256: str,
        image_shape: tuple[int, int, int],
        task: str = CLASSIFICATION,
        shifts: Sequence[int] = (),
        unreadable: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.description = description
        self.class_names = tuple(class_names)
        self.train_count, self.test_count, self.validation_count = counts
        self.sha256 = sha256
        self.image_shape = image_shape
        self.task = task
        self.shifts = tuple(shifts)
        self._unreadable = dict.fromkeys(unreadable)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Files that were left out, each with the reason: found when loading, or later when first decoded."""
        return tuple(self._unreadable)

    @property
    def test_sets(self) -> tuple[str, ...]:
        """Names for ``test_batches``: "test", "validation" where there is one, "shift 1" and so on.

        A shifted set holds every test image four times: moved right, down, left and up, what is uncovered black.
        """
        validation = ("validation",) if self.validation_count else ()
        return ("test", *validation, *(shift_name(pixels) for pixels in self.shifts))

    def train_batches(
        self,
        batch_size: int,
        *,
        epoch: int,
        order: int,
        augmentation: int,
        device: Device = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """One pass over the training images, each once; the last batch may be smaller.

        Args:
            batch_size: images in a batch.
            epoch: the number of the pass.
            order: seed of the order; with ``epoch`` it fixes the order, whatever was drawn before.
            augmentation: seed of the random changes; with ``epoch`` and the image's place it fixes them.
            device: where the batches are wanted.
            share: this process's number, and how many processes train together: only its part of each batch is given
                out. A batch with fewer images than there are processes is given to each as a whole.

        Yields:
            (inputs, targets). Classification: float32 [N, C, H, W] and int64 [N]. Multilabel: targets float32
            [N, classes] of 1, 0 and -1, where -1 counts for nothing. Detection: lists of images and of dictionaries,
            as torchvision's detectors take them.
        """
        permutation = draws.permutation(order, epoch, self.train_count)
        batches = [permutation[first : first + batch_size] for first in range(0, self.train_count, batch_size)]
        number, of = share
        batches = [
            batch if len(batch) < of else batch[len(batch) * number // of : len(batch) * (number + 1) // of]
            for batch in batches
        ]
        return self._train(batches, epoch, augmentation, torch.device(device))

    def test_batches(self, which: str, batch_size: int, device: Device = "cpu") -> Iterator[Batch]:
        """One pass over a test set, always in the same order.

        Args:
            which: one of ``test_sets``.
            batch_size: images in a batch.
            device: where the batches are wanted.

        Raises:
            KeyError: there is no such test set.
        """
        if which not in self.test_sets:
            raise KeyError(f"{self.name} has no test set {which!r}; there is: {', '.join(self.test_sets)}")
        pixels = next((pixels for pixels in self.shifts if which == shift_name(pixels)), 0)
        moves = [(pixels * rows, pixels * columns) for rows, columns in DIRECTIONS] if pixels else [(0, 0)]
        return self._test(which == "validation", moves, batch_size, torch.device(device))

    @abstractmethod
    def _train(
        self, batches: Sequence[np.ndarray], epoch: int, augmentation: int, device: torch.device
    ) -> Iterator[Batch]:
        """The training batches with those images."""

    @abstractmethod
    def _test(
        self, validation: bool, moves: Sequence[tuple[int, int]], batch_size: int, device: torch.device
    ) -> Iterator[Batch]:
        """The test or the validation images, once for each move (rows, columns)."""


class TensorDataset(Dataset):
    """A data set that lies in memory: images as bytes, a quarter of what floating-point numbers take.

    Args:
        name, description, class_names, task, shifts, unreadable: see ``Dataset``.
        train, test, validation: images [N, C, H, W] and their labels; ``validation`` may be None. Images of uint8 are
            brought to mean 0 and deviation 1 by those of the training images; others are given out as they are.
        statistics: what ``mean_and_deviation`` says of the training images, where that is known.
        augmentation: what training images undergo.

    Example:
        >>> images, labels = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2), torch.tensor([0, 1, 0])
        >>> data = TensorDataset("three", "Three images.", ("even", "odd"), (images, labels), (images, labels))
        >>> [len(targets) for _, targets in data.train_batches(2, epoch=1, order=0, augmentation=0)]
        [2, 1]
    """

    def __init__(
        self,
        name: str,
        description: str,
        class_names: Sequence[str],
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None = None,
        *,
        statistics: tuple[Tensor, Tensor] | None = None,
        task: str = CLASSIFICATION,
        augmentation: Crop | None = None,
        shifts: Sequence[int] = (),
        unreadable: Sequence[str] = (),
    ) -> None:
        channels, height, width = test[0].shape[1:]
        super().__init__(
            name,
            description,
            class_names,
            counts=(len(train[1]), len(test[1]), len(validation[1]) if validation else 0),
            sha256=digest(*train, *test, *(validation or ())),
            image_shape=(channels, height, width),
            task=task,
            shifts=shifts,
            unreadable=unreadable,
        )
        self._train_part, self._test_part, self._validation_part = train, test, validation
        self._augmentation = augmentation
        self.mean, self.deviation = statistics or mean_and_deviation(train[0])

    def _train(
        self, batches: Sequence[np.ndarray], epoch: int, augmentation: int, device: torch.device
    ) -> Iterator[Batch]:
        images, labels = self._train_part
        change = self._augmentation
        if change is not None:
            words = draws.bits(augmentation, epoch, draws.AUGMENTATION, 0, len(labels), change.numbers)
        for places in batches:
            chosen = torch.from_numpy(places)
            batch = images[chosen]
            if change is not None:
                batch = change(batch, words[places])
            yield self._prepare(batch, device), labels[chosen].to(device)

    def _test(
        self, validation: bool, moves: Sequence[tuple[int, int]], batch_size: int, device: torch.device
    ) -> Iterator[Batch]:
        images, labels = self._validation_part if validation and self._validation_part else self._test_part
        for rows, columns in moves:
            for first in range(0, len(labels), batch_size):
                part = slice(first, first + batch_size)
                yield self._prepare(move(images[part], rows, columns), device), labels[part].to(device)

    def _prepare(self, images: Tensor, device: torch.device) -> Tensor:
        images = images.to(device)
        return normalise(images, self.mean, self.deviation) if images.dtype == torch.uint8 else images


def digest(*tensors: Tensor) -> str:
    """SHA-256 over tensors in their order, with their shapes and types.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
        False
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def mean_and_deviation(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each channel, from exact sums over whole numbers.

    Args:
        images: uint8 [N, C, H, W]; those of another type have mean 0 and deviation 1.

    Returns:
        Two float32 [C]; a channel that never changes has deviation 1.
    """
    channels = images.shape[1]
    if images.dtype != torch.uint8:
        return torch.zeros(channels), torch.ones(channels)
    values = np.arange(256, dtype=np.float64)
    means, deviations = [], []
    for channel in range(channels):
        # A histogram: 256 counts say all, and nothing is converted.
        counts = np.zeros(256)
        for part in images.split(4096):
            counts += np.bincount(part[:, channel].numpy().reshape(-1), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(mean)
        deviations.append(variance**0.5 or 1.0)
    return torch.tensor(means), torch.tensor(deviations)


def normalise(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Bytes [N, C, H, W] to float32 of mean 0 and deviation 1, channel by channel, on the images' device."""
    shape = (-1, 1, 1)
    return (
        images.to(torch.float32)
        .sub_(mean.to(images.device).reshape(shape))
        .div_(deviation.to(images.device).reshape(shape))
    )


def normalisation_in_words(mean: Tensor, deviation: Tensor, of: str = "training images") -> str:
    """What ``normalise`` does, as a sentence.

    Example:
        >>> normalisation_in_words(torch.tensor([51.0]), torch.tensor([25.5]))
        "Pixels are centred and scaled by the training images' own mean (0.2000) and deviation (0.1000; 1 is white)."
    """

    def listed(values: Tensor) -> str:
        return ", ".join(f"{value / 255:.4f}" for value in values.tolist())

    return (
        f"Pixels are centred and scaled by the {of}' own mean ({listed(mean)}) and deviation ({listed(deviation)}; "
        f"1 is white)."
    )
