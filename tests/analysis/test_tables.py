"""Contents of the tables on frozen results, how they are written, and what they say about what is missing."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from frozen import EXAMPLES, add, add_ablation, add_main
from scipy.stats import spearmanr

from analysis import load_runs
from analysis.comparisons import summarise
from analysis.gaps import gaps
from analysis.paper import short_names
from analysis.table import Table, write_table
from analysis.tables.ablation import ablation_table
from analysis.tables.compact import compact_table
from analysis.tables.cost import cost_table
from analysis.tables.main import main_table
from analysis.tables.overview import overview_table
from analysis.tables.risk import risk_table

MAIN = """\
bits,variant,n,score,std,kl,kl_std,delta,delta_low,delta_high,p,p_holm,kl_ratio,kl_ratio_low,kl_ratio_high,paper_delta
3.0,rtn,2,0.4875,0.0176777,0.42,0.0282843,-0.15,-0.2625,-0.05,0.015625,0.125,2,2,2,
3.0,gptq,2,0.6375,0.0176777,0.21,0.0141421,,,,,,,,,
3.0,awq,2,0.6125,0.0176777,0.315,0.0212132,-0.025,-0.075,0,0.5,1,1.5,1.5,1.5,
3.0,bayesq,2,0.9375,0.0176777,0.0525,0.00353553,0.3,0.1625,0.45,0.000244141,0.00219727,0.25,0.177506,0.358309,1.5
3.5,rtn,2,0.5875,0.0176777,0.21,0.0141421,-0.15,-0.275,-0.05,0.015625,0.125,2,2,2,
3.5,gptq,2,0.7375,0.0176777,0.105,0.00707107,,,,,,,,,
3.5,awq,2,0.7125,0.0176777,0.1575,0.0106066,-0.025,-0.075,0,0.5,1,1.5,1.5,1.5,
3.5,bayesq,2,0.8875,0.0176777,0.02625,0.00176777,0.15,0.05,0.2625,0.015625,0.125,0.25,0.177506,0.358309,0.7
4.0,rtn,2,0.7375,0.0176777,0.105,0.00707107,-0.075,-0.15,0,0.125,0.625,2,2,2,
4.0,gptq,2,0.8125,0.0176777,0.0525,0.00353553,,,,,,,,,
4.0,awq,2,0.8125,0.0176777,0.07875,0.0053033,0,0,0,1,1,1.5,1.5,1.5,
4.0,bayesq,2,0.8375,0.0176777,0.013125,0.000883883,0.025,0,0.075,0.5,1,0.25,0.177506,0.358309,0.3
"""
ABLATION = """\
bits,variant,n,score,std,kl,kl_std,delta,delta_low,delta_high,p,p_holm,kl_ratio,kl_ratio_low,kl_ratio_high
3.0,bayesq,2,0.9375,0.0176777,0.0525,0.00353553,,,,,,,,
3.0,bayesq allocator=uniform,2,0.85,0,0.08,0,-0.0875,-0.175,-0.0125,0.125,0.25,1.52381,1.45455,1.6
3.0,bayesq calibration.examples=16,2,0.5,0,0.5,0,-0.4375,-0.6,-0.275,7.62939e-06,3.05176e-05,9.52381,9.09091,10
3.0,bayesq distill=true,2,0.9375,0.0176777,0.04,0,0,0,0,1,1,0.761905,0.727273,0.8
3.0,gptq,2,0.6375,0.0176777,0.21,0.0141421,-0.3,-0.45,-0.1625,0.000244141,0.000732422,4,2.8401,5.73294
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    add_main(folder)
    add_ablation(folder)
    return folder


@pytest.fixture(scope="module")
def runs(results) -> pd.DataFrame:
    return load_runs(results)


def golden(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text))


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found[list(expected)].reset_index(drop=True), expected, check_dtype=False, rtol=1e-5)


