"""Prints activations_table.h: the activations with 25 digits at the places that are hardest for them.

Usage: python activations_table.py > activations_table.h      (needs mpmath)
"""

from __future__ import annotations

import mpmath as mp

mp.mp.dps = 60

SCALE, ALPHA = mp.mpf(1.0507009873554804934193349852946), mp.mpf(1.6732632423543772848170429916717)


def upper_tail(z: mp.mpf) -> mp.mpf:
    """The normal distribution above z."""
    return mp.erfc(z / mp.sqrt(2)) / 2


def density(z: mp.mpf) -> mp.mpf:
    """The normal distribution's density at z."""
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


def sigmoid(x: mp.mpf) -> mp.mpf:
    """1 / (1 + exp(-x))"""
    return 1 / (1 + mp.exp(-x))


FUNCTIONS = {
    "elu": (lambda x: x if x > 0 else mp.expm1(x), lambda x: mp.mpf(1) if x > 0 else mp.exp(x)),
    "selu": (
        lambda x: SCALE * (x if x > 0 else ALPHA * mp.expm1(x)),
        lambda x: SCALE * (mp.mpf(1) if x > 0 else ALPHA * mp.exp(x)),
    ),
    "gelu": (lambda x: x * upper_tail(-x), lambda x: upper_tail(-x) + x * density(x)),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * sigmoid(-x))),
    "tanh": (mp.tanh, lambda x: mp.sech(x) ** 2),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
}

# Zeros of gelu' and silu' (found by mp.findroot) with neighbours, cancellation near 0, tails down to denormal results.
ROOTS = {
    "gelu": mp.findroot(FUNCTIONS["gelu"][1], -0.75),
    "silu": mp.findroot(FUNCTIONS["silu"][1], -1.28),
}
POINTS = [-5e-324, -1e-310, -1e-300, -1e-16, -1e-8, -1e-3, -0.125, -0.34657359, -0.34657360, -0.5, -1.0, -2.5, -6.0]
POINTS += [-9.0, -13.0, -20.0, -36.7, -37.5, -38.0, -38.4, -87.0, -103.0, -300.0, -707.0, -709.0, -720.0, -744.0]
POINTS += [-x for x in POINTS]


def literal(x: mp.mpf) -> str:
    """x as a C long double; 0 with its sign below what a double could round to."""
    if abs(x) < mp.mpf("1e-400"):
        return "-0.0L" if x < 0 else "0.0L"
    return mp.nstr(x, 25, min_fixed=0, max_fixed=0) + "L"


def main() -> None:
    """Prints the table: the name, x exactly, the value and the derivative there."""
    print("// activations_table.h - printed by activations_table.py: {name, x, value, derivative}, 25 digits each.")
    print("// clang-format off")
    for name, (value, derivative) in FUNCTIONS.items():
        points = list(POINTS)
        if name in ROOTS:
            root = float(ROOTS[name])
            points += [root, root * (1 + 2**-40), root * (1 - 2**-20), root * (1 + 2**-8)]
        for x in points:
            exact = mp.mpf(x)
            figures = ", ".join(literal(f(exact)) for f in (value, derivative))
            print(f'{{"{name}", {x.hex()}, {figures}}},')


if __name__ == "__main__":
    main()
