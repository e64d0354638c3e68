"""The outlook for a large network: bytes and operations against naive counts, on the meta device."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_lm import VOCABULARY
from torch.utils.flop_counter import FlopCounterMode

from bayesq.batches import TensorExamples
from bayesq.suite import outlook
from bayesq.suite.plan import make_recipe

ROOT = Path(__file__).parents[2]
WIDTH, INNER, BLOCKS = 128, 320, 3
CONFIG = {
    **{"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER},
    **{"num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
EXAMPLES, WINDOW = 8, 16
SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (320, 128), (320, 128), (128, 320)]  # rows, columns of a block


def test_bytes_and_operations() -> None:
    subject = outlook.subject_of(CONFIG, EXAMPLES, WINDOW)
    assert outlook.matrices(subject) == BLOCKS * SHAPES
    assert {x.device.type for x in subject.module.parameters()} == {"meta"}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["method=bayesq", "bits=3", "model=causal_lm", "dataset=text", "dataset.path=x"])
    recipe, statistics = make_recipe(cfg), outlook.statistics_of(subject, 0, 2, 2**40)
    found = outlook.memory(subject, recipe, statistics)
    weights = 4 * (WIDTH * VOCABULARY + WIDTH + BLOCKS * (2 * WIDTH + sum(r * c for r, c in SHAPES)))
    sums = 4 * BLOCKS * sum(r * r + c * c for r, c in SHAPES)
    hidden = 4 * EXAMPLES * WINDOW * WIDTH
    assert (found["GPU, statistics: weights"], found["GPU, statistics: sums of one pass"]) == (weights, sums)
    assert found["GPU, prefix: weights of both networks"] == 2 * weights
    assert found["GPU, prefix: inputs and outputs in one block"] == 2 * 512 * 2**20
    assert found["disk: inputs of two blocks"] == 0 and hidden < 512 * 2**20  # they stay in memory
    assert found["GPU, prefix: sums of the widest layer"] == 4 * 4 * INNER**2
    assert found["disk: statistics"] == sums
    for stage in ("GPU, statistics: ", "GPU, prefix: "):
        parts = [size for part, size in found.items() if part.startswith(stage)]
        assert found[f"{stage}sum"] == sum(parts) / 2
    # one pass, in which half of the examples have gradients
    counted = outlook.work(subject, recipe, statistics, EXAMPLES // 2)["GPU: statistics"]
    tokens = EXAMPLES * WINDOW
    with FlopCounterMode(display=False) as counter:
        assert isinstance(subject.examples, TensorExamples)
        mask = torch.ones(1, 1, WINDOW, WINDOW, dtype=torch.bool, device="meta")
        subject.module(input_ids=subject.examples.inputs["input_ids"], attention_mask=mask)
    forward = counter.get_total_flops()
    products = 2 * tokens * BLOCKS * sum(r * r / 2 + c * c for r, c in SHAPES)
    assert counted == pytest.approx(1.5 * forward + products, rel=0.05)
    # room for one layer at a time: inputs and gradients of each layer apart
    assert len(outlook.passes_of(recipe, outlook.statistics_of(subject, 0, 2, 1))) == 2 * len(subject.layers)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["outlook", str(file), "--set", "dataset.window=64"])
    outlook.main()
    printed = capsys.readouterr().out
    assert printed.count("| GPU") == 11 and "| (number of passes for statistics) " in printed
    monkeypatch.setattr(sys, "argv", ["outlook", "llama-2b"])
    with pytest.raises(SystemExit, match=r"^error: llama-2b: is neither llama-1b nor llama-8b nor a config\.json"):
        outlook.main()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, [], "config.json: has no model_type: give the config.json of a causal"),
        ([1], [], "config.json: has no model_type: give the config.json of a causal"),
        (CONFIG | {"num_attention_heads": 0}, [], r"config.json: no such network can be made \(ZeroDivisionError: "),
        (CONFIG, ["--teraflops", "0"], "--teraflops 0.0: choose a number above 0"),
        (CONFIG, ["--gpu-memory", "-5"], "--gpu-memory -5.0: choose a number above 0"),
        (CONFIG, ["--set", "foo=1"], "unknown key 'foo'"),
        (CONFIG, ["--set", "nonsense"], "cannot read 'nonsense': write key=value"),
        (CONFIG, ["--set", "method=nope"], "method=nope: choose one of "),
        (CONFIG, ["--set", "bits=99"], "bits=99: needs a number from 2 to 8"),
        (CONFIG, ["--set", "dataset=glue", "--set", "dataset.task=rte"], "calibration.source=.: dataset=glue has "),
    ],
)
def test_what_cannot_be_estimated_is_one_line(
    content: object, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["outlook", str(file), *options])
    with pytest.raises(SystemExit, match=rf"^error: .*{message}") as refused:
        outlook.main()
    assert "\n" not in str(refused.value)
