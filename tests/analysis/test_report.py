"""The report: numbers of the table, the data and the HTML of the page, the W&B Report, and the command."""

import base64
import gzip
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frozen import add, add_main

from analysis.loading import load_runs
from analysis.report import wandb_report
from analysis.report.content import Content, content_of
from analysis.report.page import page, write_page
from analysis.statistics import mean_interval
from analysis.tables.main import main_table
from bayesq.suite import report as entry
from bayesq.suite.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "suite"))
from wandb_server import API_KEY, ENTITY, serving

ROOT = Path(__file__).parents[2]
# The 97.5 % quantiles of Student's t with 1 and 2 degrees of freedom, from a printed table.
T = {2: 12.706, 3: 4.303}
KLS = (0.05, 0.06, 0.1)
EXAMPLES = 40


class Reader(HTMLParser):
    """Rows of tables by the table's id, the texts of scripts by id, and every address in an attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: dict[str, str] = {}
        self.addresses: list[str] = []
        self._rows: list[list[str]] = []
        self._script: str | None = None
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "table":
            self._rows = self.tables[given.get("id") or "versions"] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True
        elif tag == "script":
            self._script = given.get("id") or "program"

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._in_cell:
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPTQ with three seeds at 3 bits, BayesQ with two, one of GPTQ at 4 bits, and a failed run."""
    folder = tmp_path_factory.mktemp("results")
    for seed, (correct, kl) in enumerate(zip((20, 30, 31), KLS, strict=True)):
        add(folder, "gptq", 3.0, seed, correct, kl)
    add(folder, "bayesq", 3.0, 0, 36, 0.01)
    add(folder, "bayesq", 3.0, 1, 38, 0.03)
    add(folder, "gptq", 4.0, 0, 39, 0.002)
    add(folder, "rtn", 3.0, 0, error="memory ran out <b>&")
    return folder


@pytest.fixture(scope="module")
def content(results: Path) -> Content:
    return content_of(results)


@pytest.fixture(scope="module")
def text(content: Content) -> str:
    return page(content)


def unpacked(packed: str) -> str:
    return gzip.decompress(base64.b64decode(packed)).decode()


@pytest.fixture(scope="module")
def data(text: str) -> dict[str, Any]:
    return json.loads(unpacked(Reader(text).scripts["data"]))


@pytest.mark.parametrize("n", [2, 3])
def test_the_interval_of_a_mean_is_students(n: int) -> None:
    values = np.array([0.3, 0.5, 1.3][:n])
    mean, std = float(values.mean()), float(np.sqrt(((values - values.mean()) ** 2).sum() / (n - 1)))
    half = T[n] * std / n**0.5
    assert mean_interval(mean, std, n) == pytest.approx((mean - half, mean + half), rel=1e-3)
    assert mean_interval(mean, std, n, (0.0, 1.5)) == (0.0, 1.5)
    assert np.isnan(mean_interval(1.0, float("nan"), 1)).all()


def test_the_table_has_mean_interval_and_n(content: Content) -> None:
    table = content.table.set_index(["variant", "bits"])
    row = table.loc[("gptq", 3.0)]
    scores, kls = 100 * np.array([20, 30, 31]) / EXAMPLES, np.array(KLS)
    assert row["n"] == 3
    assert (row["score"], row["kl"]) == pytest.approx((scores.mean(), kls.mean()))
    for name, values in (("score", scores), ("kl", kls)):
        half = T[3] * values.std(ddof=1) / 3**0.5
        assert row[f"{name}_low"] == pytest.approx(values.mean() - half, rel=1e-2)
        assert row[f"{name}_high"] == pytest.approx(min(values.mean() + half, 100), rel=1e-3)
    assert table.loc[("bayesq", 3.0), "kl_low"] == 0, "a KL is not negative"
    single = table.loc[("gptq", 4.0)]
    assert single["n"] == 1 and np.isnan([single["kl_low"], single["score_high"]]).all()


