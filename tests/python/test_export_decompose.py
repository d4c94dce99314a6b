"""torch_pnn.export.decompose: programs of standard ATen operators, with the same masks bit by bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs_support import (
    Branches,
    check_against_reference,
    every_layer,
    image_sizes,
    layers,
    operators,
    saved_and_loaded,
)
from operators_support import ACTIVATIONS, OPS
from torch import nn
from torch.export import Dim

from torch_pnn import PerturbConv2d, export, functional

NOISES = ("uniform", "normal", "waves")


def namespaces(program):
    """Whose operators are in the program's graphs."""
    return {
        node.target.namespace
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


class Mask(nn.Module):
    """The masks of a seed, as large as the input."""

    def __init__(self, noise, dtype=torch.float32, **options):
        super().__init__()
        self.register_buffer("seed", torch.tensor([-5_000_000_000_000_000_011]))
        self.options = {"noise": noise, "dtype": dtype} | options

    def forward(self, x):
        return functional.perturbation_mask(self.seed, 3, 6, x.shape[2], x.shape[3], **self.options)


@pytest.mark.parametrize("max_size", [None, (40, 24)])
@pytest.mark.parametrize("noise", NOISES)
def test_masks_have_the_same_bits(noise, max_size):
    for options in ({"shared_masks": True}, {"dtype": torch.bfloat16}):
        module = Mask(noise, **options)
        program = torch.export.export(
            module, (torch.zeros(2, 3, 8, 9),), dynamic_shapes=({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        )
        plain = export.decompose(program, max_size=max_size)
        assert namespaces(plain) <= {"aten"} and not operators(plain.graph_module)
        for size in ((40, 24), (5, 7)):
            x = torch.zeros(2, 3, *size)
            assert torch.equal(plain.module()(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("max_size", [None, (33, 40)])
@pytest.mark.parametrize("training", [False, True])
def test_decomposed_programs_train(training, max_size):
    model = layers(norm=True).train(training)
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
    nodes = len(program.graph.nodes)
    plain = saved_and_loaded(export.decompose(program, max_size=max_size))
    assert namespaces(plain) <= {"aten"} and not operators(plain.graph_module)
    assert len(program.graph.nodes) == nodes and len(operators(program.graph_module)) == 2
    assert plain.state_dict.keys() == program.state_dict.keys()
    module = plain.module()
    if training:
        eager, x = copy.deepcopy(model), torch.randn(3, 3, 12, 12)
        module(x), eager(x)
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(module.get_buffer(name), buffer, msg=name)
    for size in ((2, 3, 16, 16), (5, 3, 33, 21), (1, 3, 9, 40)):
        check_against_reference(module, dict(module.named_parameters()), model, torch.randn(size))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_kind_of_layer(dtype):
    model = Branches(every_layer(ACTIVATIONS)).to(dtype)
    x = torch.randn(2, 4, 12, 13).to(dtype)
    program = torch.export.export(model, (x,))
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for max_size in (None, 16):
        plain = export.decompose(program, max_size=max_size)
        assert not operators(plain.graph_module)
        for (name, y), z in zip(model(x).items(), plain.module()(x).values()):
            torch.testing.assert_close(z, y, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_mask_tensor_stays_one():
    options = {"stride": 2, "downsample": "subsample", "mask_size": (8, 9), "train_masks": True}
    model = nn.Sequential(PerturbConv2d(3, 4, 3, padding=1, **options))
    program = torch.export.export(model, (torch.randn(2, 3, 8, 9),), dynamic_shapes=({0: Dim("batch")},))
    for max_size in (None, 9):
        module = export.decompose(program, max_size=max_size).module()
        check_against_reference(module, dict(module.named_parameters()), model, torch.randn(3, 3, 8, 9))


def test_layers_behind_a_stride_store_smaller_masks():
    program = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
    stored = export.decompose(program, max_size=(40, 24)).constants
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "0_masks_40x24_of_images_up_to_40x24": (3, 1, 40, 24),
        "1_masks_20x12_of_images_up_to_40x24": (8, 2, 20, 12),
    }


def test_images_beyond_the_limit_are_refused_with_it():
    program = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
    module = saved_and_loaded(export.decompose(program, max_size=(40, 24))).module()
    with pytest.raises(Exception, match=r"size\(\)\[2\] <= 40"):
        module(torch.zeros(1, 3, 41, 24))
    with pytest.raises(Exception, match=r"size\(\)\[3\] <= 24"):
        module(torch.zeros(1, 3, 40, 25))


def test_a_program_with_a_maximum_takes_the_smaller_of_both():
    program = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8, 20))
    stored = export.decompose(program, max_size=64).constants
    assert {tuple(value.shape[2:]) for value in stored.values()} == {(20, 20), (10, 10)}


@pytest.mark.slow
def test_a_loaded_program_and_layers_in_branches_decompose():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = PerturbConv2d(3, 4, 3, padding=1, seed=1)
            self.second = PerturbConv2d(3, 4, 3, padding=1, seed=2)
            self.last = PerturbConv2d(4, 4, 3, padding=1, seed=3)

        def forward(self, x):
            y = torch.cond(x.sum() > 0, lambda x: self.first(x), lambda x: self.second(x), (x,))
            return self.last(y)

    model = Model()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=image_sizes())
    program = saved_and_loaded(program)
    for max_size in (None, 16):
        plain = export.decompose(program, max_size=max_size)
        assert not operators(plain.graph_module)
        for sign in (1, -1):
            x = sign * torch.rand(3, 3, 9, 16)
            torch.testing.assert_close(plain.module()(x), model(x))


def test_seeds_given_as_numbers_and_layers_without_gradients_are_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = PerturbConv2d(3, 3, 3, padding=1, seed=1)
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)
            return functional.perturb_conv2d(x, self.weight, seed=2**64 - 3, level=0.5)

    model = Model()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=image_sizes())
    for max_size in (None, 16):
        plain = export.decompose(program, max_size=max_size)
        assert not operators(plain.graph_module)
        x = torch.randn(2, 3, 9, 16)
        torch.testing.assert_close(plain.module()(x), model(x))


