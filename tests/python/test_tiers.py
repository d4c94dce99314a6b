"""The compiled operators in the exact tier (bitwise, on lattices) and the bounded tier (each element has a bound)."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiers_support import TYPES, UNIT, Case, check_bounded, expected

from torch_pnn import _library, reference

pytestmark = pytest.mark.usefixtures("compiled_operators")

SHAPES = [
    # B, C, H, W, T, M
    (1, 1, 1, 1, 1, 1),
    (2, 4, 5, 7, 6, 3),
    (3, 17, 8, 9, 5, 2),
    (2, 64, 16, 16, 48, 1),
    (1, 8, 1, 33, 16, 16),
    (5, 2, 7, 13, 34, 1),
    (2, 6, 31, 3, 66, 4),
]
LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced", "expanded"]


def laid_out(tensor, layout):
    """The same values with other strides."""
    if tensor.dim() != 4 or layout == "contiguous":
        return tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    larger = torch.full([2 * size + 3 for size in tensor.shape], 1e3, dtype=tensor.dtype)
    view = larger[tuple(slice(2, 2 + 2 * size, 2) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def lattice(shape, limit, step, dtype):
    """Whole multiples of `step` up to `limit` steps away from 0."""
    return (torch.randint(-limit, limit + 1, shape) * step).to(dtype)


def lattice_case(shape, types, groups=1, stride=(1, 1), shared=False, source="tensor", activation="relu", norm=False):
    """A call whose sums are exact in float32: multiples of 2^-8 below 4 times small multiples of 1/4."""
    batch, channels, height, width, outputs, masks = shape
    input_type, weight_type = types
    rows, cols = -(-height // stride[0]), -(-width // stride[1])
    seed = None if source == "tensor" else torch.tensor([20240607])
    if seed is None:
        mask = lattice((1 if shared else channels, masks, height, width), 255, 2.0**-8, torch.float32)
    else:
        mask = reference.perturbation_mask(seed, channels, masks, height, width, shared_masks=shared, noise=source)
    statistics = torch.float64 if input_type == torch.float64 else torch.float32
    maps = channels * masks
    normalisation = (
        lattice((maps,), 2, 0.5, statistics),
        lattice((maps,), 4, 0.25, statistics),
        lattice((maps,), 4, 0.25, statistics),
        4.0 ** torch.randint(-1, 2, (maps,)).to(statistics),
    )
    return Case(
        lattice((batch, channels, height, width), 64, 2.0**-6, input_type),
        lattice((outputs, channels // groups * masks, 1, 1), 4, 0.25, weight_type),
        lattice((outputs,), 8, 0.25, weight_type),
        lattice((batch, outputs, rows, cols), 4, 0.5, weight_type),
        mask,
        level=0.5,
        activation=activation,
        stride=stride,
        groups=groups,
        seed=seed,
        noise="uniform" if seed is None else source,
        norm=normalisation if norm else None,
    )


def assert_exact(case, backward=True):
    """Bitwise equality of every result with float64, rounded once."""
    result = expected(case)
    y = case.forward()
    assert torch.equal(y, result.y.to(y.dtype))
    if not backward:
        return
    names = ["grad_input", "grad_weight", "grad_bias"]
    names += ["grad_gamma", "grad_beta"] if case.norm is not None else []
    names += ["grad_mask"] if case.seed is None else []
    for name, found in zip(names, case.backward(), strict=False):
        exact = getattr(result, name)
        assert found.shape == exact.shape, name
        assert torch.equal(found, exact.to(found.dtype)), name


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_shapes_and_types(shape, types, norm):
    for shared, stride in itertools.product((False, True), ((1, 1), (2, 3))):
        assert_exact(lattice_case(shape, types, shared=shared, stride=stride, norm=norm))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_layouts(layout, types, norm):
    for shape in (SHAPES[1], SHAPES[3]):
        case = lattice_case(shape, types, groups=2, norm=norm)
        case.x, case.grad, case.weight, case.mask = (
            laid_out(tensor, layout) for tensor in (case.x, case.grad, case.weight, case.mask)
        )
        assert_exact(case)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("activation", ["identity", "relu", "hardtanh"])
@pytest.mark.parametrize("types", TYPES)
def test_exact_groups_and_activations(types, activation, groups):
    for norm in (False, True):
        assert_exact(lattice_case((2, 8, 9, 6, 12, 2), types, groups=groups, activation=activation, norm=norm))


@pytest.mark.parametrize("source", ["uniform", "waves"])
@pytest.mark.parametrize("types", TYPES)
def test_exact_seeds(types, source):
    for shape, shared in itertools.product((SHAPES[1], SHAPES[4], (2, 20, 5, 18, 8, 1)), (False, True)):
        for norm in (False, True):
            assert_exact(lattice_case(shape, types, source=source, shared=shared, stride=(1, 2), norm=norm))


@pytest.mark.parametrize("source", reference.NOISES)
def test_a_seed_computes_the_bits_of_its_mask(source):
    torch.manual_seed(1)
    x, weight = torch.randn(2, 20, 9, 18), torch.randn(7, 40, 1, 1)
    for shared in (False, True):
        seed = torch.tensor([-77])
        mask = torch.ops.torch_pnn.perturbation_mask(seed, 20, 2, 9, 18, shared, source)
        options = (2, shared, source, 0.3, "relu", [1, 1], 1)
        given = torch.ops.torch_pnn.perturb_conv2d(x, weight, None, mask, None, *options)
        assert torch.equal(torch.ops.torch_pnn.perturb_conv2d(x, weight, None, None, seed, *options), given)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("types", TYPES)
def test_thread_counts_and_runs_do_not_change_bits(types, norm):
    torch.manual_seed(2)
    case = random_case((4, 32, 29, 31, 40, 2), types, norm=norm)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append([case.forward(), *case.backward()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("types", TYPES)
def test_batch_splits_do_not_change_bits(types, norm, layout, threads):
    torch.manual_seed(3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((9, 16, 7, 7, 24, 2), (8, 40, 4, 4, 33, 1), (9, 8, 1, 1, 5, 4)):
            case = random_case(shape, types, norm=norm)
            case.x = laid_out(case.x, layout)
            whole, x = case.forward(), case.x
            for parts in ([1] * shape[0], [2, shape[0] - 2], [shape[0] - 1, 1]):
                found = []
                for part in x.split(parts):
                    case.x = part
                    found.append(case.forward())
                assert torch.equal(torch.cat(found), whole)
            case.x = x
    finally:
        torch.set_num_threads(before)


HASH = """
import hashlib, sys, torch, test_tiers
torch.manual_seed(4)
digest = hashlib.sha256()
for types in test_tiers.TYPES[:2]:
    for norm in (False, True):
        for activation in test_tiers.reference.ACTIVATIONS:
            case = test_tiers.random_case((2, 20, 9, 11, 18, 3), types, norm=norm, activation=activation)
            for tensor in (case.forward(), *case.backward()):
                digest.update(tensor.contiguous().numpy().tobytes())
