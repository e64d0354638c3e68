"""Figures from a results folder: the same bytes twice, the same look everywhere, gaps where runs are missing."""

import itertools
import re
import shutil
import statistics
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from result_files import add_run, paper

from analysis import captions, example_frame, gaps, layer_frame, load_runs, style, venues
from analysis.defaults import switches_nothing
from analysis.figure_files import save
from analysis.figures import ablation, allocation, bit_curve, cost, main_figure, pareto, rate_distortion, reliability
from analysis.figures.shared import main_runs
from analysis.methods import methods_of
from analysis.notebooks import NOTEBOOKS, render_all


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five workloads, four methods, three budgets."""
    folder = tmp_path_factory.mktemp("full")
    paper(folder, seeds=(0,))
    return folder


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """GPTQ and BayesQ at three budgets, GPTQ without the middle one."""
    folder = tmp_path / "results"
    for method in ("gptq", "bayesq"):
        for bits in (3.0, 3.5, 4.0):
            for seed in (0, 1, 2):
                if (method, bits) != ("gptq", 3.5):
                    add_run(folder, method=method, bits=bits, seed=seed)
    return folder


def rendered(source: Path, output: Path, *names: str) -> dict[str, bytes]:
    render_all(source, output, names or NOTEBOOKS)
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- data


def test_means_and_deviations_are_those_of_the_seeds(digits: Path) -> None:
    runs = load_runs(digits)
    data = bit_curve.data(runs).set_index(["variant", "bits"])
    losses = [
        run["q/kl_to_fp"] for run in runs.to_dict("records") if (run["method"], run["bits/target"]) == ("bayesq", 3)
    ]
    assert len(set(losses)) == 3
    assert data.loc[("bayesq", 3.0), "q/kl_to_fp"] == pytest.approx(statistics.fmean(losses))
    assert data.loc[("bayesq", 3.0), "q/kl_to_fp std"] == pytest.approx(statistics.stdev(losses))
    assert data.loc[("bayesq", 3.0), "n"] == 3


def test_a_missing_budget_breaks_the_line_and_is_named(digits: Path) -> None:
    runs = load_runs(digits)
    data = bit_curve.data(runs)
    drawn = main_figure.draw(data, style.looks(runs))
    lines = {
        tuple(line.get_xdata()): list(line.get_ydata())
        for line in drawn.axes[0].lines
        if line.get_color() == methods_of()["gptq"].color and len(line.get_xdata()) == 3
    }
    (values,) = lines.values()
    assert [value == value for value in values] == [True, False, True]
    (line,) = gaps.gaps(runs, source=digits)
    assert "gptq at 3.5 bits: no result with seed 0, 1, 2" in line
    assert f"python run.py -m model=resnet dataset=digits method=gptq bits=3.5 seed=0,1,2 results_dir={digits}" in line


def test_a_failed_run_is_named_with_its_reason(digits: Path) -> None:
    add_run(digits, method="gptq", bits=3.5, seed=0, failed="dataset.root=x: there is no such folder")
    (line,) = gaps.gaps(load_runs(digits), source=digits)
    assert "(seed 0 failed: dataset.root=x: there is no such folder)" in line


def test_overrides_of_a_variant_are_in_the_command_of_its_gap(tmp_path: Path) -> None:
    for bits in (3, 4):
        add_run(tmp_path, method="bayesq", bits=bits)
    add_run(tmp_path, method="gptq", bits=3, options=["sequential=false"])
    add_run(tmp_path, method="gptq", bits=3, seed=0)
    lines = gaps.gaps(load_runs(tmp_path), source="results")
    assert [line for line in lines if line.endswith("method=gptq method.sequential=false bits=4 seed=0`")]
    assert [line for line in lines if line.endswith("dataset=digits method=gptq bits=4 seed=0`")]


def test_settings_that_all_runs_of_a_method_share_are_in_the_caption(tmp_path: Path) -> None:
    add_run(tmp_path, method="gptq", bits=3, options=["sequential=false"])
    add_run(tmp_path, method="gptq", bits=4, options=["sequential=false"])
    add_run(tmp_path, method="bayesq", bits=3)
    assert captions.settings(load_runs(tmp_path)) == " Settings beyond the defaults: GPTQ inputs=full."


def test_points_with_another_n_are_named(digits: Path) -> None:
    runs = load_runs(digits)
    caption = captions.population(bit_curve.data(runs), runs)
    assert caption == "n = 3 seeds (GPTQ at 3.5 bits: none), 60 test examples"


def test_methods_that_read_no_calibration_data_are_named_once(tmp_path: Path) -> None:
    for bits in (3, 4):
        add_run(tmp_path, method="rtn", bits=bits)
        for seed in (0, 1):
            add_run(tmp_path, method="gptq", bits=bits, seed=seed)
    add_run(tmp_path, method="bayesq", bits=3)
    runs = load_runs(tmp_path)
    caption = captions.population(bit_curve.data(runs), runs)
    once = "BayesQ at 4 bits: none; BayesQ at 3 bits: 1; RTN: 1, no calibration data read"
    assert caption == f"n = 2 seeds ({once}), 60 test examples"


def test_a_setting_in_the_name_is_not_told_again(tmp_path: Path) -> None:
    for options in ([], ["sequential=false"]):
        add_run(tmp_path, method="gptq", bits=3, options=options)
    runs = load_runs(tmp_path)
    assert set(runs["variant"]) == {"gptq", "gptq inputs=full"}
    assert captions.settings(runs) == ""


def test_reliability_bins_have_the_share_and_accuracy_of_their_examples(digits: Path) -> None:
    examples = example_frame(load_runs(digits))
    data = reliability.data(examples)
    own = examples[(examples["variant"] == "bayesq") & (examples["bits"] == 4)]
    found = data[(data["variant"] == "bayesq") & (data["bits"] == 4)]
    assert found["share"].sum() == pytest.approx(1)
    assert (found["share"] * found["accuracy"]).sum() == pytest.approx(own["q_correct"].mean())
    assert (found["share"] * found["confidence"]).sum() == pytest.approx(own["q_confidence"].mean())
    # accuracies against a count by hand in one bin
    low, high = 9 / 15, 10 / 15
    inside = own[(own["q_confidence"] > low) & (own["q_confidence"] <= high)]
    row = found[(found["confidence"] > low) & (found["confidence"] <= high)]
    assert row["accuracy"].item() == pytest.approx(inside["q_correct"].mean())


def test_cost_is_a_multiple_of_the_median_gptq(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        add_run(tmp_path, method="gptq", seed=seed)
    add_run(tmp_path, method="bayesq")
    data = cost.data(load_runs(tmp_path)).set_index("method")
    assert data.loc["bayesq", "memory x"] == pytest.approx(2)
    assert data.loc["bayesq", "time x"] == pytest.approx(1)


def test_bits_above_the_bound_are_weighted_by_weights(tmp_path: Path) -> None:
    folder = add_run(tmp_path, method="bayesq", bits=4)
    (folder / "bounds.csv").write_text(
        "name,weights,bits/code,risk,bound_bits,shared_bound_bits\na,300,4,1,3,2\nb,100,8,1,4,5\n"
    )
    data = rate_distortion.data(rate_distortion.bounds_frame(load_runs(tmp_path)))
    assert data["coding"].item() == pytest.approx((300 * 1 + 100 * 4) / 400)
    assert data["above"].item() == pytest.approx((300 * 2 + 100 * 3) / 400)


def test_copies_and_runs_without_any_record_are_named(tmp_path: Path) -> None:
    run = add_run(tmp_path / "one", method="gptq", bits=3)
    shutil.copytree(run, tmp_path / "two" / run.name)
    (tmp_path / "two/lost").mkdir()
    (tmp_path / "two/lost/status.json").write_text('{"status": "failed", "error": "no record"}')
    runs = load_runs(tmp_path)
    lines = gaps.gaps(main_runs(runs)[0], source=tmp_path)
    assert len(lines) == 2
    assert lines[0].startswith(str(tmp_path / "two/lost"))
    assert "no record" in lines[0]
    assert "1 duplicate run was dropped" in lines[1]
    assert list(style.looks(runs)) == ["gptq"]


# --------------------------------------------------------------------------------------------------------------- files


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for method, bits in (("gptq", 3), ("bayesq", 3), ("bayesq", 4)):
        add_run(tmp_path / "results", method=method, bits=bits)
    first, second = (rendered(tmp_path / "results", tmp_path / name) for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert {name.rpartition(".")[2] for name in first} >= {"pdf", "png", "txt", "csv", "md"}
    assert [name for name in first if first[name] != second[name]] == []


def test_a_changed_result_changes_the_figure_and_its_data(digits: Path, tmp_path: Path) -> None:
    before = rendered(digits, tmp_path / "paper", "main_figure")
    add_run(digits, method="gptq", bits=4, seed=3, kl=0.5)
    after = rendered(digits, tmp_path / "paper", "main_figure")
    for name in ("main_figure.csv", "main_figure.png", "main_figure.pdf", "main_figure.txt"):
        assert after[name] != before[name], name


def test_the_readmes_figure_is_small_and_has_a_panel_for_each_workload(full: Path, tmp_path: Path) -> None:
    runs = load_runs(full)
    data = bit_curve.data(runs)
    drawn = main_figure.draw(data, style.looks(runs))
    assert len(drawn.axes) == 5
    assert {axes.get_yscale() for axes in drawn.axes} == {"log"}
    path = save(drawn, tmp_path, "main_figure", "caption", data, dpi=200)
    assert path.stat().st_size < 200 * 1024
    assert re.search(rb"/Subtype\s*/Type3", (tmp_path / "main_figure.pdf").read_bytes()) is None
    assert b"CreationDate" not in (tmp_path / "main_figure.pdf").read_bytes()


def test_a_single_run_renders(tmp_path: Path) -> None:
    add_run(tmp_path / "single", method="rtn")
    files = rendered(tmp_path / "single", tmp_path / "one")
    assert "main_figure.png" in files
    assert b"no run with allocator=knapsack among these" in files["pages/allocation.md"]
    assert b"Nothing to show: no finished run of a GLUE task" in files["pages/glue_table.md"]
    add_run(tmp_path / "single", dataset="cifar10", method="rtn", failed="out of memory")
    files = rendered(tmp_path / "single", tmp_path / "one")
    assert not [name for name in files if b"out of memory" in files[name]], "a workload without a result has no notes"


def test_a_figure_that_is_not_drawn_again_is_removed(digits: Path, tmp_path: Path) -> None:
    assert "allocation_resnet_digits.png" in rendered(digits, tmp_path / "paper", "allocation")
    add_run(tmp_path / "single", method="rtn")
    left = rendered(tmp_path / "single", tmp_path / "paper", "allocation")
    assert list(left) == ["pages/allocation.md"]


# -------------------------------------------------------------------------------------------------------------- layout


@pytest.fixture(
    scope="module", params=[(None, None), ("icml", 1), pytest.param(("neurips", None), marks=pytest.mark.slow)], ids=str
)
def drawn(full: Path, request: pytest.FixtureRequest) -> dict[str, Figure]:
    """One of every figure of the source, at several widths."""
    runs, at = load_runs(full), venues.widths(*request.param)
    looks = style.looks(runs)
    curve = bit_curve.data(runs)
    workload = curve["workload"].iloc[0]

    def own(data: pd.DataFrame) -> pd.DataFrame:
        return data[data["workload"] == workload]

    bounds = own(rate_distortion.bounds_frame(runs))
    widths = pd.DataFrame({"bits": 3.0, "seed": 0, "position": [0, 0, 1], "width": [2, 8, 3], "share": [0.5, 0.5, 1.0]})
    return {
        "main_figure": main_figure.draw(curve, looks, at),
        "main_figure_score": main_figure.draw(curve, looks, at, y=main_figure.SCORE),
        "pareto": pareto.draw(pareto.data(runs), looks, at),
        "bit_curve": bit_curve.draw(own(curve), looks, at),
        "allocation": allocation.draw(own(allocation.data(layer_frame(runs))), widths, looks["bayesq"], at),
        "cost": cost.draw(cost.data(runs), looks, at),
        "reliability": reliability.draw(own(reliability.data(example_frame(runs))), looks, at),
        "rate_distortion": rate_distortion.draw(
            rate_distortion.data(bounds), rate_distortion.layer_gaps(bounds), looks, at
        ),
    }


@pytest.mark.parametrize(("fastest", "ticks"), [(0.5, [0.5, 1, 2, 5]), (0.001, [0.001, 0.01, 0.1, 1])])
def test_ticks_of_multiples_have_room(fastest: float, ticks: list[float]) -> None:
    rows = [("gptq", 1.0), ("bayesq", 5.0), ("rtn", fastest)]
    data = pd.DataFrame(rows, columns=["variant", "time x"]).assign(**{"memory x": 1.0, "workload": "a / b"})
    data["method"] = data["variant"]
    drawn = cost.draw(data, style.looks(data))
    axes = drawn.axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == pytest.approx(ticks)


def texts_of(axes: Axes) -> list[Text]:
    """Title, labels and the tick labels within the view."""
    (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    ticks = [text for text in axes.get_xticklabels(which="both") if left <= text.get_position()[0] <= right]
    ticks += [text for text in axes.get_yticklabels(which="both") if bottom <= text.get_position()[1] <= top]
    return [text for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *ticks) if text.get_text()]


def is_tick(axes: Axes, text: Text) -> bool:
    return text.get_visible() and text not in (axes.title, axes.xaxis.label, axes.yaxis.label)


def test_nothing_is_cut_or_covered(drawn: dict[str, Figure]) -> None:
    widths = {*venues.DEFAULT_WIDTHS, *venues.VENUES["icml"], *venues.VENUES["neurips"]}
    for name, figure in drawn.items():
        assert figure.get_figwidth() in widths, name
        with style.style():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
            shown = [axes for axes in figure.axes if axes.get_visible()]
            covered = [axes.get_tightbbox(renderer) for axes in shown]
            legends = [legend.get_window_extent(renderer) for legend in figure.legends]
            texts = [text.get_window_extent(renderer) for axes in shown for text in texts_of(axes)]
            labels = [t.get_window_extent(renderer) for axes in shown for t in texts_of(axes) if is_tick(axes, t)]
        assert len(texts) > 4 * len(shown) - 2, name
        assert len(labels) > 2 * len(shown), name
        assert not [(a, b) for a, b in itertools.combinations(labels, 2) if a.overlaps(b)], name
        page = figure.bbox
        for box in [*legends, *texts]:
            across = page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1
            assert across and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, (name, box)
        assert legends, name
        assert not [legend for legend in legends for box in covered if legend.overlaps(box)], name
        assert not [axes for axes in shown if axes.get_legend() is not None]


def test_axes_name_their_units(drawn: dict[str, Figure]) -> None:
    units = ("nats", "%", "bits", "multiples", "share", "layer", "ECE", "confidence", "accuracy")
    for name, figure in drawn.items():
        labels = [label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel()) if label]
        assert labels
        assert all(any(unit in label for unit in units) for label in labels), (name, labels)


def test_full_runs_asked_for_again_without_the_ablation_stay_the_full_method(tmp_path: Path) -> None:
    """A finished run keeps the overrides of the last command that asked for it."""
    add_run(tmp_path, seed=0, kl=0.02, ablation="full")
    add_run(tmp_path, seed=1, kl=0.04)  # asked for again by another sweep
    add_run(tmp_path, seed=0, kl=0.06, ablation="codebook_lloyd")
    add_run(tmp_path, seed=0, kl=0.5, bits=4.0)  # a budget without ablations
    data = ablation.data(load_runs(tmp_path)).set_index("ablation")
    assert set(data["bits"]) == {3.0} and set(data.index) == {"full", "codebook_lloyd"}
    assert data.loc["full", "n"] == 2 and data.loc["full", "q/kl_to_fp"] == pytest.approx(0.03)
    assert data.loc["codebook_lloyd", "multiple"] == pytest.approx(2.0)


def test_an_ablation_to_what_is_the_default_is_the_full_method(tmp_path: Path) -> None:
    """`inputs_full` and the like exist for every value, so one of them has the run of `full`."""
    default = [name for name in ("inputs_full", "inputs_prefix", "inputs_paired") if switches_nothing(name)]
    assert len(default) == 1 and not switches_nothing("codebook_lloyd") and not switches_nothing("gptq")
    for name, kl, levels in ((default[0], 0.02, "trellis"), ("codebook_lloyd", 0.06, "lloyd")):
        run = add_run(tmp_path, kl=kl, ablation="full", options=[f"levels={levels}"], run_id=name)
        overrides = run / ".hydra/overrides.yaml"
        overrides.write_text(overrides.read_text().replace("ablation=full", f"ablation={name}"))
    data = ablation.data(load_runs(tmp_path)).set_index("ablation")
    assert set(data.index) == {"full", "codebook_lloyd"}
    assert data.loc["codebook_lloyd", "multiple"] == pytest.approx(3.0)
