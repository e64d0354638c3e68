"""Log finished runs that W&B does not have, from their files: `python -m bayesq.suite.relog results/`.

A run lacks its W&B record where W&B failed or the process was killed just before it had the result; `wandb/error` of
result.json says so. Nothing is computed again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bayesq.files import lock
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.config import check_wandb_login
from bayesq.suite.errors import UserError
from bayesq.suite.results import (
    LAYERS_FILE,
    PREDICTIONS_FILE,
    QUANTIZED_FILE,
    RESULT_FILE,
    finished_result,
    read_rows,
    write_json,
)
from bayesq.suite.tracking import ERROR_KEY, track

# Columns of layers.csv and predictions.csv that stay text, even if a cell looks like a number.
TEXT = ("name", "kind", "shape", "id")


def unlogged(results_dir: Path) -> list[Path]:
    """Folders of the finished runs that W&B does not have, in the order of their run ids."""
    folders = [path.parent for path in sorted(results_dir.glob(f"*/{RESULT_FILE}"))]
    return [folder for folder in folders if (finished_result(folder) or {}).get(ERROR_KEY) is not None]


def relog(folder: Path, mode: str | None = None) -> str | None:
    """`relog_locked` when no process works on the run: the one that made its result may still be logging it."""
    with lock(folder / RESULT_FILE):
        return relog_locked(folder, mode)


def relog_locked(folder: Path, mode: str | None = None, again: bool = False) -> str | None:
    """Log the run of a folder and note the outcome in its result.json; returns what went wrong, or None.

    The caller holds the lock of the run's result.

    Args:
        folder: of a finished run; one that W&B has by now stays as it is.
        mode: of W&B; None takes that of the run.
        again: log also what W&B has; a failure then takes nothing from it.

    Raises:
        UserError: W&B could not start.
    """
    result = finished_result(folder)
    lacking = result is not None and result.get(ERROR_KEY) is not None
    if result is None or not (lacking or again):
        return None
    cfg = OmegaConf.create(result["config"])
    cfg.wandb.mode = mode or cfg.wandb.mode
    check_wandb_login(cfg)
    checkpoint = folder / QUANTIZED_FILE
    with track(cfg, result["run_id"], folder) as tracker:
        if not tracker.started:
            raise UserError(tracker.error or "wandb.mode=disabled logs nothing")
        tracker.log_result(
            result,
            typed_rows(folder / LAYERS_FILE),
            typed_rows(folder / PREDICTIONS_FILE),
            checkpoint if checkpoint.exists() else None,
        )
    if lacking:
        write_json(folder / RESULT_FILE, result | {ERROR_KEY: tracker.error})
    return tracker.error


def typed_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file with numbers as numbers and empty cells as None; none if there is no such file."""
    return [{key: text if key in TEXT else _number(text) for key, text in row.items()} for row in read_rows(path)]


def _number(text: str) -> int | float | None:
    """The number that a cell spells; None for an empty one."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 1 if W&B still lacks a run."""
    parser = module_parser("relog", __doc__)
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--mode", choices=("online", "offline"), help="W&B mode; without it that of each run")
    given = parser.parse_args(arguments)
    if not given.results_dir.is_dir():
        sys.exit(f"error: {given.results_dir}: no such folder")
    folders = unlogged(given.results_dir)
    if not folders:
        print("W&B has every finished run")
    failed = False
    for folder in folders:
        try:
            error = relog(folder, given.mode)
        except UserError as reason:  # every further run would fail alike
            exit_with(reason)
        failed |= error is not None
        print(f"logged: {folder.name}" if error is None else f"failed: {folder.name}: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