def test_the_page_shows_the_table(text: str) -> None:
    head, *rows = Reader(text).tables["rows"]
    assert head == ["workload", "bits", "method", "n", "score", "metric", "KL (nats)", "stored bits"]
    assert [row[:4] for row in rows] == [
        ["ResNet, digits", "3", "GPTQ", "3"],
        ["ResNet, digits", "4", "GPTQ", "1"],
        ["ResNet, digits", "3", "BayesQ", "2"],
    ]
    assert rows[0][4:8] == ["67.50 [29.72, 100.00]", "accuracy (%)", "0.07 [0.0043, 0.14]", "3.125"]
    assert rows[1][6] == "0.002"
    assert re.findall(r"best>([\d.]+)", text) == ["0.02"], "the lowest of several; at 4 bits there is one method only"


def test_paired_comparisons_are_those_of_the_main_table(results: Path, content: Content) -> None:
    assert content.paired is None
    both = content_of(results, paired=True)
    expected = main_table(load_runs(results))
    head, *rows = Reader(page(both)).tables["paired"]
    assert head == list(expected.cells)
    assert rows == expected.cells.to_numpy().tolist() and len(rows) > 2
    spec = wandb_report.spec(wandb_report.report(both, "bayesq", ""))
    assert [block["content"] for block in blocks(spec, "markdown-block")][1:] == [expected.markdown()]


def test_the_answer_names_the_lowest_kl(content: Content) -> None:
    assert content.answers == [
        "ResNet, digits: lowest mean KL (of the next method): 3 bits BayesQ 0.02 (GPTQ 0.07); 4 bits GPTQ 0.002."
    ]


def test_curves_and_layers_have_the_means(data: dict[str, Any]) -> None:
    point = next(row for row in data["table"] if (row["variant"], row["bits"]) == ("gptq", 3.0))
    assert point["kl_std"] == pytest.approx(np.std(KLS, ddof=1), rel=1e-5)
    assert data["workloads"]["resnet / digits"] == {"title": "ResNet, digits", "unit": "accuracy (%)", "fp": 100.0}
    group = next(group for group in data["layers"] if (group["variant"], group["bits"]) == ("bayesq", 3.0))
    assert [data["names"][place] for place in group["names"]] == ["stem"]
    assert group["values"] == {"bits/code": [3.0], "bits/stored": [3.125]}, "without the risk, which is empty"


def test_a_mean_of_layers_is_over_seeds(tmp_path: Path) -> None:
    for seed, risk in enumerate((0.1, 0.4)):
        folder = add(tmp_path, "bayesq", 3.0, seed)
        (folder / "layers.csv").write_text(f"name,bits/code,achieved_risk\nstem,{3 + seed},{risk}\nhead,2,\n")
    layers = content_of(tmp_path).layers
    assert layers["name"].tolist() == ["stem", "head"], "forward order"
    assert layers["achieved_risk"].tolist() == pytest.approx([0.25, np.nan], nan_ok=True)
    assert layers["bits/code"].tolist() == [3.5, 2.0]


def test_runs_without_layers_have_a_page(tmp_path: Path) -> None:
    (add(tmp_path, "bayesq", 3.0, 0) / "layers.csv").unlink()
    content = content_of(tmp_path)
    assert content.layers.empty and len(Reader(page(content)).tables["rows"]) == 2


def test_two_runs_can_be_compared(data: dict[str, Any], results: Path) -> None:
    runs = data["runs"]
    first, second = runs["first"]
    assert [name.split(" · ")[1:4] for name in (runs["names"][first], runs["names"][second])] == [
        ["bayesq", "3 bits", "seed 0"],
        ["gptq", "3 bits", "seed 0"],
    ]

    def cell(key: str, run: int) -> Any:
        column = runs["columns"][key]
        return column[run] if len(column) > 1 else column[0]

    assert (cell("results q/kl_to_fp", first), cell("results q/kl_to_fp", second)) == (0.01, 0.05)
    assert cell("config method.name", first) == "bayesq"
    assert cell("run path", first) == str(results / "resnet-digits-bayesq-3-0")
    assert set(runs["groups"]) == {"run", "results", "config"}
    assert all(len(column) in (1, len(runs["names"])) for column in runs["columns"].values())
    assert len(runs["columns"]["config model.name"]) == 1, "equal values are written once"