def shown(table: Table, **where: str) -> dict[str, str]:
    """The one row of a table's cells with these values."""
    cells = table.cells
    for column, value in where.items():
        cells = cells[cells[column] == value]
    (row,) = cells.to_dict("records")
    return row


# --------------------------------------------------------------------------------------------------------- golden tests


def test_the_numbers_of_the_main_table(runs):
    table = main_table(runs)
    same(table.numbers, golden(MAIN))
    assert set(table.numbers["reference"]) == {"gptq"}
    assert shown(table, method="bayesq", bits="3") == {
        "workload": "resnet / digits",
        "bits": "3",
        "method": "bayesq",
        "n": "2",
        "score": "93.75 ± 1.77",
        "Δ GPTQ": "+30.00 [+16.25, +45.00]",
        "p": "0.002",
        "KL": "0.0525 ± 0.0035",
        "KL / GPTQ's": "0.25 [0.18, 0.36]",
        "bits stored": "3.125",
        "KL / strongest rival's": "0.25 [0.18, 0.36]",
        "KL / equal rival's": "-",
        "paper's Δ": "+1.5",
        "GPTQ": "gptq",
    }
    assert shown(table, method="gptq", bits="3")["GPTQ"] == "this row"
    assert "n = 2 calibration seeds" in table.caption and "resnet / digits 40" in table.caption
    assert "Holm-corrected over 9 tests" in table.caption


def test_the_main_table_by_hand(runs):
    """BayesQ at 3 bits has 38 and 37 of 40 right, GPTQ the first 26 and 25 of them."""
    row = main_table(runs).numbers.set_index(["variant", "bits"]).loc[("bayesq", 3.0)]
    assert row["delta"] == pytest.approx((38 - 26 + 37 - 25) / 2 / EXAMPLES)
    assert row["p"] == pytest.approx(2 * 0.5**13)  # 13 examples differ, all in one direction
    assert row["p_holm"] == pytest.approx(9 * 2 * 0.5**13)  # the smallest of 9
    assert row["kl_ratio"] == pytest.approx(0.05 / 0.2)


def add_rivals(folder: Path) -> None:
    """BayesQ with full inputs, some variants of GPTQ, GPTAQ as the strongest, and Qronos without one of the seeds."""
    for seed in (0, 1):
        add(folder, "bayesq", 3.0, seed, inputs="full", correction="none", rotate=False)
        add(folder, "gptq", 3.0, seed, inputs="prefix")
        add(folder, "gptq", 3.0, seed, 30, 0.15, inputs="full")
        add(folder, "gptq", 3.0, seed, 30, 0.125, inputs="full", allocator="knapsack")
        add(folder, "gptq", 3.0, seed, 30, 0.14, inputs="paired", allocator="knapsack")
        add(folder, "gptaq", 3.0, seed, 30, 0.1, inputs="paired", correction="moments")
    add(folder, "qronos", 3.0, 0, 30, 0.01, inputs="paired")  # a seed is missing


def test_the_strongest_rival_is_in_the_table(tmp_path):
    add_rivals(tmp_path)
    runs = load_runs(tmp_path)
    table = main_table(runs)
    row = table.numbers.set_index("variant").loc["bayesq"]
    assert (row["rival"], row["equal_rival"]) == ("gptaq", "gptq allocator=knapsack inputs=full")
    assert row["rival_ratio"] == pytest.approx(0.0525 / 0.1)
    assert row["equal_rival_ratio"] == pytest.approx(0.0525 / 0.125)
    assert row["rival_ratio_low"] < row["rival_ratio"] < row["rival_ratio_high"]
    assert {"gptaq", "gptq allocator=knapsack inputs=full"} < set(table.cells["method"])
    assert set(table.numbers[table.numbers["method"] != "bayesq"]["rival"].dropna()) == set()
    assert (
        "BayesQ, resnet / digits at 3 bits: strongest rival: GPTAQ (allocator=uniform, inputs=paired, "
        "correction=moments); equal rival: GPTQ (allocator=knapsack, inputs=full, correction=none); not run: "
        "GPTQ + knapsack, GPTQ + paired, GPTAQ + knapsack, Qronos + knapsack, AdaRound, BRECQ, LNQ, QTIP."
    ) in table.caption


