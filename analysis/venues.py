"""Widths of figures at venues. It imports no matplotlib, which takes longer than reading the results."""

from typing import NamedTuple

from bayesq.suite.errors import UserError


class Widths(NamedTuple):
    """Widths in inches: of a column, for figures with few panels, and of the text, for the others."""

    column: float = 3.3
    text: float = 6.9


# from the style files; pages of NeurIPS and ICLR have one column
VENUES = {"neurips": Widths(5.5, 5.5), "icml": Widths(3.25, 6.75), "iclr": Widths(5.5, 5.5)}
DEFAULT_WIDTHS = Widths()


def widths(venue: str | None = None, columns: int | None = None) -> Widths:
    """Widths of figures at a venue; with `columns`, all figures span one column (1) or the text (2).

    Raises:
        UserError: an unknown venue, or another number of columns.
    """
    if venue and venue not in VENUES:
        raise UserError(f"venue={venue}: one of {', '.join(VENUES)}")
    page = VENUES[venue] if venue else DEFAULT_WIDTHS
    if columns not in (None, 1, 2):
        raise UserError(f"columns={columns}: 1 (a column) or 2 (the text)")
    return page if columns is None else Widths(page[columns - 1], page[columns - 1])
