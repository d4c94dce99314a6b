"""The residual modules and the factory of layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_pnn import LBConv2d, PerturbBasicBlock, PerturbBottleneck, PerturbConv2d
from torch_pnn.layers import LAYERS, make_layer

CLASSES = {"perturb": PerturbConv2d, "conv": nn.Conv2d, "lbc": LBConv2d, "conv1x1": PerturbConv2d}


def test_every_kind_is_made():
    assert set(LAYERS) == set(CLASSES)
    for kind, expected in CLASSES.items():
        assert type(make_layer(kind, 4, 8, 3)) is expected


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"kernel_size": 5, "padding": "same"}, {"dilation": 2, "padding": (0, 1)}],
)
def test_every_kind_has_the_convolutions_geometry(kind, geometry):
    settings = {"kernel_size": 3} | geometry
    x = torch.randn(2, 4, 9, 12)
    layer = make_layer(kind, 4, 8, **settings, bias=False)
    assert layer(x).shape == nn.Conv2d(4, 8, **settings)(x).shape
    assert layer.bias is None


@pytest.mark.parametrize("downsample", ["max", "avg", "subsample"])
def test_conv1x1_is_a_convolution_and_the_pooling(downsample):
    layer = make_layer("conv1x1", 4, 8, 3, 2, 1, downsample=downsample)
    x = torch.randn(2, 4, 9, 12)
    y = F.conv2d(x, layer.weight, layer.bias)
    pools = {
        "max": lambda: F.max_pool2d(y, 2, ceil_mode=True),
        "avg": lambda: F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False),
        "subsample": lambda: y[:, :, ::2, ::2],
    }
    torch.testing.assert_close(layer(x), pools[downsample]())


def test_options_reach_the_layer():
    layer = make_layer("perturb", 4, 8, 3, masks=3, noise="waves", level=0.5, seed=1, norm=True)
    assert (layer.masks, layer.noise, layer.level, layer.seed) == (3, "waves", 0.5, 1)
    layer = make_layer("lbc", 4, 8, 3, anchors=5, sparsity=0.9, activation="sigmoid", seed=1)
    assert (layer.anchors, layer.sparsity, layer.activation) == (5, 0.9, "sigmoid")
    for kind in LAYERS:
        assert make_layer(kind, 4, 8, 3, dtype=torch.float64, device="meta").weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "options", "error", "sentence"),
    [
        ("dense", {}, ValueError, "layer is 'dense', it should be one of 'perturb', 'conv', 'lbc', 'conv1x1'"),
        ("conv", {"masks": 2}, TypeError, "option 'masks' doesn't belong to the layer 'conv', its options are: none"),
        ("conv1x1", {"level": 0.1}, TypeError, "option 'level' .* its options are: downsample"),
        ("lbc", {"norm": True}, TypeError, "option 'norm'"),
        ("perturb", {"sparsity": 0.5}, TypeError, "option 'sparsity'"),
        ("lbc", {"groups": 2}, ValueError, "groups is 2"),
        ("perturb", {"masks": 0}, ValueError, "masks is 0"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, error, sentence):
    with pytest.raises(error, match=sentence):
        make_layer(kind, 4, 8, 3, **options)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("block", [PerturbBasicBlock, PerturbBottleneck])
def test_blocks_have_the_sizes_of_residual_modules(block, stride, kind):
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    for channels, size in ((8, (9, 12)), (4, (1, 1))):
        module = block(16, channels, stride, layer=kind)
        x = torch.randn(2, 16, *size, requires_grad=True)
        y = module(x)
        assert y.shape == (2, channels * block.expansion, -(-size[0] // rows), -(-size[1] // columns))
        y.sum().backward()
        assert bool(x.grad.isfinite().all())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


def test_basic_block_is_its_formula():
    block = PerturbBasicBlock(4, 8, 2, norm=True, seed=1).eval()
    x = torch.randn(2, 4, 8, 8)
    y = block.norm2(block.layer2(block.norm1(block.layer1(x)).relu()))
    torch.testing.assert_close(block(x), (y + block.shortcut(x)).relu())
    assert isinstance(PerturbBasicBlock(8, 8).shortcut, nn.Identity)


def test_bottleneck_is_its_formula():
    block = PerturbBottleneck(8, 2, seed=1).eval()
    x = torch.randn(2, 8, 8, 8)
    y = block.norm1(block.reduce(x)).relu()
    y = block.norm2(block.layer(y)).relu()
    torch.testing.assert_close(block(x), (block.norm3(block.expand(y)) + x).relu())
    assert isinstance(PerturbBottleneck(8, 4).shortcut, nn.Sequential)


@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_script(kind):
    model = nn.Sequential(PerturbBasicBlock(4, 8, 2, layer=kind), PerturbBottleneck(8, 2, layer=kind)).eval()
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
