"""torch.func: vmap, per-sample gradients, Jacobians, ensembles; forward-mode and second derivatives of everything."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operators_support import (
    ACTIVATIONS,
    OPS,
    Case,
    backward_arguments,
    backward_operator,
    bits,
    forward,
    ids,
    needs_derivatives,
    operator,
    options,
    tensors,
)
from torch import Tensor, nn, vmap
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vjp,
)

from torch_pnn import LBConv2d, PerturbConv2d, functional, reference

DIFFERENTIABLE = ("input", "weight", "bias", "norm_weight", "norm_bias", "mask")
SAMPLES = 3


@pytest.fixture(autouse=True)
def no_slow_fallback(capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which PyTorch remarks that an operator has no batching rule, as a warning or on stderr."""
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield
    torch._C._debug_only_display_vmap_fallback_warnings(False)
    lines = [line for line in capfd.readouterr().err.splitlines() if "performance drop" in line]
    # gradcheck still uses the older vmap, in which PyTorch's own convolutions have no rule either.
    seen = any("legacy vmap prototype" not in line for line in lines)
    assert seen == (request.function.__name__ == "test_a_fallback_is_seen"), lines


def test_a_fallback_is_seen() -> None:
    with torch.library._scoped_library("torch_pnn_test", "DEF") as library:
        library.define("plain(Tensor x) -> Tensor")
        library.impl("plain", lambda x: x.clone(), "CPU")
        vmap(torch.ops.torch_pnn_test.plain)(torch.ones(2, 2))


# ---- vmap of the operators ----

CALLS = [
    Case(mask="none"),
    Case(mask="seed", masks=2),
    Case(mask="shared seed", masks=2, noise="waves", channels=4, groups=2),
    Case(mask="tensor", masks=2, channels=4, groups=2, stride=(1, 2), activation="tanh"),
    Case(mask="shared tensor", masks=2, stride=(2, 1), bias=False),
    Case(mask="seed", norm="eval", masks=2, channels=4, groups=2, bias=False),
    Case(mask="shared seed", norm="train", masks=2, noise="normal"),
    Case(mask="tensor", norm="train", channels=4, groups=2, stride=(2, 2), activation="gelu"),
    Case(mask="shared tensor", norm="eval", activation="silu"),
    Case(mask="seed", norm="train", layout="channels_last"),
]
OVER = [
    ("input",),
    ("weight",),
    ("bias",),
    ("weight", "bias"),
    ("input", "weight", "bias"),
    ("mask",),
    ("seed",),
    ("input", "mask"),
    ("input", "seed"),
    ("norm_weight", "norm_bias"),
    ("running_mean", "running_var"),
    ("input", "weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var", "mask", "seed"),
]
PAIRS = [(case, over) for case in CALLS for over in OVER if any(tensors(case).get(name) is not None for name in over)]
PAIR_IDS = [f"{case.name}-{','.join(over)}" for case, over in PAIRS]


