"""torch-pnn: the perturbation layer of Perturbative Neural Networks as a PyTorch operator with a C core.

`PerturbConv2d` stands where an `nn.Conv2d` stood: fixed masks are added to the input, an activation follows, and a
learnable 1x1 weight mixes the results (Juefei-Xu, Boddeti, Savvides, CVPR 2018). `functional` has the same as functions
of tensors, `reference` the same in plain PyTorch, `models` whole networks; `convert` puts the layer into a
model and `restore` takes it out.

Example:
    >>> import torch, torch_pnn
    >>> torch_pnn.PerturbConv2d(3, 8, kernel_size=3, padding=1, seed=1)(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 8, 16, 16])
"""

from . import _library, backends, counters, export, functional, models, reference
from .blocks import PerturbBasicBlock, PerturbBottleneck
from .convert import convert
from .fuse import fuse
from .modules import LBConv2d, PerturbConv2d
from .restore import restore
from .summary import summary

__all__ = [
    "LBConv2d",
    "PerturbBasicBlock",
    "PerturbBottleneck",
    "PerturbConv2d",
    "__version__",
    "backends",
    "convert",
    "counters",
    "export",
    "functional",
    "fuse",
    "models",
    "reference",
    "restore",
    "summary",
]


def _version() -> str:
    """The installed package's version, or the compiled library's where the package is not installed."""
    from importlib import metadata

    try:
        return metadata.version("torch-pnn")
    except metadata.PackageNotFoundError:
        version = _library.status().library_version
        return "0.0.0+unknown" if version == "none" else version


__version__ = _version()
