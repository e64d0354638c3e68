"""`python -m analysis RESULTS [KEY=VALUE ...] [--main | --ablation | --cost | --risk | --league | --glue]`: one table.

With `--output DIR` every table and figure goes there instead. RESULTS is a results folder or `wandb:ENTITY/PROJECT`.
Filters such as `dataset=digits method=bayesq,gptq` select the runs that fit all of them.
"""

import argparse
import sys

from analysis.loading import load_runs, require_finished, without_result
from analysis.tables.ablation import ablation_table
from analysis.tables.cost import cost_table
from analysis.tables.glue import glue_table, has_glue
from analysis.tables.league import league_table
from analysis.tables.main import main_table
from analysis.tables.overview import overview_table
from analysis.tables.risk import risk_table
from bayesq.suite.errors import UserError

TABLES = {
    "main": (main_table, "every method against GPTQ, with intervals and tests"),
    "ablation": (ablation_table, "every variant of BayesQ against the full method"),
    "cost": (cost_table, "seconds of the stages, and multiples of GPTQ's"),
    "risk": (risk_table, "risk of all layers over KL, and their rank correlation over runs"),
    "league": (league_table, "every setting of every method, ranked by KL over workloads and budgets"),
    "glue": (glue_table, "means over the tasks of GLUE, and which are missing"),
}


def main() -> None:
    """Print the table or write all files; one line on stderr and exit code 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    parser.add_argument("results", help="a results folder, such as results/, or wandb:ENTITY/PROJECT")
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE", help="only runs with this, such as method=bayesq,gptq")
    kind = parser.add_mutually_exclusive_group()
    for name, (_, text) in TABLES.items():
        kind.add_argument(f"--{name}", action="store_const", dest="table", const=name, help=text)
    kind.add_argument("--output", metavar="DIR", help="write all tables and figures there")
    parser.add_argument("--venue", choices=("neurips", "icml", "iclr"), help="with --output: widths of the figures")
    parser.add_argument("--columns", type=int, choices=(1, 2), help="with --output: width of all figures in columns")
    arguments = parser.parse_intermixed_args()
    source, where = arguments.results, arguments.where
    try:
        if arguments.output is not None:
            from analysis.notebooks import render_all

            widths = {"venue": arguments.venue, "columns": arguments.columns}
            render_all(source, arguments.output, where=where, **widths)
            return
        if arguments.venue or arguments.columns:
            sys.exit("error: --venue and --columns are widths of figures: add --output DIR")
        runs = require_finished(load_runs(source, where))
        if arguments.table == "glue" and not has_glue(runs):
            sys.exit(f"error: no run of a GLUE task in {source}")
        table = (TABLES[arguments.table][0] if arguments.table else overview_table)(runs)
        if table.empty:
            sys.exit(f"error: no run in {source} that this table shows; {'; '.join(table.footnotes)}".rstrip("; "))
        print(table.markdown(), end="")
        print(without_result(runs), end="", file=sys.stderr)
    except (FileNotFoundError, UserError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
