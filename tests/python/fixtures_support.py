"""The network behind the saved files under fixtures/, and how they are written.

Run as a program, once for each release, with the compiled operators and the oldest supported PyTorch:

    TORCH_PNN_REQUIRE_OPS=1 python tests/python/fixtures_support.py

It writes the folder fixtures/<version> and refuses to touch one that is there: files of a release never change.
"""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).parent / "fixtures"
FILES = ("state.pt", "scripted.pt", "exported.pt2", "expected.pt")


def network() -> nn.Module:
    """A chain of our own layers alone, whose bits are promised: every kind of mask, most activations, norm, pooling."""
    from torch_pnn import PerturbConv2d

    return nn.Sequential(
        PerturbConv2d(3, 12, 3, stride=2, padding=1, masks=2, seed=0x0123456789ABCDEF),
        PerturbConv2d(12, 8, 3, padding=1, groups=4, noise="normal", activation="leaky_relu", level=0.3, seed=2),
        PerturbConv2d(8, 10, 3, padding=1, noise="waves", activation="hardtanh", masks=3, shared_masks=True, seed=3),
        PerturbConv2d(10, 9, 3, padding=1, norm=True, masks=2, seed=4),
        PerturbConv2d(9, 8, 2, padding=1, mask_size=(8, 7), train_masks=True, level=1.0, seed=2**64 - 1),
        PerturbConv2d(8, 6, 3, stride=(1, 2), padding=1, downsample="subsample", activation="gelu", seed=6),
        PerturbConv2d(6, 4, 1, mask=torch.zeros(6, 1, 8, 4), bias=False, activation="tanh"),
    )


def filled(model: nn.Module) -> nn.Module:
    """The network with numbers of its own in every parameter and statistic, and in evaluation mode."""
    generator = torch.Generator().manual_seed(2018)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator) if name.endswith("running_var") else tensor.uniform_(
                    -0.5, 0.5, generator=generator
                )
    return model.eval()


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output after each layer."""
    found = []
    for layer in model:
        x = layer(x)
        found.append(x.detach())
    return found


def save_scripted(model: torch.jit.ScriptModule, path: Path) -> None:
    """Saves a scripted model without its debug records, which hold the paths of the machine that wrote it."""
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    reader = torch._C.PyTorchFileReader(io.BytesIO(buffer.getvalue()))
    writer = torch._C.PyTorchFileWriter(str(path))
    own = (".data/", ".format_version", ".storage_alignment", "byteorder", "version")  # The writer adds these itself.
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and not name.startswith(own):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()


def save_exported(program: torch.export.ExportedProgram, path: Path) -> None:
    """Saves an exported model without its stack traces, which hold such paths as well."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def write(folder: Path) -> None:
    """Writes the files of this version into a new folder."""
    from torch_pnn import _library

    if _library.status().ops != "loaded":
        raise SystemExit("the expected bits come from the compiled operators, which are not loaded")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; the files of a release never change")
    model = filled(network())
    x = torch.randn(2, 3, 14, 12, generator=torch.Generator().manual_seed(7))
    scripted, exported = torch.jit.script(copy.deepcopy(model)), torch.export.export(model, (x,))
    masks = [layer.perturbation(*(layer.mask.shape[2:] if layer.mask is not None else (7, 6))) for layer in model]
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "state.pt")
    save_scripted(scripted, folder / "scripted.pt")
    save_exported(exported, folder / "exported.pt2")
    torch.save({"input": x, "outputs": outputs(model, x), "masks": masks}, folder / "expected.pt")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
    from torch_pnn import __version__

    write(FOLDER / __version__)
