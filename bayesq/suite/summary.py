"""The table of results at the end of a command: method x bits, means and spreads over seeds, by workload."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from bayesq.metrics import metric_of
from bayesq.suite.config import show
from bayesq.suite.results import differing_settings, settings_of

Result = Mapping[str, Any]
GAP = "-"
# The stages whose time is the cost of a method. Loading data, training a demo network and evaluation are not.
STAGES = ("calibrate", "posterior", "quantize", "distill")
# Groups of settings that define a workload: they change the full-precision figures.
WORKLOAD_AXES = ("model", "dataset", "evaluation")
# A smaller KL is written with an exponent.
SMALLEST_PLAIN = 1e-4


def two_digits(value: float | None, spread: float | None = None) -> str:
    """A positive number with two significant digits: `0.0042`, `4.2e-06`, `0.0042 ± 0.0003`; a dash without a number.

    Number and spread have the same number of places: as many as the spread needs to show a digit.
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
    """The power of ten of the first digit, after rounding to two digits."""
    return int(f"{abs(value):.1e}".partition("e")[2]) if value else 0


def results_table(results: Sequence[Result]) -> str:
    """Text table with one section per workload, and in it one line per method and bit budget with means over seeds.

    A workload is a model, a data set, a task, and those of their settings that differ among the results. Other settings
    that differ have a column each, and every combination of them has a line.

    A result whose status is not "finished" needs only model, dataset, method, bits/target, seed and config. A line
    without finished results shows their status. If a line has several results, n counts the finished ones (`2/3`: two
    of three), and ± is the sample standard deviation over them. A figure is a dash if one of them lacks it, because a
    mean of the others would mislead.

    Units: metrics and their deltas to full precision as in `bayesq.metrics`; KL in nats; bits per quantized weight;
    seconds of STAGES.
    """
    return "\n\n".join(_section(head, alike) for head, alike in _workloads(results).items())


def _grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _data(result: Result) -> str:
    task = result["config"]["dataset"].get("task")
    return f"{result['model']} on {result['dataset']}" + (f" {task}" if task else "")


def _workloads(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each workload; a workload's name has its settings that differ as key=value."""
    workloads: dict[str, list[Result]] = {}
    for data, members in _grouped(results, _data).items():
        keys = [key for key in _differing(members, method=None) if key.partition(".")[0] in WORKLOAD_AXES]
        for result in members:
            settings = settings_of(result)
            name = " ".join([data, *(f"{key}={show(settings.get(key))}" for key in keys)])
            workloads.setdefault(name, []).append(result)
    return workloads


def _differing(results: Iterable[Result], **same: Any) -> list[str]:
    """`differing_settings` of the results, which count as equal in their budget and in the keys of `same`."""
    alike = [{**result, "bits/target": None, **same} for result in results]
    return [key for key in differing_settings(alike) if key not in ("bits", "method", "dataset.task")]


def _section(head: str, results: Sequence[Result]) -> str:
    """The table of one workload, below its name and its full-precision figures."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    groups = _grouped(results, lambda result: json.dumps(settings_of(result), sort_keys=True))

    def place(text: str) -> tuple[int, float, str]:
        first = groups[text][0]
        return methods.index(first["method"]), first["bits/target"], text

    lines = [groups[text] for text in sorted(groups, key=place)]
    done = [[result for result in members if result.get("status") == "finished"] for members in lines]
    settings = [settings_of(members[0]) for members in lines]
    columns = {
        "method": [members[0]["method"] for members in lines],
        "bits": [f"{members[0]['bits/target']:g}" for members in lines],
        **{key: [show(one[key]) if key in one else GAP for one in settings] for key in _differing(results)},
    }
    if any(len(members) > 1 for members in lines):
        counts = zip(map(len, done), map(len, lines), strict=True)
        columns["n"] = [f"{n}" if n == total else f"{n}/{total}" for n, total in counts]
    finished = [result for result in results if result.get("status") == "finished"]
    primary = finished[0]["primary_metric"] if finished else "accuracy"
    states = [str(members[0].get("status", "failed")) for members in lines]
    columns |= _measured(done, states, primary)
    return "\n".join([_full_precision(head, finished, primary), *_lines(columns)])


def _lines(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of a table: heads, a rule, cells. The first column is aligned left, the others right."""
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


def _measured(groups: Sequence[Sequence[Result]], states: Sequence[str], name: str) -> dict[str, list[str]]:
    """The columns of figures: a cell for each group of finished results, or its state in the first column."""
    metric = metric_of(name)

    def scaled(mean: float, spread: float | None) -> str:
        return f"{metric.scaled(mean):.2f}" + ("" if spread is None else f" ± {metric.scaled(spread):.2f}")

    forms: dict[str, tuple[str, Callable[[float, float | None], str]]] = {
        f"{name} {metric.unit}": (f"q/{name}", scaled),
        "delta": (f"delta/{name}", lambda mean, _: f"{metric.scaled(mean):+.2f}"),
        "KL": ("q/kl_to_fp", two_digits),
        "bits/code": ("bits/code", lambda mean, _: f"{mean:.3f}"),
        "bits/stored": ("bits/stored", lambda mean, _: f"{mean:.3f}"),
        "seconds": ("seconds", lambda mean, _: f"{mean:.1f}"),
    }
    timed = [[_with_seconds(result) for result in group] for group in groups]
    columns = {head: _aligned([_cell(group, key, form) for group in timed]) for head, (key, form) in forms.items()}
    first = next(iter(columns))
    columns[first] = [
        cell if group else state for cell, group, state in zip(columns[first], groups, states, strict=True)
    ]
    return columns


def _with_seconds(result: Result) -> dict[str, Any]:
    known = [result[key] for key in (f"time/{stage}_s" for stage in STAGES) if result.get(key) is not None]
    return {**result, "seconds": sum(known) if known else None}


def _cell(results: Sequence[Result], key: str, form: Callable[[float, float | None], str]) -> str:
    """Mean of `key`, and its spread if there are several results; a dash if one of them lacks it."""
    values = [result.get(key) for result in results]
    known = [float(value) for value in values if value is not None]
    if not known or len(known) < len(values):
        return GAP
    return form(fmean(known), stdev(known) if len(known) > 1 else None)


def _aligned(cells: Sequence[str]) -> list[str]:
    """Cells padded after their ±, so that the signs are aligned when the column is aligned right."""
    parts = [cell.partition(" ± ") for cell in cells]
    width = max((len(spread) for _, sign, spread in parts if sign), default=0)
    if not width:
        return list(cells)
    return [f"{mean}{sign}{spread:<{width}}" if sign else mean + " " * (width + 3) for mean, sign, spread in parts]
