"""docs/troubleshooting.md: every call on the page ends in the sentence that the page shows for it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from operators_support import needs_derivatives

import torch_pnn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"

pytestmark = needs_derivatives


@dataclasses.dataclass
class Entry:
    """A heading with its call and its sentence."""

    title: str
    code: str | None
    text: str

    @property
    def own_process(self) -> bool:
        """Whether the call is about a process that has not imported torch_pnn, or is about to."""
        return self.code is not None and not re.search(r"^import (torch|numpy), torch_pnn$", self.code, re.MULTILINE)


def entries() -> list[Entry]:
    found = []
    for part in PAGE.read_text(encoding="utf-8").split("\n### ")[1:]:
        title = part.splitlines()[0]
        blocks = dict(re.findall(r"^```(python|text)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL))
        found.append(Entry(title, blocks.get("python"), blocks["text"].removesuffix("\n")))
    return found


ENTRIES = entries()


def pattern(text: str) -> str:
    """The page's text as a regular expression, in which … stands for anything."""
    return ".*".join(re.escape(piece) for piece in text.split("…"))


def matches(text: str, said: str) -> bool:
    """Whether `said` is the page's text, blanks and ends of lines aside."""
    return re.fullmatch(pattern(" ".join(text.split())), " ".join(said.split()), re.DOTALL) is not None


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's files lie: scripted.pt, exported.pt2, whole.pt."""
    folder = tmp_path_factory.mktemp("troubleshooting")
    layer = torch_pnn.PerturbConv2d(3, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch_pnn.PerturbConv2d(3, 4, 3)).save(str(folder / "scripted.pt"))
    torch.export.save(torch.export.export(layer, (torch.randn(1, 3, 8, 8),)), folder / "exported.pt2")
    torch.save(layer, folder / "whole.pt")
    return folder


def test_the_page_has_the_entries() -> None:
    assert len(ENTRIES) >= 20
    assert all(entry.text for entry in ENTRIES)
    assert [entry.title for entry in ENTRIES if entry.code is None] == ["A device without kernels of ours"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's words about quantized and nested tensors
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.code and not e.own_process], ids=lambda e: e.title)
def test_calls_end_in_the_pages_sentence(entry: Entry) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(entry.code, {})
            said = [f"{w.category.__name__}: {w.message}" for w in caught if "torch_pnn" in str(w.message)]
        except Exception as error:
            said = [f"{type(error).__name__}: {error}"]
    assert len(said) == 1 and matches(entry.text, said[0]), f"{entry.text}\n--- is really\n{said}"


TELL = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        exec({code!r}, {{}})
        said = [f"{{w.category.__name__}}: {{w.message}}" for w in caught if "torch_pnn" in str(w.message)][0]
    except Exception as error:
        module = type(error).__module__
        said = f"{{'' if module == 'builtins' else module + '.'}}{{type(error).__name__}}: {{error}}"
print("SAID" + said + "END")
"""


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.own_process], ids=lambda e: e.title)
def test_processes_end_in_the_pages_sentence(entry: Entry, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TELL.format(code=entry.code)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "python"), "NO_COLOR": "1"}
        | {"TORCH_PNN_LIBRARY_DIR": str(Path(torch_pnn._library.status().ops_path).parent.resolve())},
    )
    said = done.stdout.partition("SAID")[2].rpartition("END")[0]
    assert matches(entry.text, said), f"{entry.text}\n--- is really\n{said}"
    if "exported" in entry.title:
        assert "torch_pnn" in done.stderr  # "the warnings above it name" our operator


def test_devices_without_kernels_are_told_in_the_pages_sentence() -> None:
    from torch_pnn import _fallback

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fallback._Once().tell("mps")
    (entry,) = (e for e in ENTRIES if e.code is None)
    assert matches(entry.text, f"{caught[0].category.__name__}: {caught[0].message}")


def test_mixed_devices_of_the_fallback_are_told_in_the_pages_words() -> None:
    op = torch.ops.torch_pnn.perturb_conv2d.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    x, weight = torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(4, 3, 1, 1)
    with pytest.raises(RuntimeError) as raised:
        op.redispatch(keys, x, weight, None, None, torch.ones(1, dtype=torch.int64, device="meta"))
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    said = str(raised.value).removeprefix("torch_pnn::perturb_conv2d: ").replace("meta", "cuda:0")
    assert said.splitlines()[0] in page


def test_the_sentences_for_c_are_the_sources() -> None:
    page = PAGE.read_text(encoding="utf-8")
    header = (ROOT / "csrc/torch/include/torch_pnn/torch_pnn.h").read_text(encoding="utf-8")
    sentence = " ".join(
        "".join(re.findall(r'"([^"]*)"', header.split("op.has_value(), name,")[1].split(");")[0])).split()
    )
    assert f"torch_pnn::perturb_conv2d {sentence}" in page
    config = (ROOT / "cmake/torch_pnnConfig.cmake.in").read_text(encoding="utf-8")
    for piece in ("no LibTorch 2.11 or newer: TORCH_PNN_TORCH_ROOT is '", "is too old: it should be 2.11 or newer",
                  "torch_pnn: no autograd library for LibTorch "):  # fmt: skip
        assert piece in page and piece in config
