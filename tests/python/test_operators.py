"""The registered operators on the CPU: values, layouts, shape functions, threads, forks."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from operators_support import (
    ACTIVATIONS,
    CASES,
    NORM_CASES,
    OPS,
    Case,
    backward_arguments,
    backward_operator,
    bits,
    forward,
    ids,
    laid_out,
    naive,
    needs_compiled,
    operator,
    options,
    tensors,
)

from torch_pnn import _fakes, _library, reference

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check_against_loops(case: Case) -> None:
    """|error| <= (K + c) u sum|terms| + u_out |y|, c for the activation and the normalisation's own roundings."""
    given = tensors(case)
    expected = naive(case, given)
    result = forward(case, given)
    output = result[0] if case.norm else result
    accumulate = UNIT[torch.float64 if case.dtype == torch.float64 else torch.float32]
    summands = case.channels // case.groups * case.masks
    bound = (summands + 16) * accumulate * expected.scale + UNIT[output.dtype] * abs(expected.output)
    if case.dtype in (torch.bfloat16, torch.float16) or case.weight_dtype is not None:
        bound += 2 * UNIT[case.weight_dtype or case.dtype] * expected.scale
    error = abs(output.double().numpy() - expected.output)
    assert (error <= bound).all(), f"worst error {error.max()}, where the bound allows {bound.flat[error.argmax()]}"
    if case.norm:
        np.testing.assert_allclose(result[1].double().numpy(), expected.mean, rtol=0, atol=64 * accumulate)
        np.testing.assert_allclose(result[2].double().numpy(), expected.variance, rtol=64 * accumulate, atol=1e-30)


@pytest.mark.parametrize("case", CASES + NORM_CASES, ids=ids(CASES + NORM_CASES))
def test_values_equal_the_loops_in_float64(case: Case) -> None:
    check_against_loops(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [None, "train", "eval"])
