"""A data set whose images stay on disk: each is decoded when its batch comes, on as many threads as PyTorch uses."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import draws, pictures
from .augment import Crop, ResizedCrop, move
from .dataset import CLASSIFICATION, Batch, Dataset, mean_and_deviation, normalise

if TYPE_CHECKING:
    from PIL.Image import Image

#: Brings an image to a size (height, width).
Prepare = Callable[["Image", tuple[int, int]], "Image"]

#: Training images that the mean and the deviation are taken from where there are more.
SAMPLE = 2048


def prepared(path: Path, size: tuple[int, int], prepare: Prepare | None) -> pictures.Picture:
    """An image at a size.

    Raises:
        UnreadableError: it can't be read, or has another size and there is no ``prepare``.
    """

    def bring(image: Image) -> Image:
        if prepare is not None:
            return prepare(image, size)
        if image.size != (size[1], size[0]):
            raise pictures.UnreadableError(f"{image.size[0]}×{image.size[1]} pixels in place of {size[1]}×{size[0]}")
        return image

    return pictures.read(path, bring)


def statistics(paths: Sequence[Path], size: tuple[int, int], prepare: Prepare) -> tuple[Tensor, Tensor, str]:
    """Mean and deviation of each channel, over at most SAMPLE images, evenly spread; and over which, in words."""
    places = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), SAMPLE)).round().astype(int))
    work = pictures.attempt(functools.partial(prepared, size=size, prepare=prepare))
    images = [
        result.pixels
        for result in pictures.in_order(work, [paths[place] for place in places])
        if not isinstance(result, str)
    ]
    of = "training images" if len(places) == len(paths) else f"{len(images)} evenly spread training images"
    if not images:
        return torch.zeros(3), torch.ones(3), of
    return *mean_and_deviation(torch.stack(images)), of


Part = tuple[Sequence[Path], Tensor]


class FileDataset(Dataset):
    """Images on disk, and their classes.

    Args:
        name, description, class_names, task, shifts, unreadable: see ``Dataset``.
        train, test, validation: files and their labels (int64 [N]) or targets (float32 [N, classes]).
        root: the folder that names are given relative to.
        size: (height, width) of an image in a batch.
        prepare: brings a test image to it, and a training image where no ResizedCrop does.
        mean, deviation: of the training images, float32 [3], in bytes.
        augmentation: what training images undergo.
    """

    def __init__(
        self,
        name: str,
        description: str,
        class_names: Sequence[str],
        train: Part,
        test: Part,
        validation: Part | None = None,
        *,
        root: Path,
        size: tuple[int, int],
        prepare: Prepare,
        mean: Tensor,
        deviation: Tensor,
        task: str = CLASSIFICATION,
        augmentation: Crop | ResizedCrop | None = None,
        shifts: Sequence[int] = (),
        unreadable: Sequence[str] = (),
    ) -> None:
        super().__init__(
            name,
            description,
            class_names,
            counts=(len(train[0]), len(test[0]), len(validation[0]) if validation else 0),
            sha256=names_sha256(
                root, [(paths, targets.tolist()) for paths, targets in filter(None, (train, test, validation))]
            ),
            image_shape=(3, *size),
            task=task,
            shifts=shifts,
            unreadable=unreadable,
        )
        self._parts = {"train": train, "test": test, "validation": validation}
        self._root, self._size, self._bring = root, size, prepare
        self._augmentation = augmentation
        self.mean, self.deviation = mean, deviation

    def _train(
        self, batches: Sequence[np.ndarray], epoch: int, augmentation: int, device: torch.device
    ) -> Iterator[Batch]:
        part = self._parts["train"]
        assert part is not None
        paths, targets = part
        change = self._augmentation

        def one(place: int) -> Tensor:
            path = paths[place]
            if change is None:
                return prepared(path, self._size, self._bring).pixels
            words = draws.bits(augmentation, epoch, draws.AUGMENTATION, place, 1, change.numbers)
            if isinstance(change, Crop):
                return change(prepared(path, self._size, self._bring).pixels.unsqueeze(0), words)[0]

            def crop(image: Image) -> Image:
                box, mirrored = change.part(*image.size, words[0])
                return pictures.cropped(image, self._size, box, mirrored)

            return pictures.read(path, crop).pixels

        return self._batches(one, paths, targets, batches, device)

    def _test(
        self, validation: bool, moves: Sequence[tuple[int, int]], batch_size: int, device: torch.device
    ) -> Iterator[Batch]:
        part = self._parts["validation" if validation else "test"]
        assert part is not None
        paths, targets = part
        every = np.arange(len(paths))
        batches = [every[first : first + batch_size] for first in range(0, len(paths), batch_size)]
        for rows, columns in moves:

            def one(place: int, rows: int = rows, columns: int = columns) -> Tensor:
                return move(prepared(paths[place], self._size, self._bring).pixels, rows, columns)

            yield from self._batches(one, paths, targets, batches, device)

    def _batches(
        self,
        work: Callable[[int], Tensor],
        paths: Sequence[Path],
        targets: Tensor,
        batches: Sequence[np.ndarray],
        device: torch.device,
    ) -> Iterator[Batch]:
        results = pictures.in_order(pictures.attempt(work), (place for batch in batches for place in batch.tolist()))
        for batch in batches:
            images, kept = [], []
            for place in batch.tolist():
                result = next(results)
                if isinstance(result, str):
                    self._unreadable.setdefault(f"{paths[place].relative_to(self._root)}: {result}")
                else:
                    images.append(result)
                    kept.append(place)
            if kept:
                pixels = torch.stack(images).to(device)
                yield normalise(pixels, self.mean, self.deviation), targets[kept].to(device)


def names_sha256(root: Path, parts: Sequence[tuple[Sequence[Path], Sequence[Any]]]) -> str:
    """SHA-256 over the files' names, sizes and targets, part by part: large sets are not read for it."""
    found = hashlib.sha256()
    for paths, targets in parts:
        for path, target in zip(paths, targets, strict=True):
            found.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0{target}\n".encode())
        found.update(b"\n")
    return found.hexdigest()