def test_backward_operators_have_decompositions():
    x, g = torch.randn(2, 4, 5, 7), torch.randn(2, 6, 3, 3)
    weight, seed = torch.randn(6, 4, 1, 1), torch.tensor([3])
    plain = (2, False, "uniform", 0.5, "gelu", [2, 3], 2)
    vectors = tuple(torch.rand(8) + 0.5 for _ in range(4))  # gamma, beta, mean, variance
    tensors = (x, g, weight, seed, *vectors)

    def backward(x, g, weight, seed, *vectors):
        first = OPS._perturb_conv2d_backward(g, x, weight, None, seed, *plain, [True, True, True, False])
        second = OPS._perturb_norm_conv2d_backward(
            g, x, weight, *vectors, None, seed, True, 1e-5, *plain, [True] * 5 + [False]
        )
        return [*first[:3], *second[:5]]

    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(backward, decomposition_table=export.decompositions(), tracing_mode="symbolic")(*tensors)
    assert not operators(graph)
    called = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert called and not any(target._schema.is_mutable for target in called)
    for found, right in zip(graph(*tensors), backward(*tensors)):
        torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)


def test_what_cannot_be_done_is_refused():
    program = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
    with pytest.raises(TypeError, match=r"program is Sequential, it should be a torch.export.ExportedProgram"):
        export.decompose(layers())
    for wrong in ((1, 2, 3), "large", 1.5, True):
        with pytest.raises(TypeError, match=r"max_size is .*, it should be a pair \(rows, columns\)"):
            export.decompose(program, max_size=wrong)
    with pytest.raises(ValueError, match=r"max_size is \(0, 4\), it should be at least 1"):
        export.decompose(program, max_size=(0, 4))
    with pytest.raises(ValueError, match=r"no smaller than the smallest image that the program takes, of 8 rows"):
        export.decompose(program, max_size=4)
    half = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=({3: Dim("columns", min=8)},))
    with pytest.raises(ValueError, match=r"max_size is \(8, 32\), it should be no smaller than the image's 16 rows"):
        export.decompose(half, max_size=(8, 32))


def test_a_seed_that_is_an_input_cannot_be_stored():
    class Model(nn.Module):
        def forward(self, x, seed):
            return functional.perturb_conv2d(x, torch.ones(1, 3, 1, 1), seed=seed + 1)

    x, seed = torch.randn(2, 3, 8, 8), torch.tensor([4])
    program = torch.export.export(Model(), (x, seed))
    assert torch.allclose(export.decompose(program).module()(x, seed), Model()(x, seed), atol=1e-6)
    with pytest.raises(ValueError, match=r"the seed of .* is an input of the program \(seed\)"):
        export.decompose(program, max_size=8)


def test_an_unbounded_size_behind_another_input_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = PerturbConv2d(1, 2, 3, padding=1, seed=1)

        def forward(self, words):
            return self.layer(words.unsqueeze(0).unsqueeze(0))

    program = torch.export.export(Model(), (torch.randn(8, 5),), dynamic_shapes=({0: Dim("length", min=4)},))
    with pytest.raises(
        ValueError, match=r"has no upper bound .* give max_size=.* or a maximum to its torch.export.Dim"
    ):
        export.decompose(program, max_size=8)


@pytest.mark.slow
def test_it_loads_and_runs_without_the_library(tmp_path):
    model = layers(norm=True).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
    x = torch.randn(3, 3, 11, 12)
    for name, max_size in (("computed", None), ("stored", 16)):
        torch.export.save(export.decompose(program, max_size=max_size), tmp_path / f"{name}.pt2")
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    code = """
import sys, torch
x, y = torch.load("data.pt")
for name in ("computed", "stored"):
    z = torch.export.load(name + ".pt2").module()(x)
    torch.testing.assert_close(z, y, atol=2e-5, rtol=2e-5)
assert not any(name.startswith("torch_pnn") for name in sys.modules)
assert not hasattr(torch.ops.torch_pnn, "perturb_conv2d")
print("right")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "right" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_an_undecomposed_program_says_what_it_needs(tmp_path):
    program = torch.export.export(layers(), (torch.randn(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "program.pt2")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.export.load('program.pt2')"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "torch_pnn" in done.stderr
    assert Path(tmp_path / "program.pt2").exists()


@pytest.mark.slow
def test_core_aten_follows():
    model = layers().eval()
    x = torch.randn(2, 3, 16, 16)
    program = export.decompose(torch.export.export(model, (x,)), max_size=16).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.convolution.default" in targets and "aten.conv2d.default" not in targets
    torch.testing.assert_close(program.module()(x), model(x), atol=2e-5, rtol=2e-5)
