"""The whole pipeline on the digits workload: real command line, real training, real W&B offline runs, real files."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial, reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from finished_runs import load_results
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from bayesq import evaluation
from bayesq.allocation import Knapsack
from bayesq.posterior import KroneckerPosterior, WhiteningStore
from bayesq.quant.accounting import affine_overhead_bits, buffer_bytes
from bayesq.quant.file import read_packed
from bayesq.quant.packing import PARAMETER_PREFIX, pack_model, unpack_model
from bayesq.suite import config, plan, preflight, runner, schema
from bayesq.suite.calibration import Calibration
from bayesq.suite.errors import UserError
from bayesq.suite.results import QUANTIZED_FILE
from bayesq.suite.workload import Workload
from bayesq.tensor_file import read_tensors

ROOT = Path(__file__).parents[1]
DIGITS = ("model=resnet", "dataset=digits", "calibration.examples=64")
METHODS = "rtn,gptq,awq,bayesq"
# Everything in a result that may differ between two runs of one configuration.
VOLATILE = ("time/", "memory/", "git", "host", "config")
# With N = 1e9, the default, the posterior hardly spreads.
SPREAD = "method=bayesq posterior.num_data=1000"
# What a run and its reference share -> the switches shown to matter against that reference, one at a time.
SWITCHES = {
    "method=bayesq": [
        "posterior=diag",
        "posterior=lowrank",
        "posterior=ekfac",
        "posterior.samples=2",
        "posterior.draws=labels",
        "posterior.likelihood=gaussian",
        "posterior.examples=32",
        "posterior.shrinkage=0",
        "posterior.num_data=1000",
        "method.states=256",
        "method.rounding=nearest",
        "method.damping=0.1",
        "allocator=uniform",
        "allocation.block=layer",
        "allocation.block=group",
        "allocation.row_multiple=4",
        "allocation.widths=[2,4,8]",
        "+allocation.pinned={fc:8}",
        "+allocation.allowed={fc:[4,8]}",
        "budget.count=stored",
        "proxy=mc",
        "inputs=full",
        "inputs=prefix",
        "correction=none",
        "correction=mean",
        "rotate=false",
        "calibration.examples=48",
        "bits=2",
        "seed=1",
    ],
    "method=bayesq bits=3.5": ["allocation.min_width=3"],
    "method=bayesq method.refits=1": ["method.refits=0", "method.refits=2"],
    "method=bayesq allocation.block=group": ["allocation.group_rows=4"],
    "method=bayesq proxy=mc": ["monte_carlo.samples=1", "monte_carlo.examples=16"],
    "method=bayesq posterior=lowrank": ["posterior.rank=4"],
    SPREAD: [
        "posterior.prior_scope=global",
        "posterior.prior_share=gradient",
        "posterior.evidence=eigenvalues",
        "posterior.prior_precision=10",
        "method.levels=lloyd",
        "method.levels=uniform",
    ],
    f"{SPREAD} method.levels=lloyd": ["method.posterior_noise=true"],
    "method=gptq": [
        "inputs=full",
        "method.group_size=32",
        "method.act_order=false",
        "method.clip=minmax",
        "method.clip=mse",
        "method.damping=0.1",
        "allocator=knapsack",
        "correction=moments",
        "budget.count=stored",
    ],
    "method=gptq allocator=knapsack bits=3.2": ["budget.count=stored", "posterior=diag"],
    "method=awq": [
        "method.exponents=2",
        "method.clip_steps=0",
        "method.clip_lowest=0.9",
        "allocator=knapsack",
        "layers.exclude=[fc]",
    ],
    "method=rtn": ["method.clip=minmax"],
}


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


def run_here(folder: Path, place: str, overrides: str, previous: list[WhiteningStore] | None = None) -> dict:
    """The result of one run in this process: what the command line does, without seconds of imports for each run."""
    places = (f"results_dir={folder / place}", f"cache_dir={folder / 'cache'}", "wandb.mode=disabled")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*DIGITS, *places, "bits=3", *overrides.split()])
    schema.validate(cfg)
    runner.run(cfg, previous)
    return json.loads((config.run_dir(cfg) / "result.json").read_text())


def stable(result: dict) -> dict:
    """The result without what differs between two equal runs: times, memory, W&B, and the names of cached files."""
    same = {key: value for key, value in result.items() if not key.startswith(VOLATILE)}
    return same | {"source": {key: value for key, value in result["source"].items() if key != "statistics"}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which eight runs have been made with one command."""
    folder = tmp_path_factory.mktemp("sweep")
    done = command(folder, "-m", *DIGITS, f"method={METHODS}", "bits=3,3.5")
    assert done.returncode == 0, done.stderr
    assert "resnet on digits: full precision" in done.stdout
    assert all(method in done.stdout for method in METHODS.split(","))
    return folder