def sampled(case: Case, over: tuple[str, ...], samples: int = SAMPLES) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tensors of a vmapped call, those of `over` with `samples` in front, and the tensors of each sample alone."""
    every = [tensors(case, seed) for seed in range(samples)]
    alone = [{n: (one if n in over else every[0])[n] for n in one} for one in every]
    names = [name for name in over if every[0].get(name) is not None]
    return every[0] | {name: torch.stack([one[name] for one in alone]) for name in names}, alone


def vmapped_call(case: Case, together: dict[str, Any], names: list[str], dims: list[int], out: int) -> Any:
    """The operator, vmapped over the named tensors."""

    def function(*chosen: Tensor) -> Any:
        return operator(case)(**(together | dict(zip(names, chosen))), **options(case))

    return vmap(function, in_dims=tuple(dims), out_dims=(out, 0, 0) if case.norm else out)(
        *(together[name].movedim(0, dim) for name, dim in zip(names, dims))
    )


@needs_derivatives
@pytest.mark.parametrize(("case", "over"), PAIRS, ids=PAIR_IDS)
def test_a_vmapped_call_has_the_bits_of_single_calls(case: Case, over: tuple[str, ...]) -> None:
    together, alone = sampled(case, over)
    names = [name for name in over if together.get(name) is not None]
    single = [forward(case, one) for one in alone]
    for place in (0, -1):  # the vmapped dimension: the first or the last
        dims = [place % together[name].dim() for name in names]
        found = vmapped_call(case, together, names, dims, out=2)
        output = found[0] if case.norm else found
        expected = torch.stack([one[0] if case.norm else one for one in single], 2)
        if case.norm == "train":  # a sum over pixels may run in another order
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        else:
            assert bits(output) == bits(expected)
        if case.norm:
            for ours, theirs in zip(found[1:], zip(*(one[1:] for one in single))):
                torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=1e-12)
    which = reference.OPERATORS["perturb_norm_conv2d" if case.norm else "perturb_conv2d"]
    for index, one in enumerate(alone):
        wide = which(**one, **options(case))
        torch.testing.assert_close(output.select(2, index), wide[0] if case.norm else wide, rtol=1e-9, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("over", [("input",), ("weight",), ("input", "weight")], ids=",".join)
def test_every_type_has_the_bits_of_single_calls(dtype: torch.dtype, over: tuple[str, ...]) -> None:
    case = Case(dtype=dtype, masks=2, channels=5, outputs=7, height=9, width=6, activation="gelu")
    together, alone = sampled(case, over)
    found = vmapped_call(case, together, list(over), [0] * len(over), out=0)
    assert found.dtype == dtype
    assert bits(found) == bits(torch.stack([forward(case, one) for one in alone]))


@needs_derivatives
@pytest.mark.parametrize(("case", "over"), PAIRS, ids=PAIR_IDS)
def test_gradients_of_a_vmapped_call(case: Case, over: tuple[str, ...]) -> None:
    together, alone = sampled(case, over)
    names = [name for name in over if together.get(name) is not None]
    wanted = [name for name in DIFFERENTIABLE if together.get(name) is not None]
    for name in wanted:
        together[name] = together[name].detach().requires_grad_()
    found = vmapped_call(case, together, names, [0] * len(names), out=0)
    found = found[0] if case.norm else found
    cotangent = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    ours = dict(zip(wanted, torch.autograd.grad(found, [together[name] for name in wanted], cotangent)))
    which = reference.OPERATORS["perturb_norm_conv2d" if case.norm else "perturb_conv2d"]
    each = []
    for index, one in enumerate(alone):
        given = one | {name: one[name].detach().requires_grad_() for name in wanted}
        output = which(**given, **options(case))
        output = output[0] if case.norm else output
        each.append(torch.autograd.grad(output, [given[name] for name in wanted], cotangent[index]))
    for name, theirs in zip(wanted, zip(*each)):
        expected = torch.stack(theirs) if name in over else torch.stack(theirs).sum(0)
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("asked", ["all", "input", "mask"])
@pytest.mark.parametrize(
    "over", [("grad",), ("grad", "input"), ("grad", "weight"), ("grad", "mask", "seed")], ids=",".join
)
@pytest.mark.parametrize("case", CALLS, ids=ids(CALLS))
def test_vmapped_backward_operators_equal_single_calls(case: Case, over: tuple[str, ...], asked: str) -> None:
    together, alone = sampled(case, over)
    names = ["input", "weight", "bias", *(["norm_weight", "norm_bias"] if case.norm else []), "mask"]
    wanted = [asked in ("all", name) and (name != "mask" or together["mask"] is not None) for name in names]
    one = forward(case, alone[0])
    grads = torch.randn(SAMPLES, *(one[0] if case.norm else one).shape, dtype=case.dtype)
    # Every argument that may differ is given to vmap, as one value for all where it doesn't.
    places = {"grad": 0, "input": 1, "weight": 2, "mask": 7 if case.norm else 3, "seed": 8 if case.norm else 4}
    arguments = [backward_arguments(case, each, grads[i], wanted) for i, each in enumerate(alone)]
    expected = [backward_operator(case)(*each) for each in arguments]
    moments = (5, 6) if case.norm == "train" else ()
    chosen = {place for name, place in places.items() if name in over and arguments[0][place] is not None}
    chosen |= set(moments)
    stacked = [torch.stack([each[place] for each in arguments]) for place in sorted(chosen)]

    def function(*parts: Tensor) -> Any:
        call = list(arguments[0])
        for place, value in zip(sorted(chosen), parts):
            call[place] = value
        return backward_operator(case)(*call)

    for ours, theirs, needed in zip(vmap(function)(*stacked), zip(*expected), wanted):
        if needed:
            torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-10)
        else:
            assert ours.shape == (SAMPLES, 0)


@needs_derivatives
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noise", ["uniform", "normal", "waves"])
def test_vmap_over_the_seeds_of_masks(shared: bool, noise: str) -> None:
    seeds = torch.tensor([3, -1, 2**62])
    found = vmap(lambda seed: OPS.perturbation_mask(seed, 3, 2, 4, 5, shared, noise))(seeds)
    expected = torch.stack([OPS.perturbation_mask(seed, 3, 2, 4, 5, shared, noise) for seed in seeds])
    assert bits(found) == bits(expected)
    whole = vmap(lambda seed: functional.perturbation_mask(seed, 3, 2, 4, 5, shared_masks=shared, noise=noise))(seeds)
    assert bits(whole) == bits(expected)


@needs_derivatives
def test_nested_vmap() -> None:
    x, weight = torch.randn(2, 3, 4, 3, 5, 6), torch.randn(5, 4, 3, 1, 1)
    seeds = torch.tensor([[1], [2]])

    def call(image: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
        return functional.perturb_conv2d(image, weight, seed=seed)

    inner = vmap(call, in_dims=(0, None, None))
    found = vmap(vmap(inner, in_dims=(None, 0, None)), in_dims=(0, None, 0))(x, weight, seeds)
    assert found.shape == (2, 5, 3, 4, 4, 5, 6)
    for i in range(2):
        for j in range(5):
            for k in range(3):
                assert bits(found[i, j, k]) == bits(call(x[i, k], weight[j], seeds[i]))


@needs_derivatives
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 7])
def test_chunks_and_randomness(randomness: str, chunk_size: int | None) -> None:
    x, weight = torch.randn(5, 2, 3, 4, 4), torch.randn(4, 3, 1, 1)
    function = vmap(
        lambda part: functional.perturb_conv2d(part, weight, seed=5), chunk_size=chunk_size, randomness=randomness
    )
    assert bits(function(x)) == bits(functional.perturb_conv2d(x.flatten(0, 1), weight, seed=5).view(5, 2, 4, 4, 4))


@needs_derivatives
@pytest.mark.parametrize("over", [(0, None), (None, 0), (0, 0)], ids=str)
def test_no_samples_give_no_results(over: tuple[int | None, ...]) -> None:
    x, weight = torch.randn(0, 2, 3, 4, 4), torch.randn(0, 4, 3, 1, 1)
    given = [t if dim == 0 else t.new_zeros(t.shape[1:]) for t, dim in zip((x, weight), over)]
    assert vmap(lambda a, v: functional.perturb_conv2d(a, v, seed=5), over)(*given).shape == (0, 2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"weight has size \[4, 3, 1, 1\], it should be \[T, 6, 1, 1\]|it should be"):
        vmap(lambda a, v: functional.perturb_conv2d(a, v, seed=5, masks=2), over)(*given)


@needs_derivatives
def test_one_image_without_a_batch() -> None:
    layer = PerturbConv2d(3, 4, 3, padding=1, stride=2)
    x = torch.randn(5, 3, 8, 8)
    assert bits(vmap(layer)(x)) == bits(layer(x))


@needs_derivatives
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": torch.zeros(3, 1, 1, 1)}, ValueError, r"mask has size \[3, 1, 1, 1\]|mask.* size\[2\] is 1"),
        ({"weight": torch.zeros(4, 2, 1, 1)}, ValueError, "weight"),
        ({"bias": torch.zeros(1)}, ValueError, "bias"),
        ({"input": torch.zeros(3, 4)}, ValueError, r"input has size \[3, 4\]"),
        ({"activation": "mish"}, ValueError, "activation is 'mish'"),
        ({"groups": 2}, ValueError, "groups is 2"),
        ({"stride": (0, 1)}, ValueError, "stride"),
        ({"input": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "input has type"),
        ({"mask": None, "seed": torch.zeros(1)}, TypeError, "seed has type"),
        ({"mask": None, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed has size"),
    ],
)
@pytest.mark.parametrize("over", ["input", "weight", "both"])
def test_wrong_calls_are_refused_in_the_sizes_of_one_sample(
    changes: dict[str, Any], error: type[Exception], message: str, over: str
) -> None:
    given = {
        "input": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(4, 3, 1, 1),
        "bias": torch.zeros(4),
        "mask": torch.zeros(3, 1, 4, 4),
    } | changes
    with pytest.raises(error, match=message) as alone:
        functional.perturb_conv2d(**given)
    names = ("input", "weight") if over == "both" else (over,)

    def call(*chosen: Tensor) -> Tensor:
        return functional.perturb_conv2d(**(given | dict(zip(names, chosen))))

    with pytest.raises(error, match=message) as vmapped:
        vmap(call)(*(torch.stack([given[name]] * 7) for name in names))
    assert str(vmapped.value) == str(alone.value)


@needs_derivatives
@pytest.mark.parametrize("over", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_under_autocast(over: tuple[int | None, ...]) -> None:
    x, weight = torch.randn(3, 2, 3, 4, 4), torch.randn(3, 4, 3, 1, 1)
    given = [t if dim == 0 else t[0] for t, dim in zip((x, weight), over)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vmap(lambda a, v: functional.perturb_conv2d(a, v, seed=4), over)(*given)
        each = [[t[i] if dim == 0 else t for t, dim in zip(given, over)] for i in range(3)]
        expected = torch.stack([functional.perturb_conv2d(a, v, seed=4) for a, v in each])
    assert found.dtype == torch.bfloat16
    assert bits(found) == bits(expected)


# ---- derivatives by torch.func, against the reference ----


def losses(activation: str = "gelu", norm: str | None = None, **more: Any) -> tuple[list[Tensor], Any, Any]:
    """A small call's differentiable tensors, and a scalar function of them by the operators and by the reference."""
    case = Case(activation=activation, norm=norm, masks=2, mask="tensor", channels=2, height=3, width=2, **more)
    given = tensors(case)
    names = [name for name in DIFFERENTIABLE if given.get(name) is not None]
    name = "perturb_norm_conv2d" if norm else "perturb_conv2d"

    def by(which: Callable[..., Any]) -> Callable[..., Tensor]:
        def function(*values: Tensor) -> Tensor:
            result = which(**(given | dict(zip(names, values))), **options(case))
            result = result[0] if norm else result
            return (
                (result * torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view_as(result)).square().sum()
            )

        return function

    return [given[n] for n in names], by(operator(case)), by(reference.OPERATORS[name])


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("norm", [None, "train", "eval"])
@pytest.mark.parametrize(
    "transform",
    [  # of a function f of n tensors
        lambda f, n: grad(f, tuple(range(n))),
        lambda f, n: jacrev(f, tuple(range(n))),
        lambda f, n: jacfwd(f, tuple(range(n))),
        lambda f, n: lambda *v: jvp(f, v, tuple(t.cos() for t in v)),
        lambda f, n: lambda *v: vjp(f, *v)[1](torch.ones((), dtype=v[0].dtype)),
        lambda f, n: lambda *v: linearize(f, *v)[1](*(t.cos() for t in v)),
        lambda f, n: lambda *v: jvp(grad(f, (0, 1)), v, tuple(t.cos() for t in v)),
        lambda f, n: lambda *v: grad(lambda *w: jvp(f, w, tuple(t.cos() for t in w))[1], tuple(range(n)))(*v),
        lambda f, n: jacrev(grad(f, 1), (0, 1)),
        lambda f, n: lambda *v: vmap(grad(f, (0, 1)))(*(torch.stack([t, t.sin()]) for t in v)),
        lambda f, n: lambda x, w, *v: vmap(grad(f, (0, 1)), (0, *(None,) * (n - 1)))(torch.stack([x, -x]), w, *v),
    ],
    ids=[
        "grad",
        "jacrev",
        "jacfwd",
        "jvp",
        "vjp",
        "linearize",
        "jvp-grad",
        "grad-jvp",
        "jacrev-grad",
        "vmap-grad",
        "samples",
    ],
)
def test_transforms_equal_the_references(transform: Any, norm: str | None) -> None:
    values, ours, theirs = losses(norm=norm)
    assert_same(transform(ours, len(values))(*values), transform(theirs, len(values))(*values))


