"""Tiny random networks of timm and transformers: right numbers, or one line that names the layer."""

import copy
import csv
import json
import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from architectures import TIMM, TRANSFORMERS, Architecture
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from sources import EXAMPLES, LONGEST, write_classifier
from torch import nn
from torch.nn import functional

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.fisher import GRADIENT_MOMENT
from bayesq.suite import plan, runner
from bayesq.suite.calibration import Calibration
from bayesq.suite.errors import UserError
from bayesq.suite.workload import Workload

ROOT = Path(__file__).parents[2]
METHODS = ("rtn", "gptq", "bayesq")
ALL_METHODS_EVERY = 8  # of the networks that run; BayesQ alone gets the others, because it needs the most statistics
KINDS = ("input_moment", "gradient_moment")
BITS = 4
ROUNDING = 1e-4  # relative; sums in float32 differed by up to 1.6e-5 from processor to processor

pytestmark = pytest.mark.slow
every_network = pytest.mark.parametrize("network", [*TIMM, *TRANSFORMERS], ids=lambda one: one.name)


@pytest.fixture(autouse=True)
def no_global_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@cache
def composed(*overrides: str) -> DictConfig:
    """A command line's configuration; every network gets a copy, since composing takes as long as a small run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def configured(network: Architecture, folder: Path, method: str) -> DictConfig:
    """The configuration of a run; texts come from a checkpoint in `folder`, which is written once."""
    if network in TIMM:
        cfg = copy.deepcopy(composed("model=timm", "dataset=digits", f"method={method}"))
        cfg.model = own(cfg.model, "RandomImages", network.name, architecture=network.name)
        cfg.dataset = own(cfg.dataset, "Noise", cfg.dataset.name, pixels=network.pixels)
    else:
        cfg = copy.deepcopy(composed("model=transformers", "dataset=movie_snippets", f"method={method}"))
        cfg.dataset = own(cfg.dataset, "Sentences", cfg.dataset.name)
        cfg.model.name, cfg.model.max_length = network.name, LONGEST
        cfg.model.checkpoint = str(folder / "checkpoint")
        if not (folder / "checkpoint").exists():
            write_classifier(network.name, folder / "checkpoint")
    cfg.wandb.mode, cfg.calibration.examples, cfg.bits = "disabled", EXAMPLES, BITS
    cfg.results_dir, cfg.cache_dir = str(folder / "results"), str(folder / "cache")
    (folder / "cache").mkdir(exist_ok=True)
    return cfg


def own(node: DictConfig, source: str, name: str, **arguments: Any) -> DictConfig:
    """A config group with a name and a source of these tests in place of its own."""
    return DictConfig({"name": name, "tasks": node.tasks, "_target_": f"sources.{source}", **arguments})


def check_refusal(network: Architecture, error: UserError) -> str:
    """The line of a refusal, which names the layer."""
    line = str(error)
    assert network.refused is not None, f"refused, though it should run: {line}"
    assert network.refused in line and "\n" not in line
    return line


@every_network
def test_it_runs_or_is_refused(network: Architecture, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusals = set()
    alone = network.refused is None and [*TIMM, *TRANSFORMERS].index(network) % ALL_METHODS_EVERY > 0
    for method in METHODS[-1:] if alone else METHODS:
        cfg = configured(network, tmp_path, method)
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
    assert len(refusals) == (network.refused is not None), "the methods refuse it with different words"


def check_layers(network: Architecture, result: dict[str, Any], said: str) -> None:
    """Layers that no example reaches are named, and take no part in the allocation."""
    folder = Path(result["config"]["results_dir"]) / result["run_id"]
    with (folder / "layers.csv").open() as file:
        rounded = [row["name"] for row in csv.DictReader(file)]
    assert result["fallback/unseen_layers"] == len(network.unreached)
    for unreached in network.unreached:
        assert unreached in said, f"{unreached} gets no example, and nothing says so"
        # a model source may wrap the network
        assert not any(name.endswith(unreached) for name in rounded)


Moments = dict[str, dict[str, torch.Tensor]]


def prepared(network: Architecture, folder: Path, batch_size: int) -> tuple[Workload, Calibration]:
    """A workload and its moments, over the calibration examples in batches of a size."""
    cfg = configured(network, folder, "bayesq")
    cfg.calibration.batch_size, cfg.posterior.examples = batch_size, None
    work = plan.load_workload(cfg, folder / "cache")
    store = plan.make_recipe(cfg).whitenings
    calibration = plan.open_statistics(cfg, store, work, folder / f"batches of {batch_size}")
    calibration.prepare([INPUT_MOMENT, GRADIENT_MOMENT])
    return work, calibration


def written_out(work: Workload) -> Moments:
    """Moments of all Linear layers by their definition: one example after the other, at the products themselves.

    Every product of the network is seen where torch multiplies, however the network gets there.
    """
    module = work.network.module
    names = {id(part.weight): name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    # torch's backward pass of a BatchNorm2d is wrong for one example whose gradient is not contiguous
    copies = 2 if any(isinstance(part, nn.BatchNorm2d) for part in module.modules()) else 1
    seen: dict[str, int] = {}
    sums: Moments = {kind: {} for kind in KINDS}
    runs: list[tuple[str, torch.Tensor]] = []
    product = functional.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = product(input, weight, bias)
        if (name := names.get(id(weight))) is not None:
            rows = input.detach().reshape(-1, input.shape[-1])
            sums["input_moment"][name] = sums["input_moment"].get(name, 0) + rows.T @ rows
            seen[name] = seen.get(name, 0) + len(rows)
            output = output.requires_grad_() if not output.requires_grad else output
            runs.append((name, output))
            return output.clone()  # the network may change it in place
        return output

    for batch in work.subject.examples.batches(1, "cpu"):
        runs.clear()
        with mock.patch("torch.nn.functional.linear", linear), torch.enable_grad():
            logits = module(**{name: x.repeat(copies, *[1] * (x.dim() - 1)) for name, x in batch.inputs.items()})[:1]
        p = logits.detach().softmax(1)
        for k in range(
            logits.shape[1] if runs else 0
        ):  # the Fisher of the outputs: the sum over labels, each with its probability
            direction = p[:, k].sqrt() * (torch.eye(logits.shape[1])[k] - p)
            found = torch.autograd.grad(logits, [y for _, y in runs], direction, retain_graph=True, allow_unused=True)
            for (name, _), gradient in zip(runs, found, strict=True):
                if gradient is not None:
                    rows = gradient.reshape(-1, gradient.shape[-1])
                    sums["gradient_moment"][name] = sums["gradient_moment"].get(name, 0) + rows.T @ rows
    examples = len(work.subject.examples)
    return {
        "input_moment": {name: total / seen[name] for name, total in sums["input_moment"].items()},
        "gradient_moment": {name: total / examples for name, total in sums["gradient_moment"].items()},
    }


@every_network
def test_moments_are_right_at_every_batch_size(network: Architecture, tmp_path: Path) -> None:
    if network.refused is not None:
        pytest.skip("refused")
    work, alone = prepared(network, tmp_path, 1)
    together = prepared(network, tmp_path, EXAMPLES)[1]
    by_definition = written_out(work)
    wrong = {}
    for kind in KINDS:
        first = {name: alone.statistic(name, kind) for name in work.subject.layers}
        # where the exact value is zero (a softmax over one position), what is found are errors of rounding
        floor = 1e-8 * max(float(moment.norm()) for moment in first.values())
        for name, expected in first.items():
            size = max(float(expected.norm()), floor)
            others = {"batches": together.statistic(name, kind)}
            if name in by_definition[kind]:
                others["definition"] = by_definition[kind][name][None]
            different = {other: float((found - expected).norm()) / size for other, found in others.items()}
            if not all(difference <= ROUNDING for difference in different.values()):
                wrong[f"{kind} of {name}"] = different
    assert not wrong, json.dumps(wrong, indent=1)
    linear = {name for name, part in work.network.module.named_modules() if type(part) is nn.Linear}
    assert linear & work.subject.layers.keys() <= by_definition["input_moment"].keys()


def test_the_zoo_is_large_enough() -> None:
    accepted = [one for one in (*TIMM, *TRANSFORMERS) if one.refused is None]
    assert len({one.name for one in (*TIMM, *TRANSFORMERS)}) == len(TIMM) + len(TRANSFORMERS)
    assert len(TIMM) >= 40 and len(TRANSFORMERS) >= 25 and len(accepted) >= 60
