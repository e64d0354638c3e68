"""What the runs of one command leave to each other."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the numerical libraries are imported for runs only
    from bayesq.posterior import WhiteningStore


@dataclass
class Session:
    """Made by the command, handed from run to run.

    Attributes:
        whitenings: of the last run that has any in memory.
    """

    whitenings: "WhiteningStore | None" = None
