"""Forward and backward read no tensor's value in Python: nothing waits for a GPU, and CUDA graphs can capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_pnn import LBConv2d, PerturbConv2d

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
}
# A tensor from Python numbers would be copied to the device, which also waits.
COPIES = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS | COPIES, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


LAYERS = {
    "seed": lambda: PerturbConv2d(3, 4, 3, padding=1, stride=2, masks=2),
    "seed, subsampled": lambda: PerturbConv2d(3, 4, 3, padding=1, stride=2, downsample="subsample"),
    "trained masks": lambda: PerturbConv2d(3, 4, 3, padding=1, mask_size=8, train_masks=True),
    "no noise": lambda: PerturbConv2d(3, 4, 3, padding=1, noise=None),
    "norm": lambda: PerturbConv2d(3, 4, 3, padding=1, norm=True),
    "lbc": lambda: LBConv2d(3, 4),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_value_is_read(kind: str, training: bool) -> None:
    layer = LAYERS[kind]().train(training)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with NoReads():
        layer(x).sum().backward()


def test_a_read_is_seen() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoReads():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="waits for the device"), NoReads():
        torch.tensor([1])
