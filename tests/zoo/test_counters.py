"""Our layers in the counters of fvcore, thop and ptflops, beside `torch_pnn.summary`."""

from __future__ import annotations

import copy
import io
import logging
import warnings

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, counters, models, summary

fvcore_nn = pytest.importorskip("fvcore.nn")
ptflops = pytest.importorskip("ptflops")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # thop asks Python's removed distutils for versions
    thop = pytest.importorskip("thop")

LAYERS = {
    "plain": lambda: PerturbConv2d(3, 8, 3, padding=1),
    "masks": lambda: PerturbConv2d(3, 8, 3, masks=4, activation="identity"),
    "groups": lambda: PerturbConv2d(4, 8, 3, 2, 1, groups=2, masks=2),
    "subsample": lambda: PerturbConv2d(3, 8, 3, 2, 1, downsample="subsample", shared_masks=True),
    "control": lambda: PerturbConv2d(3, 8, 3, noise=None, bias=False),
    "lbc": lambda: LBConv2d(3, 8, anchors=5, stride=2),
    "norm": lambda: PerturbConv2d(3, 8, 3, padding=1, masks=2, norm=True),
}


def size(layer):
    return (layer.in_channels, 9, 7)


def network(layer="perturb", **options):
    return models.noise_resnet18(width=4, layer=layer, **options).eval()


def products(counts):
    """The products among fvcore's counts by operator: it counts normalised and averaged values too."""
    return sum(flops for name, flops in counts.items() if name not in ("batch_norm", "adaptive_avg_pool2d"))


def analysed(model, size, batch=1):
    analysis = fvcore_nn.FlopCountAnalysis(model.eval(), torch.zeros(batch, *size))
    return analysis.set_op_handle(**counters.fvcore_handlers())


@pytest.mark.parametrize("name", LAYERS)
def test_fvcore_counts_a_layer(name):
    layer = LAYERS[name]()
    counts = analysed(layer, size(layer), batch=3).by_operator()
    assert products(counts) == 3 * summary(layer, size(layer)).multiply_adds


@pytest.mark.parametrize("options", [{}, {"preset": "juefeix2018"}, {"layer": "lbc"}, {"layer": "conv"}])
def test_fvcore_counts_a_network(options, caplog):
    model = network(**options)
    analysis = analysed(model, (3, 16, 16))
    found = summary(model, (3, 16, 16))
    with caplog.at_level(logging.WARNING):
        assert products(analysis.by_operator()) == found.multiply_adds
    assert "torch_pnn" not in caplog.text
    by_module = analysis.by_module_and_operator()
    for row in found.rows:
        if row.multiply_adds:  # fvcore's counts of a container are its children's
            assert products(by_module[row.name]) == row.multiply_adds


def test_fvcore_without_our_handlers_says_what_it_leaves_out(caplog):
    with caplog.at_level(logging.WARNING):
        fvcore_nn.FlopCountAnalysis(network(), torch.zeros(1, 3, 16, 16)).total()
    assert "Unsupported operator torch_pnn::perturb_conv2d" in caplog.text


def thop_total(model, size, batch=1, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return thop.profile(copy.deepcopy(model), (torch.zeros(batch, *size),), verbose=False, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_thop_counts_a_layer(name):
    layer = LAYERS[name]()
    macs, parameters = thop_total(nn.Sequential(layer), size(layer), 3, custom_ops=counters.thop_ops())
    assert macs == 3 * summary(layer, size(layer)).multiply_adds
    assert parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"preset": "juefeix2018"}, {"layer": "lbc"}])
def test_thop_counts_a_network(options):
    model = network(**options)
    macs, parameters = thop_total(model, (3, 16, 16), custom_ops=counters.thop_ops())
    found = summary(model, (3, 16, 16))
    # thop counts four for each value that is normalised, and averages too: ask it about those alone.
    others = sum(4 * row.adds for row in found.rows if row.kind == "BatchNorm2d")
    pooled = thop_total(nn.Sequential(nn.AdaptiveAvgPool2d(1)), (32, 2, 2))[0]
    assert macs == found.multiply_adds + others + pooled
    assert parameters == found.parameters


def ptflops_total(model, size, backend, **options):
    return ptflops.get_model_complexity_info(
        copy.deepcopy(model),
        size,
        as_strings=False,
        print_per_layer_stat=False,
        backend=backend,
        ost=io.StringIO(),
        custom_modules_hooks=counters.ptflops_hooks(),
        **options,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_ptflops_counts_a_layer(name):
    layer = LAYERS[name]()
    macs, parameters = ptflops_total(nn.Sequential(layer), size(layer), "pytorch")
    found = summary(layer, size(layer))
    pooled = 8 * 9 * 7 if name == "groups" else 0  # by its convention pooling counts the values that it reads
    assert macs == found.multiply_adds + found.adds + found.activations + pooled
    assert parameters == found.parameters


@pytest.mark.parametrize("name", LAYERS)
def test_ptflops_counts_operators(name):
    layer = LAYERS[name]()
    macs, parameters = ptflops_total(nn.Sequential(layer), size(layer), "aten")
    found = summary(layer, size(layer))
    pixels = found.multiply_adds // layer.weight.numel() if name != "lbc" else 5 * 4
    assert macs == found.multiply_adds + (0 if layer.bias is None else 8 * pixels)
    assert parameters == found.parameters


def test_ptflops_without_our_hooks_sees_no_product():
    layer = PerturbConv2d(3, 8, 3, padding=1)
    macs, _ = ptflops.get_model_complexity_info(
        nn.Sequential(layer), (3, 9, 7), as_strings=False, print_per_layer_stat=False
    )
    assert macs == 0
