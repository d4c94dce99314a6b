"""torchvision's classifiers and detectors as networks of the studies: the same places in every arm, and they learn."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch.nn import functional as F

from torch_pnn.ablation import arms, networks
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.study import ModelSettings, Study
from torch_pnn.modules import PerturbConv2d

pytest.importorskip("torchvision")


def _build(network, name, shape, **options):
    study = Study(
        "s", "S", (arms.find_arm("pnn"), arms.find_arm("control")), (0,), model=ModelSettings(network, 0, options)
    )
    if name not in study.arm_names:
        study = dataclasses.replace(study, arms=(*study.arms, arms.find_arm(name)))
    return arms.build(study, name, study.streams(0), types.SimpleNamespace(classes=3, image_shape=shape))


@pytest.mark.parametrize("arm", ["cnn", "waves-shuffled", "frozen-conv"])
def test_a_classifier(arm):
    built = _build("resnet18", arm, (3, 32, 32))
    assert built.width == 0
    assert len(built.slots) == (0 if arm == "cnn" else 16)
    assert isinstance(built.model.conv1, torch.nn.Conv2d)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss = F.cross_entropy(built.model(images), labels)
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(UsageError, match="takes images of 3 channels, and these have 1"):
        _build("resnet18", arm, (1, 32, 32))


@pytest.mark.parametrize("network", ["retinanet_resnet18_fpn", "fasterrcnn_resnet18_fpn"])
def test_a_detector(network):
    pnn, control, cnn = (_build(network, name, (3, 64, 64)) for name in ("pnn", "control", "cnn"))
    assert pnn.parameters == control.parameters < cnn.parameters
    assert pnn.macs == control.macs < cnn.macs
    assert any(isinstance(module, PerturbConv2d) for module in pnn.model.backbone.body.modules())
    weights = dict(control.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in pnn.model.named_parameters())
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([label])} for label in (1, 3)]
    losses = pnn.model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    pnn.model.eval()
    with torch.no_grad():
        assert {"boxes", "labels", "scores"} == set(pnn.model(images)[0])


def test_masks_of_one_size_are_refused_where_a_layer_reads_several():
    with pytest.raises(UsageError, match="masks of the kind constant have one size, and the layer works on several"):
        _build("retinanet_resnet18_fpn", "constant", (3, 64, 64))


def test_a_width_that_can_not_be_chosen():
    with pytest.raises(UsageError, match="the network 'resnet18' has none that can be chosen"):
        _build("resnet18", "cnn-params", (3, 32, 32))


def test_options_reach_torchvision_and_wrong_ones_are_named():
    assert networks.make_network("mobilenet_v2", 3, (3, 32, 32), 0, {"width_mult": 0.5}).last_channel == 1280
    with pytest.raises(UsageError, match="network 'resnet18' can't be made .*'wdith'"):
        networks.make_network("resnet18", 3, (3, 32, 32), 0, {"wdith": 1})
    assert networks.find_network("ssdlite320_mobilenet_v3_large").detects
    with pytest.raises(UsageError, match="unknown network 'fcn_resnet50'"):
        networks.find_network("fcn_resnet50")
