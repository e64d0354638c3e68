"""Means over seeds, and one variant against another on the examples and seeds that both have."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.loading import finished, read_table, records
from analysis.methods import DEFAULTS, is_data_free, setting
from analysis.metrics import Floats, as_share, measure
from analysis.paper import REFERENCE
from analysis.statistics import (
    Interval,
    Task,
    mcnemar,
    paired_average_bootstrap,
    paired_bootstrap,
    paired_metric_bootstrap,
    paired_ratio_bootstrap,
)
from bayesq.suite.results import PREDICTIONS_FILE, settings_of

log = logging.getLogger(__name__)

# Settings that a baseline must share with the runs that are compared with it. Allocator, inputs and correction are not
# among them: methods have different defaults, and the strongest run counts.
ALIKE = (
    "distill",
    "calibration.examples",
    "budget.count",
    "layers.exclude",
    "layers.include_embeddings",
)
KL = "q/kl_to_fp"
# The same for comparisons of time, which includes distillation.
ALIKE_IN_COST = tuple(key for key in ALIKE if key != "distill")
# Fewer resamples for KL: it differs in every example, so each resample is slow, and intervals need fewer than p values.
KL_RESAMPLES = 2_000
# Largest difference of a metric between predictions.csv and result.json, which was computed from more digits.
TOLERANCE = 1e-5
# Ending of the metrics of MNLI's second dev set.
MISMATCHED = "_mismatched"
BY = ("workload", "variant", "method", "bits")
# Columns of `summarise` even if no run has a number for them.
ALWAYS = ("score", "fp/score", KL, "bits/code", "bits/stored")


@dataclass(frozen=True)
class Comparison:
    """A variant against another one.

    Attributes:
        delta: primary metric, second minus first, as a share (`as_share`).
        kl_ratio: KL to full precision, second over first.
        p: two-sided; McNemar's exact test where the metric is an accuracy, else that of the bootstrap.
        seeds: seeds of both.
        examples: number of examples of both.
        left_out: number of examples that only some of the runs have.
    """

    delta: Interval
    kl_ratio: Interval
    p: float
    seeds: tuple[int, ...]
    examples: int
    left_out: int


def summarise(runs: pd.DataFrame, by: Sequence[str] = BY) -> pd.DataFrame:
    """Means and sample standard deviations over the finished runs of each group, in order of `by`.

    Args:
        runs: rows of `load_runs`.
        by: columns of `runs`; `bits` is the budget, `examples` the size of the calibration set.

    Returns:
        one row per group: `by`, `n` (runs with a result), and for each numeric key of result.json KEY (mean; NaN if
        one of the runs has no number, because the mean of the others could be mistaken for that of all) and KEY/std
        (NaN for one run). The keys ALWAYS are there even without a number. `score` is the primary metric and `fp/score`
        the full-precision model's, as shares (`as_share`).
    """
    done = with_scores(finished(runs))
    numbers = [
        key for key in done if key in ALWAYS or (key not in (*by, "seed", "duplicates") and _is_number(done[key]))
    ]
    frame = pd.concat([done[list(by)], done[numbers].apply(pd.to_numeric).astype("float64")], axis=1)
    grouped = frame.groupby(list(by), sort=True, dropna=False)
    means, spread = whole_mean(grouped, numbers), grouped[numbers].std(ddof=1)
    columns = {name: values for key in numbers for name, values in ((key, means[key]), (f"{key}/std", spread[key]))}
    return pd.DataFrame({"n": grouped.size(), **columns}, index=means.index).reset_index()


def whole_mean(groups: Any, values: Sequence[Any]) -> pd.DataFrame:
    """Means of a groupby's columns, NaN where a row of the group has no number."""
    chosen = groups[list(values)]
    means: pd.DataFrame = chosen.mean()
    return means.where(chosen.count().eq(groups.size(), axis=0))


