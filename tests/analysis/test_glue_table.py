"""The table of GLUE: scores of tasks, their mean, the gain over the reference, and what is missing."""

from pathlib import Path

import pandas as pd
import pytest
from frozen import EXAMPLES, add, add_glue, add_main

from analysis import load_runs
from analysis.table import Table
from analysis.tables.glue import glue_table


def row_of(table: Table, method: str) -> pd.Series:
    return table.cells.set_index("method").loc[method]


def test_the_numbers_of_the_glue_table(tmp_path: Path) -> None:
    add_glue(tmp_path)
    add_main(tmp_path)  # digits are no task of GLUE
    table = glue_table(load_runs(tmp_path))
    gaps_of_tasks = [note for note in table.footnotes if "predictions" not in note]
    numbers = table.numbers.set_index("variant")
    columns = ["cola", "mrpc", "GLUE", "FP", "delta", "n"]
    # mrpc: the mean of accuracy and f1, which is 0.1 higher
    assert numbers.loc["gptq", columns].tolist() == pytest.approx([50.5, 55.5, 53, 90, -37, 2])
    assert numbers.loc["bayesq", columns].tolist() == pytest.approx([75.5, 80.5, 78, 90, -12, 2])
    assert numbers.loc["rtn", columns[1:]].tolist() == pytest.approx([30.5, 30.5, 90, -59.5, 2])
    assert numbers.loc["bayesq", "delta_gptq"] == pytest.approx(25)
    assert numbers.loc["rtn", "delta_gptq"] == pytest.approx(-25)  # on the task that both have
    assert row_of(table, "rtn")["cola"] == "-" and row_of(table, "rtn")["missing"] == "cola"
    assert numbers.loc["rtn", "missing"] == "cola, sst2, stsb, qqp, mnli, qnli, rte, wnli"
    of_rtn, of_all = gaps_of_tasks
    assert sum("no interval of Δ GPTQ (gptq), no seed for which both have" in note for note in table.footnotes) == 2
    assert "bert, rtn at 3 bits: no cola:" in of_rtn and "dataset.task=cola method=rtn bits=3 seed=0,1 " in of_rtn
    assert "dataset.task=sst2,stsb,qqp,mnli,qnli,rte,wnli method=rtn,gptq,bayesq bits=3 seed=0,1 " in of_all
    assert row_of(table, "bayesq")["paper's Δ"] == "+1.1"


def test_the_average_of_glue_has_an_interval_and_a_corrected_p_value(tmp_path: Path) -> None:
    """Of 40 examples BayesQ has 12 more right than GPTQ in one task and 4 in the other, AWQ as many as GPTQ."""
    options = {"model": "bert", "dataset": "glue", "dataset__tasks": ["text classification"]}
    for task, more in (("sst2", 12), ("qnli", 4)):
        own = {**options, "dataset__task": task, "model__checkpoint": f"models/{task}"}
        for method, correct in (("gptq", 26), ("bayesq", 26 + more), ("awq", 26)):
            for seed in (0, 1):
                add(tmp_path, method, 3.0, seed, correct, 0.1, name=f"{task}-{method}-{seed}", **own)
        add(tmp_path, "gptq", 3.0, 0, 39, 0.1, **own, calibration__examples=512)  # no baseline of the others
    table = glue_table(load_runs(tmp_path))
    numbers = table.numbers.set_index("variant")
    row = numbers.loc["bayesq"]
    assert row["delta_gptq"] == pytest.approx(100 * (12 + 4) / 2 / EXAMPLES)
    step = 100 / 2 / EXAMPLES  # one example of one task
    # the standard error of a share of examples that only one of the two has right
    error = 100 * sum(p * (1 - p) / EXAMPLES for p in (12 / EXAMPLES, 4 / EXAMPLES)) ** 0.5 / 2
    assert row["delta_gptq_low"] == pytest.approx(20 - 1.96 * error, abs=step)
    assert row["delta_gptq_high"] == pytest.approx(20 + 1.96 * error, abs=step)
    assert row["p_holm"] == pytest.approx(2 * row["p"]) and row["p"] < 0.001 and numbers.loc["awq", "p_holm"] == 1
    assert table.cells["method"][table.bold["Δ GPTQ"]].tolist() == ["bayesq"]
    assert "'model.checkpoint=models/${dataset.task}'" in table.footnotes[-1]
    (tmp_path / "sst2-awq-0/predictions.csv").unlink()
    assert glue_table(load_runs(tmp_path)).numbers.set_index("variant").loc["awq", "p"] == 1  # seed 1 is left
    (tmp_path / "sst2-awq-1/predictions.csv").unlink()
    row = row_of(glue_table(load_runs(tmp_path)), "awq")
    assert (row["Δ GPTQ"], row["p"]) == ("+0.00", "-")


def test_no_glue_is_an_error(tmp_path: Path) -> None:
    add_main(tmp_path)
    with pytest.raises(ValueError, match="no run of a GLUE task"):
        glue_table(load_runs(tmp_path))


def test_glue_on_other_examples_is_no_further_seed(tmp_path: Path) -> None:
    """Runs on 10 examples and on all of them are rows of their own, not one mean."""
    for limit, score in ((None, 0.8), (10, 0.2)):
        own = {"dataset__task": "cola", "dataset__limit": limit, "metrics": {"matthews": (0.9, score)}}
        for method in ("gptq", "bayesq"):
            add(tmp_path, method, 3.0, 0, model="bert", dataset="glue", **own)
    numbers = glue_table(load_runs(tmp_path)).numbers
    assert numbers[["model", "variant", "cola", "n"]].to_numpy().tolist() == [
        ["bert", "bayesq", 80.0, 1],
        ["bert", "gptq", 80.0, 1],
        ["bert dataset.limit=10", "bayesq", 20.0, 1],
        ["bert dataset.limit=10", "gptq", 20.0, 1],
    ]


def test_glue_says_which_seeds_an_interval_is_over_and_how_many_each_task_has(tmp_path: Path) -> None:
    for task, seeds in (("sst2", (0, 1)), ("qnli", (0, 1, 2))):
        for method in ("gptq", "bayesq"):
            for seed in seeds:
                add(tmp_path, method, 3.0, seed, model="bert", dataset="glue", dataset__task=task)
    assert not [note for note in glue_table(load_runs(tmp_path)).footnotes if "alone" in note]
    (lost,) = tmp_path.glob("*-bayesq-3-1*qnli*/predictions.csv")
    lost.unlink()
    table = glue_table(load_runs(tmp_path))
    assert set(table.cells["n"]) == {"2 to 3"}
    (note,) = [note for note in table.footnotes if "alone" in note]
    assert note == (
        "bert, bayesq at 3 bits: Δ GPTQ (gptq) is over seed 0, 2 of qnli alone, of which both have predictions."
    )
