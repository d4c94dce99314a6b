"""torch.fx: our layers are leaves for every tracer, our functions nodes; graphs are transformed, retraced, saved."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from torch_pnn import LBConv2d, PerturbConv2d, convert, functional, models

OPS = torch.ops.torch_pnn


class Net(nn.Module):
    """Every way of holding masks, a shortcut, and both kinds of layer."""

    def __init__(self):
        super().__init__()
        self.first = PerturbConv2d(3, 6, 3, 2, 1, masks=2)
        self.normed = PerturbConv2d(6, 6, 3, padding=1, norm=True, groups=2)
        self.stored = PerturbConv2d(6, 6, 1, mask_size=(4, 4), train_masks=True)
        self.lbc = LBConv2d(6, 6)

    def forward(self, x):
        y = torch.relu(self.first(x))
        y = y + self.normed(input=y)
        return self.lbc(self.stored(y)).mean((2, 3))


def leaves(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


def same(ours, theirs, x):
    """Outputs and gradients of two modules with equal parameters."""
    a, b = ours(x), theirs(x)
    assert torch.equal(a, b)
    grad = torch.randn_like(a)
    first = torch.autograd.grad(a, list(ours.parameters()), grad)
    second = torch.autograd.grad(b, list(theirs.parameters()), grad)
    assert len(first) == len(second) and all(torch.equal(p, q) for p, q in zip(first, second))


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_leaves_without_further_ado(training):
    model = Net().train(training)
    traced = fx.symbolic_trace(model)
    assert leaves(traced) == ["first", "normed", "stored", "lbc"]
    assert traced.normed is model.normed
    traced.graph.lint()
    same(traced, model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("options", [{}, {"preset": "juefeix2018"}, {"preset": "klachko2018"}, {"layer": "lbc"}])
def test_networks_are_traced(options):
    model = models.noise_resnet18(width=2, **options).eval()
    traced = fx.symbolic_trace(model)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(traced(x), model(x))
    ours = [name for name in leaves(traced) if isinstance(traced.get_submodule(name), (PerturbConv2d, LBConv2d))]
    assert len(ours) == 16
    again = fx.symbolic_trace(traced)
    assert leaves(again) == leaves(traced) and torch.equal(again(x), model(x))


def test_a_converted_model_is_traced():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)), seed=1)
    traced = fx.symbolic_trace(model)
    assert leaves(traced) == ["0", "1", "2"] and isinstance(traced.get_submodule("2"), PerturbConv2d)


def test_other_tracers():
    class OwnLeaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, PerturbConv2d) or super().is_leaf_module(module, name)

    class NoLeaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    model, x = Net(), torch.randn(2, 3, 8, 8)
    for tracer in (OwnLeaves(), NoLeaves()):
        graph = tracer.trace(model)
        assert [node.target for node in graph.nodes if node.op == "call_module"] == leaves(fx.symbolic_trace(model))
        assert torch.equal(fx.GraphModule(model, graph)(x), model(x))


def test_a_layer_by_itself_says_what_to_do():
    for layer in (PerturbConv2d(3, 4, 3), LBConv2d(3, 4)):
        with pytest.raises(
            ValueError, match=rf"can't trace a {type(layer).__name__} by itself.*nn.Sequential\(layer\)"
        ):
            fx.symbolic_trace(layer)
        assert leaves(fx.symbolic_trace(nn.Sequential(layer))) == ["0"]


def test_graphs_are_copied_and_pickled():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    traced = fx.symbolic_trace(model)
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(other(x), model(x))
        assert other.first.weight is not model.first.weight


def test_sizes_are_propagated():
    traced = fx.symbolic_trace(Net())
    ShapeProp(traced).propagate(torch.randn(2, 3, 8, 8))
    sizes = {node.target: tuple(node.meta["tensor_meta"].shape) for node in traced.graph.nodes if node.op != "output"}
    assert sizes["first"] == sizes["stored"] == (2, 6, 4, 4)


def test_a_transformation_replaces_layers():
    # Each of our layers by the plain 1x1 of the same weight: the control without perturbation.
    model = nn.Sequential(PerturbConv2d(3, 4, 1, activation="identity"), nn.ReLU(), PerturbConv2d(4, 2, 1, noise=None))
    traced = fx.symbolic_trace(model)
    for node in list(traced.graph.nodes):
        layer = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, PerturbConv2d) and layer.noise is not None:
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, 1)
            plain.weight, plain.bias = layer.weight, layer.bias
            traced.add_submodule("plain", plain)
            with traced.graph.inserting_after(node):
                new = traced.graph.call_module("plain", node.args)
            node.replace_all_uses_with(new)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    assert leaves(traced) == ["plain", "1", "2"]
    x = torch.randn(1, 3, 5, 5)
    hidden = nn.functional.conv2d(x, model[0].weight, model[0].bias).relu()
    torch.testing.assert_close(traced(x), model[2](hidden))


def plain_function(x, weight, bias, seed):
    y = functional.perturb_conv2d(x, weight, bias, seed=seed, masks=2, level=0.5, stride=2)
    return y.relu() + 1


def test_functions_are_nodes():
    traced = fx.symbolic_trace(plain_function)
    (node,) = [node for node in traced.graph.nodes if node.target is functional.perturb_conv2d]
    assert node.op == "call_function" and node.kwargs["stride"] == 2 and node.kwargs["masks"] == 2
    arguments = (torch.randn(1, 3, 5, 5), torch.randn(4, 6, 1, 1), torch.randn(4), torch.tensor([7]))
    assert torch.equal(traced(*arguments), plain_function(*arguments))
    again = pickle.loads(pickle.dumps(fx.symbolic_trace(traced)))
    assert torch.equal(again(*arguments), plain_function(*arguments))


def test_the_normalised_function_is_a_node():
    def function(x, weight, gamma, mean, variance):
        return functional.perturb_norm_conv2d(
            x, weight, None, gamma, None, mean, variance, training=True, momentum=0.5, noise=None
        )

    traced = fx.symbolic_trace(function)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [
        functional.perturb_norm_conv2d
    ]
    x, weight, gamma = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1), torch.randn(3)
    ours, theirs = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
    assert torch.equal(traced(x, weight, gamma, *ours), function(x, weight, gamma, *theirs))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[0].abs().sum() > 0


def test_masks_of_a_traced_size():
    def function(x, seed):
        return x + functional.perturbation_mask(seed, 3, 1, x.shape[2], x.shape[3])[:, 0]

    traced = fx.symbolic_trace(function)
    assert functional.perturbation_mask in [node.target for node in traced.graph.nodes]
    for size in (5, 7):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(traced(x, torch.tensor([3])), function(x, torch.tensor([3])))

    def of_height(x):
        return functional.perturbation_mask(3, 3, 1, x.shape[2], 4)

    assert fx.symbolic_trace(of_height)(torch.zeros(1, 1, 6, 1)).shape == (3, 1, 6, 4)


def test_a_pattern_is_replaced():
    def pattern(x, weight):
        return functional.perturb_conv2d(x, weight, seed=1).relu()

    def replacement(x, weight):
        return functional.perturb_conv2d(x, weight, seed=1, level=0.0).relu()

    def function(x, weight):
        return functional.perturb_conv2d(x, weight, seed=1).relu() * 2

    traced = fx.symbolic_trace(function)
    assert len(fx.replace_pattern(traced, pattern, replacement)) == 1
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1)
    wanted = functional.perturb_conv2d(x, weight, noise=None).relu() * 2
    torch.testing.assert_close(traced(x, weight), wanted)


class Marked(torch.Tensor):
    """A subclass as people write them: it counts the functions that it sees."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_see_the_call():
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1)
    wanted = functional.perturb_conv2d(x, weight, seed=1)
    Marked.seen.clear()
    found = functional.perturb_conv2d(x.as_subclass(Marked), weight, seed=1)
    assert isinstance(found, Marked) and torch.equal(found.as_subclass(torch.Tensor), wanted)
    assert Marked.seen[0] is functional.perturb_conv2d
    layer = PerturbConv2d(3, 2, 3, padding=1)
    found = layer(x.as_subclass(Marked))
    assert isinstance(found, Marked) and torch.equal(found.as_subclass(torch.Tensor), layer(x))


