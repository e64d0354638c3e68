"""The table that closes a command, and which settings tell its lines apart."""

import math
from typing import Any

import pytest

from bayesq.suite import results
from bayesq.suite.summary import STAGES, results_table, two_digits


def result(method: str = "gptq", bits: float = 3, seed: int = 0, **changes: Any) -> dict[str, Any]:
    config = {
        "model": {"name": "minilm"},
        "dataset": {"name": "movie_snippets", **changes.pop("data", {})},
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
        **{f"time/{stage}_s": seconds for stage, seconds in zip(STAGES, (1.0, 2.0, 4.0, 5.34), strict=True)},
        "time/evaluate_s": 1000.0,
        "time/total_s": 5000.0,
        "evaluation/examples": 2048,
        "config": config,
        **changes,
    }


def unfinished(status: str, method: str = "awq", **changes: Any) -> dict[str, Any]:
    keys = ("model", "dataset", "method", "bits/target", "seed", "config")
    return {**{key: result(method, **changes)[key] for key in keys}, "status": status}


def lines(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def column(table: str, name: str) -> list[str]:
    """Cells of a section's column, told by where its rule stands."""
    _, head, rule, *rows = table.splitlines()
    end = head.index(name) + len(name)
    start = rule.rfind(" ", 0, end) + 1
    end = (rule + " ").index(" ", start)
    return [row[start:end].strip() for row in rows]


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.0125, None, "0.013"),
        (0.004, None, "0.0040"),
        (0.00996, None, "0.010"),
        (0.000123, None, "0.00012"),
        (0.0000421, None, "4.2e-05"),
        (1.234, None, "1.2"),
        (23.4, None, "23"),
        (0.0, None, "0.0"),
        (0.0042, 0.00031, "0.0042 ± 0.0003"),
        (0.21, 0.0014, "0.210 ± 0.001"),
        (0.21, 0.14, "0.21 ± 0.14"),
        (0.42, 0.0, "0.42 ± 0"),
        (4.2e-6, 3.1e-7, "4.2e-06 ± 0.3e-06"),
        (4.2e-6, 3.1e-8, "4.20e-06 ± 0.03e-06"),
        (0.0, 0.0, "0.0 ± 0"),
        (None, None, "-"),
        (math.nan, None, "-"),
    ],
)
def test_two_significant_digits_and_a_spread_of_the_same_last_place(
    value: float | None, spread: float | None, text: str
) -> None:
    assert two_digits(value, spread) == text


# --------------------------------------------------------------------------------------------------------------- lines


def test_the_table_shows_each_method_and_budget_in_the_order_they_ran() -> None:
    runs = [result("gptq", 4), result("gptq", 3), result("bayesq", 3.5, **{"q/accuracy": 0.81, "delta/accuracy": 0.01})]
    table = lines(results_table(runs))
    assert " ".join(table[0]) == ("minilm on movie_snippets: full precision 80.00 % accuracy on 2,048 examples")
    assert " ".join(table[1]) == "method bits accuracy % delta KL bits/code bits/stored seconds"
    assert table[3] == ["gptq", "3", "75.00", "-5.00", "0.013", "3.000", "3.250", "12.3"]
    assert table[4] == ["gptq", "4", "75.00", "-5.00", "0.013", "4.000", "4.250", "12.3"]
    assert table[5] == ["bayesq", "3.5", "81.00", "+1.00", "0.013", "3.500", "3.750", "12.3"]


def test_seeds_are_averaged_with_their_spread_and_counted() -> None:
    runs = [result(seed=seed, **{"q/accuracy": 0.7 + seed / 100, "q/kl_to_fp": 0.1 * seed}) for seed in (0, 1, 2)]
    table = results_table(runs)
    assert column(table, "n") == ["3"]
    assert column(table, "accuracy %") == ["71.00 ± 1.00"]
    assert column(table, "KL") == ["0.10 ± 0.10"]
    assert len(lines(table)) == 4


def test_a_small_kl_keeps_its_digits() -> None:
    assert column(results_table([result(**{"q/kl_to_fp": 2.4e-6})]), "KL") == ["2.4e-06"]


def test_seconds_are_those_of_the_method_alone() -> None:
    """Neither the preparation nor the evaluation that time/total_s includes."""
    runs = [result("rtn", **{"time/calibrate_s": 0.0}), result("bayesq", **{"time/distill_s": 100.0})]
    assert column(results_table(runs), "seconds") == ["11.3", "107.0"]


