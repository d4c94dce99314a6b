"""Wrong calls of the registered operators: each is refused with a sentence that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operators_support import OPS, needs_compiled

pytestmark = needs_compiled


def plain() -> dict[str, Any]:
    return {
        "input": torch.zeros(2, 4, 5, 6),
        "weight": torch.zeros(8, 4, 1, 1),
        "bias": torch.zeros(8),
        "mask": torch.zeros(4, 2, 5, 6),
        "masks": 2,
        "groups": 2,
    }


def norm(training: bool = True) -> dict[str, Any]:
    return plain() | {
        "norm_weight": torch.ones(8),
        "norm_bias": torch.zeros(8),
        "running_mean": torch.zeros(8),
        "running_var": torch.ones(8),
        "training": training,
    }


def by_seed(**changes: Any) -> dict[str, Any]:
    return {"mask": None, "seed": torch.tensor([1])} | changes


def test_the_calls_are_right_without_changes() -> None:
    assert OPS.perturb_conv2d(**plain()).shape == (2, 8, 5, 6)
    assert OPS.perturb_norm_conv2d(**norm())[0].shape == (2, 8, 5, 6)
    assert OPS.perturb_norm_conv2d(**norm(False))[0].shape == (2, 8, 5, 6)


WRONG = [
    ({"input": torch.zeros(4, 5, 6)}, r"input has size \[4, 5, 6\], it should have 4 dimensions"),
    ({"input": torch.zeros(5)}, r"input has size \[5\], it should have 4 dimensions"),
    ({"input": torch.zeros(1, 2, 4, 5, 6)}, r"input has size .* it should have 4 dimensions"),
    ({"input": torch.zeros(2, 3, 5, 6)}, r"groups is 2, it should divide the input's 3 channels"),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.int64)}, r"input has type int64, it should be float32"),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.complex64)}, r"input has type complex64"),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.bool)}, r"input has type bool"),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.uint16)}, r"input has type uint16, it should be float32"),
    ({"input": torch.zeros(2, 4, 5, 6).to(torch.float8_e5m2)}, r"input has type float8_e5m2, it should be float32"),
    ({"input": torch.zeros(2, 4, 5, 6).to_sparse()}, r"input is sparse or opaque, it should be dense .* to_dense\(\)"),
    ({"input": torch.zeros(2, 4, 5, 6).to_mkldnn()}, r"input is sparse or opaque, it should be dense .* to_dense\(\)"),
    ({"input": torch.zeros(2, 4, 5, 6).to_sparse_csr()}, r"input is sparse or opaque, it should be dense"),
    ({"input": torch.nested.nested_tensor([torch.zeros(4, 5, 6)] * 2)}, r"input is a nested tensor, it should be"),
    (
        {"input": torch.quantize_per_tensor(torch.zeros(2, 4, 5, 6), 1.0, 0, torch.quint8)},
        r"input is quantized \(quint8\), it should be float32, .*: call dequantize\(\) on it",
    ),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.float64)}, r"weight has type float32, it should be .*float64"),
    ({"weight": torch.zeros(8, 4)}, r"weight has size \[8, 4\], it should have 4 dimensions"),
    ({"weight": torch.zeros(8, 8, 1, 1)}, r"weight has size \[8, 8, 1, 1\], it should be \[8, 4, 1, 1\]"),
    ({"weight": torch.zeros(8, 4, 3, 3)}, r"weight has size \[8, 4, 3, 3\], it should be"),
    ({"weight": torch.zeros(7, 4, 1, 1)}, r"groups is 2, it should divide .* the weight's 7 outputs"),
    ({"weight": torch.zeros(8, 4, 1, 1).to_sparse()}, r"weight is sparse or opaque"),
    ({"weight": torch.zeros(8, 4, 1, 1, dtype=torch.float64)}, r"weight has type float64, it should be .*float32"),
    ({"bias": torch.zeros(1)}, r"bias has size \[1\], it should be \[8\]"),
    ({"bias": torch.zeros(8, 1)}, r"bias has size \[8, 1\], it should have 1 dimension$"),
    ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, r"bias has type bfloat16, it should be float32"),
    ({"mask": torch.zeros(4, 2, 1, 1)}, r"mask has size \[4, 2, 1, 1\], it should be \[4, 2, 5, 6\]"),
    ({"mask": torch.zeros(2, 2, 5, 6)}, r"mask has size \[2, 2, 5, 6\], it should be \[4, 2, 5, 6\]"),
    ({"mask": torch.zeros(4, 5, 6)}, r"mask has size \[4, 5, 6\], it should have 4 dimensions"),
    ({"mask": torch.zeros(4, 3, 5, 6)}, r"weight has size \[8, 4, 1, 1\], it should be \[8, 6, 1, 1\]"),
    ({"mask": torch.zeros(4, 2, 5, 6, dtype=torch.float16)}, r"mask has type float16, it should be float32"),
    ({"seed": torch.tensor([1])}, r"mask and seed are both given, it should be one of them"),
    (by_seed(seed=torch.tensor([1, 2])), r"seed is int64 of size \[2\], it should be one int64"),
    (by_seed(seed=torch.tensor([], dtype=torch.int64)), r"seed is int64 of size \[0\], it should be one int64"),
    (by_seed(seed=torch.tensor([1], dtype=torch.int32)), r"seed is int32 of size \[1\], it should be one int64"),
    (by_seed(seed=torch.tensor(1.0)), r"seed is float32 of size \[\], it should be one int64"),
    (by_seed(noise="gaussian"), r"noise is 'gaussian', it should be one of uniform, normal, waves"),
    (by_seed(masks=0), r"masks is 0, it should be at least 1"),
    (by_seed(masks=-1), r"masks is -1, it should be at least 1"),
    (by_seed(masks=2**62), r"masks is 4611686018427387904, with 4 channels this exceeds"),
    ({"activation": "mish"}, r"activation is 'mish', it should be one of identity, relu, .*, hardtanh"),
    ({"level": float("nan")}, r"level is -?nan, it should be finite"),
    ({"level": float("inf")}, r"level is inf, it should be finite"),
    ({"stride": [0, 1]}, r"stride\[0\] is 0, it should be at least 1"),
    ({"stride": [1, -2]}, r"stride\[1\] is -2, it should be at least 1"),
    ({"stride": []}, r"stride has 0 values, it should have one or two"),
    ({"stride": [1, 1, 1]}, r"stride has 3 values, it should have one or two"),
    ({"groups": 0}, r"groups is 0, it should be at least 1"),
    ({"groups": 3}, r"groups is 3, it should divide the input's 4 channels"),
]


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_both_layers_refuse(changes: dict[str, Any], message: str, recorded: bool) -> None:
    for op, arguments in ((OPS.perturb_conv2d, plain()), (OPS.perturb_norm_conv2d, norm())):
        arguments |= changes
        if recorded:
            weight = arguments["weight"]
            arguments["weight"] = weight.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=rf"^torch_pnn(::\w+)?: {message}"):
            op(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_weight": torch.ones(4)}, r"norm_weight has size \[4\], it should be \[8\]"),
        ({"norm_bias": torch.ones(8, dtype=torch.bfloat16)}, r"norm_bias has type bfloat16, it should be float32"),
        ({"running_mean": None}, r"running_mean is None, it should be given when training is False"),
        ({"running_var": None}, r"running_var is None, it should be given when training is False"),
        ({"running_mean": torch.zeros(3)}, r"running_mean has size \[3\], it should be \[8\]"),
        ({"running_var": torch.zeros(8).double()}, r"running_var has type float64, it should be float32"),
        ({"eps": -1.0}, r"eps is -1, it should be finite and not negative"),
        ({"eps": float("nan")}, r"eps is -?nan, it should be finite and not negative"),
    ],
)
def test_the_layer_with_normalisation_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^torch_pnn::perturb_norm_conv2d: {message}"):
        OPS.perturb_norm_conv2d(**(norm(False) | changes))


def test_training_on_one_value_a_map() -> None:
    arguments = norm() | {"input": torch.zeros(1, 4, 1, 1), "mask": torch.zeros(4, 2, 1, 1)}
    with pytest.raises(RuntimeError, match="input has one value per channel to normalise over"):
        OPS.perturb_norm_conv2d(**arguments)
    strided = norm() | {"input": torch.zeros(1, 4, 5, 6), "stride": [5, 6]}
    with pytest.raises(RuntimeError, match="input has one value per channel to normalise over"):
        OPS.perturb_norm_conv2d(**strided)


def backward(**changes: Any) -> Any:
    arguments = plain() | {
        "grad_output": torch.zeros(2, 8, 5, 6),
        "seed": None,
        "shared_masks": False,
        "noise": "uniform",
        "level": 1.0,
        "activation": "relu",
        "stride": [1, 1],
        "output_mask": [True] * 4,
    }
    del arguments["bias"]
    return OPS._perturb_conv2d_backward(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_output": torch.zeros(2, 8, 5, 5)}, r"grad_output has size \[2, 8, 5, 5\], it should be \[2, 8, 5, 6\]"),
        ({"grad_output": torch.zeros(8, 5, 6)}, r"grad_output has size \[8, 5, 6\], it should have 4 dimensions"),
        ({"grad_output": torch.zeros(2, 8, 5, 6).double()}, r"grad_output has type float64, it should be float32"),
        ({"output_mask": [True] * 3}, r"output_mask has 3 values, it should have 4|List with 3 elements"),
        ({"output_mask": [True] * 5}, r"output_mask has 5 values, it should have 4|List with 5 elements"),
        ({"mask": None}, r"output_mask asks for the gradient of mask, which is None, it should be False there"),
    ],
)
def test_backward_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        backward(**changes)


def test_backward_is_right_without_changes() -> None:
    assert [g.shape[0] for g in backward()] == [2, 8, 8, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor(1.5), 2, 1, 3, 3), r"seed is float32 of size \[\], it should be one int64"),
        ((torch.tensor([1, 2]), 2, 1, 3, 3), r"seed is int64 of size \[2\], it should be one int64"),
        ((torch.tensor(1), -2, 1, 3, 3), r"channels is -2, it should not be negative"),
        ((torch.tensor(1), 2, -1, 3, 3), r"masks is -1, it should not be negative"),
        ((torch.tensor(1), 2, 1, -3, 3), r"height is -3, it should not be negative"),
        ((torch.tensor(1), 2, 1, 3, -3), r"width is -3, it should not be negative"),
        ((torch.tensor(1), 2, 1, 3, 3, False, "pink"), r"noise is 'pink', it should be one of"),
        ((torch.tensor(1), 2, 1, 3, 3, False, "waves", torch.int8), r"dtype is int8, it should be float32"),
        ((torch.tensor(1), 2**40, 1, 2**20, 2**20), r"exceeds what can be addressed"),
    ],
)
def test_masks_refuse(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^torch_pnn::perturbation_mask: .*{message}"):
        OPS.perturbation_mask(*arguments)


def test_out_of_memory_is_an_error() -> None:
    huge = torch.zeros(1).expand(2**10, 1, 2**17, 2**17)
    with pytest.raises(RuntimeError, match=r"torch_pnn::perturb_conv2d: out of memory: .* no 70368744177664 bytes"):
        OPS.perturb_conv2d(huge, torch.zeros(1, 1, 1, 1), seed=torch.tensor([1]))
    with pytest.raises(RuntimeError, match="torch_pnn::perturbation_mask: out of memory"):
        OPS.perturbation_mask(torch.tensor(1), 2**10, 1, 2**17, 2**17)


def test_sizes_beyond_addresses_are_an_error() -> None:
    beyond = torch.zeros(1).expand(2**31, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match="exceeds what can be addressed"):
        OPS.perturb_conv2d(beyond, torch.zeros(8, 1, 1, 1), seed=torch.tensor([1]))


@pytest.mark.parametrize("name", ["weight", "bias", "mask"])
def test_tensors_on_different_devices(name: str) -> None:
    arguments = plain()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match="input is on cpu, all tensors should be on the same device"):
        OPS.perturb_conv2d(**arguments)
    moments = norm()
    moments["running_mean"] = moments["running_mean"].to("meta")
    with pytest.raises(RuntimeError, match="input is on cpu, all tensors should be on the same device"):
        OPS.perturb_norm_conv2d(**moments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(4, 5, 6)}, "input has 3 dimensions"),
        ({"input": torch.zeros(2, 4, 5, 6).int()}, "input has type torch.int32"),
        ({"weight": torch.zeros(8, 3, 1, 1)}, "weight has size"),
        ({"weight": torch.zeros(8, 4, 1, 1).double()}, "weight has type"),
        ({"mask": torch.zeros(4, 2, 1, 1)}, "mask has size"),
        ({"mask": torch.zeros(3, 2, 5, 6)}, "mask has size"),
        ({"mask": torch.zeros(4, 5, 6)}, "mask has 3 dimensions"),
        ({"mask": torch.zeros(4, 2, 5, 6).half()}, "mask has type"),
        ({"seed": torch.zeros(1).long()}, "mask and seed are both given"),
        ({"groups": 3}, "groups is 3"),
        ({"stride": [0, 0]}, r"stride is \[0, 0\]"),
        (by_seed(masks=0), "masks is 0"),
    ],
)
def test_shape_functions_refuse(changes: dict[str, Any], message: str) -> None:
    arguments = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in (plain() | changes).items()}
    with pytest.raises(RuntimeError, match=message):
        OPS.perturb_conv2d(**arguments)
