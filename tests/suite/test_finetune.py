"""The fine-tuning helper on tiny encoders and synthetic files: it learns, repeats itself, and says what is missing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from glue_files import write_tsv
from safetensors.torch import load_file
from tiny_bert import tiny_bert
from tiny_mpnet import write_files, write_packages

from bayesq.evaluation import logits
from bayesq.suite import finetune
from bayesq.suite.datasets.glue import Glue
from bayesq.suite.errors import UserError
from bayesq.suite.finetune import Recipe
from bayesq.suite.models import mpnet
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


def trained(tmp_path: Path, way: str, encoder: str, *given: str) -> dict:
    """dev.json of a short training on the synthetic SST-2."""
    sentiment(tmp_path)
    numbers = ["--epochs=12", "--learning-rate=0.01", "--batch-size=8", "--max-length=32"]
    places = [f"--root={tmp_path}", f"--encoder={encoder}", f"--output={tmp_path / 'out'}"]
    finetune.main(["--task=sst2", *places, f"--train={way}", *numbers, *given])
    return json.loads((tmp_path / "out" / "dev.json").read_text())


@needs_accelerate
@pytest.mark.slow
@pytest.mark.parametrize("way", ["bitfit", "lora"])
def test_a_small_delta_of_mpnet(tmp_path, monkeypatch, way):
    """model.adapter= gives the network that was scored; the files hold nothing but what was trained."""
    if way == "lora":
        pytest.importorskip("peft")
    write_files(tmp_path / "files")
    archive = write_packages(tmp_path / "site", tmp_path / "files", dict(mpnet.ARCHIVE.packages))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(mpnet, "ARCHIVE", archive)
    monkeypatch.setenv("BAYESQ_CACHE_DIR", str(tmp_path / "cache"))
    kept = trained(tmp_path, way, "mpnet_base", "--examples=64")
    assert kept["train"] == way and kept["trained_on"] == 64 and kept["accuracy"] > 0.9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["delta.safetensors", "dev.json"]

    data = Glue(str(tmp_path), "sst2", split_seed=0, calibration_pool=4).load(tmp_path)
    network = mpnet.MPNet(32, str(tmp_path / "out")).build(data, tmp_path / "cache")
    out, _ = logits(network.module, network.encode(data.evaluation), 8, torch.device("cpu"), "test")
    assert (out.argmax(1) == data.evaluation.labels).float().mean() == kept["accuracy"]

    delta = load_file(tmp_path / "out" / "delta.safetensors")
    package = {f"mpnet.{name}": x for name, x in load_file(tmp_path / "files" / "model.safetensors").items()}
    state = network.module.model.state_dict()
    changed = {name for name, x in state.items() if not torch.equal(x, package.get(name, torch.zeros(0)))}
    assert {name.removesuffix(".lora_A").removesuffix(".lora_B") for name in delta} >= changed
    tables = {name for name in state if name.endswith(("embeddings.weight", "relative_attention_bias.weight"))}
    assert len(tables) == 3 and not changed & tables
    if way == "lora":
        pairs = [name.removesuffix(".lora_A") for name in delta if name.endswith(".lora_A")]
        assert len(pairs) == 12 and all(delta[f"{name}.lora_A"].shape[0] == 8 for name in pairs)
        assert set(pairs) <= changed and all(name.startswith("classifier.") for name in changed - set(pairs))
    else:
        assert all(name.startswith("classifier.") or name.endswith("bias") or "LayerNorm" in name for name in changed)


@needs_accelerate
@pytest.mark.slow
def test_bitfit_of_another_encoder_leaves_a_whole_checkpoint_too(tmp_path):
    tiny_bert(tmp_path / "encoder", 2, kind="encoder")
    kept = trained(tmp_path, "bitfit", str(tmp_path / "encoder"))
    delta, whole, start = (
        load_file(tmp_path / folder)
        for folder in ("out/delta.safetensors", "out/model.safetensors", "encoder/model.safetensors")
    )
    assert kept["trained_on"] == 96 and all(torch.equal(whole[name], x) for name, x in delta.items())
    frozen = whole.keys() - delta.keys()
    assert frozen and all(torch.equal(whole[name], start[name.removeprefix("bert.")]) for name in frozen)


@needs_accelerate
@pytest.mark.parametrize("count", [0, 97])
def test_an_impossible_number_of_examples(tmp_path, count):
    sentiment(tmp_path)
    with pytest.raises(UserError, match=rf"^--examples {count}: choose 1 to 96, the number of training examples$"):
        finetune.finetune("sst2", str(tmp_path), "x", tmp_path / "out", FAST, examples=count)


@needs_accelerate
def test_a_task_without_a_training_file(tmp_path):
    sentiment(tmp_path)
    (tmp_path / "SST-2" / "train.tsv").unlink()
    with pytest.raises(UserError, match=r"^--task sst2: .* has no training file, only dev examples"):
        finetune.finetune("sst2", str(tmp_path), "x", tmp_path / "out", FAST)


def test_the_learning_rate_follows_what_is_trained(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(finetune, "finetune", lambda *given: seen.append(given[4:]) or {"accuracy": 1.0})
    places = ["--task=sst2", "--encoder=x", f"--output={tmp_path}"]
    for more in ([], ["--train=bitfit"], ["--train=lora", "--learning-rate=0.5", "--examples=7"]):
        finetune.main([*places, *more])
    assert [(recipe.learning_rate, *rest) for recipe, *rest in seen] == [
        (2e-5, "all", None),
        (1e-3, "bitfit", None),
        (0.5, "lora", 7),
    ]
    assert seen[0][0] == Recipe()


@needs_accelerate
def test_an_encoder_that_cannot_be_read(tmp_path):
    sentiment(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^--encoder .*: cannot be read") as caught:
        finetune.finetune("sst2", str(tmp_path), str(tmp_path), tmp_path / "out", FAST)
    assert "\n" not in str(caught.value)
