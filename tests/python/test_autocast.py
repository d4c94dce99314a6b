"""Autocast treats the layer as it treats a convolution: weight and bias are cast, y has the weight's type, x stays."""

from __future__ import annotations

import copy

import pytest
import torch
from operators_support import OPS, needs_derivatives
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_pnn
from torch_pnn import PerturbConv2d, _fallback, functional, reference

TYPES = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding to nearest


def layer_of(**options):
    return PerturbConv2d(3, 8, 3, padding=1, masks=2, seed=3, **options)


def region(dtype, **options):
    return torch.autocast("cpu", dtype=dtype, **options)


def cast_by_hand(layer, dtype):
    """The layer with its weight and bias in `dtype` and nothing else."""
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(layer.weight.detach().to(dtype))
    other.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return other


@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"mask_size": (9, 8)}, {"groups": 1, "activation": "gelu"}], ids=str
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_and_gradients_are_those_of_a_cast_weight(dtype, options):
    layer = layer_of(**options)
    x, g = torch.randn(2, 3, 9, 8), torch.randn(2, 8, 9, 8).to(dtype)
    results = []
    for model, autocast in ((copy.deepcopy(layer), True), (cast_by_hand(layer, dtype), False)):
        input = x.clone().requires_grad_()
        with region(dtype, enabled=autocast):
            y = model(input)
        assert y.dtype == dtype
        y.backward(g)
        results.append((y, input.grad, *(p.grad for p in model.parameters())))
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
    for ours, by_hand in zip(*results):
        assert torch.equal(ours, by_hand.to(ours.dtype))
    assert results[0][1].dtype == torch.float32


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_lie_within_the_bound_of_the_reference(dtype, norm):
    layer = layer_of(norm=norm).eval()
    x = torch.randn(2, 3, 9, 8)
    with region(dtype), torch.no_grad():
        y = layer(x)
    double = copy.deepcopy(layer).double()
    mask = double.perturbation(9, 8).double()
    a = torch.relu(x.double().unsqueeze(2) + double.level * mask).flatten(1, 2)
    if norm:
        a = double.norm(a)
    exact = nn.functional.conv2d(a, double.weight, double.bias)
    terms = nn.functional.conv2d(a.abs(), double.weight.abs(), double.bias.abs())
    # a, V and bias are rounded once each, and the result once.
    assert ((y.double() - exact).abs() <= 3.1 * UNIT[dtype] * terms + 1e-12).all()


def test_regions_nest():
    layer, x = layer_of(), torch.randn(2, 3, 9, 8)
    plain = layer(x)
    with region(torch.bfloat16):
        outer = layer(x)
        with region(torch.bfloat16, enabled=False):
            assert torch.equal(layer(x), plain)
        # PyTorch's cache would hand out the outer region's copy of the weight, whatever its type.
        with region(torch.float16, cache_enabled=False):
            assert layer(x).dtype == torch.float16
        assert torch.equal(layer(x), outer) and outer.dtype == torch.bfloat16
    assert torch.equal(layer(x), plain)


def test_a_weight_is_cast_once_in_a_region():
    def casts(**options):
        layer, x = layer_of(bias=False), torch.randn(2, 3, 9, 8)
        with torch.profiler.profile() as profile, region(torch.bfloat16, **options):
            for _ in range(3):
                layer(x)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")

    compiled = torch_pnn._library.status().autograd == "loaded"
    assert casts(cache_enabled=False) == 3
    assert casts() == (1 if compiled else 3)


