"""Derives the polynomials of activations.h, prints them as C, and checks that the header holds them.

Two functions of one variable are all that the activations need:

    P(r) = (exp(r) - 1 - r) / r^2              on |r| <= ln(2)/2
    M(z) = exp(z^2/2) * erfc(z/sqrt(2)) / 2    on 0 <= z <= 15 (float) or 39 (double)

M is the normal distribution's upper tail without its exponential, Mills' ratio divided by sqrt(2*pi); it falls like
1/(z*sqrt(2*pi)).

P is a polynomial. For float, M is N(z)/D(z) of degrees 5 and 6, which interpolates it at Chebyshev's points of
w = (z - 3)/(z + 3); all coefficients are positive, so that the sums do not cancel, but their rounding errors add up.
For double, therefore, M is F(w)/(1 + 0.796875 z) with a polynomial F in w = (z - 5)/(z + 5): F falls from 0.5 to 0.32
and |w| stays below 1, so that little but the last step's rounding counts; the factor makes F flat at z = 0, where w's
own rounding error is largest. (The idea of such a w: Shepherd and Laframboise, "Chebyshev approximation of
(1 + 2x) exp(x^2) erfc x", 1981.)

The polynomials are Chebyshev's near-minimax fits. All is computed with 60 digits and each coefficient rounded once.

Usage: python activation_coefficients.py            prints each block of C lines with its error
       python activation_coefficients.py --check    fails where activations.h holds other lines; 77 without mpmath
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import mpmath as mp
except ImportError:
    print("needs mpmath (pip install mpmath)")
    sys.exit(77)

mp.mp.dps = 60


def exp_tail(r: mp.mpf) -> mp.mpf:
    """P(r); its series near 0, where the quotient has no digits left."""
    if abs(r) < mp.mpf("1e-10"):
        return mp.mpf(1) / 2 + r / 6 + r * r / 24
    return (mp.expm1(r) - r) / r**2


def normal_tail(z: mp.mpf) -> mp.mpf:
    """M(z)."""
    return mp.exp(z * z / 2) * mp.erfc(z / mp.sqrt(2)) / 2


def fit_exp_tail(terms: int) -> tuple[list[mp.mpf], mp.mpf]:
    """The `terms` coefficients of P, lowest first, and the error that they leave in exp(r)."""
    half = mp.log(2) / 2
    coefficients, error = mp.chebyfit(exp_tail, [-half, half], terms, error=True)
    return coefficients[::-1], error * half**2


def fit_rational_tail(degree: int, limit: int, a: int) -> tuple[list[mp.mpf], list[mp.mpf], mp.mpf]:
    """N and D, lowest coefficient first (D starts with 1), and the worst relative error at 1000 points."""
    count = 2 * degree + 2
    top = mp.mpf(limit - a) / (limit + a)

    def point(t: mp.mpf) -> mp.mpf:
        w = (top - 1) / 2 + (top + 1) / 2 * t
        return a * (1 + w) / (1 - w)

    system, right = mp.matrix(count, count), mp.matrix(count, 1)
    for i in range(count):
        z = point(mp.cos(mp.pi * (2 * i + 1) / (2 * count)))
        for j in range(degree + 1):
            system[i, j] = z**j
            system[i, degree + 1 + j] = -normal_tail(z) * z ** (j + 1)
        right[i] = normal_tail(z)
    solution = list(mp.lu_solve(system, right))
    numerator, denominator = solution[: degree + 1], [mp.mpf(1), *solution[degree + 1 :]]
    error = mp.mpf(0)
    for i in range(1000):
        z = point(mp.mpf(2 * i) / 999 - 1)
        value = mp.polyval(numerator[::-1], z) / mp.polyval(denominator[::-1], z)
        error = max(error, abs(value / normal_tail(z) - 1))
    return numerator, denominator, error


def fit_flat_tail(terms: int, limit: int, a: int) -> tuple[list[mp.mpf], mp.mpf]:
    """The `terms` coefficients of F, lowest first, and its error."""

    def flat(w: mp.mpf) -> mp.mpf:
        z = a * (1 + w) / (1 - w)
        return (1 + mp.mpf(0.796875) * z) * normal_tail(z)

    coefficients, error = mp.chebyfit(flat, [-1, mp.mpf(limit - a) / (limit + a)], terms, error=True)
    return coefficients[::-1], error


def horner(name: str, variable: str, coefficients: list[mp.mpf]) -> str:
    """The C lines that evaluate a polynomial, given its coefficients, lowest first."""
    literals = [float(c).hex() for c in coefficients[::-1]]
    lines = [f"  vd {name} = vd_set1({literals[0]});"]
    lines += [f"  {name} = vd_fma({name}, {variable}, vd_set1({literal}));" for literal in literals[1:]]
    return "\n".join(lines)


def blocks() -> list[tuple[str, str]]:
    """Each block's title, with its error, and its C lines."""
    result = []
    for use, terms in (("float32", 6), ("float64", 11)):
        coefficients, error = fit_exp_tail(terms)
        result.append((f"P for {use}: error 2^{mp.nstr(mp.log(error, 2), 4)}", horner("p", "r", coefficients)))
    numerator, denominator, error = fit_rational_tail(5, 15, 3)
    error_text = f"error 2^{mp.nstr(mp.log(error, 2), 4)}"
    result.append((f"N for float32: {error_text}", horner("n", "z", numerator)))
    result.append((f"D for float32: {error_text}", horner("d", "z", denominator)))
    coefficients, error = fit_flat_tail(24, 39, 5)
    result.append((f"F for float64: error 2^{mp.nstr(mp.log(error, 2), 4)}", horner("f", "w", coefficients)))
    return result


def main() -> int:
    """Prints the blocks, or with --check compares them with the header."""
    check = sys.argv[1:] == ["--check"]
    header = Path(__file__).with_name("activations.h").read_text(encoding="utf-8") if check else ""
    missing = 0
    for title, lines in blocks():
        if not check:
            print(f"/* {title} */\n{lines}\n")
        elif lines not in header:
            print(f"activations.h does not hold the lines of {title}")
            missing += 1
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
