"""How variants look: the same everywhere, told apart in grey, with legends that fit."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import style
from analysis.methods import label, methods_of
from analysis.venues import DEFAULT_WIDTHS, VENUES

GPTQ = style.look(methods_of()["gptq"])


def frame(*variants: str) -> pd.DataFrame:
    return pd.DataFrame({"method": [variant.partition(" ")[0] for variant in variants], "variant": variants})


def test_methods_differ_in_color_marker_and_line() -> None:
    for one, other in combinations(map(style.look, methods_of().values()), 2):
        assert one.color != other.color
        assert one.marker != other.marker
        assert one.line != other.line


def test_a_method_looks_the_same_whatever_else_a_source_has() -> None:
    many, few = style.looks(frame("bayesq", "awq", "gptq", "rtn")), style.looks(frame("gptq", "bayesq"))
    assert all(few[variant] == many[variant] for variant in few)
    assert list(many) == ["rtn", "gptq", "awq", "bayesq"]
    assert list(few) == ["gptq", "bayesq"]


def test_variants_keep_color_and_marker_but_not_filling_and_line() -> None:
    found = style.looks(frame("gptq clip=mse", "gptq", "gptq act_order=false"))
    assert list(found) == ["gptq", "gptq act_order=false", "gptq clip=mse"]
    assert found["gptq"] == GPTQ
    for variant in ("gptq clip=mse", "gptq act_order=false"):
        assert (found[variant].color, found[variant].marker) == (GPTQ.color, GPTQ.marker)
        assert found[variant].label == f"GPTQ {variant.partition(' ')[2]}"
        assert found[variant].variant
        assert found[variant].line != GPTQ.line
    assert found["gptq clip=mse"].line != found["gptq act_order=false"].line


def test_variants_of_a_method_differ_without_lines_and_color() -> None:
    drawn = set()
    for variant in range(6):
        figure, ((plot,),) = style.panels(1, 1, 1.0, 1.0)
        look = style.look(methods_of()["gptq"], variant).of_line()
        plot.plot(0, 0, **(look | {"linestyle": "none", "markersize": 20}))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn.add(np.asarray(canvas.buffer_rgba())[..., :3].mean(2).tobytes())
    assert len(drawn) == 6


@pytest.mark.parametrize(("entries", "lengths"), [(3, [3]), (5, [5]), (6, [3, 3]), (7, [4, 3]), (11, [4, 4, 3])])
def test_lines_of_a_legend_are_about_equally_long(entries: int, lengths: list[int]) -> None:
    figure, _ = style.panels(1, 1, DEFAULT_WIDTHS.text, 2.0)
    style.legend(figure, {f"m{i}": GPTQ for i in range(entries)})
    (found,) = figure.legends
    with style.style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        heights = [round(text.get_window_extent(canvas.get_renderer()).y0) for text in found.get_texts()]
    assert sorted(map(heights.count, set(heights)), reverse=True) == lengths


@pytest.mark.parametrize("count", range(2, len(methods_of()) + 1))
@pytest.mark.parametrize("width", sorted({*VENUES["icml"], *VENUES["iclr"]}))
def test_a_legend_of_many_methods_is_no_wider_than_its_figure(width: float, count: int) -> None:
    looks = {name: replace(GPTQ, label=label(name, methods_of())) for name in list(methods_of())[-count:]}
    with style.style():
        figure, _ = style.panels(1, 1, width, 2.0)
        style.legend(figure, looks)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("width", [DEFAULT_WIDTHS.column, DEFAULT_WIDTHS.text])
@pytest.mark.parametrize("further", [1, 4, 6])
def test_a_legend_is_no_wider_than_its_figure(width: float, further: int) -> None:
    settings = ["calibration.examples=64", "sequential=false", "clip=mse", "act_order=false", "damping=0.1", "x=1"]
    variants = ["bayesq", *(f"gptq {setting}" for setting in settings[:further])]
    with style.style():
        figure, _ = style.panels(1, 1, width, 2.0)
        style.legend(figure, {name: replace(GPTQ, label=label(name, methods_of())) for name in variants})
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
