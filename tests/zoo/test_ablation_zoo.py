"""The data sets beside torchvision's readers of the same files, its downloads, and detection through its detectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

torchvision = pytest.importorskip("torchvision")
from data_support import (  # noqa: E402
    cifar10_batches,
    voc_object,
    write_batches,
    write_folders,
    write_idx_set,
    write_voc,
)
from torchvision import datasets, ops  # noqa: E402
from torchvision.transforms import RandomResizedCrop  # noqa: E402

from torch_pnn.ablation import data, detection, files, tasks  # noqa: E402
from torch_pnn.ablation.arms import build  # noqa: E402
from torch_pnn.ablation.data import augment, draws, voc  # noqa: E402
from torch_pnn.ablation.errors import AblationError  # noqa: E402
from torch_pnn.ablation.study import Arm, DataSettings, ModelSettings  # noqa: E402
from torch_pnn.modules import PerturbConv2d  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_PNN_CACHE", str(tmp_path / "cache"))


def read_test(name, root, **settings):
    """A test set as bytes and targets."""
    dataset = data.load(DataSettings(name, str(root), **settings))
    batches = list(dataset.test_batches("test", 16))
    images = torch.cat([inputs for inputs, _ in batches])
    shape = (1, -1, 1, 1)
    values = images * dataset.deviation.reshape(shape) + dataset.mean.reshape(shape)
    return values.round().to(torch.uint8), torch.cat([targets for _, targets in batches]), dataset


def test_idx_files_as_torchvision_reads_them(tmp_path):
    write_idx_set(tmp_path / "MNIST" / "raw")
    images, labels, _ = read_test("mnist", tmp_path)
    theirs = datasets.MNIST(str(tmp_path), train=False)
    assert torch.equal(images[:, 0], theirs.data)
    assert torch.equal(labels, theirs.targets)


def test_batches_as_torchvision_reads_them(tmp_path, monkeypatch):
    write_batches(tmp_path / "cifar-10-batches-py", cifar10_batches())
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    images, labels, dataset = read_test("cifar10", tmp_path)
    theirs = datasets.CIFAR10(str(tmp_path), train=False)
    assert np.array_equal(images.numpy().transpose(0, 2, 3, 1), theirs.data)
    assert labels.tolist() == theirs.targets
    assert list(dataset.class_names) == theirs.classes
    assert dataset.train_count == len(datasets.CIFAR10(str(tmp_path), train=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_image_folders_as_torchvision_reads_them(tmp_path, kind):
    write_folders(tmp_path, size=(20, 24), kind=kind)
    images, labels, dataset = read_test("image-folder", tmp_path)
    theirs = datasets.ImageFolder(str(tmp_path / "val"))
    assert labels.tolist() == theirs.targets
    assert list(dataset.class_names) == theirs.classes
    assert np.array_equal(images.numpy().transpose(0, 2, 3, 1), np.stack([np.asarray(image) for image, _ in theirs]))


def test_annotations_as_torchvision_reads_them(tmp_path):
    objects = [voc_object("dog", (3, 4, 20, 21)), voc_object("person", (5, 6, 40, 30), difficult=1)]
    year = write_voc(
        tmp_path / "VOCdevkit" / "VOC2012", {"a": objects, "b": objects[:1]}, {"train": ["b"], "val": ["a"]}
    )
    dataset = data.load(DataSettings("voc-detection", str(year)))
    ((images, targets),) = dataset.test_batches("test", 4)
    image, raw = datasets.VOCDetection(str(tmp_path), year="2012", image_set="val")[0]
    assert np.array_equal((images[0] * 255).round().byte().numpy().transpose(1, 2, 0), np.asarray(image))
    for number, theirs in enumerate(raw["annotation"]["object"]):
        corners = [int(theirs["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")]
        assert (targets[0]["boxes"][number] + torch.tensor([1, 1, 0, 0])).tolist() == corners
        assert voc.CLASSES[int(targets[0]["labels"][number]) - 1] == theirs["name"]
        assert bool(targets[0]["difficult"][number]) == (theirs["difficult"] == "1")


def test_downloads_end_where_they_are_looked_for(tmp_path, monkeypatch):
    def mnist(url, download_root, filename, md5):
        folder = Path(download_root)
        if not (folder / filename.removesuffix(".gz")).exists():
            write_idx_set(folder)

    def cifar(url, root, filename, md5):
        write_batches(Path(root) / "cifar-10-batches-py", cifar10_batches())

    def annotations(url, root, filename, md5):
        write_voc(
            Path(root) / "VOCdevkit" / "VOC2012",
            {"a": [voc_object("dog", (1, 1, 9, 9))], "b": [voc_object("cat", (1, 1, 9, 9))]},
            {"train": ["a"], "val": ["b"], "trainval": ["a", "b"]},
        )

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", mnist)
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", cifar)
    monkeypatch.setattr(datasets.voc, "download_and_extract_archive", annotations)
    for name, count in (("mnist", 40), ("fashion-mnist", 40), ("kmnist", 40), ("voc-detection", 1)):
        assert data.load(DataSettings(name, str(tmp_path / name), download=True)).train_count == count
        assert data.load(DataSettings(name, str(tmp_path / name))).train_count == count
    # Files that are not the published ones are refused by torchvision, in a sentence of ours.
    with pytest.raises(AblationError, match="cifar10 could not be downloaded: Dataset not found or corrupted"):
        monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", lambda *_, **__: None)
        data.load(DataSettings("cifar10", str(tmp_path / "none"), download=True))
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", cifar)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, *_: Path(path).exists())
    assert data.load(DataSettings("cifar10", str(tmp_path / "cifar10"), download=True)).train_count == 100


def test_overlaps_are_torchvisions():
    generator = np.random.default_rng(0)
    boxes = [np.sort(generator.integers(0, 30, (n, 2, 2)), axis=1).reshape(n, 4).astype(float) for n in (40, 30)]
    theirs = ops.box_iou(*(torch.from_numpy(box) for box in boxes)).nan_to_num().numpy()
    assert np.allclose(detection.overlaps(*boxes), theirs, atol=1e-12)


def test_resized_crops_are_spread_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, 90, 120)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)], float)
    ours = []
    for place in range(4000):
        words = draws.bits(0, 0, draws.AUGMENTATION, place, 1, augment.ResizedCrop.numbers)[0]
        left, top, right, bottom = augment.ResizedCrop().part(120, 90, words)[0]
        ours.append((top, left, bottom - top, right - left))
    from scipy.stats import ks_2samp

    for mine, other in zip(np.array(ours, float).T, theirs.T):
        assert ks_2samp(mine, other).pvalue > 1e-3


def test_a_converted_detector_is_trained_and_measured(tmp_path):
    objects = [voc_object("dog", (11, 11, 40, 50)), voc_object("cat", (1, 30, 30, 64), difficult=1)]
    images = {name: objects for name in "abc"} | {"d": []}  # an image without objects is one too
    root = write_voc(tmp_path / "VOC2012", images, {"train": ["a", "d"], "val": ["b", "c"]}, (64, 64))
    dataset = data.load(DataSettings("voc-detection", str(root), augment=True))
    study = dataclasses.replace(
        files.load("digits"),
        data=DataSettings("voc-detection"),
        model=ModelSettings("fasterrcnn_mobilenet_v3_large_320_fpn", options={"min_size": 64, "max_size": 64}),
        arms=(Arm("pnn", layer="perturb", options={"preset": "juefeix2018"}),),
    )
    task = tasks.find_task(dataset)
    model = build(study, "pnn", study.streams(0), dataset).model
    assert any(isinstance(module, PerturbConv2d) for module in model.modules())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for inputs, targets in dataset.train_batches(2, epoch=1, order=0, augmentation=0):
        loss, correct = task.training_step(model, inputs, targets)
        assert correct is None
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    score = task.evaluate(model, dataset.test_batches("test", task.test_batch))
    assert model.training
    assert (score.total, score.loss, score.correct) == (2, None, None)
    assert 0 <= score.value <= 1
    # Difficult objects alone are nothing to be found.
    assert [value is not None for value in score.per_class] == [name == "dog" for name in voc.CLASSES]
