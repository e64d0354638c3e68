"""The report of a results folder: one HTML page that needs no network, or a Report in Weights & Biases.

python -m bayesq.suite.report --html page.html                           the runs in results/
python -m bayesq.suite.report results dataset=digits --html page.html    only the runs that fit every filter
python -m bayesq.suite.report --entity TEAM --project P                  save the Report; --dry-run prints it instead
"""

import json
from pathlib import Path

from analysis.report import wandb_report
from analysis.report.content import content_of
from analysis.report.page import write_page
from bayesq.suite import wandb_environment as environment
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.dashboard import PROJECT
from bayesq.suite.errors import UserError


def main() -> None:
    """Write the page, or save or print the Report; on an error, print one line and exit with code 1."""
    parser = module_parser("report", __doc__)
    parser.add_argument("results", nargs="?", default="results", help="a results folder or wandb:ENTITY/PROJECT")
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE", help="only runs with this, such as method=bayesq,gptq")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write this HTML file, and nothing to W&B")
    parser.add_argument(
        "--paired", action="store_true", help="add paired intervals and tests against the strongest GPTQ"
    )
    project, entity = environment.default("project", PROJECT), environment.default("entity", None)
    parser.add_argument("--project", default=project, help="W&B project of the Report (%(default)s)")
    parser.add_argument("--entity", default=entity, help="W&B user or team of the Report")
    parser.add_argument("--dry-run", action="store_true", help="print the Report as JSON and save nothing")
    given = parser.parse_intermixed_args()
    where = list(given.where)
    if "=" in given.results and not Path(given.results).exists():  # filters alone: the folder is results
        where.insert(0, given.results)
        given.results = "results"
    try:
        if given.html is None and not given.entity and not given.dry_run:
            raise UserError("nothing to write: give --html PAGE, or --entity TEAM for a W&B Report, or --dry-run")
        content = content_of(given.results, where, given.paired)
        if given.html is not None:
            print(f"written: {write_page(content, given.html)}")
        elif given.dry_run:
            built = wandb_report.report(content, given.project, given.entity or "")
            print(json.dumps(wandb_report.spec(built), indent=2))
        else:
            print(f"saved: {wandb_report.save(content, given.project, given.entity)}")
    except (FileNotFoundError, UserError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
