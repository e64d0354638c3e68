"""`python -m analysis.notebooks RESULTS [KEY=VALUE ...] --output DIR`: each page as an executed notebook."""

import argparse
from pathlib import Path

from analysis.notebooks import NOTEBOOKS
from analysis.notebooks.execute import execute


def main() -> None:
    """Make and execute the notebooks."""
    parser = argparse.ArgumentParser(prog="python -m analysis.notebooks", description=__doc__)
    parser.add_argument("results", help="a results folder, such as results, or wandb:ENTITY/PROJECT")
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE", help="only runs with this, such as method=bayesq,gptq")
    parser.add_argument("--output", type=Path, default=Path("paper"), help="folder of notebooks, figures and tables")
    parser.add_argument("--only", nargs="+", choices=NOTEBOOKS, default=NOTEBOOKS, help="these pages")
    arguments = parser.parse_intermixed_args()
    for name in arguments.only:
        print(execute(name, arguments.results, arguments.output, arguments.where))


if __name__ == "__main__":
    main()
