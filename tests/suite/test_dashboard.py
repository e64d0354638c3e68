"""The dashboard: built offline, every key it names logged by a real run, saved to a stub server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import load_results
from wandb_server import API_KEY, ENTITY, serving

from bayesq.suite import dashboard, plots, tracking, wandb_history, wandb_names, wandb_panels
from bayesq.suite.results import PROVENANCE

ROOT = Path(__file__).parents[2]

pytest.importorskip("wandb_workspaces")


def panels(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel of a stored workspace."""
    for section in definition["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


def nested(content: Any) -> Iterator[Any]:
    """`content` and all that is in it."""
    yield content
    if isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from nested(item)


def named_keys(definition: dict[str, Any]) -> dict[str, set[str]]:
    """The keys that a stored workspace reads: of the summary, of the config, of tables, and of the history."""
    found: dict[str, set[str]] = {"summary": set(), "config": set(), "table": set(), "history": set(), "step": set()}

    def read(text: str) -> None:
        if match := re.fullmatch(r"config[.:](.+)\.value", text):
            found["config"].add(match[1])
        elif match := re.fullmatch(r"(?:summary|summary_metrics)[.:](.+)", text):
            found["summary"].add(match[1])
        else:
            found["summary"].add(text)

    for panel in panels(definition):
        config = panel["config"]
        if panel["viewType"] == "Scatter Plot":
            read(config["xAxis"])
            read(config["yAxis"])
        elif panel["viewType"] == "Bar Chart":
            for key in config["metrics"]:
                read(key)
            found["config"].add(config["groupBy"].removesuffix(".value"))
        elif panel["viewType"] == "Parallel Coordinates Plot":
            for column in config["columns"]:
                read(column["accessor"])
        elif panel["viewType"] == "Run Comparer":
            assert config["diffOnly"] == "split"
        elif panel["viewType"] == "Run History Line Plot":
            assert {key.partition("/")[0] for key in config["metrics"]} == {config["xAxis"].partition("/")[0]}
            found["step"].add(config["xAxis"])
            found["history"] |= set(config["metrics"])
        elif panel["viewType"] == "Vega2":
            for item in nested(config["userQuery"]):
                if isinstance(item, dict) and item.get("name") == "keys":
                    found["summary"] |= set(item["value"])
                    assert set(config["fieldSettings"].values()) <= set(item["value"])
                if isinstance(item, dict) and item.get("name") == "tableKey":
                    found["table"].add(item["value"])
        else:
            assert panel["viewType"] == "Weave"
            found["table"] |= {
                item["val"] for item in nested(config) if isinstance(item, dict) and item.get("nodeType") == "const"
            }
    (runs,) = definition["section"]["runSets"]
    for key in runs["grouping"]:
        assert key["section"] == "config"
        found["config"].add(key["name"].removesuffix(".value"))
    for column in runs["runFeed"]["columnPinned"]:
        section, _, key = column.partition(":")
        if section != "run":
            found[section].add(key.removesuffix(".value"))
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a real run on digits, and what the client's own inspector reads in its record."""
    folder = tmp_path_factory.mktemp("digits")
    overrides = ("model=resnet", "dataset=digits", "method=bayesq", "bits=3", f"results_dir={folder}")
    small = ("model.epochs=1", "calibration.examples=16", "dataset.limit=60", f"cache_dir={folder / 'cache'}")
    small += ("distill=true",)
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *overrides, *small],
        check=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    (result,) = load_results(folder)
    (record,) = (folder / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [wandb, "leet", "inspect", "--summary", "--json", record], check=True, capture_output=True, timeout=60
    )
    return result, json.loads(done.stdout)


@pytest.mark.slow
def test_every_key_of_a_panel_is_one_that_a_run_logs(logged: tuple[dict[str, Any], dict[str, Any]]) -> None:
    result, read = logged
    named = named_keys(dashboard.definition(dashboard.workspace("bayesq", "team")))
    assert named["summary"] <= set(result)
    assert named["summary"] <= set(read["summary"])
    assert named["config"] == {*wandb_panels.GROUPS, "seed"}
    assert named["step"] == {"layer/index", "statistics/batch", "distillation/evaluation"}
    assert named["history"] == {
        *(f"layer/{column}" for column in ("bits/code", "achieved_risk", "relative_error", "seconds")),
        *("statistics/examples", "distillation/training_kl", "distillation/heldout_kl"),
    }
    assert named["history"] <= set(read["summary"]), "the range of each"
    assert named["config"] <= set(read["config"])
    assert named["table"] == {tracking.LAYERS_KEY, *(chart.table_key for chart in plots.CHARTS)}
    assert named["table"] <= set(read["summary"])


@pytest.mark.slow
def test_a_real_run_is_tracked_whole(logged: tuple[dict[str, Any], dict[str, Any]]) -> None:
    result, read = logged
    assert result["wandb/error"] is None
    config = read["config"]
    assert {f"host/{key}" for key in result["host"]} <= set(config)
    assert {key: config[f"versions/{key}"] for key in result["versions"]} == result["versions"]
    assert config["git/commit"] == result["git"]["commit"]
    tables = {tracking.LAYERS_KEY, *(chart.table_key for chart in plots.CHARTS)}
    own = {key: value for key, value in read["summary"].items() if not key.startswith(("_", *wandb_history.HISTORY))}
    assert {key: value for key, value in own.items() if key not in tables} == {
        key: value for key, value in result.items() if value is not None and key not in PROVENANCE
    }


