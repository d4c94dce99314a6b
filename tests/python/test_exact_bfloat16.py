"""TORCH_PNN_EXACT=1: bfloat16 has the same bits on every instruction set, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from torch_pnn._library import status

PROGRAM = """
import hashlib, torch, torch_pnn
torch.manual_seed(0)
x = torch.randn(3, 40, 9, 7).bfloat16().requires_grad_()
v = torch.randn(24, 80, 1, 1).bfloat16().requires_grad_()
y = torch_pnn.functional.perturb_conv2d(x, v, seed=5, masks=2, level=0.3)
gradients = torch.autograd.grad(y, (x, v), torch.randn(y.shape).bfloat16())
bits = hashlib.sha256()
for tensor in (y, *gradients):
    bits.update(tensor.detach().contiguous().view(torch.int16).numpy().tobytes())
print(torch.ops.torch_pnn._isa_name(), bits.hexdigest())
"""


def run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(status().ops != "loaded", reason="the compiled operators are not loaded")
def test_exact_bfloat16_has_the_same_bits_on_every_instruction_set() -> None:
    results = [run(TORCH_PNN_EXACT="1", PNN_MAX_ISA=isa) for isa in ("portable", "avx2", "neon", "avx512")]
    assert results[0][0] == "portable"
    assert len({digest for _, digest in results}) == 1
