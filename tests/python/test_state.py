"""What is saved with a layer, and that it comes back to the same bits: elsewhere, copied, refused where it can't."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, _library

ROOT = Path(__file__).parents[2]


def network():
    """Every way of holding masks, in one chain of our own layers."""
    return nn.Sequential(
        PerturbConv2d(3, 6, 3, 2, 1, masks=2),
        PerturbConv2d(6, 6, 3, padding=1, groups=2, noise="normal", activation="gelu", norm=True),
        PerturbConv2d(6, 5, 1, noise="waves", shared_masks=True, masks=3, activation="tanh"),
        PerturbConv2d(5, 4, 1, mask_size=(8, 8), train_masks=True, level=0.5),
        PerturbConv2d(4, 4, 1, mask=torch.randn(4, 1, 8, 8)),
    )


PROGRAM = """
import sys, torch, test_state
torch.manual_seed(99)
model = test_state.network()
folder = sys.argv[1]
model.load_state_dict(torch.load(folder + "/state.pt", weights_only=True))
x = torch.load(folder + "/x.pt", weights_only=True).requires_grad_()
evaluated = model.eval()(x)
trained = model.train()(x)
trained.square().sum().backward()
torch.save([evaluated.detach(), trained.detach(), x.grad], folder + "/found.pt")
"""


def test_a_state_dict_gives_the_same_bits_in_another_process(tmp_path):
    model = network()
    x = torch.randn(2, 3, 16, 16)
    model(x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(x, tmp_path / "x.pt")
    path = os.pathsep.join([str(ROOT / "python"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        check=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    x.requires_grad_()
    evaluated = model.eval()(x)
    trained = model.train()(x)
    trained.square().sum().backward()
    for ours, theirs in zip((evaluated, trained, x.grad), torch.load(tmp_path / "found.pt"), strict=True):
        assert_same(ours, theirs)


def assert_same(ours, theirs):
    """The same bits; on the reference, whose products depend on where memory happens to lie, the same numbers."""
    if _library.status().ops == "loaded":
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs)


def copied(model, way):
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    if way == "whole":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    other = network()
    other.load_state_dict(state, assign=way == "assigned")
    return other


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "whole", "state", "assigned"])
def test_copies_give_the_same_bits(way):
    model = network()
    x = torch.randn(2, 3, 16, 16)
    model(x)
    other = copied(model, way)
    assert_same(model.eval()(x), other.eval()(x))
    assert_same(model.train()(x), other.train()(x))
    assert other[0].weight is not model[0].weight


def test_what_is_saved():
    assert list(PerturbConv2d(3, 4, 3).state_dict()) == ["weight", "bias", "mask_seed", "mask_version"]
    state = PerturbConv2d(3, 4, 3, bias=False, noise=None).state_dict()
    assert list(state) == ["weight", "mask_seed", "mask_version"]
    assert state["mask_seed"].dtype == state["mask_version"].dtype == torch.int64
    assert state["mask_seed"].shape == state["mask_version"].shape == (1,)
    given = PerturbConv2d(3, 4, 3, mask=torch.zeros(3, 1, 5, 5))
    assert set(given.state_dict()) == {"weight", "bias", "mask", "mask_version"}


def test_a_layer_and_its_control_exchange_states():
    layer, control = PerturbConv2d(3, 4, 3, norm=True), PerturbConv2d(3, 4, 3, norm=True, noise=None)
    control.load_state_dict(layer.state_dict())
    layer.load_state_dict(control.state_dict())


@pytest.mark.parametrize("version", [0, 2, -1])
def test_an_unknown_generator_version_is_refused(version):
    layer, other = PerturbConv2d(3, 4, 3), PerturbConv2d(3, 4, 3)
    state = layer.state_dict()
    state["mask_version"] = torch.tensor([version])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=rf"mask_version is \[{version}\], it should be \[1\]"):
        other.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("seed", [torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)])
def test_a_seed_of_another_kind_is_refused(seed):
    layer = PerturbConv2d(3, 4, 3)
    state = layer.state_dict()
    state["mask_seed"] = seed
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="mask_seed has type .* it should be one int64"):
        layer.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_missing_and_misshapen_masks_are_named():
    layer = PerturbConv2d(3, 4, 3, mask_size=(5, 5))
    with pytest.raises(RuntimeError, match="mask_seed"):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with pytest.raises(RuntimeError, match="size mismatch for mask"):
        layer.load_state_dict(PerturbConv2d(3, 4, 3, mask_size=(6, 6)).state_dict())


def test_seeds_stay_whole_when_types_change():
    layer = PerturbConv2d(3, 4, 3, seed=2**62 + 1)
    for change in ("half", "bfloat16", "double", "float"):
        getattr(layer, change)()
        assert layer.mask_seed.dtype == torch.int64 and layer.mask_seed.item() == 2**62 + 1


def test_lbc_filters_are_saved():
    first, second = LBConv2d(3, 4), LBConv2d(3, 4)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist, torch_pnn
from torch.nn.parallel import DistributedDataParallel
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
torch.manual_seed(rank)
model = torch_pnn.PerturbConv2d(3, 4, 3, padding=1)
ddp = DistributedDataParallel(model)
x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
y = ddp(x)
y.sum().backward()
torch.save([model.mask_seed, y.detach(), model.weight.grad], folder + f"/rank{rank}.pt")
dist.destroy_process_group()
os._exit(0)  # everything is written; why not simply end: see the end of distributed_checks.py
"""


@pytest.mark.slow
def test_ranks_share_the_masks(tmp_path):
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, str(rank), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