def test_it_shows_what_it_is_for() -> None:
    definition = dashboard.definition(dashboard.workspace("bayesq", "team"))
    named = named_keys(definition)
    assert {"q/accuracy", "q/kl_to_fp", "bits/stored", "bits/target", "method"} <= named["summary"]
    assert set(dashboard.PREPARATION) <= named["summary"]
    lines = [
        panel["config"]["fieldSettings"]
        for panel in panels(definition)
        if panel["viewType"] == "Vega2" and panel["config"]["panelDefId"] == "wandb/line/v0"
    ]
    assert lines == [
        {"x": "bits/target", "y": "q/accuracy", "stroke": "method"},
        {"x": "bits/target", "y": "q/kl_to_fp", "stroke": "method"},
    ]
    scatter = {
        (panel["config"]["xAxis"], panel["config"]["yAxis"])
        for panel in panels(definition)
        if panel["viewType"] == "Scatter Plot"
    }
    assert ("summary:bits/stored", "summary:q/accuracy") in scatter
    (runs,) = definition["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == [f"{key}.value" for key in wandb_panels.GROUPS]
    assert {"ablation", "inputs", "allocator"} < set(wandb_panels.GROUPS), "variants of a method stay apart"
    assert definition["section"]["settings"]["maxRuns"] > 100
    assert {"Parallel Coordinates Plot", "Run Comparer"} < {panel["viewType"] for panel in panels(definition)}


def test_the_charts_are_those_that_a_run_logs() -> None:
    shown = {}
    for panel in panels(dashboard.definition(dashboard.workspace("bayesq", "team"))):
        for item in nested(panel["config"].get("userQuery")):
            if isinstance(item, dict) and item.get("name") == "tableKey":
                shown[item["value"]] = panel["config"]
    for chart in plots.CHARTS:
        config = shown[chart.table_key]
        assert (config["panelDefId"], config["fieldSettings"]) == (chart.preset, dict(chart.fields))
        assert config["stringSettings"] == chart.texts


def test_metric_and_group_are_choices() -> None:
    definition = dashboard.definition(dashboard.workspace("bayesq", "team", "matthews", "minilm-glue"))
    named = named_keys(definition)["summary"]
    assert {"q/matthews", "delta/matthews"} <= named
    assert not any("accuracy" in key for key in named)
    (runs,) = definition["section"]["runSets"]
    assert "minilm-glue" in json.dumps(runs["filters"])
    everything = dashboard.definition(dashboard.workspace("bayesq", "team"))
    assert "group" not in json.dumps(everything["section"]["runSets"][0]["filters"])


def test_the_default_project_is_that_of_the_runs() -> None:
    default = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    assert default["wandb"]["project"] == f"${{wandb:project,{dashboard.PROJECT}}}"


def test_a_group_and_a_project_of_any_length_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "/checkpoints/" + "deep/" * 40 + "model-digits"
    built = dashboard.workspace("team/paper", "team", group=name)
    assert (built.project, len(built.name)) == (wandb_names.project_label("team/paper"), wandb_names.LABEL_CHARACTERS)
    (runs,) = dashboard.definition(built)["section"]["runSets"]
    assert json.dumps(wandb_names.label(name)) in json.dumps(runs["filters"])
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert "W&B project, as wandb.project (theirs)" in " ".join(command("--help").stdout.split())


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bayesq.suite.dashboard", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_the_definition_can_be_read_without_an_account() -> None:
    printed = command("--dry-run")
    assert (printed.returncode, printed.stderr) == (0, "")
    built = dashboard.definition(dashboard.workspace("bayesq", ""))
    assert named_keys(json.loads(printed.stdout)) == named_keys(built)


def test_without_a_login_there_is_one_line() -> None:
    done = command()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: dashboard: no W&B API key found; run 'wandb login'.*\n", done.stderr)


def test_without_the_extra_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(wandb_panels, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install 'bayesq\[dashboard\]'$"):
        dashboard.main(["--dry-run"])
    assert capsys.readouterr().out == ""


def test_it_is_saved_as_it_was_built() -> None:
    with serving() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
        done = command("--project", "other", "--metric", "matthews", **environment)
        assert done.returncode == 0, done.stderr
        named = command("--project", "other", "--entity", "people", **environment)
        assert named.returncode == 0, named.stderr
        server.broken = True
        refused = command("--entity", "people", WANDB_HTTP_TIMEOUT="1", **environment)
    first, second = server.views.values()
    assert (first["entityName"], first["projectName"], first["displayName"]) == (ENTITY, "other", dashboard.NAME)
    assert named_keys(first["spec"]) == named_keys(
        dashboard.definition(dashboard.workspace("other", ENTITY, "matthews"))
    )
    assert re.fullmatch(rf"saved: {server.url}/{ENTITY}/other\?nw=\w+\n", done.stdout)
    assert second["entityName"] == "people"
    assert server.unknown == []
    assert refused.returncode == 1
    assert re.search(r"^error: W&B did not save the dashboard \(.*\)$", refused.stderr, re.MULTILINE)