@needs_derivatives
@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, "train", "eval"])
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse", "reverse over forward", "batched"])
def test_hessians(norm: str | None, order: str) -> None:
    values, ours, theirs = losses(norm=norm, batch=1)
    places = tuple(range(len(values)))
    if order == "batched":
        values = [torch.stack([value, value.sin()]) for value in values]
    transform = {
        "forward over reverse": lambda f: hessian(f, places),
        "reverse over reverse": lambda f: jacrev(jacrev(f, places), places),
        "reverse over forward": lambda f: jacrev(jacfwd(f, places), places),
        "batched": lambda f: vmap(jacrev(jacrev(f, places), places)),
    }[order]
    assert_same(transform(ours)(*values), transform(theirs)(*values))


@needs_derivatives
@pytest.mark.parametrize("norm", [None, "eval"])
def test_third_derivatives(norm: str | None) -> None:
    values, ours, theirs = losses(norm=norm, batch=1, activation="tanh")

    def third(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def second(x: Tensor) -> Tensor:
            return grad(lambda v: grad(f)(v, *values[1:]).square().sum())(x).square().sum()

        return grad(second)

    assert_same(third(ours)(values[0]), third(theirs)(values[0]))


@needs_derivatives
def test_gradients_inside_transforms_use_the_kernels() -> None:
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 1, 1)

    def names(function: Callable[[], Any]) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function()
        return {event.name for event in profile.events()}

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return functional.perturb_conv2d(x, weight, seed=3).square().sum()

    for function in (
        lambda: grad(loss)(weight, x),
        lambda: vmap(grad(loss), (None, 0))(weight, x),
        lambda: vmap(grad(loss), (0, None))(torch.stack([weight] * 2), x),
    ):
        seen = names(function)
        assert {"torch_pnn::perturb_conv2d", "torch_pnn::_perturb_conv2d_backward"} <= seen
        assert not seen & {"aten::relu", "aten::threshold_backward", "aten::bmm"}, seen