def test_modes_see_the_call():
    class Mode(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    layer, x = PerturbConv2d(3, 2, 3), torch.randn(1, 3, 5, 5)
    with Mode() as mode:
        found = layer(x)
    assert functional.perturb_conv2d in mode.seen and torch.equal(found, layer(x))
    with torch.device("cpu"):
        assert torch.equal(layer(x), found)


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("norm, name", [(False, "perturb_conv2d"), (True, "perturb_norm_conv2d")])
def test_make_fx_records_forward_and_backward(mode, norm, name):
    layer = PerturbConv2d(3, 4, 3, 2, 1, norm=norm, dtype=torch.float64).eval()

    def step(x):
        y = layer(x)
        return (y, *torch.autograd.grad(y.square().sum(), [x, layer.weight]))

    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert getattr(OPS, name).default in targets(traced)
    assert getattr(OPS, f"_{name}_backward").default in targets(traced)
    for ours, theirs in zip(traced(x), step(x)):
        torch.testing.assert_close(ours, theirs)
    if mode == "symbolic":
        larger = torch.randn(3, 3, 9, 10, dtype=torch.float64, requires_grad=True)
        for ours, theirs in zip(traced(larger), step(larger)):
            torch.testing.assert_close(ours, theirs)


def test_make_fx_of_a_traced_graph():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    traced = make_fx(fx.symbolic_trace(model))(x)
    assert targets(traced).count(OPS.perturb_conv2d.default) == 2 and operator.getitem in targets(traced)
    torch.testing.assert_close(traced(x), model(x))


def test_torch_func_and_export_still_see_the_operator():
    # The protocol's question stands in front of every call: it must not keep graphs from being recorded.
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model, (x,))
    assert [node.target for node in exported.graph.nodes].count(OPS.perturb_conv2d.default) == 2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.device("cpu"):
        assert torch.compile(model, fullgraph=True, backend="eager")(x).shape == (2, 6)
