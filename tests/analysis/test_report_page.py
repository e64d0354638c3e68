"""The page of real runs in a real browser, and how fast and large a page of 1,000 runs is. Slow: run with -m slow."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, browse
from many_runs import BUDGETS, METHODS, vary

from analysis.loading import load_runs
from analysis.report.content import Content, content_of
from analysis.report.page import write_page

ROOT = Path(__file__).parents[2]
SECONDS, BYTES, RUNS = 10, 5_000_000, 1000

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real runs on digits, by BayesQ and GPTQ."""
    folder = tmp_path_factory.mktemp("digits")
    sweep = ("-m", "model=resnet", "dataset=digits", "method=bayesq,gptq", "bits=3", "wandb.mode=disabled")
    small = ("model.epochs=1", "calibration.examples=16", "dataset.limit=60")
    places = (f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}")
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *sweep, *small, *places],
        check=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return folder / "results"


@pytest.fixture(scope="module")
def many(real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content, float]:
    """The page of RUNS runs that were made of the real ones, its content, and the seconds that both took."""
    folder = tmp_path_factory.mktemp("many")
    vary([path.parent for path in sorted(real.glob("*/result.json"))], folder / "results", RUNS)
    started = time.process_time()  # seconds of this process, because other tests run beside it
    content = content_of(folder / "results")
    page = write_page(content, folder / "page.html")
    return page, content, time.process_time() - started