def test_values_equal_the_loops_within_the_bound(dtype: torch.dtype, norm: str | None) -> None:
    check_against_loops(Case(dtype=dtype, norm=norm, channels=4, groups=2, masks=3, stride=(1, 2), width=6))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_input_with_narrow_weight(weight_dtype: torch.dtype) -> None:
    case = Case(dtype=torch.float32, weight_dtype=weight_dtype, masks=2)
    assert forward(case, tensors(case)).dtype == weight_dtype
    check_against_loops(case)
    check_against_loops(dataclasses.replace(case, norm="train"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_name(activation: str) -> None:
    check_against_loops(Case(activation=activation, dtype=torch.float32))


def test_mask_may_stay_float32_beside_narrow_input() -> None:
    case = Case(dtype=torch.bfloat16, mask="tensor")
    given = tensors(case)
    given["mask"] = given["mask"].float()
    assert forward(case, given).dtype == torch.bfloat16


@pytest.mark.parametrize("noise", ["uniform", "normal", "waves"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_masks_equal_the_reference_bitwise(noise: str, shared: bool, dtype: torch.dtype | None) -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        written = OPS.perturbation_mask(torch.tensor(seed), 3, 7, 9, 10, shared, noise, dtype)
        expected = reference.OPERATORS["perturbation_mask"](torch.tensor(seed), 3, 7, 9, 10, shared, noise, dtype)
        assert written.dtype == (dtype or torch.float32)
        assert torch.equal(written, expected)


def test_masks_of_no_pixels() -> None:
    assert OPS.perturbation_mask(torch.tensor(1), 2, 3, 0, 4).shape == (2, 3, 0, 4)
    assert OPS.perturbation_mask(torch.tensor(1), 0, 3, 2, 4).shape == (0, 3, 2, 4)


@pytest.mark.parametrize("mask", ["seed", "shared seed"])
@pytest.mark.parametrize("norm", [None, "train"])
def test_a_seed_equals_its_masks_written_out(mask: str, norm: str | None) -> None:
    case = Case(mask=mask, masks=3, norm=norm, dtype=torch.float32)
    given = tensors(case)
    written = OPS.perturbation_mask(given["seed"], 3, 3, case.height, case.width, mask == "shared seed")
    as_tensor = given | {"seed": None, "mask": written}
    a, b = forward(case, given), forward(case, as_tensor)
    assert bits(*(a if norm else [a])) == bits(*(b if norm else [b]))


def test_seed_of_any_shape_with_one_element() -> None:
    case = Case()
    given = tensors(case)
    for shape in ((), (1,), (1, 1)):
        assert torch.equal(forward(case, given), forward(case, given | {"seed": given["seed"].reshape(shape)}))


# ---- shape functions ----


def result_layouts(results: object) -> list[tuple[object, ...]]:
    every = results if isinstance(results, (tuple, list)) else [results]
    return [(tuple(r.shape), r.stride(), r.dtype) for r in every]


@pytest.mark.parametrize("case", CASES + NORM_CASES, ids=ids(CASES + NORM_CASES))
def test_shape_functions_promise_what_comes(case: Case) -> None:
    given = tensors(case)
    result = forward(case, given)
    meta = {name: None if t is None else t.to("meta") for name, t in given.items()}
    # .to("meta") keeps dense layouts only, so strides are put back.
    meta["input"] = torch.empty_strided(given["input"].shape, given["input"].stride(), dtype=case.dtype, device="meta")
    assert result_layouts(result) == result_layouts(forward(case, meta))
    output = result[0] if case.norm else result
    count = 6 if case.norm else 4
    for wanted in ([True] * count, [False] * count, [i % 2 == 0 for i in range(count)]):
        if given["mask"] is None:
            wanted = [*wanted[:-1], False]
        arguments = backward_arguments(case, given, torch.ones_like(output), wanted)
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        on_meta[1] = meta["input"]
        real, fake = backward_operator(case)(*arguments), backward_operator(case)(*on_meta)
        assert result_layouts(real) == result_layouts(fake)
        assert [r.numel() > 0 or r.dim() > 1 for r in real] == [
            w and r.dim() > 0 and (r.numel() > 0 or r.dim() > 1) for w, r in zip(wanted, real)
        ]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 1, 1, 1), (1, 3, 1, 5), (2, 3, 1, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_output_layout_is_a_convolutions(shape: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(shape)
    if channels_last:
        x = torch.empty(shape, memory_format=torch.channels_last).copy_(x)
    y = OPS.perturb_conv2d(x, torch.randn(6, shape[1], 1, 1), mask=torch.zeros(1, 1, *shape[2:]))
    # An operator of PyTorch's own whose output follows suggest_memory_format of its input.
    like = torch.nn.functional.max_pool2d(torch.empty_strided(shape, x.stride()).zero_(), 1)
    expected = torch.empty(y.shape, memory_format=_fakes.suggest_memory_format(x))
    assert y.stride() == expected.stride()
    if 1 not in shape[1:]:
        assert (like.stride()[1] == 1) == (y.stride()[1] == 1) == channels_last


def test_layouts_do_not_change_the_bits() -> None:
    for norm in (None, "eval"):
        case = Case(dtype=torch.float32, masks=2, channels=5, height=6, width=7, norm=norm)
        given = tensors(case)
        results = [
            forward(case, given | {"input": laid_out(given["input"], layout)})
            for layout in ("contiguous", "channels_last", "sliced", "transposed")
        ]
        found = [bits(r[0] if norm else r) for r in results]
        assert all(other == found[0] for other in found)


def test_views_with_lazy_bits() -> None:
    case = Case()
    given = tensors(case)
    negative = torch.view_as_complex(torch.stack([-given["input"], -given["input"]], -1)).conj().imag
    assert negative.is_neg()
    assert torch.equal(forward(case, given | {"input": negative}), forward(case, given))


def test_tensors_may_alias() -> None:
    x = torch.randn(4, 4, 4, 4)
    weight = x.flatten()[:64].view(4, 16, 1, 1)
    y = OPS.perturb_conv2d(x, weight, x.flatten()[:4], x)
    assert torch.equal(y, OPS.perturb_conv2d(x.clone(), weight.clone(), x.flatten()[:4].clone(), x.clone()))


# ---- PyTorch's own checks of an operator ----

OPCHECK_CASES = [
    CASES[0], CASES[2], CASES[4], CASES[5], CASES[6], CASES[8], CASES[10], CASES[15],
    Case(dtype=torch.float32, weight_dtype=torch.bfloat16), Case(dtype=torch.bfloat16, mask="tensor"),
    *NORM_CASES[:6], NORM_CASES[7],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=ids(OPCHECK_CASES))
def test_opcheck_forward(case: Case) -> None:
    given = tensors(case)
    for name, tensor in given.items():
        if tensor is not None and tensor.is_floating_point() and not name.startswith("running"):
            given[name] = tensor.detach().requires_grad_()
    torch.library.opcheck(operator(case), (), given | options(case), atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=ids(OPCHECK_CASES))
def test_opcheck_backward(case: Case) -> None:
    given = tensors(case)
    output = forward(case, given)
    grad = torch.randn_like(output[0] if case.norm else output)
    wanted = [True] * (5 if case.norm else 3) + [given["mask"] is not None]
    torch.library.opcheck(backward_operator(case), backward_arguments(case, given, grad, wanted))


@pytest.mark.slow
def test_opcheck_mask() -> None:
    for dtype in (None, torch.bfloat16):
        torch.library.opcheck(OPS.perturbation_mask.default, (torch.tensor([3]), 3, 2, 4, 5, False, "waves", dtype))


def test_schemas_are_the_text_files() -> None:
    for schema in _library.schemas():
        name = schema.partition("(")[0]
        assert str(getattr(OPS, name).default._schema) == f"torch_pnn::{torch._C.parse_schema(schema)}"


# ---- promises about bits ----

# Large enough for more than one thread (small calls get none, csrc/torch/host.cpp), small enough that none of the
# tensors makes PyTorch itself use one: its own operators would hang in the forked child.
BIT_CASES = [
    Case(dtype=torch.float32, batch=20, channels=8, height=17, width=9, outputs=10, masks=3),
    Case(dtype=torch.bfloat16, batch=20, channels=8, height=17, width=9, outputs=10, mask="tensor"),
    Case(dtype=torch.float64, batch=20, channels=8, height=17, width=9, outputs=10, groups=2, layout="channels_last"),
    Case(dtype=torch.float32, batch=20, channels=8, height=17, width=9, outputs=10, norm="train", mask="tensor"),
]


def everything(case: Case) -> list[bytes]:
    """The bits of the output, the statistics and every gradient."""
    given = tensors(case)
    result = forward(case, given)
    results = list(result) if case.norm else [result]
    grad = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64).view(results[0].shape).to(results[0].dtype)
    wanted = [True] * (5 if case.norm else 3) + [given["mask"] is not None]
    return bits(*results, *backward_operator(case)(*backward_arguments(case, given, grad, wanted)))


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiled
@pytest.mark.parametrize("case", BIT_CASES, ids=ids(BIT_CASES))
def test_same_bits_for_every_thread_count(case: Case, restored_threads: None) -> None:
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(everything(case))
    assert all(other == found[0] for other in found)


@needs_compiled
@pytest.mark.parametrize("case", [*BIT_CASES[:3], dataclasses.replace(BIT_CASES[3], norm="eval")])
def test_same_bits_for_every_split_of_the_batch(case: Case) -> None:
    given = tensors(case)
    whole = forward(case, given)
    for split in (1, 2, 4):
        parts = [forward(case, given | {"input": part}) for part in given["input"].split(split)]
        if case.norm:
            assert bits(whole[0]) == bits(torch.cat([part[0] for part in parts]))
        else:
            assert bits(whole) == bits(torch.cat(parts))


def test_many_threads_at_once() -> None:
    expected = [everything(case) for case in BIT_CASES]
    start = threading.Barrier(8)

    def work(number: int) -> bool:
        start.wait()
        order = [(number + i) % len(BIT_CASES) for i in range(3 * len(BIT_CASES))]
        return all(everything(BIT_CASES[i]) == expected[i] for i in order)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@needs_compiled
def test_a_forked_child_computes_the_same_bits(restored_threads: None) -> None:
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)  # the parent's pool is up
    expected = [everything(case) for case in BIT_CASES]
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if [everything(case) for case in BIT_CASES] == expected else 1)
        finally:
            os._exit(2)
    deadline = threading.Event()
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        deadline.wait(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


def test_inference_mode() -> None:
    case = Case(norm="train")
    given = tensors(case)
    expected = forward(case, given)
    with torch.inference_mode():
        inside = forward(case, given)
        assert inside[0].is_inference()
        fresh = {name: None if t is None else t.clone() for name, t in given.items()}
        again = forward(case, fresh)
    assert bits(*expected) == bits(*inside) == bits(*again)


def test_running_statistics_are_copied_in_evaluation() -> None:
    case = Case(norm="eval")
    given = tensors(case)
    _, mean, variance = forward(case, given)
    assert torch.equal(mean, given["running_mean"]) and torch.equal(variance, given["running_var"])
    assert mean.data_ptr() != given["running_mean"].data_ptr()
    assert variance.data_ptr() != given["running_var"].data_ptr()


@needs_compiled
def test_arguments_are_freed() -> None:
    case = Case(norm="train", batch=1)
    given = tensors(case)
    statm = Path("/proc/self/statm")

    def calls(count: int) -> int:
        for _ in range(count):
            forward(case, given)
            with pytest.raises(RuntimeError):
                OPS.perturb_conv2d(given["input"], given["weight"], noise="x" * 5000, seed=given["seed"])
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    first = calls(300)
    assert calls(3000) - first < 4 << 20, "3000 calls keep memory that 300 did not"


def test_status_names_what_runs() -> None:
    status = _library.status()
    assert status.torch_version == torch.__version__
    assert status.isa in (("avx512", "avx2", "neon", "portable") if status.ops == "loaded" else ("none",))
    assert status.cuda == "loaded" or status.cuda.startswith(("not built", "not loaded: "))
