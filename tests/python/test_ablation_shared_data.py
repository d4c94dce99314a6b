"""The data sets on real images (../shared/data), where they are; a part of the larger archives, to be quick."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import SHARED

from torch_pnn.ablation import data
from torch_pnn.ablation.data import voc
from torch_pnn.ablation.study import DataSettings

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared images are not here ({SHARED})")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_PNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_PNN_DATA", raising=False)


def load(name, root, **settings):
    return data.load(DataSettings(name, str(root), **settings))


def some_of(archive: str, folder: Path, every: int) -> Path:
    """Every so many of an archive's files."""
    path = SHARED / archive
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with tarfile.open(path) as packed:
        members = sorted((member for member in packed if member.isfile()), key=lambda member: member.name)
        # In the archive's own order: going back means to unpack from the beginning.
        chosen = sorted(members[::every], key=lambda member: member.offset)
        packed.extractall(folder, chosen, filter="data")
    return folder


def in_bytes(dataset, which="test"):
    batches = list(dataset.test_batches(which, 500))
    shape = (1, -1, 1, 1)
    images = torch.cat([inputs for inputs, _ in batches])
    values = images * dataset.deviation.reshape(shape) + dataset.mean.reshape(shape)
    return values.round().to(torch.uint8).numpy(), torch.cat([targets for _, targets in batches]).numpy()


def test_mnist():
    dataset = load("mnist", SHARED, shifts=(1,))
    assert (dataset.train_count, dataset.test_count, dataset.unreadable) == (60000, 10000, ())
    # The published mean and deviation, and the published numbers of each digit.
    assert float(dataset.mean) / 255 == pytest.approx(0.1307, abs=5e-5)
    assert float(dataset.deviation) / 255 == pytest.approx(0.3081, abs=5e-5)
    images, labels = in_bytes(dataset)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.shape == (10000, 1, 28, 28)
    assert "read from idx files as published" in dataset.description
    # Two means of each class's images tell most of the test digits apart: images and labels belong together.
    batches = list(dataset.train_batches(1000, epoch=1, order=0, augmentation=0))
    train, train_labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    means = torch.stack([train[train_labels == digit].mean(dim=0).flatten() for digit in range(10)])
    test = torch.cat([inputs for inputs, _ in dataset.test_batches("test", 1000)]).flatten(1)
    assert (torch.cdist(test, means).argmin(dim=1).numpy() == labels).mean() > 0.8


@pytest.mark.slow
def test_cifar10_from_jpeg_files(tmp_path):
    exact = SHARED / "cifar10" / "cifar10_train_first4000_lossless.npz"
    if not exact.is_file():
        pytest.skip(f"{exact} is not here")
    root = some_of("cifar10/cifar10-jpeg.tar.xz", tmp_path, 100)
    dataset = load("cifar10", root)
    assert (dataset.train_count, dataset.test_count, dataset.unreadable) == (500, 100, ())
    assert "600 of them are JPEG files, so they are not the published pixels" in dataset.description
    published = np.load(exact)
    images = torch.cat([x for x, _ in dataset.train_batches(500, epoch=1, order=0, augmentation=0)])
    labels = torch.cat([y for _, y in dataset.train_batches(500, epoch=1, order=0, augmentation=0)]).numpy()
    shape = (1, -1, 1, 1)
    found = images * dataset.deviation.reshape(shape) + dataset.mean.reshape(shape)
    known = torch.from_numpy(published["x"]).permute(0, 3, 1, 2).float()
    distances = torch.cdist(found.flatten(1), known.flatten(1)) / 3072**0.5
    nearest, which = distances.min(dim=1)
    # Those that are among the first 4000 lie within the compression's error of the exact image, and have its label.
    same = (nearest < 15).numpy()
    assert 20 < same.sum() < 70
    assert (published["y"][which.numpy()][same] == labels[same]).all()


@pytest.mark.parametrize(
    ("archive", "every", "inside", "counts", "shape"),
    [
        ("imagenette-224.tar.xz", 10, ".", (100, 30), (3, 224, 224)),
        ("tiny-imagenet-32px-100cls.tar.xz", 10, "tiny-imagenet-32px-100cls", (1000, 500), (3, 32, 32)),
    ],
)
def test_image_folders(tmp_path, archive, every, inside, counts, shape):
    root = some_of(archive, tmp_path, every)
    dataset = load("image-folder", root / inside, augment=True)
    assert sum((dataset.train_count, dataset.test_count)) == pytest.approx(sum(counts), abs=2)
    assert (dataset.image_shape, dataset.unreadable) == (shape, ())
    assert "JPEG" in dataset.description
    inputs, targets = next(dataset.train_batches(32, epoch=1, order=0, augmentation=0))
    assert inputs.shape == (32, *shape)
    assert abs(float(inputs.mean())) < 0.5
    assert len(targets.unique()) > 5


def test_voc(tmp_path):
    archive = SHARED / "voc-sample.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    dataset = load("voc-detection", archive / "VOC2012")
    assert (dataset.train_count, dataset.test_count, dataset.unreadable) == (198, 67, ())
    assert dataset.class_names == voc.CLASSES
    assert "859 objects" in dataset.description
    assert "No image shows aeroplane" in dataset.description
    for images, targets in dataset.test_batches("test", 8):
        for image, target in zip(images, targets):
            boxes = target["boxes"]
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2] <= image.shape[2]).all()
            assert (boxes[:, 3] <= image.shape[1]).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert set(target["labels"].tolist()) <= set(range(1, 21))
    small = load("voc-classification", archive / "VOC2012", image_size=32)
    assert small.image_shape == (3, 32, 32)
    targets = torch.cat([targets for _, targets in small.test_batches("test", 100)])
    assert set(targets.unique().tolist()) == {-1, 0, 1}
    genuine = load("voc-detection", archive / "VOC2007-genuine-xml")
    assert (genuine.train_count + genuine.test_count, genuine.unreadable) == (4, ())
    assert "11 objects, 2 of them marked as difficult" in genuine.description
    # 000007's car, from its own XML: 141, 50, 500, 330.
    every = [
        target["boxes"].tolist()
        for batches in (
            genuine.test_batches("test", 9),
            genuine.train_batches(9, epoch=1, order=0, augmentation=0),
        )
        for _, targets in batches
        for target in targets
    ]
    assert [[140, 49, 500, 330]] in every
