"""Fixtures that every Python test has: a fixed seed, and the compiled operators where a test is about them."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    """PyTorch's default generator starts alike in every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def compiled_operators():
    """Skips a test of the compiled operators where only the reference is there; TORCH_PNN_REQUIRE_OPS=1 fails it."""
    from torch_pnn import _library

    status = _library.status()
    if status.ops != "loaded":
        message = f"the compiled operators are not loaded: {status.ops_error}"
        if os.environ.get("TORCH_PNN_REQUIRE_OPS", "0") not in ("", "0"):
            pytest.fail(message)
        pytest.skip(message)
    return status
