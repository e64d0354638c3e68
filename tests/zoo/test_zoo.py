"""Tiny random networks of timm and transformers under three methods: right numbers, or one line that names the layer."""

import csv
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TIMM, TRANSFORMERS, Architecture
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from sources import EXAMPLES, LONGEST, write_classifier

from bayesq.suite import runner
from bayesq.suite.calibration import Calibration
from bayesq.suite.errors import UserError

ROOT = Path(__file__).parents[2]
METHODS = ("rtn", "gptq", "bayesq")
KINDS = ("input_moment", "gradient_moment")
BITS = 4

pytestmark = pytest.mark.slow
every_network = pytest.mark.parametrize("network", [*TIMM, *TRANSFORMERS], ids=lambda one: one.name)


@pytest.fixture(autouse=True)
def no_global_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def configured(network: Architecture, folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a run; texts come from a checkpoint in `folder`, which is written once."""
    if network in TIMM:
        changed = ["model=timm", "dataset=digits"]
    else:
        changed = ["model=transformers", "dataset=movie_snippets"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*changed, f"model.name={network.name}", *overrides])
    if network in TIMM:
        cfg.model = own(cfg.model, "RandomImages", architecture=network.name)
        cfg.dataset = own(cfg.dataset, "Noise", pixels=network.pixels)
    else:
        cfg.dataset = own(cfg.dataset, "Sentences")
        cfg.model.checkpoint, cfg.model.max_length = str(folder / "checkpoint"), LONGEST
        if not (folder / "checkpoint").exists():
            write_classifier(network.name, folder / "checkpoint")
    cfg.wandb.mode, cfg.calibration.examples, cfg.bits = "disabled", EXAMPLES, BITS
    cfg.results_dir, cfg.cache_dir = str(folder / "results"), str(folder / "cache")
    (folder / "cache").mkdir(exist_ok=True)
    return cfg


def own(node: DictConfig, source: str, **arguments: Any) -> DictConfig:
    """A config group with a source of these tests in place of its own."""
    return DictConfig({"name": node.name, "modality": node.modality, "_target_": f"sources.{source}", **arguments})


def check_refusal(network: Architecture, error: UserError) -> str:
    """The line of a refusal, which names the layer."""
    line = str(error)
    assert network.refused is not None, f"refused, though it should run: {line}"
    assert network.refused in line and "\n" not in line
    return line


@every_network
def test_three_methods(network: Architecture, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusals = set()
    for method in METHODS:
        cfg = configured(network, tmp_path, f"method={method}")
        caplog.clear()
        caplog.set_level(logging.INFO)
        try:
            result = runner.run(cfg)
        except UserError as error:
            refusals.add(check_refusal(network, error))
            continue
        assert network.refused is None, f"{method} runs, though {network.refused} should be refused"
        assert result["status"] == "finished" and math.isfinite(result["q/kl_to_fp"]) and result["q/kl_to_fp"] >= 0
        assert 0 < result["quantized/share"] <= 1
        check_layers(network, result, caplog.text)
    assert len(refusals) == (network.refused is not None), "all methods refuse it, with the same words"


def check_layers(network: Architecture, result: dict[str, Any], said: str) -> None:
    """Layers without statistics are those that no example reaches: they are named, and buy no bits."""
    folder = Path(result["config"]["results_dir"]) / result["run_id"]
    with (folder / "layers.csv").open() as file:
        layers = {row["name"]: row for row in csv.DictReader(file)}
    # a model source may wrap the network
    unreached = {name for name in layers if name.endswith(network.unreached)}
    assert result["fallback/unseen_layers"] == len(unreached)
    for name in network.unreached:
        assert name in said, f"{name} gets no example, and nothing says so"
    for name in unreached:
        assert float(layers[name]["predicted_risk"] or 0) == 0, f"{name} has a risk from an identity Fisher"
        assert float(layers[name]["bits/code"]) <= BITS


def statistics(network: Architecture, folder: Path, batch_size: int) -> tuple[Calibration, dict[str, dict[str, torch.Tensor]]]:  # fmt: skip
    """Moments of every layer by kind, over the calibration examples in batches of a size."""
    cfg = configured(network, folder, "method=bayesq", f"calibration.batch_size={batch_size}", "posterior.examples=null")
    cache = folder / f"statistics of {batch_size}"
    work = runner.load(cfg, cache)
    calibration = runner.open_calibration(cfg, runner.make_plan(cfg).posterior, work, cache)
    calibration.prepare(KINDS)
    return calibration, {kind: {name: calibration.statistic(name, kind) for name in work.layers} for kind in KINDS}


@every_network
def test_statistics_do_not_depend_on_the_batch_size(network: Architecture, tmp_path: Path) -> None:
    if network.refused is not None:
        pytest.skip("refused")
    _, alone = statistics(network, tmp_path, 1)
    calibration, together = statistics(network, tmp_path, EXAMPLES)
    wrong = {}
    assert all(name.endswith(network.unreached) for name in calibration.unseen), calibration.unseen
    for kind in KINDS:
        for name, expected in alone[kind].items():
            if name in calibration.unseen:
                continue
            assert not torch.equal(expected, torch.eye(expected.shape[-1]).expand(expected.shape)), name
            difference = float((together[kind][name] - expected).norm() / expected.norm().clamp_min(1e-30))
            if not difference <= 1e-5:
                wrong[f"{kind} of {name}"] = difference
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_zoo_is_large_enough() -> None:
    accepted = [one for one in (*TIMM, *TRANSFORMERS) if one.refused is None]
    assert len({one.name for one in (*TIMM, *TRANSFORMERS)}) == len(TIMM) + len(TRANSFORMERS)
    assert len(TIMM) >= 40 and len(TRANSFORMERS) >= 25 and len(accepted) >= 60
