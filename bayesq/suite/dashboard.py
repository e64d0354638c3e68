"""The suite's W&B workspace: `python -m bayesq.suite.dashboard --project P --entity E` saves it.

It shows accuracy, divergence and stored bits against the budget, by method; settings beside results and the
differences of runs; the time and memory of runs; and tables and plots of layers and calibration. The panels that a
Report shares are in `bayesq.suite.wandb_panels`.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from bayesq.suite import wandb_environment as environment
from bayesq.suite import wandb_panels as shared
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.config import require_wandb_key
from bayesq.suite.errors import UserError
from bayesq.suite.tracking import LAYERS_KEY
from bayesq.suite.wandb_names import label, project_label

NAME = "BayesQ suite"
# The default of wandb.project in conf/config.yaml.
PROJECT = "bayesq"
METRIC = "accuracy"
# Times of the stages before the evaluation.
PREPARATION = ("time/calibrate_s", "time/posterior_s", "time/quantize_s", "time/distill_s")
# Counts of fallbacks: what a run did instead of what was asked.
FALLBACKS = ("fallback/damping_retries", "fallback/dead_columns", "fallback/unseen_layers", "fallback/oom_retries")


def workspace(project: str, entity: str, metric: str = METRIC, group: str | None = None) -> Any:
    """Build the workspace without saving it; this needs neither a login nor the network.

    Runs are grouped by the keys of `wandb_panels.GROUPS`, so panels show means over seeds, and ablations and other
    variants of a method stay apart. Long names of projects and groups are shortened as in `bayesq.suite.tracking`. With
    a `group`, only the runs of this workload, `<model>-<dataset>`, are shown. Raises UserError if the package
    wandb-workspaces is missing.
    """
    shared.require_workspaces("dashboard")
    import wandb_workspaces.workspaces as ws

    project, group = project_label(project), group if group is None else label(group)
    shown = [f"q/{metric}", f"delta/{metric}", shared.DIVERGENCE, "bits/code", "bits/stored", "time/total_s"]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if group is None else label(f"{NAME}: {group}"),
        sections=_sections(metric),
        settings=ws.WorkspaceSettings(max_runs=shared.MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters="" if group is None else ws.And(ws.Metric("Group") == group),
            groupby=[ws.Config(key) for key in shared.GROUPS],
            pinned_columns=[*(f"summary:{key}" for key in shown), "config:seed"],
        ),
    )


def _sections(metric: str) -> list[Any]:
    """Sections of quality, cost, and layers."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    def bars(title: str, summary: Literal["mean", "max", "sum"], *metrics: str) -> Any:
        """One bar per method."""
        method = panels.Config("method")
        return panels.BarPlot(title=title, metrics=[*metrics], groupby=method, groupby_aggfunc=summary)

    sections = {
        "Quality against bits": [
            *shared.quality([metric]),
            bars(f"Change of {metric}", "mean", f"delta/{metric}"),
        ],
        "Settings": [shared.parallel_coordinates([metric]), panels.RunComparer(diff_only="split")],
        "Cost": [
            bars("Preprocessing time (s)", "mean", *PREPARATION),
            shared.scatter("Total time (s) against bits", panels.Config("bits"), "time/total_s"),
            bars("Peak memory (bytes)", "max", "memory/peak_rss_bytes", "memory/peak_device_bytes"),
            bars("Fallbacks", "sum", *FALLBACKS),
        ],
    }
    layers = [
        *shared.layer_charts(),
        *shared.layer_curves(),
        *shared.progress_curves(),
        panels.WeavePanelSummaryTable(table_name=LAYERS_KEY),
    ]
    layout = ws.SectionLayoutSettings(columns=2, rows=2)
    return [
        *(ws.Section(name=name, is_open=True, panels=content) for name, content in sections.items()),
        ws.Section(name="Layers and calibration", is_open=True, layout_settings=layout, panels=layers),
    ]


def definition(built: Any) -> dict[str, Any]:
    """The workspace as W&B stores it."""
    content: dict[str, Any] = built._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return content


def save(project: str, entity: str | None, metric: str, group: str | None) -> str:
    """Save the workspace as a new view of the project and return its URL; without an entity, use the account's default.

    Raises UserError if there is no login or no entity, or if W&B did not save the workspace.
    """
    built = workspace(project, entity or "", metric, group)
    require_wandb_key("dashboard", "add --dry-run, which prints the dashboard without an account")
    import wandb

    try:
        if not entity:
            built.entity = wandb.Api().default_entity or ""
            if not built.entity:
                raise UserError("this account has no default entity: add --entity NAME")
        built.save()
        return str(built.url)
    except UserError:
        raise
    except Exception as error:  # the client raises errors of many types
        raise UserError(f"W&B did not save the dashboard ({type(error).__name__}: {error})") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Save the workspace, or print it with --dry-run; on an error, print one line and exit with code 1."""
    parser = module_parser("dashboard", __doc__)
    project, entity = environment.default("project", PROJECT), environment.default("entity", None)
    parser.add_argument("--project", default=project, help="W&B project, as wandb.project (%(default)s)")
    parser.add_argument("--entity", default=entity, help="W&B user or team; default: that of the account")
    parser.add_argument("--metric", default=METRIC, help="metric of the task, as in q/<metric> (%(default)s)")
    parser.add_argument("--group", help="show only the runs of one workload: MODEL-DATASET, such as resnet-digits")
    parser.add_argument("--dry-run", action="store_true", help="print the definition as JSON and save nothing")
    given = parser.parse_args(arguments)
    try:
        if given.dry_run:
            built = workspace(given.project, given.entity or "", given.metric, given.group)
            print(json.dumps(definition(built), indent=2))
        else:
            print(f"saved: {save(given.project, given.entity, given.metric, given.group)}")
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