def test_commands_make_the_runs_again(text: str, content: Content, results: Path) -> None:
    commands = {variant: line for _, variant, line in content.commands if "bits=3 " in line}
    assert commands["gptq"].startswith("python run.py -m model=resnet dataset=digits method=gptq ")
    assert commands["gptq"].endswith(f"bits=3 seed=0,1,2 results_dir={results}")
    assert f"python -m bayesq.suite.report {results} --paired --html page.html" in text


def test_the_page_needs_no_network_and_has_no_markup_of_runs(text: str) -> None:
    reader = Reader(text)
    assert all(address.startswith("#") or address == "data:," for address in reader.addresses)
    program = reader.scripts["program"] + text[: text.index('id="data"')]
    assert not re.search(r"https?://|@import|url\(", program)
    assert "memory ran out &lt;b&gt;&amp;" in text and "<b>&" not in text
    assert unpacked(reader.scripts["plotly"]).lstrip().startswith("/**\n* plotly.js")


def test_filters_choose_runs(results: Path) -> None:
    chosen = content_of(results, ["method=bayesq"])
    assert set(chosen.table["variant"]) == {"bayesq"}
    assert "only method=bayesq" in page(chosen)


def test_a_mean_without_a_number_is_a_gap(tmp_path: Path) -> None:
    folder = add(tmp_path, "gptq", 3.0, 0)
    result = json.loads((folder / "result.json").read_text()) | {"q/kl_to_fp": None}
    (folder / "result.json").write_text(json.dumps(result))
    (row,) = Reader(page(content_of(tmp_path))).tables["rows"][1:]
    assert row[6] == "-"


