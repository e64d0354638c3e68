"""Log finished runs that W&B does not have, from their files: `python -m bayesq.suite.relog results/`.

`wandb/error` in result.json says that W&B failed, or that the process was killed before W&B had the result. Nothing is
computed again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bayesq.files import lock
from bayesq.suite import results
from bayesq.suite.arguments import module_parser
from bayesq.suite.config import check_wandb_login, one_line
from bayesq.suite.errors import UserError
from bayesq.suite.tracking import ERROR_KEY, leave, track

# Columns of layers.csv and predictions.csv that are text, even if a cell looks like a number.
TEXT = ("name", "kind", "shape", "id")


def relog(folder: Path, mode: str | None = None, again: bool = False) -> str | None:
    """`relog_locked` with the lock of the run, because the process that computed it may still be logging it."""
    with lock(folder / results.RESULT_FILE):
        return relog_locked(folder, mode, again)


def relog_locked(folder: Path, mode: str | None = None, again: bool = False) -> str | None:
    """Log the finished run in `folder` if W&B lacks it, or always with `again`; return W&B's error, or None.

    The caller holds the lock of result.json, in which `wandb/error` is updated if W&B lacked the run. `mode` replaces
    the run's W&B mode. Raises UserError if W&B could not start.
    """
    result = results.finished_result(folder)
    if result is None or not (again or result.get(ERROR_KEY) is not None):
        return None
    cfg = OmegaConf.create(result["config"])
    cfg.wandb.mode = mode or cfg.wandb.mode
    check_wandb_login(cfg)
    checkpoint = folder / results.QUANTIZED_FILE
    with track(cfg, result["run_id"], folder) as tracker:
        if not tracker.started:
            raise UserError(tracker.error or "wandb.mode=disabled logs nothing")
        tracker.log_result(
            result,
            typed_rows(folder / results.LAYERS_FILE),
            typed_rows(folder / results.PREDICTIONS_FILE),
            checkpoint if checkpoint.exists() else None,
        )
    if result.get(ERROR_KEY) is not None:
        results.write_json(folder / results.RESULT_FILE, result | {ERROR_KEY: tracker.error})
    return tracker.error


def typed_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file; cells with numbers are numbers, empty cells are None. No rows if there is no file."""
    return [
        {key: text if key in TEXT else _number(text) for key, text in row.items()} for row in results.read_rows(path)
    ]


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        return float(text) if text else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 1 if W&B still lacks a run."""
    parser = module_parser("relog", __doc__)
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("--mode", choices=("online", "offline"), help="W&B mode; default: that of each run")
    parser.add_argument("--again", action="store_true", help="log the runs that W&B has, too; it replaces them")
    given = parser.parse_args(arguments)
    if not given.results_dir.is_dir():
        sys.exit(f"error: {given.results_dir}: no such folder")
    folders = [path.parent for path in sorted(given.results_dir.glob(f"*/{results.RESULT_FILE}"))]
    finished = ((folder, results.finished_result(folder)) for folder in folders)
    folders = [folder for folder, result in finished if result and (given.again or result.get(ERROR_KEY) is not None)]
    if not folders:
        print("W&B has every finished run")
    failed = False
    for folder in folders:
        try:
            error = relog(folder, given.mode, given.again)
        except UserError as reason:  # it would stop all further runs too
            leave(f"error: {one_line(str(reason))}")
        failed |= error is not None
        print(f"logged: {folder.name}" if error is None else f"failed: {folder.name}: {error}", flush=True)
    leave(1 if failed else 0)


if __name__ == "__main__":
    main()
