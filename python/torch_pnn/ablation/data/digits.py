"""The handwritten digits that ship inside scikit-learn: no files, nothing to get."""

from __future__ import annotations

import torch

from ..errors import require
from ..study import DataSettings
from . import split
from .augment import Crop
from .dataset import Dataset, TensorDataset

#: The digits' split: one third is held out, drawn class by class with this seed, the same for every arm and seed.
SPLIT_SEED = 2018
TEST_IMAGES = 599


def load(settings: DataSettings) -> Dataset:
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
    images = torch.from_numpy(scans.images).to(torch.uint8).unsqueeze(1)  # 0 … 16
    labels = torch.from_numpy(scans.target).to(torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_IMAGES, stratify=scans.target, random_state=SPLIT_SEED
    )
    description = (
        f"The {len(labels)} handwritten digits that ship inside scikit-learn: 8×8 pixels, ten classes, the test part "
        f"of the UCI set 'Optical Recognition of Handwritten Digits'. {len(train)} images train, {len(test)} test: one "
        f"fixed split, drawn class by class (seed {SPLIT_SEED}), the same for every arm and every seed. The "
        f"same people wrote both parts, so strangers' digits would be read less well."
    )
    chosen, held = split.split(settings, labels[train].numpy(), len(train))
    return TensorDataset(
        settings.name,
        " ".join(filter(None, [description, split.in_words(settings, len(train), by_class=True)])),
        [str(digit) for digit in range(10)],
        (images[train][chosen], labels[train][chosen]),
        (images[test], labels[test]),
        (images[train][held], labels[train][held]) if len(held) else None,
        augmentation=Crop(1, flip=False) if settings.augment else None,
        shifts=settings.shifts,
    )
