"""Initial weights that keep the signal's scale through perturbation layers; docs/initialisation.md derives them.

For an input x ~ N(0, 1) and a weight V of independent entries with mean 0, an output has the second moment
(maps that it sums) * Var(V) * E[activation(x + level * N)^2]. It is 1 where Var(V) is the inverse of the other two,
which is what `initialise_` draws. The correlation between the M maps of one channel does not enter: the entries of V
are independent, so all mixed terms vanish.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["initialise_", "second_moment"]

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def _normal_cdf(u: float) -> float:
    return 0.5 * (1 + math.erf(u / math.sqrt(2)))


def _sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u)) if u >= 0 else math.exp(u) / (1 + math.exp(u))


_ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "identity": lambda u: u,
    "relu": lambda u: max(u, 0.0),
    "leaky_relu": lambda u: u if u > 0 else 0.01 * u,
    "elu": lambda u: u if u > 0 else math.expm1(u),
    "selu": lambda u: _SELU_SCALE * (u if u > 0 else _SELU_ALPHA * math.expm1(u)),
    "gelu": lambda u: u * _normal_cdf(u),
    "silu": lambda u: u * _sigmoid(u),
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "hardtanh": lambda u: min(max(u, -1.0), 1.0),
}

# Mean and standard deviation of a kind of mask; of uniform and waves, the lattice (2u - 255) / 256 of bytes u.
_LATTICE_DEVIATION = math.sqrt((256**2 - 1) / 3) / 256
_GRID = 4000


@functools.lru_cache(maxsize=1024)
def second_moment(
    activation: str, level: float = 0.0, noise: str = "uniform", mean: float = 0.0, deviation: float = 1.0
) -> float:
    """E[activation(x + level * N)^2] for x ~ N(0, 1) and a mask value N, by numeric quadrature.

    Args:
        activation: its name.
        level: factor of the mask.
        noise: "uniform" and "waves": N uniform in (-1, 1), as the lattice is; "normal" and "tensor": N normal.
        mean: of N, for "tensor".
        deviation: the standard deviation of N, for "tensor".

    Returns:
        The second moment, to about six digits.

    Raises:
        ValueError: the activation or the kind is unknown, or a number is not finite.

    Example:
        >>> second_moment("relu"), round(second_moment("relu", level=1.0), 4)
        (0.5, 0.6667)
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, it should be one of {', '.join(_ACTIVATIONS)}")
    if noise not in ("uniform", "waves", "normal", "tensor"):
        raise ValueError(f'noise is {noise!r}, it should be "uniform", "waves", "normal" or "tensor"')
    if not all(math.isfinite(number) for number in (level, mean, deviation)):
        raise ValueError(f"level, mean and deviation are {level}, {mean} and {deviation}, they should be finite")
    uniform = noise in ("uniform", "waves")
    shift = level * mean if noise == "tensor" else 0.0
    spread = abs(level) * (_LATTICE_DEVIATION if uniform else deviation if noise == "tensor" else 1.0)
    total = math.sqrt(1 + spread**2)
    if activation == "identity":
        return 1 + spread**2 + shift**2
    if activation == "relu" and shift == 0.0:
        return (1 + spread**2) / 2
    # The density of u: that of a normal and a uniform variable's sum, or of a normal one. A mask of hardly any spread
    # is taken as normal, since the difference of two almost equal values would lose digits.
    half_width = spread * math.sqrt(3)
    if uniform and half_width > 1e-3:
        reach = 8.5 + half_width

        def density(u: float) -> float:
            return (_normal_cdf(u + half_width) - _normal_cdf(u - half_width)) / (2 * half_width)
    else:
        reach = 8.5 * total

        def density(u: float) -> float:
            return math.exp(-0.5 * ((u - shift) / total) ** 2) / (total * math.sqrt(2 * math.pi))

    function = _ACTIVATIONS[activation]
    step = 2 * reach / _GRID
    nodes = (shift - reach + step * i for i in range(_GRID + 1))
    return step * sum(density(u) * function(u) ** 2 for u in nodes)


def initialise_(weight: Tensor, moment: float = 1.0) -> Tensor:
    """Fills a 1x1 weight so that outputs have second moment 1 where its maps have second moment `moment`.

    The entries are uniform in (-b, b) with b = sqrt(3 / (maps * moment)), drawn from PyTorch's default generator.

    Args:
        weight: [T, maps, 1, 1]; changed in place.
        moment: E[a^2] of the maps, as from `second_moment`.

    Returns:
        The weight.

    Raises:
        ValueError: `moment` is not positive and finite.

    Example:
        >>> initialise_(torch.empty(64, 64, 1, 1)).abs().max() <= (3 / 64) ** 0.5
        tensor(True)
    """
    if not (math.isfinite(moment) and moment > 0):
        raise ValueError(f"moment is {moment}, it should be positive and finite")
    if weight.numel() > 0:
        bound = math.sqrt(3 / (weight.shape[1] * moment))
        with torch.no_grad():
            weight.uniform_(-bound, bound)
    return weight