def test_signs_of_spreads_stand_below_each_other() -> None:
    runs = [result(seed=seed, **{"q/kl_to_fp": 0.02 + 0.001 * seed, "q/accuracy": 0.7}) for seed in (0, 1)]
    runs += [result("rtn", 4, seed=seed, **{"q/kl_to_fp": 1.0 + seed, "q/accuracy": seed / 1.0}) for seed in (0, 1)]
    runs += [result("awq")]
    *_, first, second, third = results_table(runs).splitlines()
    places = [[i for i, c in enumerate(line) if c == "±"] for line in (first, second, third)]
    assert places[0] == places[1] and len(places[0]) == 2 and not places[2]
    assert third.index("75.00") + len("75.00") == places[0][0] - 1, "a mean alone stands where the others do"


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged() -> None:
    runs = [result(clip="mse"), result(clip="minmax"), result("rtn")]
    assert results.differing_settings(runs) == ["method.clip"]
    table = lines(results_table(runs))
    assert table[1][:3] == ["method", "bits", "method.clip"]
    assert [row[:3] for row in table[3:]] == [["gptq", "3", "minmax"], ["gptq", "3", "mse"], ["rtn", "3", "auto"]]


def test_switches_that_run_ids_leave_out_at_their_older_values_still_separate_runs() -> None:
    runs = [result(), result()]
    for run, codec, group_size in zip(runs, ("fixed", "entropy"), (None, 128), strict=True):
        run["config"]["codec"] = codec
        run["config"]["method"] |= {"neutral": {"group_size": None}, "group_size": group_size}
    assert results.differing_settings(runs) == ["codec", "method.group_size"]


def test_a_setting_that_differs_between_budgets_has_a_column_too() -> None:
    table = lines(results_table([result(bits=3, clip="mse"), result(bits=4, clip="minmax")]))
    assert [row[:3] for row in table[3:]] == [["gptq", "3", "mse"], ["gptq", "4", "minmax"]]


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


@pytest.mark.parametrize("status", ["failed", "missing"])
def test_a_run_without_a_result_keeps_its_line(status: str) -> None:
    table = lines(results_table([result(), unfinished(status)]))
    assert table[4] == ["awq", "3", status, "-", "-", "-", "-", "-"]
    assert status in results_table([unfinished(status)])


def test_a_seed_without_a_result_is_counted_as_one_that_lacks() -> None:
    runs = [result(seed=0), result(seed=1), unfinished("failed", "gptq", seed=2), result("rtn", seed=0)]
    assert column(results_table(runs), "n") == ["2/3", "1"]


def test_a_missing_figure_is_a_dash_and_no_mean_of_the_others() -> None:
    assert column(results_table([result(**{"q/kl_to_fp": None})]), "KL") == ["-"]
    runs = [result(seed=0), result(seed=1, **{"q/kl_to_fp": None}), result("rtn", **{"q/kl_to_fp": 0.5})]
    assert column(results_table(runs), "KL") == ["-", "0.50"]
    assert column(results_table(runs), "accuracy %") == ["75.00 ± 0.00", "75.00"]


# ------------------------------------------------------------------------------------------------------------ sections


def test_each_model_and_dataset_has_its_own_section() -> None:
    other = {**result(), "model": "resnet", "dataset": "digits"}
    sections = results_table([result(), other]).split("\n\n")
    assert [section.split(":")[0] for section in sections] == ["minilm on movie_snippets", "resnet on digits"]


def test_each_task_has_its_own_section_and_correlations_are_points() -> None:
    runs = []
    for task, metric in (("cola", "matthews"), ("rte", "accuracy")):
        run = result(**{f"{side}/{metric}": 0.5 for side in ("fp", "q")}, **{f"delta/{metric}": 0.0})
        run |= {"primary_metric": metric}
        run["config"]["dataset"]["task"] = task
        runs.append(run)
    first, second = results_table(runs).split("\n\n")
    assert first.startswith("minilm on movie_snippets cola: full precision 50.00 x100 matthews on")
    assert "matthews x100" in first and "accuracy %" in second and "dataset.task" not in first


@pytest.mark.parametrize("bits", [3, 4], ids=["one-budget", "another-budget"])
def test_evaluation_sets_have_sections_with_full_precision_figures_of_their_own(bits: float) -> None:
    few = result(data={"limit": 100}, **{"fp/accuracy": 0.6, "evaluation/examples": 100})
    all_of_them = result(bits=bits, data={"limit": None})
    first, second = results_table([few, all_of_them]).split("\n\n")
    head = "minilm on movie_snippets dataset.limit"
    assert first.startswith(f"{head}=100: full precision 60.00 % accuracy on 100 examples\nmethod  bits  accuracy")
    assert second.startswith(f"{head}=null: full precision 80.00 % accuracy on 2,048 examples\nmethod  bits  accuracy")
