"""The table that `convert` leaves with a model, or returns as a plan: `Conversion` and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["RECORD", "Conversion", "ConversionRow", "merged"]

RECORD = "conversion"
"""The model's attribute that holds its table."""


_HEADER = ("module", "kind", "geometry", "became", "parameters", "why")


@dataclass(frozen=True)
class ConversionRow:
    """One convolution of the model and what became of it.

    Attributes:
        name: Its qualified name, the first one where it is used in several places; "" for the model itself.
        kind: The class it had.
        geometry: Channels, kernel, stride and so on in short.
        converted: Whether it became a perturbation layer.
        reason: Why it was left, or what replaced it.
        parameters_before: Its parameters.
        parameters_after: The same after conversion.
        seed: The seed of its masks, where `convert` was given one.
        aliases: Other names of the same module.
    """

    name: str
    kind: str
    geometry: str
    converted: bool
    reason: str
    parameters_before: int
    parameters_after: int
    seed: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """What `convert` did to a model, or with `dry_run` would do.

    `str()` of it is a table for a terminal, `markdown()` one for a page (notebooks show that), `rows` the data.

    Attributes:
        rows: A row per convolution, in the order of registration.
        parameters_before: Parameters of the whole model (shared ones once) before.
        parameters_after: The same after.
        seed: The seed that was given.
        preset: The preset that was given.
        options: The options that the layers were made with.
        dry_run: Whether this is only a plan.
        keep_original: Whether the layers hold the original weights, for `restore`.
    """

    rows: tuple[ConversionRow, ...]
    parameters_before: int
    parameters_after: int
    seed: int | None
    preset: str | None
    options: Mapping[str, Any]
    dry_run: bool
    keep_original: bool = False

    @property
    def converted(self) -> tuple[ConversionRow, ...]:
        """The rows of what was converted."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def left(self) -> tuple[ConversionRow, ...]:
        """The rows of what was left as it is."""
        return tuple(row for row in self.rows if not row.converted)

    def _cells(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        for row in self.rows:
            name = row.name or "(the model)"
            if row.aliases:
                name += f" (+{len(row.aliases)})"
            counts = f"{row.parameters_before:,}"
            if row.converted:
                counts += f" -> {row.parameters_after:,}"
            became = "converted" if row.converted else "left"
            lines.append((name, row.kind, row.geometry, became, counts, row.reason))
        return lines

    def _sum(self) -> str:
        verb = "would be converted" if self.dry_run else "converted"
        return (
            f"{len(self.converted)} {verb}, {len(self.left)} left; "
            f"parameters of the model {self.parameters_before:,} -> {self.parameters_after:,}"
        )

    def __str__(self) -> str:
        table = [_HEADER, *self._cells()]
        widths = [max(len(line[column]) for line in table) for column in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self._sum()])

    def markdown(self) -> str:
        """The same table in Markdown, for a page or a notebook.

        Returns:
            A pipe table, an empty line and the sums.

        Examples:
            >>> from torch import nn
            >>> import torch_pnn
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
            >>> print(torch_pnn.convert(net, dry_run=True).markdown())
            | module | kind | geometry | became | parameters | why |
            | --- | --- | --- | --- | --- | --- |
            | 0 | Conv2d | 3->8, 3x3 | left | 224 | stem: the first convolution in registration order |
            | 2 | Conv2d | 8->16, 3x3 | converted | 1,168 -> 144 | PerturbConv2d |
            <BLANKLINE>
            1 would be converted, 1 left; parameters of the model 1,392 -> 368
        """
        table = [_HEADER, ("---",) * len(_HEADER), *self._cells()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
        return "\n".join([*lines, "", self._sum()])

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.markdown()


def merged(previous: Conversion | None, record: Conversion) -> Conversion:
    """The table after a repeated conversion: what was converted earlier stays in it."""
    if previous is None:
        return record
    if not record.converted:
        return previous
    rows = {row.name: row for row in previous.rows}
    rows.update({row.name: row for row in record.rows})
    return replace(record, rows=tuple(rows.values()), parameters_before=previous.parameters_before)
