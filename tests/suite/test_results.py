"""Result files and the summary table."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesq.suite import results


def result(method: str = "gptq", bits: float = 3, seed: int = 0, **changes: Any) -> dict[str, Any]:
    config = {
        "model": {"name": "minilm"},
        "dataset": {"name": "movie_snippets"},
        "method": {"name": method, "allocator": "uniform", "clip": changes.pop("clip", "auto")},
        "posterior": {"name": changes.pop("posterior", "kfac"), "shrinkage": 0.5},
        "allocator": changes.pop("allocator", "uniform"),
        "allocation": {"block": "row", "widths": [2, 4]},
        "bits": bits,
        "seed": seed,
        "results_dir": "results",
    }
    return {
        "run_id": f"{method}{bits}{seed}",
        "status": "finished",
        "model": "minilm",
        "dataset": "movie_snippets",
        "method": method,
        "seed": seed,
        "primary_metric": "accuracy",
        "bits/target": bits,
        "bits/code": bits,
        "bits/stored": bits + 0.25,
        "fp/accuracy": 0.8,
        "q/accuracy": 0.75,
        "delta/accuracy": -0.05,
        "q/kl_to_fp": 0.0125,
        "time/total_s": 12.34,
        "evaluation/examples": 2048,
        "config": config,
        **changes,
    }


def lines(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


# -------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = {"a": np.float32(0.5), "b": np.int64(3), "c": [1, (2, "x")], "d": {"e": None, "f": True}, "p": Path("q")}
    results.write_json(tmp_path / "new" / "result.json", content)
    expected = {"a": 0.5, "b": 3, "c": [1, [2, "x"]], "d": {"e": None, "f": True}, "p": "q"}
    assert results.read_result(tmp_path / "new" / "result.json") == expected


def test_numbers_json_cannot_spell_become_null(tmp_path: Path) -> None:
    content = {"nan": math.nan, "inf": [math.inf], "nested": {"x": np.float64("-inf")}}
    results.write_json(tmp_path / "r.json", content)
    assert json.loads((tmp_path / "r.json").read_text()) == {"nan": None, "inf": [None], "nested": {"x": None}}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results.write_json(path, {"status": "finished"})
    with pytest.raises(TypeError, match=r"object has no place"):
        results.write_json(path, {"status": object()})
    with pytest.raises(RuntimeError), results.atomic_path(path) as temporary:
        temporary.write_text("half a res")
        raise RuntimeError
    assert results.read_result(path) == {"status": "finished"}
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    results.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.parametrize("text", ["", '{"status": "finis', "[1]", '{"status": "running"}', "\x00"])
def test_a_broken_or_other_result_is_not_finished(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    assert not results.is_finished(tmp_path)


def test_only_finished_runs_are_loaded(tmp_path: Path) -> None:
    for run_id, status in (("b", "finished"), ("a", "finished"), ("c", "failed")):
        results.write_json(tmp_path / run_id / "result.json", {"run_id": run_id, "status": status})
    (tmp_path / "d").mkdir()
    (tmp_path / "multirun.yaml").write_text("x: 1")
    assert [found["run_id"] for found in results.load_results(tmp_path)] == ["a", "b"]


def test_csv_has_a_header_and_empty_cells_for_none(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "layers.csv", [{"name": "a,b", "kappa": None}, {"name": "c", "kappa": 1.5}])
    assert (tmp_path / "layers.csv").read_text() == 'name,kappa\n"a,b",\nc,1.5\n'
    with pytest.raises(ValueError, match=r"layers.csv"):
        results.write_csv(tmp_path / "layers.csv", [])
    with pytest.raises(ValueError, match=r"other"):
        results.write_csv(tmp_path / "layers.csv", [{"name": "a"}, {"other": 1}])


# -------------------------------------------------------------------------------------------------------------- table


def test_the_table_shows_each_method_and_budget_in_the_order_they_ran() -> None:
    runs = [result("gptq", 4), result("gptq", 3), result("bayesq", 3.5, **{"q/accuracy": 0.81, "delta/accuracy": 0.01})]
    table = lines(results.results_table(runs))
    assert " ".join(table[0]) == ("minilm on movie_snippets: full precision 80.00 % accuracy on 2,048 examples")
    assert " ".join(table[1]) == "method bits accuracy % delta KL bits/code bits/stored seconds"
    assert table[3] == ["gptq", "3", "75.00", "-5.00", "0.0125", "3.000", "3.250", "12.3"]
    assert table[4] == ["gptq", "4", "75.00", "-5.00", "0.0125", "4.000", "4.250", "12.3"]
    assert table[5] == ["bayesq", "3.5", "81.00", "+1.00", "0.0125", "3.500", "3.750", "12.3"]


def test_seeds_are_averaged_and_counted() -> None:
    runs = [result(seed=seed, **{"q/accuracy": 0.7 + seed / 100, "q/kl_to_fp": 0.1 * seed}) for seed in (0, 1, 2)]
    table = lines(results.results_table(runs))
    assert table[3][:6] == ["gptq", "3", "3", "71.00", "-5.00", "0.1000"]
    assert len(table) == 4


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged() -> None:
    runs = [result(clip="mse"), result(clip="minmax"), result("rtn")]
    assert results.differing_settings(runs) == ["method.clip"]
    table = lines(results.results_table(runs))
    assert table[1][:3] == ["method", "bits", "method.clip"]
    assert [row[:3] for row in table[3:]] == [["gptq", "3", "minmax"], ["gptq", "3", "mse"], ["rtn", "3", "auto"]]


def test_a_seed_that_the_data_set_is_told_separates_nothing_but_another_one_does() -> None:
    runs = [result(seed=seed) for seed in (0, 1)]
    for run in runs:
        run["config"]["dataset"]["seed"] = run["seed"]
    assert results.differing_settings(runs) == []
    runs[1]["config"]["dataset"]["seed"] = 5
    assert results.differing_settings(runs) == ["dataset.seed"]


def test_only_the_name_of_a_posterior_is_shown_when_posteriors_differ() -> None:
    kfac, diag = result(allocator="knapsack"), result(allocator="knapsack", posterior="diag")
    diag["config"]["posterior"]["shrinkage"] = 0
    assert results.differing_settings([kfac, diag]) == ["posterior"]
    kfac["config"]["posterior"]["name"] = "diag"
    assert results.differing_settings([kfac, diag]) == ["posterior.shrinkage"]


def test_a_failed_run_keeps_its_line() -> None:
    failed = {key: result("awq")[key] for key in ("model", "dataset", "method", "bits/target", "seed", "config")}
    table = lines(results.results_table([result(), {**failed, "status": "failed"}]))
    assert table[4] == ["awq", "3", "failed", "-", "-", "-", "-", "-"]
    assert "failed" in results.results_table([{**failed, "status": "failed"}])


def test_each_model_and_dataset_has_its_own_section() -> None:
    other = {**result(), "model": "resnet", "dataset": "digits"}
    sections = results.results_table([result(), other]).split("\n\n")
    assert [section.split(":")[0] for section in sections] == ["minilm on movie_snippets", "resnet on digits"]


def test_each_task_has_its_own_section_and_correlations_are_points() -> None:
    runs = []
    for task, metric in (("cola", "matthews"), ("rte", "accuracy")):
        run = result(**{f"{side}/{metric}": 0.5 for side in ("fp", "q")}, **{f"delta/{metric}": 0.0})
        run |= {"primary_metric": metric}
        run["config"]["dataset"]["task"] = task
        runs.append(run)
    first, second = results.results_table(runs).split("\n\n")
    assert first.startswith("minilm on movie_snippets cola: full precision 50.00 x100 matthews on")
    assert "matthews x100" in first and "accuracy %" in second and "dataset.task" not in first


def test_a_missing_figure_is_a_dash() -> None:
    assert lines(results.results_table([result(**{"q/kl_to_fp": None})]))[3][4] == "-"
