"""`PerturbConv2d` and `LBConv2d`: geometry, masks, normalisation, controls, what they refuse."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, functional, reference


def plain_layer(layer, x):
    """What a layer computes, in plain PyTorch: pad, perturb, activate, normalise, mix, pool."""
    extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    pads = []
    for axis in (1, 0):
        if layer.padding == "same":
            pads += [0, 0]
            continue
        padding = 0 if layer.padding == "valid" else layer.padding[axis]
        pads += [padding - math.floor(extents[axis] / 2), padding - math.ceil(extents[axis] / 2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    grid = F.pad(x, pads, mode=mode)
    n = layer.perturbation(grid.shape[-2], grid.shape[-1])
    u = grid.unsqueeze(2).expand(-1, -1, layer.masks, -1, -1)
    if n is not None:
        u = u + layer.level * n.to(u.dtype)
    if layer.downsample == "subsample":
        u = u[:, :, :, :: layer.stride[0], :: layer.stride[1]]
    a = reference.ACTIVATIONS[layer.activation](u).flatten(1, 2)
    if layer.norm is not None:
        norm = layer.norm
        statistics = norm.running_mean.clone(), norm.running_var.clone()
        a = F.batch_norm(a, *statistics, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)
    y = F.conv2d(a, layer.weight, layer.bias, groups=layer.groups)
    if layer.stride == (1, 1) or layer.downsample == "subsample":
        return y
    rows = [y[:, :, i : i + layer.stride[0]] for i in range(0, y.shape[2], layer.stride[0])]
    windows = [
        [row[:, :, :, j : j + layer.stride[1]].flatten(2) for j in range(0, y.shape[3], layer.stride[1])]
        for row in rows
    ]
    pool = (lambda w: w.max(2).values) if layer.downsample == "max" else (lambda w: w.mean(2))
    return torch.stack([torch.stack([pool(w) for w in row], -1) for row in windows], -2)


SIZES = list(itertools.product((1, 2, 3, 5), (1, 2, 3), (-1, 0, 1, 2), (1, 2)))


@pytest.mark.parametrize("downsample", ["max", "avg", "subsample"])
def test_output_has_the_size_of_a_convolution(downsample):
    checked = 0
    for kernel, stride, padding, dilation in SIZES:
        for height, width in ((1, 1), (2, 7), (5, 5), (8, 13)):
            # PyTorch's own convolution has no negative padding: cropping and then convolving is what it means.
            x = torch.zeros(1, 2, height, width)
            cropped = F.pad(x, [min(padding, 0)] * 4) if min(height, width) + 2 * min(padding, 0) > 0 else None
            layer = PerturbConv2d(2, 3, kernel, stride, padding, dilation, downsample=downsample, seed=1)
            try:
                if cropped is None:
                    raise RuntimeError("nothing is left")
                expected = nn.Conv2d(2, 3, kernel, stride, max(padding, 0), dilation)(cropped).shape
            except RuntimeError:
                with pytest.raises(ValueError, match="it should be larger"):
                    layer(x)
                continue
            assert layer(x).shape == expected, (kernel, stride, padding, dilation, height, width)
            checked += 1
    assert checked > 150


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 5), (2, 1), (1, 0), (1, 2)),
        ((1, 4), (3, 2), (0, 3), 1),
        (2, 1, "same", (3, 1)),
        ((2, 3), (1, 2), "valid", 1),
    ],
)
def test_axes_are_independent(kernel, stride, padding, dilation):
    x = torch.randn(2, 4, 9, 12)
    expected = nn.Conv2d(4, 6, kernel, stride, padding, dilation)(x).shape
    for downsample in ("max", "avg", "subsample"):
        layer = PerturbConv2d(4, 6, kernel, stride, padding, dilation, groups=2, masks=2, downsample=downsample)
        assert layer(x).shape == expected
        torch.testing.assert_close(layer(x), plain_layer(layer, x))


OPTIONS = [
    {},
    {"masks": 4, "shared_masks": True, "groups": 2},
    {"noise": "normal", "activation": "gelu", "level": 0.5},
    {"noise": "waves", "activation": "tanh", "masks": 3},
    {"noise": None},
    {"level": 0.0},
    {"mask_size": (9, 11), "masks": 2},
    {"mask_size": (9, 11), "train_masks": True},
    {"mask": torch.randn(4, 2, 9, 11), "masks": 2},
    {"mask": torch.randn(1, 2, 9, 11), "masks": 2, "train_masks": True},
    {"norm": True},
    {"norm": True, "masks": 3, "groups": 2, "activation": "silu", "noise": "normal"},
    {"bias": False, "norm": True, "mask_size": (9, 11), "train_masks": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("downsample", ["max", "subsample"])
def test_layer_equals_plain_pytorch(options, stride, downsample):
    layer = PerturbConv2d(4, 6, 3, stride, 1, downsample=downsample, **options).double()
    if layer.norm is not None:
        nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
        nn.init.normal_(layer.norm.bias)
    for training in (True, False):
        layer.train(training)
        x = torch.randn(3, 4, 9, 11, dtype=torch.float64, requires_grad=True)
        expected = plain_layer(layer, x)
        leaves = [x, *layer.parameters()]
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        g = torch.randn_like(y)
        expected_gradients = torch.autograd.grad(expected, leaves, g)
        torch.testing.assert_close(torch.autograd.grad(y, leaves, g), expected_gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 2), (3, 2), (2, (1, 0)), (4, 1), (3, -1)])
def test_padding_modes(padding_mode, kernel, padding):
    layer = PerturbConv2d(2, 3, kernel, padding=padding, padding_mode=padding_mode, seed=3)
    for x in (torch.randn(2, 2, 8, 7), torch.randn(2, 8, 7)):
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        expected = plain_layer(layer, batch)
        torch.testing.assert_close(layer(x), expected if x.dim() == 4 else expected[0])


def test_windows_are_clipped_at_the_edge():
    layer = PerturbConv2d(1, 1, 1, stride=2, noise=None, activation="identity", downsample="avg", bias=False)
    nn.init.ones_(layer.weight)
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert layer(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]
    layer.downsample = "max"
    assert layer(x - 10).flatten().tolist() == [-6, -5, -3, -2]
    layer.downsample = "subsample"
    assert layer(x).flatten().tolist() == [0, 2, 6, 8]


def test_attributes_are_those_of_a_convolution():
    for arguments in (dict(stride=2, padding=1), dict(padding="same", dilation=(2, 1), groups=2, bias=False)):
        layer, conv = PerturbConv2d(4, 6, (3, 5), **arguments), nn.Conv2d(4, 6, (3, 5), **arguments)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(layer, name) == getattr(conv, name)
        assert (layer.padding_mode, layer.transposed, layer.output_padding) == ("zeros", False, (0, 0))
        assert (layer.bias is None) == (conv.bias is None)
        assert layer.weight.shape == (6, 4 // layer.groups, 1, 1)
    assert not isinstance(layer, nn.Conv2d)
    assert not isinstance(LBConv2d(3, 4), nn.Conv2d)


# --------------------------------------------------------------------------------------------------------------------
# Masks: fixed, the same everywhere. The published modules drew them at the first forward pass, failed on the CPU,
# lost them in checkpoints, and broadcast a 1x1 input in silence.
# --------------------------------------------------------------------------------------------------------------------


def test_masks_exist_before_the_first_forward():
    layer = PerturbConv2d(3, 4, 3, padding=1)
    before = layer.perturbation(8, 8)
    state = copy.deepcopy(layer.state_dict())
    layer(torch.randn(1, 3, 8, 8))
    assert torch.equal(layer.perturbation(8, 8), before)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


def test_forward_draws_nothing():
    layer = PerturbConv2d(3, 4, 3, padding=1)
    before = torch.get_rng_state()
    layer(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_works_on_the_cpu_without_a_gpu():
    y = PerturbConv2d(3, 4, 3, padding=1)(torch.randn(1, 3, 8, 8))
    assert y.device.type == "cpu" and bool(y.isfinite().all())


def test_masks_survive_a_checkpoint():
    x = torch.randn(1, 3, 8, 8)
    for options in (
        {},
        {"mask_size": (8, 8)},
        {"mask_size": (8, 8), "train_masks": True},
        {"mask": torch.randn(3, 1, 8, 8)},
    ):
        layer, other = (PerturbConv2d(3, 4, 3, padding=1, **options) for _ in range(2))
        assert not torch.equal(layer(x), other(x))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), other(x))


def test_a_1x1_input_meets_a_1x1_mask():
    layer = PerturbConv2d(3, 4, 1, seed=1)
    assert layer(torch.randn(2, 3, 1, 1)).shape == (2, 4, 1, 1)
    large = PerturbConv2d(3, 4, 1, mask_size=(8, 8), seed=1)
    with pytest.raises(ValueError, match=r"input has size \[2, 3, 1, 1\].*it should be 8x8"):
        large(torch.randn(2, 3, 1, 1))


@pytest.mark.parametrize("norm", [False, True])
def test_masks_are_the_same_in_training_and_evaluation(norm):
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=norm)
    if norm:
        layer.norm.momentum = 1.0
        layer.norm.eps = 1e-12
    x = torch.randn(4, 3, 8, 8)
    trained = layer(x)
    layer.eval()
    if not norm:
        assert torch.equal(layer(x), trained)
    torch.testing.assert_close(layer.perturbation(8, 8), layer.train().perturbation(8, 8))


def test_every_input_size_meets_a_crop_of_the_same_masks():
    layer = PerturbConv2d(3, 4, 1, seed=3, level=0.5)
    x = torch.randn(1, 3, 40, 33)
    whole = layer(x)
    for height, width in ((1, 1), (7, 33), (40, 2), (13, 13)):
        assert torch.equal(layer(x[:, :, :height, :width]), whole[:, :, :height, :width])


def test_batch_position_does_not_matter():
    layer = PerturbConv2d(3, 4, 3, padding=1)
    x = torch.randn(5, 3, 6, 6)
    assert torch.equal(layer(x), torch.cat([layer(image.unsqueeze(0)) for image in x]))


def test_held_masks_are_the_seeds():
    x = torch.randn(2, 3, 8, 9)
    recipe = PerturbConv2d(3, 4, 3, padding=1, masks=2, seed=9, noise="normal")
    held = PerturbConv2d(3, 4, 3, padding=1, masks=2, seed=9, noise="normal", mask_size=(8, 9))
    held.load_state_dict(recipe.state_dict(), strict=False)
    assert torch.equal(recipe(x), held(x))


def test_seeds_given_and_drawn():
    first, second = (PerturbConv2d(3, 4, 3, seed=2**64 - 5) for _ in range(2))
    assert first.mask_seed.tolist() == [-5] and first.mask_seed.dtype == torch.int64
    assert torch.equal(first.perturbation(4, 4), second.perturbation(4, 4))
    torch.manual_seed(3)
    drawn = [PerturbConv2d(3, 4, 3).mask_seed.item() for _ in range(3)]
    assert len(set(drawn)) == 3
    torch.manual_seed(3)
    assert [PerturbConv2d(3, 4, 3).mask_seed.item() for _ in range(3)] == drawn


def test_a_seed_changes_the_masks_and_nothing_else_that_is_drawn():
    weights = []
    for options in ({}, {"seed": 4}, {"noise": None}, {"mask": torch.randn(3, 1, 4, 4)}, {"mask_size": (4, 4)}):
        torch.manual_seed(11)
        layers = [PerturbConv2d(3, 4, 3, norm=True, **options) for _ in range(2)]
        weights.append(torch.stack([layer.weight.detach() for layer in layers]))
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_reset_restores_a_given_seed_or_draws_anew():
    given, drawn = PerturbConv2d(3, 4, 3, seed=6), PerturbConv2d(3, 4, 3)
    before = drawn.mask_seed.clone()
    given.mask_seed.fill_(1)
    given.reset_parameters()
    drawn.reset_parameters()
    assert given.mask_seed.item() == 6
    assert not torch.equal(drawn.mask_seed, before)


def test_reseed():
    layer = PerturbConv2d(3, 4, 3, padding=1, mask_size=(5, 5), train_masks=True)
    layer.reseed(8)
    expected = functional.perturbation_mask(8, 3, 1, 5, 5)
    assert torch.equal(layer.mask, expected) and layer.mask_seed.item() == 8
    layer.reset_parameters()
    assert torch.equal(layer.mask, expected)
    for wrong in (True, None, 1.0):
        with pytest.raises(TypeError, match="seed is"):
            layer.reseed(wrong)
    with pytest.raises(ValueError, match="masks were given as a tensor"):
        PerturbConv2d(3, 4, 3, mask=torch.zeros(3, 1, 5, 5)).reseed(1)


def test_a_given_mask_is_copied():
    mask = torch.randn(3, 1, 4, 4)
    layer = PerturbConv2d(3, 4, 1, mask=mask)
    x = torch.randn(1, 3, 4, 4)
    before = layer(x)
    mask.zero_()
    assert torch.equal(layer(x), before)
    assert not layer.shared_masks and PerturbConv2d(3, 4, 1, mask=mask[:1]).shared_masks


def test_trained_masks_learn_and_others_do_not():
    trained = PerturbConv2d(3, 4, 1, mask_size=(4, 4), train_masks=True)
    fixed = PerturbConv2d(3, 4, 1, mask_size=(4, 4))
    assert "mask" in dict(trained.named_parameters()) and "mask" not in dict(fixed.named_parameters())
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    before = trained.mask.detach().clone()
    trained(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(trained.mask, before)


def test_mask_bytes():
    assert PerturbConv2d(3, 4, 3).mask_bytes == 8
    assert PerturbConv2d(3, 4, 3, noise=None).mask_bytes == PerturbConv2d(3, 4, 3, level=0).mask_bytes == 0
    assert PerturbConv2d(3, 4, 3, mask_size=(5, 6), masks=2).mask_bytes == 3 * 2 * 5 * 6 * 4
    assert PerturbConv2d(3, 4, 3, mask_size=(5, 6), train_masks=True).mask_bytes == 0


# --------------------------------------------------------------------------------------------------------------------
# The control
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [{"noise": None}, {"level": 0.0}])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"masks": 4, "activation": "tanh"}])
def test_control_is_the_layer_without_masks(control, options):
    torch.manual_seed(5)
    layer = PerturbConv2d(3, 4, 3, 2, 1, **options)
    torch.manual_seed(5)
    same = PerturbConv2d(3, 4, 3, 2, 1, **(options | control))
    assert same.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(layer.state_dict()[name], same.state_dict()[name]) for name in layer.state_dict())
    x = torch.randn(2, 3, 9, 9)
    assert not torch.equal(layer(x), same(x))
    assert same.perturbation(9, 9) is None
    torch.testing.assert_close(same(x), plain_layer(same, x))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("control", [{"noise": None}, {"level": 0.0}])
def test_control_asks_for_no_masks(control, norm, monkeypatch):
    name = "perturb_norm_conv2d" if norm else "perturb_conv2d"
    seen = []
    original = getattr(functional, name)

    def spy(*arguments, **options):
        seen.append((options["mask"], options["seed"], options["noise"]))
        return original(*arguments, **options)

    monkeypatch.setattr(functional, name, spy)
    PerturbConv2d(3, 4, 1, norm=norm, **control)(torch.randn(2, 3, 4, 4))
    assert seen == [(None, None, None)]


@pytest.mark.parametrize("level", [0.02, 1.0, 4.0])
def test_control_has_the_weights_of_its_layer_at_every_level(level):
    torch.manual_seed(5)
    layer = PerturbConv2d(3, 4, 3, level=level)
    torch.manual_seed(5)
    control = PerturbConv2d(3, 4, 3, level=level, noise=None)
    assert torch.equal(layer.weight, control.weight)


# --------------------------------------------------------------------------------------------------------------------
# Normalisation
# --------------------------------------------------------------------------------------------------------------------


def with_norm(seed=2, **settings):
    torch.manual_seed(seed)
    layer = PerturbConv2d(3, 4, 3, padding=1, masks=2, norm=True, seed=1)
    layer.norm = nn.BatchNorm2d(6, **settings)
    return layer


def unfused(layer):
    """The same layer on the path that calls the norm as a module."""
    other = copy.deepcopy(layer)
    other.norm.register_forward_hook(lambda *_: None)
    assert layer._norm_is_plain() and not other._norm_is_plain()
    return other


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": None},
        {"momentum": 0.5, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "momentum": None},
    ],
)
def test_the_norms_own_settings_are_honoured(settings):
    layer = with_norm(**settings)
    plain = unfused(layer)
    for step in range(4):
        x = torch.randn(2, 3, 5, 6) + step
        for training in (True, False):
            layer.train(training)
            plain.train(training)
            torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
        for name, value in plain.norm.state_dict().items():
            torch.testing.assert_close(layer.norm.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    if layer.norm.track_running_stats:
        assert layer.norm.num_batches_tracked.item() == 4


@pytest.mark.parametrize(
    "options", [{}, {"mask_size": (5, 6)}, {"noise": None}, {"stride": 2, "downsample": "subsample"}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_paths_of_the_norm_agree(dtype, options):
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True, masks=2, seed=1, **options).to(dtype)
    if layer.mask is not None:
        layer.mask = layer.mask.float()
    x = torch.randn(2, 3, 5, 6, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(layer(x), unfused(layer)(x), rtol=tolerance, atol=tolerance)


def test_the_norms_own_training_flag_is_honoured():
    layer = with_norm()
    layer(torch.randn(2, 3, 5, 6))
    layer.norm.eval()
    before = copy.deepcopy(layer.norm.state_dict())
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(layer(x), layer.eval()(x))
    assert all(torch.equal(before[name], value) for name, value in layer.norm.state_dict().items())


def test_hooks_of_the_norm_are_called():
    layer = with_norm()
    seen = []
    layer.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    layer(torch.randn(2, 3, 5, 6))
    assert seen == [torch.Size([2, 6, 5, 6])]


def test_a_replaced_norm_is_called():
    layer = with_norm()
    x = torch.randn(2, 3, 5, 6)
    expected = layer(x)

    class Doubled(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    layer.norm = Doubled(6)
    torch.testing.assert_close(layer(x), 2 * expected - layer.bias.view(-1, 1, 1), rtol=1e-4, atol=1e-4)
    layer.norm = nn.BatchNorm2d(6)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(converted.eval()(x), with_norm().eval()(x))
    layer.norm = nn.Identity()
    assert layer(x[0]).shape == (4, 5, 6)


def test_norm_without_a_batch_dimension():
    layer = with_norm()
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(layer(x), with_norm()(x.unsqueeze(0))[0])


def test_a_single_value_a_map_is_refused_in_training():
    layer = PerturbConv2d(3, 4, 1, norm=True)
    before = copy.deepcopy(layer.norm.state_dict())
    with pytest.raises(ValueError, match="one value"):
        layer(torch.randn(1, 3, 1, 1))
    assert all(torch.equal(before[name], value) for name, value in layer.norm.state_dict().items())
    layer.eval()(torch.randn(1, 3, 1, 1))


def test_statistics_run_over_the_computed_pixels():
    torch.manual_seed(1)
    layer = PerturbConv2d(3, 4, 3, 2, 1, norm=True, downsample="subsample", seed=1)
    layer.norm.momentum = 1.0
    x = torch.randn(2, 3, 8, 8)
    layer(x)
    a = (x + 0.1 * layer.perturbation(8, 8)[:, 0]).relu()[:, :, ::2, ::2]
    torch.testing.assert_close(layer.norm.running_mean, a.mean((0, 2, 3)))
    torch.testing.assert_close(layer.norm.running_var, a.var((0, 2, 3)))


# --------------------------------------------------------------------------------------------------------------------
# Types, devices, making anew
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"mask_size": (6, 6), "train_masks": True}])
def test_types(dtype, options):
    made = PerturbConv2d(3, 4, 3, padding=1, dtype=dtype, **options)
    moved = PerturbConv2d(3, 4, 3, padding=1, **options).to(dtype)
    for layer in (made, moved):
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.mask_seed.dtype == layer.mask_version.dtype == torch.int64
        x = torch.randn(2, 3, 6, 6, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert x.grad.dtype == dtype and layer.weight.grad.dtype == dtype
        layer.eval()(x)


def test_meta_device_to_empty_and_reset():
    for options in ({"seed": 5}, {"seed": 5, "norm": True}, {"seed": 5, "mask_size": (6, 6)}):
        layer = PerturbConv2d(3, 4, 3, padding=1, device="meta", **options)
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        assert layer(torch.empty(2, 3, 6, 6, device="meta")).shape == (2, 4, 6, 6)
        torch.manual_seed(0)
        layer = layer.to_empty(device="cpu")
        for tensor in layer.state_dict().values():
            tensor.fill_(77)
        layer.reset_parameters()
        torch.manual_seed(0)
        expected = PerturbConv2d(3, 4, 3, padding=1, **options)
        assert layer.mask_version.item() == 1
        for name, value in expected.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name
    skipped = nn.utils.skip_init(PerturbConv2d, 3, 4, 3)
    skipped.reset_parameters()
    assert skipped.mask_version.item() == 1
    with torch.device("meta"):
        assert PerturbConv2d(3, 4, 3).mask_seed.is_meta


def test_autocast_casts_weight_and_bias_only():
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 3, 6, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_channels_last():
    layer = PerturbConv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.contiguous(), layer(x.contiguous()))


def test_parametrizations_and_functional_call():
    layer = PerturbConv2d(3, 4, 3, padding=1)
    x = torch.randn(1, 3, 6, 6)
    expected = layer(x)
    weights = {name: 2 * value for name, value in layer.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, weights, x), 2 * expected)
    nn.utils.parametrizations.weight_norm(layer, dim=0)
    torch.testing.assert_close(layer(x), expected)


def test_shown_as_a_convolution_is():
    text = repr(PerturbConv2d(3, 8, 3, 2, 1, masks=4, seed=1, groups=1, bias=False, shared_masks=True))
    assert text == (
        "PerturbConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False, masks=4, level=0.1, "
        "noise='uniform', activation='relu', seed=1, shared_masks=True, downsample='max')"
    )
    assert "mask_size=(5, 5), train_masks=True" in repr(PerturbConv2d(3, 8, 3, mask_size=5, train_masks=True))


def test_trains():
    torch.manual_seed(0)
    x, target = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    model = nn.Sequential(PerturbConv2d(3, 16, 3, 2, 1, masks=2, norm=True), nn.ReLU(), PerturbConv2d(16, 4, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x).mean((2, 3)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"in_channels": -1}, ValueError, "in_channels is -1, it should be at least 0"),
        ({"in_channels": 3.0}, TypeError, "in_channels is 3.0, it should be an int"),
        ({"out_channels": True}, TypeError, "out_channels is True"),
        ({"kernel_size": 0}, ValueError, "kernel_size is 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size is .*pair"),
        ({"kernel_size": "3"}, TypeError, "kernel_size is '3'"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"dilation": (1, 0)}, ValueError, "dilation is"),
        ({"padding": "full"}, ValueError, "padding is 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding is 'same', it should be numbers"),
        ({"padding": 0.5}, TypeError, "padding is 0.5"),
        ({"groups": 2}, ValueError, "groups is 2, it should divide in_channels = 3"),
        ({"groups": 0}, ValueError, "groups is 0"),
        ({"bias": 1}, TypeError, "bias is 1, it should be True or False"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode is 'mirror'"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"dtype": torch.complex64}, TypeError, "dtype is torch.complex64"),
        ({"masks": 0}, ValueError, "masks is 0"),
        ({"level": math.nan}, ValueError, "level is nan"),
        ({"level": "0.1"}, TypeError, "level is '0.1'"),
        ({"noise": "pink"}, ValueError, "noise is 'pink', it should be one of 'uniform'"),
        ({"noise": False}, TypeError, "noise is False"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'"),
        ({"activation": nn.ReLU()}, TypeError, "activation is ReLU"),
        ({"seed": True}, TypeError, "seed is True"),
        ({"seed": 1.0}, TypeError, "seed is 1.0"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"shared_masks": 1}, TypeError, "shared_masks is 1"),
        ({"mask": [1.0]}, TypeError, "mask is list"),
        ({"mask": torch.zeros(3, 1, 4, 4).int()}, TypeError, "mask has type torch.int32"),
        ({"mask": torch.zeros(3, 4, 4)}, ValueError, r"mask has size \[3, 4, 4\], it should be \[3 or 1, 1, H, W\]"),
        ({"mask": torch.zeros(3, 2, 4, 4)}, ValueError, "masks = 1"),
        ({"mask": torch.zeros(2, 1, 4, 4)}, ValueError, "mask has size"),
        ({"mask": torch.zeros(3, 1, 4, 4), "shared_masks": True}, ValueError, "mask has size"),
        ({"mask": torch.zeros(3, 1, 4, 4), "seed": 1}, ValueError, "mask and seed are both given"),
        ({"mask": torch.zeros(3, 1, 4, 4), "mask_size": 4}, ValueError, "mask and mask_size are both given"),
        ({"mask": torch.zeros(3, 1, 4, 4), "noise": None}, ValueError, "mask is given, it should be None"),
        ({"mask_size": (4, -1)}, ValueError, "mask_size is"),
        ({"mask_size": 4.0}, TypeError, "mask_size is 4.0"),
        ({"train_masks": True}, ValueError, "mask or mask_size"),
        ({"norm": "batch"}, TypeError, "norm is 'batch'"),
        ({"downsample": "min"}, ValueError, "downsample is 'min'"),
    ],
)
def test_bad_arguments(options, error, sentence):
    with pytest.raises(error, match=sentence):
        PerturbConv2d(**({"in_channels": 3, "out_channels": 4, "kernel_size": 3} | options))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (torch.zeros(3, 8), ValueError, r"input has size \[3, 8\], it should be \[B, 3, H, W\] or \[3, H, W\]"),
        (torch.zeros(1, 3, 8, 8, 8), ValueError, "input has size"),
        (torch.zeros(1, 4, 8, 8), ValueError, "it should have 3 channels"),
        (torch.zeros(1, 1, 8, 8), ValueError, "it should have 3 channels"),
        (torch.zeros(1, 3, 2, 8), ValueError, "kernel_size .*output would be 0x6"),
        (torch.zeros(1, 3, 8, 8).double(), TypeError, "weight has type"),
        (torch.zeros(1, 3, 8, 8).int(), TypeError, "input has type"),
    ],
)
def test_bad_inputs(norm, x, error, sentence):
    with pytest.raises(error, match=sentence):
        PerturbConv2d(3, 4, 3, norm=norm)(x)


def test_inputs_of_another_size_than_the_masks():
    layer = PerturbConv2d(3, 4, 3, padding=2, mask_size=(10, 10))
    assert layer(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 10, 10)
    with pytest.raises(ValueError, match=r"\[1, 3, 10, 10\], which is 12x12 with its padding, it should be 10x10"):
        layer(torch.zeros(1, 3, 10, 10))
    with pytest.raises(ValueError, match="size is 8x8, it should be the held masks' 10x10"):
        layer.perturbation(8, 8)


# --------------------------------------------------------------------------------------------------------------------
# LBConv2d
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_lbc_filters_are_ternary_with_an_exact_share_of_zeros(sparsity):
    layer = LBConv2d(5, 7, 3, anchors=11, sparsity=sparsity, seed=1)
    filters = layer.anchor_weight
    assert filters.shape == (11, 5, 3, 3)
    assert set(filters.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert int((filters == 0).sum()) == round(sparsity * filters.numel())
    signs = filters[filters != 0]
    if signs.numel():
        assert abs(signs.mean()) < 5 / math.sqrt(signs.numel())
    assert "anchor_weight" not in dict(layer.named_parameters()) and "anchor_weight" in layer.state_dict()


@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2}, {"padding": "same"}, {"kernel_size": (3, 5), "padding": (0, 2), "dilation": 2}]
)
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_lbc_equals_plain_pytorch(arguments, activation):
    layer = LBConv2d(3, 6, activation=activation, anchors=10, **arguments)
    x = torch.randn(2, 3, 11, 12)
    a = F.conv2d(x, layer.anchor_weight, None, layer.stride, layer.padding, layer.dilation)
    expected = F.conv2d(reference.ACTIVATIONS[activation](a), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    settings = {"kernel_size": 3, "padding": 1} | arguments
    assert layer(x).shape == nn.Conv2d(3, 6, **settings)(x).shape
    assert layer(x[0]).shape == expected.shape[1:]


def test_lbc_seeds():
    first, second = LBConv2d(3, 4, seed=2), LBConv2d(3, 4, seed=2)
    assert torch.equal(first.anchor_weight, second.anchor_weight)
    assert not torch.equal(first.anchor_weight, LBConv2d(3, 4, seed=3).anchor_weight)
    assert not torch.equal(LBConv2d(3, 4).anchor_weight, LBConv2d(3, 4).anchor_weight)
    second.reseed(2**64 - 1)
    assert not torch.equal(first.anchor_weight, second.anchor_weight)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.anchor_weight, second.anchor_weight)
    meta = LBConv2d(3, 4, seed=2, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(first.anchor_weight, meta.anchor_weight)


def test_lbc_multiply_adds():
    layer = LBConv2d(3, 6, 3, stride=2, anchors=5)
    assert layer.multiply_adds(9, 10) == 5 * 5 * (5 * 27 + 6 * 5)
    assert LBConv2d(3, 6, 3, padding="same", anchors=5).multiply_adds(9, 10) == 90 * (5 * 27 + 30)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity is 1.5, it should be from 0 to 1"),
        ({"sparsity": None}, TypeError, "sparsity is None"),
        ({"anchors": 0.5}, TypeError, "anchors is 0.5"),
        ({"padding": -1}, ValueError, "padding is -1"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'"),
        ({"seed": True}, TypeError, "seed is True"),
    ],
)
def test_lbc_bad_arguments(options, error, sentence):
    with pytest.raises(error, match=sentence):
        LBConv2d(**({"in_channels": 3, "out_channels": 4} | options))


def test_lbc_bad_inputs():
    for x in (torch.zeros(1, 4, 8, 8), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match="input has size"):
            LBConv2d(3, 4)(x)


def test_multiply_adds_count_the_computed_pixels():
    assert PerturbConv2d(4, 6, 3, 2, 1, masks=3, groups=2).multiply_adds(9, 10) == 90 * 36
    assert PerturbConv2d(4, 6, 3, 2, 1, downsample="subsample").multiply_adds(9, 10) == 25 * 24
    assert PerturbConv2d(4, 6, 3).multiply_adds(9, 10) == 56 * 24
