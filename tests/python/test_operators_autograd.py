"""Derivatives of the operators, autocast, torch.compile, torch.func, and what autograd keeps."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators_support import (
    ACTIVATIONS,
    NORM_CASES,
    OPS,
    SMOOTH,
    Case,
    backward_arguments,
    backward_operator,
    bits,
    forward,
    ids,
    laid_out,
    needs_derivatives,
    operator,
    options,
    tensors,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from torch_pnn import reference

GRADIENT_CASES = [
    Case(activation="gelu"),
    Case(activation="tanh", masks=2, mask="tensor", channels=2),
    Case(activation="silu", masks=2, mask="shared tensor", channels=2, bias=False),
    Case(activation="sigmoid", channels=4, groups=2, stride=(2, 1), mask="tensor", layout="channels_last"),
    Case(activation="identity", mask="none"),
    Case(activation="gelu", masks=2, mask="shared seed", noise="waves", stride=(1, 2)),
    Case(activation="gelu", norm="train", masks=2, channels=2, mask="tensor"),
    Case(activation="tanh", norm="eval", masks=2, channels=2, mask="shared tensor"),
    Case(activation="silu", norm="train", channels=4, groups=2, stride=(2, 2), bias=False),
    Case(activation="gelu", norm="eval", channels=4, groups=2, outputs=2, mask="seed", noise="normal"),
]
DIFFERENTIABLE = ("input", "weight", "bias", "norm_weight", "norm_bias", "mask")


def split(case: Case, seed: int = 0) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """The differentiable tensors of a small call, and the call's output as a function of them."""
    given = tensors(dataclasses.replace(case, height=min(case.height, 3), width=min(case.width, 3)), seed)
    names = [name for name in DIFFERENTIABLE if given.get(name) is not None]
    values = [laid_out(given[name], case.layout if name == "input" else "contiguous") for name in names]

    def function(*replaced: Tensor) -> Tensor:
        result = operator(case)(**(given | dict(zip(names, replaced))), **options(case))
        return result[0] if case.norm else result

    return values, function


def recorded(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in values]


def reference_function(case: Case, seed: int = 0) -> Callable[..., Tensor]:
    """The same function of the same tensors in plain PyTorch."""
    given = tensors(dataclasses.replace(case, height=min(case.height, 3), width=min(case.width, 3)), seed)
    names = [name for name in DIFFERENTIABLE if given.get(name) is not None]
    which = reference.OPERATORS["perturb_norm_conv2d" if case.norm else "perturb_conv2d"]

    def function(*replaced: Tensor) -> Tensor:
        if replaced[0].dtype == torch.float64:
            given.update({n: t.double() for n, t in given.items() if n.startswith("running") and t is not None})
        result = which(**(given | dict(zip(names, replaced))), **options(case))
        return result[0] if case.norm else result

    return function


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=ids(GRADIENT_CASES))
def test_gradients(case: Case) -> None:
    values, function = split(case)
    assert torch.autograd.gradcheck(function, recorded(values))


@pytest.mark.slow
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=ids(GRADIENT_CASES))
def test_gradients_of_gradients(case: Case) -> None:
    values, function = split(case)
    assert torch.autograd.gradgradcheck(function, recorded(values))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, "train"])
def test_first_and_second_derivatives_equal_the_reference(activation: str, norm: str | None) -> None:
    case = Case(activation=activation, masks=2, mask="tensor", norm=norm, channels=2)
    results = []
    for function in (split(case)[1], reference_function(case)):
        inputs = recorded(split(case)[0])
        output = function(*inputs)
        first = torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=True)
        total = sum((g * torch.linspace(-1, 1, g.numel()).view(g.shape)).sum() for g in first)
        second = torch.autograd.grad(total, inputs, allow_unused=True)
        results.append([*first, *(torch.zeros(()) if g is None else g for g in second)])
    for ours, theirs in zip(*results):
        if ours.shape == theirs.shape:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        else:
            assert not ours.any() and not theirs.any()


