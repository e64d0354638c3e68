"""The history of a W&B run while it computes: statistics passes, layers and distillation, each with a separate step."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bayesq.observer import Observer
from bayesq.suite.results import plain

if TYPE_CHECKING:
    import wandb

    from bayesq.contract import LayerProblem
    from bayesq.quant.tensor import QuantizedTensor

# Prefixes of the history's keys, and the step of each.
LAYER_HISTORY, LAYER_STEP = "layer/", "layer/index"
STATISTICS_HISTORY, STATISTICS_STEP = "statistics/", "statistics/batch"
DISTILLATION_HISTORY, DISTILLATION_STEP = "distillation/", "distillation/evaluation"
HISTORY = (LAYER_HISTORY, STATISTICS_HISTORY, DISTILLATION_HISTORY)
# Columns of a layer that are logged while the network is quantized; the others follow with the result.
LIVE = ("bits/code", "predicted_risk", "seconds")
# Most records of a pass over the calibration examples.
PASS_RECORDS = 100


class History(Observer):
    """Logs the steps of a run; `layers` counts the layers."""

    def __init__(self, log: Callable[[dict[str, Any]], object]) -> None:
        """`log` takes a record of the history, and must not fail."""
        self._log = log
        self.layers = self._passes = self._batches = self._examples = self._evaluations = 0

    def batch_seen(self, batch: int, batches: int, examples: int) -> None:
        """Log the passes, batches and examples so far, at most PASS_RECORDS times a pass."""
        self._passes += batch == 1
        self._batches += 1
        self._examples += examples
        if batch * PASS_RECORDS // batches > (batch - 1) * PASS_RECORDS // batches:
            counts = {"pass": self._passes, "examples": self._examples}
            self._log({STATISTICS_STEP: self._batches, **_under(STATISTICS_HISTORY, counts)})

    def layer_rounded(self, problem: "LayerProblem", tensor: "QuantizedTensor", seconds: float) -> None:
        """Log the columns LIVE of a layer."""
        from bayesq.quant.accounting import code_bits  # imports torch

        bits = code_bits(tensor) / problem.weight.numel()
        values = (bits, problem.notes.get("predicted_risk"), seconds)
        self._log(layer_record(self.layers, dict(zip(LIVE, values, strict=True))))
        self.layers += 1

    def divergence_measured(self, step: int, part: str, kl: float) -> None:
        """Log an evaluation of a distillation."""
        values = {"step": step, f"{part}_kl": kl}
        self._log({DISTILLATION_STEP: self._evaluations, **_under(DISTILLATION_HISTORY, values)})
        self._evaluations += 1


def define_metrics(run: "wandb.Run") -> None:
    """Tell W&B the step of each key of the history, and what the summary shows of it."""
    for step, prefix, summary in (
        (LAYER_STEP, LAYER_HISTORY, "min,max"),
        (STATISTICS_STEP, STATISTICS_HISTORY, "max"),
        (DISTILLATION_STEP, DISTILLATION_HISTORY, "min,last"),
    ):
        run.define_metric(step, hidden=True, summary="none")
        run.define_metric(f"{prefix}*", step_metric=step, summary=summary)
    for group in ("q", "fp", "delta"):
        run.define_metric(f"{group}/*", step_metric="bits/target", step_sync=False)


def layer_record(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a layer: its numbers, and its place in forward order as the step."""
    return {LAYER_STEP: index, **_under(LAYER_HISTORY, row)}


def is_number(value: Any) -> bool:
    """Whether a value is a number and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _under(prefix: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, with a prefix before their keys."""
    return {f"{prefix}{key}": value for key, value in plain(row).items() if is_number(value)}