def with_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with `bits`, `examples` (of the calibration set), `score`, `fp/score` and `metric`, the primary one."""
    rows = records(runs)
    metrics = [row.get("primary_metric") for row in rows]
    scores = {
        prefix: [
            as_share(metric, row.get(f"{prefix}/{metric}", math.nan)) for row, metric in zip(rows, metrics, strict=True)
        ]
        for prefix in ("q", "fp")
    }
    return runs.assign(
        bits=runs["bits/target"],
        examples=runs.get("calibration/examples", math.nan),
        metric=pd.Series(metrics, index=runs.index, dtype="object"),
        score=scores["q"],
        **{"fp/score": scores["fp"]},
    )


def _is_number(column: pd.Series) -> bool:
    present = column.dropna()
    return len(present) > 0 and all(isinstance(value, int | float | np.number) for value in present)


def alike(run: Mapping[str, Any], keys: Sequence[str] = ALIKE) -> tuple[str, ...]:
    """Settings of a run that its baseline must share, as text."""
    settings = settings_of({"config": run["config"], "seed": run["seed"]})
    return tuple(setting(run, key) if key in DEFAULTS else str(settings.get(key)) for key in keys)


def is_seedless(run: Mapping[str, Any]) -> bool:
    """Whether a run reads no calibration data, so that every seed gives the same result."""
    config = run["config"]
    untouched = config.get("correction") == "none" and not config.get("distill")
    return bool(is_data_free(run["method"], config) and config["allocator"] == "uniform" and untouched)


def strongest_baseline(runs: pd.DataFrame, workload: str, bits: float, conditions: tuple[str, ...]) -> str | None:
    """The GPTQ variant of lowest mean KL on a workload at a budget, or None; see `strongest_of`."""
    there = runs[(runs["workload"] == workload) & (runs["bits/target"] == bits)]
    return strongest_of([REFERENCE], there, conditions)


def strongest_of(
    methods: Sequence[str], there: pd.DataFrame, conditions: tuple[str, ...], keys: Sequence[str] = ALIKE
) -> str | None:
    """The variant of lowest mean KL among methods, or None.

    Means are over the seeds of the other methods there under the same conditions, so that no variant wins by lacking a
    bad seed; a variant with more missing seeds than another does not count.

    Args:
        there: finished runs of one workload at one budget.
        conditions: `alike` of the runs that are compared with it.
        keys: of the conditions.
    """
    there = there.loc[[alike(run, keys) == conditions for run in records(there)]]
    candidates, others = there[there["method"].isin(methods)], there[~there["method"].isin(methods)]
    if candidates.empty:
        return None
    others = others.loc[[not is_seedless(run) for run in records(others)]]
    seeds = set(others["seed"]) & set(candidates["seed"]) or set(candidates["seed"])
    by_variant = candidates[candidates["seed"].isin(seeds)].groupby("variant")
    counts, means = by_variant[KL].count(), by_variant[KL].mean()
    return str(min(means.index, key=lambda variant: (-counts[variant], means[variant], variant)))


def metrics_of(run: Mapping[str, Any]) -> list[str]:
    """Names of the metrics in a run's result; other metrics of a frame of runs are NaN in its row."""
    names = [key.split("/")[1] for key in run if key.startswith("delta/") and key.count("/") == 1]
    return [name for name in names if not pd.isna(run[f"delta/{name}"])]


class NotComparedError(Exception):
    """Why two variants cannot be compared example by example."""


