"""Masks from a seed: the generator's published vectors, our own frozen ones, the definition, and its statistics."""

import math

import pytest
import torch

from torch_pnn import functional, reference

NOISES = ("uniform", "normal", "waves")
WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 on Python's integers, written from the paper and apart from the reference's."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def value(seed, kind, k, row, column):
    """One mask value by its definition, in float64."""
    key = (seed & WORD, (seed >> 32) & WORD)
    if kind == "waves":
        w0, w1, w2, _ = philox((k, 0, 0, 1), key)
        f0, f1 = (((2**29 + (w >> 3)) >> (w % 4)) * (-1 if w & 4 else 1) for w in (w0, w1))
        t = ((f0 * row + f1 * column + w2) % 2**32) >> 23
        return (2 * (t if t < 256 else 511 - t) - 255) / 256
    block, tag = (k // 16, 0) if kind == "uniform" else (k // 2, 2)
    data = b"".join(word.to_bytes(4, "little") for word in philox((column, row, block, tag), key))
    if kind == "uniform":
        return (2 * data[k % 16] - 255) / 256
    total = sum(data[:8] if k % 2 == 0 else data[8:])
    scale = torch.tensor(1 / math.sqrt(43690), dtype=torch.float64).float()
    return float(torch.tensor(float(total - 1020)) * scale)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_published_vectors(counter, key, expected):
    words = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert " ".join(f"{word.item():08x}" for word in words) == expected
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == expected


# Masks of the seed 0x0123456789abcdef, channels = 2, masks = 9, at rows 0 and 5 and columns 0, 1 and 6, for the maps
# k = 0, 1 and 17. Uniform and waves in units of 1/256, normal in units of 1/sqrt(43690): whole numbers. These numbers
# were computed once and never change: a saved model's masks hang on them.
FROZEN = {
    "uniform": [
        [[-163, -51, 243], [-219, 1, 167]],
        [[-187, -215, -205], [-109, 229, -47]],
        [[255, 137, 111], [-245, 139, 59]],
    ],
    "normal": [
        [[79, 73, -85], [-201, 256, 134]],
        [[-102, 37, 56], [467, -91, -327]],
        [[270, -239, -30], [-196, 54, 14]],
    ],
    "waves": [[[-161, -129, 31], [229, 197, 37]], [[131, 107, -9], [245, 223, 107]], [[111, -5, 77], [-31, -147, 219]]],
}


@pytest.mark.parametrize("implementation", [functional, reference])
@pytest.mark.parametrize("noise", NOISES)
def test_masks_are_the_frozen_ones(noise, implementation):
    mask = implementation.perturbation_mask(0x0123456789ABCDEF, 2, 9, 6, 7, noise=noise).reshape(18, 6, 7)
    chosen = mask[[0, 1, 17]][:, [0, 5]][:, :, [0, 1, 6]].double()
    units = chosen * (math.sqrt(43690) if noise == "normal" else 256)
    assert units.round().int().tolist() == FROZEN[noise]
    torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", [functional, reference])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_masks_follow_their_definition(noise, seed, implementation):
    mask = implementation.perturbation_mask(seed, 3, 7, 4, 9, noise=noise)
    for k in (0, 1, 2, 15, 16, 17, 20):
        for row in range(4):
            for column in (0, 3, 8):
                expected = value(seed, noise, k, row, column)
                assert mask[k // 7, k % 7, row, column].item() == expected, (k, row, column)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("channels", "masks", "height", "width"),
    [(1, 1, 1, 1), (3, 1, 5, 7), (2, 16, 8, 8), (17, 1, 33, 65), (1, 33, 3, 130), (4, 5, 1, 16), (2, 3, 257, 2)],
)
def test_functional_equals_reference(noise, channels, masks, height, width):
    for shared in (False, True):
        size = (channels, masks, height, width)
        ours = functional.perturbation_mask(5, *size, shared_masks=shared, noise=noise)
        theirs = reference.perturbation_mask(5, *size, shared_masks=shared, noise=noise)
        assert ours.shape == (1 if shared else channels, masks, height, width)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("noise", NOISES)
def test_a_larger_mask_continues_a_smaller_one(noise):
    large = functional.perturbation_mask(11, 4, 3, 40, 50, noise=noise)
    for height, width in ((1, 1), (7, 13), (40, 3), (16, 50)):
        small = functional.perturbation_mask(11, 4, 3, height, width, noise=noise)
        assert torch.equal(small, large[:, :, :height, :width])


@pytest.mark.parametrize("noise", NOISES)
def test_more_channels_continue_fewer(noise):
    many = functional.perturbation_mask(11, 40, 1, 5, 6, noise=noise)
    assert torch.equal(functional.perturbation_mask(11, 7, 1, 5, 6, noise=noise), many[:7])


@pytest.mark.parametrize("noise", NOISES)
def test_shared_masks_are_those_of_the_first_channel(noise):
    shared = functional.perturbation_mask(3, 8, 4, 5, 6, noise=noise, shared_masks=True)
    assert torch.equal(shared, functional.perturbation_mask(3, 1, 4, 5, 6, noise=noise))


@pytest.mark.parametrize("implementation", [functional, reference])
def test_seeds_are_twos_complement(implementation):
    for given, same in ((2**64 - 1, -1), (2**63, -(2**63)), (7, torch.tensor([7])), (7, torch.tensor(7))):
        first = implementation.perturbation_mask(given, 2, 2, 3, 3)
        assert torch.equal(first, implementation.perturbation_mask(same, 2, 2, 3, 3))


@pytest.mark.parametrize("noise", NOISES)
def test_both_words_of_the_seed_matter(noise):
    seeds = (0, 1, 2**31, 2**32, 2**63)
    masks = [functional.perturbation_mask(seed, 4, 4, 8, 8, noise=noise) for seed in seeds]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            assert (first == second).float().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", NOISES)
def test_types_round_the_float32_values_once(noise, dtype):
    exact = functional.perturbation_mask(2, 3, 4, 9, 10, noise=noise)
    mask = functional.perturbation_mask(2, 3, 4, 9, 10, noise=noise, dtype=dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, exact.to(dtype))
    if noise != "normal":
        assert torch.equal(mask.float(), exact)


def test_uniform_statistics():
    mask = functional.perturbation_mask(1, 64, 4, 64, 64).double()
    units = (mask * 256).flatten()
    assert torch.equal(units, units.round())
    assert bool((units.long() % 2 != 0).all()) and units.abs().max() == 255
    count = mask.numel()
    assert abs(mask.mean()) < 5 * math.sqrt(1 / 3 / count)
    assert mask.var() == pytest.approx((256**2 - 1) / (3 * 256**2), rel=5e-3)
    frequency = torch.bincount((units.long() + 255) // 2, minlength=256).double()
    chi_square = ((frequency - count / 256) ** 2 / (count / 256)).sum()
    assert 255 - 5 * math.sqrt(510) < chi_square < 255 + 5 * math.sqrt(510)


def test_normal_statistics():
    mask = functional.perturbation_mask(1, 64, 4, 64, 64, noise="normal").double()
    count = mask.numel()
    assert abs(mask.mean()) < 5 / math.sqrt(count)
    assert mask.std() == pytest.approx(1, abs=5e-3)
    assert 4 < mask.abs().max() < 4.89
    # Of eight uniform bytes: skewness 0, excess kurtosis -1.2/8 (a little more for the lattice).
    assert abs((mask**3).mean()) < 0.02
    assert (mask**4).mean() - 3 == pytest.approx(-0.15, abs=0.03)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_noise_is_uncorrelated(noise):
    mask = functional.perturbation_mask(9, 8, 4, 64, 64, noise=noise).double().reshape(32, -1)
    correlation = torch.corrcoef(mask) - torch.eye(32)
    assert correlation.abs().max() < 6 / math.sqrt(64 * 64)
    image = mask.reshape(32, 64, 64)
    for shifted in (image[:, 1:] * image[:, :-1], image[:, :, 1:] * image[:, :, :-1]):
        assert abs(shifted.mean()) < 6 * image.var() / math.sqrt(shifted.numel())


def test_waves_statistics():
    mask = functional.perturbation_mask(4, 256, 1, 64, 64, noise="waves").double()
    assert abs(mask.mean()) < 0.01
    assert mask.var() == pytest.approx(1 / 3, rel=0.02)
    assert torch.equal((mask * 256).round(), mask * 256)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_waves_have_wavelengths_of_4_to_64_pixels(axis):
    size = (4096, 1) if axis == "rows" else (1, 4096)
    lines = functional.perturbation_mask(4, 128, 1, *size, noise="waves").reshape(128, 4096)
    wavelengths = []
    for line in lines:
        # A period of a triangle wave crosses 0 twice; 0 itself is not in the lattice.
        crossings = int((line[1:].sign() != line[:-1].sign()).sum())
        wavelengths.append(2 * 4095 / crossings)
    assert 3.99 <= min(wavelengths) and max(wavelengths) <= 65
    # Four octaves, drawn with equal chance.
    octaves = torch.bincount(torch.tensor(wavelengths).clamp(4, 63.9).log2().floor().long() - 2, minlength=4)
    assert octaves.min() >= 12
    steps = lines.diff(dim=1).abs().max()
    assert steps <= 1.0


def test_masks_compile():
    def both(seed):
        return torch.cat([functional.perturbation_mask(seed, 2, 3, 4, 5, noise=noise).flatten() for noise in NOISES])

    seed = torch.tensor([123])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed), both(seed))


