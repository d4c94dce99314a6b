"""`torch_pnn.functional` on the registered operators: against the reference in float64, and what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from torch_pnn import functional, reference

ACTIVATIONS = list(reference.ACTIVATIONS)
CASES = list(itertools.product((1, 2), (False, True), ((1, 1), (2, 3)), ("tensor", *reference.NOISES)))


def arguments(groups, shared, source, masks=3, channels=4, outputs=6, size=(5, 7), dtype=torch.float64):
    def tensor(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    tensors = [tensor(2, channels, *size), tensor(outputs, channels // groups * masks, 1, 1), tensor(outputs)]
    if source == "tensor":
        tensors.append(tensor(1 if shared else channels, masks, *size))
        return tensors, {"groups": groups}
    return tensors, {"groups": groups, "seed": 77, "masks": masks, "shared_masks": shared, "noise": source}


def call(function, tensors, options):
    if len(tensors) == 4:
        options = options | {"mask": tensors[3]}
    return function(*tensors[:3], **options)


@pytest.mark.parametrize(("groups", "shared", "stride", "source"), CASES)
def test_equals_the_reference(groups, shared, stride, source):
    tensors, options = arguments(groups, shared, source)
    for activation in ACTIVATIONS:
        settings = options | {"stride": stride, "level": 0.7, "activation": activation}
        y = call(functional.perturb_conv2d, tensors, settings)
        expected = call(reference.perturb_conv2d, tensors, settings)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, tensors, g)
        torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, g), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("groups", "shared", "stride", "source"), CASES)
def test_norm_equals_the_reference(groups, shared, stride, source, training):
    tensors, options = arguments(groups, shared, source)
    gamma, beta = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.1
    theirs = tuple(statistic.clone() for statistic in ours)
    if len(tensors) == 4:
        options = options | {"mask": tensors[3]}
    for activation in ("relu", "gelu", "hardtanh"):
        settings = options | {"stride": stride, "level": 0.7, "activation": activation, "training": training}
        y = functional.perturb_norm_conv2d(*tensors[:3], gamma, beta, *ours, **settings)
        expected = reference.perturb_norm_conv2d(*tensors[:3], gamma, beta, *theirs, **settings)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        leaves = [*tensors, gamma, beta]
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, g)
        torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, g), rtol=1e-9, atol=1e-9)


def test_norm_in_eval_leaves_the_statistics():
    tensors, options = arguments(1, False, "uniform")
    mean, variance = torch.zeros(12, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    functional.perturb_norm_conv2d(*tensors, None, None, mean, variance, training=False, **options)
    assert bool((mean == 0).all()) and bool((variance == 1).all())


def test_norm_of_nothing_leaves_the_statistics():
    mean, variance = torch.full((3,), 5.0), torch.full((3,), 7.0)
    x, weight = torch.empty(0, 3, 4, 4), torch.randn(2, 3, 1, 1)
    y = functional.perturb_norm_conv2d(x, weight, None, None, None, mean, variance, training=True, seed=1)
    assert y.shape == (0, 2, 4, 4)
    assert mean.tolist() == [5] * 3 and variance.tolist() == [7] * 3


def test_norm_converts_statistics_of_other_types():
    x, weight = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 1, 1).bfloat16()
    statistics = [torch.rand(3).bfloat16().requires_grad_(i < 2) for i in range(4)]
    y = functional.perturb_norm_conv2d(x, weight, None, *statistics, training=False, seed=1)
    expected = functional.perturb_norm_conv2d(
        x, weight, None, *(s.detach().float() for s in statistics), training=False, seed=1
    )
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(s.grad.dtype == torch.bfloat16 for s in statistics[:2])
    before = statistics[2].clone()
    functional.perturb_norm_conv2d(x, weight, None, *statistics, training=True, seed=1)
    assert statistics[2].dtype == torch.bfloat16 and not torch.equal(statistics[2], before)


def test_images_without_a_batch():
    x, weight, bias = torch.randn(3, 5, 6), torch.randn(4, 6, 1, 1), torch.randn(4)
    mask = torch.randn(3, 2, 5, 6)
    y = functional.perturb_conv2d(x, weight, bias, mask=mask)
    assert torch.equal(y, functional.perturb_conv2d(x.unsqueeze(0), weight, bias, mask=mask)[0])
    y = functional.perturb_norm_conv2d(x, weight, bias, None, None, None, None, training=True, mask=mask, stride=2)
    assert y.shape == (4, 3, 3)


@pytest.mark.parametrize("stride", [2, (2,), [2, 2], (2, 2)])
def test_strides_may_be_one_int(stride):
    x, weight = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 1, 1)
    expected = functional.perturb_conv2d(x, weight, seed=1)[:, :, ::2, ::2]
    torch.testing.assert_close(functional.perturb_conv2d(x, weight, seed=1, stride=stride), expected)


def test_seeds_as_ints_and_tensors():
    x, weight = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 1, 1)
    for given, same in ((2**64 - 1, -1), (2**63, -(2**63)), (5, torch.tensor([5])), (5, torch.tensor(5))):
        assert torch.equal(
            functional.perturb_conv2d(x, weight, seed=given), functional.perturb_conv2d(x, weight, seed=same)
        )
    assert not torch.equal(functional.perturb_conv2d(x, weight, seed=1), functional.perturb_conv2d(x, weight, seed=2))


def test_no_perturbation():
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(4, 6, 1, 1)
    y = functional.perturb_conv2d(x, weight, noise=None, masks=2)
    torch.testing.assert_close(y, F.conv2d(x.relu().repeat_interleave(2, 1), weight))
    torch.testing.assert_close(y, functional.perturb_conv2d(x, weight, seed=1, masks=2, level=0.0))


def test_level_scales_the_mask():
    x, weight, mask = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 1, 1), torch.randn(3, 1, 5, 6)
    y = functional.perturb_conv2d(x, weight, mask=mask, level=0.25)
    assert torch.equal(y, functional.perturb_conv2d(x, weight, mask=0.25 * mask))
    assert torch.equal(
        functional.perturb_conv2d(x, weight, mask=mask), functional.perturb_conv2d(x + mask[:, 0], weight, noise=None)
    )


@pytest.mark.parametrize("size", [(0, 4, 5, 4), (2, 4, 0, 4), (2, 4, 5, 0), (2, 0, 5, 4), (2, 4, 1, 1)])
def test_sizes_of_nothing_and_one(size):
    x = torch.randn(size, requires_grad=True)
    weight, bias = torch.randn(6, size[1] * 2, 1, 1, requires_grad=True), torch.ones(6, requires_grad=True)
    y = functional.perturb_conv2d(x, weight, bias, seed=1, masks=2)
    assert y.shape == (size[0], 6, *size[2:])
    y.sum().backward()
    expected = reference.perturb_conv2d(x, weight, bias, seed=1, masks=2)
    torch.testing.assert_close(y, expected)
    assert bias.grad.tolist() == [size[0] * size[2] * size[3]] * 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_out_where_the_composition_has_them(activation, value):
    x = torch.zeros(1, 2, 1, 3)
    x[0, 1, 0, 1] = value
    weight = torch.randn(2, 2, 1, 1)
    y = functional.perturb_conv2d(x, weight, seed=1, level=0.1, activation=activation)
    expected = reference.perturb_conv2d(x.double(), weight.double(), seed=1, level=0.1, activation=activation)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_inputs_are_left_alone():
    tensors, options = arguments(1, False, "tensor", dtype=torch.float32)
    copies = [tensor.detach().clone() for tensor in tensors]
    y = call(functional.perturb_conv2d, tensors, options)
    y.sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_channels_last_is_kept():
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = functional.perturb_conv2d(x, torch.randn(3, 4, 1, 1), seed=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def scripted(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    seed: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
):
    y = functional.perturb_conv2d(x, weight, mask=mask, level=0.5, stride=2)
    y = y + functional.perturb_conv2d(x, weight, None, seed=seed, masks=2, noise="waves", stride=(2, 2))
    y = y + functional.perturb_conv2d(x, weight, seed=3, masks=2, activation="gelu", stride=2)
    y = y + functional.perturb_conv2d(x, weight, noise=None, masks=2, stride=2)
    return y + functional.perturb_norm_conv2d(
        x, weight, None, None, None, mean, variance, training=True, seed=seed, masks=2, stride=2
    )


@pytest.mark.parametrize("way", ["script", "compile"])
def test_scripts_and_compiles(way):
    x, weight = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(4, 6, 1, 1)
    mask, seed = torch.randn(3, 2, 5, 6), torch.tensor([9])
    results = []
    transformed = (
        torch.jit.script(scripted) if way == "script" else torch.compile(scripted, fullgraph=True, backend="aot_eager")
    )
    for function in (scripted, transformed):
        mean, variance = torch.zeros(6), torch.ones(6)
        y = function(x, weight, mask, seed, mean, variance)
        results.append((y, mean, variance, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(results[0], results[1])


def good():
    return {
        "input": torch.randn(2, 4, 5, 6),
        "weight": torch.randn(3, 8, 1, 1),
        "bias": torch.randn(3),
        "seed": 1,
        "masks": 2,
    }


BAD = [
    ({"input": [1.0]}, TypeError, "input is list, it should be a tensor"),
    ({"input": torch.zeros(4, 5)}, ValueError, r"input has .*should"),
    ({"input": torch.zeros(1, 1, 4, 5, 6)}, ValueError, r"input has .*should"),
    ({"input": torch.zeros(2, 4, 5, 6).int()}, TypeError, "input has type int32|input has type torch.int32"),
    ({"input": torch.zeros(2, 4, 5, 6, dtype=torch.complex64)}, TypeError, "input has type"),
    ({"input": torch.randn(2, 3, 5, 6)}, ValueError, "weight has size"),
    ({"weight": None}, TypeError, "weight is NoneType, it should be a tensor"),
    ({"weight": torch.randn(3, 8, 1, 1).double()}, TypeError, "weight has type"),
    ({"weight": torch.randn(3, 8)}, ValueError, "weight has"),
    ({"weight": torch.randn(3, 8, 3, 3)}, ValueError, "weight has size"),
    ({"bias": torch.randn(4)}, ValueError, "bias has size"),
    ({"bias": torch.randn(3).double()}, TypeError, "bias has type"),
    ({"bias": True}, TypeError, "bias is bool, it should be a tensor or None"),
    ({"seed": None}, ValueError, "mask and seed are both None"),
    ({"mask": torch.zeros(4, 2, 5, 6)}, ValueError, "mask and seed are both given"),
    ({"noise": None}, ValueError, "seed is given, it should be None where noise is None"),
    ({"seed": None, "mask": torch.zeros(4, 2, 5, 6), "noise": None}, ValueError, "mask is given"),
    ({"seed": True}, TypeError, "seed is bool"),
    ({"seed": 1.5}, TypeError, "seed is float"),
    ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
    ({"seed": torch.zeros(1)}, TypeError, "seed has type torch.float32, it should be int64"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed has size \[2\]"),
    ({"seed": None, "mask": torch.zeros(4, 2, 1, 1)}, ValueError, "mask has size"),
    ({"seed": None, "mask": torch.zeros(4, 2, 5, 7)}, ValueError, "mask has size"),
    ({"seed": None, "mask": torch.zeros(2, 2, 5, 6)}, ValueError, "mask has size"),
    ({"seed": None, "mask": torch.zeros(2, 5, 6)}, ValueError, "mask has"),
    ({"seed": None, "mask": torch.zeros(4, 2, 5, 6).half()}, TypeError, "mask has type"),
    ({"masks": 0}, ValueError, "masks is 0"),
    ({"masks": 2.0}, TypeError, "masks is float"),
    ({"masks": 3}, ValueError, "weight has size"),
    ({"noise": "pink"}, ValueError, "noise is 'pink', it should be"),
    ({"noise": 3}, TypeError, "noise is int"),
    ({"level": math.inf}, ValueError, "level is inf, it should be finite"),
    ({"level": "1"}, TypeError, "level is str"),
    ({"activation": "swish"}, ValueError, "activation is 'swish', it should be one of"),
    ({"activation": None}, TypeError, "activation is NoneType"),
    ({"stride": 0}, ValueError, "stride"),
    ({"stride": (1, -1)}, ValueError, "stride"),
    ({"stride": (1, 1, 1)}, ValueError, "stride"),
    ({"stride": 1.0}, TypeError, "stride is 1.0, it should be one int or two"),
    ({"groups": 0}, ValueError, "groups is 0"),
    ({"groups": 3}, ValueError, "groups is 3"),
    ({"shared_masks": "yes"}, TypeError, "shared_masks is str"),
]


@pytest.mark.parametrize(("changed", "error", "sentence"), BAD)
def test_bad_input(changed, error, sentence):
    options = good() | changed
    with pytest.raises(error, match=sentence):
        functional.perturb_conv2d(**options)
    with pytest.raises(error, match=sentence):
        functional.perturb_norm_conv2d(
            **options, norm_weight=None, norm_bias=None, running_mean=None, running_var=None, training=True
        )


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"norm_weight": torch.ones(7)}, ValueError, "norm_weight has size"),
        ({"norm_weight": 1.0}, TypeError, "norm_weight is float"),
        ({"norm_bias": torch.ones(1, 8)}, ValueError, "norm_bias has"),
        ({"running_mean": torch.ones(7)}, ValueError, r"running_mean has size \[7\], it should be \[8\]"),
        ({"running_var": torch.ones(8).int()}, TypeError, "running_var has type"),
        ({"training": False}, ValueError, "running_mean is None"),
        ({"training": False, "running_mean": torch.zeros(8)}, ValueError, "running_var is None"),
        ({"training": 1.5}, TypeError, "training is float"),
        ({"eps": -1.0}, ValueError, "eps is -1"),
        ({"eps": math.nan}, ValueError, "eps is nan"),
        ({"momentum": None}, TypeError, "momentum is NoneType"),
        ({"input": torch.randn(1, 4, 1, 1)}, ValueError, "one value"),
    ],
)
def test_bad_norm_input(changed, error, sentence):
    statistics = {"running_mean": None, "running_var": None, "training": True}
    options = good() | {"norm_weight": None, "norm_bias": None} | statistics | changed
    with pytest.raises(error, match=sentence):
        functional.perturb_norm_conv2d(**options)


def test_a_refused_call_leaves_the_statistics():
    mean, variance = torch.zeros(8), torch.ones(8)
    with pytest.raises(ValueError, match="activation"):
        functional.perturb_norm_conv2d(
            **good(),
            norm_weight=None,
            norm_bias=None,
            running_mean=mean,
            running_var=variance,
            training=True,
            activation="swish",
        )
    assert bool((mean == 0).all()) and bool((variance == 1).all())


def test_too_little_memory_is_said():
    x = torch.zeros(1).expand(2**43, 1, 1, 1)
    with pytest.raises(torch.OutOfMemoryError, match="35184372088832 bytes"):
        functional.perturb_conv2d(x, torch.ones(1, 1, 1, 1), seed=1)


def test_meta_tensors_are_shaped_and_checked():
    x, weight = torch.empty(2, 4, 5, 6, device="meta"), torch.empty(3, 8, 1, 1, device="meta")
    assert functional.perturb_conv2d(x, weight, seed=1, masks=2, stride=2).shape == (2, 3, 3, 3)
    with pytest.raises(ValueError, match="weight has size"):
        functional.perturb_conv2d(x, weight, seed=1)