@needs_derivatives
def test_a_gradient_penalty_uses_partial_derivatives() -> None:
    """The incoming gradient of the first pass depends on the input too: nothing may be counted twice."""
    values, ours, theirs = losses()
    results = []
    for function in (ours, theirs):
        x, *others = [value.detach().requires_grad_() for value in values]
        weight = others[0] * x.mean()  # one input computed from another
        (first,) = torch.autograd.grad(function(x, weight, *others[1:]), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *others]))
    assert_same(*results)


# ---- gradcheck over everything ----


def smooth_points(case: Case) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """A call whose u keeps away from 0 and +-1, where some activations have no derivative."""
    case = dataclasses.replace(case, channels=2 * case.groups, outputs=2 * case.groups, height=3, width=3, level=0.1)
    given = tensors(case)
    centres = torch.tensor([-1.7, -0.5, 0.5, 1.7], dtype=torch.float64)
    size = given["input"].shape
    given["input"] = centres[torch.arange(given["input"].numel()).view(size) * 7 % 4] + 0.1 * given["input"].tanh()
    if given["mask"] is not None:
        given["mask"] = given["mask"].tanh()
    names = [name for name in DIFFERENTIABLE if given.get(name) is not None]

    def function(*values: Tensor) -> Tensor:
        result = operator(case)(**(given | dict(zip(names, values))), **options(case))
        return result[0] if case.norm else result

    return [given[name].detach().requires_grad_() for name in names], function