def test_masks_script():
    def masks(seed: torch.Tensor):
        return functional.perturbation_mask(seed, 2, 3, 4, 5, noise="waves") + functional.perturbation_mask(
            7, 2, 3, 4, 5, dtype=torch.float32
        )

    seed = torch.tensor([123])
    assert torch.equal(torch.jit.script(masks)(seed), masks(seed))


def test_empty_masks():
    assert functional.perturbation_mask(1, 0, 1, 4, 4).shape == (0, 1, 4, 4)
    assert functional.perturbation_mask(1, 2, 1, 0, 4).shape == (2, 1, 0, 4)
    assert functional.perturbation_mask(1, 0, 3, 4, 4, shared_masks=True).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("implementation", [functional, reference])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((True, 1, 1, 2, 2), {}, TypeError, "seed is bool"),
        ((1.0, 1, 1, 2, 2), {}, TypeError, "seed is float"),
        (("1", 1, 1, 2, 2), {}, TypeError, "seed is str"),
        ((2**64, 1, 1, 2, 2), {}, ValueError, r"seed is 18446744073709551616.*\[-2\*\*63, 2\*\*64\)"),
        ((-(2**63) - 1, 1, 1, 2, 2), {}, ValueError, "seed is -9223372036854775809"),
        ((torch.zeros(1), 1, 1, 2, 2), {}, TypeError, "seed has type .*int64"),
        ((torch.zeros(2, dtype=torch.int64), 1, 1, 2, 2), {}, ValueError, r"seed has .*one element"),
        ((1, -1, 1, 2, 2), {}, ValueError, "-1"),
        ((1, 1, 1, -2, 2), {}, ValueError, "-2"),
        ((1, 1, 1, 2, 2), {"noise": "pink"}, ValueError, "noise is .*pink.*uniform"),
    ],
)
def test_bad_input(implementation, arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        implementation.perturbation_mask(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"noise": None}, TypeError, "noise is NoneType"),
        ({"dtype": "float32"}, TypeError, "dtype is str"),
        ({"dtype": torch.int32}, TypeError, "float32, float64"),
    ],
)
def test_bad_options(options, error, sentence):
    with pytest.raises(error, match=sentence):
        functional.perturbation_mask(1, 1, 1, 2, 2, **options)
