"""Whole passes and sweeps. `pytest -s tests/benchmarks/bench_pass.py`: minutes, and some GiB of memory.

Networks of ResNet-50's and BERT-base's sizes with random weights and inputs: what they cost does not depend on them.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from references import TIMER, compare

from bayesq.batches import TensorExamples, two_examples
from bayesq.coverage import coverage
from bayesq.defaults import conf_dir
from bayesq.likelihood import Categorical
from bayesq.pipeline import quantize_network
from bayesq.quant.layers import quantizable_layers
from bayesq.quant.usage import usage_of
from bayesq.recipe import Quantized, Subject
from bayesq.suite import plan
from bayesq.suite.models.base import Network
from bayesq.suite.preflight import preflight
from bayesq.suite.workload import Workload

ROOT = Path(__file__).parents[2]
EXAMPLES = 256  # as many as a run takes unless told otherwise
pytestmark = pytest.mark.benchmark(timer=TIMER)
# The demo takes much longer; digits has the same stages.
SWEEP = ["model=resnet", "dataset=digits"]
METHODS, BITS = ("rtn", "gptq", "awq", "bayesq"), ("3", "3.5", "4")


def resnet(name: str) -> tuple[torch.nn.Module, TensorExamples]:
    import timm

    images = torch.randn(EXAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return timm.create_model(name, num_classes=10), TensorExamples({"x": images}, torch.zeros(EXAMPLES).long())


def small() -> tuple[torch.nn.Module, TensorExamples]:
    """Shows in seconds that this file still runs; its ratio says nothing."""
    return resnet("test_resnet")


def resnet50() -> tuple[torch.nn.Module, TensorExamples]:
    return resnet("resnet50")


def bert_base() -> tuple[torch.nn.Module, TensorExamples]:
    from transformers import BertConfig, BertForSequenceClassification

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = BertForSequenceClassification(BertConfig())

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids).logits

    ids = torch.randint(30000, (EXAMPLES, 32), generator=torch.Generator().manual_seed(0))
    return Logits(), TensorExamples({"input_ids": ids}, torch.zeros(EXAMPLES).long())


@functools.cache
def workload(build) -> Workload:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, examples = build()
    network = Network(module.eval(), lambda _: examples, {})
    data = types.SimpleNamespace(likelihood=Categorical())
    usage = usage_of(module, quantizable_layers(module), two_examples(examples, "cpu").inputs)
    subject = Subject(module, usage, examples, Categorical(), torch.device("cpu"), blocks=network.blocks)
    return Workload(network, data, subject, examples, coverage(module, usage.layers), "tiny")


def quantize(work: Workload, folder: Path, *overrides: str) -> Quantized:
    """From the network to its codes as a run does it, statistics included."""
    folder.mkdir()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [f"calibration.examples={EXAMPLES}", "bits=4", *overrides])
    recipe = plan.make_recipe(cfg)
    statistics = plan.open_statistics(cfg, recipe.whitenings, work, folder)
    needs = preflight(cfg, recipe, work, statistics, {"cache_dir": folder, "results_dir": folder})
    if recipe.whitenings and needs.spilled:
        recipe.whitenings.use_disk(folder)
    return quantize_network(work.subject, recipe, statistics)


@pytest.mark.parametrize("build", [small, resnet50, bert_base])
def test_pass(benchmark, build, tmp_path):
    """BayesQ without distillation against GPTQ with inputs from the full-precision network, caches of their own."""
    work, number = workload(build), itertools.count()

    def run(*overrides: str) -> None:
        quantize(work, tmp_path / str(next(number)), *overrides)

    gptq = {"gptq": lambda: run("method=gptq", "inputs=full")}
    compare(benchmark, lambda: run("method=bayesq"), gptq, rounds=1)


def command(folder: Path, *overrides: str) -> list[str]:
    own = [f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}", "wandb.mode=disabled"]
    return [sys.executable, str(ROOT / "run.py"), *overrides, *SWEEP, *own]


def test_sweep(benchmark, tmp_path):
    """Twelve runs in one command, against the slowest of them alone plus all evaluations; wall time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "warm", "method=rtn"), check=True, env=environment, capture_output=True)

    def sweep() -> None:
        axes = ["-m", f"method={','.join(METHODS)}", f"bits={','.join(BITS)}"]
        subprocess.run(command(tmp_path, *axes), check=True, env=environment, capture_output=True)

    benchmark.pedantic(sweep, rounds=1)
    results = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/result.json")]
    assert len(results) == len(METHODS) * len(BITS)
    totals = [r["time/prepare_s"] + r["time/total_s"] for r in results]
    evaluations = sum(r["time/evaluate_s"] for r in results)
    print(f"\nsweep {sum(totals):.1f} s in 12 runs, slowest {max(totals):.1f} s, evaluations {evaluations:.1f} s:")
    print(f"{(sum(totals) - evaluations) / max(totals):.2f} x the slowest, besides the evaluations")
