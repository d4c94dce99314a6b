"""The data sets of the studies: images, labels and the split that every run uses.

A data set is one entry in ``DATA_SETS``: a function that returns a ``Dataset``. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError, require

#: The digits' split: one third is held out, drawn class by class with this seed, the same for every arm and seed.
DIGITS_SPLIT_SEED = 2018
DIGITS_TEST_IMAGES = 599


@dataclass(frozen=True)
class Dataset:
    """A data set, split once and for all.

    Attributes:
        name: a key of ``DATA_SETS``.
        description: what it is, where it is from, how it was split and scaled: sentences for the report.
        train_images, test_images: float32 [N, C, H, W].
        train_labels, test_labels: int64 [N].
        classes: number of classes.
        sha256: of all images and labels in their order: equal sums mean an equal split of equal data.
    """

    name: str
    description: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    sha256: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.test_images.shape[1:]
        return channels, height, width


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_digits() -> Dataset:
    """The 1797 handwritten digits that ship inside scikit-learn: 8×8 pixels, 17 grey levels, ten classes.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
    of which scikit-learn holds the test part.

    Raises:
        AblationError: scikit-learn is missing.
    """
    require("sklearn", "scikit-learn", "the digits study (its images ship inside it)")
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import train_test_split

    scans = load_scans()
    # 0 .. 16 becomes 0 .. 1, exact in float32.
    images = torch.from_numpy(scans.images).to(torch.float32).div_(16).unsqueeze(1)
    labels = torch.from_numpy(scans.target).to(torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=scans.target, random_state=DIGITS_SPLIT_SEED
    )
    train_images, train_labels = images[train].contiguous(), labels[train].contiguous()
    test_images, test_labels = images[test].contiguous(), labels[test].contiguous()
    # Centred and scaled by the training images' own mean and deviation; the test images play no part in it.
    deviation, mean = torch.std_mean(train_images.double())
    train_images = ((train_images.double() - mean) / deviation).float()
    test_images = ((test_images.double() - mean) / deviation).float()
    description = (
        f"The {len(labels)} handwritten digits that ship inside scikit-learn: 8×8 pixels, ten classes, the test part "
        f"of the UCI set 'Optical Recognition of Handwritten Digits'. {len(train)} images train, {len(test)} test: one "
        f"fixed split, drawn class by class (seed {DIGITS_SPLIT_SEED}), the same for every arm and every seed. The "
        f"same people wrote both parts, so strangers' digits would be read less well."
    )
    return Dataset(
        "digits",
        description,
        train_images,
        train_labels,
        test_images,
        test_labels,
        classes=10,
        sha256=_digest(train_images, train_labels, test_images, test_labels),
    )


#: Every data set by its name.
DATA_SETS: dict[str, Callable[[], Dataset]] = {"digits": load_digits}


def load(name: str) -> Dataset:
    """A data set by its name.

    Raises:
        UsageError: there is none of that name.
        AblationError: a package that it needs is missing.
    """
    if name not in DATA_SETS:
        raise UsageError(f"unknown data set {name!r}; there is: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]()
