"""The results of a results folder."""

from pathlib import Path
from typing import Any

from bayesq.suite.results import RESULT_FILE, finished_result


def load_results(results_dir: Path) -> list[dict[str, Any]]:
    """All finished results below `results_dir`, sorted by run id."""
    results = (finished_result(path.parent) for path in sorted(results_dir.glob(f"*/{RESULT_FILE}")))
    return [result for result in results if result is not None]
