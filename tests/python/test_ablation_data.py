"""Data sets: every published layout, what is refused and how it is said, what is left out, order and augmentation."""

from __future__ import annotations

import dataclasses
import gzip
import io
import multiprocessing
import os
import pickle
import re
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from data_support import (
    CIFAR10,
    cifar10_batches,
    idx_bytes,
    image_bytes,
    pack,
    pixels,
    python2_pickle,
    voc_object,
    write_batches,
    write_folders,
    write_idx_set,
    write_voc,
)
from PIL import Image

from torch_pnn.ablation import data
from torch_pnn.ablation.data import augment, cifar, draws, folders, idx, pictures, places, split, voc
from torch_pnn.ablation.errors import AblationError, UsageError
from torch_pnn.ablation.study import DataSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the user's cache, and nothing found by chance."""
    monkeypatch.setenv("TORCH_PNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_PNN_DATA", raising=False)


def load(name, root="", **settings):
    return data.load(DataSettings(name, str(root), **settings))


def in_order(dataset, which="test", batch_size=7):
    """A test set as two tensors."""
    batches = list(dataset.test_batches(which, batch_size))
    assert all(len(targets) == batch_size for _, targets in batches[:-1])
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def trained(dataset, batch_size=7, epoch=1, order=0, augmentation=0):
    batches = list(dataset.train_batches(batch_size, epoch=epoch, order=order, augmentation=augmentation))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def as_bytes(dataset, images):
    """Undoes the normalisation."""
    shape = (1, -1, 1, 1)
    values = images * dataset.deviation.reshape(shape) + dataset.mean.reshape(shape)
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8)


def normalised(images, of):
    """Independently of the package: float64, over the training images."""
    images, of = np.asarray(images, dtype=np.float64), np.asarray(of, dtype=np.float64)
    axes = (0, 2, 3)
    return (images - of.mean(axes, keepdims=True)) / of.std(axes, keepdims=True)


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_split():
    digits = data.load(DataSettings("digits"))
    (train, train_labels), (test, test_labels) = trained(digits), in_order(digits)
    assert train.shape == (1198, 1, 8, 8)
    assert test.shape == (599, 1, 8, 8)
    assert (digits.train_count, digits.test_count, digits.validation_count) == (1198, 599, 0)
    assert digits.image_shape == (1, 8, 8)
    assert (digits.task, digits.test_sets, digits.unreadable) == ("classification", ("test",), ())
    # Class by class: shares agree to one image.
    counts = torch.bincount(train_labels), torch.bincount(test_labels)
    assert len(counts[0]) == len(counts[1]) == digits.classes == 10
    assert ((counts[0] + counts[1]) / 3 - counts[1]).abs().max() <= 1
    # No image on both sides, and none lost.
    both = torch.cat([as_bytes(digits, train), as_bytes(digits, test)]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797
    # Scaled by the training images alone.
    assert abs(float(train.mean())) < 1e-6
    assert float(train.std()) == pytest.approx(1, abs=1e-3)
    assert data.load(DataSettings("digits")).sha256 == digits.sha256
    assert "1198 images train, 599 test" in digits.description


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    scans = load_digits()
    known = {image.astype(np.uint8).tobytes(): label for image, label in zip(scans.images, scans.target)}
    digits = data.load(DataSettings("digits"))
    for images, labels in (trained(digits), in_order(digits)):
        for image, label in zip(as_bytes(digits, images).numpy(), labels.tolist()):
            assert known[image[0].tobytes()] == label


# ---------------------------------------------------------------------------------------------------------- idx files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", ""),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("kmnist", "kmnist"),
        ("mnist", "raw"),
    ],
)
def test_idx_files(tmp_path, monkeypatch, name, folder, packed):
    held = write_idx_set(tmp_path / "data" / folder, packed=packed)
    dataset = load(name, tmp_path / "data")
    images, labels = in_order(dataset)
    expected = normalised(held["t10k-images-idx3-ubyte"][:, None], held["train-images-idx3-ubyte"][:, None])
    assert np.abs(images.numpy() - expected).max() < 1e-5
    assert labels.tolist() == held["t10k-labels-idx1-ubyte"].tolist()
    images, labels = trained(dataset)
    pairs = {image.tobytes(): label for image, label in zip(held["train-images-idx3-ubyte"], [*range(10)] * 4)}
    assert len(images) == 40
    assert all(
        pairs[image.numpy().tobytes()] == label for image, label in zip(as_bytes(dataset, images), labels.tolist())
    )
    assert (dataset.classes, dataset.image_shape, dataset.name) == (10, (1, 28, 28), name)
    # The environment names the place as well; the study's own word goes first.
    monkeypatch.setenv("TORCH_PNN_DATA", str(tmp_path / "data"))
    assert load(name).sha256 == dataset.sha256
    with pytest.raises(UsageError, match="there is no folder"):
        load(name, tmp_path / "elsewhere")


