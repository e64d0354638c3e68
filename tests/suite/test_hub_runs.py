"""The workloads of the hub as a user starts them: `run.py` in processes of their own, against a hub on loopback."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from glue_files import write_parquet
from hub_server import HubServer, serving
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from tiny_bert import tiny_bert

from bayesq.files import file_sha256
from bayesq.suite.models.base import state_checksum

ROOT = Path(__file__).parents[2]
BERT, GLUE = "textattack/bert-base-uncased-SST-2", "datasets/nyu-mll/glue"
RESNET, IMAGENET = "timm/resnet50.tv_in1k", "datasets/ILSVRC/imagenet-1k"
TRAP = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nraise SystemExit('executed')\n"

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


def command(folder: Path, *arguments: str) -> list[str]:
    """A short run with results, cache and the hub's cache in a folder."""
    places = [f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}", "wandb.mode=disabled"]
    return [sys.executable, str(ROOT / "run.py"), "method=rtn", "bits=4", *places, *arguments]


def run(hub: HubServer, folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(folder / "home", **more)
    return subprocess.run(command(folder, *arguments), env=environment, capture_output=True, text=True, timeout=300)


def result(folder: Path, seed: int) -> dict[str, Any]:
    """The result of the only run with a seed."""
    found = [json.loads(file.read_text()) for file in (folder / "results").glob("*/result.json")]
    (one,) = (content for content in found if content["seed"] == seed)
    return one


def pinned(file: str, *keys: str) -> str:
    """The commit in a YAML file of `conf`."""
    content = yaml.safe_load((ROOT / "conf" / file).read_text())
    for key in keys:
        content = content[key]
    return str(content).rpartition("@")[2]


def test_bert_and_glue_come_from_the_commits_in_the_yaml(hub: HubServer, tmp_path: Path) -> None:
    """Also: the same numbers as from folders, a second run without a connection, and no code of a repository."""
    sizes = {"max_position_embeddings": 128}
    bert, glue = tiny_bert(tmp_path / "bert", 2, **sizes), tmp_path / "glue"
    write_parquet(glue, "sst2")
    config = json.loads((bert / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.Trap", "AutoModelForSequenceClassification": "trap.Trap"}
    (bert / "config.json").write_text(json.dumps(config))
    for trap in (bert / "trap.py", glue / "glue.py", bert / "pytorch_model.bin"):
        trap.write_text(TRAP)
    commits = pinned("model/bert_base.yaml", "hub", "sst2"), pinned("dataset/glue.yaml", "revision")
    hub.publish(BERT, bert, commit=commits[0])
    hub.publish(GLUE, glue, commit=commits[1])
    hub.publish(BERT, tiny_bert(tmp_path / "moved", 2, seed=1, **sizes))  # main has moved
    (tmp_path / "moved" / "sst2").mkdir()
    hub.publish(GLUE, tmp_path / "moved")

    workload = ("experiment=bert_glue", "dataset.task=sst2", "calibration.examples=8")
    done = run(hub, tmp_path, *workload)
    assert done.returncode == 0, done.stderr
    assert "HTTP" not in done.stdout  # no line for each request
    asked = [re.findall("/(?:resolve|tree|revision)/([^/]+)", request.path) for request in hub.requests]
    assert {revision for found in asked for revision in found} == set(commits)
    assert not [request for request in hub.requests if request.path.endswith((".py", ".bin"))]
    assert not list(tmp_path.rglob("executed"))

    hub.requests.clear()
    again = run(hub, tmp_path, *workload, "seed=1", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.requests == []

    local = tmp_path / "local"
    done = run(hub, local, *workload, f"model.checkpoint={bert}", f"dataset.root={glue}")
    assert done.returncode == 0, done.stderr
    first, second, third = result(tmp_path, 0), result(tmp_path, 1), result(local, 0)
    assert (first["source"]["model"]["revision"], first["source"]["dataset"]["revision"]) == commits
    files = [glue / "sst2" / f"{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    assert first["source"]["dataset"]["sha256"] == ", ".join(map(file_sha256, files))
    for key in ("weights", "evaluation"):
        assert first["source"][key] == second["source"][key] == third["source"][key]
    for key in ("fp/accuracy", "q/accuracy", "q/kl_to_fp"):
        assert first[key] == third[key]


def photos(file: Path, first: int) -> None:
    """A parquet file of four photos of noise with the labels `first`, `first` + 1, ..."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for seed in range(first, first + 4):
        picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8))
        picture.save(file.with_suffix(".png"))
        rows.append({"bytes": file.with_suffix(".png").read_bytes(), "path": None})
    file.with_suffix(".png").unlink()
    pq.write_table(pa.table({"image": rows, "label": list(range(first, first + 4))}), file)


def resnet50(folder: Path) -> torch.nn.Module:
    """A ResNet-50 with random weights, saved as on the hub."""
    import timm
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = timm.create_model("resnet50")
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    return module


def test_resnet_50_and_imagenet_after_a_kill_and_a_cut(hub: HubServer, tmp_path: Path) -> None:
    """A killed run goes on with the files that it lacks, a cut file where it stopped; then without a connection."""
    module = resnet50(tmp_path / "resnet50")
    (tmp_path / "imagenet" / "data").mkdir(parents=True)
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
    for number, name in enumerate(names):
        photos(tmp_path / "imagenet" / "data" / f"{name}.parquet", 100 * number)
    (tmp_path / "imagenet" / "imagenet-1k.py").write_text(TRAP)
    commits = pinned("model/resnet50.yaml", "revision"), pinned("dataset/imagenet.yaml", "revision")
    hub.publish(RESNET, tmp_path / "resnet50", commit=commits[0])
    hub.publish(IMAGENET, tmp_path / "imagenet", commit=commits[1])
    hub.repositories[IMAGENET].readers = frozenset({"hf_reader"})
    token = {"HF_TOKEN": "hf_reader"}
    few = ("dataset.calibration_pool=4", "calibration.examples=4")
    workload = ("experiment=rn50_imagenet", "dataset.hub=ILSVRC/imagenet-1k", *few)

    def cached(name: str) -> object:
        """The path of a data file that has been downloaded whole, or None."""
        where = {"repo_type": "dataset", "revision": commits[1], "cache_dir": tmp_path / "home" / "hub"}
        return try_to_load_from_cache("ILSVRC/imagenet-1k", f"data/{name}.parquet", **where)

    hub.stalls = f"{names[2]}.parquet"
    environment = hub.environment(tmp_path / "home", **token)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(tmp_path, *workload), env=environment, **quiet) as process:
        assert hub.stalled.wait(120)
        while cached(names[0]) is None:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert cached(names[2]) is None

    hub.cuts["model.safetensors"] = 40_000_000
    done = run(hub, tmp_path, *workload, **token)
    assert done.returncode == 0, done.stderr
    assert len(hub.downloads(f"{names[0]}.parquet")) == 1
    assert len(hub.downloads(f"{names[2]}.parquet")) == 2  # the half of the killed run, and all of it
    assert [request.status for request in hub.downloads("model.safetensors")] == [200, 206]
    assert not hub.downloads(f"{names[1]}.parquet") and not hub.downloads(".py")

    hub.requests.clear()
    again = run(hub, tmp_path, *workload, "seed=1", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.requests == []
    for seed in (0, 1):
        source = result(tmp_path, seed)["source"]
        assert (source["model"]["revision"], source["dataset"]["revision"]) == commits
        assert source["dataset"]["calibration_from"] == "train"
        assert source["weights"] == state_checksum(module)


def test_what_the_hub_refuses_is_one_line_for_each_run(hub: HubServer, tmp_path: Path) -> None:
    """Gated and missing repositories, and a missing revision."""
    tiny_bert(tmp_path / "bert", 2)
    write_parquet(tmp_path / "glue", "sst2")
    commit = pinned("dataset/glue.yaml", "revision")
    for name, folder in (("org/gated", "bert"), ("datasets/org/gated", "glue")):
        hub.publish(name, tmp_path / folder, commit=commit)
        hub.repositories[name].readers = frozenset()
    hub.publish(GLUE, tmp_path / "glue")  # without the commit that the YAML names
    gated = "it is gated: accept its terms on the hub and log in with `hf auth login`"
    absent = "there is no such repository, or none that you may read"
    text = ("-m", "experiment=bert_glue", "dataset.task=sst2")
    for key, arguments, reasons in (
        ("dataset.hub", ["dataset.hub=org/gated,org/absent,nyu-mll/glue"], [gated, absent, "it has no such revision"]),
        ("model.name", ["model=transformers", "model.name=org/gated,org/absent"], [gated, absent]),
    ):
        local = [f"dataset.root={tmp_path / 'glue'}", "calibration.examples=8"] if key == "model.name" else []
        done = run(hub, tmp_path, *text, *arguments, *local, HF_TOKEN="hf_stranger")
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        for line, reason in zip(lines, reasons, strict=True):
            assert re.match(rf"error: {key}=\S+ could not be read from the hub \({re.escape(reason)}\): give ", line)


def test_a_data_set_of_the_hub_by_its_id(hub: HubServer, tmp_path: Path) -> None:
    """Texts from the hub's conversion and from the authors' files, a second run offline, and what does not fit."""
    rows = pd.DataFrame({"sentence": [f"film {i}" for i in range(40)], "mark": ["bad", "good"] * 20})
    for split, part in (("train", rows[:30]), ("validation", rows[30:])):
        (tmp_path / "converted" / "default" / split).mkdir(parents=True)
        part.to_parquet(tmp_path / "converted" / "default" / split / "0000.parquet", index=False)
    (tmp_path / "stored").mkdir()
    rows.to_csv(tmp_path / "stored" / "train.csv", index=False)
    for name in ("datasets/me/films", "datasets/me/gated"):
        hub.publish(name, tmp_path / "converted", branch="refs/convert/parquet")
    hub.repositories["datasets/me/gated"].readers = frozenset({"hf_reader"})
    hub.publish("datasets/me/stored", tmp_path / "stored")
    bert = tiny_bert(tmp_path / "bert", 2, ["good", "bad"], max_position_embeddings=128)
    workload = ("model=transformers", f"model.checkpoint={bert}", "dataset=hub", "calibration.examples=8")
    columns = ("dataset.text=sentence", "dataset.label=mark")

    for seed, more in enumerate(({}, {"HF_HUB_OFFLINE": "1"})):
        hub.requests.clear()
        done = run(hub, tmp_path, *workload, *columns, "dataset.name=me/films", f"seed={seed}", **more)
        assert done.returncode == 0, done.stderr
        assert result(tmp_path, seed)["evaluation/examples"] == 10
    assert hub.requests == []
    stored = ("dataset.name=me/stored", "dataset.revision=main", "dataset.val=null")
    done = run(hub, tmp_path, *workload, *columns, *stored, "seed=2")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path, 2)["evaluation/examples"] == 8

    again = "dataset.revision=main reads the files that its authors stored"
    for arguments, reasons in (
        (
            ("-m", *columns, "dataset.name=me/gated,me/absent,me/stored"),
            (rf"it is gated: .*{again}", rf"there is no such repository.*{again}", rf"has no such revision\): {again}"),
        ),
        (
            ("-m", *columns, "dataset.name=me/films", "dataset.val=test,validation", "dataset.subset=null,tiny"),
            (
                r"dataset.val=test: there is no such split .*; it has default/train, default/validation",
                *[r"dataset.train=train: there is no such split .* dataset.subset=tiny.*; it has default/train, "] * 2,
            ),
        ),
        (
            ("-m", "dataset.name=me/films", "dataset.text=sentnce,sentence"),
            (r"dataset.text=sentnce: .* did you mean 'sentence'\?", r"dataset.label=label: .* but sentence, mark"),
        ),
    ):
        done = run(hub, tmp_path, *workload, *arguments, "seed=1")
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        for line, reason in zip(lines, reasons, strict=True):
            assert re.search(reason, line), line
