"""Parametrizations, old weight norms and pruning on our layers: values and gradients beside the plain reference."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_pnn import LBConv2d, PerturbConv2d, reference, summary


def make(**options):
    torch.manual_seed(1)
    return PerturbConv2d(4, 6, 3, padding=1, masks=2, seed=3, dtype=torch.float64, **options)


def inputs():
    return torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)


def plain(layer, x, weight, mask=None):
    """The layer as the definition has it, with a weight (and a mask) made by other means."""
    source = {"seed": 3, "masks": 2} if mask is None else {"mask": mask}
    return reference.perturb_conv2d(x, weight, layer.bias, level=layer.level, groups=layer.groups, **source)


def agrees(layer, weight_of, parameters, mask_of=None):
    """Output and gradients of a layer are those of the definition with the weight that `weight_of()` makes."""
    x = inputs()
    grad = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    learnt = [x, layer.bias, *parameters]
    ours = layer(x)
    theirs = plain(layer, x, weight_of(), None if mask_of is None else mask_of())
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, learnt, grad), torch.autograd.grad(theirs, learnt, grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm(groups, dim):
    layer = make(groups=groups)
    parametrizations.weight_norm(layer, dim=dim)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    axes = [axis for axis in range(4) if axis != dim]
    agrees(layer, lambda: g * v / v.square().sum(axes, keepdim=True).sqrt(), [g, v])
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is PerturbConv2d


def test_weight_norm_leaves_the_output_as_it_was():
    layer, x = make(), inputs().detach()
    before = layer(x)
    parametrizations.weight_norm(layer)
    torch.testing.assert_close(layer(x), before)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), before)


def test_spectral_norm():
    layer = make()
    parametrizations.spectral_norm(layer, n_power_iterations=30)
    layer(inputs())  # iterates towards the largest singular value
    layer.eval()
    original = layer.parametrizations.weight.original
    largest = torch.linalg.matrix_norm(original.detach().flatten(1), 2)
    torch.testing.assert_close(layer.weight, original / largest, rtol=1e-6, atol=1e-9)
    u, v = layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v
    agrees(layer, lambda: original / (u @ original.flatten(1) @ v), [original])


class Rows(nn.Module):
    """Orthogonal rows of the weight as a matrix."""

    def forward(self, x):
        q, r = torch.linalg.qr(x.flatten(1).T)
        return (q * r.diagonal().sign()).T.reshape(x.shape)


def test_orthogonal_rows():
    layer = make()
    parametrize.register_parametrization(layer, "weight", Rows())
    rows = layer.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(6, dtype=torch.float64))
    original = layer.parametrizations.weight.original
    agrees(layer, lambda: Rows()(original), [original])


def test_pytorchs_orthogonal_takes_the_last_two_axes():
    # So of a 1x1 weight, ours as a convolution's, it makes numbers that are 1 or -1.
    for layer in (make(), nn.Conv2d(8, 6, 1, dtype=torch.float64)):
        parametrizations.orthogonal(layer)
        torch.testing.assert_close(layer.weight.abs(), torch.ones(6, 8, 1, 1, dtype=torch.float64))


class Positive(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, y):
        return y.abs().clamp_min(1e-6).log()


def test_a_parametrization_of_ones_own():
    layer = make()
    parametrize.register_parametrization(layer, "weight", Positive())
    original = layer.parametrizations.weight.original
    agrees(layer, lambda: original.exp(), [original])
    x = inputs()
    with parametrize.cached():
        torch.testing.assert_close(layer(x), plain(layer, x, original.exp()))
    layer.weight = torch.full((6, 8, 1, 1), 2.0, dtype=torch.float64)
    torch.testing.assert_close(layer.weight, torch.full((6, 8, 1, 1), 2.0, dtype=torch.float64))
    assert layer.weight.shape == (6, 8, 1, 1)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    torch.testing.assert_close(layer.weight, torch.full((6, 8, 1, 1), 2.0, dtype=torch.float64).log())


class Clipped(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("trained", [True, False])
def test_masks_can_be_parametrized(trained):
    layer = make(mask_size=(5, 6), train_masks=trained)
    stored = layer.mask_bytes
    parametrize.register_parametrization(layer, "mask", Clipped())
    original = layer.parametrizations.mask.original
    assert original.requires_grad is trained
    agrees(layer, lambda: layer.weight, [original] if trained else [], lambda: original.tanh())
    assert layer.mask_bytes == stored == (0 if trained else original.numel() * 4)
    found = summary(layer, (4, 5, 6))
    assert found.rows[0].masks == ("trained" if trained else "stored")
    assert found.parameters == sum(p.numel() for p in layer.parameters())


def test_the_inner_normalisation_can_be_parametrized():
    # Its weight is computed then; the operator takes it as it is.
    layer, x = make(norm=True), inputs()
    parametrize.register_parametrization(layer.norm, "weight", Positive())
    original = layer.norm.parametrizations.weight.original
    other = make(norm=True)
    other.norm.weight = nn.Parameter(original.detach().exp())
    ours, theirs = layer(x), other(x)
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = (
        torch.autograd.grad(y.square().sum(), [w]) for y, w in ((ours, original), (theirs, other.norm.weight))
    )
    torch.testing.assert_close(a, b * original.exp())


@pytest.mark.parametrize("make_norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_are_copied_saved_and_loaded(make_norm):
    layer, x = make(), inputs().detach()
    make_norm(layer)
    layer(x)
    layer.eval()
    wanted = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    other = make()
    nn.init.zeros_(other.weight)
    make_norm(other).eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert torch.equal(other(x), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm():
    layer, x = make(), inputs().detach()
    before = layer(x)
    nn.utils.weight_norm(layer)
    torch.testing.assert_close(layer(x), before)
    g, v = layer.weight_g, layer.weight_v
    agrees(layer, lambda: g * v / v.square().sum((1, 2, 3), keepdim=True).sqrt(), [g, v])
    nn.utils.remove_weight_norm(layer)
    torch.testing.assert_close(layer(x), before)
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_spectral_norm():
    layer = nn.utils.spectral_norm(make(), n_power_iterations=30)
    layer(inputs())
    layer.eval()(inputs())
    torch.testing.assert_close(
        torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2),
        torch.ones((), dtype=torch.float64),
        rtol=1e-3,
        atol=0,
    )
    original, u, v = layer.weight_orig, layer.weight_u, layer.weight_v
    agrees(layer, lambda: original / (u @ original.flatten(1) @ v), [original])


PRUNINGS = {
    "random": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    "l1": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "structured": lambda layer: prune.ln_structured(layer, "weight", amount=2, n=2, dim=0),
    "maps": lambda layer: prune.random_structured(layer, "weight", amount=4, dim=1),
    "custom": lambda layer: prune.custom_from_mask(layer, "weight", (torch.arange(48) % 2).reshape(6, 8, 1, 1)),
    "twice": lambda layer: [prune.l1_unstructured(layer, "weight", amount=0.25) for _ in range(2)],
}


@pytest.mark.parametrize("name", PRUNINGS)
def test_pruning(name):
    layer, x = make(), inputs().detach()
    PRUNINGS[name](layer)
    assert prune.is_pruned(layer)
    kept, original = layer.weight_mask, layer.weight_orig
    assert 0 < int((kept == 0).sum()) < 48
    agrees(layer, lambda: original * kept, [original])
    assert bool((torch.autograd.grad(layer(x).sum(), original)[0][kept == 0] == 0).all())
    pruned = layer(x)
    other = copy.deepcopy(make())
    PRUNINGS[name](other)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), pruned)
    prune.remove(layer, "weight")
    assert torch.equal(layer(x), pruned) and isinstance(layer.weight, nn.Parameter)
    assert list(dict(layer.named_buffers())) == ["mask_seed", "mask_version"]


def test_global_pruning_takes_our_layers_with_others():
    model = nn.Sequential(make(), nn.ReLU(), nn.Conv2d(6, 5, 3, dtype=torch.float64), LBConv2d(5, 4))
    taken = [(model[0], "weight"), (model[0], "bias"), (model[2], "weight"), (model[3], "weight")]
    prune.global_unstructured(taken, pruning_method=prune.L1Unstructured, amount=0.5)
    zeros = sum(int((getattr(module, name) == 0).sum()) for module, name in taken)
    sizes = sum(getattr(module, name).numel() for module, name in taken)
    assert zeros == round(0.5 * sizes)


def test_trained_masks_can_be_pruned():
    layer = make(mask_size=(5, 6), train_masks=True)
    prune.l1_unstructured(layer, "mask", amount=0.5)
    original, kept = layer.mask_orig, layer.mask_mask
    agrees(layer, lambda: layer.weight, [original], lambda: original * kept)
    assert layer.mask_bytes == 0
    prune.remove(layer, "mask")
    assert isinstance(layer.mask, nn.Parameter)


def test_lbc_layers_take_parametrizations_and_pruning():
    layer, x = LBConv2d(3, 4, seed=1), torch.randn(1, 3, 6, 6)
    before = layer(x)
    parametrizations.weight_norm(layer)
    torch.testing.assert_close(layer(x), before)
    parametrize.remove_parametrizations(layer, "weight")
    prune.l1_unstructured(layer, "weight", amount=0.5)
    responses = nn.functional.conv2d(x, layer.anchor_weight, padding=1).relu()
    wanted = nn.functional.conv2d(responses, layer.weight_orig * layer.weight_mask, layer.bias)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.slow
def test_a_parametrized_layer_compiles():
    model = nn.Sequential(parametrizations.weight_norm(make()), nn.ReLU(), parametrizations.spectral_norm(make2()))
    model.eval()
    x = inputs()
    compiled = torch.compile(model, fullgraph=True)
    ours, theirs = compiled(x), model(x)
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters)):
        torch.testing.assert_close(a, b)


def make2():
    return PerturbConv2d(6, 4, 1, seed=4, norm=True, dtype=torch.float64)


@pytest.mark.parametrize("norm", [False, True])
def test_a_parametrization_computes_once_a_call(norm):
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return 2 * weight

    layer = make(norm=norm)
    parametrize.register_parametrization(layer, "weight", Counted())
    for layer.training in (True, False):
        Counted.calls = 0
        layer(inputs())
        assert Counted.calls == 1
    if norm:  # not an nn.BatchNorm2d alone: the maps are formed
        layer.norm.register_forward_hook(lambda *_: None)
        Counted.calls = 0
        layer(inputs())
        assert Counted.calls == 1
