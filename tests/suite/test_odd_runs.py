"""Whole runs of networks that use their weights in unusual ways: from a config to a packed file that loads again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import odd_networks as odd
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from odd_networks import seeded
from test_odd_statistics import NETWORKS
from torch import nn

from bayesq.batches import TensorExamples
from bayesq.defaults import conf_dir
from bayesq.quant.file import read_packed
from bayesq.suite import composition, runner
from bayesq.suite.errors import UserError
from bayesq.suite.export import export
from bayesq.suite.loading import load_quantized
from bayesq.suite.models.base import Network

EXTRA = {
    "unused": lambda: Unused(),
    "tied tables": lambda: TiedTables(),
    "normalised": odd.Normalised,
    "concatenated": odd.Concatenated,
}


class Unused(odd.Plain):
    def __init__(self) -> None:
        super().__init__()
        self.dark = nn.Linear(300, 300)


class TiedTables(odd.Plain):
    """Two embeddings that share a table of four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(4, odd.WIDTH), nn.Embedding(4, odd.WIDTH)
        self.second.weight = self.first.weight

    def body(self, x):
        positions = torch.arange(x.shape[1])
        return self.odd(x + self.first(positions)) * self.second(positions)


class OddModel:
    """A network of `odd_networks` with ten classes; reads pixels of digits as four vectors of six."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def build(self, data: Any, cache_dir: Path) -> Network:
        module = self.bare({})
        return Network(module, self.encode, {"architecture": self.kind})

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        def ten() -> nn.Module:
            network = {**NETWORKS, **EXTRA}[self.kind]()
            network.head = nn.Linear(odd.WIDTH, 10)
            return network

        return seeded(ten)

    @staticmethod
    def encode(examples: Any) -> TensorExamples:
        pixels = examples.inputs.flatten(1)[:, 16 : 16 + 4 * odd.WIDTH]
        return TensorExamples({"x": (pixels - 0.4).reshape(len(pixels), 4, odd.WIDTH) * 4}, examples.labels)


def run(kind: str, tmp_path: Path, *overrides: str, task: str = "image classification") -> dict[str, Any]:
    GlobalHydra.instance().clear()
    (tmp_path / "cache").mkdir(exist_ok=True)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(
            composition.CONFIG_NAME,
            [
                "model=resnet",
                "dataset=digits",
                f"results_dir={tmp_path}/results",
                f"cache_dir={tmp_path}/cache",
                "wandb.mode=disabled",
                "calibration.examples=32",
                "dataset.limit=64",
                *overrides,
            ],
        )
    cfg.model = {
        "name": kind.replace(" ", "-"),
        "tasks": [task],
        "_target_": f"{__name__}.OddModel",
        "kind": kind,
    }
    return runner.run(cfg)


def test_a_model_is_not_run_on_another_task(tmp_path):
    line = "dataset=digits is for image classification, but model=loop is for text regression: choose a dataset and"
    with pytest.raises(UserError, match=line):
        run("loop", tmp_path, "method=rtn", task="text regression")


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "bayesq"])
def test_every_method_quantizes_them_and_the_file_loads_again(kind, method, tmp_path):
    result = run(kind, tmp_path, f"method={method}", "correction=none", "bits=4")
    assert result["q/kl_to_fp"] < 1 and result["bits/code"] <= 4 + 1e-9
    assert result["fallback/unseen_layers"] == 0 and result["quantized/share"] > 0.5
    file = tmp_path / "results" / result["run_id"] / "quantized.safetensors"
    expected = {"odd", "head", "rare"} if kind == "rare" else {"odd", "head"}
    assert {name.partition(".")[0] for name in read_packed(file).tensors} == expected
    loaded = load_quantized(file, cache_dir=str(tmp_path / "cache"), trusted=[__name__])
    original = OddModel(kind).bare({}).state_dict()
    changed = {name for name, x in loaded.state_dict().items() if not torch.equal(x, original[name])}
    assert all("weight" in name or name == "odd.up" for name in changed) and "head.weight" in changed
    assert len(changed) > 1


@pytest.mark.parametrize("kind", ["loop", "content and positions", "experts", "self-attention", "Conv1D", "keywords"])
def test_with_every_switch(kind, tmp_path):
    switches = ["correction=moments", "distill=true", "proxy=mc", "method=bayesq", "bits=4", "posterior=ekfac"]
    result = run(kind, tmp_path, *switches, "monte_carlo.examples=16", "monte_carlo.samples=1")
    assert result["q/kl_to_fp"] < 1 and result["distill/heldout_kl_after"] <= result["distill/heldout_kl_before"]


def test_layers_that_nothing_reaches_stay_and_are_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        result = run("unused", tmp_path, "method=bayesq", "bits=4")
    assert "1 layers take no part in the forward pass and stay in full precision: dark" in caplog.text
    assert "largest of the rest: dark.weight (90,000)" in caplog.text
    assert result["fallback/unseen_layers"] == 1 and result["quantized/share"] < 0.01
    assert result["quantized/left_out"] == {"dark.weight": 90000}
    layers = pd.read_csv(tmp_path / "results" / result["run_id"] / "layers.csv")
    assert sorted(layers["name"]) == ["head", "odd"]
    assert json.loads((tmp_path / "results" / result["run_id"] / "result.json").read_text())["quantized/share"]


@pytest.mark.parametrize("kind", ["normalised", "concatenated"])
def test_weights_that_are_transformed_are_refused_before_the_long_work(kind, tmp_path):
    with pytest.raises(UserError, match=r"layer odd by .*layers\.exclude"):
        run(kind, tmp_path, "method=rtn", "bits=4")
    assert not list(tmp_path.glob("cache/statistics"))
    assert run(kind, tmp_path, "method=rtn", "bits=4", "layers.exclude=[odd]")["q/kl_to_fp"] >= 0


@pytest.mark.parametrize("kind", ["tied", "Conv1D", "transposed experts", "self-attention", "tied tables"])
def test_one_file_holds_the_whole_network_and_shared_weights_once(kind, tmp_path):
    include = ["layers.include_embeddings=true"] if kind == "tied tables" else []
    result = run(kind, tmp_path, "method=rtn", "bits=4", *include)
    folder = tmp_path / "results" / result["run_id"]
    original = load_quantized(folder / "quantized.safetensors", cache_dir=str(tmp_path / "cache"), trusted=[__name__])
    file, _ = export(folder, "packed", tmp_path / "whole.safetensors", trusted=[__name__])
    whole = load_quantized(file, trusted=[__name__])
    assert all(torch.equal(x, original.state_dict()[name]) for name, x in whole.state_dict().items())
    shared = {"tied": {"odd.weight", "again.weight"}, "tied tables": {"first.weight", "second.weight"}}.get(kind, set())
    assert shared <= set(whole.state_dict()) and not shared & set(read_packed(file).state)
