"""Layers made without memory: the meta device, to_empty, skip_init, FakeTensorMode, lazy modules beside ours."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from plain_support import assert_same_step, reference_step, step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from torch_pnn import LBConv2d, PerturbConv2d, models
from torch_pnn.modules import MASK_VERSION

OPTIONS = [
    {"seed": 2**64 - 3},
    {},
    {"masks": 2, "noise": "waves", "shared_masks": True},
    {"seed": 4, "mask_size": (6, 5)},
    {"mask_size": (6, 5), "train_masks": True},
    {"norm": True, "activation": "silu"},
    {"noise": None},
    {"dtype": torch.bfloat16},
]


def materialised(module):
    """The usual way off the meta device."""
    module.to_empty(device="cpu")
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    return module


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_from_the_meta_device_is_a_layer(options):
    with torch.device("meta"):
        layer = PerturbConv2d(4, 6, 3, padding=1, **options)
    named = dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert all(tensor.is_meta for tensor in named.values())
    by_argument = PerturbConv2d(4, 6, 3, padding=1, device="meta", **options)
    assert all(p.is_meta for p in by_argument.parameters())
    fresh = PerturbConv2d(4, 6, 3, padding=1, **options)
    assert list(fresh.state_dict()) == list(layer.state_dict())

    materialised(layer)
    assert layer.mask_version.tolist() == [MASK_VERSION]
    if "seed" in options:
        assert torch.equal(layer.mask_seed, fresh.mask_seed)
    if layer.mask is not None and not options.get("train_masks"):
        torch.testing.assert_close(layer.mask, layer.perturbation(6, 5))
    x = torch.randn(2, 4, 6, 5).to(layer.weight.dtype)
    found = step(layer, x)
    tolerance = 1e-5 if layer.weight.dtype == torch.float32 else 0.03
    assert_same_step(found, reference_step(layer, x), rtol=tolerance, atol=tolerance, buffers=False)
    layer.load_state_dict(fresh.state_dict())
    assert torch.equal(layer.eval()(x), fresh.eval()(x))


def test_the_same_generator_gives_the_same_layer():
    def made(on_meta):
        torch.manual_seed(3)
        layer = PerturbConv2d(4, 6, 3, device="meta" if on_meta else None)
        if on_meta:
            layer.to_empty(device="cpu")
            torch.manual_seed(3)
            layer.reset_parameters()
        return layer

    for name, value in made(False).state_dict().items():
        assert torch.equal(made(True).state_dict()[name], value), name


def test_meta_layers_tell_sizes():
    layer = PerturbConv2d(3, 8, 3, 2, 1, masks=2, norm=True, device="meta")
    x = torch.empty(2, 3, 9, 8, device="meta")
    y = layer(x.requires_grad_())
    assert y.is_meta and y.shape == (2, 8, 5, 4)
    y.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape and x.grad.shape == x.shape
    assert LBConv2d(3, 8, device="meta")(x).shape == (2, 8, 9, 8)


def test_whole_networks_from_the_meta_device():
    with torch.device("meta"):
        model = models.noise_resnet18(width=4, seed=1)
    expected = models.noise_resnet18(width=4, seed=1)
    model.to_empty(device="cpu")
    for (name, ours), (_, other) in zip(model.named_modules(), expected.named_modules()):
        if isinstance(ours, PerturbConv2d):  # the seeds are back before any reset_parameters
            assert torch.equal(ours.mask_seed, other.mask_seed), name
    model.load_state_dict(expected.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), expected.eval()(x))


def test_state_assigned_in_place_of_meta_tensors():
    """`load_state_dict(assign=True)`, as large models are loaded."""
    source = PerturbConv2d(4, 6, 3, padding=1, seed=7, norm=True).eval()
    layer = PerturbConv2d(4, 6, 3, padding=1, norm=True, device="meta").eval()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(layer(x), source(x))
    assert torch.equal(layer.double()(x.double()), source.double()(x.double()))


@pytest.mark.parametrize("options", [{"seed": 2**63 + 1}, {"seed": 5, "mask_size": (6, 5)}, {"seed": 9, "norm": True}])
def test_skip_init_leaves_weights_alone_and_masks_right(options):
    layer = torch.nn.utils.skip_init(PerturbConv2d, 4, 6, 3, padding=1, **options)
    fresh = PerturbConv2d(4, 6, 3, padding=1, **options)
    assert torch.equal(layer.mask_seed, fresh.mask_seed) and layer.mask_version.tolist() == [MASK_VERSION]
    assert layer.mask is None or torch.equal(layer.mask, fresh.mask)
    with torch.no_grad():  # what a caller of skip_init does
        for parameter, value in zip(layer.parameters(), fresh.parameters()):
            parameter.copy_(value)
        for name, buffer in layer.norm.named_buffers() if layer.norm is not None else ():
            buffer.copy_(dict(fresh.norm.named_buffers())[name])
    x = torch.randn(2, 4, 6, 5)
    assert_same_step(step(layer, x), step(fresh, x), rtol=0, atol=0)
    fresh.load_state_dict(layer.state_dict())


def test_skip_init_without_a_seed_draws_one():
    torch.manual_seed(1)
    layers = [torch.nn.utils.skip_init(PerturbConv2d, 4, 6, 3) for _ in range(2)]
    assert not torch.equal(layers[0].mask_seed, layers[1].mask_seed)
    torch.manual_seed(1)
    assert torch.equal(torch.nn.utils.skip_init(PerturbConv2d, 4, 6, 3).mask_seed, layers[0].mask_seed)


@pytest.mark.parametrize("seed", [None, 3])
def test_skip_init_draws_lbc_filters(seed):
    torch.manual_seed(1)
    layer = torch.nn.utils.skip_init(LBConv2d, 4, 6, seed=seed, sparsity=0.5)
    assert set(layer.anchor_weight.unique().tolist()) == {-1.0, 0.0, 1.0}
    if seed is not None:
        assert torch.equal(layer.anchor_weight, LBConv2d(4, 6, seed=seed).anchor_weight)


def test_leaving_another_device_than_meta_changes_no_mask():
    layer = PerturbConv2d(4, 6, 3)
    seed, state = layer.mask_seed.clone(), torch.get_rng_state()
    layer.double().to("cpu").float().share_memory()
    assert torch.equal(layer.mask_seed, seed) and torch.equal(torch.get_rng_state(), state)


def test_a_given_mask_that_was_lost_is_named():
    with torch.device("meta"):
        layer = PerturbConv2d(3, 4, 3, padding=1, mask=torch.randn(3, 1, 6, 5, device="cpu"))
    with pytest.warns(
        RuntimeWarning, match="mask was given as a tensor and lost its values on the meta device: load a"
    ):
        layer.to_empty(device="cpu")
    source = PerturbConv2d(3, 4, 3, padding=1, mask=torch.randn(3, 1, 6, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 6, 5)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fake_tensors_plan_a_model(options):
    """Deferred initialisation by FakeTensorMode: sizes, types and gradients without memory."""
    with FakeTensorMode():
        layer = PerturbConv2d(4, 6, 3, 2, 1, **({"padding": 1} and options))
        assert all(isinstance(p, FakeTensor) for p in layer.parameters())
        x = torch.randn(2, 4, 6, 5, dtype=layer.weight.dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape and x.grad.shape == x.shape
    fresh = PerturbConv2d(4, 6, 3, 2, 1, **options)
    assert y.shape == fresh(torch.randn(2, 4, 6, 5, dtype=fresh.weight.dtype)).shape and y.dtype == fresh.weight.dtype


def test_fake_tensors_plan_a_network():
    with FakeTensorMode():
        model = nn.Sequential(LBConv2d(3, 4), models.noise_resnet18(width=4, in_channels=4, preset="juefeix2018"))
        y = model(torch.randn(2, 3, 32, 32))
        y.sum().backward()
    assert y.shape == (2, 10)


def test_lazy_modules_beside_ours():
    model = nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1),
        PerturbConv2d(4, 6, 3, 2, 1, norm=True),
        nn.LazyBatchNorm2d(),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).double()
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    model(x)
    assert model[4].in_features == 6 * 3 * 3
    found, expected = step(copy.deepcopy(model), x), reference_step(model, x)
    assert_same_step(found, expected, rtol=1e-9, atol=1e-11)
