"""The saved W&B workspace of the suite as code: `python -m bayesq.suite.dashboard --project P --entity E`.

Accuracy, divergence and stored bits against the budget, by method; what preparing a run costs; tables and plots of
layers and calibration. Every key that a panel names is one that `bayesq.suite.tracking` logs.
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
from bayesq.suite.tracking import LAYERS_KEY
from bayesq.suite.wandb_names import label, project_label

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "BayesQ suite"
# as in conf/config.yaml
PROJECT = "bayesq"
METRIC, DIVERGENCE = "accuracy", "q/kl_to_fp"
# The costs of a run before its evaluation.
PREPARATION = ("time/calibrate_s", "time/posterior_s", "time/quantize_s", "time/distill_s")
# Each counts how often a run did something else than asked.
FALLBACKS = ("fallback/damping_retries", "fallback/dead_columns", "fallback/unseen_layers", "fallback/oom_retries")


def workspace(project: str, entity: str, metric: str = METRIC, group: str | None = None) -> "Workspace":
    """The workspace, not saved yet; building it needs neither a login nor the network.

    Runs are grouped by method and budget, so that panels show means over seeds.

    Args:
        project, entity: where it belongs; the project and the group as runs name them, however long.
        metric: of the task, as in q/<metric>.
        group: the runs it shows, as `<model>-<dataset>`; None shows all of the project.

    Raises:
        UserError: the package wandb-workspaces is missing.
    """
    if find_spec("wandb_workspaces") is None:
        raise UserError("the dashboard needs the package wandb-workspaces: pip install 'bayesq[dashboard]'")
    import wandb_workspaces.workspaces as ws

    project, group = project_label(project), group if group is None else label(group)
    shown = [f"q/{metric}", f"delta/{metric}", DIVERGENCE, "bits/code", "bits/stored", "time/total_s"]
    layout = ws.SectionLayoutSettings(columns=2, rows=2)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if group is None else label(f"{NAME}: {group}"),
        sections=[
            ws.Section(name="Quality against bits", is_open=True, panels=_quality(metric)),
            ws.Section(name="Cost", is_open=True, panels=_cost()),
            ws.Section(name="Layers and calibration", is_open=True, layout_settings=layout, panels=_layers()),
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters="" if group is None else ws.And(ws.Metric("Group") == group),
            groupby=[ws.Config("method"), ws.Config("bits")],
            pinned_columns=[*(f"summary:{key}" for key in shown), "config:seed"],
        ),
    )


def _quality(metric: str) -> list[Any]:
    """Panels of accuracy and divergence against the budget."""
    import wandb_workspaces.reports.v2 as panels

    quality, bits = f"q/{metric}", panels.Config("bits")

    def by_method(title: str, key: str) -> Any:
        """A line for each method over the budget."""
        return panels.CustomChart(
            query={"summary": {"keys": ["bits/target", key, "method"]}},
            chart_name="wandb/line/v0",
            chart_fields={"x": "bits/target", "y": key, "stroke": "method"},
            chart_strings={"title": title},
        )

    def scatter(title: str, x: Any, key: str, log_y: bool | None = None) -> Any:
        return panels.ScatterPlot(title=title, x=x, y=panels.SummaryMetric(key), log_y=log_y)

    return [
        by_method(f"{metric} against bits by method", quality),
        by_method("KL to full precision (nats) against bits by method", DIVERGENCE),
        scatter(f"{metric} against bits", bits, quality),
        scatter("KL (nats) against bits", bits, DIVERGENCE, log_y=True),
        scatter(f"Stored bits against {metric}", panels.SummaryMetric("bits/stored"), quality),
        _bars(f"Change of {metric}", "mean", f"delta/{metric}"),
    ]


def _cost() -> list[Any]:
    """Panels of time and memory."""
    import wandb_workspaces.reports.v2 as panels

    total = panels.SummaryMetric("time/total_s")
    return [
        _bars("Preprocessing time (s)", "mean", *PREPARATION),
        panels.ScatterPlot(title="Total time (s) against bits", x=panels.Config("bits"), y=total),
        _bars("Peak memory (bytes)", "max", "memory/peak_rss_bytes", "memory/peak_device_bytes"),
        _bars("Fallbacks", "sum", *FALLBACKS),
    ]


def _layers() -> list[Any]:
    """The charts that every run logs, for all runs that are shown, and the table of layers."""
    import wandb_workspaces.reports.v2 as panels

    charts = [
        panels.CustomChart(
            query={"summaryTable": {"tableKey": chart.table_key}},
            chart_name=chart.preset,
            chart_fields=dict(chart.fields),
            chart_strings=chart.texts,
        )
        for chart in CHARTS
    ]
    return [*charts, panels.WeavePanelSummaryTable(table_name=LAYERS_KEY)]


def _bars(title: str, summary: Literal["mean", "max", "sum"], *metrics: str) -> Any:
    """Bars by method."""
    import wandb_workspaces.reports.v2 as panels

    method = panels.Config("method")
    return panels.BarPlot(title=title, metrics=[*metrics], groupby=method, groupby_aggfunc=summary)


def definition(built: "Workspace") -> dict[str, Any]:
    """The workspace as W&B stores it."""
    content: dict[str, Any] = built._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return content


def save(project: str, entity: str | None, metric: str, group: str | None) -> str:
    """Build the workspace and save it as a new view of the project; returns its address.

    Args:
        entity: user or team; None takes the account's default.

    Raises:
        UserError: there is no login, or W&B did not take it.
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
    except Exception as error:  # the client raises many kinds
        raise UserError(f"W&B did not save the dashboard ({type(error).__name__}: {error})") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; an error is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m bayesq.suite.dashboard", description=__doc__)
    project = environment.default("project", PROJECT)
    parser.add_argument("--project", default=project, help="W&B project, as wandb.project (%(default)s)")
    entity = environment.default("entity", None)
    parser.add_argument(
        "--entity", default=entity, help="W&B user or team, as wandb.entity; the account's default without it"
    )
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
