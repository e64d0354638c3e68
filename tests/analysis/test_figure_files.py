"""Widths of venues, error bars side by side, names of layers, the Pareto front, and figures.tex."""

import itertools
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from result_files import add_run

from analysis import load_runs, style, venues
from analysis.figure_files import save, width_of, write_figures_tex
from analysis.figures import bit_curve, main_figure, pareto
from analysis.figures.shared import dodged, layer_ticks, short_layers
from analysis.notebooks import render_all
from bayesq.suite.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Three methods, three budgets, two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("rtn", "gptq", "bayesq"):
        for bits in (3.0, 3.5, 4.0):
            for seed in (0, 1):
                add_run(folder, method=method, bits=bits, seed=seed)
    return load_runs(folder)


@pytest.mark.parametrize(
    ("venue", "columns", "inches"),
    [("neurips", None, 5.5), ("iclr", 2, 5.5), ("icml", None, 3.25), ("icml", 1, 3.25), ("icml", 2, 6.75)],
)
def test_saved_figures_have_the_venues_width(
    runs: pd.DataFrame, tmp_path: Path, venue: str, columns: int | None, inches: float
) -> None:
    widths = venues.widths(venue, columns)
    path = save(main_figure.draw(bit_curve.data(runs), style.looks(runs), widths), tmp_path, "f", "caption", dpi=100)
    assert width_of(path.with_suffix(".pdf")) == pytest.approx(inches, abs=0.01)
    with Image.open(path) as image:
        assert image.width / 100 == pytest.approx(inches, abs=0.011)


@pytest.mark.parametrize(("venue", "columns"), [("nips", None), ("icml", 3)])
def test_an_unknown_width_is_one_line(venue: str, columns: int | None) -> None:
    with pytest.raises(UserError, match=r"^(venue=nips: one of neurips, icml, iclr|columns=3: 1 .*)$"):
        venues.widths(venue, columns)


@pytest.mark.parametrize("key", ["bits", "bits/code"])
def test_error_bars_of_one_budget_are_side_by_side(runs: pd.DataFrame, key: str) -> None:
    data = bit_curve.data(runs)
    looks = style.looks(runs)
    figure = main_figure.draw(data, looks) if key == "bits" else bit_curve.draw(data, looks)
    axes = figure.axes[0 if key == "bits" else 1]  # KL
    bars = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    by_budget: dict[float, list[float]] = defaultdict(list)
    for bar in bars:
        for segment in bar.lines[2][0].get_segments():
            assert segment[0][0] == segment[1][0]
            by_budget[min((3.0, 3.5, 4.0), key=lambda bits: abs(bits - segment[0][0]))].append(segment[0][0])
    assert {bits: len(places) for bits, places in by_budget.items()} == {3.0: 3, 3.5: 3, 4.0: 3}
    for bits, places in by_budget.items():
        assert min(np.diff(sorted(places))) > 0.03
        assert max(abs(place - bits) for place in places) < 0.125  # nearer to this budget than to another
        assert np.mean(places) == pytest.approx(bits)


@pytest.mark.parametrize("count", [2, 4, 13])
def test_points_of_many_variants_are_apart_and_nearest_to_their_budget(count: int) -> None:
    places = np.array([2.5, 3.0, 3.5, 4.0])
    moved = np.stack([dodged(places, number, count, "bits") for number in range(count)])
    assert (np.diff(moved, axis=0) > 0.025).all()
    assert (abs(moved - places) < 0.2).all()


