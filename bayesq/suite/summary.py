"""The table that closes a command: method x bits, means and spreads over seeds, one section per workload."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from bayesq.metrics import Metric, metric_of
from bayesq.suite.config import show
from bayesq.suite.results import differing_settings, settings_of

Result = Mapping[str, Any]
GAP = "-"
# What quantizing costs: fetching data, training a demo network and the full-precision evaluation are no method's cost.
STAGES = ("calibrate", "posterior", "quantize", "distill")
# Settings of these groups make another workload, with full-precision figures of its own.
WORKLOAD_AXES = ("model", "dataset", "evaluation")
# Below this KL is written with an exponent: zeros behind the point are hard to count.
SMALLEST_PLAIN = 1e-4


def two_digits(value: float | None, spread: float | None = None) -> str:
    """A positive number with two significant digits, such as `0.0042`, `4.2e-06` or `0.0042 ± 0.0003`.

    The spread has the same last place; a spread of fewer digits than that adds places to both until it shows one.
    """
    if value is None or math.isnan(value):
        return GAP
    leading = max(1, _exponent(value) - _exponent(spread)) if spread else 1
    if 0 < value < SMALLEST_PLAIN:
        exponent = _exponent(value)
        mean, last = f"{value:.{leading}e}", f"{(spread or 0) / 10**exponent:.{leading}f}e{exponent:03d}"
    else:
        places = max(0, leading - _exponent(value)) if value else 1
        mean, last = f"{value:.{places}f}", f"{spread or 0:.{places}f}"
    return mean if spread is None else f"{mean} ± {last if spread else 0}"


def _exponent(value: float) -> int:
    """The power of ten of the first digit of a number that has been rounded to two."""
    return int(f"{abs(value):.1e}".partition("e")[2]) if value else 0


def results_table(results: Sequence[Result]) -> str:
    """Text table: one line per method and bit budget, averaged over seeds, one section per workload.

    A workload is a model, a data set and a task, and those of their settings that differ among the results. Runs of one
    method that differ in further settings get lines of their own and a column for each setting that differs. Entries
    whose status is not "finished" need only model, dataset, method, bits/target, seed and config; a line whose entries
    are all of that kind says so. Where a line has several entries, n counts the finished ones (`2/3`: one is not), and
    ± is the sample standard deviation over them. Metrics and their deltas against the full-precision model are in the
    metric's unit, KL in nats, bits per quantized weight; seconds are those of STAGES. A figure that one of a
    line's results lacks is a dash: a mean of the others would pass for all of them.
    """
    sections: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        task = result["config"]["dataset"].get("task")
        data = f"{result['dataset']} {task}" if task else result["dataset"]
        sections.setdefault((result["model"], data), []).append(result)
    shown = []
    for (model, data), members in sections.items():
        for further, alike in _workloads(members).items():
            shown.append(_section(" ".join([f"{model} on {data}", *further]), alike))
    return "\n\n".join(shown)


def _differing(results: Iterable[Result], **same: Any) -> list[str]:
    """`differing_settings` whatever the budget, which has a column, and whatever `same` names."""
    alike = [{**result, "bits/target": None, **same} for result in results]
    return [key for key in differing_settings(alike) if key not in ("bits", "method", "dataset.task")]


def _workloads(results: Sequence[Result]) -> dict[tuple[str, ...], list[Result]]:
    """The results of one model on one data set by those settings of both that differ, written as key=value."""
    keys = [key for key in _differing(results, method=None) if key.partition(".")[0] in WORKLOAD_AXES]
    workloads: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        settings = settings_of(result)
        workloads.setdefault(tuple(f"{key}={show(settings.get(key))}" for key in keys), []).append(result)
    return workloads


def _section(head: str, results: Sequence[Result]) -> str:
    """The lines of one workload, headed by its full-precision figures."""
    differing = _differing(results)
    methods = list(dict.fromkeys(result["method"] for result in results))
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(settings_of(result), sort_keys=True), []).append(result)

    def place(item: tuple[str, list[Result]]) -> tuple[int, float, str]:
        first = item[1][0]
        return methods.index(first["method"]), first["bits/target"], item[0]

    ordered = sorted(groups.items(), key=place)
    finished = [result for result in results if result.get("status") == "finished"]
    primary = finished[0]["primary_metric"] if finished else "accuracy"
    several = any(len(members) > 1 for _, members in ordered)
    columns: dict[str, list[str]] = {name: [] for name in ("method", "bits", *differing)}
    columns |= {"n": []} if several else {}
    for _, members in ordered:
        settings = settings_of(members[0])
        cells = {"method": members[0]["method"], "bits": f"{members[0]['bits/target']:g}"}
        cells |= {key: show(settings[key]) if key in settings else GAP for key in differing}
        done = [result for result in members if result.get("status") == "finished"]
        cells["n"] = f"{len(done)}" if len(done) == len(members) else f"{len(done)}/{len(members)}"
        for name in columns:
            columns[name].append(cells[name])
    measured = _measured([members for _, members in ordered], primary)
    return "\n".join([_full_precision(head, finished, primary), *_lines({**columns, **measured})])


def _lines(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns below their heads and a rule, the first set to the left and the others to the right."""
    padded: list[list[str]] = []
    for name, cells in columns.items():
        width = max(map(len, [name, *cells]))
        padded.append([f"{cell:{'>' if padded else '<'}{width}}" for cell in (name, *cells)])
        padded[-1].insert(1, "-" * width)
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _full_precision(head: str, finished: Sequence[Result], name: str) -> str:
    if not finished:
        return head
    metric = metric_of(name)
    reference = _cell(finished, f"fp/{name}", lambda value, _: f"{metric.scaled(value):.2f}")
    examples = _cell(finished, "evaluation/examples", lambda value, _: f"{value:,.0f}")
    return f"{head}: full precision {reference} {metric.unit} {name} on {examples} examples"


