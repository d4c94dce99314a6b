"""The CUDA operators' library where no GPU is needed: it loads, registers its kernels, and says so."""

from __future__ import annotations

import pytest
import torch

from torch_pnn import _library

OPERATORS = (
    "perturb_conv2d",
    "_perturb_conv2d_backward",
    "perturb_norm_conv2d",
    "_perturb_norm_conv2d_backward",
    "perturbation_mask",
)
built = (_library.library_directory() / _library.CUDA_FILE).is_file()


@pytest.mark.skipif(not built, reason="the CUDA half was not built")
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is not a CUDA build")
def test_library_registers_every_operator_for_cuda() -> None:
    assert _library.status().cuda == "loaded"
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_pnn::{name}", "CUDA"), name


def test_status_says_why_it_is_not_loaded() -> None:
    state = _library.status().cuda
    if not built:
        assert state == "not built"
    elif torch.version.cuda is None:
        assert state == "not loaded: this PyTorch is not a CUDA build"
    else:
        assert state == "loaded"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(_library.status().cuda != "loaded", reason="the CUDA half is not loaded")
def test_operators_agree_with_the_cpu_on_a_gpu() -> None:
    x = torch.randint(-8, 9, (3, 5, 6, 7)) / 8.0
    weight = torch.randint(-3, 4, (4, 10, 1, 1)).float()
    seed = torch.tensor([7])
    y = torch.ops.torch_pnn.perturb_conv2d(x, weight, None, None, seed, 2)
    on_gpu = torch.ops.torch_pnn.perturb_conv2d(x.cuda(), weight.cuda(), None, None, seed.cuda(), 2)
    assert torch.equal(on_gpu.cpu(), y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(_library.status().cuda != "loaded", reason="the CUDA half is not loaded")
def test_mixed_devices_are_refused_on_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="weight is not on a CUDA device"):
        torch.ops.torch_pnn.perturb_conv2d(torch.ones(1, 2, 3, 3).cuda(), torch.ones(2, 2, 1, 1), None)
