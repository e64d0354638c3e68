"""The suite's W&B workspace: `python -m bayesq.suite.dashboard --project P --entity E` saves it.

It shows accuracy, divergence and stored bits against the budget, by method; the time and memory of runs; and tables
and plots of layers and calibration. `bayesq.suite.tracking` logs every key that a panel uses.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from bayesq.suite import wandb_environment as environment
from bayesq.suite.arguments import exit_with
from bayesq.suite.config import require_wandb_key
from bayesq.suite.errors import UserError
from bayesq.suite.plots import CHARTS
from bayesq.suite.tracking import LAYER_HISTORY, LAYER_STEP, LAYERS_KEY
from bayesq.suite.wandb_names import label, project_label

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "BayesQ suite"
# The default of wandb.project in conf/config.yaml.
PROJECT = "bayesq"
METRIC, DIVERGENCE = "accuracy", "q/kl_to_fp"
# Times of the stages before the evaluation.
PREPARATION = ("time/calibrate_s", "time/posterior_s", "time/quantize_s", "time/distill_s")
# Counts of fallbacks: what a run did instead of what was asked.
FALLBACKS = ("fallback/damping_retries", "fallback/dead_columns", "fallback/unseen_layers", "fallback/oom_retries")


def workspace(project: str, entity: str, metric: str = METRIC, group: str | None = None) -> "Workspace":
    """Build the workspace without saving it; this needs neither a login nor the network.

    Runs are grouped by method, budget and ablation, so panels show means over seeds. Long names of projects and groups
    are shortened as in `bayesq.suite.tracking`. Raises UserError if the package wandb-workspaces is missing.

    Args:
        project, entity: W&B project, and W&B user or team.
        metric: the task's metric, as in q/<metric>.
        group: show only the runs of this workload, `<model>-<dataset>`; None shows all runs of the project.
    """
    if find_spec("wandb_workspaces") is None:
        raise UserError("the dashboard needs the package wandb-workspaces: pip install 'bayesq[dashboard]'")
    import wandb_workspaces.workspaces as ws

    project, group = project_label(project), group if group is None else label(group)
    shown = [f"q/{metric}", f"delta/{metric}", DIVERGENCE, "bits/code", "bits/stored", "time/total_s"]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if group is None else label(f"{NAME}: {group}"),
        sections=_sections(metric),
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters="" if group is None else ws.And(ws.Metric("Group") == group),
            groupby=[ws.Config("method"), ws.Config("bits"), ws.Config("ablation")],
            pinned_columns=[*(f"summary:{key}" for key in shown), "config:seed"],
        ),
    )


def _sections(metric: str) -> list[Any]:
    """Sections of quality, cost, and layers."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    quality, bits, stored = f"q/{metric}", panels.Config("bits"), panels.SummaryMetric("bits/stored")

    def lines(title: str, key: str) -> Any:
        """One line per method."""
        return panels.CustomChart(
            query={"summary": {"keys": ["bits/target", key, "method"]}},
            chart_name="wandb/line/v0",
            chart_fields={"x": "bits/target", "y": key, "stroke": "method"},
            chart_strings={"title": title},
        )

    def scatter(title: str, x: Any, key: str, log_y: bool | None = None) -> Any:
        return panels.ScatterPlot(title=title, x=x, y=panels.SummaryMetric(key), log_y=log_y)

    def bars(title: str, summary: Literal["mean", "max", "sum"], *metrics: str) -> Any:
        """One bar per method."""
        method = panels.Config("method")
        return panels.BarPlot(title=title, metrics=[*metrics], groupby=method, groupby_aggfunc=summary)

    charts = [
        panels.CustomChart(
            query={"summaryTable": {"tableKey": chart.table_key}},
            chart_name=chart.preset,
            chart_fields=dict(chart.fields),
            chart_strings=dict(chart.texts),
        )
        for chart in CHARTS
    ]
    sections = {
        "Quality against bits": [
            lines(f"{metric} against bits by method", quality),
            lines("KL to full precision (nats) against bits by method", DIVERGENCE),
            scatter(f"{metric} against bits", bits, quality),
            scatter("KL (nats) against bits", bits, DIVERGENCE, log_y=True),
            scatter(f"Stored bits against {metric}", stored, quality),
            bars(f"Change of {metric}", "mean", f"delta/{metric}"),
        ],
        "Cost": [
            bars("Preprocessing time (s)", "mean", *PREPARATION),
            scatter("Total time (s) against bits", bits, "time/total_s"),
            bars("Peak memory (bytes)", "max", "memory/peak_rss_bytes", "memory/peak_device_bytes"),
            bars("Fallbacks", "sum", *FALLBACKS),
        ],
    }
    return [
        *(ws.Section(name=name, is_open=True, panels=content) for name, content in sections.items()),
        ws.Section(
            name="Layers and calibration",
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=2, rows=2),
            panels=[*charts, *_curves(), panels.WeavePanelSummaryTable(table_name=LAYERS_KEY)],
        ),
    ]


def _curves() -> list[Any]:
    """Numbers of the layers in forward order, a line per run."""
    import wandb_workspaces.reports.v2 as panels

    return [
        panels.LinePlot(title=title, x=LAYER_STEP, y=[f"{LAYER_HISTORY}{column}"], log_y=log_y)
        for title, column, log_y in (
            ("Code bits by layer", "bits/code", None),
            ("Achieved risk by layer (nats)", "achieved_risk", True),
            ("Seconds by layer", "seconds", None),
        )
    ]


def definition(built: "Workspace") -> dict[str, Any]:
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
    parser = argparse.ArgumentParser(prog="python -m bayesq.suite.dashboard", description=__doc__)
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