def test_a_figure_is_laid_out_once(runs: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib would lay it out again after each file."""
    layouts: list[Figure] = []
    execute = ConstrainedLayoutEngine.execute
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *args: layouts.append(args[1]) or execute(*args))
    figure = pareto.draw(pareto.data(runs), style.looks(runs))
    drawn = len(layouts)
    save(figure, tmp_path, "f", "caption", dpi=50)
    assert 1 <= drawn == len(layouts)


def test_stored_bits_are_not_moved(runs: pd.DataFrame) -> None:
    data = bit_curve.data(runs)
    figure = bit_curve.draw(data, style.looks(runs))
    lines = [line for line in figure.axes[4].lines if len(line.get_xdata()) == 3 and line.get_linestyle() != "None"]
    assert len(lines) == 3
    assert all(list(line.get_xdata()) == [3.25, 3.75, 4.25] for line in lines)


def test_labels_that_would_overlap_are_thinned() -> None:
    with style.style():
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        names = [f"encoder.layer.{i}.attention.self.query" for i in range(60)]
        layer_ticks(axes, names)
        style.lay_out(figure)
        labels = [text for text in axes.get_xticklabels() if text.get_text()]
        boxes = [text.get_window_extent() for text in labels]
    assert 5 < len(labels) < 60
    assert labels[0].get_text() == "0.attention.self.query"
    assert [text.get_text() for text in labels] == [
        short_layers(names)[round(place) - 1] for place in axes.get_xticks()
    ]
    assert not [1 for one, other in itertools.pairwise(boxes) if one.overlaps(other)]


def test_points_at_one_budget_stay_beside_it(tmp_path: Path) -> None:
    for method in ("rtn", "gptq", "bayesq"):
        add_run(tmp_path, method=method, bits=3.0, seed=0)
    runs = load_runs(tmp_path)
    (axes,) = main_figure.draw(bit_curve.data(runs), style.looks(runs)).axes
    assert axes.get_xlim() == (2.5, 3.5)
    assert {round(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1} == {3}


def test_layers_lose_what_they_share_but_stay_different() -> None:
    assert short_layers(["m.h.0.q", "m.h.1.q", "classifier"]) == ["0.q", "1.q", "classifier"]
    encoder = [f"encoder.layer.{i}.{part}" for i in range(2) for part in ("self.query", "output.dense")]
    bert = ["model.classifier", "model.bert.pooler.dense", *(f"model.bert.{name}" for name in encoder)]
    numbered = ["0.self.query", "0.output.dense", "1.self.query", "1.output.dense"]
    assert short_layers(bert) == ["classifier", "pooler.dense", *numbered]
    assert short_layers(numbered) == numbered
    stages = [f"layer{i}.0.conv{j}" for i in (1, 2) for j in (1, 2)]
    assert short_layers(["conv1", *stages, "fc"]) == ["conv1", *stages, "fc"]
    assert short_layers(["a.x.0", "a.x.1", "b.x.0", "b.x.1"]) == ["a.x.0", "a.x.1", "b.x.0", "b.x.1"]


def test_the_front_is_what_no_other_point_beats() -> None:
    points = pd.DataFrame({"bits/stored": [3.0, 3.1, 3.1, 3.6, 3.6, 4.0], "q/kl_to_fp": [0.5, 0.2, 0.3, 0.2, 0.1, 0.1]})
    assert pareto.front(points).tolist() == [True, True, False, False, True, False]
    nearly = pd.DataFrame({"bits/stored": [3.5572, 3.5574, 3.564], "q/kl_to_fp": [0.3, 0.2, 0.1]})
    assert pareto.front(nearly).tolist() == [False, True, True]  # .0002 bits are one size, .0066 are two


def test_the_front_of_every_workload_is_marked(runs: pd.DataFrame) -> None:
    data = pareto.data(runs)
    assert set(data[data["front"]]["variant"]) == {"bayesq"} and data["front"].sum() == 3
    figure = pareto.draw(data, style.looks(runs))
    rings = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in rings] == [[3.25, 3.75, 4.25]]


def test_figures_tex_includes_every_figure_with_its_caption(runs: pd.DataFrame, tmp_path: Path) -> None:
    folder = Path(runs["path"].iloc[0]).parent
    render_all(folder, tmp_path, ["main_figure", "pareto"], venue="icml", columns=2)
    (tmp_path / "main_figure.txt").write_text("50% of a_b & {c}\n")
    write_figures_tex(tmp_path)
    text = (tmp_path / "figures.tex").read_text()
    included = re.findall(r"\\includegraphics\{(.+?)\}", text)
    assert included == sorted(path.name for path in tmp_path.glob("*.pdf")) and len(included) == 3
    assert "\\caption{50\\% of a\\_b \\& \\{c\\}}" in text
    assert re.findall(r"\\label\{(.+?)\}", text) == ["fig:main_figure", "fig:main_figure_score", "fig:pareto"]
    assert text.count("\\begin{figure*}") == text.count("\\end{figure*}") == 3  # as wide as the text
    code = re.sub(r"\\[{}]", "", re.sub(r"(?m)^%.*$", "", text))
    assert code.count("{") == code.count("}")
    assert not re.search(r"(?<!\\)[%&#$_]", re.sub(r"\\(?:includegraphics|label)\{.+?\}|\$\\[a-z]+\$|\$-\$", "", code))
    if shutil.which("pdflatex"):
        head = "\\documentclass{article}\\usepackage{graphicx}\\begin{document}"
        (tmp_path / "document.tex").write_text(f"{head}\\input{{figures}}\\end{{document}}")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode == 0


def test_a_figure_that_is_gone_leaves_figures_tex(runs: pd.DataFrame, tmp_path: Path) -> None:
    save(main_figure.draw(bit_curve.data(runs), style.looks(runs)), tmp_path, "one", "A caption", dpi=50)
    write_figures_tex(tmp_path)
    assert "\\begin{figure}" in (tmp_path / "figures.tex").read_text()
    (tmp_path / "one.pdf").unlink()
    write_figures_tex(tmp_path)
    assert not (tmp_path / "figures.tex").exists()