def test_the_compact_table_has_a_column_for_each_allocator_of_a_rival(tmp_path):
    add_rivals(tmp_path)
    runs = load_runs(tmp_path)
    table = compact_table(main_table(runs), runs)
    row = shown(table, bits="3")
    heads = [head.removeprefix("KL, ") for head in row if head.startswith("KL")]
    assert heads == ["GPTQ", "GPTQ + knapsack", "GPTAQ", "Qronos", "BayesQ"]
    assert (row["KL, GPTQ"], row["KL, GPTQ + knapsack"]) == (".2100 ± .0141", ".1250 †")
    assert row["GPTQ"] == "75.00 (GPTQ + knapsack)", "the GPTQ that BayesQ is compared with"
    assert row["BayesQ / GPTQ"].startswith("0.42 [") and row["BayesQ / strongest rival"].startswith("0.53 [")
    assert table.bold["BayesQ / strongest rival"].all()
    assert "†: gptq allocator=knapsack inputs=full." in table.caption and "strongest rival: GPTAQ (" in table.caption


def test_bold_is_only_what_is_better_and_significant(runs):
    table = main_table(runs)
    marked = [
        (row.bits, row.method)
        for row, bold in zip(table.cells.itertuples(), table.bold.any(axis=1), strict=True)
        if bold
    ]
    assert marked == [("3", "bayesq")]  # at 3.5 bits the difference is significant until it is corrected
    assert table.bold.columns[table.bold.any()].tolist() == ["Δ GPTQ"]


def test_the_compact_table_is_the_main_one_in_short(runs):
    table = compact_table(main_table(runs), runs)
    assert shown(table, bits="3") == {
        "": "ResNet",
        "bits": "3",
        "KL, RTN": ".4200 ± .0283",
        "KL, GPTQ": ".2100 ± .0141",
        "KL, AWQ": ".3150 ± .0212",
        "KL, BayesQ": ".0525 ± .0035",
        "BayesQ / GPTQ": "0.25 [0.18, 0.36]",
        "accuracy: FP": "100.00",
        "GPTQ": "63.75",
        "BayesQ": "93.75",
        "BayesQ − GPTQ": "+30.00 [+16.25, +45.00]",
    }
    assert table.bold["BayesQ / GPTQ"].all()
    assert list(table.bold["BayesQ − GPTQ"]) == [True, False, False]


def test_readme_has_the_head_of_the_compact_table(tmp_path):
    """README's table is pasted from compact_table.md."""
    for seed in (0, 1):
        add(tmp_path, "gptq", 3.0, seed, 20, 0.4)
        add(tmp_path, "gptq", 3.0, seed, 20, 0.3, allocator="knapsack", inputs="paired", correction="moments")
        add(tmp_path, "bayesq", 3.0, seed)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    table = compact_table(main_table(load_runs(tmp_path)), load_runs(tmp_path)).markdown().splitlines()
    head = next(line for line in table if line.startswith("|  | bits |"))
    assert "KL, GPTQ + knapsack" in head
    assert readme[readme.index(head) + 1] == table[table.index(head) + 1]


def test_the_compact_table_marks_the_gptq_that_is_compared(tmp_path):
    for bits, plain, other in ((3.0, 0.2, 0.3), (4.0, 0.2, 0.1)):
        for seed in (0, 1):
            add(tmp_path, "gptq", bits, seed, 20, plain, inputs="prefix")
            add(tmp_path, "gptq", bits, seed, 30, other, inputs="full")
            add(tmp_path, "bayesq", bits, seed)
        add(tmp_path, "rtn", bits, 0)
    table = compact_table(main_table(load_runs(tmp_path)), load_runs(tmp_path))
    assert list(table.cells["KL, GPTQ"]) == [".2000", ".1000 †"]  # no spread: the seeds are alike
    assert list(table.cells["GPTQ"]) == ["50.00", "75.00"]
    assert "KL, AWQ" not in table.cells, "no run of it on any workload"
    assert "†: gptq inputs=full." in table.caption


