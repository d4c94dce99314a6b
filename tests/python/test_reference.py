"""The reference itself: against sums written out as loops, and its gradients against autograd."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from torch_pnn import reference

DOUBLE = torch.float64
ACTIVATIONS = list(reference.ACTIVATIONS)


def scalar_activation(name, u):
    """The activation of one number, from its formula."""
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    return {
        "identity": lambda: u,
        "relu": lambda: max(u, 0.0),
        "leaky_relu": lambda: u if u > 0 else 0.01 * u,
        "elu": lambda: u if u > 0 else math.expm1(u),
        "selu": lambda: scale * (u if u > 0 else alpha * math.expm1(u)),
        "gelu": lambda: u * 0.5 * (1 + math.erf(u / math.sqrt(2))),
        "silu": lambda: u / (1 + math.exp(-u)),
        "tanh": lambda: math.tanh(u),
        "sigmoid": lambda: 1 / (1 + math.exp(-u)),
        "hardtanh": lambda: min(max(u, -1.0), 1.0),
    }[name]()


def looped(x, weight, bias, mask, level, activation, stride, groups):
    """The layer's formula as loops over numbers."""
    batch, _, height, width = x.shape
    outputs, columns = weight.shape[:2]
    masks = mask.shape[1]
    rows, cols = math.ceil(height / stride[0]), math.ceil(width / stride[1])
    y = torch.empty(batch, outputs, rows, cols, dtype=DOUBLE)
    for b, t, i, j in itertools.product(range(batch), range(outputs), range(rows), range(cols)):
        group = t // (outputs // groups)
        total = bias[t].item()
        for column in range(columns):
            k = group * columns + column
            c, m = divmod(k, masks)
            row, col = i * stride[0], j * stride[1]
            n = mask[0 if mask.shape[0] == 1 else c, m, row, col].item()
            u = x[b, c, row, col].item() + level * n
            total += weight[t, column, 0, 0].item() * scalar_activation(activation, u)
        y[b, t, i, j] = total
    return y


def layer_arguments(groups=1, shared=False, masks=2, channels=4, outputs=6, size=(5, 4), batch=2, grad=False):
    def tensor(*shape):
        return torch.randn(*shape, dtype=DOUBLE, requires_grad=grad)

    x = tensor(batch, channels, *size)
    weight, bias = tensor(outputs, channels // groups * masks, 1, 1), tensor(outputs)
    return x, weight, bias, tensor(1 if shared else channels, masks, *size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_is_its_formula_for_every_activation(activation):
    x, weight, bias, mask = layer_arguments()
    y = reference.perturb_conv2d(x, weight, bias, mask=mask, level=0.3, activation=activation)
    torch.testing.assert_close(y, looped(x, weight, bias, mask, 0.3, activation, (1, 1), 1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3), (5, 1)])
def test_layer_is_its_formula_for_every_geometry(groups, shared, stride):
    x, weight, bias, mask = layer_arguments(groups, shared)
    y = reference.perturb_conv2d(x, weight, bias, mask=mask, level=0.3, stride=stride, groups=groups)
    torch.testing.assert_close(y, looped(x, weight, bias, mask, 0.3, "relu", stride, groups))


def test_seed_means_its_masks_and_neither_means_none():
    x, weight, bias, _ = layer_arguments(masks=3)
    for noise, shared in itertools.product(reference.NOISES, (False, True)):
        mask = reference.perturbation_mask(5, 4, 3, 5, 4, noise=noise, shared_masks=shared)
        given = reference.perturb_conv2d(x, weight, bias, mask=mask, level=0.2)
        seeded = reference.perturb_conv2d(x, weight, bias, seed=5, masks=3, noise=noise, shared_masks=shared, level=0.2)
        assert torch.equal(given, seeded)
    none = reference.perturb_conv2d(x, weight, bias, masks=3)
    assert torch.equal(none, reference.perturb_conv2d(x, weight, bias, mask=torch.zeros(4, 3, 5, 4)))


def composition(x, weight, bias, gamma, beta, mask, level, activation, stride, groups, running=None, eps=1e-5):
    """The layer with normalisation, of PyTorch's own functions."""
    u = (x.unsqueeze(2) + level * mask)[:, :, :, :: stride[0], :: stride[1]].flatten(1, 2)
    a = reference.ACTIVATIONS[activation](u)
    mean, var = running if running is not None else (None, None)
    a = F.batch_norm(a, mean, var, gamma, beta, running is None, 0.1, eps)
    return F.conv2d(a, weight, bias, groups=groups)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_norm_layer_equals_the_composition(groups, shared, stride, training, activation):
    x, weight, bias, mask = layer_arguments(groups, shared)
    gamma, beta, mean = (torch.randn(8, dtype=DOUBLE) for _ in range(3))
    variance = torch.rand(8, dtype=DOUBLE) + 0.1
    y = reference.perturb_norm_conv2d(
        x,
        weight,
        bias,
        gamma,
        beta,
        mean.clone(),
        variance.clone(),
        training=training,
        mask=mask,
        level=0.3,
        activation=activation,
        stride=stride,
        groups=groups,
    )
    running = None if training else (mean, variance)
    expected = composition(x, weight, bias, gamma, beta, mask, 0.3, activation, stride, groups, running)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("pixels", [0, 2, 20])
def test_running_statistics_move_as_batch_norm_moves_them(pixels):
    x = torch.randn(pixels // 2, 3, 2, 1, dtype=DOUBLE)
    weight = torch.randn(2, 3, 1, 1, dtype=DOUBLE)
    mean, variance = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE)
    expected = mean.clone(), variance.clone()
    if pixels:
        F.batch_norm(x.relu(), *expected, training=True, momentum=0.3)
    reference.perturb_norm_conv2d(x, weight, None, None, None, mean, variance, training=True, momentum=0.3)
    torch.testing.assert_close((mean, variance), expected)


GRADIENT_CASES = list(itertools.product((1, 2), (False, True), ((1, 1), (2, 3))))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("groups", "shared", "stride"), GRADIENT_CASES)
def test_backward_equals_autograd(groups, shared, stride, activation):
    x, weight, bias, mask = layer_arguments(groups, shared, masks=3, size=(5, 7), grad=True)
    options = {"level": 0.3, "activation": activation, "stride": stride, "groups": groups}
    y = reference.perturb_conv2d(x, weight, bias, mask=mask, **options)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias, mask), g)
    backward = reference.OPERATORS["_perturb_conv2d_backward"]
    found = backward(g, x, weight, mask, None, 1, False, "uniform", 0.3, activation, stride, groups, [True] * 4)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "tanh", "hardtanh"])