@pytest.fixture(scope="module")
def run(sweep: Path) -> Callable[[str], dict]:
    """The result of a run with these overrides, made in this process when first asked for."""
    return cache(lambda overrides: run_here(sweep, "here", overrides))


def test_every_run_leaves_its_whole_contract(sweep: Path) -> None:
    results = load_results(sweep / "results")
    assert len(results) == 8
    for result in results:
        folder = sweep / "results" / result["run_id"]
        assert result["status"] == "finished"
        assert result["fp/accuracy"] >= 0.97
        assert result["evaluation/examples"] == 600 and result["calibration/examples"] == 64
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
        bayesq = result["method"] == "bayesq"
        assert all(bool(row["predicted_risk"]) == bayesq for row in layers)
        assert all(bool(row["achieved_risk"]) == bayesq for row in layers)
        assert result["allocator"] == ("knapsack" if bayesq else "uniform")
        assert result["posterior"] == ("kfac" if bayesq else "none")
        assert result["correction"] == ("moments" if bayesq else "none")
        if bayesq:
            risks = [[float(row[f"{kind}_risk"]) for row in layers] for kind in ("predicted", "achieved")]
            assert -1 <= result["risk/rank_correlation"] <= 1
            assert result["risk/rank_correlation"] == pytest.approx(spearmanr(*risks).statistic)
        else:
            assert result["risk/rank_correlation"] is None


def test_what_was_packed_is_what_was_counted_and_evaluated(sweep: Path) -> None:
    for result in load_results(sweep / "results"):
        buffers, header = read_tensors(sweep / "results" / result["run_id"] / "quantized.safetensors")
        assert buffer_bytes(buffers) == result["bytes/packed"] + result["bytes/parameters"]
        weights = result["bytes/fp32"] // 4
        assert result["bits/stored"] == pytest.approx(8 * result["bytes/packed"] / weights)
        tensors = unpack_model(buffers, header)
        assert sum(tensor.codes.numel() for tensor in tensors.values()) == weights
        again, _ = pack_model(tensors)
        assert (again.keys() == buffers.keys()) == (result["correction"] == "none") and again.keys() <= buffers.keys()
        assert all(torch.equal(again[name], buffers[name]) for name in again)


def test_bayesq_stores_no_more_than_gptq(sweep: Path) -> None:
    results = {(r["method"], r["bits/target"]): r for r in load_results(sweep / "results")}
    with (sweep / "results" / results["gptq", 3]["run_id"] / "layers.csv").open() as file:
        shapes = [[int(size) for size in row["shape"].split("x")] for row in csv.DictReader(file)]
    weights = sum(groups * rows * columns for groups, rows, columns in shapes)
    plain = affine_overhead_bits(groups * rows for groups, rows, _ in shapes) / weights
    # uniform widens whole rows: what is left of a fractional budget is less than a row of the widest layer
    row = max(columns for *_, columns in shapes) / weights
    for bits, slack in ((3, 0), (3.5, row)):
        bayesq, gptq = (results[method, bits]["bits/stored"] for method in ("bayesq", "gptq"))
        assert bayesq <= gptq + slack
        assert max(bayesq, gptq) <= bits + plain


