"""One run over several processes, started by torchrun: each takes its share of every batch.

The result is that of one process to rounding: the loss is the mean over the whole batch, gradients are summed by
DistributedDataParallel, and batch normalisation takes its moments over the whole batch too. Rank 0 alone writes.
"""

from __future__ import annotations

import datetime
import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_active() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def rank() -> int:
    """This process's number; 0 where there is but one.

    Example:
        >>> rank()
        0
    """
    return int(os.environ["RANK"]) if is_active() else 0


def world() -> int:
    """The number of processes of a run.

    Example:
        >>> world()
        1
    """
    return int(os.environ["WORLD_SIZE"]) if is_active() else 1


def device(name: str) -> torch.device:
    """This process's device: with "cuda", the graphics card of its own number on its machine."""
    chosen = torch.device(name)
    if chosen.type == "cuda" and chosen.index is None and is_active():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return chosen


def start(device_name: str) -> None:
    """Joins the other processes, if there are any; done once."""
    if not is_active() or dist.is_initialized():
        return
    chosen = device(device_name)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # Rank 0 may measure a whole test set while the others wait.
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))


def stop() -> None:
    """Leaves the group and ends its threads.

    A DistributedDataParallel that waits for the garbage collector keeps the group's threads alive, and one that gives a
    tensor back while the interpreter ends aborts the process ("terminate called without an active exception").
    """
    if is_active() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def broadcast(value: Any, device_name: str) -> Any:
    """Rank 0's value, in every process; the others' are left out."""
    if not is_active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device(device_name))
    return box[0]


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of every process's value."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


class _Sum(torch.autograd.Function):
    """The sum over all processes; each one's gradient is the sum of what all of them did with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_processes(value.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_processes(grad.clone())


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the moments of the batch of all processes, on any device.

    PyTorch's own SyncBatchNorm has kernels for graphics cards alone. Moments are taken in float64. A batch that is too
    small to be shared counts once for each process, so that its running variance comes out a little lower.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        wide = input.double()
        axes = [0, *range(2, input.ndim)]
        count = torch.tensor([float(input.numel() // input.shape[1])], dtype=torch.float64, device=input.device)
        sum_over_processes(count)
        shape = [1, -1] + [1] * (input.ndim - 2)
        mean = _Sum.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (count / (count - 1).clamp_min(1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.double().view(shape) + self.bias.double().view(shape)
        return output.to(input.dtype)


def synchronised(model: nn.Module) -> nn.Module:
    """Makes every batch normalisation take its moments over all processes; weights and names stay."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _BatchNorm
    return model
