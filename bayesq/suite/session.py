"""Objects that the runs of one command share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the numerical libraries are imported for runs only
    from bayesq.posterior import WhiteningStore


@dataclass
class Session:
    """One object per command; every run gets it.

    Attributes:
        whitenings: of the last run that has some in memory.
    """

    whitenings: "WhiteningStore | None" = None
