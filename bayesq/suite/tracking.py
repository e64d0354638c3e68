"""Weights & Biases beside the result files: one W&B run per run, which may fail without costing a result."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from omegaconf import DictConfig

from bayesq.suite.config import flatten, one_line, resolved
from bayesq.suite.errors import UserError
from bayesq.suite.results import plain

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

# seconds until wandb.mode=online gives up on reaching the server: the client's own 90 at the start make a wrong
# address look like a hang, and at the end it would retry an upload for ever while the sweep stands still
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 120.0


class Tracker:
    """Where a run reports to: `with track(...) as tracker: ...; tracker.log_result(result, layers)`.

    `error` is None, or one line about what W&B could not do. Leaving the block by an exception marks the W&B run as
    failed.
    """

    def __init__(self, run: "wandb.Run | None") -> None:
        self._run = run
        self.error: str | None = None

    def log_result(self, result: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
        """Log the flat result under its own keys as the run's summary, and one table row per layer.

        Call it after result.json is written: a failure here becomes a warning and `error`, never an exception.
        """
        if self._run is None:
            return
        try:
            import wandb

            if layers:
                table = wandb.Table(columns=[*layers[0]], allow_mixed_types=True)
                for row in layers:
                    table.add_data(*(_cell(row.get(column)) for column in layers[0]))
                self._run.log({"layers": table})
            self._run.summary.update(plain(result))
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.error = one_line(f"{type(error).__name__}: {error}")
        log.warning("W&B could not log this run (its result is saved): %s", self.error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the W&B run, as failed when the block raised or W&B lost something."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=0 if error is None and self.error is None else 1)
        except Exception as failure:
            self._failed(failure)


def _cell(value: Any) -> Any:
    """`value` as a table shows it: shapes and the like as text."""
    value = plain(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `wandb.init` that make runs of a project groupable by method and budget without any clicks.

    The config is flat: each axis is its chosen name (`method: gptq`), everything else is joined by slashes like the
    keys of a result (`calibration/examples`).
    """
    config = resolved(cfg)
    model, dataset, method = (config[axis]["name"] for axis in ("model", "dataset", "method"))
    flat = flatten(config, separator="/")
    for key in [key for key in flat if key.endswith("/name") and key.count("/") == 1]:
        flat[key.removesuffix("/name")] = flat.pop(key)
    return {
        "project": config["wandb"]["project"],
        "entity": config["wandb"]["entity"],
        "group": f"{model}-{dataset}",
        "job_type": method,
        "name": f"{method}-{config['bits']:g}-s{config['seed']}",
        "tags": [model, dataset, method, f"{config['bits']:g}-bit"],
        "config": flat,
    }


@contextmanager
def track(cfg: DictConfig, run_id: str, run_dir: Path) -> Iterator[Tracker]:
    """One W&B run around one run of the suite, as wandb.mode says; `disabled` does not even import wandb.

    All offline runs of a results folder share its wandb/ folder, where `wandb leet` and `wandb sync` find them. The
    W&B id is the run id: whatever was synced of an attempt that was killed is replaced, never duplicated.

    Args:
        cfg: the composed configuration.
        run_id: `bayesq.suite.config.run_id(cfg)`.
        run_dir: the run's folder; its parent gets the wandb/ folder.

    Raises:
        UserError: W&B could not start, for instance because its server cannot be reached.
    """
    with Tracker(_start(cfg, run_id, run_dir)) as tracker:
        yield tracker


def _start(cfg: DictConfig, run_id: str, run_dir: Path) -> "wandb.Run | None":
    """The W&B run, or None when tracking is disabled."""
    mode = cfg.wandb.mode
    if mode == "disabled":
        return None
    import wandb

    results_dir = run_dir.absolute().parent
    results_dir.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            **identity(cfg),
            id=run_id,
            mode=mode,
            dir=results_dir,
            # every result records commit and versions; the console belongs to the results, not to the client
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        remedy = "use wandb.mode=offline or wandb.mode=disabled"
        raise UserError(f"wandb.mode={mode}: W&B did not start ({reason}); {remedy}") from error