def test_the_digest_sees_every_image_label_and_split(tmp_path):
    held = write_idx_set(tmp_path)
    seen = {load("mnist", tmp_path).sha256}
    for name, array in held.items():
        changed = array.copy()
        changed[3] = (changed[3] + 1) % 10
        (tmp_path / name).write_bytes(idx_bytes(changed))
        seen.add(load("mnist", tmp_path).sha256)
        (tmp_path / name).write_bytes(idx_bytes(array))
    for settings in ({"train_images": 20}, {"validation_images": 10}, {"validation_images": 10, "split_seed": 1}):
        seen.add(load("mnist", tmp_path, **settings).sha256)
    assert len(seen) == 8
    assert load("mnist", tmp_path, augment=True, shifts=(1,)).sha256 in seen


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train-images-idx3-ubyte", b"", "no idx file of bytes: it begins with nothing"),
        ("train-images-idx3-ubyte", b"\x89PNG....", "no idx file of bytes: it begins with 89 50 4e 47"),
        ("train-images-idx3-ubyte", bytes((0, 0, 13, 3)) + bytes(99), "no idx file of bytes: it begins with 00 00 0d"),
        ("train-images-idx3-ubyte", bytes((0, 0, 8, 3)) + bytes(5), "ends within its first 16 bytes"),
        ("train-images-idx3-ubyte", idx_bytes(pixels(0, 40, 28, 28))[:-1], "has 31375 bytes and should have 31376"),
        ("train-images-idx3-ubyte", idx_bytes(pixels(0, 40, 28, 28)) + b"x", "has 31377 bytes and should have 31376"),
        ("train-images-idx3-ubyte", idx_bytes(pixels(0, 39, 28, 28)), "39 images and .* 40 labels"),
        ("train-images-idx3-ubyte", idx_bytes(pixels(0, 40)), "1 dimensions .* should have 3 and 1"),
        ("train-images-idx3-ubyte", idx_bytes(pixels(0, 40, 26, 28)), r"\(26, 28\) pixels, test images \(28, 28\)"),
        ("train-labels-idx1-ubyte", idx_bytes(np.full(40, 10, np.uint8)), "label 10; they should be 0 to 9"),
        (
            "t10k-images-idx3-ubyte",
            bytes((0, 0, 8, 3)) + b"\xff" * 12,
            "16 bytes and should have 79228162458924105385300197391",
        ),
    ],
)
def test_damaged_idx_files(tmp_path, name, content, sentence):
    write_idx_set(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AblationError, match=sentence):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(bytes(9))[:-9], "damaged"),
        (b"not packed", "damaged: Not a gzipped file"),
        (gzip.compress(b"\0" * 99)[:12] + b"\xff" * 20, "damaged"),
    ],
)
def test_damaged_gzip_files(tmp_path, content, sentence):
    write_idx_set(tmp_path, packed=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(AblationError, match=sentence):
        load("mnist", tmp_path)


def test_an_idx_file_that_is_a_folder(tmp_path):
    write_idx_set(tmp_path)
    with pytest.raises(AblationError, match="can't read .*: is a directory"):
        idx.read(tmp_path)


# -------------------------------------------------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("python2", [True, False])
@pytest.mark.parametrize("form", ["folder", "batches in it", "archive", "archive as the root"])
def test_cifar10_batches(tmp_path, form, python2):
    held = cifar10_batches()
    folder = tmp_path / "data" / ("" if form == "folder" else "cifar-10-batches-py")
    write_batches(folder, held, python2)
    root = tmp_path / "data"
    if form.startswith("archive"):
        root = tmp_path / "packed"
        root.mkdir()
        archive = pack(folder, root / "cifar-10-python.tar.gz")
        root = archive if form == "archive as the root" else root
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load("cifar10", root)
    train = np.concatenate([held[f"data_batch_{number}"][b"data"] for number in range(1, 6)]).reshape(-1, 3, 32, 32)
    test = held["test_batch"][b"data"].reshape(-1, 3, 32, 32)
    images, labels = in_order(dataset)
    assert np.abs(images.numpy() - normalised(test, train)).max() < 1e-5
    assert labels.tolist() == held["test_batch"][b"labels"]
    assert dataset.class_names == tuple(name.decode() for name in CIFAR10)
    assert (dataset.train_count, dataset.image_shape) == (100, (3, 32, 32))
    assert "as published" in dataset.description
    assert "JPEG" not in dataset.description


def test_cifar100_batches(tmp_path):
    names = [b"class %d" % number for number in range(100)]
    labels = list(range(100))
    held = {
        name: {b"data": pixels(seed, 100, 3072), b"fine_labels": labels, b"coarse_labels": [0] * 100}
        for seed, name in enumerate(("train", "test"))
    }
    write_batches(tmp_path / "cifar-100-python", {**held, "meta": {b"fine_label_names": names}})
    dataset = load("cifar100", tmp_path)
    assert dataset.class_names[7] == "class 7"
    assert in_order(dataset)[1].tolist() == labels
    with pytest.raises(UsageError, match="cifar10 is not in .*cifar-10-python.tar.gz.*cs.toronto.edu"):
        load("cifar10", tmp_path)  # a hundred classes are not ten


class _Evil:
    def __reduce__(self):
        return os.system, ("touch broken-in",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "thing",
    [_Evil(), {b"data": _Evil()}, {b"data": np.array([_Evil()], dtype=object)}, print, {b"labels": [eval]}, open],
    ids=["call", "inside", "in an array", "print", "eval", "open"],
)
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path, monkeypatch, thing, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AblationError, match="batch is no batch of CIFAR: it names .*, which no batch needs"):
        cifar.read_batch(io.BytesIO(pickle.dumps(thing, protocol)), "batch")
    assert not list(tmp_path.iterdir())


def test_numbers_and_arrays_of_every_protocol_are_read():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        entries = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], "name": "x"}
        found = cifar.read_batch(io.BytesIO(pickle.dumps(entries, protocol)), "batch")
        assert found[b"data"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found[b"labels"] == [1, 2]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("data_batch_3", None, "lacks data_batch_3"),
        ("batches.meta", None, "lacks batches.meta"),
        ("data_batch_2", {b"data": pixels(0, 20, 3071)}, "data_batch_2 has no array 'data' of bytes, 3072 an image"),
        ("data_batch_2", {b"data": [1]}, "data_batch_2 has no array 'data'"),
        ("data_batch_2", {b"labels": [1, 2]}, "data_batch_2 has no list 'labels' of 20 labels"),
        ("test_batch", {b"labels": [10] * 20}, "test_batch has labels that are not 0 to 9"),
        ("test_batch", {b"labels": [b"x"] * 20}, "test_batch has labels that are not 0 to 9"),
        ("batches.meta", {b"label_names": [b"dog"]}, "batches.meta has no 10 names of classes"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_wrong_batches(tmp_path, name, change, sentence, packed):
    held = cifar10_batches()
    if change is None:
        del held[name]
    else:
        held[name] = {**held[name], **change}
    folder = write_batches(tmp_path / "cifar-10-batches-py", held)
    root = pack(folder, tmp_path / "cifar-10-python.tar.gz") if packed else tmp_path
    with pytest.raises(AblationError, match=sentence):
        load("cifar10", root)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"garbage", python2_pickle({b"data": 1})[:-2], b"\x80\x02]."])
def test_damaged_batches(tmp_path, content):
    write_batches(tmp_path, cifar10_batches())
    (tmp_path / "data_batch_4").write_bytes(content)
    with pytest.raises(AblationError, match="data_batch_4 is no batch of CIFAR: "):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_cifar10_as_a_folder_of_images_says_whether_its_pixels_are_the_published_ones(tmp_path, kind):
    names = tuple(name.decode() for name in CIFAR10)
    held = write_folders(tmp_path, classes=names[::-1], train=3, size=(32, 32), test_folder="test", kind=kind)
    dataset = load("cifar10", tmp_path)
    assert dataset.class_names == names
    images, labels = in_order(dataset)
    assert labels.tolist() == [number for number in range(10) for _ in range(2)]
    if kind == "PNG":
        assert "JPEG" not in dataset.description
        found = as_bytes(dataset, images).numpy().transpose(0, 2, 3, 1)
        assert np.array_equal(found, np.stack(held["test"]).reshape(10, 2, 32, 32, 3)[::-1].reshape(20, 32, 32, 3))
    else:
        assert (
            "50 of them are JPEG files, so they are not the published pixels: accuracies on them are not comparable "
            "with published ones." in dataset.description
        )