def test_a_page_of_1000_runs_is_written_fast_and_is_small(many: tuple[Path, Content, float]) -> None:
    page, content, seconds = many
    print(f"{seconds:.1f} s, {page.stat().st_size / 1e6:.2f} MB")
    assert len(content.runs) == RUNS and set(content.table["n"]) == {RUNS // len(METHODS) // len(BUDGETS)}
    assert seconds < SECONDS
    assert page.stat().st_size < BYTES


@needs_browser
def test_a_browser_reports_what_is_wrong(real: Path, tmp_path: Path) -> None:
    page = write_page(content_of(real), tmp_path / "page.html")
    page.write_text(page.read_text().replace("connect();", "connect(); unknown_name();"))
    seen, console = browse(page, "return texts('h1')", tmp_path / "browser")
    assert len(seen) == 1
    assert re.search("ReferenceError: unknown_name is not defined", "".join(console))


@needs_browser
def test_the_page_works_in_a_browser_without_network(real: Path, tmp_path: Path) -> None:
    page = write_page(content_of(real), tmp_path / "page.html")
    steps = """
        const drawn = (selector) => document.querySelectorAll(selector).length;
        const paper = () => getComputedStyle(document.body).backgroundColor;
        const column = (place) => texts(`#rows tbody tr:not([hidden]) td:nth-child(${place})`);
        const head = document.querySelectorAll("#rows th button")[6];
        const seen = {
            kl: drawn("#kl-chart .scatterlayer .trace"), score: drawn("#score-chart .scatterlayer .trace"),
            legend: texts("#kl-chart .legendtext"), layers: drawn("#layer-chart .heatmaplayer image"),
            fill: drawn("#kl-chart .point"), first: texts("#differences tbody td:first-child"),
            values: texts("#differences tbody tr:not(.group) td"), papers: [paper()], orders: [],
            heads: [...document.querySelectorAll("#differences th")].map((head) => getComputedStyle(head).textAlign),
            quantities: texts("#quantity option"), width: document.documentElement.scrollWidth - innerWidth,
        };
        for (let i = 0; i < 2; i++) { head.click(); seen.orders.push(column(7)); }
        document.getElementById("filter").value = "gptq 3";
        document.getElementById("filter").dispatchEvent(new Event("input"));
        seen.filtered = column(3);
        change("run-b", document.getElementById("run-a").value);
        seen.same = texts("#differences tbody td");
        seen.bits = document.getElementById("quantity").value;
        change("quantity", "achieved_risk");
        seen.color = texts("#layer-chart .cbtitle text, #layer-chart .infolayer .colorbar text").join(" ");
        document.getElementById("theme").click();
        seen.papers.push(paper());
        return seen;"""
    seen, console = browse(page, steps, tmp_path / "browser")
    assert console == []
    assert (seen["kl"], seen["score"], seen["layers"]) == (2, 3, 1), "a line per method, full precision, a heat map"
    assert seen["legend"] == ["GPTQ", "BayesQ"] and seen["fill"] == 2
    runs = load_runs(real).set_index("method")
    row = seen["values"][(place := seen["values"].index("q/kl_to_fp")) : place + 4]
    kls = [runs.loc[method, "q/kl_to_fp"] for method in ("bayesq", "gptq")]
    assert [float(text) for text in row[1:]] == pytest.approx([*kls, kls[1] - kls[0]], rel=1e-4)
    assert "method.name" in seen["first"] and "seed" not in seen["first"]
    assert seen["heads"] == ["left", "right", "right", "right"], "as the values below them"
    assert seen["same"] == ["no difference"]
    smallest_first = [f"{kl:.3g}" for kl in sorted(kls)]
    assert seen["orders"] == [smallest_first, smallest_first[::-1]]
    assert seen["filtered"] == ["GPTQ"]
    assert seen["bits"] == "bits/code", "GPTQ has no risk here, so the heat map begins with what both have"
    assert "log10 achieved risk (nats)" in seen["color"]
    assert "achieved risk (nats)" in seen["quantities"]
    assert seen["papers"][0] != seen["papers"][1]


@needs_browser
def test_charts_of_many_variants_keep_their_height_and_no_text_covers_another(real: Path, tmp_path: Path) -> None:
    vary([path.parent for path in real.glob("*/result.json")][:1], tmp_path / "results", 21)
    for number, path in enumerate(sorted((tmp_path / "results").glob("*/result.json"))):
        result = json.loads(path.read_text())
        result |= {"method": "bayesq", "seed": 0, "bits/target": 3.0}
        result["config"] |= {"bits": 3, "seed": 0, "a_setting_with_a_long_name": number}
        result["config"]["method"]["name"] = "bayesq"
        path.write_text(json.dumps(result))
    page = write_page(content_of(tmp_path / "results"), tmp_path / "page.html")
    steps = """
        const box = (selector) => document.querySelector(selector).getBoundingClientRect();
        const of = (id) => ({
            plot: box(`#${id} .nsewdrag`).height, legend: texts(`#${id} .legendtext`).length,
            title: box(`#${id} .xtitle`).bottom, top: box(`#${id} .legend .bg`).top,
            bottom: box(`#${id} .legend .bg`).bottom, end: box(`#${id}`).bottom,
            last: [...document.querySelectorAll(`#${id} .legendtext`)].at(-1).getBoundingClientRect().bottom,
            dashes: new Set(document.getElementById(id).data.map((trace) => trace.line.dash)).size,
        });
        return ["kl-chart", "score-chart"].map(of);"""
    seen, console = browse(page, steps, tmp_path / "browser", height=4000)
    assert console == []
    for chart, entries in zip(seen, (21, 22), strict=True):
        assert chart["legend"] == entries and chart["dashes"] >= 4
        assert chart["plot"] > 180, "the legend leaves the plot its height"
        assert chart["title"] <= chart["top"] and chart["last"] <= chart["bottom"] <= chart["end"] + 1


@needs_browser
def test_a_page_of_1000_runs_opens_on_a_narrow_screen(many: tuple[Path, Content, float], tmp_path: Path) -> None:
    page, content, _ = many
    steps = """
        change("run-b", "999");
        return {
            runs: texts("#run-a option").length, rows: texts("#rows tbody tr").length,
            lines: document.querySelectorAll("#kl-chart .scatterlayer .trace").length,
            bars: document.querySelectorAll("#kl-chart path.yerror").length,
            cells: texts("#layer-chart .ytick text").length, different: texts("#differences tbody tr").length,
            width: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
        };"""
    seen, console = browse(page, steps, tmp_path / "browser", width=500, height=900)
    assert console == []
    points = len(METHODS) * len(BUDGETS)
    assert (seen["runs"], seen["rows"], seen["lines"], seen["bars"]) == (RUNS, points, len(METHODS), points)
    assert seen["cells"] == len(METHODS) and seen["different"] > 5
    assert seen["width"] <= seen["room"], "nothing is wider than the screen"
    assert content.table["kl_low"].notna().all()
