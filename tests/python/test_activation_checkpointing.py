"""torch.utils.checkpoint: the same bits as without, reentrant or not, wholly or selectively; nothing is run twice."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from operators_support import bits, needs_derivatives
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from torch_pnn import LBConv2d, PerturbConv2d

FORWARD = torch.ops.torch_pnn.perturb_conv2d.default
NORM_FORWARD = torch.ops.torch_pnn.perturb_norm_conv2d.default


def network(*, norm: bool = False, masks: Any = None) -> nn.Sequential:
    more: dict[str, Any] = {"mask_size": 8, "train_masks": True} if masks == "trained" else {}
    return nn.Sequential(
        PerturbConv2d(3, 8, 3, padding=1, masks=2, norm=norm, **more),
        nn.SiLU(),
        PerturbConv2d(8, 8, 3, stride=2, padding=1, groups=2, activation="gelu"),
        LBConv2d(8, 4),
    )


def run(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[bytes]:
    """The bits of the output, of the input's gradient, of all parameters' and of the buffers."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = call(x)
    output.square().sum().backward()
    return bits(
        output, x.grad, *(p.grad for p in model.parameters()), *(buffer.flatten() for buffer in model.buffers())
    )


class Counting(TorchDispatchMode):
    """Counts the operators that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def save_ours(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = op in (FORWARD, NORM_FORWARD)
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "non-reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "without early stop": lambda model, x: checkpoint(model, x, use_reentrant=False, early_stop=False),
    "selective": lambda model, x: checkpoint(
        model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_ours)
    ),
    "each layer": lambda model, x: checkpoint_sequential(model, 3, x, use_reentrant=False),
    "nested": lambda model, x: checkpoint(
        lambda x: model[2:](checkpoint(model[:2], x, use_reentrant=False)), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("masks", [None, "trained"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_has_the_same_bits(way: str, masks: Any) -> None:
    model = network(masks=masks)
    again = copy.deepcopy(model)
    assert run(model, partial(WAYS[way], model)) == run(again, again)


@pytest.mark.parametrize("way", WAYS)
def test_with_normalisation_in_evaluation(way: str) -> None:
    model = network(norm=True)
    model(torch.randn(4, 3, 8, 8))  # running statistics that are not the first ones
    model.eval()
    again = copy.deepcopy(model)
    assert run(model, partial(WAYS[way], model)) == run(again, again)


def test_normalisation_in_training_counts_as_batch_norms_do() -> None:
    """PyTorch's own BatchNorm2d moves its statistics again when it is recomputed; a layer with `norm` does the same."""
    model = network(norm=True)
    again = copy.deepcopy(model)
    ours = run(model, lambda x: checkpoint(model, x, use_reentrant=False))
    theirs = run(again, again)
    buffers = len(list(model.buffers()))
    assert ours[:-buffers] == theirs[:-buffers]
    norm, plain = model[0].norm, nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    checkpoint(plain, x, use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == plain[0].num_batches_tracked


@pytest.mark.parametrize("norm", [False, True])
@needs_derivatives
def test_selective_checkpointing_keeps_our_outputs(norm: bool) -> None:
    model = network(norm=norm).eval()
    forward = NORM_FORWARD if norm else FORWARD
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    counts = {}
    for way in ("non-reentrant", "selective"):
        with Counting() as counting:
            WAYS[way](model, x).sum().backward()
        counts[way] = counting.seen[forward]
    layers = 1 if norm else 2
    assert counts == {"non-reentrant": 2 * layers, "selective": layers}


@needs_derivatives
def test_recomputing_keeps_less() -> None:
    layers = nn.Sequential(*(PerturbConv2d(8, 8, 3, padding=1) for _ in range(6)))
    x = torch.randn(2, 8, 16, 16, requires_grad=True)

    def kept(call: Callable[[Tensor], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call(x)
        return sum(sizes.values())

    image = x.numel() * x.element_size()
    assert kept(layers) >= 6 * image
    assert kept(lambda x: checkpoint(layers, x, use_reentrant=False)) < 2 * image


def test_wrapped_layers_keep_their_names() -> None:
    model = network()
    again = copy.deepcopy(model)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=checkpoint_wrapper,
        check_fn=lambda module: isinstance(module, PerturbConv2d),
    )
    assert model.state_dict().keys() == again.state_dict().keys()
    assert run(model, model) == run(again, again)


def test_saved_tensors_on_the_cpu() -> None:
    model = network()
    again = copy.deepcopy(model)

    def call(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert run(model, call) == run(again, again)


@needs_derivatives
def test_second_derivatives_through_a_checkpoint() -> None:
    layer = PerturbConv2d(3, 4, 3, padding=1, activation="tanh", dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
