"""The data sets of the studies: images, labels and the split that every run uses.

One concern a file:

    dataset   what every data set offers, and those that lie in memory
    files     those that stay on disk
    memory    split, augmentation and description of what lies in memory
    digits    the digits in scikit-learn
    idx       MNIST, Fashion-MNIST, Kuzushiji-MNIST
    cifar     CIFAR-10 and CIFAR-100
    folders   image folders: ImageNet, Imagenette, Tiny-ImageNet
    voc       PASCAL VOC: which objects an image shows, and where
    places    finds files under the root, unpacks archives
    pictures  decodes image files
    split     the training subset and the validation images
    augment   random changes of training images
    draws     random numbers that hang on seed, epoch and place alone

A data set is one entry in ``DATA_SETS``. Nothing is downloaded unless the settings ask for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..errors import UsageError
from ..study import DataSettings
from . import cifar, digits, folders, idx, voc
from .dataset import CLASSIFICATION, DETECTION, MULTILABEL, Dataset, TensorDataset

__all__ = ["CLASSIFICATION", "DATA_SETS", "DETECTION", "MULTILABEL", "Dataset", "TensorDataset", "load"]

#: Every data set by its name.
DATA_SETS: dict[str, Callable[[DataSettings], Dataset]] = {
    "digits": digits.load,
    "mnist": idx.load_mnist,
    "fashion-mnist": idx.load_fashion_mnist,
    "kmnist": idx.load_kmnist,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "image-folder": folders.load,
    "voc-classification": voc.load_classification,
    "voc-detection": voc.load_detection,
}


def load(settings: DataSettings) -> Dataset:
    """A data set, as the settings want it.

    Raises:
        UsageError: there is none of that name, its files are not where they were looked for, or a setting is wrong.
        AblationError: files are damaged, nothing can be read, or a package is missing.

    Example:
        >>> load(DataSettings("digits")).train_count
        1198
    """
    if settings.name not in DATA_SETS:
        near = difflib.get_close_matches(settings.name, DATA_SETS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"unknown data set {settings.name!r}{hint}; there is: {', '.join(DATA_SETS)}")
    for pixels in settings.shifts:
        if pixels < 1:
            raise UsageError(f"data.shifts holds {pixels}; each should be at least 1 pixel")
    if len(set(settings.shifts)) != len(settings.shifts):
        raise UsageError(f"data.shifts names a number twice: {', '.join(map(str, settings.shifts))}")
    dataset = DATA_SETS[settings.name](settings)
    size = dataset.image_shape[1:]
    if settings.image_size and dataset.task != DETECTION and size != (settings.image_size,) * 2:
        raise UsageError(
            f"data.image_size is {settings.image_size}; images of {settings.name} are {size[1]}×{size[0]} pixels and "
            f"stay so"
        )
    return dataset
