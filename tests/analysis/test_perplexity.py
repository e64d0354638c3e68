"""Perplexity in tables: its unit, its direction, and its interval from the rows of sequences."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from result_files import add_run

from analysis.loading import load_runs
from analysis.metrics import as_share, is_better
from analysis.tables.main import main_table

TOKENS = 15
FULL = 20.0


def language_run(folder: Path, method: str, perplexity: float) -> None:
    """A run of `result_files` with the keys and rows of a language model of this perplexity."""
    path = add_run(folder, "smollm2_135m", "wikitext", method=method)
    draw = np.random.default_rng(0).standard_normal(40) / 20
    nll = math.log(perplexity) + draw - draw.mean()
    rows = [
        {"predictions": float(TOKENS), "fp_nll": math.log(FULL), "q_nll": x, "kl": 0.1 * x, "id": f"test:{k}"}
        for k, x in enumerate(nll)
    ]
    with (path / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    result = json.loads((path / "result.json").read_text())
    result = {key: value for key, value in result.items() if "accuracy" not in key}
    result |= {"primary_metric": "perplexity", "fp/perplexity": FULL, "q/perplexity": perplexity}
    result |= {"delta/perplexity": perplexity - FULL, "delta/perplexity/ci95": [0, 1], "fp/ece": None, "q/ece": None}
    (path / "result.json").write_text(json.dumps(result))


def test_a_lower_perplexity_is_better(tmp_path: Path) -> None:
    for method, perplexity in (("gptq", 26.0), ("bayesq", 24.0), ("rtn", 29.0)):
        language_run(tmp_path, method, perplexity)
    table = main_table(load_runs(tmp_path))
    rows = {row["variant"]: row for row in table.numbers.to_dict("records")}
    (delta,) = (head for head in table.cells if head.startswith("Δ"))
    assert table.bold[delta].tolist() == [name == "bayesq" for name in rows]
    assert 100 * rows["bayesq"]["delta"] == pytest.approx(-2)
    assert 100 * rows["bayesq"]["delta_high"] < 0 < 100 * rows["rtn"]["delta_low"]
    text = table.markdown()
    assert "24.00" in text and "-2.00" in text and "2400" not in text


def test_units_and_directions() -> None:
    assert (as_share("accuracy", 0.123), 100 * as_share("perplexity", 24.5)) == (0.123, pytest.approx(24.5))
    assert is_better(0.1, "accuracy") and is_better(-0.1, "perplexity")
    assert not is_better(math.nan, "perplexity") and not is_better(-0.1, None)