def test_workloads_have_short_names_that_tell_them_apart():
    names = ["cifar_resnet56 / cifar10", "efficientnet_lite0 / imagenet", "minilm / movie_snippets"]
    pairs = ["minilm / glue sst2", "bert_base / glue sst2", "minilm / glue mrpc"]
    assert list(short_names(names).values()) == ["ResNet-56", "Lite0", "film reviews"]
    assert list(short_names(pairs).values()) == ["MiniLM-L6 SST-2", "BERT-base SST-2", "MRPC"]


def test_a_compact_table_without_bayesq_has_gaps(tmp_path):
    add(tmp_path, "gptq", 3.0, 0)
    row = shown(compact_table(main_table(load_runs(tmp_path)), load_runs(tmp_path)), bits="3")
    assert (row["KL, BayesQ"], row["BayesQ / GPTQ"], row["BayesQ − GPTQ"]) == ("not run", "-", "-")
    assert (row["KL, GPTQ"], row["GPTQ"], row["accuracy: FP"]) == (".2000", "65.00", "100.00")


def test_the_numbers_of_the_ablation_table(runs):
    table = ablation_table(runs)
    same(table.numbers, golden(ABLATION))
    marked = table.cells["variant"][table.bold.any(axis=1)]
    assert list(marked) == ["bayesq calibration.examples=16", "gptq"]
    assert "is below it) over distill=true (lower KL)." in table.caption, "the others raise the KL"
    assert "or is below it) over" not in ablation_table(runs[runs["variant"] != "bayesq distill=true"]).caption


def test_the_numbers_of_the_risk_table(tmp_path):
    """Six runs with full inputs, whose risk falls with their KL but for two of them; four with paired inputs."""
    kl = [0.10, 0.20, 0.30, 0.40, 0.50, 0.60]
    risk = [0.05, 0.08, 0.12, 0.20, 0.16, 0.24]
    for place, (loss, achieved) in enumerate(zip(kl, risk, strict=True)):
        bits, seed = (3.0, 4.0)[place % 2], place // 2
        result = add(tmp_path, "bayesq", bits, seed, 20, loss, inputs="full") / "result.json"
        explained = achieved / json.loads(result.read_text())["q/kl_to_fp"]
        result.write_text(json.dumps({**json.loads(result.read_text()), "risk/explained": explained}))
    for seed in range(4):
        result = add(tmp_path, "bayesq", 3.0, seed, 20, 0.05, inputs="paired") / "result.json"
        result.write_text(json.dumps({**json.loads(result.read_text()), "risk/explained": 1.0 + seed / 10}))
    add(tmp_path, "gptq", 3.0, 0)
    table = risk_table(load_runs(tmp_path))
    numbers = table.numbers.set_index(["runs", "bits"])
    cell = numbers.loc[("bayesq inputs=full", 3.0)]
    ratios = [0.05 / 0.10, 0.12 / 0.30, 0.16 / 0.50]
    assert cell["risk/explained"] == pytest.approx(np.mean(ratios))
    assert cell["risk/explained/std"] == pytest.approx(np.std(ratios, ddof=1))
    groups = table.numbers[table.numbers["bits"].isna()].set_index("runs")
    assert groups["n"].to_dict() == {"all runs": 10, "inputs=full": 6, "inputs=paired": 4}
    assert groups.loc["inputs=full", "rank_correlation"] == pytest.approx(spearmanr(kl, risk).statistic)
    together = spearmanr([*kl, *[0.05] * 4], [*risk, *(0.05 * (1 + seed / 10) for seed in range(4))])
    assert groups.loc["all runs", "rank_correlation"] == pytest.approx(together.statistic)
    assert shown(table, runs="inputs=paired")["rank correlation"] == "fewer than 5 runs"
    assert table.footnotes == ["1 finished run has no risk, as it read no posterior."]
    assert risk_table(load_runs(tmp_path, ["method=gptq"])).empty


