"""What two processes check together; test_distributed.py starts it with torchrun and reads the results.

    torchrun --standalone --nproc-per-node 2 tests/python/distributed_checks.py FOLDER

Every function whose name begins with `check_` runs on both ranks. Numbers are small integers and multiples of 2^-8, so
that every sum is exact in float32 and the results of two processes must have the bits of one with the whole batch.
Each rank writes FOLDER/rank<n>.json: for each check None, or what went wrong.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torch_pnn import LBConv2d, PerturbConv2d, functional

BATCH = 8


class Net(nn.Module):
    """Two perturbation layers and an LBC layer, with integer weights; `unused` is a layer that no output needs."""

    def __init__(self, seed: int | None = 5, *, train_masks: bool = False, recompute: bool = False) -> None:
        super().__init__()
        more = {"mask_size": 4, "train_masks": True} if train_masks else {}
        self.first = PerturbConv2d(4, 6, 3, padding=1, stride=2, masks=2, level=1.0, seed=seed)
        self.second = PerturbConv2d(6, 4, 3, padding=1, groups=2, level=1.0, seed=seed and seed + 1, **more)
        self.third = LBConv2d(4, 2, anchors=3, seed=seed)
        self.unused: nn.Module | None = None
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        return self.third(self.second(y))


def exact(net: nn.Module) -> nn.Module:
    """The same integer weights in every process."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    return net


def data(step: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of images, and the integers that its outputs are weighted with in the loss."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randint(-2, 3, (BATCH, 4, 8, 8), generator=generator).float()
    return x, torch.randint(-1, 2, (BATCH, 2, 4, 4), generator=generator).float()


def part(tensor: Tensor) -> Tensor:
    """This rank's share of a batch."""
    return tensor.chunk(2)[dist.get_rank()]


def train(net: nn.Module, share: Callable[[Tensor], Tensor], steps: int = 2, scale: float = 1.0) -> list[Tensor]:
    """Two steps of SGD with momentum; returns every step's gradients and the parameters, in order.

    With a scale of 1/2, the gradient of the whole batch is the mean of its two halves'.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-2, momentum=0.5)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        x, weights = (share(tensor) for tensor in data(step))
        ((net(x) * weights).sum() * scale).backward()
        seen += [whole(parameter.grad) for parameter in net.parameters()]
        with torch.no_grad():  # a step of an integer: the second step's sums are exact as well
            for parameter in net.parameters():
                parameter.grad.sign_().mul_(4)
        optimizer.step()
    return [*seen, *(whole(parameter) for parameter in net.parameters())]


def whole(tensor: Tensor | None) -> Tensor:
    """A tensor's values, gathered where it is sharded."""
    if tensor is None:
        return torch.zeros(0)
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert any(tensor.any() for tensor in theirs)
    for index, (a, b) in enumerate(zip(ours, theirs)):
        assert torch.equal(a, b), f"tensor {index}: {(a - b).abs().max()} apart"


def alike_on_all_ranks(tensor: Tensor) -> None:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.contiguous())
    assert torch.equal(both[0], both[1])


# ---- DistributedDataParallel ----


def check_ddp_has_the_bits_of_one_process() -> None:
    ours = train(DistributedDataParallel(exact(Net())), part)
    same_bits(ours, train(exact(Net()), lambda tensor: tensor, scale=0.5))


def check_ddp_trains_masks() -> None:
    ours = train(DistributedDataParallel(exact(Net(train_masks=True))), part)
    same_bits(ours, train(exact(Net(train_masks=True)), lambda tensor: tensor, scale=0.5))


def check_ddp_static_graph() -> None:
    ours = train(DistributedDataParallel(exact(Net()), static_graph=True), part)
    same_bits(ours, train(exact(Net()), lambda tensor: tensor, scale=0.5))


def check_ddp_bucket_view() -> None:
    ours = train(DistributedDataParallel(exact(Net()), gradient_as_bucket_view=True, bucket_cap_mb=1), part)
    same_bits(ours, train(exact(Net()), lambda tensor: tensor, scale=0.5))


