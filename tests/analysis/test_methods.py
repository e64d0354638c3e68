"""Titles, colors and order of methods: from the suite's files, from a user's file, or none at all."""

import ast
import json
import re
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from frozen import add

import analysis
from analysis import captions, load_runs, methods, style
from analysis.comparisons import is_seedless
from analysis.figures import bit_curve, main_figure
from analysis.gaps import command, gaps, main_sweep
from analysis.loading import records
from analysis.methods import Method, methods_of
from analysis.tables.compact import compact_table
from analysis.tables.main import main_table
from bayesq.defaults import conf_dir
from bayesq.suite.errors import UserError

THEIRS = {"title": "SuperQuant", "color": "#123456", "marker": "v", "order": 25}


def legend_of(runs: pd.DataFrame) -> list[str]:
    figure = main_figure.draw(bit_curve.data(runs), style.looks(runs))
    return [text.get_text() for text in figure.legends[0].get_texts()]


def with_two_methods(results: Path, name: str, **changes: Any) -> pd.DataFrame:
    """GPTQ, BayesQ and a third method at two budgets."""
    for bits in (3.0, 4.0):
        for method in ("gptq", "bayesq"):
            add(results, method, bits, 0)
        add(results, name, bits, 0, correct=30, kl=0.1, **changes)
    return load_runs(results)


def test_a_color_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    runs = with_two_methods(tmp_path, "superquant", method__display=THEIRS | {"color": "blueish"})
    with pytest.raises(UserError, match=r"display\.color=blueish of method=superquant: needs a color of matplotlib"):
        methods_of(runs)


def test_every_file_of_the_suite_describes_its_method() -> None:
    found = methods_of()
    assert set(found) == {path.stem for path in (conf_dir() / "method").glob("*.yaml")}
    assert [found[name].title for name in ("rtn", "gptq", "awq", "bayesq")] == ["RTN", "GPTQ", "AWQ", "BayesQ"]
    assert sorted(found.values(), key=lambda method: method.order) == list(found.values())
    assert [method.name for method in found.values() if method.data_free] == ["rtn", "hqq"]
    for one, other in combinations(found.values(), 2):
        assert one.color != other.color and one.marker != other.marker and one.order != other.order


def test_a_users_file_is_read_from_what_its_runs_recorded(tmp_path: Path) -> None:
    runs = with_two_methods(tmp_path, "superquant", method__display=THEIRS)
    assert methods_of(runs)["superquant"] == Method("superquant", "SuperQuant", "#123456", "v", 25, False)
    assert legend_of(runs) == ["GPTQ", "SuperQuant", "BayesQ"]
    table = main_table(runs)
    assert table.cells["method"].tolist() == ["gptq", "superquant", "bayesq"] * 2
    assert table.numbers.set_index("variant").loc["superquant", "kl_ratio"].notna().all()
    compact = compact_table(table, runs)
    assert [head for head in compact.cells if head.startswith("KL")] == ["KL, GPTQ", "KL, SuperQuant", "KL, BayesQ"]
    assert compact.cells["KL, SuperQuant"].tolist() == [".1000", ".1000"]
    assert "Not shown" not in compact.caption


def test_a_method_that_nothing_describes_has_its_name_and_comes_last(tmp_path: Path) -> None:
    runs = with_two_methods(tmp_path, "mystery")
    own = methods_of(runs)["mystery"]
    assert own.title == "mystery" and own.color not in {method.color for method in methods_of().values()}
    assert own.marker not in {method.marker for method in methods_of().values()}
    assert legend_of(runs) == ["GPTQ", "BayesQ", "mystery"]
    assert main_table(runs).cells["method"].tolist() == ["gptq", "bayesq", "mystery"] * 2
    assert "KL, mystery" in compact_table(main_table(runs), runs).cells


def test_the_allocator_of_a_users_file_is_no_setting(tmp_path: Path) -> None:
    """Without it, only what differs from the user's own file is one."""
    for allocator in ("uniform", "knapsack"):
        of_file = {"method__allocator": "uniform", "method__inputs": "prefix", "inputs": "prefix"}
        add(tmp_path, "superquant", 3.0, 0, correct=30, kl=0.1, allocator=allocator, **of_file)
    add(tmp_path, "bayesq", 3.0, 0)
    runs = load_runs(tmp_path)
    assert set(runs["variant"]) == {"superquant", "superquant allocator=knapsack", "bayesq"}
    assert "uniform" not in captions.settings(runs) and "inputs" not in captions.settings(runs)


def forget(run: Path, *keys: str) -> None:
    """Take keys out of the recorded overrides of a run."""
    file = run / ".hydra/overrides.yaml"
    typed = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump([override for override in typed if override.partition("=")[0] not in keys]))