def test_the_numbers_of_the_cost_table(tmp_path):
    for seed, calibrate in enumerate((1.0, 2.0, 9.0)):
        add(tmp_path, "gptq", 3.0, seed, 20, 0.5, (calibrate, 0.0, 2.0, 0.0), inputs="full")
        add(tmp_path, "gptq", 3.0, seed, 20, 0.5, (0.0, 0.0, 50.0, 0.0), inputs="prefix")
        add(tmp_path, "gptq", 3.0, seed, 20, 0.5, (0.0, 0.0, 0.5, 0.0), calibration__examples=16)  # smaller calibration
        add(tmp_path, "bayesq", 3.0, seed, 20, 0.5, (calibrate + 1, 1.0, 2.0, 4.0 * seed), memory=3 * 2**30)
    add(tmp_path, "gptq", 4.0, 0, 20, 0.5, (0.0, 0.0, 1.0, 1.0), distill=True)  # distilled: no baseline
    add(tmp_path, "bayesq", 4.0, 0, 20, 0.5)
    add(tmp_path, "gptq", 3.0, 0, 20, 0.5, (0.0, 0.0, 0.5, 0.0), dataset="other")  # another workload's
    table = cost_table(load_runs(tmp_path))
    numbers = table.numbers[table.numbers["workload"] == "resnet / digits"].set_index(["variant", "bits"])
    columns = ["calibrate", "posterior", "quantize", "distill", "quantize x", "total x", "memory x", "n"]
    assert numbers.loc[("bayesq", 3.0), columns].tolist() == pytest.approx([3, 1, 2, 4, 6 / 4, 10 / 4, 3, 3])
    assert numbers.loc[("gptq", 3.0), "total x"] == pytest.approx(50 / 4)
    assert math.isnan(numbers.loc[("bayesq", 4.0), "total x"])
    assert shown(table, method="bayesq", bits="4")["total ×"] == "-"
    (note,) = [note for note in table.footnotes if "4 bits" in note]
    assert "no GPTQ to compare with: `python run.py" in note and "method=gptq bits=4" in note


def test_the_overview_has_means_over_seeds(runs):
    table = overview_table(runs)
    row = shown(table, method="gptq")
    assert [row["3 bit"], row["4 bit"]] == ["63.75 / 0.2100 (n=2)", "81.25 / 0.0525 (n=2)"]
    assert shown(table, method="bayesq distill=true")["4 bit"] == "-"


def test_a_summary_has_means_and_spreads(runs):
    frame = summarise(runs).set_index(["variant", "bits"])
    gptq = frame.loc[("gptq", 3.5)]
    assert (gptq["n"], gptq["score"], gptq["score/std"]) == (2, 0.7375, pytest.approx(0.025 / math.sqrt(2)))
    assert gptq["q/kl_to_fp"] == pytest.approx(0.1 * 1.05)


# ----------------------------------------------------------------------------------------------- changes show, gaps too


@pytest.mark.parametrize("write", [main_table, ablation_table, cost_table, overview_table])
def test_a_changed_result_changes_the_table(tmp_path, write):
    add_main(tmp_path)
    add_ablation(tmp_path)
    before = write(load_runs(tmp_path))
    add(tmp_path / "later", "bayesq", 3.0, 0, 39, 0.02, (1.5, 0.0, 1.0, 0.0), name="resnet-digits-bayesq-3-0")
    after = write(load_runs(tmp_path))
    changed = (before.cells != after.cells).any(axis=1)
    assert changed.any()
    at_other_budgets = (before.cells["bits"] != "3") if "bits" in before.cells else before.cells["method"] != "bayesq"
    assert not changed[at_other_budgets].any()


