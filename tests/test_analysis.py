"""Reading a results folder back as a data frame and as the main table."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import cost_table, glue_table, load_runs, main_table
from bayesq.suite.results import write_json

ROOT = Path(__file__).parents[1]


STAGES = ("calibrate", "posterior", "quantize", "distill")


def add(
    folder: Path,
    run_id: str,
    method: str,
    bits: float,
    seed: int,
    accuracy: float,
    times: tuple[float, float, float, float] = (1.0, 0.0, 1.0, 0.0),
    task: str = "digits",
    **method_options: Any,
) -> None:
    config = {
        "model": {"name": "resnet"},
        "dataset": {"name": "digits", "task": task},
        "method": {"name": method, **method_options},
        "allocator": "uniform",
        "bits": bits,
        "seed": seed,
    }
    result = {
        "run_id": run_id,
        "status": "finished",
        "model": "resnet",
        "dataset": "digits",
        "method": method,
        "seed": seed,
        "primary_metric": "accuracy",
        "bits/target": bits,
        "q/accuracy": accuracy,
        "q/kl_to_fp": accuracy / 10,
        "config": config,
        **{f"time/{stage}_s": seconds for stage, seconds in zip(STAGES, times, strict=True)},
    }
    write_json(folder / run_id / "result.json", result)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add(tmp_path, "a", "gptq", 3, 0, 0.5)
    add(tmp_path, "b", "gptq", 3, 1, 0.75)
    add(tmp_path, "c", "gptq", 3.5, 0, 0.875)
    add(tmp_path, "d", "rtn", 3, 0, 0.25)
    write_json(tmp_path / "e" / "result.json", {"run_id": "e", "status": "running"})
    return tmp_path


def test_one_row_per_finished_run_with_the_keys_of_the_result(folder: Path) -> None:
    runs = load_runs(folder)
    assert list(runs["run_id"]) == ["a", "b", "c", "d"]
    assert runs["q/accuracy"].tolist() == [0.5, 0.75, 0.875, 0.25]
    assert runs["config"][0]["method"] == {"name": "gptq"}


def test_the_main_table_averages_over_seeds(folder: Path) -> None:
    table = main_table(load_runs(folder))
    gptq = table.loc[("resnet", "digits", "gptq")]
    assert gptq[3] == "62.50 / 0.0625 (n=2)"
    assert gptq[3.5] == "87.50 / 0.0875 (n=1)"
    assert table.loc[("resnet", "digits", "rtn"), 3.5] == ""


def test_runs_that_differ_in_more_than_the_seed_have_rows_of_their_own(folder: Path) -> None:
    for run_id, clip, accuracy in (("f", "mse", 0.5), ("g", "minmax", 0.25)):
        add(folder, run_id, "awq", 3, 0, accuracy, clip=clip)
    table = main_table(load_runs(folder))
    assert table.index.names == ["model", "dataset", "method", "method.clip"]
    assert table.loc[("resnet", "digits", "awq", "mse"), 3] == "50.00 / 0.0500 (n=1)"
    assert table.loc[("resnet", "digits", "awq", "minmax"), 3] == "25.00 / 0.0250 (n=1)"


def test_costs_are_medians_and_multiples_of_the_fastest_plain_gptq(tmp_path: Path) -> None:
    for seed, calibrate in enumerate((1.0, 2.0, 9.0)):
        add(tmp_path, f"g{seed}", "gptq", 3, seed, 0.5, (calibrate, 0.0, 2.0, 0.0), sequential=False)
        add(tmp_path, f"s{seed}", "gptq", 3, seed, 0.5, (0.0, 0.0, 50.0, 0.0), sequential=True)
        add(tmp_path, f"b{seed}", "bayesq", 3, seed, 0.5, (calibrate + 1, 1.0, 2.0, 4.0 * seed))
    add(tmp_path, "d", "gptq", 4, 0, 0.5, (0.0, 0.0, 1.0, 1.0), sequential=False)  # distilled: no baseline
    add(tmp_path, "o", "bayesq", 4, 0, 0.5)
    add(tmp_path, "w", "gptq", 3, 0, 0.5, (0.0, 0.0, 0.5, 0.0), task="other")  # another workload's
    table = cost_table(load_runs(tmp_path)).reset_index()
    bayesq = table[table["method"] == "bayesq"].set_index("bits")
    assert bayesq.loc[3, ["calibrate", "posterior", "quantize", "distill", "n"]].tolist() == [3.0, 1.0, 2.0, 4.0, 3]
    assert bayesq["quantize x"].tolist() == [pytest.approx(6 / 4), pytest.approx(math.nan, nan_ok=True)]
    assert bayesq["total x"].tolist() == [pytest.approx(10 / 4), pytest.approx(math.nan, nan_ok=True)]
    assert table[table["method.sequential"] == "True"]["total x"].tolist() == [pytest.approx(50 / 4)]
    done = module(str(tmp_path), "--cost")
    assert done.returncode == 0, done.stderr
    assert "quantize x" in done.stdout and " 2.50 " in done.stdout


def add_task(
    folder: Path, run_id: str, task: str, seed: int, q: dict[str, float], fp: float, method: str = "gptq"
) -> None:
    """A run of a task of GLUE whose full-precision model scores `fp` on every metric."""
    add(folder, run_id, method, 3, seed, 0.0, task=task)
    path = folder / run_id / "result.json"
    result = json.loads(path.read_text())
    result = {key: value for key, value in result.items() if key != "q/accuracy"}
    result |= {"model": "bert", "dataset": "glue", "primary_metric": next(iter(q))}
    result["config"]["model"] = {"name": "bert", "checkpoint": f"models/{task}"}
    for metric, value in q.items():
        result |= {f"q/{metric}": value, f"fp/{metric}": fp, f"delta/{metric}": value - fp}
        result[f"delta/{metric}/ci95"] = [-1, 1]
    write_json(path, result)


def test_glue_scores_are_means_over_tasks_of_means_over_metrics(tmp_path: Path) -> None:
    for seed, cola in ((0, 0.5), (1, 0.6)):
        add_task(tmp_path, f"c{seed}", "cola", seed, {"matthews": cola}, 0.7)
        add_task(tmp_path, f"m{seed}", "mnli", seed, {"accuracy": 0.8, "accuracy_mismatched": 0.9}, 0.95)
    add_task(tmp_path, "s", "stsb", 0, {"pearson": 0.3, "spearman": 0.5}, 0.6)
    add_task(tmp_path, "r", "rte", 0, {"accuracy": 0.25}, 0.5, method="rtn")
    add(tmp_path, "x", "gptq", 3, 0, 0.5)  # digits are no task of GLUE
    table = glue_table(load_runs(tmp_path))
    assert table.index.names == ["model", "dataset", "method", "bits"]
    gptq = table.loc[("bert", "glue", "gptq", 3)]
    assert [gptq[task] for task in ("cola", "mnli", "stsb")] == pytest.approx([55, 85, 40])
    assert gptq["GLUE"] == pytest.approx((55 + 85 + 40) / 3)
    assert gptq["FP"] == pytest.approx((70 + 95 + 60) / 3) and gptq["delta"] == pytest.approx(-15)
    assert gptq["n"] == 1 and gptq["missing"] == "sst2, mrpc, qqp, qnli, rte, wnli"
    rtn = table.loc[("bert", "glue", "rtn", 3)]
    assert rtn["GLUE"] == 25 and math.isnan(rtn["cola"]) and "cola" in rtn["missing"]
    done = module(str(tmp_path), "--glue")
    assert done.returncode == 0, done.stderr
    assert "GLUE" in done.stdout and "60.00" in done.stdout and "nan" not in done.stdout


def test_no_glue_is_one_line(folder: Path) -> None:
    done = module(str(folder), "--glue")
    assert done.returncode == 1 and done.stderr.startswith("error: no run of a GLUE task")


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analysis", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_module_prints_markdown(folder: Path) -> None:
    done = module(str(folder))
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert rows[0] == ["model", "dataset", "method", "3 bit", "3.5 bit"]
    assert rows[2] == ["resnet", "digits", "gptq", "62.50 / 0.0625 (n=2)", "87.50 / 0.0875 (n=1)"]


def test_no_folder_or_no_runs_is_one_line(tmp_path: Path) -> None:
    for source, message in ((tmp_path, "no finished run"), (tmp_path / "missing", "no results folder")):
        done = module(str(source))
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1
