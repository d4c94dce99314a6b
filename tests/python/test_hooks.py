"""Hooks of every kind on our layers, and averaged weights: what they see and change, beside the plain reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import swa_utils

from torch_pnn import LBConv2d, PerturbConv2d, functional, reference


def make(**options):
    torch.manual_seed(1)
    return PerturbConv2d(4, 6, 3, padding=1, masks=2, seed=3, dtype=torch.float64, **options)


def plain(layer, x):
    return reference.perturb_conv2d(x, layer.weight, layer.bias, seed=3, masks=2, level=layer.level)


def data():
    return torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("norm", [False, True])
def test_forward_hooks_see_and_change(norm):
    layer, x = make(norm=norm), data()
    wanted = copy.deepcopy(layer)(3 * x)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)) or output + 1)
    torch.testing.assert_close(layer(x), wanted + 1)
    assert torch.equal(seen[0][0], 3 * x) and torch.equal(seen[0][1], wanted)


def test_hooks_with_keywords():
    layer, x = make(), data()
    seen = []
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(list(kwargs)), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, kwargs, output: seen.append(list(kwargs)), with_kwargs=True)
    torch.testing.assert_close(layer(input=x), plain(layer, x))
    assert seen == [["input"], ["input"]]


def test_a_hook_that_is_always_called_sees_a_refusal():
    layer, seen = make(), []
    layer.register_forward_hook(lambda *_: seen.append(1), always_call=True)
    with pytest.raises(ValueError, match="it should have 4 channels"):
        layer(torch.zeros(1, 3, 5, 6, dtype=torch.float64))
    assert seen == [1]


@pytest.mark.parametrize("norm", [False, True])
def test_full_backward_hooks(norm):
    layer, x = make(norm=norm), data()
    other = copy.deepcopy(layer)
    seen = {}
    layer.register_full_backward_pre_hook(lambda module, grads: seen.update(before=grads[0]) or (2 * grads[0],))
    layer.register_full_backward_hook(
        lambda module, inputs, outputs: seen.update(inputs=inputs[0], outputs=outputs[0]) or (10 * inputs[0],)
    )
    y = layer(x)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, layer.weight], grad)
    wanted = torch.autograd.grad(other(x), [x, other.weight], 2 * grad)
    assert torch.equal(seen["before"], grad) and torch.equal(seen["outputs"], 2 * grad)
    torch.testing.assert_close(seen["inputs"], wanted[0])
    torch.testing.assert_close(found[0], 10 * wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def test_tensor_and_parameter_hooks():
    layer, x = make(), data()
    seen = []
    layer.weight.register_hook(lambda grad: 2 * grad)
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    y = layer(x)
    y.register_hook(lambda grad: 3 * grad)
    y.sum().backward()
    (wanted,) = torch.autograd.grad(plain(layer, x).sum(), [layer.weight])
    torch.testing.assert_close(layer.weight.grad, 3 * wanted)  # (2 * of the weight's hook is in both)
    assert torch.equal(seen[0], layer.weight.grad)


def test_global_hooks_see_our_layers():
    layer, x, seen = make(), data(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert seen == [layer]


def test_state_dict_hooks():
    layer = make()
    layer.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "note": torch.ones(1)}))
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(prefix + "note"))
    layer.register_load_state_dict_post_hook(lambda module, keys: seen.append(keys))
    seen = []
    state = nn.Sequential(layer).state_dict()
    assert "0.note" in state
    nn.Sequential(layer).load_state_dict(state)
    assert len(seen) == 1 and not seen[0].missing_keys and not seen[0].unexpected_keys


def test_hooks_on_the_inner_normalisation_run():
    # The maps are formed then, for the hook to see; values and gradients stay what they were.
    layer, x = make(norm=True), data()
    other = copy.deepcopy(layer)
    seen = []
    layer.norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ours, theirs = layer(x), other(x)
    torch.testing.assert_close(ours, theirs)
    grids = functional.perturbation_mask(3, 4, 2, 5, 6, dtype=torch.float64)
    maps = torch.relu(x.unsqueeze(2) + layer.level * grids).flatten(1, 2)
    torch.testing.assert_close(seen[0], maps)
    parameters = [(layer.weight, other.weight), (layer.norm.weight, other.norm.weight)]
    for a, b in parameters:
        torch.testing.assert_close(
            torch.autograd.grad(ours.square().sum(), [a], retain_graph=True),
            torch.autograd.grad(theirs.square().sum(), [b], retain_graph=True),
        )
    torch.testing.assert_close(layer.norm.running_var, other.norm.running_var)


def steps(model, update, count=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        update(model)


def network():
    return nn.Sequential(
        PerturbConv2d(3, 4, 3, masks=2), nn.BatchNorm2d(4), PerturbConv2d(4, 4, 3, norm=True), LBConv2d(4, 2)
    )


def seeds(model):
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("seed", "version", "anchor_weight"))]


def test_averaged_weights():
    model = network()
    averaged = swa_utils.AveragedModel(model)
    seen = []
    steps(model, lambda m: (averaged.update_parameters(m), seen.append([p.detach().clone() for p in m.parameters()])))
    for parameter, *values in zip(averaged.module.parameters(), *seen):
        torch.testing.assert_close(parameter, sum(values) / len(values))
    for ours, theirs in zip(seeds(averaged.module), seeds(model), strict=True):
        assert torch.equal(ours, theirs)
    assert averaged(torch.randn(1, 3, 8, 8)).shape == (1, 2, 4, 4)


BIG = 2**62 + 12345


def averaging(how):
    """A model whose seeds are averaged in float32, and the average."""
    model = network()
    model[0].reseed(BIG)
    if how == "ema":
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    elif how == "swa":
        averaged = swa_utils.AveragedModel(model, use_buffers=True)
    elif how == "function":
        averaged = swa_utils.AveragedModel(model, avg_fn=lambda a, m, n: 0.9 * a + 0.1 * m, use_buffers=True)
    else:  # by hand over state dicts, as some libraries do
        averaged = nn.Module()
        averaged.module = copy.deepcopy(model)

        def update(model):
            with torch.no_grad():
                for a, m in zip(averaged.module.state_dict().values(), model.state_dict().values()):
                    a.copy_(0.9999 * a + (1 - 0.9999) * m)

        averaged.update_parameters = update
    return model, averaged


@pytest.mark.parametrize("how", ["ema", "swa", "function", "state"])
@pytest.mark.filterwarnings("ignore:torch_pnn. mask_seed was:RuntimeWarning")
def test_averages_keep_the_seeds(how):
    model, averaged = averaging(how)
    steps(model, averaged.update_parameters)
    averaged.eval()
    for ours, theirs in zip(seeds(averaged.module), seeds(model), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert int(averaged.module[0].mask_seed) == BIG == int(model[0].mask_seed)
    assert torch.equal(averaged.module[0].perturbation(5, 5), model[0].perturbation(5, 5))
    assert torch.equal(averaged.module[2].mask_seed, model[2].mask_seed)


def test_an_averaged_seed_is_set_back_with_a_warning():
    model, averaged = averaging("ema")
    steps(model, averaged.update_parameters)
    assert int(averaged.module[0].mask_seed) != BIG  # what PyTorch makes of it
    with pytest.warns(RuntimeWarning, match=rf"mask_seed was {BIG} and is \d+, as an average .*call its reseed"):
        state = averaged.state_dict()
    assert int(state["module.0.mask_seed"]) == BIG


@pytest.mark.parametrize("seed", [0, 1, -1, 255, 2**24 + 1, -(2**63), 2**63 - 2**50, 7 * 10**17])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999, 1 / 3])
@pytest.mark.filterwarnings("ignore:torch_pnn. mask_seed was:RuntimeWarning")
def test_every_seed_survives_averaging(seed, decay):
    layer = PerturbConv2d(3, 4, 3, seed=seed)
    given = layer.mask_seed.clone()
    for _ in range(2000 if decay == 0.9999 else 20):
        layer.mask_seed.copy_(layer.mask_seed * decay + given * (1 - decay))
    assert torch.equal(layer.eval().mask_seed, given)


def test_seeds_are_not_read_where_they_can_not_be():
    layer = PerturbConv2d(3, 4, 3, seed=5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.eval()
        made = PerturbConv2d(3, 4, 3).train()
        assert made.state_dict()["mask_seed"].shape == (1,)
    with torch.device("meta"):
        layer.train()
        PerturbConv2d(3, 4, 3).eval()
    assert int(layer.mask_seed) == 5


def test_other_changes_of_a_seed_are_meant():
    layer = PerturbConv2d(3, 4, 3, seed=2**40)
    layer.mask_seed.fill_(12345)
    assert int(layer.eval().mask_seed) == 12345
    layer.mask_seed.fill_(2**62 + 1)
    assert int(layer.eval().mask_seed) == 2**62 + 1
    layer.mask_seed.fill_(2**62 + 2)  # near, but no float32 number
    assert int(layer.eval().mask_seed) == 2**62 + 2
    layer.reseed(12346)
    assert int(layer.train().mask_seed) == 12346
    other = PerturbConv2d(3, 4, 3, seed=12347)
    other.load_state_dict(layer.state_dict())
    assert int(other.eval().mask_seed) == 12346
    assert int(copy.deepcopy(other).mask_seed) == 12346


def test_update_bn_reaches_the_inner_normalisation():
    model = network()
    averaged = swa_utils.AveragedModel(model)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    swa_utils.update_bn(batches, averaged)
    inner = averaged.module[2].norm
    assert inner.momentum == 0.1 and int(inner.num_batches_tracked) == 3
    fresh = copy.deepcopy(model).train()
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    for batch in batches:
        fresh(batch)
    torch.testing.assert_close(inner.running_mean, fresh[2].norm.running_mean)
    torch.testing.assert_close(inner.running_var, fresh[2].norm.running_var)