CHECKED = [
    Case(masks=2, mask="tensor"),
    Case(masks=2, mask="shared tensor", stride=(2, 2)),
    Case(masks=2, mask="shared seed", groups=2),
    Case(mask="seed", groups=2, stride=(1, 2), bias=False),
    Case(mask="tensor", norm="train"),
    Case(mask="shared tensor", norm="eval", masks=2, groups=2),
]


@needs_derivatives
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*legacy vmap prototype.*")
@pytest.mark.parametrize("case", CHECKED, ids=ids(CHECKED))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, case: Case) -> None:
    values, function = smooth_points(dataclasses.replace(case, activation=activation))
    first = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, values, fast_mode=True, **first)
    second = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True, **second)


# ---- modules ----


def flat(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: PerturbConv2d(3, 4, 3, padding=1, stride=2, masks=2, dtype=torch.float64),
    "subsampled": lambda: PerturbConv2d(3, 4, 3, stride=2, downsample="subsample", dtype=torch.float64),
    "shared": lambda: PerturbConv2d(4, 4, 3, padding=1, groups=2, shared_masks=True, dtype=torch.float64),
    "trained masks": lambda: PerturbConv2d(3, 4, 3, padding=1, mask_size=6, train_masks=True).double(),
    "no noise": lambda: PerturbConv2d(3, 4, 3, padding=1, noise=None, activation="tanh", dtype=torch.float64),
    "norm": lambda: PerturbConv2d(3, 4, 3, padding=1, norm=True, dtype=torch.float64),
    "lbc": lambda: LBConv2d(3, 4, anchors=5, dtype=torch.float64),
}


