"""`python -m analysis.notebooks RESULTS [KEY=VALUE ...] --output DIR`: the pages as executed notebooks."""

import argparse
import sys
from pathlib import Path

from analysis.notebooks import NOTEBOOKS, execute, update
from analysis.venues import VENUES
from bayesq.suite.errors import UserError


def main() -> None:
    """Execute the notebooks; one line on stderr and exit code 1 if the results cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m analysis.notebooks", description=__doc__)
    parser.add_argument("results", help="a results folder, such as results, or wandb:ENTITY/PROJECT")
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE", help="only runs with this, such as method=bayesq,gptq")
    parser.add_argument("--output", type=Path, default=Path("paper"), help="folder of notebooks, figures and tables")
    parser.add_argument("--only", nargs="+", choices=NOTEBOOKS, default=NOTEBOOKS, help="these pages")
    parser.add_argument("--venue", choices=VENUES, help="widths of the figures")
    parser.add_argument("--columns", type=int, choices=(1, 2), help="all figures span a column (1) or the text (2)")
    parser.add_argument("--update", action="store_true", help="store the outputs in analysis/notebooks as well")
    given = parser.parse_intermixed_args()
    try:
        for path in execute(
            given.results, given.output, given.only, where=given.where, venue=given.venue, columns=given.columns
        ):
            print(path)
            if given.update:
                update(path)
    except (FileNotFoundError, UserError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
