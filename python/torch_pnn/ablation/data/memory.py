"""Makes a data set of images that lie in memory: the split, the augmentation and the words that describe them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..study import DataSettings
from . import split
from .augment import Crop
from .dataset import CLASSIFICATION, Dataset, TensorDataset, mean_and_deviation, normalisation_in_words


def make(
    settings: DataSettings,
    description: str,
    class_names: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    crop: Crop,
    *,
    task: str = CLASSIFICATION,
    unreadable: Sequence[str] = (),
) -> Dataset:
    """A data set as a study's settings want it.

    Args:
        settings: the subset, the validation images, whether to augment, the shifts.
        description: of the images alone; what is done to them is added.
        class_names: by number.
        train: uint8 [N, C, H, W], and labels (int64 [N]) or targets (float32 [N, classes]).
        test: likewise.
        crop: what training images undergo if ``settings.augment``.
        task: see ``Dataset``.
        unreadable: see ``Dataset``.
    """
    images, labels = train
    by_class = labels.ndim == 1
    chosen, held = split.split(settings, labels.numpy() if by_class else None, len(labels))
    # Where every image trains, the tensors are used as they are: no second copy.
    kept = train if len(chosen) == len(labels) else (images[chosen], labels[chosen])
    statistics = mean_and_deviation(kept[0])
    words = [
        description,
        split.in_words(settings, len(labels), by_class),
        normalisation_in_words(*statistics),
        f"In training they are {crop.words}." if settings.augment else "",
    ]
    return TensorDataset(
        settings.name,
        " ".join(filter(None, words)),
        class_names,
        kept,
        test,
        (images[held], labels[held]) if len(held) else None,
        statistics=statistics,
        task=task,
        augmentation=crop if settings.augment else None,
        shifts=settings.shifts,
        unreadable=unreadable,
    )