def test_second_derivatives_do_not_disturb_first_ones() -> None:
    values, function = split(GRADIENT_CASES[0])
    inputs = recorded(values)
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    graph = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    for a, b in zip(plain, graph):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [None, "train", "eval"])
def test_gradients_of_each_type_are_near_float64s(dtype: torch.dtype, norm: str | None) -> None:
    case = Case(dtype=dtype, masks=2, mask="tensor", norm=norm, activation="gelu", batch=3, height=3, width=3)
    values, function = split(case)
    inputs = recorded(values)
    output = function(*inputs)
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype)
    ours = torch.autograd.grad(output, inputs, grad)
    wide = [value.double().requires_grad_() for value in values]
    exact = reference_function(case)
    theirs = torch.autograd.grad(exact(*wide), wide, grad.double())
    unit = torch.finfo(dtype).eps
    for value, a, b in zip(inputs, ours, theirs):
        assert a.dtype == value.dtype and a.shape == value.shape
        error = (a.double() - b).abs().max()
        assert error <= 24 * unit * max(1.0, b.abs().max()), f"{error}"


@pytest.mark.parametrize("norm", [None, "train"])
def test_only_what_is_needed_is_computed(norm: str | None) -> None:
    case = Case(mask="tensor", norm=norm)
    values, function = split(case)
    for chosen in range(len(values)):
        inputs = [value.detach().requires_grad_(i == chosen) for i, value in enumerate(values)]
        function(*inputs).sum().backward()
        assert [value.grad is not None for value in inputs] == [i == chosen for i in range(len(values))]


def test_without_gradients_nothing_is_recorded() -> None:
    values, function = split(Case())
    assert not function(*values).requires_grad
    with torch.no_grad():
        assert not function(*recorded(values)).requires_grad


def test_statistics_carry_no_gradient() -> None:
    case = Case(norm="train")
    given = tensors(case)
    given["input"].requires_grad_()
    output, mean, variance = forward(case, given)
    assert output.requires_grad and not mean.requires_grad and not variance.requires_grad


def test_empty_batch_has_zero_gradients() -> None:
    for norm in (None, "train", "eval"):
        values, function = split(Case(batch=0, norm=norm, mask="tensor"))
        inputs = recorded(values)
        function(*inputs).sum().backward()
        for value in inputs:
            assert value.grad is not None and not value.grad.any()


def test_a_changed_input_is_noticed() -> None:
    values, function = split(Case())
    inputs = recorded(values)
    weight = inputs[1] * 1
    output = function(inputs[0], weight, *inputs[2:])
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("norm", [None, "train"])
@pytest.mark.parametrize("mask", ["seed", "tensor"])
def test_what_is_kept_for_backward(norm: str | None, mask: str) -> None:
    case = Case(batch=4, channels=8, masks=16, height=16, width=16, mask=mask, norm=norm, dtype=torch.float32)
    given = tensors(case)
    for name in DIFFERENTIABLE:
        if given.get(name) is not None:
            given[name].requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(case, given)
    given_bytes = sum(given[n].untyped_storage().nbytes() for n in ("input", "weight", "mask") if given[n] is not None)
    vectors = 8 + (4 * 8 * 16 * 4 if norm else 0)
    assert 0 < sum(kept.values()) <= given_bytes + vectors


# ---- autocast ----


