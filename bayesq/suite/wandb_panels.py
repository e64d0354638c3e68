"""W&B panels that the workspace (`bayesq.suite.dashboard`) and the Report (`analysis.report`) share.

`bayesq.suite.tracking` logs every key that a panel uses. The package wandb-workspaces is imported on the first call.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from bayesq.suite.errors import UserError
from bayesq.suite.plots import CHARTS
from bayesq.suite.wandb_history import DISTILLATION_STEP, LAYER_STEP, STATISTICS_STEP

DIVERGENCE = "q/kl_to_fp"
# Keys of the configuration by which runs are grouped: method, budget, and settings that distinguish variants.
# Runs that differ in none of them are averaged.
GROUPS = ("method", "bits", "ablation", "allocator", "inputs", "correction", "rotate", "distill", "codec")
# Runs whose points a panel shows; W&B's default, 10, hides most of a sweep.
MOST_RUNS = 1000


def require_workspaces(what: str) -> None:
    """Raise UserError if the package wandb-workspaces is missing; `what` needs it."""
    if find_spec("wandb_workspaces") is None:
        raise UserError(f"the {what} needs the package wandb-workspaces: pip install 'bayesq[dashboard]'")


def lines(title: str, key: str) -> Any:
    """A summary key against the budget, one line per method."""
    import wandb_workspaces.reports.v2 as panels

    return panels.CustomChart(
        query={"summary": {"keys": ["bits/target", key, "method"]}},
        chart_name="wandb/line/v0",
        chart_fields={"x": "bits/target", "y": key, "stroke": "method"},
        chart_strings={"title": title},
    )


def scatter(title: str, x: Any, key: str, log_y: bool | None = None) -> Any:
    """A summary key against `x`, one point per run or group of runs."""
    import wandb_workspaces.reports.v2 as panels

    return panels.ScatterPlot(title=title, x=x, y=panels.SummaryMetric(key), log_y=log_y)


def quality(metrics: Sequence[str]) -> list[Any]:
    """The tasks' metrics, as in q/<metric>, and the KL against bits."""
    import wandb_workspaces.reports.v2 as panels

    bits, stored = panels.Config("bits"), panels.SummaryMetric("bits/stored")
    return [
        *(lines(f"{metric} against bits by method", f"q/{metric}") for metric in metrics),
        lines("KL to full precision (nats) against bits by method", DIVERGENCE),
        *(scatter(f"{metric} against bits", bits, f"q/{metric}") for metric in metrics),
        scatter("KL (nats) against bits", bits, DIVERGENCE, log_y=True),
        *(scatter(f"Stored bits against {metric}", stored, f"q/{metric}") for metric in metrics),
    ]


def parallel_coordinates(metrics: Sequence[str]) -> Any:
    """Settings of runs beside their results, one line per run."""
    import wandb_workspaces.reports.v2 as panels

    column = panels.ParallelCoordinatesPlotColumn
    results = ("bits/stored", "time/total_s", *(f"q/{metric}" for metric in metrics))
    columns = [
        *(column(panels.Config(key)) for key in ("method", "inputs", "correction", "bits")),
        *(column(panels.SummaryMetric(key)) for key in results),
        column(panels.SummaryMetric(DIVERGENCE), log=True),
    ]
    return panels.ParallelCoordinatesPlot(title="Settings and results", columns=columns)


def layer_charts() -> list[Any]:
    """The charts that each run logs of its layers and predictions."""
    import wandb_workspaces.reports.v2 as panels

    return [
        panels.CustomChart(
            query={"summaryTable": {"tableKey": chart.table_key}},
            chart_name=chart.preset,
            chart_fields=dict(chart.fields),
            chart_strings=dict(chart.texts),
        )
        for chart in CHARTS
    ]


def layer_curves() -> list[Any]:
    """Numbers of the layers in forward order, a line per run or group of runs."""
    return [
        _curve("Code bits by layer", LAYER_STEP, "bits/code"),
        _curve("Achieved risk by layer (nats)", LAYER_STEP, "achieved_risk", log_y=True),
        _curve("Relative weight error by layer", LAYER_STEP, "relative_error", log_y=True),
        _curve("Seconds by layer", LAYER_STEP, "seconds"),
    ]


def progress_curves() -> list[Any]:
    """The examples used by statistics passes, and the KL of a distillation, a line per run or group."""
    return [
        _curve("Examples in statistics passes", STATISTICS_STEP, "examples"),
        _curve("KL of distillation (nats)", DISTILLATION_STEP, "training_kl", "heldout_kl"),
    ]


def _curve(title: str, step: str, *columns: str, log_y: bool | None = None) -> Any:
    """Columns of the history over their step, whose key has the same prefix."""
    import wandb_workspaces.reports.v2 as panels

    prefix = step.partition("/")[0]
    keys = (f"{prefix}/{column}" for column in columns)
    return panels.LinePlot(title=title, x=step, y=[*keys], log_y=log_y, max_runs_to_show=MOST_RUNS)
