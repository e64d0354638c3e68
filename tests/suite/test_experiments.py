"""Files of conf/experiment: each composes from the command line, those for images run on a small part of their data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import load_results
from PIL import Image

from bayesq.suite import cli
from bayesq.suite.datasets.imagenet import ImageNet, wnids
from bayesq.suite.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# what an experiment leaves to the command line, for those that leave anything
GIVEN = {
    "rn50_imagenet": ["dataset.root=photos"],
    "efficientnet_lite0": ["dataset.root=photos"],
    "cifar_resnet56": ["dataset.root=cifar", "model.checkpoint=resnet56.th"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_an_image_experiment_composes(name: str) -> None:
    assert name in EXPERIMENTS
    jobs = cli.preflight([f"+experiment={name}", *GIVEN[name], "seed=3"])
    assert jobs is not None
    assert (len(jobs), jobs[0].config["seed"], jobs[0].config["model"]["tasks"]) == (1, 3, ["image classification"])


@pytest.mark.parametrize(("name", "model"), [("smollm2_wikitext", "smollm2_135m"), ("llama_wikitext", "causal_lm")])
def test_an_experiment_with_a_language_model_composes(name: str, model: str) -> None:
    (job,) = cli.preflight([f"+experiment={name}", "dataset.root=text", "calibration.source=c4.txt"]) or []
    assert job.config["dataset"]["calibration_source"] == "c4.txt"
    assert (job.config["calibration"]["examples"], job.config["evaluation"]["batch_size"]) == (128, 1)
    assert job.config["model"]["_target_"].startswith(f"bayesq.suite.models.{model.partition('_135m')[0]}")


def test_resnet50_calibrates_on_1024_photos_of_imagenet() -> None:
    (job,) = cli.preflight(["+experiment=rn50_imagenet", "dataset.root=photos"]) or []
    model, dataset = job.config["model"], job.config["dataset"]
    assert (model["name"], model["architecture"], dataset["name"]) == ("resnet50", "resnet50.tv_in1k", "imagenet")
    assert job.config["calibration"]["examples"] == dataset["calibration_pool"] == 1024


def test_an_ablation_switches_also_what_the_experiment_sets() -> None:
    files = ["model.checkpoint=resnet56.th", "dataset.root=cifar"]
    for experiment in ("+experiment=cifar_resnet56", "experiment=cifar_resnet56"):
        (job,) = cli.preflight([experiment, "ablation=examples_64", *files]) or []
        assert job.config["calibration"]["examples"] == 64
    (job,) = cli.preflight(["+experiment=cifar_resnet56", "ablation=refits_0", *files]) or []
    assert job.config["method"]["refits"] == 0 and job.config["calibration"]["examples"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=rn50_imagenot"], r"^experiment=rn50_imagenot: choose one of .*; did you mean 'rn50_imagenet'\?"),
        (["+experiment=rn50_imagenet", "dataset.root=a", "dataset.rot=b"], r"unknown key 'dataset\.rot'"),
        (["+experiment=cifar_resnet56", "dataset.root=a"], r"^model\.checkpoint has no default"),
        (["model=timm", "dataset=imagenet", "dataset.root=a"], r"^model\.name has no default: add model\.name=VALUE"),
    ],
)
def test_what_is_missing_or_wrong_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.preflight(arguments)


@pytest.mark.parametrize(("root", "hub"), [("a", "b/c"), (None, None)])
def test_photos_come_from_one_place(root: str | None, hub: str | None) -> None:
    with pytest.raises(UserError, match=r"needs either dataset\.root=DIR or dataset\.hub=REPOSITORY"):
        ImageNet(root, split_seed=0, calibration_pool=1, seed=0, hub=hub)


def photos(folder: Path, train: bool) -> None:
    """A tree of two classes with real JPEG files, as an ImageNet of one's own has them."""
    generator = np.random.default_rng(0)
    for split in ("val", "train") if train else ("val",):
        for number in (3, 700):
            below = folder / split / wnids()[number]
            below.mkdir(parents=True)
            for row in range(6):
                coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(below / f"{row}.JPEG")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments, "cache_dir=cache", "wandb.mode=disabled"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# a small network in the place of ResNet-50 and rounding in the place of BayesQ: the rest is the experiment's
SMALL = [
    "model.architecture=test_resnet.r160_in1k",
    "model.checkpoint=weights.pt",
    "model.image_size=32",
    "dataset.calibration_pool=6",
    "calibration.examples=4",
    "calibration.batch_size=2",
]


def weights(classes: int) -> None:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model("test_resnet", num_classes=classes).state_dict(), "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_the_imagenet_experiment_runs_on_a_small_tree(train: bool) -> None:
    photos(Path("photos"), train)
    weights(1000)
    done = command("+experiment=rn50_imagenet", "dataset.root=photos", "method=gptq", *SMALL)
    assert done.returncode == 0, done.stderr
    (result,) = load_results(Path("results"))
    changed = "resnet50(architecture=test_resnet.r160_in1k,image_size=32)"  # another network than the experiment's
    assert (result["model"], result["dataset"]) == (changed, "imagenet")
    assert result["calibration/examples"] == 4
    assert result["evaluation/examples"] == (12 if train else 6)
    source = result["source"]
    assert source["dataset"]["calibration_from"] == ("train" if train else "val")
    assert source["model"]["image_size"] == [32, 32] and source["model"]["crop_pct"] == 0.95
    assert source["model"]["architecture"] == "timm test_resnet.r160_in1k"
    assert {len(source[part]) for part in ("weights", "calibration", "evaluation")} == {64}
    assert len({source[part] for part in ("weights", "calibration", "evaluation")}) == 3


@pytest.mark.slow
def test_a_damaged_photo_fails_the_run_in_one_line() -> None:
    photos(Path("photos"), train=False)
    damaged = Path("photos/val") / wnids()[3] / "2.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:200])
    weights(1000)
    done = command("+experiment=rn50_imagenet", "dataset.root=photos", "method=rtn", *SMALL)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {damaged} is not a readable photo") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data and weights of {SHARED}")
@pytest.mark.parametrize("name", ["cifar_resnet56", "efficientnet_lite0"])
def test_the_experiments_with_published_weights_run_on_a_small_part(name: str) -> None:
    given = {
        "cifar_resnet56": [
            f"dataset.root={SHARED}/data/cifar10",
            f"model.checkpoint={SHARED}/models/cifar10/resnet56-4bfd9763.th",
        ],
        "efficientnet_lite0": [f"dataset.root={SHARED}/data/imagenet_nips2017"],
    }[name]
    small = ["dataset.limit=20", "calibration.examples=8", "method=rtn", "bits=8"]
    done = command(f"+experiment={name}", *given, *small)
    assert done.returncode == 0, done.stderr
    (result,) = load_results(Path("results"))
    assert result["evaluation/examples"] == 20 and result["q/agreement"] >= 0.9
    assert json.loads((Path("results") / result["run_id"] / "result.json").read_text())["status"] == "finished"