def ran(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    entry.main()


def test_the_command_writes_the_page(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results.parent)
    target = tmp_path / "new" / "page.html"
    ran(monkeypatch, results.name, "bits=3", "--html", str(target))
    assert capsys.readouterr().out == f"written: {target}\n"
    assert len(Reader(target.read_text()).tables["rows"]) == 1 + 2
    (tmp_path / "results").symlink_to(results)
    monkeypatch.chdir(tmp_path)
    ran(monkeypatch, "bits=4", "--html", str(target))
    assert len(Reader(target.read_text()).tables["rows"]) == 1 + 1, "filters alone: the folder is results"


def test_errors_are_one_line(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ((str(results),), "nothing to write: give --html PAGE"),
        ((str(tmp_path), "--html", "p.html"), "no finished run in"),
        ((str(tmp_path / "none"), "--html", "p.html"), "no results folder"),
        ((str(results), "method=bayesk", "--html", "p.html"), "no finished run has method=bayesk"),
        ((str(results), "--html", str(tmp_path)), r"cannot be written \(Is a directory\): choose another file"),
        ((str(results), "--html", "/dev/null/p.html"), r"cannot be written \(\w.*\): choose another file"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}[^\n]*$"):
            ran(monkeypatch, *arguments)


def test_without_a_package_there_is_one_line(content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.report.page.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bayesq\[analysis\]'"):
        write_page(content, tmp_path / "page.html")
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: the report needs the folder analysis/"):
        entry.main()


# ---------------------------------------------------------------------------------------------------------------- W&B


def blocks(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [block for block in spec["blocks"] if block["type"] == kind]


def test_the_wandb_report_has_the_sections_and_the_table(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    ran(monkeypatch, str(results), "--dry-run", "--entity", "team")
    spec = json.loads(capsys.readouterr().out)
    assert [block["children"][0]["text"] for block in blocks(spec, "heading")] == [
        "Question", "Main table", "KL and score against bits", "Layers", "Compare runs", "Commands",
    ]  # fmt: skip
    (table,) = blocks(spec, "markdown-block")
    assert (
        "| ResNet, digits | 3 | GPTQ | 3 | accuracy | 67.50 [29.72, 100.00] | 0.07 [0.0043, 0.14] | 3.125 |"
        in (table["content"])
    )
    curves, layers, comparison = (block["metadata"] for block in blocks(spec, "panel-grid"))
    kinds = [[panel["viewType"] for panel in grid["panelBankSectionConfig"]["panels"]] for grid in (curves, layers)]
    assert kinds == [["Vega2", "Vega2", "Scatter Plot", "Scatter Plot", "Scatter Plot"], ["Run History Line Plot"] * 4]
    compared = [panel["viewType"] for panel in comparison["panelBankSectionConfig"]["panels"]]
    assert compared == ["Run Comparer", "Parallel Coordinates Plot"]
    assert {"section": "config", "name": "ablation.value"} in curves["runSets"][0]["grouping"]
    assert comparison["runSets"][0]["grouping"] == []
    maps, commands = blocks(spec, "code-block")
    assert "code bits per weight by layer" in json.dumps(maps)
    assert "method=gptq" in json.dumps(commands)


def test_the_wandb_report_maps_the_layers_on_a_logarithmic_scale(tmp_path: Path) -> None:
    text = "name,bits/code,relative_error\n"
    for method, rows in (("bayesq", "stem,2,0.1\nbody,4,1\nhead,8,10\n"), ("gptq", "stem,2,\nbody,2,\nhead,,\n")):
        (add(tmp_path, method, 3.0, 0) / "layers.csv").write_text(text + rows)
    bits, error = wandb_report.layer_maps(content_of(tmp_path)).split("\n\n")
    assert bits.splitlines()[0].endswith(": code bits per weight by layer, ▁ 2 to █ 8")
    assert bits.splitlines()[1:] == ["BayesQ, 3 bits  ▁▅█", "GPTQ, 3 bits    ▁▁·"]
    assert error.splitlines()[0].endswith(": relative weight error by layer, ▁ 0.1 to █ 10")
    assert error.splitlines()[1:] == ["BayesQ, 3 bits  ▁▅█"], "GPTQ has recorded none"


def test_a_report_of_two_metrics_shows_both(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    add(tmp_path, "gptq", 3.0, 0)
    add(tmp_path, "gptq", 3.0, 0, model="gpt", dataset="text", metrics={"perplexity": (20.0, 25.0)})
    content = content_of(tmp_path)
    assert content.table.set_index("metric")["score"].to_dict() == {"perplexity": 25.0, "accuracy": 65.0}
    spec = json.dumps(wandb_report.spec(wandb_report.report(content, "bayesq", "")))
    assert "summary:q/perplexity" in spec and "summary:q/accuracy" in spec


@pytest.mark.slow
def test_the_report_is_saved_as_it_was_built(results: Path, content: Content) -> None:
    pytest.importorskip("wandb_workspaces")

    def saved(**environment: str) -> "subprocess.CompletedProcess[str]":
        program = [sys.executable, "-m", "bayesq.suite.report", str(results), "--entity", ENTITY, "--project", "other"]
        known = os.environ | {"WANDB_API_KEY": API_KEY} | environment
        return subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=ROOT, env=known)

    with serving() as server:
        done = saved(WANDB_BASE_URL=server.url)
        server.broken = True
        refused = saved(WANDB_BASE_URL=server.url, WANDB_HTTP_TIMEOUT="1")
    assert re.fullmatch(rf"saved: {server.url}/{ENTITY}/other/reports/\S+\n", done.stdout), done.stderr
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"], view["type"]) == (ENTITY, "other", "runs")
    built = wandb_report.spec(wandb_report.report(content, "other", ENTITY))
    assert [block["type"] for block in view["spec"]["blocks"]] == [block["type"] for block in built["blocks"]]
    assert server.unknown == []
    assert refused.returncode == 1
    assert re.search(r"^error: W&B did not save the report \(.*\)$", refused.stderr, re.MULTILINE)


def test_the_main_sweep_has_a_row_for_each_method_and_budget(tmp_path: Path) -> None:
    add_main(tmp_path)
    content = content_of(tmp_path)
    assert len(content.table) == 12 and set(content.table["n"]) == {2}
    assert list(dict.fromkeys(content.table["variant"])) == [name for name in content.looks if " " not in name]