def test_the_strongest_gptq_of_the_same_settings_is_what_counts(tmp_path):
    for seed in (0, 1):
        add(tmp_path, "bayesq", 3.0, seed)
        add(tmp_path, "bayesq", 3.0, seed, distill=True)
        add(tmp_path, "gptq", 3.0, seed, 20, 0.3, inputs="prefix")
        add(tmp_path, "gptq", 3.0, seed, 20, 0.2, inputs="full")
        add(tmp_path, "gptq", 3.0, seed, 20, 0.1, distill=True)
        add(tmp_path, "gptq", 3.0, seed, 20, 0.01, calibration__examples=512)
        for method in ("gptq", "bayesq"):  # so that the variants are in the table
            add(tmp_path, method, 4.0, seed, distill=True)
    numbers = main_table(load_runs(tmp_path)).numbers.set_index(["variant", "bits"])
    assert numbers.loc[("bayesq", 3.0), "reference"] == "gptq inputs=full"
    assert numbers.loc[("bayesq", 3.0), "kl_ratio"] == pytest.approx(0.0525 / 0.2)
    assert numbers.loc[("bayesq distill=true", 3.0), "reference"] == "gptq distill=true"


def test_no_gptq_is_the_strongest_by_lacking_a_bad_seed(tmp_path):
    for seed, kl in ((0, 0.1), (1, 0.5), (2, 0.001)):
        if seed < 2:
            add(tmp_path, "bayesq", 3.0, seed)
        add(tmp_path, "gptq", 3.0, seed, 20, kl, inputs="full")
    add(tmp_path, "gptq", 3.0, 0, 20, 0.11, inputs="prefix")
    for other, seeds in (("gptq inputs=full", ()), ("gptq", (1,))):
        for seed in seeds:  # with both seeds it has the lower mean, whatever the other's third seed
            add(tmp_path, "gptq", 3.0, seed, 20, 0.48, inputs="prefix")
        numbers = main_table(load_runs(tmp_path)).numbers.set_index(["variant", "bits"])
        assert numbers.loc[("bayesq", 3.0), "reference"] == other


def test_rounding_to_nearest_is_the_same_under_every_seed(tmp_path):
    add(tmp_path, "rtn", 3.0, 0)
    for seed in (0, 1, 2):
        for bits in (3.0, 3.5, 4.0):
            add(tmp_path, "gptq", bits, seed)
    table = main_table(load_runs(tmp_path))
    row = table.numbers.set_index(["variant", "bits"]).loc[("rtn", 3.0)]
    assert (row["n"], row["paired_seeds"]) == (1, 3)
    assert row["delta"] == pytest.approx((20 - (26 + 25 + 24) / 3) / EXAMPLES)
    notes = [note for note in table.footnotes if ", rtn at" in note]
    lines = [line for line in gaps(load_runs(tmp_path), (3.5, 4.0), tmp_path) if ", rtn at" in line]
    assert notes == lines  # the figures' lines
    (note,) = notes
    assert "rtn at 3.5, 4 bits: no result with seed 0: `python run.py" in note
    assert " method=rtn bits=3.5,4 seed=0 " in note


