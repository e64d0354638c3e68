"""What a run calls its model when its size was changed."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bayesq.defaults import conf_dir
from bayesq.suite import composition
from bayesq.suite.labels import model_label
from bayesq.suite.tracking import identity

FILES = {
    "resnet": ["dataset=digits"],
    "cifar_resnet": ["dataset=cifar10", "dataset.root=x", "model.checkpoint=y"],
    "text": ["dataset=glue", "dataset.task=sst2", "dataset.root=x"],
    "photos": ["dataset=imagenet", "dataset.root=x"],
    "windows": ["dataset=wikitext", "dataset.root=x"],
}
LANGUAGE = {"causal_lm", "smollm2_135m", "tiny_stories"}
TEXT = {"minilm", "mpnet_base", "bert_base", "transformers"}


def job(*overrides: str) -> composition.Job:
    (found,) = composition.preflight([*overrides, "results_dir=out"]) or []
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data(model: str) -> list[str]:
    """A data set for a model."""
    if model in LANGUAGE:
        return FILES["windows"]
    kind = "cifar_resnet" if model.startswith("cifar") else model if model == "resnet" else "photos"
    return FILES["text" if model in TEXT else kind]


@pytest.mark.parametrize("model", sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml")))
def test_a_model_as_its_file_has_it_is_called_by_its_name(model: str) -> None:
    given = ["model.name=resnet34"] if model == "timm" else []
    given += ["model.checkpoint=x"] if model == "tiny_stories" else []
    name = "resnet34" if model == "timm" else model
    assert model_label(job(f"model={model}", *data(model), *given).config) == name


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["model=cifar_resnet56", "model.depth=44"], "cifar_resnet56(depth=44)"),
        (["model=cifar_resnet20", "model.depth=32"], "cifar_resnet20(depth=32)"),
        (["model=resnet", "model.depths=[2,2,2,2]"], "resnet(depths=[2,2,2,2])"),
        (["model=resnet", "model.epochs=2", "model.image_size=64"], "resnet(image_size=64)"),
        (["model=efficientnet_lite0", "model.variant=2"], "efficientnet_lite0(variant=2)"),
        (["model=resnet18", "model.image_size=128"], "resnet18(image_size=128)"),
        (["model=vit_small", "model.architecture=vit_tiny"], "vit_small(architecture=vit_tiny)"),
        (["model=timm", "model.name=resnet18", "model.image_size=64"], "resnet18(image_size=64)"),
        (["model=minilm", "model._target_=my.Net"], "minilm(_target_=my.Net)"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_changed_network_says_what_was_changed(overrides: list[str], label: str) -> None:
    config = job(*overrides, *data(overrides[0].removeprefix("model="))).config
    assert model_label(config) == label
    arguments = identity(OmegaConf.create(config))
    changed = label[label.index("(") :]
    assert label in arguments["group"] and label in arguments["tags"]
    assert arguments["config"]["model"] == config["model"]["name"], "the configuration stays what it is"
    assert arguments["name"].endswith(f"-s0{changed}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=resnet", "model.epochs=1", "model.training_seed=3"],
        ["model=minilm", "model.checkpoint=x", "model.max_length=64"],
        ["model=resnet50", "model.checkpoint=mine.pt"],
        ["model=resnet34", "model.revision=null"],
        ["model=bert_base", "model.checkpoint=x", "model.label_order=[a,b]"],
    ],
    ids=" ".join,
)
def test_other_weights_or_inputs_are_no_other_network(overrides: list[str]) -> None:
    name = overrides[0].removeprefix("model=")
    assert model_label(job(*overrides, *data(name)).config) == name


def test_models_of_the_users_are_called_as_they_say(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    target = "bayesq.suite.models.resnet.SmallResNet"
    sizes = "depths: [2, 1, 1, 1]\nchannels: [8, 8, 8, 8]\nimage_size: 32\nepochs: 1\ntraining_seed: 0\n"
    (folder / "wide.yaml").write_text(f"name: wide\ntasks: [image classification]\n_target_: {target}\n{sizes}")
    assert model_label(job("--config-dir", "mine", "model=wide", "dataset=digits").config) == "wide"