@pytest.mark.parametrize("norm", [None, "train"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_weight_and_bias_only(norm: str | None, dtype: torch.dtype) -> None:
    case = Case(dtype=torch.float32, norm=norm, mask="tensor")
    given = tensors(case)
    for name in DIFFERENTIABLE:
        if given.get(name) is not None:
            given[name].requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        result = forward(case, given)
    output = result[0] if norm else result
    narrow = given | {"weight": given["weight"].to(dtype), "bias": given["bias"].to(dtype)}
    expected = forward(case, narrow)
    assert output.dtype == dtype
    assert bits(output) == bits(expected[0] if norm else expected)
    output.float().sum().backward()
    for name in DIFFERENTIABLE:
        if given.get(name) is not None:
            assert given[name].grad.dtype == torch.float32
    if norm:
        assert result[1].dtype == result[2].dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(case, tensors(case)).dtype == torch.float64


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_autocast_is_registered(key: str) -> None:
    for name in ("perturb_conv2d", "perturb_norm_conv2d"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_pnn::{name}", key)


def test_backward_inside_autocast() -> None:
    values, function = split(Case(dtype=torch.float32))
    inputs, outside = recorded(values), recorded(values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        function(*inputs).sum().backward()
        output = function(*outside)
    output.sum().backward()
    assert bits(*(v.grad for v in inputs)) == bits(*(v.grad for v in outside))


# ---- torch.compile ----


def names_in(graphs: list[Any]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


def compiled_names(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[set[str], set[str], list[Tensor]]:
    """Compiles and runs forward and backward; the operators in both graphs, and the gradients."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: dict[str, list[Any]] = {"forward": [], "backward": []}

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_graph(module: Any, _: Any) -> Any:
            graphs[kind].append(module)
            return make_boxed_func(module.forward)

        return compile_graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    output = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    gradients = torch.autograd.grad(output.sum(), inputs)
    return names_in(graphs["forward"]), names_in(graphs["backward"]), [output, *gradients]


@pytest.mark.parametrize("norm", [None, "train", "eval"])
@pytest.mark.parametrize("after_transform", [False, True])
def test_compiled_graphs_hold_the_operators(norm: str | None, after_transform: bool) -> None:
    case = Case(norm=norm, masks=2)
    values, function = split(case)
    if after_transform:
        torch.func.grad(lambda x: x.square().sum())(torch.ones(2))
    forward_names, backward_names, results = compiled_names(lambda *v: function(*v) * 2, recorded(values))
    name = "perturb_norm_conv2d" if norm else "perturb_conv2d"
    assert f"torch_pnn.{name}.default" in forward_names
    assert f"torch_pnn._{name}_backward.default" in backward_names
    inputs = recorded(values)
    output = function(*inputs) * 2
    for ours, theirs in zip(results, [output, *torch.autograd.grad(output.sum(), inputs)]):
        assert torch.equal(ours, theirs)


@needs_derivatives
def test_eager_calls_after_a_transform_still_use_the_kernels() -> None:
    torch.func.grad(lambda x: x.square().sum())(torch.ones(2))
    values, function = split(Case(dtype=torch.float32))
    output = function(*recorded(values))
    assert type(output.grad_fn).__name__.endswith("PerturbConv2d") or "PerturbConv2d" in output.grad_fn.name()


@pytest.mark.slow
def test_compiled_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    seed, weight = torch.tensor([5]), torch.randn(4, 6, 1, 1)

    def function(x: Tensor) -> Tensor:
        return OPS.perturb_conv2d(x, weight, None, None, seed, 2, stride=[2, 2]).relu()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 5, 7), (3, 8, 9), (4, 6, 11)):
        x = torch.randn(batch, 3, height, width)
        assert torch.equal(compiled(x), function(x))
    assert counter.frame_count == 1
    x = torch.randn(2, 3, 6, 8).to(memory_format=torch.channels_last)
    assert compiled(x).stride() == function(x).stride()


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, "train"])
def test_inductor(norm: str | None) -> None:
    torch._dynamo.reset()
    values, function = split(Case(norm=norm, dtype=torch.float32, masks=2))
    inputs, again = recorded(values), recorded(values)
    output = torch.compile(lambda *v: function(*v).sigmoid(), fullgraph=True)(*inputs)
    output.sum().backward()
    expected = function(*again).sigmoid()
    expected.sum().backward()
    torch.testing.assert_close(output, expected)
    for a, b in zip(inputs, again):
        torch.testing.assert_close(a.grad, b.grad)


@needs_derivatives
@pytest.mark.slow
def test_compiled_autograd() -> None:
    torch._dynamo.reset()
    for norm in (None, "train"):
        values, function = split(Case(norm=norm, mask="tensor"))
        inputs, again = recorded(values), recorded(values)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            function(*inputs).square().sum().backward()
        function(*again).square().sum().backward()
        for a, b in zip(inputs, again):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_exported_program_holds_the_operator(tmp_path: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 6, 1, 1))
            self.register_buffer("seed", torch.tensor([7]))

        def forward(self, x: Tensor) -> Tensor:
            return OPS.perturb_conv2d(x, self.weight, None, None, self.seed, 2)

    torch.func.grad(lambda x: x.square().sum())(torch.ones(2))
    model = Model()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(model, (torch.randn(2, 3, 5, 6),), dynamic_shapes=(sizes,))
    assert "torch_pnn.perturb_conv2d.default" in names_in([program.graph_module])
    assert "torch_pnn.perturb_conv2d.default" in names_in([program.run_decompositions().graph_module])
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(3, 3, 8, 7)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


# ---- torch.func and forward-mode derivatives ----


@needs_derivatives
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=ids(GRADIENT_CASES))
def test_func_grad(case: Case) -> None:
    values, function = split(case)
    inputs = recorded(values)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    places = tuple(range(len(values)))
    found = torch.func.grad(lambda *v: function(*v).square().sum(), argnums=places)(*values)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=ids(GRADIENT_CASES))
def test_forward_mode(case: Case) -> None:
    values, function = split(case)
    tangents = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape) for v in values]
    _, expected = torch.autograd.functional.jvp(function, tuple(values), tuple(tangents))
    _, by_func = torch.func.jvp(function, tuple(values), tuple(tangents))
    torch.testing.assert_close(by_func, expected, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)


@needs_derivatives
def test_forward_mode_of_one_input_alone() -> None:
    for chosen in range(4):
        values, function = split(Case(mask="tensor", activation="gelu"))
        tangents = [torch.ones_like(v) if i == chosen else torch.zeros_like(v) for i, v in enumerate(values)]
        _, expected = torch.autograd.functional.jvp(function, tuple(values), tuple(tangents))
        with forward_ad.dual_level():
            given = [forward_ad.make_dual(v, t) if i == chosen else v for i, (v, t) in enumerate(zip(values, tangents))]
            tangent = forward_ad.unpack_dual(function(*given)).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("norm", [None, "eval", "train"])
def test_vmap_equals_a_loop(norm: str | None) -> None:
    case = Case(norm=norm, mask="tensor", masks=2, activation="gelu", channels=4, groups=2, stride=(1, 2))
    values, function = split(case)
    many = [torch.stack([v, 2 * v, -v]) for v in values]
    expected = torch.stack([function(*v) for v in zip(*many)])
    torch.testing.assert_close(torch.vmap(function)(*many), expected, rtol=1e-9, atol=1e-9)
    only_input = torch.vmap(function, in_dims=(1, *([None] * (len(values) - 1))))(many[0].transpose(0, 1), *values[1:])
    loop = torch.stack([function(v, *values[1:]) for v in many[0]])
    torch.testing.assert_close(only_input, loop, rtol=1e-9, atol=1e-9)


@needs_derivatives
def test_per_sample_gradients() -> None:
    values, function = split(Case(batch=3, activation="gelu"))
    x, weight, bias = values

    def loss(sample: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(sample.unsqueeze(0), weight, bias).square().sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(1, 2)), in_dims=(0, None, None))(x, weight, bias)
    for i in range(3):
        v, b = recorded([weight, bias])
        for ours, theirs in zip(found, torch.autograd.grad(loss(x[i], v, b), [v, b])):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-9, atol=1e-9)


@needs_derivatives
def test_vmap_over_seeds() -> None:
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 1, 1)
    seeds = torch.tensor([[1], [2], [-3]])
    found = torch.vmap(lambda seed: OPS.perturb_conv2d(x, weight, seed=seed))(seeds)
    expected = torch.stack([OPS.perturb_conv2d(x, weight, seed=seed) for seed in seeds])
    torch.testing.assert_close(found, expected)


@needs_derivatives
def test_vmap_under_autocast() -> None:
    x, weight = torch.randn(3, 2, 3, 4, 4), torch.randn(4, 3, 1, 1)
    seed = torch.tensor([4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.vmap(lambda part: OPS.perturb_conv2d(part, weight, seed=seed))(x)
        expected = torch.stack([OPS.perturb_conv2d(part, weight, seed=seed) for part in x])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


@needs_derivatives
@pytest.mark.slow
def test_hessians_agree() -> None:
    values, function = split(Case(batch=1, channels=1, outputs=2, activation="gelu", bias=False))
    weight = values[1]

    def loss(x: Tensor) -> Tensor:
        return function(x, weight).square().sum()

    exact = torch.autograd.functional.hessian(loss, values[0])
    torch.testing.assert_close(torch.func.hessian(loss)(values[0]), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(values[0]), exact, rtol=1e-8, atol=1e-8)
    batched = torch.autograd.functional.hessian(loss, values[0], vectorize=True)
    torch.testing.assert_close(batched, exact, rtol=1e-8, atol=1e-8)


@needs_derivatives
@pytest.mark.parametrize("norm", [None, "train", "eval"])
def test_batched_gradients(norm: str | None) -> None:
    values, function = split(Case(norm=norm, activation="tanh", mask="tensor"))
    inputs = recorded(values)
    output = function(*inputs)
    grads = torch.stack([torch.ones_like(output), torch.linspace(0, 1, output.numel()).view(output.shape).to(output)])
    batched = torch.autograd.grad(output, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        single = torch.autograd.grad(output, inputs, grad, retain_graph=True)
        for a, b in zip(batched, single):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("norm", [None, "train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_decomposition_keeps_types_and_values(norm: str | None, dtype: torch.dtype) -> None:
    case = Case(norm=norm, dtype=dtype, masks=2, channels=4, groups=2, outputs=6, height=3, width=3)
    values, function = split(case)
    decomposed, _ = torch.func.jvp(function, tuple(values), tuple(torch.zeros_like(v) for v in values))
    assert decomposed.dtype == dtype
    scale = 4 * torch.finfo(dtype).eps * max(1.0, decomposed.abs().max().item())
    torch.testing.assert_close(decomposed, function(*values), rtol=0, atol=scale)


@needs_derivatives
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.zeros(3, 1, 1, 1)}, "mask has size"),
        ({"weight": torch.zeros(4, 2, 1, 1)}, "weight has size"),
        ({"bias": torch.zeros(1)}, "bias should be"),
        ({"input": torch.zeros(3, 4, 4)}, "input has size"),
        ({"activation": "mish"}, "activation is 'mish'"),
        ({"groups": 2}, "groups is 2"),
        ({"stride": [0, 1]}, "stride is"),
        ({"seed": torch.tensor(1)}, "mask and seed"),
        ({"weight": torch.zeros(4, 3, 1, 1, dtype=torch.float64)}, "weight has type"),
    ],
)
def test_the_decomposition_refuses_wrong_calls(changes: dict[str, Any], message: str) -> None:
    given = {
        "input": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(4, 3, 1, 1),
        "bias": torch.zeros(4),
        "mask": torch.zeros(3, 1, 4, 4),
    } | changes
    x = given.pop("input")
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: OPS.perturb_conv2d(x, **given), (x,), (torch.ones_like(x),))


# ---- TorchScript ----


class Scripted(torch.nn.Module):
    """A layer as TorchScript sees it: the operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 6, 1, 1))
        self.bias = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("seed", torch.tensor([11]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.torch_pnn.perturb_conv2d(x, self.weight, self.bias, None, self.seed, 2)
        result = torch.ops.torch_pnn.perturb_norm_conv2d(
            y, self.weight[:, :4], None, None, None, None, None, None, self.seed, True
        )
        return result[0]


@needs_derivatives
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reloaded_script_trains() -> None:
    model = Scripted()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x = torch.randn(2, 3, 5, 5)
    for _ in range(3):  # the profiling executor rewrites the graph on the second call
        given, again = x.clone().requires_grad_(), x.clone().requires_grad_()
        loaded(given).square().sum().backward()
        model(again).square().sum().backward()
        assert given.grad is not None and given.grad.abs().sum() > 0
        assert torch.equal(given.grad, again.grad)
    for a, b in zip(loaded.parameters(), model.parameters()):
        assert torch.equal(a.grad, b.grad)


# ---- the backward operators themselves ----


@pytest.mark.parametrize("case", NORM_CASES[:4], ids=ids(NORM_CASES[:4]))
def test_backward_operators_equal_the_reference(case: Case) -> None:
    given = tensors(case)
    grad = torch.randn_like(forward(case, given)[0])
    wanted = [True] * 5 + [given["mask"] is not None]
    arguments = backward_arguments(case, given, grad, wanted)
    expected = reference.OPERATORS["_perturb_norm_conv2d_backward"](*arguments)
    for ours, theirs in zip(backward_operator(case)(*arguments), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", SMOOTH)
def test_random_cotangents(activation: str) -> None:
    case = Case(activation=activation, channels=4, groups=2, masks=2, mask="tensor", stride=(2, 2), height=7, width=8)
    given = tensors(case)
    grad = torch.randn_like(forward(case, given))
    arguments = backward_arguments(case, given, grad, [True] * 4)
    expected = reference.OPERATORS["_perturb_conv2d_backward"](*arguments)
    for ours, theirs in zip(backward_operator(case)(*arguments), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