def test_failed_missing_and_duplicate_runs_are_told_and_nothing_is_made_up(tmp_path):
    add_main(tmp_path / "a")
    for method, bits, seed in (("gptq", 3.0, 1), ("awq", 4.0, 0), ("awq", 4.0, 1)):
        for file in (tmp_path / "a" / f"resnet-digits-{method}-{bits:g}-{seed}").glob("*.*"):
            if file.is_file():
                file.unlink()
    add(tmp_path / "b", "gptq", 3.0, 1, name="resnet-digits-gptq-3-1", error="memory ran | out")
    add(tmp_path / "b", "rtn", 3.0, 0, name="resnet-digits-rtn-3-0")  # a duplicate
    add(tmp_path / "b", "rtn", 3.0, 0, dataset="photos")
    half = add(tmp_path / "b", "rtn", 3.5, 0, dataset="photos")
    (half / "predictions.csv").unlink()
    (tmp_path / "b" / "bare").mkdir()
    (tmp_path / "b" / "bare" / "result.json").write_text("{")
    runs = load_runs(tmp_path)
    table = main_table(runs)
    assert set(shown(table, method="awq", bits="4", workload="resnet / digits").values()) == {
        "resnet / digits",
        "4",
        "awq",
        "-",
    }
    notes = table.footnotes
    awq = next(note for note in notes if note.startswith("resnet / digits, awq at 4 bits"))
    command = f"python run.py -m model=resnet dataset=digits method=awq bits=4 seed=0,1 results_dir={tmp_path}"
    assert "no result with seed 0, 1" in awq and f"`{command}`" in awq
    gptq = next(note for note in notes if note.startswith("resnet / digits, gptq at 3 bits"))
    assert "no result with seed 1 (seed 1 failed: memory ran | out)" in gptq and "method=gptq bits=3 seed=1 " in gptq
    assert shown(table, method="gptq", bits="3", workload="resnet / digits")["n"] == "1"
    photos = [note for note in notes if note.startswith("resnet / photos")]
    (bayesq,) = (note for note in photos if "bayesq" in note)
    assert "bayesq at 3, 3.5, 4 bits" in bayesq and "dataset=photos method=bayesq bits=3,3.5,4" in bayesq
    assert shown(table, workload="resnet / photos", method="gptq", bits="3")["score"] == "-"
    assert any(note.startswith(f"{tmp_path / 'b' / 'bare'}: missing") for note in notes)
    assert any("duplicate" in note and note.startswith("2 ") for note in notes)
    assert main_table(runs).numbers["paired_seeds"].max() == 2
    for write in (main_table, ablation_table, cost_table, overview_table):
        for text in (write(runs).markdown(), write(runs).latex("x")):
            assert "nan" not in text.replace(str(tmp_path), "")


def test_examples_that_cannot_be_read_leave_a_line(tmp_path, caplog):
    add_main(tmp_path)
    for seed in (0, 1):
        (tmp_path / f"resnet-digits-awq-3-{seed}" / "predictions.csv").unlink()
        wrong = tmp_path / f"resnet-digits-rtn-3-{seed}" / "predictions.csv"
        wrong.write_text(wrong.read_text().replace("0,0,1,1", "0,0,0,1", 1).replace("\n0,0,0,", "\n0,0,1,", 1))
    table = main_table(load_runs(tmp_path))
    for method in ("awq", "rtn"):
        row = shown(table, method=method, bits="3")
        assert row["score"] != "-" and row["Δ GPTQ"] == row["p"] == row["KL / GPTQ's"] == "-"
        assert any(note.startswith(f"resnet / digits, {method} at 3 bits: not compared") for note in table.footnotes)
    assert "does not give the accuracy of its result" in caplog.text


# --------------------------------------------------------------------------------------------------------------- files


def test_files_are_the_same_bytes_when_written_again(runs, tmp_path):
    for name in ("a", "b"):
        paths = write_table(main_table(runs), tmp_path / name, "main")
    assert [path.name for path in paths] == ["main.md", "main.csv", "main.tex"]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_numbers_are_written_unrounded(runs, tmp_path):
    write_table(ablation_table(runs), tmp_path, "ablation")
    numbers = pd.read_csv(tmp_path / "ablation.csv").set_index("variant")
    assert numbers.loc["bayesq distill=true", "std"] == pytest.approx(0.025 / math.sqrt(2), rel=1e-15)


def test_markdown_escapes_what_would_split_a_cell():
    cells = pd.DataFrame({"method": ["a|b"], "score": ["1"]})
    text = Table(cells, cells, cells == "1", "n = 1", ["why"]).markdown()
    assert "a\\|b" in text and "**1**" in text and text.endswith("\n\n* why\n")
    assert text.startswith("n = 1\n\n| method")