def _measured(groups: Sequence[Sequence[Result]], name: str) -> dict[str, list[str]]:
    """The columns of what was measured, a cell for each group of results that differ in the seed alone."""
    metric = metric_of(name)
    forms: dict[str, tuple[str, Callable[[float, float | None], str]]] = {
        f"{name} {metric.unit}": (f"q/{name}", lambda mean, spread: _spread(metric, mean, spread)),
        "delta": (f"delta/{name}", lambda mean, _: f"{metric.scaled(mean):+.2f}"),
        "KL": ("q/kl_to_fp", two_digits),
        "bits/code": ("bits/code", lambda mean, _: f"{mean:.3f}"),
        "bits/stored": ("bits/stored", lambda mean, _: f"{mean:.3f}"),
        "seconds": ("seconds", lambda mean, _: f"{mean:.1f}"),
    }
    done = [[_with_seconds(result) for result in group if result.get("status") == "finished"] for group in groups]
    columns = {name: _aligned([_cell(finished, key, form) for finished in done]) for name, (key, form) in forms.items()}
    first = next(iter(columns))
    columns[first] = [
        cell if finished else str(members[0].get("status", "failed"))
        for cell, finished, members in zip(columns[first], done, groups, strict=True)
    ]
    return columns


def _with_seconds(result: Result) -> dict[str, Any]:
    stages = [result.get(f"time/{stage}_s") for stage in STAGES]
    known = [seconds for seconds in stages if seconds is not None]
    return {**result, "seconds": sum(known) if known else None}


def _cell(results: Sequence[Result], key: str, form: Callable[[float, float | None], str]) -> str:
    """Mean of `key`, and its spread where there are several results; a dash where one of them lacks it."""
    values = [result.get(key) for result in results]
    known = [float(value) for value in values if value is not None]
    if not known or len(known) < len(values):
        return GAP
    return form(fmean(known), stdev(known) if len(known) > 1 else None)


def _spread(metric: Metric, mean: float, spread: float | None) -> str:
    shown = f"{metric.scaled(mean):.2f}"
    return shown if spread is None else f"{shown} ± {metric.scaled(spread):.2f}"


def _aligned(cells: Sequence[str]) -> list[str]:
    """Cells of equal width behind their ±, so that these stand below each other in a column set to the right."""
    parts = [cell.partition(" ± ") for cell in cells]
    width = max((len(spread) for _, sign, spread in parts if sign), default=0)
    if not width:
        return list(cells)
    return [f"{mean}{sign}{spread:<{width}}" if sign else mean + " " * (width + 3) for mean, sign, spread in parts]
