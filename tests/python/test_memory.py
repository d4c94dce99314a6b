"""What autograd keeps for backward, and what a call allocates beyond its inputs and outputs."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import torch_pnn
from torch_pnn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from contestants import kept_bytes, peak_bytes

pytestmark = pytest.mark.usefixtures("compiled_operators")

B, C, H, T = 3, 5, 11, 7
SEED = 8  # bytes of the seed's tensor


def layer(masks: int, dtype: torch.dtype = torch.float32, channels_last: bool = False):
    x = torch.randn(B, C, H, H, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(T, C * masks, 1, 1, dtype=dtype, requires_grad=True)
    bias = torch.randn(T, dtype=dtype, requires_grad=True)
    return x, weight, bias


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("masks", [1, 2, 16, 64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_plain_layer_keeps_input_weight_and_mask_alone(masks, channels_last, activation):
    x, weight, bias = layer(masks, channels_last=channels_last)
    mask = torch.randn(C, masks, H, H)
    options = {"activation": activation}
    by_seed = kept_bytes(
        lambda: functional.perturb_conv2d(x, weight, bias, seed=torch.tensor([3]), masks=masks, **options)
    )
    assert by_seed == size(x, weight) + SEED
    assert kept_bytes(lambda: functional.perturb_conv2d(x, weight, bias, mask=mask, **options)) == size(x, weight, mask)
    assert kept_bytes(lambda: functional.perturb_conv2d(x, weight[:, :C], bias, noise=None, **options)) == (
        size(x, weight[:, :C])
    )


@pytest.mark.parametrize("masks", [1, 2, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalised_layer_keeps_four_vectors_more(masks, dtype):
    x, weight, bias = layer(masks, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta = (torch.ones(C * masks, dtype=statistics, requires_grad=True) for _ in range(2))
    mask = torch.randn(C, masks, H, H)
    running = torch.zeros(C * masks, dtype=statistics), torch.ones(C * masks, dtype=statistics)
    for source, kept in (({"seed": torch.tensor([3]), "masks": masks}, SEED), ({"mask": mask}, size(mask))):
        for training in (True, False):

            def call(source=source, training=training):
                return functional.perturb_norm_conv2d(
                    x, weight, bias, gamma, beta, *running, training=training, **source
                )

            assert kept_bytes(call) == size(x, weight) + kept + 4 * C * masks * gamma.element_size()


def test_trained_masks_are_kept_once():
    x, weight, bias = layer(4)
    mask = torch.randn(C, 4, H, H, requires_grad=True)
    assert kept_bytes(lambda: functional.perturb_conv2d(x, weight, bias, mask=mask)) == size(x, weight, mask)


@pytest.mark.parametrize("norm", [False, True])
def test_module_keeps_the_same_whatever_the_number_of_masks(norm):
    """Beyond V and the vectors, which have M times as many columns, nothing grows with M."""
    kept = []
    for masks in (1, 32):
        module = torch_pnn.PerturbConv2d(C, T, 3, padding=1, masks=masks, seed=1, norm=norm)
        x = torch.randn(B, C, H, H, requires_grad=True)
        vectors = 4 * 4 * C * masks if norm else 0
        kept.append(kept_bytes(lambda x=x, module=module: module(x)) - size(module.weight) - vectors)
    assert kept == [size(x) + SEED] * 2


def test_nothing_is_kept_without_gradients():
    x, weight, bias = layer(4)
    with torch.no_grad():
        assert kept_bytes(lambda: functional.perturb_conv2d(x, weight, bias, seed=1, masks=4)) == 0


def test_kept_bytes_sees_response_maps():
    """The measure itself: the plain composition keeps its M times larger activation."""
    x, weight, bias = layer(16)
    maps = B * C * 16 * H * H * 4
    kept = kept_bytes(
        lambda: torch.nn.functional.conv2d(
            torch.relu(x.unsqueeze(2) + torch.randn(C, 16, H, H)).flatten(1, 2), weight, bias
        )
    )
    assert kept >= maps


@pytest.mark.parametrize("masks", [1, 16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_beyond_inputs_and_outputs_does_not_grow_with_the_batch(masks, channels_last):
    options = (masks, False, "uniform", 0.1, "relu", [1, 1], 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight, mask = torch.randn(96, 32 * masks, 1, 1), torch.randn(32, masks, 16, 16)
    limit = torch.get_num_threads() * (2**20 + 4 * size(weight)) + size(weight)
    beyond = []
    for batch in (64, 256):
        x = torch.randn(batch, 32, 16, 16).contiguous(memory_format=layout)
        grad = torch.randn(batch, 96, 16, 16).contiguous(memory_format=layout)
        forward = partial(torch.ops.torch_pnn.perturb_conv2d, x, weight, None, mask, None, *options)
        operator = torch.ops.torch_pnn._perturb_conv2d_backward
        backward = partial(operator, grad, x, weight, mask, None, *options, [True, True, True, False])
        beyond.append((peak_bytes(forward) - size(grad), peak_bytes(backward) - size(x, weight) - 4 * 96))
        # A workspace of up to 64 KiB lies on the stack: nothing is allocated then.
        assert 0 <= min(beyond[-1]) and 0 < max(beyond[-1]) <= limit
    assert beyond[0] == beyond[1]