def test_a_cifar10_image_of_another_size_is_left_out(tmp_path):
    names = tuple(name.decode() for name in CIFAR10)
    write_folders(tmp_path, classes=names, train=3, size=(32, 32), test_folder="test")
    (tmp_path / "train" / "dog" / "dog_001.png").write_bytes(image_bytes(pixels(0, 32, 30, 3)))
    dataset = load("cifar10", tmp_path)
    assert dataset.train_count == 29
    assert dataset.unreadable == ("train/dog/dog_001.png: 30×32 pixels in place of 32×32",)
    write_folders(tmp_path / "nine", classes=names[:9], size=(32, 32))
    with pytest.raises(AblationError, match="CIFAR-10 in .* has 9 classes; it should have 10"):
        load("cifar10", tmp_path / "nine")


# ------------------------------------------------------------------------------------------------------ image folders


@pytest.mark.parametrize("form", ["folder", ".tar", ".tar.gz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_image_folders(tmp_path, form, test_folder):
    held = write_folders(tmp_path / "set", size=(6, 8), test_folder=test_folder)
    (tmp_path / "set" / "train" / "notes.txt").write_text("no class")
    (tmp_path / "set" / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "train" / "ant" / "._ant_000.png").write_text("what another system left")
    root = tmp_path / "set" if form == "folder" else pack(tmp_path / "set", tmp_path / f"packed{form}")
    dataset = load("image-folder", root)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.image_shape == (3, 6, 8)
    assert dataset.unreadable == ()
    images, labels = in_order(dataset)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(as_bytes(dataset, images).numpy().transpose(0, 2, 3, 1), np.stack(held["test"]))
    train = np.stack(held["train"]).transpose(0, 3, 1, 2)
    assert np.abs(images.numpy() - normalised(np.stack(held["test"]).transpose(0, 3, 1, 2), train)).max() < 1e-5
    assert "Files: 24 PNG." in dataset.description
    assert "Images from set: 3 classes" in dataset.description
    assert f"({test_folder}/)" in dataset.description
    if form != "folder":  # the second time nothing is unpacked
        (unpacked,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
        (unpacked / "set" / "train" / "ant" / "ant_000.png").unlink()
        assert load("image-folder", root).train_count == 17


def test_tiny_imagenets_own_layout(tmp_path):
    held = write_folders(tmp_path, size=(64, 64))
    lines = []
    (tmp_path / "val" / "images").mkdir()
    for number, path in enumerate(sorted((tmp_path / "val").glob("*/*.png"))):
        path.rename(tmp_path / "val" / "images" / f"val_{number}.png")
        lines.append(f"val_{number}.png\t{path.parent.name}\t0\t0\t62\t62\n")
        if not list(path.parent.iterdir()):
            path.parent.rmdir()
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines[::-1]))
    (tmp_path / "test" / "images").mkdir(parents=True)  # without labels
    for name in ("ant", "bee", "cat"):
        (tmp_path / "train" / name / "images").mkdir()
        for path in (tmp_path / "train" / name).glob("*.png"):
            path.rename(path.parent / "images" / path.name)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("x")
    dataset = load("image-folder", tmp_path)
    images, labels = in_order(dataset)
    assert (dataset.train_count, labels.tolist()) == (18, [0, 0, 1, 1, 2, 2])
    assert np.array_equal(as_bytes(dataset, images).numpy().transpose(0, 2, 3, 1), np.stack(held["test"]))
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png ant\n")
    with pytest.raises(AblationError, match="val_annotations.txt, line 1: no image and class parted by a tab: 'val_0"):
        load("image-folder", tmp_path)


def _spoil(folder):
    """Files that can't be read, and what is said of each."""
    whole = image_bytes(pixels(0, 40, 40, 3), "JPEG")
    spoilt = {
        "cut.jpg": (whole[: len(whole) // 2], "image file is truncated"),
        "empty.jpg": (b"", "empty file"),
        "page.jpg": (b"<html>404</html>", "not an image, or of an unknown format"),
        "stub.png": (image_bytes(pixels(0, 40, 40, 3))[:60], ""),
        "gone.png": (None, "no such file or directory"),
    }
    for name, (content, _) in spoilt.items():
        if content is None:
            (folder / name).symlink_to(folder / "nowhere")
        else:
            (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in spoilt.items()}


@pytest.mark.parametrize("memory", [True, False])
def test_unreadable_images_are_left_out_and_named(tmp_path, monkeypatch, memory):
    write_folders(tmp_path, size=(40, 40))
    clean = load("image-folder", tmp_path)
    expected = in_order(clean)
    reasons = _spoil(tmp_path / "val" / "bee") | {
        f"train-{k}": v for k, v in _spoil(tmp_path / "train" / "ant").items()
    }
    if not memory:
        monkeypatch.setattr(folders, "MEMORY", 0)
    dataset = load("image-folder", tmp_path)
    images, labels = in_order_of_any_size(dataset)
    pairs = [
        {(round(float(image.double().sum()), 1), int(label)) for image, label in zip(*trained_of_any_size(which))}
        for which in (clean, dataset)
    ]
    assert len(pairs[1]) == clean.train_count
    assert pairs[0] == pairs[1]  # each image with its own class
    assert torch.equal(labels, expected[1])
    assert torch.allclose(images, expected[0], atol=1e-5)
    assert len(dataset.unreadable) == len(reasons) == 10
    for folder, prefix in (("val/bee", ""), ("train/ant", "train-")):
        for line in (line for line in dataset.unreadable if line.startswith(folder)):
            name, _, reason = line.removeprefix(f"{folder}/").partition(": ")
            assert reason.startswith(reasons[prefix + name])
            assert reason


def in_order_of_any_size(dataset):
    batches = list(dataset.test_batches("test", 4))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def trained_of_any_size(dataset):
    batches = list(dataset.train_batches(4, epoch=1, order=0, augmentation=0))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_left_out(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "ant" / "ant_000.png").chmod(0)
    assert load("image-folder", tmp_path).unreadable == ("train/ant/ant_000.png: permission denied",)


def test_a_class_without_a_readable_image_is_an_error(tmp_path):
    write_folders(tmp_path, train=2)
    for path in (tmp_path / "train" / "bee").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(
        AblationError, match=r"no readable image of bee in .*train \(2 files .*bee_000.png: not an image"
    ):
        load("image-folder", tmp_path)
    for path in (tmp_path / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(AblationError, match="no readable image of bee in .*train"):
        load("image-folder", tmp_path)
    (tmp_path / "train" / "bee").rmdir()
    with pytest.raises(AblationError, match="train has no images of the class bee"):
        load("image-folder", tmp_path)
    (tmp_path / "train" / "bee").mkdir()
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(AblationError, match="val has no images of the class dog"):
        load("image-folder", tmp_path)


def test_images_of_several_sizes_need_one(tmp_path):
    write_folders(tmp_path, size=(40, 40))
    (tmp_path / "train" / "ant" / "large.png").write_bytes(image_bytes(pixels(0, 60, 80, 3)))
    with pytest.raises(UsageError, match="2 sizes, from 40×40 to 80×60 pixels: .*data.image_size"):
        load("image-folder", tmp_path)
    dataset = load("image-folder", tmp_path, image_size=16)
    assert dataset.image_shape == (3, 16, 16)
    assert "the middle 7/8 of each brought to 16×16 pixels" in dataset.description
    with pytest.raises(UsageError, match="data.image_size is -1; it can't be negative"):
        load("image-folder", tmp_path, image_size=-1)


def test_what_a_size_does_to_an_image():
    ramp = Image.fromarray(np.tile(np.arange(0, 160, dtype=np.uint8)[None, :, None], (80, 1, 3)))
    middle = np.asarray(pictures.centred(ramp, (35, 35)))
    # 70 of the 80 rows and columns in the middle, two pixels to one: from column 45 to 115.
    assert middle[:, :, 0].tolist()[0][1:-1] == pytest.approx([45.5 + 2 * n for n in range(1, 34)], abs=1)
    whole = np.asarray(pictures.stretched(ramp, (40, 40)))
    assert whole.shape == (40, 40, 3)
    assert whole[0, :, 0].tolist()[1:-1] == pytest.approx([1.5 + 4 * n for n in range(1, 39)], abs=1)
    part = np.asarray(pictures.cropped(ramp, (10, 10), (20, 0, 40, 20), True))
    assert part[0, :, 0].tolist()[1:-1] == pytest.approx([38.5 - 2 * n for n in range(1, 9)], abs=1)


@pytest.mark.parametrize("augmented", [False, True])
def test_images_on_disk_give_the_same_batches_as_in_memory(tmp_path, monkeypatch, augmented):
    write_folders(tmp_path, size=(16, 16))
    settings = {"augment": augmented, "validation_images": 3, "train_images": 12, "shifts": (1, 3)}
    memory = load("image-folder", tmp_path, **settings)
    monkeypatch.setattr(folders, "MEMORY", 0)
    disk = load("image-folder", tmp_path, **settings)
    assert type(memory) is not type(disk)
    assert memory.test_sets == disk.test_sets == ("test", "validation", "shift 1", "shift 3")
    for which in memory.test_sets:
        assert all(torch.equal(a, b) for a, b in zip(in_order(memory, which, 3), in_order(disk, which, 3)))
    assert (disk.train_count, disk.validation_count) == (12, 3)
    assert all(torch.equal(a, b) for a, b in zip(trained(memory), trained(disk)))
    assert "The digest is taken over the files' names, sizes and classes." in disk.description


def test_the_digest_of_images_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY", 0)
    write_folders(tmp_path / "a", size=(16, 16))
    write_folders(tmp_path / "b", size=(16, 16))
    first = load("image-folder", tmp_path / "a").sha256
    assert load("image-folder", tmp_path / "b").sha256 == first
    path = tmp_path / "b" / "train" / "ant" / "ant_001.png"
    path.rename(path.with_name("ant_009.png"))
    second = load("image-folder", tmp_path / "b").sha256
    path.with_name("ant_009.png").write_bytes(image_bytes(np.zeros((16, 16, 3), np.uint8)))
    assert len({first, second, load("image-folder", tmp_path / "b").sha256}) == 3


def test_large_images_are_cropped_at_random_whatever_the_threads_and_batches(tmp_path, monkeypatch):
    write_folders(tmp_path, size=(80, 90), kind="JPEG")
    dataset = load("image-folder", tmp_path, image_size=72, augment=True)
    assert "cropped at random" in dataset.description
    before = torch.get_num_threads()
    try:
        found = []
        for threads, batch_size in ((1, 4), (2, 4), (2, 5)):
            torch.set_num_threads(threads)
            images, labels = trained_by(dataset, batch_size)
            found.append((images, labels))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    assert found[0][0].shape == (18, 3, 72, 72)
    assert not torch.equal(found[0][0], trained_by(dataset, 4, augmentation=1)[0])
    assert not torch.equal(found[0][0], trained_by(dataset, 4, epoch=2)[0])


def trained_by(dataset, batch_size, **seeds):
    batches = dataset.train_batches(batch_size, **{"epoch": 1, "order": 0, "augmentation": 0, **seeds})
    pairs = list(batches)
    return torch.cat([inputs for inputs, _ in pairs]), torch.cat([targets for _, targets in pairs])


def test_an_image_that_breaks_later_is_left_out_of_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY", 0)
    write_folders(tmp_path, size=(16, 16))
    dataset = load("image-folder", tmp_path)
    for number in range(2):
        (tmp_path / "val" / "cat" / f"cat_00{number}.png").write_bytes(b"")
    sizes = [len(targets) for _, targets in dataset.test_batches("test", 2)]
    assert sizes == [2, 2]  # the third batch had nothing left
    list(dataset.test_batches("test", 3))
    assert dataset.unreadable == ("val/cat/cat_000.png: empty file", "val/cat/cat_001.png: empty file")


# ---------------------------------------------------------------------------------------------- archives and the cache


def test_a_folder_inside_an_archive(tmp_path):
    write_folders(tmp_path / "both" / "one")
    write_folders(tmp_path / "both" / "two", classes=("x", "y"))
    archive = pack(tmp_path / "both", tmp_path / "both.tar.xz")
    assert load("image-folder", archive / "both" / "two").class_names == ("x", "y")
    with pytest.raises(UsageError, match="both.tar.xz holds no folder three"):
        load("image-folder", archive / "three")
    with pytest.raises(UsageError, match="image-folder is not in .*: looked for folders of images"):
        load("image-folder", archive)


@pytest.mark.parametrize("name", ["set.tar.xz", "set.tar.gz", "set.tar", "set.zip"])
def test_a_damaged_archive(tmp_path, name):
    write_folders(tmp_path / "set")
    archive = pack(tmp_path / "set", tmp_path / name)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    for _ in range(2):
        with pytest.raises(AblationError, match=f"{name} is damaged: "):
            load("image-folder", archive)
        assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
    archive.write_bytes(b"no archive at all")
    with pytest.raises(AblationError, match=f"{name} is damaged: "):
        load("image-folder", archive)


@pytest.mark.parametrize("inside", ["../outside.png", "/tmp/torch-pnn-outside.png"])
def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path, inside):
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as packed:
        member = tarfile.TarInfo(inside)
        member.size = 1
        packed.addfile(member, io.BytesIO(b"x"))
    try:
        places.unpack(archive)
    except AblationError as error:
        assert "is damaged" in str(error)
    assert not (tmp_path / "outside.png").exists()
    assert not (tmp_path / "cache" / "outside.png").exists()
    assert not os.path.exists("/tmp/torch-pnn-outside.png")


def test_a_root_that_is_neither_folder_nor_archive(tmp_path):
    (tmp_path / "images.rar").write_bytes(b"x")
    with pytest.raises(UsageError, match="images.rar is neither a folder nor an archive"):
        load("image-folder", tmp_path / "images.rar")


def test_archives_are_unpacked_once_by_processes_side_by_side(tmp_path):
    write_folders(tmp_path / "set", train=100)
    archive = pack(tmp_path / "set", tmp_path / "set.tar.xz")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders_found = pool.map(_unpacked, [archive] * 3, chunksize=1)
    assert len({folder for folder, _ in folders_found}) == 1
    assert [count for _, count in folders_found] == [306] * 3
    folder = folders_found[0][0]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [folder.name, f"{folder.name}.lock"]


def _unpacked(archive):
    folder = places.unpack(archive)
    return folder, len(list(folder.rglob("*.png")))


def test_what_a_killed_process_left_is_deleted(tmp_path, monkeypatch):
    write_folders(tmp_path / "set")
    archive = pack(tmp_path / "set", tmp_path / "set.tar")
    folder = places.unpack(archive)
    partial = folder.rename(folder.with_name(f"{folder.name}.partial"))
    (partial / "left-over").write_text("x")
    assert places.unpack(archive) == folder
    assert not partial.exists()
    assert not (folder / "left-over").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    os.utime(archive, ns=(1, 1))  # another time of change: another folder
    monkeypatch.setattr(places, "_extract", full)
    with pytest.raises(AblationError, match="can't unpack .*set.tar into .*cache: no space left on device"):
        places.unpack(archive)


def test_decoded_images_are_kept_in_the_cache(tmp_path, monkeypatch):
    write_folders(tmp_path / "set", size=(16, 16))
    (tmp_path / "set" / "train" / "ant" / "bad.png").write_bytes(b"")
    plain = load("image-folder", tmp_path / "set", image_size=12)
    monkeypatch.setattr(folders, "CACHED_FROM", 1)
    first = load("image-folder", tmp_path / "set", image_size=12)
    decode = folders._decode_now

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(folders, "_decode_now", refuse)
    second = load("image-folder", tmp_path / "set", image_size=12)
    assert plain.sha256 == first.sha256 == second.sha256
    assert plain.unreadable == second.unreadable == ("train/ant/bad.png: empty file",)
    assert all(torch.equal(a, b) for a, b in zip(trained(plain), trained(second)))
    with pytest.raises(AssertionError, match="decoded again"):  # another size
        load("image-folder", tmp_path / "set", image_size=13)
    os.utime(tmp_path / "set" / "val" / "cat" / "cat_000.png", ns=(1, 1))
    with pytest.raises(AssertionError, match="decoded again"):
        load("image-folder", tmp_path / "set", image_size=12)
    monkeypatch.setattr(folders, "_decode_now", decode)
    # A cache that can't be written, or that is damaged, is done without.
    monkeypatch.setenv("TORCH_PNN_CACHE", str(tmp_path / "set" / "val" / "cat" / "cat_000.png"))
    assert load("image-folder", tmp_path / "set", image_size=12).sha256 == plain.sha256
    monkeypatch.setenv("TORCH_PNN_CACHE", str(tmp_path / "cache"))
    for path in (tmp_path / "cache").glob("decoded-*/images.npy"):
        path.write_bytes(b"x")
    os.utime(tmp_path / "set" / "val" / "cat" / "cat_000.png")
    assert load("image-folder", tmp_path / "set", image_size=12).sha256 == plain.sha256


# ------------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("name", [name for name in data.DATA_SETS if name != "digits"])
def test_data_that_is_not_there(tmp_path, name):
    with pytest.raises(
        UsageError, match=rf"where does {name} lie\? Name its folder with --data, .*TORCH_PNN_DATA.* had"
    ):
        load(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UsageError, match=rf"{name} is not in .*empty: looked for .* or in {name}.*To be had from http|who"
    ):
        load(name, tmp_path / "empty")
    with pytest.raises(UsageError, match="there is no folder"):
        load(name, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_downloads(tmp_path, monkeypatch):
    asked = []

    def get(layout_root):
        asked.append(layout_root)
        write_idx_set(layout_root / "MNIST" / "raw")

    layout = places.Layout("files", "the source", ("MNIST/raw",), download=get)
    settings = DataSettings("mnist", str(tmp_path / "new"), download=True)
    monkeypatch.setattr(places, "require", lambda *_: None)
    assert places.find(settings, layout, idx._look)
    assert places.find(settings, layout, idx._look)  # it is there now
    assert asked == [tmp_path / "new"]

    def fail(_):
        raise RuntimeError("no\nnetwork")

    broken = dataclasses.replace(layout, download=fail)
    settings = DataSettings("mnist", str(tmp_path / "other"), download=True)
    with pytest.raises(AblationError, match="mnist could not be downloaded: no network; get it from the source into"):
        places.find(settings, broken, idx._look)
    with pytest.raises(UsageError, match="image-folder can't be downloaded: get folders of images"):
        load("image-folder", tmp_path / "third", download=True)


def test_a_download_needs_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(AblationError, match="torchvision is needed for the download of mnist"):
        load("mnist", tmp_path, download=True)


def test_unknown_names_and_settings():
    with pytest.raises(
        UsageError, match=r"unknown data set 'cifar' \(did you mean cifar10\?\); there is: digits, mnist"
    ):
        load("cifar")
    with pytest.raises(UsageError, match="data.shifts holds 0; each should be at least 1 pixel"):
        load("digits", shifts=(0,))
    with pytest.raises(UsageError, match="data.shifts names a number twice: 1, 1"):
        load("digits", shifts=(1, 1))
    with pytest.raises(UsageError, match="data.train_images is -1; it can't be negative"):
        load("digits", train_images=-1)
    with pytest.raises(
        UsageError, match="data.train_images 1100 and data.validation_images 99 are more than digits's 1198"
    ):
        load("digits", train_images=1100, validation_images=99)
    with pytest.raises(UsageError, match="data.train_images all and data.validation_images 1198 are more"):
        load("digits", validation_images=1198)
    with pytest.raises(UsageError, match="data.image_size is 16; images of digits are 8×8 pixels and stay so"):
        load("digits", image_size=16)
    assert load("digits", image_size=8).image_shape == (1, 8, 8)
    with pytest.raises(KeyError, match="digits has no test set 'shift 2'; there is: test, shift 1"):
        load("digits", shifts=(1,)).test_batches("shift 2", 10)


# ------------------------------------------------------------------------------------------ order, splits, augmentation


def numbered(images=50, side=4):
    """Images that say which they are."""
    values = torch.arange(images, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, side, side).contiguous()
    labels = torch.arange(images) % 5
    return data.TensorDataset("numbered", "", list("abcde"), (values, labels), (values, labels))


def test_the_order_hangs_on_seed_and_epoch_alone():
    dataset = numbered()

    def order(batch_size=7, epoch=1, seed=0):
        return trained(dataset, batch_size, epoch, seed)[0][:, 0, 0, 0].int().tolist()

    first = order()
    assert sorted(first) == list(range(50)) != first
    assert order(batch_size=50) == order(batch_size=1) == first
    torch.manual_seed(3)
    list(dataset.train_batches(7, epoch=9, order=9, augmentation=9))
    assert order() == first  # whatever went before
    others = [order(epoch=2), order(seed=1), order(epoch=0), order(epoch=1, seed=2**63)]
    assert all(other != first for other in others)
    assert len({tuple(other) for other in others}) == 4
    images, labels = trained(dataset)
    assert torch.equal(images[:, 0, 0, 0].long() % 5, labels)


def test_orders_are_spread_evenly():
    # Each place of a short order sees each image as often as the others, within five deviations.
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), draws.permutation(5, epoch, 6)] += 1
    assert np.abs(counts - 500).max() < 5 * (3000 * (1 / 6) * (5 / 6)) ** 0.5


def test_random_words_hang_on_the_place_alone():
    every = draws.bits(7, 3, draws.AUGMENTATION, 0, 100, 24)
    assert np.array_equal(draws.bits(7, 3, draws.AUGMENTATION, 40, 3, 24), every[40:43])
    assert len(np.unique(every)) == every.size
    for other in (draws.bits(8, 3, 2, 0, 100, 24), draws.bits(7, 4, 2, 0, 100, 24), draws.bits(7, 3, 1, 0, 100, 24)):
        assert not np.intersect1d(other, every).size
    values = draws.uniforms(draws.bits(0, 0, 1, 0, 20000, 1))
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01


def test_known_words():
    # Philox 4×64-10 with key (5, 7) and counter (1, 0, 0, 2), from NumPy's own generator stepped by hand.
    generator = np.random.Philox(key=np.array([5, 7], np.uint64), counter=np.array([0, 0, 0, 2], np.uint64))
    assert draws.bits(5, 7, 2, 0, 1, 4)[0].tolist() == generator.random_raw(4).tolist()


def test_a_crop_against_a_plain_loop():
    crop = augment.Crop(2, flip=True)
    images = torch.from_numpy(pixels(5, 300, 2, 6, 7))
    words = draws.bits(1, 1, draws.AUGMENTATION, 0, 300, crop.numbers)
    found = crop(images, words).numpy()
    random = (words >> np.uint64(11)).astype(float) / 2**53
    seen = set()
    for place in range(300):
        down, right = int(random[place, 0] * 5), int(random[place, 1] * 5)
        padded = np.pad(images[place].numpy(), ((0, 0), (2, 2), (2, 2)))
        expected = padded[:, down : down + 6, right : right + 7]
        mirrored = random[place, 2] < 0.5
        assert np.array_equal(found[place], expected[:, :, ::-1] if mirrored else expected)
        seen.add((down, right, bool(mirrored)))
    assert len(seen) == 50  # every move and the mirror came up


def test_augmentation_hangs_on_seed_epoch_and_image_alone(tmp_path):
    write_idx_set(tmp_path, side=8)
    dataset = load("mnist", tmp_path, augment=True)
    plain = load("mnist", tmp_path)

    def by_image(batch_size, epoch=1, order=0, augmentation=0):
        """The augmented images in the training set's own order."""
        images, _ = trained(dataset, batch_size, epoch, order, augmentation)
        return images[np.argsort(draws.permutation(order, epoch, 40))]

    first = by_image(7)
    assert torch.equal(by_image(40), first)
    assert torch.equal(by_image(7, order=5), first)
    assert not torch.equal(by_image(7, augmentation=1), first)
    assert not torch.equal(by_image(7, epoch=2), first)
    originals = trained(plain)[0][np.argsort(draws.permutation(0, 1, 40))]
    black = -plain.mean / plain.deviation
    moves = set()
    for image, original in zip(first, originals):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.allclose(image, _moved(original, down, right, black), atol=1e-6)
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 12
    assert torch.equal(in_order(dataset)[0], in_order(plain)[0])  # tests are left alone
    assert "moved at random by up to 2 pixels" in dataset.description
    assert "mirrored" not in dataset.description


def _moved(image, down, right, fill):
    """A plain loop."""
    moved = torch.empty_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            inside = 0 <= row - down < height and 0 <= column - right < width
            moved[:, row, column] = image[:, row - down, column - right] if inside else fill
    return moved


def test_which_sets_are_mirrored(tmp_path):
    write_idx_set(tmp_path)
    assert "mirrored" in load("fashion-mnist", tmp_path, augment=True).description
    assert "mirrored" not in load("kmnist", tmp_path, augment=True).description
    assert "mirrored" not in load("digits", augment=True).description
    write_batches(tmp_path, cifar10_batches())
    description = load("cifar10", tmp_path, augment=True).description
    assert (
        "moved at random by up to 4 pixels in each direction (black comes in) and mirrored half the time" in description
    )


@pytest.mark.parametrize("pixel", [1, 2, 9])
def test_shifted_test_sets(tmp_path, pixel):
    write_idx_set(tmp_path, side=8)
    dataset = load("mnist", tmp_path, shifts=(pixel, 5))
    assert dataset.test_sets == ("test", f"shift {pixel}", "shift 5")
    images, labels = in_order(dataset)
    moved, moved_labels = in_order_of(dataset, f"shift {pixel}")
    black = -dataset.mean / dataset.deviation
    directions = [(0, pixel), (pixel, 0), (0, -pixel), (-pixel, 0)]  # right, down, left, up
    expected = torch.stack([_moved(image, *direction, black) for direction in directions for image in images])
    assert torch.allclose(moved, expected, atol=1e-6)
    assert torch.equal(moved_labels, labels.repeat(4))


def in_order_of(dataset, which):
    batches = list(dataset.test_batches(which, 7))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def test_subsets_and_validation_images():
    full = load("digits")
    everything = {tuple(image.flatten().tolist()) for image in as_bytes(full, trained(full)[0])}
    held = None
    for count in (0, 100, 1000):
        dataset = load("digits", train_images=count, validation_images=95)
        train, labels = trained(dataset)
        validation, validation_labels = in_order(dataset, "validation")
        assert dataset.train_count == len(train) == (count or 1103)
        assert dataset.validation_count == len(validation) == 95
        assert sorted(torch.bincount(validation_labels).tolist()) == [9] * 5 + [10] * 5
        if count == 100:
            assert torch.bincount(labels).tolist() == [10] * 10
        sets = [{tuple(image.flatten().tolist()) for image in as_bytes(dataset, part)} for part in (train, validation)]
        assert not sets[0] & sets[1]
        assert sets[0] | sets[1] <= everything
        assert held in (None, sets[1])  # the same whatever the subset
        held = sets[1]
        assert torch.equal(as_bytes(dataset, in_order(dataset)[0]), as_bytes(full, in_order(full)[0]))
    assert "95 are held out to choose the best epoch by and 1000 train, drawn as many of each" in dataset.description
    other = load("digits", validation_images=95, split_seed=1)
    assert {tuple(image.flatten().tolist()) for image in as_bytes(other, in_order(other, "validation")[0])} != held


@pytest.mark.parametrize("sizes", [[5, 5, 5], [1, 9, 20], [0, 3, 3], [7]])
def test_balanced_draws(sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    for count in range(1, sum(sizes) + 1):
        drawn = split.balanced(labels, count, 0, 0)
        assert len(set(drawn.tolist())) == count
        assert (np.diff(drawn) > 0).all()
        found = np.bincount(labels[drawn], minlength=len(sizes))
        # Water filling: whoever has fewer than the fullest class, less one, has given all.
        assert all(number == size or number >= found.max() - 1 for number, size in zip(found, sizes))
    assert not np.array_equal(split.balanced(labels, 3, 0, 0), split.balanced(labels, 3, 1, 0)) or sum(sizes) < 10


def test_resized_crops():
    crop = augment.ResizedCrop()
    areas, ratios, mirrored, left_edges = [], [], [], []
    for place in range(2000):
        (left, top, right, bottom), flip = crop.part(
            100, 80, draws.bits(0, 0, 2, place, 1, augment.ResizedCrop.numbers)[0]
        )
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        areas.append((right - left) * (bottom - top) / 8000)
        ratios.append((right - left) / (bottom - top))
        mirrored.append(flip)
        left_edges.append(left)
    assert 0.07 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert 900 < sum(mirrored) < 1100
    assert len(set(left_edges)) > 60
    # Too narrow for any ratio: the largest part in the middle.
    assert crop.part(1000, 10, draws.bits(0, 0, 2, 0, 1, augment.ResizedCrop.numbers)[0])[0][1::2] == (0, 10)
    for place in range(50):
        (left, top, right, bottom), _ = crop.part(1, 1, draws.bits(0, 0, 2, place, 1, augment.ResizedCrop.numbers)[0])
        assert (left, top, right, bottom) == (0, 0, 1, 1)


def test_batches_arrive_on_the_device_that_was_asked_for(tmp_path):
    for dataset in (load("digits"), numbered()):
        for batches in (dataset.train_batches(4, epoch=0, order=0, augmentation=0, device="meta"),
                        dataset.test_batches("test", 4, device="meta")):  # fmt: skip
            inputs, targets = next(batches)
            assert inputs.device.type == targets.device.type == "meta"


# ---------------------------------------------------------------------------------------------------------------- VOC


def voc_images():
    return {
        "a": [voc_object("dog", (1, 1, 10, 10)), voc_object("cat", (5, 6, 40, 30), difficult=1)],
        "b": [voc_object("cat", (3, 3, 20.5, 20)), voc_object("cat", (21, 3, 40, 20), difficult=1)],
        "c": [voc_object("person", (11, 11, 20, 30))],
        "d": [],
        "e": [voc_object("dog", (2, 2, 30, 30), difficult=1), voc_object("dog", (4, 4, 50, 30))],
    }


@pytest.mark.parametrize("form", ["the year", "devkit", "above it", "archive"])
def test_voc_classification(tmp_path, form):
    year = write_voc(
        tmp_path / "VOCdevkit" / "VOC2012",
        voc_images(),
        {"train": list("abc"), "val": list("ed"), "trainval": list("abcde")},
    )
    root = {"the year": year, "devkit": year.parent, "above it": tmp_path, "archive": None}[form]
    root = root or pack(year.parent, tmp_path / "VOCtrainval_11-May-2012.tar")
    dataset = load("voc-classification", root, image_size=16)
    assert dataset.class_names == voc.CLASSES
    assert dataset.task == "multilabel"
    assert (dataset.train_count, dataset.test_count) == (3, 2)
    images, targets = in_order(dataset, batch_size=2)
    dog, cat, person = (voc.CLASSES.index(name) for name in ("dog", "cat", "person"))
    assert images.shape == (2, 3, 16, 16)
    assert targets[0].nonzero().tolist() == [[dog]]
    assert targets[0, dog] == 1  # one of the two is easy
    assert not targets[1].any()
    train = list(dataset.train_batches(1, epoch=1, order=0, augmentation=0))
    rows = sorted(tuple(target[0, [dog, cat, person]].tolist()) for _, target in train)
    assert rows == [(0, 0, 1), (0, 1, 0), (1, -1, 0)]
    assert "7 objects, 3 of them marked as difficult" in dataset.description
    assert "train trains, val tests" in dataset.description


def test_voc_splits(tmp_path):
    year = write_voc(tmp_path / "VOC2007", voc_images(), {"trainval": list("abc"), "test": list("de"), "train": ["a"]})
    found = load("voc-detection", year)
    assert (found.train_count, found.test_count) == (3, 2)
    assert "trainval trains, test tests" in found.description
    own = write_voc(tmp_path / "own", {**voc_images(), "f": [voc_object("unicorn", (1, 1, 5, 5))]}, None)
    found = load("voc-detection", own)
    assert (found.train_count, found.test_count) == (4, 2)
    assert found.class_names == ("cat", "dog", "person", "unicorn")
    assert "ImageSets/Main is missing, so 2 images were drawn to test (seed 2018)" in found.description
    with pytest.raises(UsageError, match="holds VOC2007, own: name one of them"):
        load("voc-detection", tmp_path)
    both = write_voc(tmp_path / "x" / "VOC", voc_images(), {"train": list("abc"), "val": list("cd")})
    with pytest.raises(AblationError, match="1 images both train and test, c among them"):
        load("voc-detection", both)
    none = write_voc(tmp_path / "y" / "VOC", voc_images(), {"train": list("abc")})
    with pytest.raises(AblationError, match="neither trainval.txt and test.txt nor train.txt and val.txt"):
        load("voc-detection", none)
    with pytest.raises(AblationError, match="has 1 annotations; a training and a test image take two"):
        load("voc-detection", write_voc(tmp_path / "z" / "VOC", {"a": []}, None))
    with pytest.raises(AblationError, match="holds an object"):
        load("voc-detection", write_voc(tmp_path / "w" / "VOC", {"a": [], "b": []}, None))


def test_voc_boxes(tmp_path):
    year = write_voc(tmp_path / "VOC2012", voc_images(), {"train": list("abc"), "val": list("ed")})
    dataset = load("voc-detection", year)
    assert (dataset.task, dataset.image_shape) == ("detection", (3, 30, 40))
    ((images, targets),) = dataset.test_batches("test", 5)
    assert [tuple(image.shape) for image in images] == [(3, 30, 40)] * 2
    assert images[0].dtype == torch.float32
    stored = np.asarray(Image.open(year / "JPEGImages" / "e.jpg"))
    assert np.array_equal((images[0] * 255).round().numpy().transpose(1, 2, 0), stored)
    # Pixels from 1, the last one included, become edges; what hangs over the image's edge is cut.
    assert targets[0]["boxes"].tolist() == [[1, 1, 30, 30], [3, 3, 40, 30]]
    assert targets[0]["labels"].tolist() == [voc.CLASSES.index("dog") + 1] * 2
    assert targets[0]["difficult"].tolist() == [True, False]
    assert targets[1]["boxes"].shape == (0, 4)
    # Difficult objects don't train.
    ((images, targets),) = dataset.train_batches(5, epoch=1, order=0, augmentation=0)
    by_label = {target["labels"].tolist()[0]: target for target in targets}
    assert by_label[voc.CLASSES.index("dog") + 1]["boxes"].tolist() == [[0, 0, 10, 10]]
    assert by_label[voc.CLASSES.index("cat") + 1]["boxes"].tolist() == [[2, 2, 20.5, 20]]
    assert all(set(target) == {"boxes", "labels"} for target in targets)
    # Brought to another size, boxes with them.
    ((images, targets),) = load("voc-detection", year, image_size=20).test_batches("test", 5)
    assert images[0].shape == (3, 15, 20)
    assert targets[0]["boxes"].tolist() == [[0.5, 0.5, 15, 15], [1.5, 1.5, 20, 15]]


def test_voc_boxes_are_mirrored_and_moved_with_their_images(tmp_path):
    bright = np.zeros((30, 40, 3), np.uint8)
    bright[4:12, 6:20] = 255  # rows 5 to 12 and columns 7 to 20, counted from 1
    objects = [voc_object("dog", (7, 5, 20, 12))]
    names = [f"i{number}" for number in range(8)]
    year = write_voc(tmp_path / "VOC2012", {name: objects for name in names}, {"train": names[:6], "val": names[6:]})
    for name in names:
        (year / "JPEGImages" / f"{name}.jpg").unlink()
        (year / "JPEGImages" / f"{name}.png").write_bytes(image_bytes(bright))

    def check(image, target):
        (left, top, right, bottom) = (int(edge) for edge in target["boxes"][0])
        assert image[:, top:bottom, left:right].min() == 1
        assert image.sum() == 3 * (right - left) * (bottom - top)
        return left

    dataset = load("voc-detection", year, augment=True, shifts=(3,))
    lefts = []
    for images, targets in dataset.train_batches(4, epoch=1, order=0, augmentation=0):
        lefts += [check(image, target) for image, target in zip(images, targets)]
    assert set(lefts) == {6, 20}
    moved = [
        check(image, target)
        for images, targets in dataset.test_batches("shift 3", 3)
        for image, target in zip(images, targets)
    ]
    assert moved == [9, 9, 6, 6, 3, 3, 6, 6]
    # An object that leaves the image leaves the targets.
    far = load("voc-detection", year, shifts=(21,))
    counts = [len(target["labels"]) for _, targets in far.test_batches("shift 21", 2) for target in targets]
    assert counts == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [target["difficult"].shape for _, targets in far.test_batches("shift 21", 8) for target in targets][-1] == (
        0,
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<annotation><object>", "damaged XML"),
        ("", "damaged XML"),
        ("<annotation><object><name>dog</name></object></annotation>", "object 1 has no box of four numbers"),
        (f"<annotation>{voc_object('dog', ('x', 1, 2, 3))}</annotation>", "object 1 has no box of four numbers"),
        (f"<annotation>{voc_object('', (1, 1, 2, 3))}</annotation>", "object 1 has no name"),
        (
            f"<annotation>{voc_object('dog', (9, 9, 5, 12))}</annotation>",
            r"object 1 \(dog\) lies outside .* 9, 9, 5, 12",
        ),
        (f"<annotation>{voc_object('dog', (41, 1, 50, 9))}</annotation>", r"object 1 \(dog\) lies outside .* in 40×30"),
        (f"<annotation>{voc_object('dog', ('nan', 1, 50, 9))}</annotation>", "object 1 has no box of four numbers"),
    ],
)
def test_unreadable_annotations_are_left_out_and_named(tmp_path, content, reason):
    year = write_voc(tmp_path / "VOC2012", voc_images(), {"train": list("abc"), "val": list("ed")})
    (year / "Annotations" / "b.xml").write_text(content)
    for name in ("voc-detection", "voc-classification"):
        dataset = load(name, year)
        assert dataset.train_count == 2
        assert len(dataset.unreadable) == 1
        assert re.match(f"b: {reason}", dataset.unreadable[0])


def test_unreadable_voc_images(tmp_path):
    year = write_voc(tmp_path / "VOC2012", voc_images(), {"train": list("abc"), "val": ["e", "d", "g"]})
    (year / "JPEGImages" / "a.jpg").unlink()
    dataset = load("voc-detection", year)
    assert dataset.unreadable == ("a: no such file or directory", "g: no such file or directory")
    whole = (year / "JPEGImages" / "b.jpg").read_bytes()
    (year / "JPEGImages" / "b.jpg").write_bytes(whole[: len(whole) // 2])  # its header is there
    dataset = load("voc-detection", year)
    batches = list(dataset.train_batches(1, epoch=1, order=0, augmentation=0))
    assert len(batches) == 1
    assert dataset.unreadable[-1] == "JPEGImages/b.jpg: image file is truncated"
    for name in "ac":
        (year / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    (year / "JPEGImages" / "b.jpg").write_bytes(b"")
    with pytest.raises(AblationError, match="no readable training image in .*VOC2012: a: empty file"):
        load("voc-detection", year)
