"""Captions and footnotes: whose setting is whose, what has another n, what is not shown, and what was not compared."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from frozen import EXAMPLES, add, config, started

from analysis import captions, gaps, load_runs
from analysis.figures import bit_curve
from analysis.notebooks import NOTEBOOKS, render_all
from analysis.page import Page
from analysis.tables.ablation import ablation_table
from analysis.tables.compact import compact_table
from analysis.tables.main import main_table
from analysis.tables.overview import overview_table
from bayesq.files import lock
from bayesq.suite.errors import UserError


def changed(folder: Path, **values: Any) -> None:
    file = folder / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "predictions.csv")


def rendered(source: Path, output: Path, *names: str) -> dict[str, str]:
    """Text files by name."""
    render_all(source, output, names or NOTEBOOKS)
    files = [path for path in output.rglob("*") if path.suffix in (".md", ".txt", ".csv", ".tex")]
    return {str(path.relative_to(output)): path.read_text() for path in files}


def said(runs: pd.DataFrame, **options: Any) -> str:
    return captions.settings(runs, **options).removeprefix(" Settings beyond the defaults").removeprefix(": ")


# ------------------------------------------------------------------------------------------------------------ settings


def test_a_setting_stands_behind_the_workload_that_has_it(tmp_path: Path) -> None:
    for method in ("gptq", "bayesq"):
        small = {"calibration__examples": 64, "dataset__limit": 200}
        add(tmp_path, method, 3.0, 0, model="cifar_resnet20", dataset="cifar10", **small)
        add(tmp_path, method, 3.0, 0)
    runs = load_runs(tmp_path)
    expected = "cifar_resnet20 / cifar10: calibration.examples=64, dataset.limit=200."
    assert sorted(said(runs).partition(": ")[2].rstrip(".").split(", ")) == sorted(
        expected.partition(": ")[2].rstrip(".").split(", ")
    )
    assert said(runs).startswith("cifar_resnet20 / cifar10: ")
    for table in (main_table(runs), overview_table(runs)):
        assert captions.settings(runs) in table.caption
    assert " ResNet-20: " in compact_table(main_table(runs), runs).caption.partition("beyond the defaults")[2]


def test_a_setting_stands_behind_the_method_that_has_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        add(tmp_path, "gptq", 3.0, seed, inputs="full", correction="moments")
        add(tmp_path, "bayesq", 3.0, seed, inputs="full", correction="none")
    assert said(load_runs(tmp_path)) == "inputs=full, BayesQ correction=none, GPTQ correction=moments."


def test_what_a_name_says_is_not_said_again(tmp_path: Path) -> None:
    for sequential in (True, False):
        add(tmp_path, "gptq", 3.0, 0, method__sequential=sequential)
    for limit in (100, None):
        add(tmp_path, "gptq", 3.0, 0, dataset="cifar10", dataset__limit=limit)
    runs = load_runs(tmp_path)
    assert {"gptq inputs=full"} < set(runs["variant"])
    assert "resnet / cifar10 dataset.limit=100" in set(runs["workload"])
    assert captions.settings(runs) == ""


def test_one_setting_of_all_workloads_is_said_once_and_places_of_files_never(tmp_path: Path) -> None:
    for model, dataset in (("resnet", "digits"), ("cifar_resnet20", "cifar10")):
        own = {
            "dataset__root": f"/data/{dataset}",
            "model__checkpoint": f"{model}.th",
            "evaluation": {"autocast": None},
        }
        own |= {"model": model, "dataset": dataset, "calibration__examples": 32}
        add(tmp_path, "gptq", 3.0, 0, name=model, **own)
    assert said(load_runs(tmp_path)) == ", in all workloads: calibration.examples=32."


def test_a_figure_does_not_name_its_own_axis(tmp_path: Path) -> None:
    add(tmp_path, "gptq", 3.0, 0, calibration__examples=32, distill=True)
    runs = load_runs(tmp_path)
    assert said(runs, without=["calibration.examples"]) == "distill=true."


def test_settings_of_a_network_that_is_no_file_of_the_suite_are_those_typed(tmp_path: Path) -> None:
    add(tmp_path, "gptq", 3.0, 0, model="vit_tiny", model__image_size=64)
    assert said(load_runs(tmp_path)) == "model.image_size=64."


def test_every_caption_of_the_paper_has_them(tmp_path: Path) -> None:
    for bits in (3.0, 4.0):
        for method in ("gptq", "bayesq"):
            add(tmp_path / "results", method, bits, 0, distill=True)
    files = rendered(tmp_path / "results", tmp_path / "paper", "main_figure", "main_table", "bit_curve", "cost")
    texts = [name for name in files if name.endswith((".txt", ".md")) and "/" not in name]
    assert len(texts) == 7
    for name in texts:
        assert "Settings beyond the defaults: distill=true." in files[name], name


# ---------------------------------------------------------------------------------------------------------- population


def test_figures_of_several_workloads_have_the_examples_of_each(tmp_path: Path) -> None:
    for dataset, count in (("digits", EXAMPLES), ("cifar10", 10)):
        folder = add(tmp_path, "gptq", 3.0, 0, dataset=dataset)
        changed(folder, **{"evaluation/examples": count})
    runs = load_runs(tmp_path)
    caption = captions.population(bit_curve.data(runs), runs)
    assert caption == "n = 1 seed, 10 (ResNet CIFAR-10), 40 (ResNet digits) test examples"


def test_cells_of_fewer_seeds_are_named_where_there_is_no_column_for_n(tmp_path: Path) -> None:
    for bits in (3.0, 4.0):
        for seed in (0, 1, 2):
            add(tmp_path, "gptq", bits, seed)
            if seed or bits == 3.0:
                add(tmp_path, "bayesq", bits, seed)
        add(tmp_path, "rtn", bits, 0)
    runs = load_runs(tmp_path)
    assert "Cells of other than 3 seeds: ResNet, BayesQ at 4 bits 2." in compact_table(main_table(runs), runs).caption
    runs = load_runs(tmp_path, ["bits=3"])
    assert "Cells of other" not in compact_table(main_table(runs), runs).caption


# ------------------------------------------------------------------------------------------ workloads without a result


@pytest.fixture
def partly(tmp_path: Path) -> Path:
    """Digits with results; photos with failed and begun runs alone."""
    results = tmp_path / "results"
    for method in ("gptq", "bayesq"):
        for bits in (3.0, 4.0):
            add(results, method, bits, 0)
    add(results, "gptq", 3.0, 0, dataset="photos", error="memory ran out")
    add(results, "bayesq", 3.0, 0, dataset="photos", calibration__examples=64, error="no such file")
    started(results / "begun", ["bits=3"], config("rtn", 3.0, 0, "resnet", "photos"))
    started(results / "runs", ["bits=3"], config("awq", 3.0, 1, "resnet", "sketches"))
    return results


def test_a_workload_without_a_result_is_in_no_file(partly: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with lock(partly / "runs" / "result.json"):
        files = rendered(partly, tmp_path / "paper")
    assert not [name for name, text in files.items() if "photos" in text or "sketches" in text]
    assert not [name for name in files if "photos" in name]
    assert not [name for name, text in files.items() if "awq" in text.lower() and name.startswith("main")]
    line = "not shown, as no run of it is finished: resnet / photos; resnet / sketches\n"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("write", [overview_table, main_table, ablation_table])
def test_nor_in_a_table_on_the_terminal(partly: Path, write: Any) -> None:
    text = write(load_runs(partly)).markdown()
    assert "photos" not in text and "sketches" not in text
    assert not [line for line in gaps.gaps(load_runs(partly)) if "photos" in line or "sketches" in line]


def test_a_workload_whose_results_are_at_other_budgets_is_not_in_the_main_table(tmp_path: Path) -> None:
    for method in ("gptq", "bayesq"):
        add(tmp_path, method, 3.0, 0)
        add(tmp_path, method, 8.0, 0, 30, 0.1, dataset="photos")
    table = main_table(load_runs(tmp_path))
    assert set(table.cells["workload"]) == {"resnet / digits"} and "photos" not in table.markdown()


def test_a_run_that_is_running_is_no_command_to_start_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        add(tmp_path, "gptq", 3.0, seed)
    add(tmp_path, "bayesq", 3.0, 0)
    now = started_now = tmp_path / "now"
    started(started_now, ["bits=3"], config("bayesq", 3.0, 1, "resnet", "digits"))
    with lock(now / "result.json"):
        runs = load_runs(tmp_path)
    assert main_table(runs).footnotes[-1] == "resnet / digits, bayesq at 3 bits: seed 1 is still running."
    assert gaps.gaps(runs) == ["resnet / digits, bayesq at 3 bits: seed 1 is still running."]
    assert overview_table(runs).footnotes == ["resnet / digits, bayesq at 3 bits, seed 1, is still running."]


# ------------------------------------------------------------------------------------------------------- empty tables


def test_empty_tables_are_not_written_and_old_ones_are_removed(tmp_path: Path) -> None:
    results, paper = tmp_path / "results", tmp_path / "paper"
    for method in ("gptq", "bayesq"):
        add(results, method, 3.0, 0)
        add(results, method, 8.0, 0, 30, 0.1, dataset="photos")
    add(results, "bayesq", 3.0, 0, distill=True)
    own = {"dataset__task": "sst2"}
    add(results, "gptq", 3.0, 0, model="bert", dataset="glue", **own)
    tables = {"main_table", "compact_table", "ablation", "cost", "glue_table"}
    files = rendered(results, paper)
    assert tables <= {name.partition(".")[0] for name in files}
    (paper / "pages/ablation.md").unlink()  # whatever the page was like
    for where, gone in (
        (["dataset=photos"], {"main_table", "compact_table", "ablation", "glue_table"}),
        (["dataset=glue"], {"ablation"}),
    ):
        render_all(results, paper, where=where)
        left = {path.name.partition(".")[0] for path in paper.iterdir() if path.is_file()} & tables
        assert left == tables - gone, where
        page = (paper / "pages/ablation.md").read_text()
        assert "No run that this table shows." in page and "no variant of BayesQ among these runs" in page


def test_a_wrong_filter_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    add(tmp_path / "results", "gptq", 3.0, 0)
    before = rendered(tmp_path / "results", tmp_path / "paper", "main_table")
    with pytest.raises(UserError, match=r"^method=none: no finished run has"):
        render_all(tmp_path / "results", tmp_path / "paper", ["main_table"], ["method=none"])
    assert {path.name for path in (tmp_path / "paper").iterdir()} >= {Path(n).name for n in before if "/" not in n}


# -------------------------------------------------------------------------------------- intervals, and what has none


def two(results: Path, **options: Any) -> tuple[list[Path], list[Path]]:
    """GPTQ and BayesQ with seeds 0 and 1."""
    found = [[add(results, method, 3.0, seed, **options) for seed in (0, 1)] for method in ("gptq", "bayesq")]
    return found[0], found[1]


def row_of(results: Path, variant: str = "bayesq") -> tuple[pd.Series, list[str]]:
    table = main_table(load_runs(results))
    return table.numbers.set_index("variant").loc[variant], table.footnotes


def test_photos_that_share_a_name_keep_their_interval(tmp_path: Path) -> None:
    gptq, bayesq = two(tmp_path)
    expected, _ = row_of(tmp_path)
    for folder in (*gptq, *bayesq):
        table = predictions(folder)
        table.loc[1, "id"] = table.loc[0, "id"]
        table.to_csv(folder / "predictions.csv", index=False)
    found, notes = row_of(tmp_path)
    assert found["paired_examples"] == EXAMPLES and not notes
    assert found["delta_low"] == expected["delta_low"] and found["kl_ratio_high"] == expected["kl_ratio_high"]


def test_a_comparison_over_fewer_seeds_than_ran_says_so(tmp_path: Path) -> None:
    _, bayesq = two(tmp_path)
    (bayesq[1] / "predictions.csv").unlink()
    row, notes = row_of(tmp_path)
    assert (row["n"], row["paired_seeds"]) == (2, 1)
    assert notes == [
        "resnet / digits, bayesq at 3 bits: compared with gptq over seed 0 alone, of which both have predictions."
    ]


def test_a_comparison_over_fewer_examples_says_so(tmp_path: Path) -> None:
    gptq, _ = two(tmp_path)
    for folder in gptq:
        predictions(folder).iloc[:-4].to_csv(folder / "predictions.csv", index=False)
        kept = predictions(folder)
        score = float((kept["q_prediction"] == kept["label"]).mean())
        changed(folder, **{"q/accuracy": score})
    row, notes = row_of(tmp_path)
    assert row["paired_examples"] == EXAMPLES - 4
    assert notes[0].endswith("compared with gptq without 4 examples that not all of their runs have.")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("id", "their predictions are of other examples"),
        ("label", "the labels of their examples differ"),
        ("q_prediction", "predictions.csv does not give the accuracy of its result"),
    ],
)
def test_what_cannot_be_compared_says_why(tmp_path: Path, column: str, reason: str) -> None:
    gptq, _ = two(tmp_path)
    for folder in gptq:
        table = predictions(folder)
        table[column] = "x" + table[column] if column == "id" else 1 - table[column]
        if column == "label":
            table["q_prediction"] = 1 - table["q_prediction"]
        table.to_csv(folder / "predictions.csv", index=False)
    row, notes = row_of(tmp_path)
    assert pd.isna(row["delta"])
    (note,) = notes
    assert note.startswith("resnet / digits, bayesq at 3 bits: not compared with gptq, ") and reason in note


def test_an_interval_that_is_undefined_is_neither_made_up_nor_dropped_silently(tmp_path: Path) -> None:
    gptq, _ = two(tmp_path)
    for folder in gptq:
        table = predictions(folder)
        table["kl"] = 0.0
        table.loc[0, "kl"] = 1.0  # resamples without this example have a mean of 0
        table.to_csv(folder / "predictions.csv", index=False)
    table = main_table(load_runs(tmp_path))
    assert "nan" not in table.markdown()
    (note,) = table.footnotes
    assert note.endswith("compared with gptq no interval of the ratio of KL, which some resamples leave undefined.")


@pytest.mark.parametrize("key", ["q/accuracy", "q/kl_to_fp"])
def test_a_mean_with_a_result_that_is_no_number_is_left_out(tmp_path: Path, key: str) -> None:
    _, bayesq = two(tmp_path)
    changed(bayesq[1], **{key: None})
    runs = load_runs(tmp_path)
    table = main_table(runs)
    cell = table.cells.set_index("method").loc["bayesq", "KL" if "kl" in key else "score"]
    other = table.cells.set_index("method").loc["bayesq", "score" if "kl" in key else "KL"]
    assert cell == "-" and "±" in other
    assert any(f"bayesq at 3 bits, seed 1: its {key} is no number" in note for note in table.footnotes)
    assert "nan" not in overview_table(runs).markdown() + compact_table(table, runs).markdown()
    column = "q/kl_to_fp" if "kl" in key else "score"
    assert bit_curve.data(runs).set_index("variant").loc["bayesq", column] != pytest.approx(0)
    assert pd.isna(bit_curve.data(runs).set_index("variant").loc["bayesq", column])


def test_a_gptq_without_a_kl_is_not_the_strongest(tmp_path: Path) -> None:
    add(tmp_path, "bayesq", 3.0, 0)
    changed(add(tmp_path, "gptq", 3.0, 0, 20, 0.5, inputs="prefix"), **{"q/kl_to_fp": None})
    add(tmp_path, "gptq", 3.0, 0, 20, 0.3, inputs="full")
    row, _ = row_of(tmp_path)
    assert row["reference"] == "gptq inputs=full"


def test_a_page_knows_source_and_filters_of_its_runs(tmp_path: Path) -> None:
    for method in ("gptq", "rtn"):
        add(tmp_path / "results", method, 3.0, 0)
    where = ["method=rtn", "bits=3"]
    page = Page("main_table", load_runs(tmp_path / "results", where), tmp_path / "out")
    assert page.where == ("method=rtn", "bits=3") and set(page.runs["method"]) == {"rtn"}
    assert page.source == str(tmp_path / "results")
    assert "Only runs with method=rtn and bits=3." in page.path.read_text()


@pytest.mark.parametrize(
    ("workload", "title"),
    [
        ("cifar_resnet56 / cifar10", "ResNet-56 on CIFAR-10"),
        ("minilm / glue mrpc", "MiniLM-L6 on MRPC"),
        ("mine / my data", "mine on my data"),
        ("unknown", "unknown"),
    ],
)
def test_captions_have_titles(workload: str, title: str) -> None:
    assert captions.titled(workload) == title
