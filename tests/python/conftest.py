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


def pytest_terminal_summary(terminalreporter):
    """Prints the worst and the mean ratio of error to bound that the bounded tier saw."""
    import sys

    support = sys.modules.get("tiers_support")
    if support is None or not support.RATIOS:
        return
    terminalreporter.section("bounded tier: |error| / bound")
    for (name, dtype), (worst, total, count) in sorted(support.RATIOS.items()):
        mean = total / count
        terminalreporter.write_line(f"{name:12} {dtype:9} worst {worst:.3f}  mean {mean:.4f}  ({count} values)")