class Examples:
    """Per-example predictions of runs, each file read once."""

    def __init__(self) -> None:
        self._read: dict[str, pd.DataFrame | None] = {}
        self._reasons: dict[str, str] = {}

    def of(self, run: Mapping[str, Any]) -> pd.DataFrame | None:
        """A run's `part`, label, q_prediction and kl by name of the example; None where they are missing.

        The part is 0, or 1 for MNLI's mismatched examples, which have separate metrics.
        """
        path = str(run["path"])
        if path not in self._read:
            self._read[path] = self._checked(run)
        return self._read[path]

    def _checked(self, run: Mapping[str, Any]) -> pd.DataFrame | None:
        table = read_table(run, PREDICTIONS_FILE)
        if table is None:
            self._reasons[str(run["path"])] = f"no {PREDICTIONS_FILE}"
            return None
        table["part"] = 0
        if run["config"]["dataset"].get("task") == "mnli":
            first = table["id"].str.split("/").str[0]
            table["part"] = (first != first.iloc[0]).astype(int)
        names = table["id"] if "id" in table else pd.Series(range(len(table)), index=table.index).astype(str)
        # examples with the same name are numbered; their order is that of the data set in every run
        names = names.astype(str) + "#" + names.groupby(names).cumcount().astype(str)
        if "label" not in table:  # sequences: their perplexity takes nats per token, weighed by the number of tokens
            table = table.assign(label=table["predictions"], q_prediction=table["q_nll"])
        table = table.set_index(names)[["part", "label", "q_prediction", "kl"]].astype("float64")
        for metric in metrics_of(run):
            function, part = _measured_on(metric)
            examples = table[table["part"] == part]
            value = measure(function, *(examples[key].to_numpy() for key in ("q_prediction", "label")))
            given = run.get(f"q/{metric}")
            if given is None or not abs(value - given) <= TOLERANCE * max(1.0, abs(value)):
                reason = f"{PREDICTIONS_FILE} does not give the {metric} of its result"
                log.warning("%s: %s; not compared", run["path"], reason)
                self._reasons[str(run["path"])] = reason
                return None
        return table

    def compare(self, first: pd.DataFrame, second: pd.DataFrame) -> Comparison:
        """The runs of `second` against those of `first`, seed by seed.

        A run that is the same under every seed also serves the seeds that only the other side has.

        Args:
            first, second: finished runs, one per seed each, of one workload.

        Raises:
            NotComparedError: no seed has examples in common, or their labels differ.
        """
        seeds, tables, left_out = self._paired(first, second)
        tables = [table[table["part"] == 0] for table in tables]
        labels = tables[0]["label"].to_numpy()
        predictions, kl = (np.stack([table[key].to_numpy() for table in tables]) for key in ("q_prediction", "kl"))
        function = str(first.iloc[0]["primary_metric"])
        delta, p = _difference(function, predictions[: len(seeds)], predictions[len(seeds) :], labels)
        delta = replace(delta, **{name: as_share(function, getattr(delta, name)) for name in ("value", "low", "high")})
        ratio = paired_bootstrap(kl[: len(seeds)], kl[len(seeds) :], resamples=KL_RESAMPLES, ratio=True)
        return Comparison(delta, ratio, p, tuple(seeds), len(labels), left_out)

    def compare_average(self, pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> tuple[Interval, list[list[int]]]:
        """The gain in the average over tasks, where a task's score is the mean of its metrics, and the seeds of each
        task.

        Args:
            pairs: for each task, runs as for `compare`.

        Raises:
            NotComparedError: as `compare`, for the first task that cannot be compared.
        """
        tasks, had = [], []
        for first, second in pairs:
            seeds, tables, _ = self._paired(first, second)
            predictions = np.stack([table["q_prediction"].to_numpy() for table in tables])
            labels, parts = (tables[0][key].to_numpy() for key in ("label", "part"))
            metrics = tuple(_measured_on(metric) for metric in metrics_of(records(first)[0]))
            half = len(seeds)
            tasks.append(Task(predictions[:half], predictions[half:], labels, parts, metrics))
            had.append(seeds)
        return paired_average_bootstrap(tasks), had

    def compare_kl(self, pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> Interval:
        """The geometric mean over pairs of the KL of the second runs over that of the first.

        Args:
            pairs: runs as for `compare`.

        Raises:
            NotComparedError: as `compare`, for the first pair that cannot be compared.
        """
        values = []
        for first, second in pairs:
            seeds, tables, _ = self._paired(first, second)
            kl = np.stack([table.loc[table["part"] == 0, "kl"].to_numpy() for table in tables])
            values.append((kl[: len(seeds)], kl[len(seeds) :]))
        return paired_ratio_bootstrap(values, resamples=KL_RESAMPLES)

    def _paired(self, first: pd.DataFrame, second: pd.DataFrame) -> tuple[list[int], list[pd.DataFrame], int]:
        """The common seeds, tables of the common examples, and the number of examples that only some tables have.

        The tables of `first` come first, by seed, then those of `second`.
        """
        before, after = self._by_seed(first), self._by_seed(second)
        if before and is_seedless(records(first)[0]):
            before = dict.fromkeys(after, before[min(before)]) | before
        if after and is_seedless(records(second)[0]):
            after = dict.fromkeys(before, after[min(after)]) | after
        seeds = sorted(set(before) & set(after))
        if not seeds:
            lost = [self._reasons.get(str(run["path"])) for run in records(pd.concat([first, second]))]
            why = "; ".join(dict.fromkeys(filter(None, lost)))
            raise NotComparedError("no seed for which both have usable predictions" + (f" ({why})" if why else ""))
        tables = [side[seed] for side in (before, after) for seed in seeds]
        names = tables[0].index
        for table in tables[1:]:
            names = names.intersection(table.index, sort=False)
        most = max(map(len, tables))
        tables = [table.loc[names] for table in tables]
        if not len(names):
            raise NotComparedError("their predictions are of other examples")
        if any((table["label"] != tables[0]["label"]).any() for table in tables[1:]):
            raise NotComparedError("the labels of their examples differ")
        return seeds, tables, most - len(names)

    def _by_seed(self, runs: pd.DataFrame) -> dict[int, pd.DataFrame]:
        tables = {int(run["seed"]): self.of(run) for run in records(runs)}
        return {seed: table for seed, table in tables.items() if table is not None}


def _measured_on(metric: str) -> tuple[str, int]:
    """The function of a result's metric, and the part of the examples that it is measured on."""
    function = metric.removesuffix(MISMATCHED)
    return function, int(function != metric)


def _difference(function: str, first: Floats, second: Floats, labels: Floats) -> tuple[Interval, float]:
    if function == "accuracy":
        correct = (first == labels).astype(np.float64), (second == labels).astype(np.float64)
        return paired_bootstrap(*correct), mcnemar(*correct)
    delta = paired_metric_bootstrap(function, first, second, labels)
    return delta, delta.p


def counted(values: Iterable[float]) -> str:
    """`3`, or `2 to 3` if the values differ."""
    counts = sorted({int(value) for value in values if not math.isnan(value)})
    if not counts:
        return "0"
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
