"""Fixtures that every Python test has: a fixed seed, and the compiled operators where a test is about them."""

import os
import sys

import pytest
import torch
from torch.jit import _builtins

WORKERS_RATIOS = pytest.StashKey[dict]()

# TorchScript knows an operator's function by its address, for good, and PyTorch frees some of its own (torch.ao's
# quantized_decomposed::quantize_per_tensor). Whatever comes to lie there is then taken for that operator, and a model
# that holds it can't be scripted ("builtin cannot be used as a value"): none is freed here.
_KEPT = []
_register_builtin = _builtins._register_builtin


def _register_and_keep(function, name):
    _KEPT.append(function)
    _register_builtin(function, name)


_builtins._register_builtin = _register_and_keep


@pytest.fixture(autouse=True)
def fixed_seed():
    """PyTorch's default generator starts alike in every test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def no_compiled_graphs():
    """Dynamo compiles a function eight times at most: each file has all of them, whatever ran before it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


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


def ratios():
    """What tests of the bounded tier have seen so far in this process: (name, dtype) to worst, total and count."""
    support = sys.modules.get("tiers_support")
    return support.RATIOS if support else {}


def pytest_sessionfinish(session):
    """Under pytest-xdist, a worker hands over what it saw."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ratios"] = [(*key, *seen) for key, seen in ratios().items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Under pytest-xdist, what an ended worker handed over."""
    seen = node.config.stash.setdefault(WORKERS_RATIOS, {})
    for name, dtype, *found in getattr(node, "workeroutput", {}).get("ratios", []):
        worst, total, count = seen.get((name, dtype), (0.0, 0.0, 0))
        seen[name, dtype] = [max(worst, found[0]), total + found[1], count + found[2]]


def pytest_terminal_summary(terminalreporter, config):
    """Prints the worst and the mean ratio of error to bound that the bounded tier saw."""
    seen = config.stash.get(WORKERS_RATIOS, ratios())
    if not seen:
        return
    terminalreporter.section("bounded tier: |error| / bound")
    for (name, dtype), (worst, total, count) in sorted(seen.items()):
        mean = total / count
        terminalreporter.write_line(f"{name:12} {dtype:9} worst {worst:.3f}  mean {mean:.4f}  ({count} values)")