def data_for(layer: Any, samples: int) -> Tensor:
    return torch.randn(samples, layer.in_channels, 6, 6, dtype=torch.float64)


@needs_derivatives
@pytest.mark.parametrize("kind", LAYERS)
def test_per_sample_gradients_of_a_layer(kind: str) -> None:
    layer = LAYERS[kind]().eval()
    x = data_for(layer, 4)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, parameters, (image.unsqueeze(0),)).square().sum()

    found, value = vmap(grad_and_value(loss), (None, 0))(flat(layer), x)
    for index, image in enumerate(x):
        layer.zero_grad()
        alone = layer(image.unsqueeze(0)).square().sum()
        alone.backward()
        torch.testing.assert_close(value[index], alone.detach(), rtol=1e-10, atol=1e-12)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-9, atol=1e-10)
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-9)


@needs_derivatives
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_ensemble_equals_its_members(kind: str, training: bool) -> None:
    members = [LAYERS[kind]().train(training) for _ in range(3)]
    x = data_for(members[0], 2)
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    together = vmap(call, (0, 0, None))(parameters, buffers, x)
    together.square().sum().backward()
    for index, member in enumerate(members):
        alone = member(x)
        torch.testing.assert_close(together[index], alone, rtol=1e-11, atol=1e-12)
        alone.square().sum().backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(parameters[name].grad[index], parameter.grad, rtol=1e-8, atol=1e-9)
        for name, buffer in member.named_buffers():  # running statistics have moved alike
            torch.testing.assert_close(buffers[name][index], buffer, rtol=1e-11, atol=1e-12)


@needs_derivatives
def test_statistics_of_a_batch_under_vmap() -> None:
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True, seed=1, dtype=torch.float64)
    x = torch.randn(3, 2, 3, 5, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"can.t be updated inside torch.vmap.*replace_all_batch_norm"):
        vmap(layer)(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    replaced = replace_all_batch_norm_modules_(copy.deepcopy(layer))
    found = vmap(replaced)(x)
    for index, part in enumerate(x):
        torch.testing.assert_close(found[index], copy.deepcopy(layer)(part), rtol=1e-11, atol=1e-12)


@needs_derivatives
@pytest.mark.slow
def test_compiled_transforms() -> None:
    layer = PerturbConv2d(3, 4, 3, padding=1, stride=2, seed=1)
    x = torch.randn(5, 2, 3, 8, 8)

    def per_sample(parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], part: Tensor) -> Tensor:
            return functional_call(layer, parameters, (part,)).square().sum()

        return vmap(grad(loss), (None, 0))(parameters, x)

    found = torch.compile(per_sample, fullgraph=True)(flat(layer), x)
    for name, value in per_sample(flat(layer), x).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.compile(vmap(layer), fullgraph=True)(x), vmap(layer)(x))
