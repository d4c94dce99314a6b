"""State dicts in every combination of options and every container: PyTorch's files, safetensors, pickles, copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, models

safetensors = pytest.importorskip("safetensors.torch")

HOLDS = {
    "seed": {},
    "shared": {"shared_masks": True, "masks": 2},
    "sized": {"mask_size": 7},
    "trained": {"mask_size": 7, "train_masks": True},
    "given": {"mask": torch.arange(3 * 49, dtype=torch.float32).reshape(3, 1, 7, 7).sin()},
    "none": {"noise": None},
}
COMBINATIONS = [
    pytest.param(hold, bias, norm, dtype, id=f"{hold}{'' if bias else '-nobias'}{'-norm' * norm}-{str(dtype)[6:]}")
    for hold, bias, norm, dtype in itertools.product(
        HOLDS, (True, False), (False, True), (torch.float32, torch.bfloat16, torch.float64)
    )
]


def layer(hold, bias, norm, dtype):
    return PerturbConv2d(3, 4, 3, padding=1, bias=bias, norm=norm, dtype=dtype, **HOLDS[hold])


@pytest.mark.parametrize("hold, bias, norm, dtype", COMBINATIONS)
def test_every_combination_travels_in_every_container(hold, bias, norm, dtype, tmp_path):
    model = nn.Sequential(layer(hold, bias, norm, dtype))
    x = torch.randn(2, 3, 7, 7, dtype=dtype)
    model(x)  # moves running statistics
    model.eval()
    wanted = model(x)
    state = model.state_dict()
    assert all(value.is_contiguous() for value in state.values())

    def check(loaded):
        for assign in (False, True):
            torch.manual_seed(99)
            other = nn.Sequential(layer(hold, bias, norm, dtype))
            other.load_state_dict({name: value.clone() for name, value in loaded.items()}, assign=assign)
            assert torch.equal(other.eval()(x), wanted)
            assert {name: (v.dtype, v.shape) for name, v in other.state_dict().items()} == {
                name: (v.dtype, v.shape) for name, v in state.items()
            }

    torch.save(state, tmp_path / "state.pt")
    check(torch.load(tmp_path / "state.pt", weights_only=True))
    check(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    safetensors.save_file(state, tmp_path / "state.safetensors")
    check(safetensors.load_file(tmp_path / "state.safetensors"))
    check(safetensors.load(safetensors.save(state)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)(x), wanted)


def test_save_model_and_load_model(tmp_path):
    model = models.noise_resnet18(width=2, preset="juefeix2018", seed=2**64 - 1).eval()
    x = torch.randn(1, 3, 9, 9)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other = models.noise_resnet18(width=2, preset="juefeix2018").eval()
    assert not torch.equal(other(x), model(x))
    missing, unexpected = safetensors.load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert torch.equal(other(x), model(x))


def test_shared_tensors(tmp_path):
    shared = PerturbConv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared, LBConv2d(3, 3))
    model[3].weight = nn.Parameter(torch.randn(3, 3, 1, 1))
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(RuntimeError, match=r"0\.weight|share memory"):
        safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    again = PerturbConv2d(3, 3, 3, padding=1)
    other = nn.Sequential(again, nn.ReLU(), again, LBConv2d(3, 3))
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(x), model(x)) and other[0].weight is other[2].weight


def test_mask_seeds_are_whole_in_the_file(tmp_path):
    model = PerturbConv2d(3, 4, 3, seed=2**63 + 12345)
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    with safetensors.safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["bias", "mask_seed", "mask_version", "weight"]
        seed = file.get_tensor("mask_seed")
    assert seed.dtype == torch.int64 and seed.item() == 2**63 + 12345 - 2**64


def test_a_channels_last_weight_is_saved(tmp_path):
    model = PerturbConv2d(3, 4, 3, mask_size=(5, 5), masks=2).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 7, 7)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = PerturbConv2d(3, 4, 3, mask_size=(5, 5), masks=2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(other(x), model(x))
    # safetensors wants contiguous tensors, as it does of a convolution's.
    contiguous = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(contiguous, tmp_path / "state.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    torch.testing.assert_close(other(x), model(x))


def test_an_unknown_generator_is_refused_from_safetensors_too(tmp_path):
    state = PerturbConv2d(3, 4, 3).state_dict()
    state["mask_version"] = torch.tensor([7])
    safetensors.save_file(state, tmp_path / "state.safetensors")
    with pytest.raises(RuntimeError, match=r"mask_version is \[7\], it should be \[1\]"):
        safetensors.load_model(PerturbConv2d(3, 4, 3), tmp_path / "state.safetensors")