def test_the_evaluated_weights_are_the_stored_ones(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of weights loaded from the file by hand gives the very predictions of the run."""
    result = next(r for r in load_results(sweep / "results") if r["method"] == "bayesq" and r["bits/target"] == 3)
    monkeypatch.chdir(sweep)
    work = plan.load_workload(OmegaConf.create(result["config"]), sweep / "cache")
    buffers, header = read_tensors(sweep / "results" / result["run_id"] / "quantized.safetensors")
    modules = dict(work.network.module.named_modules())
    for name, tensor in unpack_model(buffers, header).items():
        before = modules[name].weight.detach().clone()
        modules[name].weight.data = tensor.dequantize().reshape(before.shape)
        assert not torch.equal(modules[name].weight, before)
    for name, value in read_packed(sweep / "results" / result["run_id"] / "quantized.safetensors").parameters.items():
        work.network.module.state_dict()[name].copy_(value)  # biases and norms that keep the means
    logits, _ = evaluation.logits(work.network.module, work.evaluation, 64, torch.device("cpu"), "")
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


def test_a_repeated_command_gives_wandb_the_run_that_it_lacks(sweep: Path, tmp_path: Path) -> None:
    """As after a kill between the result and W&B's record of it."""
    result = next(r for r in load_results(sweep / "results") if r["method"] == "rtn" and r["bits/target"] == 3)
    folder = tmp_path / "results" / result["run_id"]
    shutil.copytree(sweep / "results" / result["run_id"], folder)
    (folder / "result.json").write_text(json.dumps(result | {"wandb/error": "killed"}))
    done = command(tmp_path, *DIGITS, "method=rtn", "bits=3")
    assert done.returncode == 0, done.stderr
    assert f"W&B lacked {result['run_id']}: logged from its files" in done.stdout
    assert json.loads((folder / "result.json").read_text()) == result | {"wandb/error": None}
    assert len(list((tmp_path / "results" / "wandb").glob(f"offline-run-*-{result['run_id']}"))) == 1


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


@pytest.mark.parametrize("base", SWITCHES)
def test_a_reference_is_reproduced(sweep: Path, run: Callable[[str], dict], base: str) -> None:
    """By the command line where the sweep has this run, else by a second run: a difference is the switch's alone."""
    result = run(base)
    place = "results" if (sweep / "results" / result["run_id"]).exists() else "again"
    if place == "again":
        run_here(sweep, place, base)
    folders = [sweep / name / result["run_id"] for name in ("here", place)]
    first, second = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert json.dumps(stable(first)) == json.dumps(stable(second))
    first_file, second_file = ((folder / QUANTIZED_FILE).read_bytes() for folder in folders)
    assert first_file == second_file


@pytest.mark.parametrize(("base", "switch"), [(base, switch) for base in SWITCHES for switch in SWITCHES[base]])
def test_every_switch_runs_and_matters(run: Callable[[str], dict], base: str, switch: str) -> None:
    reference, result = run(base), run(f"{base} {switch}")
    assert result["q/kl_to_fp"] != reference["q/kl_to_fp"]
    assert result["bits/code"] <= result["bits/target"]
    override = OverridesParser.create().parse_override(switch)
    found = reduce(getitem, override.key_or_group.split("."), result["config"])
    asked = override.value()
    assert (found["name"] if isinstance(asked, str) and isinstance(found, dict) else found) == asked
    if switch == "budget.count=stored":
        assert result["bits/target"] - 0.02 <= result["bits/stored"] <= result["bits/target"]


@pytest.mark.parametrize("method", ["bayesq", "gptq"])
def test_distillation_never_raises_the_held_out_divergence(sweep: Path, method: str) -> None:
    result = run_here(sweep, "distilled", f"method={method} bits=2.5 distill=true correction=moments")
    assert result["distill/heldout_kl_after"] <= result["distill/heldout_kl_before"]
    assert result["time/distill_s"] > 0
    buffers, _ = read_tensors(sweep / "distilled" / result["run_id"] / "quantized.safetensors")
    parameters = {name for name in buffers if name.startswith(PARAMETER_PREFIX)}
    assert parameters
    counted = {name: buffer for name, buffer in buffers.items() if name not in parameters}
    assert buffer_bytes(counted) == result["bytes/packed"]


def test_autocast_is_reported_with_its_own_effect(run: Callable[[str], dict]) -> None:
    plain, lower = run("method=bayesq"), run("method=bayesq evaluation.autocast=bfloat16")
    assert 0 < lower["autocast/kl_to_float32"] < lower["q/kl_to_fp"]
    # the root of a small divergence is a distance, and the format moves both networks that are compared
    shift = abs(math.sqrt(lower["q/kl_to_fp"]) - math.sqrt(plain["q/kl_to_fp"]))
    assert shift <= 2 * math.sqrt(lower["autocast/kl_to_float32"])
    assert lower["fp/nll"] != plain["fp/nll"] and "autocast/kl_to_float32" not in plain


def test_a_run_that_runs_out_of_memory_goes_on_in_smaller_batches(
    sweep: Path, run: Callable[[str], dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage: full precision, calibration, proxy and correction of 64 images, distillation, evaluation."""
    load = runner.load_workload

    def narrow(*arguments: object) -> Workload:
        def refuse(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(inputs[0]) > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")

        work = load(*arguments)
        work.network.module.conv1.register_forward_pre_hook(refuse)  # what runs is this module or a copy of it
        return work

    switches = "method=bayesq inputs=full distill=true proxy=mc monte_carlo.samples=1 calibration.examples=64"
    enough = run(f"{switches} evaluation.batch_size=32 calibration.batch_size=8 distillation.batch_size=8")
    monkeypatch.setattr(runner, "load_workload", narrow)
    result = run_here(sweep / "narrow", "here", f"{switches} evaluation.batch_size=32")
    # 32 -> 8 twice, 16 -> 8 twice, and the one batch of the correction and of the proxy 64 -> 8
    assert result["fallback/oom_retries"] == 2 + 2 + 1 + 1 + 3 + 3 and enough["fallback/oom_retries"] == 0
    assert result["q/kl_to_fp"] == pytest.approx(enough["q/kl_to_fp"], rel=0.5)


def count_whitenings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for each whitening that is made from now on."""
    made: list[str] = []
    whitening = KroneckerPosterior.whitening
    monkeypatch.setattr(KroneckerPosterior, "whitening", lambda *given: made.append("") or whitening(*given))
    monkeypatch.setattr(runner, "rehearse", lambda *_, **__: None)  # its whitenings are not the run's
    return made


def test_what_is_slow_once_is_not_the_methods_time(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Loading, full-precision predictions and rehearsal are prepared; having statistics counts what it once took."""
    late = [0.0]
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    def slow(function: Callable) -> Callable:
        def slowed(*args, **options):
            late[0] += 1000
            return function(*args, **options)

        return slowed

    for place, name in ((runner, "load_workload"), (runner, "rehearse"), (runner, "cached_logits")):
        monkeypatch.setattr(place, name, slow(getattr(place, name)))
    monkeypatch.setattr(Calibration, "prepare", slow(Calibration.prepare))
    result = run_here(tmp_path, "here", f"method=bayesq cache_dir={sweep / 'cache'}")
    assert 3000 < result["time/prepare_s"] < 4000
    stages = sum(result[f"time/{stage}_s"] for stage in ("calibrate", "posterior", "quantize", "distill", "evaluate"))
    assert 0 < stages <= result["time/total_s"] < 1000


def test_the_runs_of_a_command_share_their_whitenings(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, previous = count_whitenings(monkeypatch), []
    # There 3 bits came first and left its whitenings to 3.5; here it is the other way round.
    reversed_runs = {result["run_id"]: result for result in load_results(sweep / "results")}
    for overrides, anew, known in (
        ("method=bayesq bits=3.5", True, True),
        ("method=bayesq bits=3", False, True),  # the next budget
        ("method=gptq allocator=knapsack rotate=true", False, False),  # another method
        ("method=bayesq bits=3.5 seed=1", True, False),  # other statistics
        ("method=bayesq posterior.shrinkage=0.25", True, False),  # another posterior
        ("method=bayesq bits=3 force=true", True, True),  # only the last run's are there
    ):
        before = len(made)
        result = run_here(tmp_path, "here", f"{overrides} cache_dir={sweep / 'cache'}", previous)
        rows = (tmp_path / "here" / result["run_id"] / "layers.csv").read_text().splitlines()
        behind_prefix = "method=bayesq" in overrides  # one more of each layer, from its inputs there
        assert len(made) - before == (anew + behind_prefix) * (len(rows) - 1), overrides
        if not anew:  # what they once took counts
            assert result["time/posterior_s"] > previous[0].inherited_seconds > 0
        assert (result["run_id"] in reversed_runs) == known
        if known:
            assert stable(result) == stable(reversed_runs[result["run_id"]])


@pytest.mark.parametrize(("switch", "fewer"), [("", True), (" calibration.offload=disk", True), ("", False)])
def test_where_whitenings_wait_changes_nothing(
    sweep: Path, run: Callable[[str], dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, switch: str, fewer: bool
) -> None:
    """In memory, in a file for want of memory or because asked for, or nowhere for want of disk: the same codes."""
    plain = sweep / "here" / run("method=bayesq")["run_id"] / "quantized.safetensors"
    made = count_whitenings(monkeypatch)
    monkeypatch.setattr(plan, "WhiteningStore", partial(WhiteningStore, memory_limit=0))
    if not fewer:
        monkeypatch.setattr(preflight, "SPARE_DISK", 1e12)
    result = run_here(tmp_path, "here", f"method=bayesq cache_dir={sweep / 'cache'}{switch}")
    found = tmp_path / "here" / result["run_id"]
    assert (found / "quantized.safetensors").read_bytes() == plain.read_bytes()
    layers = len((found / "layers.csv").read_text().splitlines()) - 1
    # allocation, a round, and where levels have a table the first grids; or all three once; and behind the prefix
    assert len(made) == 2 * layers if fewer else 3 * layers < len(made) <= 4 * layers


def test_a_pattern_without_a_layer_is_refused_before_the_calibration(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "Calibration", lambda *_: pytest.fail("statistics were asked for"))
    with pytest.raises(UserError, match=r"allocation\.pinned: pattern 'nothing\*' matches no layer"):
        run_here(sweep, "refused", "method=bayesq +allocation.pinned={nothing*:8}")


def test_the_allocator_predicts_with_the_damping_of_the_method() -> None:
    overrides = ("method=bayesq", "method.damping=0.25")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        allocator = plan.make_recipe(compose("config", list(overrides))).allocator
    assert isinstance(allocator, Knapsack) and allocator.damping == 0.25


def test_a_value_that_a_constructor_refuses_stops_a_sweep_before_its_first_run(sweep: Path) -> None:
    done = command(
        sweep, "-m", *DIGITS, "method=gptq", "bits=3", "method.clip=minmax,huge", "wandb.mode=disabled",
        "results_dir=partly",
    )  # fmt: skip
    assert done.returncode == 1
    assert "method.clip=huge" in done.stderr and "Traceback" not in done.stderr
    assert not load_results(sweep / "partly")
