"""Draws from the training images: those held out to choose the best epoch by, and a smaller training set."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from ..study import DataSettings
from . import draws

_VALIDATION, _SUBSET = 0, 1


def balanced(labels: np.ndarray, count: int, seed: int, part: int) -> np.ndarray:
    """Draws images so that every class has as many as the others, or all that it has where those are fewer.

    Args:
        labels: int64 [N].
        count: how many images; at most N.
        seed: of the draw.
        part: tells one draw with this seed from another.

    Returns:
        int64 [count], rising.

    Example:
        >>> labels = np.array([0] * 6 + [1] * 6 + [2])
        >>> np.bincount(labels[balanced(labels, 7, 0, 0)]).tolist()
        [3, 3, 1]
    """
    order = draws.permutation(seed, part, len(labels), draws.SPLIT)
    # Each image's rank among those of its class, in the drawn order: the first of every class come first.
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels))
    first = np.lexsort((place[by_class], rank))
    return np.sort(by_class[first[:count]])


def split(settings: DataSettings, labels: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the training images train, and which are held out.

    The held-out images are drawn first, so they stay the same whatever ``train_images`` is.

    Args:
        settings: see there.
        labels: int64 [count]: draws class by class; None where an image has no single class.
        count: of the images that there are.

    Returns:
        (train, validation), each int64 and rising.

    Raises:
        UsageError: more images are asked for than there are.
    """
    wanted, held = settings.train_images, settings.validation_images
    for name, value in (("train_images", wanted), ("validation_images", held)):
        if value < 0:
            raise UsageError(f"data.{name} is {value}; it can't be negative")
    if held + max(wanted, 1) > count:
        raise UsageError(
            f"data.train_images {wanted or 'all'} and data.validation_images {held} are more than {settings.name}'s "
            f"{count} training images"
        )
    group = np.zeros(count, dtype=np.int64) if labels is None else labels
    validation = balanced(group, held, settings.split_seed, _VALIDATION)
    rest = np.setdiff1d(np.arange(count), validation)
    if wanted:
        rest = rest[balanced(group[rest], wanted, settings.split_seed, _SUBSET)]
    return rest, validation


def in_words(settings: DataSettings, count: int, by_class: bool) -> str:
    """What ``split`` did, as a sentence; "" where it took everything."""
    found = []
    if settings.validation_images:
        found.append(f"{settings.validation_images} are held out to choose the best epoch by")
    if settings.train_images:
        found.append(f"{settings.train_images} train")
    if not found:
        return ""
    how = "as many of each class as can be" if by_class else "at random"
    return f"Of the {count} training images {' and '.join(found)}, drawn {how} (seed {settings.split_seed})."
