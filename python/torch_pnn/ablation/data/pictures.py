"""Reads image files with Pillow, and says of those that can't be read why.

A file that is empty, cut short, no image, or not to be opened is left out and named; it never ends a study by itself.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import describe_os_error, require

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Endings of files that are taken for images.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")

#: Images per thread that are decoded ahead of what has been asked for.
AHEAD = 64


class UnreadableError(Exception):
    """An image that can't be read; its text says why."""


@dataclass(frozen=True)
class Header:
    """What a file says of its image before it is decoded.

    Attributes:
        width, height: in pixels.
        format: "JPEG", "PNG" and so on.
    """

    width: int
    height: int
    format: str


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_header(path: Path) -> Header:
    """Reads the size and the format alone.

    Raises:
        UnreadableError: it can't be done.
    """
    return _read(path, lambda image: Header(*image.size, image.format or "unknown"))


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        pixels: uint8 [3, H, W].
        format: of the file: "JPEG", "PNG" and so on.
    """

    pixels: Tensor
    format: str


def read(path: Path, prepare: Callable[[Image], Image] = lambda image: image) -> Picture:
    """Decodes an image, in colour whatever it was.

    Args:
        path: the file.
        prepare: what is done to it then: a crop, another size.

    Raises:
        UnreadableError: it can't be done.
    """

    def decode(image: Image) -> Picture:
        pixels = np.array(prepare(image.convert("RGB")))
        return Picture(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), image.format or "unknown")

    return _read(path, decode)


def _read(path: Path, use: Callable[[Image], Result]) -> Result:
    pillow = require("PIL.Image", "pillow", "reading image files")
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UnreadableError("empty file")
            with pillow.open(file) as image:
                return use(image)
    except pillow.UnidentifiedImageError:
        raise UnreadableError("not an image, or of an unknown format") from None
    except OSError as error:
        reason = describe_os_error(error) if error.errno else str(error).split(" (")[0]
        raise UnreadableError(reason) from None
    # What Pillow's decoders raise on damaged files, format by format.
    except (ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error, zlib.error) as e:
        raise UnreadableError(f"damaged ({e})") from None
    except pillow.DecompressionBombError as error:
        raise UnreadableError(str(error)) from None


def in_order(work: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD) -> Iterator[Result]:
    """Applies a function to items on as many threads as PyTorch uses, and yields the results in the items' order.

    Decoding leaves the interpreter's lock, so threads decode side by side. Never more than ``ahead`` results per
    thread wait.
    """
    workers = max(1, torch.get_num_threads())
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers, "decode") as pool:
        waiting: list[Future[Result]] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def attempt(work: Callable[[Item], Result]) -> Callable[[Item], Result | str]:
    """The same function, which returns the reason in place of raising ``UnreadableError``."""

    def attempted(item: Item) -> Result | str:
        try:
            return work(item)
        except UnreadableError as error:
            return str(error)

    return attempted


def stretched(image: Image, size: tuple[int, int]) -> Image:
    """The whole image brought to a size (height, width); its sides may change their ratio."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), _bilinear())


def centred(image: Image, size: tuple[int, int]) -> Image:
    """The middle 7/8 of an image brought to a size (height, width), as for ImageNet's tests (256 to 224 pixels)."""
    height, width = size
    if image.size == (width, height):
        return image
    scale = min(image.size[0] / width, image.size[1] / height) * 7 / 8
    wide, high = width * scale, height * scale
    left, top = (image.size[0] - wide) / 2, (image.size[1] - high) / 2
    return image.resize((width, height), _bilinear(), box=(left, top, left + wide, top + high))


def cropped(image: Image, size: tuple[int, int], box: tuple[int, int, int, int], mirrored: bool) -> Image:
    """A part of an image (left, top, right, bottom) brought to a size (height, width), then perhaps mirrored."""
    height, width = size
    part = image.resize((width, height), _bilinear(), box=box)
    return part.transpose(require("PIL.Image", "pillow", "").Transpose.FLIP_LEFT_RIGHT) if mirrored else part


def _bilinear() -> int:
    # With antialiasing, as Pillow does it: each new pixel is a weighted mean of all that it covers.
    return require("PIL.Image", "pillow", "").Resampling.BILINEAR


def named(paths: Sequence[Path], root: Path, reasons: Sequence[str | None]) -> list[str]:
    """Those that have a reason, as "path: reason"; paths below ``root``."""
    return [
        f"{path.relative_to(root)}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason is not None
    ]
