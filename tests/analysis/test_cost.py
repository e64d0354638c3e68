"""Cost: whose memory a peak is, what is compared with what, and on which machines."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from frozen import add

from analysis import load_runs, style
from analysis.figures import cost
from analysis.loading import records
from analysis.notebooks import render_all
from analysis.tables.cost import MEMORY, NO_MEMORY, cost_table

GIB = 2**30


def changed(folder: Path, **values: Any) -> None:
    file = folder / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def two_methods(results: Path, process: str | None, *memory: float) -> None:
    """GPTQ and BayesQ with seeds 0 and 1, in this order of finishing."""
    runs = [(method, seed) for seed in (0, 1) for method in ("gptq", "bayesq")]
    for place, ((method, seed), peak) in enumerate(zip(runs, memory, strict=True)):
        folder = add(results, method, 3.0, seed, memory=peak * GIB, process=process)
        os.utime(folder / "result.json", (1000 + place, 1000 + place))


def test_one_process_for_all_runs_leaves_no_memory(tmp_path: Path) -> None:
    two_methods(tmp_path / "results", "one", 1, 2, 2, 2)
    runs = load_runs(tmp_path / "results")
    table = cost_table(runs)
    assert not [name for name in (*table.cells, *table.numbers) if "mem" in name or "MiB" in name]
    assert NO_MEMORY in table.caption and MEMORY not in table.caption
    data = cost.data(runs)
    assert data["gib"].isna().all() and data["time x"].notna().all()
    drawn = cost.draw(data, style.looks(runs))
    assert [axes.get_xlabel() for axes in drawn.axes] == ["preprocessing time (multiples of GPTQ's)"]
    render_all(tmp_path / "results", tmp_path / "paper", ["cost"])
    caption = (tmp_path / "paper/cost_multiples.txt").read_text()
    assert NO_MEMORY in caption and "Preprocessing time as multiples" in caption


def test_processes_of_their_own_have_their_memory(tmp_path: Path) -> None:
    two_methods(tmp_path, "", 1, 3, 1, 3)
    runs = load_runs(tmp_path)
    numbers = cost_table(runs).numbers.set_index("variant")
    assert numbers.loc["bayesq", "memory x"] == pytest.approx(3)
    assert len(cost.draw(cost.data(runs), style.looks(runs)).axes) == 2


def test_runs_of_a_shared_process_leave_gaps_beside_the_others(tmp_path: Path) -> None:
    two_methods(tmp_path, "", 1, 3, 1, 3)
    for seed in (0, 1):
        add(tmp_path, "awq", 3.0, seed, memory=9 * GIB, process="shared")
    table = cost_table(load_runs(tmp_path))
    numbers = table.numbers.set_index("variant")
    assert math.isnan(numbers.loc["awq", "memory"]) and numbers.loc["gptq", "memory"] == GIB
    cells = table.cells.set_index("method")
    assert (cells.loc["awq", "peak MiB"], cells.loc["awq", "memory ×"]) == ("-", "-")
    assert MEMORY in table.caption


def test_a_filter_does_not_hide_the_other_runs_of_a_process(tmp_path: Path) -> None:
    two_methods(tmp_path, "one", 1, 2, 2, 2)
    runs = load_runs(tmp_path, ["method=gptq", "seed=0"])
    assert [run["memory/own_process"] for run in records(runs)] == [False]


def test_a_run_that_did_not_record_its_process_has_no_memory(tmp_path: Path) -> None:
    two_methods(tmp_path, None, 4, 3, 2, 1)
    assert {run["memory/own_process"] for run in records(load_runs(tmp_path))} == {False}


def test_the_figure_compares_with_the_gptq_of_the_table(tmp_path: Path) -> None:
    """Time and memory of one variant, with as many calibration examples; not the least of each over all variants."""
    add(tmp_path, "gptq", 3.0, 0, seconds=(1, 0, 1, 0), memory=4 * GIB, inputs="full")
    add(tmp_path, "gptq", 3.0, 0, seconds=(1, 0, 9, 0), memory=1 * GIB, inputs="prefix")
    add(tmp_path, "gptq", 3.0, 0, seconds=(0, 0, 0.1, 0), memory=0.5 * GIB, calibration__examples=16)
    add(tmp_path, "bayesq", 3.0, 0, seconds=(1, 1, 2, 0), memory=8 * GIB)
    runs = load_runs(tmp_path)
    row = cost.data(runs).set_index("variant").loc["bayesq"]
    assert (row["time x"], row["memory x"], row["reference"]) == (2.0, 2.0, "gptq inputs=full")
    numbers = cost_table(runs).numbers.set_index("variant").loc["bayesq"]
    assert (numbers["total x"], numbers["memory x"], numbers["reference"]) == (2.0, 2.0, "gptq inputs=full")


def test_seconds_that_were_not_recorded_are_no_zeros(tmp_path: Path) -> None:
    add(tmp_path, "gptq", 3.0, 0)
    bare = add(tmp_path, "bayesq", 3.0, 0)
    changed(bare, **{f"time/{stage}_s": None for stage in ("calibrate", "posterior", "quantize", "distill")})
    cells = cost_table(load_runs(tmp_path)).cells.set_index("method").loc["bayesq"]
    assert (cells["quantize s"], cells["total ×"]) == ("-", "-")


def test_seconds_of_several_machines_are_told(tmp_path: Path) -> None:
    hosts = [{"processor": "Xeon", "device": "cpu", "threads": 1, "directory": place} for place in ("/a", "/b")]
    for seed, host in enumerate(hosts):
        changed(add(tmp_path, "gptq", 3.0, seed), host=host)
    assert not [note for note in cost_table(load_runs(tmp_path)).footnotes if "machine" in note]
    changed(add(tmp_path, "bayesq", 3.0, 0), host={**hosts[0], "processor": "EPYC"})
    (note,) = [note for note in cost_table(load_runs(tmp_path)).footnotes if "machine" in note]
    assert note == (
        "resnet / digits: seconds are of 2 kinds of machine (EPYC, cpu, 1 threads; Xeon, cpu, 1 threads) and do not "
        "compare."
    )


def test_a_result_without_any_memory_has_none(tmp_path: Path) -> None:
    folder = add(tmp_path, "gptq", 3.0, 0)
    changed(folder, **{"memory/peak_rss_bytes": None})
    data = cost.data(load_runs(tmp_path))
    assert pd.isna(data["gib"]).all() and data["time x"].tolist() == [1.0]