print(test_tiers._library.status().isa, digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_do_not_change_bits():
    path = os.pathsep.join([str(Path(__file__).parents[2] / "python"), str(Path(__file__).parent)])
    hashes = {}
    for isa in ("portable", "avx2", "avx512", "neon"):
        output = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", HASH],
            env=os.environ | {"PNN_MAX_ISA": isa, "PYTHONPATH": path},
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout.split()
        hashes[output[0]] = output[1]
    assert "portable" in hashes and _library.status().isa in hashes
    assert len(set(hashes.values())) == 1, hashes


# --------------------------------------------------------------------------------------------------------------------
# The bounded tier
# --------------------------------------------------------------------------------------------------------------------


def numbers(shape, kind, dtype):
    """Input values of a kind; all are numbers of the type."""
    values = torch.randn(shape, dtype=torch.float64)
    if kind == "cancelling":
        flat = values.flatten()
        flat[1::2] = -flat[: flat.numel() - 1 : 2][: flat[1::2].numel()] * (
            1 + 1e-3 * torch.randn(flat[1::2].shape).double()
        )
        values = flat.reshape(shape)
    elif kind == "huge":
        values = values * (1e2 if dtype == torch.float16 else 1e15)
    elif kind == "tiny":
        values = values * (1e-3 if dtype == torch.float16 else 1e-15)
    elif kind == "denormal":
        values = values * float(torch.finfo(dtype).smallest_normal)
    elif kind == "mixed":
        values = values * 10.0 ** torch.randint(-4, 5, shape).double()
    return values.to(dtype)


def random_case(
    shape,
    types,
    kind="normal",
    groups=1,
    stride=(1, 1),
    shared=False,
    activation="relu",
    norm=False,
    level=0.1,
):
    batch, channels, height, width, outputs, masks = shape
    input_type, weight_type = types
    statistics = torch.float64 if input_type == torch.float64 else torch.float32
    maps = channels * masks
    rows, cols = -(-height // stride[0]), -(-width // stride[1])
    return Case(
        numbers((batch, channels, height, width), kind, input_type),
        numbers(
            (outputs, channels // groups * masks, 1, 1), "cancelling" if kind == "cancelling" else "normal", weight_type
        ),
        numbers((outputs,), "normal", weight_type),
        numbers((batch, outputs, rows, cols), kind if kind != "denormal" else "normal", weight_type),
        torch.randn(1 if shared else channels, masks, height, width),
        level=0.0 if kind == "denormal" else level,
        activation=activation,
        stride=stride,
        groups=groups,
        norm=(
            torch.rand(maps, dtype=statistics) + 0.5,
            torch.randn(maps, dtype=statistics),
            torch.randn(maps, dtype=statistics) * 0.1,
            torch.rand(maps, dtype=statistics) + 0.5,
        )
        if norm
        else None,
        eps=1e-5,
    )


def assert_bounded(case, extra=0):
    """Every element within its bound; `extra` ulps for an activation that is not exact. Returns the forward errors."""
    result = expected(case)
    batch, _, rows, cols = case.grad.shape
    pixels, columns = batch * rows * cols, case.weight.shape[1]
    compute = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    # Beyond the sum's own steps: bias, the rounding of the scaled weight and of its offset, the activation's ulps. The
    # float64 reference rounds as the float64 operator does: as many steps again.
    both = 2 if compute == torch.float64 else 1
    steps = extra + 3
    flushed = {}
    if case.weight.dtype == torch.bfloat16:
        least = torch.finfo(torch.float32).smallest_normal
        flushed["output"] = least * (columns + case.weight.double().abs().sum())
        flushed["grad_weight"] = least * (pixels + case.grad.double().abs().sum())
    errors = check_bounded(
        "output",
        case.forward(),
        result.y,
        result.y_terms,
        both * (columns + steps),
        compute,
        flushed.get("output", 0.0),
    )
    per_group = case.weight.shape[0] // case.groups
    gradients = case.backward()
    counts = {
        "grad_input": per_group + case.masks + steps,
        "grad_weight": pixels + steps,
        "grad_bias": pixels,
    }
    for (name, summands), found in zip(counts.items(), gradients, strict=False):
        terms = getattr(result, name + "_terms")
        check_bounded(name, found, getattr(result, name), terms, both * summands, compute, flushed.get(name, 0.0))
    summands = both * (per_group + batch * (case.x.shape[1] if case.mask.shape[0] == 1 else 1) + steps)
    check_bounded("grad_mask", gradients[-1], result.grad_mask, result.grad_mask_terms, summands, compute)
    return errors, result


@pytest.mark.parametrize("kind", ["normal", "cancelling", "huge", "tiny", "denormal", "mixed"])
@pytest.mark.parametrize("types", TYPES)
def test_bounded_values(types, kind):
    for shape in SHAPES:
        assert_bounded(random_case(shape, types, kind))


@pytest.mark.parametrize("types", TYPES)
def test_bounded_norm(types):
    for shape in SHAPES:
        for stride in ((1, 1), (2, 3)):
            assert_bounded(random_case(shape, types, norm=True, stride=stride))


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("types", TYPES[:2])
def test_bounded_activations(types, activation):
    for norm in (False, True):
        case = random_case((2, 12, 9, 10, 8, 3), types, activation=activation, norm=norm, groups=2, level=0.7)
        # Our polynomials and PyTorch's own functions are each within a few ulp; see docs/activations.md.
        assert_bounded(case, extra=0 if activation in ("identity", "relu", "hardtanh") else 40)


@pytest.mark.parametrize("columns", [1, 2, 31, 512, 4608])
@pytest.mark.parametrize("types", TYPES)
def test_bounded_sums_of_any_length(types, columns):
    errors, result = assert_bounded(random_case((1, columns, 3, 5, 7, 1), types))
    if types == (torch.float32, torch.float32):
        # Far below the bound: rounding to nearest errs to both sides. A change of the summation would show here.
        assert (errors / result.y_terms).max() < 8 * UNIT[torch.float32]


@pytest.mark.parametrize("types", TYPES)
def test_no_channels_give_the_bias(types):
    input_type, weight_type = types
    x, weight = torch.zeros(2, 0, 3, 4, dtype=input_type), torch.zeros(5, 0, 1, 1, dtype=weight_type)
    bias = torch.arange(5).to(weight_type)
    y = torch.ops.torch_pnn.perturb_conv2d(x, weight, bias, None, torch.tensor([1]))
    assert torch.equal(y, bias.view(-1, 1, 1).expand(2, 5, 3, 4))


def test_a_single_summand_is_rounded_once():
    torch.manual_seed(6)
    for input_type, weight_type in TYPES:
        case = random_case((3, 1, 7, 9, 5, 1), (input_type, weight_type))
        case.bias = torch.zeros(5, dtype=weight_type)
        y = case.forward()
        assert torch.equal(y, expected(case).y.to(y.dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
@pytest.mark.parametrize("where", ["x", "weight", "mask", "grad", "bias"])
@pytest.mark.parametrize("types", TYPES)
def test_special_values_come_out_where_float64_has_them(types, where, value):
    torch.manual_seed(7)
    for activation in ("relu", "identity", "hardtanh"):
        case = random_case((2, 5, 4, 19, 6, 2), types, activation=activation)
        tensor = getattr(case, where)
        tensor.view(-1)[tensor.numel() // 2] = value
        result = expected(case)
        for name, found in zip(("y", "grad_input", "grad_weight"), (case.forward(), *case.backward()), strict=False):
            exact = getattr(result, name)
            assert torch.equal(found.isnan(), exact.isnan()), name
            assert torch.equal(found.double()[found.isinf()], exact[exact.isinf()]), name


@pytest.mark.parametrize("types", TYPES)
def test_moments(types):
    torch.manual_seed(8)
    input_type, weight_type = types
    compute = torch.float64 if input_type == torch.float64 else torch.float32
    for scale, offset in ((1.0, 0.0), (1e-3, 1.0), (1.0, 100.0)):
        for stride in ((1, 1), (2, 3)):
            x = (torch.randn(3, 20, 13, 17) * scale + offset).to(input_type)
            weight = torch.randn(4, 40, 1, 1).to(weight_type)
            mask = torch.randn(20, 2, 13, 17)
            y, mean, variance = torch.ops.torch_pnn.perturb_norm_conv2d(
                x,
                weight,
                None,
                None,
                None,
                None,
                None,
                mask,
                None,
                True,
                1e-5,
                2,
                False,
                "uniform",
                1e-3,
                "relu",
                stride,
            )
            u = x.to(compute).unsqueeze(2) + torch.tensor(1e-3, dtype=compute) * mask.to(compute)
            a = u[:, :, :, :: stride[0], :: stride[1]].relu().double().flatten(1, 2)
            unit = UNIT[compute]
            exact_mean, exact_variance = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
            n = a[:, 0].numel()
            assert (
                (mean - exact_mean).abs() <= 2 * unit * exact_mean.abs() + 1e-300 + n * 2**-53 * a.abs().mean((0, 2, 3))
            ).all()
            # Nearly constant maps must not cancel: the error is that of centred sums.
            assert (
                (variance - exact_variance).abs()
                <= (16 if compute == torch.float32 else 64 * math.sqrt(n)) * unit * exact_variance
                + 4 * (unit * exact_mean) ** 2
            ).all()
            assert y.isfinite().all()


@pytest.mark.parametrize("types", TYPES)
def test_bounded_norm_training(types):
    """Training is evaluation with the moments of the batch; its gradients are compared with autograd's in float64."""
    torch.manual_seed(9)
    weight_type = types[1]
    for stride in ((1, 1), (2, 3)):
        case = random_case((3, 10, 9, 11, 6, 2), types, norm=True, stride=stride)
        gamma, beta, _, _ = case.norm
        ops = torch.ops.torch_pnn
        y, mean, variance = ops.perturb_norm_conv2d(
            case.x, case.weight, case.bias, gamma, beta, None, None, *case.source, True, case.eps, *case.options
        )
        case.norm = (gamma, beta, mean, variance)
        # In training the variance is not rounded between the moments and the scale.
        torch.testing.assert_close(case.forward(), y)
        leaves = [t.double().requires_grad_() for t in (case.x, case.weight, case.bias, gamma, beta, case.mask)]
        x, weight, bias, gamma64, beta64, mask = leaves
        z = reference.perturb_norm_conv2d(
            x,
            weight,
            bias,
            gamma64,
            beta64,
            None,
            None,
            training=True,
            eps=case.eps,
            mask=mask,
            level=case.level,
            stride=stride,
        )
        exact = torch.autograd.grad(z, leaves, case.grad.double())
        found = ops._perturb_norm_conv2d_backward(
            case.grad,
            case.x,
            case.weight,
            gamma,
            beta,
            mean,
            variance,
            *case.source,
            True,
            case.eps,
            *case.options,
            [True] * 6,
        )
        for ours, theirs in zip(found, exact, strict=True):
            operand = max(UNIT[weight_type], UNIT[ours.dtype])
            torch.testing.assert_close(
                ours.double(), theirs, rtol=64 * operand, atol=64 * operand * theirs.abs().max().item()
            )
