"""The league table and its figure against naive ranks, published critical differences and loops over blocks."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from frozen import add
from result_files import add_run

from analysis.figures import league as figure
from analysis.loading import load_runs
from analysis.methods import methods_of
from analysis.ranks import alike_groups, complete, critical_difference, friedman, ranks, too_few
from analysis.statistics import paired_bootstrap, paired_ratio_bootstrap
from analysis.style import looks
from analysis.tables.league import league_of, league_table, significance, winners
from bayesq.suite.results import read_result, write_json

WORKLOADS = (("minilm", "movie_snippets", None), ("cifar_resnet56", "cifar10", None), ("minilm", "glue", "sst2"))
# KL at 3 bits; a rival wins one block
LOSSES = {"rtn": 0.5, "gptq": 0.08, "awq": 0.3, "bayesq": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("league")
    for model, dataset, task in WORKLOADS:
        for (method, loss), bits in itertools.product(LOSSES.items(), (3.0, 4.0)):
            for seed in (0, 1):
                kl = loss * 4 ** (3 - bits) * (1 + 0.1 * seed)
                if task and bits == 4 and method == "awq":
                    kl = 1e-4
                add_run(path, model, dataset, task, method, bits, seed, kl=kl)
    add_run(path, *WORKLOADS[0], "gptq", 3.0, 0, kl=0.05, options=["sequential=false"], run_id="full0")
    add_run(path, *WORKLOADS[0], "gptq", 3.0, 1, kl=0.05, options=["sequential=false"], run_id="full1")
    add_run(path, *WORKLOADS[0], "awq", 2.0, 0, kl=0.9, run_id="alone")
    return path


def naive_ranks(row: list[float]) -> list[float]:
    """1 + the number of smaller values + half the number of other equal ones."""
    return [1 + sum(y < x for y in row) + (sum(y == x for y in row) - 1) / 2 for x in row]


def test_ranks_are_those_of_a_count() -> None:
    values = pd.DataFrame(np.random.default_rng(0).integers(0, 4, (20, 6)).astype(float))
    expected = [naive_ranks(row) for row in values.to_numpy().tolist()]
    np.testing.assert_array_equal(ranks(values).to_numpy(), expected)


def test_the_critical_difference_is_that_of_published_tables() -> None:
    """q for 2, 5 and 10 settings at 5 %: 1.960, 2.728, 3.164 (Demsar 2006, table 5)."""
    for k, q in ((2, 1.960), (5, 2.728), (10, 3.164)):
        assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), rel=5e-4)


def test_friedmans_test_is_its_formula() -> None:
    values = pd.DataFrame(np.random.default_rng(1).random((9, 4)) + np.array([0, 0.2, 0.4, 0.6]))
    n, k = values.shape
    mean = np.mean([naive_ranks(row) for row in values.to_numpy().tolist()], axis=0)
    statistic = 12 * n / (k * (k + 1)) * (sum(mean**2) - k * (k + 1) ** 2 / 4)
    # the upper tail of chi-square with three degrees of freedom
    tail = math.erfc(math.sqrt(statistic / 2)) + math.sqrt(2 * statistic / math.pi) * math.exp(-statistic / 2)
    assert friedman(values) == pytest.approx(tail, rel=1e-9)
    assert math.isnan(friedman(values[[0, 1]]))


def test_the_ranked_part_is_the_largest_complete_one() -> None:
    nan = math.nan
    values = pd.DataFrame({"a": [1, 2, 3, 4.0], "b": [2, 1, 2, 1.0], "c": [3, 3, nan, nan], "d": [nan, nan, nan, 0.0]})
    assert complete(values).shape == (4, 2)
    values["c"] = [3, 3, 3, nan]
    assert complete(values).shape == (3, 3) and [*complete(values)] == ["a", "b", "c"]
    assert [*complete(values, ["d"])] == ["d", "a", "b"] and len(complete(values, ["d"])) == 1
    assert complete(values[["a"]]).empty


def test_groups_are_maximal() -> None:
    mean = pd.Series({"a": 1.0, "b": 1.5, "c": 2.4, "d": 2.6, "e": 5.0})
    assert alike_groups(mean, 1.2) == [["a", "b"], ["b", "c", "d"]]
    assert alike_groups(mean, 0.05) == []


def test_the_interval_of_several_blocks_is_that_of_each_for_one() -> None:
    draw = np.random.default_rng(2)
    first, second = draw.random((3, 40)) + 0.1, draw.random((3, 40))
    one, alone = paired_ratio_bootstrap([(first, second)]), paired_bootstrap(first, second, ratio=True)
    assert one.value == pytest.approx(alone.value)
    assert (one.low, one.high) == pytest.approx((alone.low, alone.high), rel=0.02)
    pairs = [(first, second), (second + 0.5, 3 * first)]
    both = paired_ratio_bootstrap(pairs)
    assert both.value == pytest.approx(math.sqrt(math.prod(b.mean() / a.mean() for a, b in pairs)))
    assert both.low < both.value < both.high
    assert math.isnan(paired_ratio_bootstrap([(0 * first, second)]).value)


def test_the_table_is_that_of_loops(folder: Path) -> None:
    runs = load_runs(folder)
    table = league_table(runs)
    numbers = table.numbers.set_index("setting")
    assert [*numbers.index[:4]] == ["bayesq", "gptq", "awq", "rtn"]
    rank: dict[str, list[float]] = {name: [] for name in LOSSES}
    for (_, _, task), bits in itertools.product(WORKLOADS, (3.0, 4.0)):
        kl = {name: 1.05 * loss * 4 ** (3 - bits) for name, loss in LOSSES.items()}
        kl |= {"awq": 1e-4} if task and bits == 4 else {}
        # data-free round to nearest is one run for every seed, but both of its runs are means here
        for name, place in zip(kl, naive_ranks([*kl.values()]), strict=True):
            rank[name].append(place)
    for name, places in rank.items():
        assert numbers.loc[name, "mean_rank"] == pytest.approx(np.mean(places))
        assert numbers.loc[name, "ranked_blocks"] == 6 and numbers.loc[name, "workloads"] == 3
        assert numbers.loc[name, "wins"] == sum(place == 1 for place in places)
    assert numbers.loc["bayesq", "kl_ratio"] == pytest.approx(0.25)
    assert numbers.loc["awq", "kl_ratio"] == pytest.approx((3.75**5 * (1e-4 / (1.05 * 0.02))) ** (1 / 6), rel=1e-3)
    assert numbers.loc["bayesq", "stored_beyond"] == pytest.approx(0.25)
    assert numbers.loc["awq", "blocks"] == 7 and numbers.loc["awq", "ratio_blocks"] == 6
    assert any("No interval: " in note and "labels of their examples differ" in note for note in table.footnotes)
    full = numbers.loc["gptq inputs=full"]
    assert math.isnan(full["mean_rank"]) and full["kl_ratio"] == pytest.approx(0.05 / (1.05 * 0.08))


def test_multiples_are_geometric_means_over_blocks_with_intervals(tmp_path: Path) -> None:
    for seed, (data, kl) in itertools.product((0, 1), (("digits", 0.1), ("cifar10", 0.4))):
        quick = (1.0, 0.0, 7.0, 0.0) if data == "digits" else (0.5, 0.0, 0.5, 0.0)
        add(tmp_path, "gptq", 3.0, seed, 20, 0.2, (1.0, 0.0, 1.0, 0.0), f"g{seed}{data}", dataset=data)
        add(tmp_path, "bayesq", 3.0, seed, 20, kl, quick, f"b{seed}{data}", dataset=data, memory=2**31)
        add(tmp_path, "bayesq", 3.0, seed, 20, kl / 10, quick, f"e{seed}{data}", dataset=data, codec="entropy")
    table = league_table(load_runs(tmp_path))
    numbers = table.numbers.set_index("setting")
    row = numbers.loc["bayesq"]
    assert row["kl_ratio"] == pytest.approx(1) and 0.5 < row["kl_ratio_low"] < 1 < row["kl_ratio_high"] < 2
    assert row["time x"] == pytest.approx(math.sqrt(4 * 0.5)) and row["memory x"] == pytest.approx(2)
    assert numbers.loc["bayesq codec=entropy", "kl_ratio"] == pytest.approx(0.1)
    bold = dict(zip(table.cells["setting"], table.bold["KL / GPTQ's"], strict=True))
    assert bold == {"BayesQ codec=entropy": True, "BayesQ": False, "GPTQ": False}
    assert not any("No interval" in note for note in table.footnotes)


def test_a_sentence_says_who_wins_where(folder: Path) -> None:
    runs = load_runs(folder)
    said = winners(league_of(runs), methods_of(runs))
    assert said.startswith("Lowest KL of all that ran: BayesQ on ")
    assert "AWQ on SST-2 (4 bits)" in said and "film reviews (3, 4 bits)" in said
    worst = 1.05 * 0.02 / 4 / 1e-4
    assert said.endswith(f"has 0.25 to {worst:.2f} times the KL of the best other method there.")
    assert "2 bits" not in said  # one setting alone wins nothing


def test_a_setting_that_lacks_a_seed_is_left_out(tmp_path: Path) -> None:
    for method, seed in itertools.product(("gptq", "bayesq", "awq"), (0, 1)):
        if (method, seed) != ("awq", 1):
            add_run(tmp_path, method=method, seed=seed)
    league = league_of(load_runs(tmp_path))
    assert sorted(league.kl) == ["bayesq", "gptq"] and league.left_out == 1


def test_budgets_and_calibration_sizes_are_not_mixed(tmp_path: Path) -> None:
    for method, examples in itertools.product(("gptq", "bayesq"), (64, 256)):
        add_run(tmp_path, method=method, examples=examples)
    assert len(league_of(load_runs(tmp_path)).kl) == 2


def test_few_blocks_are_refused_in_words(folder: Path) -> None:
    assert too_few(6, 2) == ""
    assert "ran together on 5 workloads x budgets; a critical difference needs at least 6" in too_few(5, 4)
    assert "fewer than two settings" in too_few(9, 1)
    league = league_of(load_runs(folder, ["bits=3"]))
    assert significance(league).startswith("No test of the mean ranks: ")
    assert "Friedman's test: p = 0.0" in significance(league_of(load_runs(folder)))


def test_the_figure_shows_mean_ranks_and_alike_settings(folder: Path) -> None:
    league = league_of(load_runs(folder))
    data = figure.data(league)
    drawn = figure.draw(data, looks(league.runs.assign(variant=league.runs["setting"])))
    (plot,) = drawn.axes
    assert [text.get_text() for text in plot.get_yticklabels()] == ["BayesQ", "GPTQ", "AWQ", "RTN"]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in plot.lines if len(line.get_xdata()) == 1}
    assert points == {(rank, row) for row, rank in enumerate(data["mean rank"])}
    bars = [tuple(line.get_xdata()) for line in plot.lines if line.get_linewidth() > 2]
    mean = data.set_index("variant")["mean rank"]
    groups = alike_groups(mean, critical_difference(4, 6))
    assert bars == [(mean[group].min(), mean[group].max()) for group in groups] and bars


def test_a_setting_without_any_kl_is_left_out(tmp_path):
    """A quantized network whose outputs overflow has no KL."""
    add(tmp_path, "rtn", 3.0, 0)
    folder = add(tmp_path, "gptq", 3.0, 0)
    write_json(folder / "result.json", {**read_result(folder / "result.json"), "q/kl_to_fp": float("nan")})
    league = league_of(load_runs(tmp_path))
    assert (list(league.kl), league.reference) == (["rtn"], None)
    assert league_table(load_runs(tmp_path)).cells["setting"].tolist() == ["RTN"]
