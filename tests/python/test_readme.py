"""The README's Python runs as it stands there, and its plain PyTorch is what the operator computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_blocks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "my_convolutional_network": torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1))}
    blocks = python_blocks()
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["y"].shape == (8, 128, 16, 16)
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(torch.jit.load("layer.pt")(x), names["layer"](x))


def test_the_plain_pytorch_is_the_operator() -> None:
    from torch_pnn import functional

    names = {"torch": torch}
    exec(compile(python_blocks()[0], str(README), "exec"), names)
    x, mask = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(3, 4, 5, 7, dtype=torch.float64)
    weight, bias = torch.randn(6, 12, 1, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    ours = functional.perturb_conv2d(x, weight, bias, mask=mask, masks=4, level=0.25, stride=2)
    torch.testing.assert_close(ours, names["perturb_conv2d"](x, weight, bias, mask, 0.25, 2))
