"""Settings of the devices' arithmetic, for the whole process, as `torch.backends` has PyTorch's own.

``backends.cuda.allow_tf32`` lets float32 layers on a CUDA device multiply on the tensor cores, with the operands of
their products rounded to TF32 (11 significant bits); sums, moments, masks, activations and results stay float32. It is
False until it is set here, in C++ (``torch_pnn::allow_tf32``) or by ``TORCH_PNN_ALLOW_TF32=1`` in the environment:
float32 then has float32's accuracy, and on the GPU the CPU's bits. On the CPU, and for other types, it changes nothing.

It is read when a layer runs, so it also holds for compiled, exported and scripted models; set it outside of functions
that are compiled. PyTorch's settings are not followed: the operators cannot read them, and PyTorch allows TF32 in
convolutions by default. To have the layer do as PyTorch's matrix products do, say so once:

    torch_pnn.backends.cuda.allow_tf32 = torch.backends.cuda.matmul.allow_tf32

``backends.cuda.allow_wgmma`` lets bfloat16 and float16 layers, and float32 ones with ``allow_tf32``, on a Hopper GPU
(compute capability 9.0) use its asynchronous matrix products, where the layer is a plain one: 256-value masks from a
seed and ReLU, with normalisation inside or without (docs/cuda.md). In 16-bit types they take about half the
time. It is True until it is set here, in C++ (``torch_pnn::allow_wgmma``) or by ``TORCH_PNN_ALLOW_WGMMA=0``; results
without them are those of other GPUs' tensor cores. They have the same bits where sums are exact and, of TF32, operands
fit its 11 bits (else halves are rounded to even here, away from zero there); others are rounded in another order,
within the same bounds. Elsewhere it changes nothing.

Example:
    >>> import torch_pnn
    >>> torch_pnn.backends.cuda.allow_tf32, torch_pnn.backends.cuda.allow_wgmma
    (False, True)
"""

from __future__ import annotations

import torch

__all__ = ["cuda"]


def _checked(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), it should be a bool")
    return value


class _Cuda:
    """Settings of CUDA devices."""

    __slots__ = ()

    @property
    def allow_tf32(self) -> bool:
        """Whether float32 products may be of operands rounded to TF32.

        Raises:
            TypeError: where it is set to something that is not a bool.
        """
        return bool(torch.ops.torch_pnn._allow_tf32())

    @allow_tf32.setter
    def allow_tf32(self, value: bool) -> None:
        torch.ops.torch_pnn._allow_tf32(_checked("allow_tf32", value))

    @property
    def allow_wgmma(self) -> bool:
        """Whether 16-bit and TF32 layers on a Hopper GPU may use its asynchronous products.

        Raises:
            TypeError: where it is set to something that is not a bool.
        """
        return bool(torch.ops.torch_pnn._allow_wgmma())

    @allow_wgmma.setter
    def allow_wgmma(self, value: bool) -> None:
        torch.ops.torch_pnn._allow_wgmma(_checked("allow_wgmma", value))


cuda = _Cuda()
