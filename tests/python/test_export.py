"""torch.export and torch.compile: our operators are in the graphs, sizes stay dynamic, bits stay the same."""

import copy
import io

import pytest
import torch
from graphs_support import check_against_reference, image_sizes, layers
from torch import nn
from torch.export import Dim

from torch_pnn import PerturbConv2d, functional


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graphs from other tests, which would count towards the limit of recompilations."""
    torch.compiler.reset()


def model(**options):
    return nn.Sequential(
        PerturbConv2d(3, 8, 3, 2, 1, **options), PerturbConv2d(8, 4, 3, padding=1, masks=2, groups=2, noise="waves")
    )


def operators(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if "torch_pnn" in str(node.target)]


def exported_and_loaded(module, x, dynamic, least=4):
    shapes = ({0: Dim("batch", min=1), 2: Dim("height", min=least), 3: Dim("width", min=least)},) if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return torch.export.load(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"downsample": "subsample"}, {"downsample": "avg", "noise": "normal"}]
)
def test_exports_with_dynamic_sizes(options):
    module = model(**options).eval()
    program = exported_and_loaded(module, torch.randn(2, 3, 16, 16), True)
    assert len(operators(program.graph_module)) == 2
    for size in ((2, 3, 16, 16), (5, 3, 9, 21), (1, 3, 32, 7)):
        x = torch.randn(size)
        assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"norm": True}, {"masks": 3, "noise": "normal", "downsample": "avg"}])
def test_loaded_programs_train_as_the_reference_does(options, training):
    module = layers(**options).train(training)
    program = exported_and_loaded(module, torch.randn(2, 3, 16, 16), True, least=8)
    loaded = program.module()
    if training:
        eager, x = copy.deepcopy(module), torch.randn(3, 3, 12, 12)
        assert torch.equal(loaded(x), eager(x))
        for name, buffer in eager.named_buffers():
            assert torch.equal(loaded.get_buffer(name), buffer), name
    for size in ((5, 3, 9, 21), (1, 3, 32, 8)):
        check_against_reference(loaded, dict(loaded.named_parameters()), module, torch.randn(size))


def test_our_operators_are_exported_after_a_transform():
    torch.func.grad(lambda x: functional.perturb_conv2d(x, torch.ones(1, 1, 1, 1), seed=1).sum())(
        torch.ones(1, 1, 2, 2)
    )
    program = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
    assert len(operators(program.graph_module)) == 2


def test_exports_held_masks_at_their_size():
    module = PerturbConv2d(3, 4, 3, padding=1, mask_size=(8, 9), train_masks=True)
    program = exported_and_loaded(module, torch.randn(2, 3, 8, 9), False)
    x = torch.randn(2, 3, 8, 9)
    assert torch.equal(program.module()(x), module(x))


def test_the_seed_is_in_the_exported_state():
    module = PerturbConv2d(3, 4, 3, seed=9)
    program = exported_and_loaded(module, torch.randn(1, 3, 8, 8), False)
    assert program.state_dict["mask_seed"].item() == 9
    assert program.state_dict["mask_version"].item() == 1


@pytest.mark.parametrize("norm", [False, True])
def test_compiles_whole_with_our_operators_in_the_graph(norm):
    module = model(norm=norm)
    compiled_module = copy.deepcopy(module)
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(compiled_module, fullgraph=True, backend=backend, dynamic=True)
    for size in ((2, 3, 16, 16), (3, 3, 12, 20)):
        x = torch.randn(size)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = module(first), compiled(second)
        assert torch.equal(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        assert torch.equal(first.grad, second.grad)
    for name, value in module.state_dict().items():
        assert torch.equal(compiled_module.state_dict()[name], value), name
    assert len(operators(graphs[0])) == 2
    assert len(graphs) <= 2


@pytest.mark.parametrize("stride", [2, (3, 1), (2, 5)])
@pytest.mark.parametrize("downsample", ["max", "avg"])
def test_pooling_in_graphs_is_the_pooling_outside(downsample, stride):
    for size in ((1, 1), (7, 10), (12, 15)):
        module = PerturbConv2d(3, 4, 1, stride, downsample=downsample)
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager")
        x = torch.randn(2, 3, *size)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = module(first), compiled(second)
        assert torch.equal(y, z)
        g = torch.randn_like(y)
        y.backward(g)
        z.backward(g)
        torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_compiles_with_inductor(norm):
    module = model(norm=norm)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = module(first), compiled(second)
    torch.testing.assert_close(z, y)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(second.grad, first.grad)