def test_what_a_users_method_has_without_an_override_is_its_default(tmp_path: Path) -> None:
    for clip in ("mse", "none"):
        run = add(tmp_path, "superquant", 3.0, 0, correct=30, kl=0.1, method__clip=clip)
        if clip == "mse":
            forget(run, "method.clip")
    assert set(load_runs(tmp_path)["variant"]) == {"superquant", "superquant clip=none"}
    edited = add(tmp_path, "superquant", 4.0, 0, correct=30, kl=0.1, method__clip="range")
    forget(edited, "method.clip")  # the file was edited: two values without an override
    variants = set(load_runs(tmp_path)["variant"])
    assert variants == {"superquant clip=mse", "superquant clip=none", "superquant clip=range"}


@pytest.mark.parametrize("recorded", [True, False])
def test_commands_for_a_users_method_name_its_folder(tmp_path: Path, recorded: bool) -> None:
    for method, seed in (("superquant", 0), ("gptq", 0), ("gptq", 1)):
        run = add(tmp_path, method, 3.0, seed, correct=30, kl=0.1)
        sources = [{"path": "/home/me/conf", "provider": "command-line"}, {"path": "/suite/conf", "provider": "main"}]
        if recorded and method == "superquant":
            node = {"hydra": {"runtime": {"config_sources": sources[::-1]}}}
            (run / ".hydra/hydra.yaml").write_text(yaml.safe_dump(node))
    (line,) = gaps(load_runs(tmp_path))
    folder = "/home/me/conf" if recorded else "DIR"
    assert f"`python run.py --config-dir {folder} model=resnet dataset=digits method=superquant" in line
    runs = load_runs(tmp_path)
    assert "--config-dir" not in command(records(runs[runs["method"] == "gptq"])[0], [4], [0], tmp_path)


def test_two_methods_that_nothing_describes_differ() -> None:
    found = methods_of(pd.DataFrame({"method": ["one", "other"]}))
    assert found["one"].color != found["other"].color and found["one"].marker != found["other"].marker


def test_a_method_has_a_row_where_only_another_workload_has_it(tmp_path: Path) -> None:
    with_two_methods(tmp_path, "mystery")
    add(tmp_path, "gptq", 3.0, 0, dataset="photos")
    table = main_table(load_runs(tmp_path))
    rows = table.cells[table.cells["workload"] == "resnet / photos"].set_index("method")
    assert rows.loc["mystery", "score"].tolist() == ["-", "-"]
    assert any("dataset=photos method=mystery bits=3,4" in note for note in table.footnotes)


def test_a_method_that_reads_no_data_is_the_same_under_every_seed(tmp_path: Path) -> None:
    runs = with_two_methods(tmp_path, "superquant", method__data_free=True, method__display=THEIRS)
    for method, bits in product(("gptq", "bayesq"), (3.0, 4.0)):
        add(tmp_path, method, bits, 1)
    assert {run["method"]: is_seedless(run) for run in records(runs)} == {
        "superquant": True,
        "gptq": False,
        "bayesq": False,
    }
    assert (
        "Plain superquant reads no calibration data: one run of it stands for every seed." in main_table(runs).caption
    )
    caption = captions.population(bit_curve.data(load_runs(tmp_path)), load_runs(tmp_path))
    assert "SuperQuant: 1, no calibration data read" in caption


def test_a_new_file_of_the_suite_is_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods are what is in conf/method: table, figure and the command for an empty folder."""
    (tmp_path / "conf/method").mkdir(parents=True)
    for path in (conf_dir() / "method").glob("*.yaml"):
        (tmp_path / "conf/method" / path.name).write_text(path.read_text())
    (tmp_path / "conf/method/superquant.yaml").write_text(f"name: superquant\ndisplay: {json.dumps(THEIRS)}\n")
    monkeypatch.setattr(methods, "conf_dir", lambda: tmp_path / "conf")
    methods._suite_blocks.cache_clear()
    try:
        runs = with_two_methods(tmp_path / "results", "superquant")
        assert legend_of(runs) == ["GPTQ", "SuperQuant", "BayesQ"]
        command = main_sweep()
    finally:
        monkeypatch.undo()
        methods._suite_blocks.cache_clear()
    order = {method.name: method.order for method in methods_of().values()} | {"superquant": THEIRS["order"]}
    assert f" method={','.join(sorted(order, key=lambda name: order[name]))} " in command


def test_the_display_of_a_method_does_not_tell_its_runs_apart(tmp_path: Path) -> None:
    """Runs from before the block was in the file, and after."""
    add(tmp_path, "gptq", 3.0, 0)
    add(tmp_path, "gptq", 3.0, 1, method__display=THEIRS)
    runs = load_runs(tmp_path)
    assert set(runs["variant"]) == {"gptq"}
    assert captions.settings(runs) == ""


def test_only_one_place_names_methods() -> None:
    """The proposed method and the reference are constants of analysis.paper; other methods are named nowhere."""
    named = re.compile(rf"^({'|'.join(methods_of())})$|\b(GPTQ|BayesQ|AWQ|RTN)\b|^method=\w")
    for path in Path(analysis.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                allowed = path.stem in ("paper", "__main__")  # the latter: what --help says
                assert allowed or not named.search(node.value), (path, node.value)