def test_a_changed_weight_is_cast_anew():
    layer, x = layer_of(), torch.randn(2, 3, 9, 8)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    outputs = []
    for _ in range(2):
        with region(torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        optimiser.step()
        outputs.append(y)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_inputs_of_every_type_that_a_convolution_takes(dtype, norm, held):
    layer = layer_of(norm=norm, mask_size=(9, 8) if held else None).eval()
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    other = TYPES[1 - TYPES.index(dtype)]
    for type in (torch.float32, dtype, other):
        x = torch.randn(2, 3, 9, 8).to(type).requires_grad_()
        with region(dtype):
            y = layer(x)
            assert y.dtype == convolution(x).dtype == dtype
        y.float().sum().backward()
        assert x.grad.dtype == type
        seen = x.detach().to(dtype) if type == other else x.detach()
        with torch.no_grad():
            assert torch.equal(y, cast_by_hand(layer, dtype)(seen))
    for model in (layer, convolution):  # autocast leaves float64 alone
        with region(dtype), pytest.raises((TypeError, RuntimeError)):
            model(torch.randn(2, 3, 9, 8, dtype=torch.float64))
    double = copy.deepcopy(layer).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with region(dtype):
        assert torch.equal(double(x), double(x)) and double(x).dtype == torch.float64


def test_half_models_with_held_masks_take_part():
    """x and its mask are float16, the region's type is bfloat16: both follow the weight."""
    layer = layer_of(mask_size=(9, 8)).half()
    assert layer.mask.dtype == torch.float16
    x = torch.randn(2, 3, 9, 8).half()
    with region(torch.bfloat16), torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


def test_networks_train_under_autocast():
    torch.manual_seed(1)
    model = torch_pnn.models.noise_resnet18(width=4, preset="juefeix2018")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    losses = []
    for _ in range(8):
        with region(torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_scripted_layers_follow_autocast():
    layer = layer_of(norm=True)
    x = torch.randn(2, 3, 9, 8)
    scripted = torch.jit.script(copy.deepcopy(layer))
    with region(torch.bfloat16):
        assert torch.equal(scripted(x), layer(x)) and layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_keys_of_both_devices_are_registered(device):
    for name in ("perturb_conv2d", "perturb_norm_conv2d"):
        key = f"Autocast{device.upper()}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_pnn::{name}", key)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_cuda_tensors_without_a_gpu(dtype, norm):
    """Fake CUDA tensors go through the same dispatch keys, so what autocast does to them shows without a GPU.

    Not their gradients: PyTorch's own bookkeeping asks the driver.
    """
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        x = torch.empty(2, 3, 5, 6, device="cuda")
        weight, bias = torch.empty(4, 3, 1, 1, device="cuda"), torch.empty(4, device="cuda")
        seed = torch.ones(1, dtype=torch.int64, device="cuda")

        def call(input):
            if norm:
                return OPS.perturb_norm_conv2d(input, weight, bias, None, None, None, None, None, seed)[0]
            return OPS.perturb_conv2d(input, weight, bias, None, seed)

        assert call(x).dtype == torch.float32
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)
            for input in (x, x.bfloat16(), x.half()):
                y = call(input)
                assert y.dtype == dtype and y.device.type == "cuda"
            # The CPU's tensors are none of its business.
            assert layer_of()(torch.randn(2, 3, 9, 8)).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", before)


@needs_derivatives
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("type", [torch.float32, *TYPES], ids=str)
def test_the_python_registration_does_the_same(norm, held, type):
    """What stands in where no compiled library fits."""
    name = "perturb_norm_conv2d" if norm else "perturb_conv2d"
    kernel = _fallback._autocast_kernel(name, "cpu", "AutocastCPU")
    x, weight = torch.randn(2, 3, 5, 6).to(type), torch.randn(4, 3, 1, 1)
    kwargs = {"mask": torch.randn(3, 1, 5, 6).to(type)} if held else {"seed": torch.tensor([3])}
    if norm:
        kwargs |= dict.fromkeys(("norm_weight", "norm_bias", "running_mean", "running_var"))
    bias = torch.randn(4)
    with region(torch.bfloat16):
        compiled = getattr(OPS, name)(x, weight, bias, **kwargs)
        ours = kernel(x, weight, bias, **kwargs)
        by_name = kernel(x, weight, bias=bias, **kwargs)
    for values in (ours, by_name):
        for value, expected in zip(values if norm else [values], compiled if norm else [compiled]):
            assert torch.equal(value, expected)


def test_the_reference_is_what_the_functional_form_computes_of_cast_tensors():
    x, weight, bias = torch.randn(2, 3, 5, 6), torch.randn(4, 6, 1, 1), torch.randn(4)
    with region(torch.bfloat16):
        y = functional.perturb_conv2d(x, weight, bias, seed=5, masks=2, level=0.5)
    expected = reference.perturb_conv2d(x, weight.bfloat16(), bias.bfloat16(), seed=5, masks=2, level=0.5)
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=1e-3)
