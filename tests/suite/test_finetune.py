"""The fine-tuning helper on tiny encoders and synthetic files: it learns, repeats itself, and says what is missing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from glue_files import write_tsv
from tiny_bert import tiny_bert

from bayesq.evaluation import logits
from bayesq.suite import finetune
from bayesq.suite.datasets.glue import Glue
from bayesq.suite.errors import UserError
from bayesq.suite.finetune import Recipe
from bayesq.suite.models.transformers_model import TransformersClassifier

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="fine-tuning needs the package accelerate"
)
FAST = Recipe(epochs=12, learning_rate=3e-3, batch_size=8, max_length=32)


def sentiment(root: Path) -> None:
    """SST-2 whose label is a word of the sentence."""
    (root / "SST-2").mkdir()
    for split, count in (("train", 96), ("dev", 32)):
        rows = [f"the {('bad', 'good')[i % 2]} film number {i % 30}\t{i % 2}" for i in range(count)]
        (root / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows))


@needs_accelerate
@pytest.mark.slow
def test_a_checkpoint_that_the_suite_reads(tmp_path, capsys):
    sentiment(tmp_path)
    tiny_bert(tmp_path / "encoder", 2, kind="encoder")
    numbers = [f"--{name.replace('_', '-')}={value}" for name, value in vars(FAST).items()]
    places = [f"--root={tmp_path}", f"--encoder={tmp_path / 'encoder'}"]
    for output in ("one", "two"):
        finetune.main(["--task=sst2", *places, f"--output={tmp_path / output}", *numbers])
    assert "accuracy 100.00" in capsys.readouterr().out
    kept = json.loads((tmp_path / "one" / "dev.json").read_text())
    assert kept["task"] == "sst2" and kept["accuracy"] == 1 and kept["seed"] == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    assert not [path for path in (tmp_path / "one").rglob("*") if path.suffix in (".bin", ".pt")]

    data = Glue(str(tmp_path), "sst2", split_seed=0, calibration_pool=4).load(tmp_path)
    network = TransformersClassifier(32, checkpoint=str(tmp_path / "one")).build(data, tmp_path)
    assert network.description["label_order"] == "names in the checkpoint"
    out, _ = logits(network.module, network.encode(data.evaluation), 8, torch.device("cpu"), "test")
    assert torch.equal(out.argmax(1), data.evaluation.labels)


@needs_accelerate
@pytest.mark.slow
def test_scores_are_learnt_too(tmp_path):
    write_tsv(tmp_path, "stsb")
    tiny_bert(tmp_path / "encoder", 2, kind="encoder")
    recipe = Recipe(epochs=1, max_length=32)
    scores = finetune.finetune("stsb", str(tmp_path), str(tmp_path / "encoder"), tmp_path / "out", recipe)
    assert set(scores) == {"pearson", "spearman"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] in (None, "regression")
    data = Glue(str(tmp_path), "stsb", split_seed=0, calibration_pool=4).load(tmp_path)
    TransformersClassifier(32, checkpoint=str(tmp_path / "out")).build(data, tmp_path)


def test_without_accelerate(monkeypatch, tmp_path):
    sentiment(tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit) as left:
        finetune.main(["--task=sst2", f"--root={tmp_path}", "--encoder=x", f"--output={tmp_path}"])
    assert str(left.value) == "error: fine-tuning needs the package accelerate: run `python -m pip install accelerate`"


@needs_accelerate
def test_an_encoder_that_cannot_be_read(tmp_path):
    sentiment(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^--encoder .*: cannot be read") as caught:
        finetune.finetune("sst2", str(tmp_path), str(tmp_path), tmp_path / "out", FAST)
    assert "\n" not in str(caught.value)
