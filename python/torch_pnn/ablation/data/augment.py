"""Random changes of training images. What an image undergoes hangs on the seed, the epoch and its place alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import draws

#: The directions of a shifted test set, as (rows, columns): right, down, left, up.
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def move(images: Tensor, rows: int, columns: int) -> Tensor:
    """Moves images down and to the right (negative: up and to the left); what is uncovered becomes black, 0.

    Args:
        images: [..., H, W].
        rows: pixels downwards.
        columns: pixels to the right.

    Example:
        >>> move(torch.tensor([[1, 2], [3, 4]]), 0, 1)
        tensor([[0, 1],
                [0, 3]])
    """
    height, width = images.shape[-2:]
    moved = torch.zeros_like(images)
    if abs(rows) < height and abs(columns) < width:
        down, right = slice(max(rows, 0), height + min(rows, 0)), slice(max(columns, 0), width + min(columns, 0))
        up, left = slice(max(-rows, 0), height - max(rows, 0)), slice(max(-columns, 0), width - max(columns, 0))
        moved[..., down, right] = images[..., up, left]
    return moved


@dataclass(frozen=True)
class Crop:
    """A black border, a crop of the image's own size out of it, and a mirror image half the time.

    With a border of 4 it is what CIFAR is usually trained with (He et al., CVPR 2016, section 4.2).

    Attributes:
        border: pixels on each side; the crop moves the image by up to as many.
        flip: left and right change places with probability 1/2.
    """

    border: int
    flip: bool
    #: Random words that an image takes: its move, down and to the right, and the mirror.
    numbers: ClassVar[int] = 3

    @property
    def words(self) -> str:
        """For the report."""
        mirror = " and mirrored half the time" if self.flip else ""
        return f"moved at random by up to {self.border} pixels in each direction (black comes in){mirror}"

    def __call__(self, images: Tensor, words: np.ndarray) -> Tensor:
        """Changes a batch.

        Args:
            images: [N, C, H, W].
            words: uint64 [N, numbers], each image's own random bits.
        """
        count, _, height, width = images.shape
        random = draws.uniforms(words)
        offsets = torch.from_numpy((random[:, :2] * (2 * self.border + 1)).astype(np.int64))
        padded = F.pad(images, (self.border,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, rows, columns, H, W], nothing copied
        cropped = windows[torch.arange(count), :, offsets[:, 0], offsets[:, 1]]
        if not self.flip:
            return cropped
        mirrored = torch.from_numpy(random[:, 2] < 0.5)
        return torch.where(mirrored.reshape(-1, 1, 1, 1), cropped.flip(-1), cropped)


@dataclass(frozen=True)
class ResizedCrop:
    """A part of random area and shape, brought to one size, and a mirror image half the time: as for ImageNet.

    The part has 8 % to 100 % of the area and a ratio of width to height between 3/4 and 4/3, tried ten times, else the
    largest part in the middle: Szegedy et al., CVPR 2015, section 6, with torchvision's details.
    """

    #: Random words that an image takes: ten tries of area and ratio, the part's place, and the mirror.
    numbers: ClassVar[int] = 23

    @property
    def words(self) -> str:
        """For the report."""
        return (
            "cropped at random to between 8 % and 100 % of their area, with sides between 3:4 and 4:3, and mirrored "
            "half the time"
        )

    def part(self, width: int, height: int, words: np.ndarray) -> tuple[tuple[int, int, int, int], bool]:
        """Which part of an image to show.

        Args:
            width: of the image, in pixels.
            height: likewise.
            words: uint64 [numbers], its random bits.

        Returns:
            ((left, top, right, bottom), mirrored).
        """
        random = draws.uniforms(words)
        mirrored = bool(random[22] < 0.5)
        for attempt in range(10):
            area = width * height * (0.08 + 0.92 * random[2 * attempt])
            ratio = math.exp((2 * random[2 * attempt + 1] - 1) * math.log(4 / 3))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = int(random[20] * (width - wide + 1)), int(random[21] * (height - high + 1))
                return (left, top, left + wide, top + high), mirrored
        wide, high = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        left, top = (width - wide) // 2, (height - high) // 2
        return (left, top, left + wide, top + high), mirrored


Augmentation = Crop | ResizedCrop
