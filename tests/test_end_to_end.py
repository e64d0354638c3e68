"""The whole pipeline on the digits workload: real command line, real training, real W&B offline runs, real files."""

import csv
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from bayesq.quant.accounting import buffer_bytes
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.suite import runner
from bayesq.suite.cache import read_tensors
from bayesq.suite.results import load_results

ROOT = Path(__file__).parents[1]
DIGITS = ("model=resnet", "dataset=digits")
METHODS = "rtn,gptq,awq,bayesq"
# Everything in a result that may differ between two runs of one configuration.
VOLATILE = ("time/", "memory/", "git", "host", "config")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BAYESQ_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def stable(result: dict) -> dict:
    return {key: value for key, value in result.items() if not key.startswith(VOLATILE)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which eight runs have been made with one command."""
    folder = tmp_path_factory.mktemp("sweep")
    done = command(folder, "-m", *DIGITS, f"method={METHODS}", "bits=3,3.5")
    assert done.returncode == 0, done.stderr
    assert "resnet on digits: full precision" in done.stdout
    assert all(method in done.stdout for method in METHODS.split(","))
    return folder


def test_every_run_leaves_its_whole_contract(sweep: Path) -> None:
    results = load_results(sweep / "results")
    assert len(results) == 8
    for result in results:
        folder = sweep / "results" / result["run_id"]
        assert result["status"] == "finished"
        assert result["fp/accuracy"] >= 0.97
        assert result["evaluation/examples"] == 600 and result["calibration/examples"] == 256
        assert 0 <= result["bits/target"] - result["bits/code"] <= 0.02
        assert result["bits/stored"] > result["bits/code"]
        low, high = result["delta/accuracy/ci95"]
        assert low <= result["delta/accuracy"] <= high
        assert result["delta/accuracy"] == pytest.approx(result["q/accuracy"] - result["fp/accuracy"])
        with (folder / "predictions.csv").open() as file:
            predictions = list(csv.DictReader(file))
        assert len(predictions) == 600 == len({row["id"] for row in predictions})
        right = sum(int(row["q_correct"]) for row in predictions)
        assert right / 600 == pytest.approx(result["q/accuracy"])
        assert sum(float(row["kl"]) for row in predictions) / 600 == pytest.approx(result["q/kl_to_fp"])
        with (folder / "layers.csv").open() as file:
            layers = list(csv.DictReader(file))
        assert {row["kind"] for row in layers} == {"Linear", "Conv2d"}
        assert all(bool(row["predicted_risk"]) == (result["method"] == "bayesq") for row in layers)
        assert all(bool(row["achieved_risk"]) == (result["method"] == "bayesq") for row in layers)


def test_what_was_packed_is_what_was_counted_and_evaluated(sweep: Path) -> None:
    for result in load_results(sweep / "results"):
        buffers, header = read_tensors(sweep / "results" / result["run_id"] / "quantized.safetensors")
        assert buffer_bytes(buffers) == result["bytes/packed"]
        weights = result["bytes/fp32"] // 4
        assert result["bits/stored"] == pytest.approx(8 * result["bytes/packed"] / weights)
        tensors = unpack_model(buffers, header)
        assert sum(tensor.codes.numel() for tensor in tensors.values()) == weights
        again, _ = pack_model(tensors)
        assert again.keys() == buffers.keys()
        assert all(torch.equal(again[name], buffers[name]) for name in buffers)


def test_bayesq_stores_no_more_than_gptq(sweep: Path) -> None:
    stored = {(r["method"], r["bits/target"]): r["bits/stored"] for r in load_results(sweep / "results")}
    for bits in (3, 3.5):
        assert stored["bayesq", bits] <= stored["gptq", bits]


def test_the_evaluated_weights_are_the_stored_ones(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of weights loaded from the file by hand gives the very predictions of the run."""
    from omegaconf import OmegaConf

    from bayesq.suite import evaluation

    result = next(r for r in load_results(sweep / "results") if r["method"] == "bayesq" and r["bits/target"] == 3)
    monkeypatch.chdir(sweep)
    work = runner.load(OmegaConf.create(result["config"]), sweep / "cache")
    buffers, header = read_tensors(sweep / "results" / result["run_id"] / "quantized.safetensors")
    modules = dict(work.network.module.named_modules())
    for name, tensor in unpack_model(buffers, header).items():
        before = modules[name].weight.detach().clone()
        modules[name].weight.data = tensor.dequantize().reshape(before.shape)
        assert not torch.equal(modules[name].weight, before)
    logits = evaluation.logits(work.network.module, work.evaluation, 64, torch.device("cpu"), "")
    accuracy = float((logits.argmax(1) == work.evaluation.labels).double().mean())
    with (sweep / "results" / result["run_id"] / "predictions.csv").open() as file:
        predictions = [int(row["q_prediction"]) for row in csv.DictReader(file)]
    assert logits.argmax(1).tolist() == predictions
    assert accuracy == pytest.approx(result["q/accuracy"])


def test_statistics_are_shared_by_the_sweep(sweep: Path) -> None:
    files = sorted(path.name for path in (sweep / "cache" / "statistics").rglob("*.safetensors"))
    assert files == ["gradient_moment.safetensors", "input_magnitude.safetensors", "input_moment.safetensors"]
    assert len(list((sweep / "cache" / "full_precision").glob("*.safetensors"))) == 1


def test_one_wandb_run_per_job(sweep: Path) -> None:
    assert len(list((sweep / "results" / "wandb").glob("offline-run-*"))) == 8


def test_a_repeated_command_skips_and_changes_nothing(sweep: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (sweep / "results").glob("*/result.json")}
    done = command(sweep, "-m", *DIGITS, f"method={METHODS}", "bits=3,3.5")
    assert done.returncode == 0
    assert done.stdout.count("skipped (finished)") == 8
    assert before == {path: path.stat().st_mtime_ns for path in (sweep / "results").glob("*/result.json")}


def test_force_reproduces_metrics_and_codes_byte_for_byte(sweep: Path) -> None:
    overrides = (*DIGITS, "method=bayesq", "bits=3.5", "wandb.mode=disabled")
    run_id = next(
        r["run_id"] for r in load_results(sweep / "results") if r["method"] == "bayesq" and r["bits/target"] == 3.5
    )
    folder = sweep / "results" / run_id
    codes = (folder / "quantized.safetensors").read_bytes()
    predictions = (folder / "predictions.csv").read_bytes()
    result = json.loads((folder / "result.json").read_text())
    done = command(sweep, *overrides, "force=true")
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "result.json").read_text())
    assert again["time/total_s"] != result["time/total_s"]
    assert json.dumps(stable(again)) == json.dumps(stable(result))
    assert (folder / "quantized.safetensors").read_bytes() == codes
    assert (folder / "predictions.csv").read_bytes() == predictions


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=bayesq", "posterior=diag"),
        ("method=bayesq", "method.levels=uniform", "allocation.block=layer"),
        ("method=bayesq", "method.rounding=nearest", "allocator=uniform"),
        ("method=bayesq", "method.levels=lloyd", "method.posterior_noise=true", "method.refits=2"),
        ("method=bayesq", "method.levels=lloyd", "method.rounding=two_sided", "posterior.samples=2"),
        ("method=bayesq", "method.states=8", "allocation.block=group", "posterior.examples=64"),
        ("method=bayesq", "posterior.prior_scope=global", "posterior.num_data=1000", "proxy=mc"),
        ("method=bayesq", "posterior=ekfac", "correction=moments"),
        ("method=bayesq", "posterior=lowrank", "allocation.min_width=3", "bits=3.5"),
        ("method=gptq", "correction=moments"),
        ("method=gptq", "allocator=knapsack", "budget.count=stored", "bits=3.2"),
        ("method=gptq", "method.sequential=true", "method.group_size=32", "calibration.examples=64"),
        ("method=awq", "allocator=knapsack", "layers.exclude=[fc]"),
        ("method=bayesq", "bits=2"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_switch_runs_and_matters(sweep: Path, overrides: tuple[str, ...]) -> None:
    known = {(r["method"], r["q/kl_to_fp"]) for r in load_results(sweep / "results")}
    place = f"results_dir=switch-{zlib.crc32(repr(overrides).encode())}"
    done = command(sweep, *DIGITS, "bits=3", "wandb.mode=disabled", place, *overrides)
    assert done.returncode == 0, done.stderr
    (result,) = load_results(sweep / place.removeprefix("results_dir="))
    assert result["bits/code"] <= result["bits/target"]
    if "budget.count=stored" in overrides:
        assert result["bits/target"] - 0.02 <= result["bits/stored"] <= result["bits/target"]
    assert (result["method"], result["q/kl_to_fp"]) not in known


@pytest.mark.parametrize("method", ["bayesq", "gptq"])
def test_distillation_never_raises_the_held_out_divergence(sweep: Path, method: str) -> None:
    place = f"distilled-{method}"
    overrides = (f"method={method}", "bits=2.5", "distill=true", "correction=moments", "wandb.mode=disabled")
    done = command(sweep, *DIGITS, *overrides, f"results_dir={place}")
    assert done.returncode == 0, done.stderr
    (result,) = load_results(sweep / place)
    assert result["distill/heldout_kl_after"] <= result["distill/heldout_kl_before"]
    assert result["time/distill_s"] > 0
    buffers, _ = read_tensors(sweep / place / result["run_id"] / "quantized.safetensors")
    parameters = {name for name in buffers if name.startswith(runner.PARAMETER_PREFIX)}
    assert parameters
    counted = {name: buffer for name, buffer in buffers.items() if name not in parameters}
    assert buffer_bytes(counted) == result["bytes/packed"]


def test_a_method_that_cannot_run_fails_alone_and_in_one_line(sweep: Path) -> None:
    done = command(
        sweep, "-m", *DIGITS, "method=gptq", "bits=3", "method.clip=minmax,huge", "wandb.mode=disabled",
        "results_dir=partly",
    )  # fmt: skip
    assert done.returncode == 1
    assert "method.clip=huge" in done.stderr and "Traceback" not in done.stderr
    assert len(load_results(sweep / "partly")) == 1