@pytest.mark.parametrize(("groups", "shared", "stride"), GRADIENT_CASES)
def test_norm_backward_equals_autograd(groups, shared, stride, activation, training):
    x, weight, bias, mask = layer_arguments(groups, shared, masks=3, size=(5, 7), grad=True)
    gamma, beta = (torch.randn(12, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    running = None if training else (torch.randn(12, dtype=DOUBLE), torch.rand(12, dtype=DOUBLE) + 0.1)
    y = composition(x, weight, bias, gamma, beta, mask, 0.3, activation, stride, groups, running)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias, gamma, beta, mask), g)
    forward = reference.OPERATORS["perturb_norm_conv2d"]
    options = (1, False, "uniform", 0.3, activation, stride, groups)
    _, mean, variance = forward(
        x, weight, bias, gamma, beta, *(running or (None, None)), mask, None, training, 1e-5, *options
    )
    backward = reference.OPERATORS["_perturb_norm_conv2d_backward"]
    found = backward(g, x, weight, gamma, beta, mean, variance, mask, None, training, 1e-5, *options, [True] * 6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_backward_gives_empty_tensors_for_what_was_not_asked():
    x, weight, _, mask = layer_arguments()
    g = torch.randn(2, 6, 5, 4, dtype=DOUBLE)
    backward = reference.OPERATORS["_perturb_conv2d_backward"]
    for asked in itertools.product((False, True), repeat=4):
        found = backward(g, x, weight, mask, None, 1, False, "uniform", 1.0, "relu", (1, 1), 1, asked)
        assert [gradient.numel() > 0 for gradient in found] == list(asked)


def test_derivatives_select():
    """relu'(0) = hardtanh'(+-1) = 0 drop even an infinite gradient; at NaN relu' and hardtanh' are 1."""
    x = torch.tensor([0.0, -1.0, 1.0, math.nan, 0.5]).view(1, 1, 1, 5)
    weight = torch.ones(1, 1, 1, 1)
    g = torch.full((1, 1, 1, 5), math.inf)
    backward = reference.OPERATORS["_perturb_conv2d_backward"]
    expected = {
        "relu": [0, 0, math.inf, math.inf, math.inf],
        "hardtanh": [math.inf, 0, 0, math.inf, math.inf],
        "leaky_relu": [math.inf] * 5,
    }
    for activation, values in expected.items():
        gradient = backward(
            g, x, weight, None, None, 1, False, "uniform", 1.0, activation, (1, 1), 1, [True, False, False, False]
        )[0]
        assert gradient.flatten().tolist() == values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_operands_and_result_once(dtype):
    x = torch.randn(2, 5, 3, 4).to(dtype)
    weight, bias = torch.randn(3, 10, 1, 1).to(dtype), torch.randn(3).to(dtype)
    mask = torch.randn(5, 2, 3, 4)
    y = reference.perturb_conv2d(x, weight, bias, mask=mask, level=0.3)
    a = (x.float().unsqueeze(2) + 0.3 * mask).relu().flatten(1, 2).to(dtype)
    exact = F.conv2d(a.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=1e-6)
    wide = reference.perturb_conv2d(x.float(), weight, bias, mask=mask, level=0.3)
    assert wide.dtype == dtype and torch.equal(wide, y)


def test_differentiates_twice_and_forwards():
    x, weight, bias, mask = layer_arguments(size=(2, 3), batch=1, grad=True)
    gamma, beta = (torch.randn(8, dtype=DOUBLE, requires_grad=True) for _ in range(2))

    def plain(x, weight, bias, mask):
        return reference.perturb_conv2d(x, weight, bias, mask=mask, activation="tanh")

    def normalised(x, weight, bias, gamma, beta, mask):
        return reference.perturb_norm_conv2d(
            x, weight, bias, gamma, beta, None, None, training=True, mask=mask, activation="tanh"
        )

    assert torch.autograd.gradcheck(plain, (x, weight, bias, mask), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plain, (x, weight, bias, mask))
    assert torch.autograd.gradcheck(normalised, (x, weight, bias, gamma, beta, mask), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(normalised, (x, weight, bias, gamma, beta, mask))


def test_vmap_and_compile():
    x, weight, bias, _ = layer_arguments()
    seed = torch.tensor([3])

    def layer(x):
        return reference.perturb_conv2d(x, weight, bias, seed=seed, masks=2, level=0.5)

    each = torch.stack([layer(image) for image in x])
    torch.testing.assert_close(torch.func.vmap(layer)(x), each)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), each)
    gradients = torch.func.vmap(torch.func.grad(lambda image: layer(image).sum()))(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(gradients, leaf.grad)


@pytest.mark.parametrize("size", [(0, 4, 5, 4), (2, 4, 0, 4), (2, 0, 5, 4), (2, 4, 1, 1)])
def test_sizes_of_nothing(size):
    x = torch.randn(size, dtype=DOUBLE)
    weight = torch.randn(6, size[1] * 2, 1, 1, dtype=DOUBLE)
    y = reference.perturb_conv2d(x, weight, torch.ones(6, dtype=DOUBLE), seed=1, masks=2)
    assert y.shape == (size[0], 6, *size[2:])
    if size[1] == 0:
        assert bool((y == 1).all())


def test_what_is_wrong_is_said():
    x, weight, bias, mask = layer_arguments()
    cases = [
        (dict(input=x[0, 0]), "input has size .*should be"),
        (dict(input=x.int()), "input has type torch.int32"),
        (dict(weight=weight.float()), "weight has type torch.float32"),
        (dict(weight=weight[:, :7]), r"weight has size \[6, 7, 1, 1\], it should be \[T, 8, 1, 1\]"),
        (dict(bias=bias[:5]), r"bias has size \[5\], it should be \[6\]"),
        (dict(mask=mask[:, :, :1, :1]), r"mask has size \[4, 2, 1, 1\]"),
        (dict(mask=mask[:3]), r"mask has size \[3, 2, 5, 4\]"),
        (dict(mask=mask.half()), "mask has type torch.float16"),
        (dict(seed=1), "mask and seed are both given"),
        (dict(mask=None, seed=1, masks=0), "masks is 0"),
        (dict(groups=3), "groups is 3"),
        (dict(stride=0), r"stride is \[0, 0\]"),
        (dict(activation="swish"), "activation is 'swish', it should be one of identity, relu"),
        (dict(level=math.nan), "level is nan, it should be finite"),
    ]
    for changed, sentence in cases:
        arguments = {"input": x, "weight": weight, "bias": bias, "mask": mask} | changed
        with pytest.raises((TypeError, ValueError), match=sentence):
            reference.perturb_conv2d(**arguments)
    one_pixel = x[:1, :, :1, :1]
    with pytest.raises(ValueError, match="more than one when training"):
        reference.perturb_norm_conv2d(one_pixel, weight[:, :4], None, None, None, None, None, training=True, seed=1)
    with pytest.raises(RuntimeError, match="activation is 'swish'"):
        reference.OPERATORS["perturb_conv2d"](x, weight, bias, mask, activation="swish")
