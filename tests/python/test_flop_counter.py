"""PyTorch's FLOP counter sees the operators: the counts are the formulas', and those of the plain composition."""

from __future__ import annotations

import copy

import pytest
import torch
from operators_support import needs_compiled, needs_derivatives
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torch_pnn import PerturbConv2d, functional, reference

PACKETS = torch.ops.torch_pnn


def counted(function, *args):
    """What the counter says of a call: the sum, and the operators of ours that it saw."""
    with FlopCounterMode(display=False) as mode:
        function(*args)
    found = mode.get_flop_counts().get("Global", {})
    return mode.get_total_flops(), {str(name): flops for name, flops in found.items() if "torch_pnn" in str(name)}


def tensors(groups=1, masks=3, channels=4, outputs=6, height=7, width=5, batch=2):
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    weight = torch.randn(outputs, channels // groups * masks, 1, 1, requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True)
    return x, weight, bias


# Hand formula: a product of [T, C/g * M] with the B * H' * W' kept pixels is two operations for each pair.
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride, pixels", [((1, 1), 35), ((2, 3), 4 * 2), ((7, 1), 5)])
@pytest.mark.parametrize("mask", ["seed", "tensor", "none"])
def test_forward_and_backward_are_the_hand_formula(groups, stride, pixels, mask):
    x, weight, bias = tensors(groups)
    options = {"masks": 3, "stride": stride, "groups": groups}
    if mask == "none":
        options["noise"] = None
    elif mask == "seed":
        options["seed"] = 5
    else:
        options["mask"] = torch.randn(4, 3, 7, 5)
    once = 2 * 2 * pixels * 6 * (4 // groups * (1 if mask == "none" else 3))
    if mask == "none":
        weight = torch.randn(6, 4 // groups, 1, 1, requires_grad=True)
        del options["masks"]
    total, ours = counted(lambda: functional.perturb_conv2d(x, weight, bias, **options))
    assert total == once and list(ours) == ["torch_pnn.perturb_conv2d"]
    y = functional.perturb_conv2d(x, weight, bias, **options)
    total, ours = counted(lambda: y.sum().backward())
    assert total == 2 * once and list(ours) == ["torch_pnn._perturb_conv2d_backward"]


@pytest.mark.parametrize("wanted, products", [("x", 1), ("weight", 1), ("bias", 0), ("mask", 1), ("x mask", 1)])
def test_backward_counts_what_is_asked_for(wanted, products):
    x, weight, bias = tensors()
    mask = torch.randn(4, 3, 7, 5)
    named = {"x": x, "weight": weight, "bias": bias, "mask": mask}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted.split())
    y = functional.perturb_conv2d(x, weight, bias, mask=mask)
    assert counted(lambda: y.sum().backward())[0] == products * 2 * 70 * 6 * 12


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_normalisation_inside_adds_no_product(training, stride):
    x, weight, bias = tensors()
    gamma, beta = torch.ones(12, requires_grad=True), torch.zeros(12, requires_grad=True)
    mean, variance = torch.zeros(12), torch.ones(12)

    def call():
        return functional.perturb_norm_conv2d(
            x, weight, bias, gamma, beta, mean, variance, training=training, seed=1, masks=3, stride=stride
        )

    once = 2 * 2 * (35 if stride == 1 else 12) * 6 * 12
    total, ours = counted(call)
    assert total == once and list(ours) == ["torch_pnn.perturb_norm_conv2d"]
    y = call()
    total, ours = counted(lambda: y.sum().backward())
    assert total == 2 * once and list(ours) == ["torch_pnn._perturb_norm_conv2d_backward"]
    for tensor in (weight, gamma, beta):
        tensor.requires_grad_(False)
    y = call()
    assert counted(lambda: y.sum().backward())[0] == (2 if training else 1) * once


def test_the_plain_composition_counts_the_same():
    x, weight, bias = tensors()
    mask = torch.randn(4, 3, 7, 5)

    def composed():
        u = x.unsqueeze(2) + 0.1 * mask
        return nn.functional.conv2d(torch.relu(u).flatten(1, 2), weight, bias)

    def ours():
        return functional.perturb_conv2d(x, weight, bias, mask=mask, level=0.1)

    assert counted(ours)[0] == counted(composed)[0]
    torch.testing.assert_close(ours(), composed())
    assert counted(lambda: ours().sum().backward())[0] == counted(lambda: composed().sum().backward())[0]


def test_the_reference_counts_the_same():
    x, weight, bias = tensors()
    ours = counted(lambda: functional.perturb_conv2d(x, weight, bias, seed=3, masks=3))[0]
    assert counted(lambda: reference.perturb_conv2d(x, weight, bias, seed=3, masks=3))[0] == ours > 0


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"masks": 4, "groups": 2}, {"stride": 2}])
def test_a_module_counts_its_multiply_adds(options):
    layer = PerturbConv2d(4, 6, 3, padding=1, **options)
    with FlopCounterMode(display=False) as mode:
        layer(torch.randn(3, 4, 9, 8)).sum().backward()
    counts = mode.get_flop_counts()
    once = 3 * 2 * layer.multiply_adds(9, 8)
    # The input needs no gradient; normalisation's training form needs nothing of it either.
    assert mode.get_total_flops() == 2 * once
    assert sum(counts["PerturbConv2d"].values()) == 2 * once


def test_an_empty_batch_costs_nothing():
    assert counted(PerturbConv2d(3, 4, 3, padding=1), torch.zeros(0, 3, 5, 5))[0] == 0


@needs_compiled
def test_a_meta_tensor_is_counted_without_being_computed():
    layer = PerturbConv2d(64, 64, 3, padding=1, masks=8, device="meta")
    total, ours = counted(layer, torch.empty(16, 64, 512, 512, device="meta"))
    assert total == 2 * 16 * layer.multiply_adds(512, 512) and len(ours) == 1


@needs_derivatives
def test_the_table_names_the_operators():
    layer = nn.Sequential(PerturbConv2d(4, 6, 3, padding=1))
    with FlopCounterMode(display=False) as mode:
        layer(torch.randn(3, 4, 9, 8)).sum().backward()
    named = {str(name) for name in mode.get_flop_counts()["Global"]}
    assert named == {"torch_pnn.perturb_conv2d", "torch_pnn._perturb_conv2d_backward"}


# PyTorch compiles nothing while a counter is on (with fullgraph=True it says so); the model runs as it is then.
@needs_derivatives
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_a_compiled_model_counts_the_same():
    model = nn.Sequential(PerturbConv2d(3, 8, 3, padding=1, masks=2), nn.ReLU(), PerturbConv2d(8, 4, 3, norm=True))
    x = torch.randn(2, 3, 9, 9)
    eager = counted(lambda: model(x).sum().backward())
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    assert counted(lambda: compiled(x).sum().backward()) == eager
    compiled(x).sum().backward()
    assert counted(lambda: compiled(x).sum().backward()) == eager


def test_an_exported_model_counts_the_same():
    model = nn.Sequential(PerturbConv2d(3, 8, 3, padding=1, masks=2), nn.ReLU(), PerturbConv2d(8, 4, 3, norm=True))
    model.eval()
    x = torch.randn(2, 3, 9, 9)
    exported = torch.export.export(model, (x,)).module()
    assert counted(exported, x) == counted(model, x)
