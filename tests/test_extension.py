"""A stranger's method, posterior, statistic and kind of output, from outside of the package."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MODULE = '''
"""What a user writes."""

from dataclasses import dataclass

import torch

from bayesq.calibration.statistic import Source, Statistic
from bayesq.likelihood import Categorical
from bayesq.posterior import DiagonalPosterior, Laplace
from bayesq.nearest import round_to_nearest
from bayesq.suite.datasets.digits import Digits
from bayesq.suite.tasks import Task


@dataclass(frozen=True)
class LargestInput(Statistic):
    """[g, c] largest absolute input."""

    name = "largest_input"
    source = Source.INPUTS

    def shape(self, groups, rows, columns):
        return (groups, columns)

    def contribution(self, values):
        return values.abs().amax(1)

    def add(self, total, contribution):
        return contribution if total is None else torch.maximum(total, contribution)

    def finish(self, total, count, shape):
        return total


class Mine:
    """Rounds to nearest after asking how large the inputs are."""

    statistics = frozenset({LargestInput()})

    def __init__(self, clip):
        self.clip = clip

    def prepare(self, layers, allocate, context):
        return allocate(layers)

    def quantize_layer(self, layer, width, context):
        assert layer.input_statistic("largest_input").amax() > 0
        return round_to_nearest(layer, width, self.clip)


class InputPosterior(Laplace):
    """P = mean over rows of the largest input's square: a posterior that reads a statistic of its own."""

    statistics = frozenset({LargestInput()})

    def spectrum(self, layer):
        return layer.statistic("largest_input").double().square()[:, None].expand(layer.weight.shape)

    def fit(self, layer):
        tau, gamma = self.prior(layer)
        return DiagonalPosterior(self.spectrum(layer) + tau / self.num_data, self.num_data, tau, gamma)


@dataclass(frozen=True)
class Doubled(Categorical):
    """Divergences count twice."""

    name = "doubled"

    def kl(self, reference, other, mask=None):
        return 2 * super().kl(reference, other, mask)


@dataclass(frozen=True)
class DoubledDigits(Digits):
    task = Task("image classification", Doubled())
'''
METHOD = """
name: mine
allocator: uniform
display: {title: My own, color: "#123456", marker: "*", order: 99}
_target_: mine_quant.Mine
clip: mse
"""
POSTERIOR = """
name: by_input
rotate: false
_target_: mine_quant.InputPosterior
prior_precision: 1.0
num_data: 1000
samples: null
examples: 32
likelihood: auto
draws: signs
"""
RUN = ["model=resnet", "dataset.limit=50", "calibration.examples=64", "bits=3", "wandb.mode=disabled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stranger")
    (path / "mine_quant.py").write_text(textwrap.dedent(MODULE))
    digits = (ROOT / "conf/dataset/digits.yaml").read_text()
    doubled = digits.replace("bayesq.suite.datasets.digits.Digits", "mine_quant.DoubledDigits")
    assert doubled != digits
    files = {"method/mine": METHOD, "posterior/by_input": POSTERIOR, "dataset/doubled": doubled}
    for name, text in files.items():
        file = path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def run(folder: Path, *overrides: str) -> dict:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [sys.executable, str(ROOT / "run.py"), "--config-dir", str(folder / "conf"), *RUN, *overrides]
    places = [f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}"]
    before = set((folder / "results").glob("*/result.json"))
    done = subprocess.run([*command, *places], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (new,) = set((folder / "results").glob("*/result.json")) - before
    result: dict = json.loads(new.read_text())
    return result | {"folder": new.parent}


def test_a_method_and_its_statistic(folder: Path):
    mine = run(folder, "method=mine", "dataset=digits")
    plain = run(folder, "method=rtn", "method.clip=mse", "dataset=digits")
    assert mine["method"] == "mine" and mine["q/kl_to_fp"] == plain["q/kl_to_fp"] > 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "analysis", str(folder / "results"), "--output", str(folder / "paper")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert any("My own" in table.read_text() for table in (folder / "paper").glob("*.md"))


def test_a_posterior(folder: Path):
    """It allocates for a baseline and rounds for BayesQ, and its risks are in the tables."""
    result = run(folder, "method=bayesq", "posterior=by_input", "dataset=digits")
    with (result["folder"] / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["achieved_risk"]) > 0 and float(row["prior_precision"]) == 1 for row in rows)
    assert (
        run(folder, "method=rtn", "allocator=knapsack", "posterior=by_input", "dataset=digits")["posterior"]
        == "by_input"
    )


def test_a_kind_of_output(folder: Path):
    doubled, plain = (run(folder, "method=rtn", f"dataset={name}", "bits=4") for name in ("doubled", "digits"))
    assert doubled["q/kl_to_fp"] == pytest.approx(2 * plain["q/kl_to_fp"], rel=1e-12)