def check_ddp_with_recomputed_activations() -> None:
    ours = train(DistributedDataParallel(exact(Net(recompute=True))), part)
    same_bits(ours, train(exact(Net()), lambda tensor: tensor, scale=0.5))


def check_ddp_unused_parameters() -> None:
    def net() -> nn.Module:
        result = Net()
        result.unused = PerturbConv2d(2, 2, 3, padding=1, seed=9)
        return exact(result)

    wrapped = DistributedDataParallel(net(), find_unused_parameters=True)
    x, weights = (part(tensor) for tensor in data())
    (wrapped(x) * weights).sum().backward()
    alone = net()
    x, weights = data()
    ((alone(x) * weights).sum() * 0.5).backward()
    for (name, ours), theirs in zip(wrapped.module.named_parameters(), alone.parameters()):
        assert name.startswith("unused") == (ours.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def check_ddp_no_sync() -> None:
    wrapped = DistributedDataParallel(exact(Net()))
    alone = exact(Net())
    for step in range(3):
        x, weights = data(step)
        ((alone(x) * weights).sum() * 0.5).backward()
        if step < 2:
            with wrapped.no_sync():
                (wrapped(part(x)) * part(weights)).sum().backward()
        else:
            (wrapped(part(x)) * part(weights)).sum().backward()
    same_bits([p.grad for p in wrapped.parameters()], [p.grad for p in alone.parameters()])


# ---- masks and their seeds ----


def check_drawn_seeds_are_rank_0s() -> None:
    torch.manual_seed(1000 + dist.get_rank())
    net = Net(seed=None)
    drawn = net.first.mask_seed.clone()
    both = [torch.empty_like(drawn) for _ in range(2)]
    dist.all_gather(both, drawn)
    assert not torch.equal(both[0], both[1])
    wrapped = DistributedDataParallel(net)
    assert torch.equal(wrapped.module.first.mask_seed, both[0])
    alike_on_all_ranks(wrapped.module.first.perturbation(8, 8))
    alike_on_all_ranks(wrapped.module.third.anchor_weight)
    x, _ = data()
    alike_on_all_ranks(wrapped(x).detach())


def check_drawn_seeds_of_written_masks_are_rank_0s() -> None:
    torch.manual_seed(1000 + dist.get_rank())
    layer = PerturbConv2d(3, 4, 3, padding=1, mask_size=5)
    wrapped = DistributedDataParallel(layer)
    alike_on_all_ranks(layer.mask)
    expected = functional.perturbation_mask(layer.mask_seed, 3, 1, 5, 5)
    assert torch.equal(wrapped.module.mask, expected)


# ---- batch normalisation ----


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class Synchronised(nn.BatchNorm2d):
    """Batch normalisation over all ranks on the CPU, where PyTorch's SyncBatchNorm has none."""

    def forward(self, input: Tensor) -> Tensor:
        count = 2 * input.numel() // input.shape[1]
        mean = SumOverRanks.apply(input.sum((0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def norm_layer() -> PerturbConv2d:
    torch.manual_seed(3)
    return PerturbConv2d(3, 4, 3, padding=1, masks=2, norm=True, seed=3, dtype=torch.float64)


def check_a_synchronised_norm_sees_the_whole_batch() -> None:
    layer, alone = norm_layer(), norm_layer()
    layer.norm = Synchronised(6, dtype=torch.float64)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wrapped = DistributedDataParallel(layer)
    output = wrapped(part(x))
    expected = alone(x)
    torch.testing.assert_close(output, part(expected), rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    (expected.square().sum() * 0.5).backward()
    for ours, theirs in zip(layer.parameters(), alone.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def check_sync_batch_norm_converts() -> None:
    layer, alone = norm_layer(), norm_layer()
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(layer.norm) is nn.SyncBatchNorm
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), alone.eval()(x), rtol=1e-12, atol=1e-12)
    try:
        layer.train()(x)
    except ValueError as error:  # PyTorch has no SyncBatchNorm for the CPU
        assert "SyncBatchNorm expected input tensor to be on" in str(error)
    else:
        raise AssertionError("SyncBatchNorm now runs on the CPU: compare its results here")


def check_running_statistics_follow_rank_0() -> None:
    layer, alone = norm_layer(), norm_layer()
    wrapped = DistributedDataParallel(layer)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        wrapped(part(x)).sum().backward()
    wrapped(part(x))
    dist.broadcast(layer.norm.running_mean, 0)
    for _ in range(3):
        alone(x.chunk(2)[0])
    torch.testing.assert_close(layer.norm.running_mean, alone.norm.running_mean, rtol=1e-12, atol=1e-12)
    assert int(layer.norm.num_batches_tracked) == 3


# ---- FSDP2 and distributed checkpoints ----


def sharded(net: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in net.children():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def check_fsdp_has_the_bits_of_one_process() -> None:
    for reshard in (True, False):
        ours = train(sharded(exact(Net()), reshard_after_forward=reshard), part)
        same_bits(ours, train(exact(Net()), lambda tensor: tensor, scale=0.5))


def check_fsdp_trains_masks() -> None:
    net = sharded(exact(Net(train_masks=True)))
    assert type(net.second.mask).__name__ == "DTensor" or hasattr(net.second.mask, "full_tensor")
    ours = train(net, part)
    same_bits(ours, train(exact(Net(train_masks=True)), lambda tensor: tensor, scale=0.5))


def check_fsdp_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = sharded(exact(Net()), mp_policy=policy)
    x, weights = data()
    output = net(part(x))
    assert output.dtype == torch.bfloat16
    (output.float() * part(weights)).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())
    expected = exact(Net())(x)
    torch.testing.assert_close(output.float(), part(expected), rtol=2**-6, atol=2**-2)


def check_checkpoints_are_written(folder: Path | None = None) -> None:
    folder = Path(sys.argv[1]) if folder is None else folder
    net = sharded(exact(Net(seed=21)))
    dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=str(folder / "sharded"))
    wrapped = DistributedDataParallel(exact(Net(seed=22)))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.5)
    x, weights = (part(tensor) for tensor in data())
    (wrapped(x) * weights).sum().backward()
    optimizer.step()
    model_state, optimizer_state = get_state_dict(wrapped, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(folder / "replicated"))
    if dist.get_rank() == 0:
        torch.save(wrapped.module.state_dict(), folder / "replicated.pt")

    again = sharded(exact(Net(seed=1)))
    state = {"model": get_model_state_dict(again)}
    dcp.load(state, checkpoint_id=str(folder / "sharded"))
    again.load_state_dict(state["model"])
    x, _ = data()
    same_bits([net(x).detach(), net.first.mask_seed], [again(x).detach(), again.first.mask_seed])


# ---- running them ----


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, value in list(globals().items()):
        if name.startswith("check_"):
            yield name, value


def main() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    # Before the processes know of each other.
    masks = functional.perturbation_mask(7, 3, 2, 9, 11, noise="waves")
    outputs = exact(Net())(data()[0])
    digest = hashlib.sha256(masks.numpy().tobytes() + outputs.detach().numpy().tobytes()).hexdigest()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results: dict[str, str | None] = {}
    for name, check in checks():
        try:
            torch.manual_seed(0)
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        report = {"results": results, "digest": digest}
        (folder / f"rank{rank}.json").write_text(json.dumps(report), encoding="utf-8")
        failed = torch.tensor([results[name] is not None])
        dist.all_reduce(failed.int())  # the ranks begin each check together
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Everything is written. Now and then (seen with PyTorch 2.13 and 2.14) a process that has used gloo is aborted
    # while its interpreter ends ("terminate called without an active exception"), a failure in torchrun's eyes.
    sys.stdout.flush()
    os._exit(0)
