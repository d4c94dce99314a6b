"""Tools around models, of torchvision and timm, on networks with our layers: feature extraction, averaged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, convert, fuse, models, summary

torchvision = pytest.importorskip("torchvision")
timm_utils = pytest.importorskip("timm.utils")
feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")


def converted(**options):
    model = torchvision.models.resnet18(num_classes=5)
    return convert(model, seed=1, **options).eval()


def test_features_are_extracted_by_the_layers_names():
    model, x = converted(), torch.randn(1, 3, 64, 64)
    _, names = feature_extraction.get_graph_node_names(model)
    assert {"layer1.0.conv1", "layer4.1.conv2"} <= set(names)
    extractor = feature_extraction.create_feature_extractor(model, ["layer1.0.conv1", "layer3", "layer4.1.conv2"])
    seen = {}
    model.layer1[0].conv1.register_forward_hook(lambda module, args, output: seen.update(first=output))
    model.layer4[1].conv2.register_forward_hook(lambda module, args, output: seen.update(last=output))
    found = extractor(x)
    model(x)
    assert torch.equal(found["layer1.0.conv1"], seen["first"]) and torch.equal(found["layer4.1.conv2"], seen["last"])
    assert found["layer3"].shape == (1, 256, 4, 4)


def test_a_converted_network_is_fused_and_summed_up():
    model, x = converted(downsample="subsample"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    model.eval()
    fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules()), str(fused.fusion)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)
    before, after = summary(model, (3, 64, 64)), summary(fused, (3, 64, 64))
    # The shifts of the normalisations turn into biases.
    assert (after.multiply_adds, after.adds) == (before.multiply_adds, before.adds)


def test_a_vision_transformer_is_summed_up():
    found = summary(torchvision.models.vit_b_16(), (3, 224, 224))
    assert round(found.multiply_adds / 1e9, 2) == 17.56 and found.parameters == 86567656  # as torchvision states them


@pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
@pytest.mark.filterwarnings("ignore")
def test_timms_averages_keep_the_seeds(name):
    torch.manual_seed(3)
    model = nn.Sequential(PerturbConv2d(3, 4, 3), PerturbConv2d(4, 4, 3, norm=True), LBConv2d(4, 2))
    wanted = [copy.deepcopy(buffer) for key, buffer in model.named_buffers() if key.endswith("mask_seed")]
    average = getattr(timm_utils, name)(model, decay=0.99)
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.add_(0.1)
        average.update(model)
    inner = getattr(average, "ema", None) or average.module
    inner.eval()
    found = [buffer for key, buffer in inner.named_buffers() if key.endswith("mask_seed")]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(inner[0].weight, model[0].weight)


def test_a_residual_network_costs_what_torchvision_states():
    assert round(summary(torchvision.models.resnet18(), (3, 224, 224)).multiply_adds / 1e9, 2) == 1.81
    assert models.costs(torchvision.models.resnet18(), (3, 224, 224)).macs == 1814073344
