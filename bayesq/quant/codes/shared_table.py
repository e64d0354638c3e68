"""Codes whose levels are in tables, one per width, that all layers of a model share: level(k) = table[width][k]."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from bayesq.quant.codes.base import Codebook, WidthCode, shown, stored_levels
from bayesq.quant.codes.rate_tables import RateTables


@dataclass(frozen=True, eq=False)
class TableCode(WidthCode):
    """A code that reads shared tables at some widths and computes its levels at the others.

    Attributes:
        tables: width -> table; each width occurs in the rows.
    """

    tables: Mapping[int, Codebook]

    def check(self, width: Tensor) -> None:
        """See `Code`; every table has the levels its width needs, and there are rows of that width."""
        for w, book in self.tables.items():
            if len(book.levels) != self.level_count(w):
                count = self.level_count(w)
                raise ValueError(f"codebook {book.name} has {len(book.levels)} levels, width {w} needs {count}")
            if not bool((width == w).any()):
                raise ValueError(f"codebook {book.name} is attached but no row has {w} bits")

    def table(self, width: int) -> Codebook | None:
        """See `WidthCode`."""
        return self.tables.get(width)

    def codebooks(self) -> tuple[Codebook, ...]:
        """See `Code`."""
        return tuple(self.tables.values())

    def with_levels(self, levels: Mapping[str, Tensor], width: Tensor) -> Self:
        """See `Code`."""
        tables = {w: Codebook(book.name, stored_levels(levels[book.name])) for w, book in self.tables.items()}
        return replace(self, tables=tables)

    def facts(self) -> dict[str, Any]:
        """The tables' names by width."""
        return super().facts() | {"codebooks": {str(w): book.name for w, book in sorted(self.tables.items())}}


@dataclass(frozen=True, eq=False)
class SharedTable(TableCode):
    """level(k) = table[width][k], and level(k) = k at a width without a table."""

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("a code without tables is Affine")

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """See `Code`."""
        return cls(named_tables(facts["codebooks"], codebooks, width))


def named_tables(named: Any, codebooks: Mapping[str, Codebook | RateTables], width: Tensor) -> dict[int, Codebook]:
    """The tables of a layer by width.

    Args:
        named: names by width, the header's entry `codebooks`.
        codebooks: of the model, by name.
        width: [R] bits of the layer's rows.

    Raises:
        ValueError: tables are not named by width, or one is missing or belongs to a width that no row has.
    """
    if not isinstance(named, Mapping) or list(named) != sorted(named):
        raise ValueError(f"codebooks: needs names by width, not {shown(named)}")
    used = set(map(str, width.unique().tolist()))
    tables = {}
    for w, name in named.items():
        if w not in used:
            raise ValueError(f"codebooks: no row has {shown(w)} bits")
        book = codebooks.get(name) if isinstance(name, str) else None
        if not isinstance(book, Codebook):
            raise ValueError(f"codebooks: there is no codebook {shown(name)}")
        tables[int(w)] = book
    return tables
