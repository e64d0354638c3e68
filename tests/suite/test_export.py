"""Packed files and exports of real runs: the same outputs bit for bit, other libraries' loaders, one-line errors."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from glue_files import write_tsv
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from layout_readers import read_gptq
from safetensors.torch import load_file, save_file
from tiny_bert import tiny_bert
from torch import Tensor, nn

import bayesq
from bayesq import evaluation
from bayesq.batches import EncodedExamples
from bayesq.errors import Refused
from bayesq.export import converted
from bayesq.likelihood import Likelihood
from bayesq.quant.file import read_packed
from bayesq.suite import config, export, loading, runner, schema
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.datasets.glue import TASKS
from bayesq.suite.errors import UserError
from bayesq.suite.models.timm_model import TimmModel
from bayesq.tensor_file import CorruptFile, read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data and weights of {SHARED}")
CPU = torch.device("cpu")
DIGITS = "model=resnet dataset=digits model.epochs=1 dataset.limit=50 calibration.examples=32"
BERT = (
    "model=transformers dataset=glue dataset.task=sst2 dataset.root={place}/data model.checkpoint={place}/models "
    "model.max_length=32 dataset.calibration_pool=20 calibration.examples=16"
)
DIGITS_RTN = f"{DIGITS} method=rtn bits=3"
DIGITS_FULL = f"{DIGITS} method=bayesq bits=2.5 correction=moments distill=true"
RTN3 = f"{BERT} method=rtn bits=3"
GPTQ4 = f"{BERT} method=gptq bits=4 method.group_size=16 layers.include_embeddings=true"
MOMENTS = f"{BERT} method=gptq bits=3.5 correction=moments"
AWQ = f"{BERT} method=awq bits=3"
FULL = f"{BERT} method=bayesq bits=2.5 layers.include_embeddings=true distill=true correction=moments"
LLOYD = f"{BERT} method=bayesq bits=3 method.levels=lloyd"
UNIFORM = f"{BERT} method=bayesq bits=3 method.levels=uniform distill=true"
SLOW = [pytest.param(run, marks=pytest.mark.slow) for run in (f"{DIGITS} method=awq bits=3", LLOYD, UNIFORM)]
RUNS = [DIGITS_RTN, DIGITS_FULL, RTN3, GPTQ4, MOMENTS, AWQ, FULL, *SLOW]


@dataclass(frozen=True)
class Recorded:
    """A finished run, and what its evaluation of the quantized network took and gave."""

    folder: Path
    result: dict
    examples: EncodedExamples
    batch_size: int
    logits: Tensor

    @property
    def file(self) -> Path:
        return self.folder / "quantized.safetensors"

    def again(self, module: nn.Module) -> Tensor:
        """What the same evaluation gives of another network."""
        return evaluation.logits(module, self.examples, self.batch_size, CPU, "")[0]


def recorded(place: Path, overrides: str, results: str = "results", cache: Path | None = None) -> Recorded:
    """Run a configuration in this process and listen to its evaluation."""
    places = [f"results_dir={place / results}", f"cache_dir={cache or place / 'cache'}", "wandb.mode=disabled"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides.format(place=place).split(), *places])
    GlobalHydra.instance().clear()
    schema.validate(cfg)
    heard: list[tuple] = []
    evaluate = evaluation.paired_rows

    def listen(
        full: Tensor, module: nn.Module, examples: EncodedExamples, likelihood: Likelihood, size: int, *more: object
    ) -> tuple[evaluation.Rows, int]:
        heard.append((examples, size, evaluation.logits(module, examples, size, CPU, "")[0]))
        return evaluate(full, module, examples, likelihood, size, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "paired_rows", listen)
        runner.run(cfg)
    folder = config.run_dir(cfg)
    return Recorded(folder, json.loads((folder / "result.json").read_text()), *heard[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GLUE files and a classifier whose layers have sizes that GPTQ tools take."""
    place = tmp_path_factory.mktemp("place")
    write_tsv(place / "data", "sst2")
    tiny_bert(place / "models", 2, TASKS["sst2"].classes, hidden_size=32, intermediate_size=64)
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Callable[[str], Recorded]:
    """A run with these overrides, made when first asked for."""
    return functools.cache(lambda overrides: recorded(place, overrides))


def same_outputs(run: Recorded, output: Path, cache: str) -> None:
    """Check the run's own file and a self-contained one."""
    module = bayesq.load_quantized(run.file, cache_dir=cache)
    assert not module.training and torch.equal(run.again(module), run.logits)
    export.export(run.folder, "packed", output)
    assert torch.equal(run.again(bayesq.load_quantized(output)), run.logits)


# -------------------------------------------------------------------------------------------------- the run's own file


@pytest.mark.parametrize("overrides", RUNS)
def test_a_loaded_network_gives_the_outputs_of_the_run_bit_for_bit(
    place: Path, run: Callable[[str], Recorded], overrides: str, tmp_path: Path
) -> None:
    same_outputs(run(overrides), tmp_path / "packed.safetensors", str(place / "cache"))


@pytest.mark.parametrize("overrides", RUNS)
def test_bits_stored_are_the_size_of_the_file_to_the_byte(run: Callable[[str], Recorded], overrides: str) -> None:
    done = run(overrides)
    raw, result = done.file.read_bytes(), done.result
    behind = len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert behind == result["bytes/packed"] + result["bytes/parameters"]
    assert result["bits/stored"] == 8 * (behind - result["bytes/parameters"]) / (result["bytes/fp32"] // 4)
    assert (result["bytes/parameters"] > 0) == ("distill" in overrides or result["correction"] != "none")
    changed = {k: v for k, v in read_tensors(done.file)[0].items() if k.startswith("parameter/")}
    assert sum(4 * value.numel() for value in changed.values()) == result["bytes/parameters"]


def test_the_file_describes_its_run_and_says_nothing_about_its_place(
    place: Path, run: Callable[[str], Recorded]
) -> None:
    done = run(GPTQ4)
    said = read_packed(done.file).run
    assert said["run_id"] == done.result["run_id"] and said["bayesq"] == bayesq.__version__
    assert said["network"] == {"weights": done.result["source"]["weights"]}
    assert said["config"] == json.loads(json.dumps(config.settings_that_matter(done.result["config"])))
    elsewhere = recorded(place, f"{GPTQ4} wandb.project=other", "elsewhere", place / "other_cache")
    assert elsewhere.folder != done.folder and elsewhere.file.read_bytes() == done.file.read_bytes()


def test_a_file_without_settings_is_read_but_not_loaded(run: Callable[[str], Recorded], tmp_path: Path) -> None:
    tensors, header = read_tensors(run(GPTQ4).file)
    write_tensors(tmp_path / "old.safetensors", tensors, {"layers": header["layers"]})
    assert read_packed(tmp_path / "old.safetensors").tensors.keys() == read_packed(run(GPTQ4).file).tensors.keys()
    with pytest.raises(CorruptFile, match=r"no settings of a run.*report.save.*read_packed.*make the run again"):
        bayesq.load_quantized(tmp_path / "old.safetensors")


def test_weights_that_moved_are_found_and_others_are_refused(
    run: Callable[[str], Recorded], place: Path, tmp_path: Path
) -> None:
    done = run(GPTQ4)
    moved = tmp_path / "moved"
    shutil.copytree(place / "models", moved)
    options = {"cache_dir": str(place / "cache")}
    module = bayesq.load_quantized(done.file, {"model.checkpoint": str(moved)}, **options)
    assert torch.equal(done.again(module), done.logits)
    weights = load_file(moved / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be loaded: its weights have changed \(sha256 "):
        bayesq.load_quantized(done.file, {"model.checkpoint": str(moved)}, **options)
    with pytest.raises(UserError, match=r"cannot be loaded: model\.checkpoint=.*/gone: there is no such folder"):
        bayesq.load_quantized(done.file, {"model.checkpoint": str(tmp_path / "gone")}, **options)
    with pytest.raises(UserError, match=r"unknown key 'model\.checkpint'; did you mean 'model\.checkpoint'"):
        bayesq.load_quantized(done.file, {"model.checkpint": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "os.system", "command": "touch ran"}, "is no class of the suite"),
        ({"_target_": "bayesq.suite.models.base.os.system", "command": "touch ran"}, "there is no such module"),
        ({"_target_": "bayesq.suite.models.checkpoint.Path"}, "is no class of that module"),
        ({"_target_": "bayesq.suite.models.nothing.Model"}, "there is no such module"),
        ({"label_order": {"_target_": "os.system", "command": "touch ran"}}, "begin with an underscore"),
        ({"depth": 3}, "unexpected keyword"),
        ({"max_length": "long"}, "cannot be loaded: TypeError"),
    ],
)
def test_settings_of_a_file_run_no_code(
    run: Callable[[str], Recorded], tmp_path: Path, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, header = read_tensors(run(GPTQ4).file)
    said = json.loads(header["run"])
    said["config"]["model"] |= change
    said["run_id"] = config.id_of(said["config"], said["bayesq"])
    write_tensors(tmp_path / "changed.safetensors", tensors, header | {"run": json.dumps(said)})
    with pytest.raises((UserError, CorruptFile), match=message) as caught:
        bayesq.load_quantized(tmp_path / "changed.safetensors")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_classes_of_other_packages_have_to_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text("class Model:\n    def __init__(self, size):\n        self.size = size\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = {"model": {"_target_": "own_models.Model", "name": "own", "size": 3}}
    assert loading.source(said, "model", ["own_models"]).size == 3
    for trusted in ([], ["own"]):
        with pytest.raises(UserError, match=r"own_models\.Model is no class of the suite: name its package"):
            loading.source(said, "model", trusted)


@pytest.mark.parametrize("what", ["rows", "groups", "layer", "parameter", "dtype", "weight"])
def test_a_file_of_another_network_is_refused(
    run: Callable[[str], Recorded], place: Path, tmp_path: Path, what: str
) -> None:
    tensors, header = read_tensors(run(MOMENTS).file)
    layers = json.loads(header["layers"])
    name = next(name for name, facts in layers.items() if not facts["mixed"])
    bias = next(key for key in tensors if key.startswith("parameter/"))
    if what == "rows":  # half of them, as a file of a smaller network would have
        rows, columns = layers[name]["shape"]
        kept = len(tensors[f"{name}/codes"]) // 2
        layers[name]["shape"] = [rows // 2, columns]
        tensors |= {f"{name}/{key}": tensors[f"{name}/{key}"][: rows // 2] for key in ("scale", "zero")}
        tensors[f"{name}/codes"] = tensors[f"{name}/codes"][:kept]
    elif what == "groups":
        layers[name]["groups"] = 2
    elif what == "layer":
        layers["other"] = layers.pop(name)
        tensors = {key.replace(f"{name}/", "other/"): value for key, value in tensors.items()}
    elif what == "parameter":
        tensors["parameter/other"] = tensors.pop(bias)
    elif what == "dtype":
        tensors[bias] = tensors[bias].half()
    else:
        tensors[f"parameter/{name}.weight"] = torch.zeros(32, 32)
    write_tensors(tmp_path / "other.safetensors", tensors, header | {"layers": json.dumps(layers)})
    with pytest.raises(CorruptFile, match="does not fit its network"):
        bayesq.load_quantized(tmp_path / "other.safetensors", cache_dir=str(place / "cache"))


# ------------------------------------------------------------------------------------------------------ self-contained


def test_a_self_contained_file_needs_nothing_else(
    run: Callable[[str], Recorded], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(GPTQ4)
    output, lines = export.export(done.folder, "packed", tmp_path / "whole.safetensors")
    assert "quantized layers" in lines[0]
    for folder in ("models", "data"):
        (place / folder).rename(place / f"away_{folder}")
    try:
        monkeypatch.chdir(tmp_path)
        assert torch.equal(done.again(bayesq.load_quantized(output)), done.logits)
        with pytest.raises(UserError, match=r"cannot be loaded: dataset\.root=.* cannot be read"):
            bayesq.load_quantized(done.file, cache_dir=str(place / "cache"))
    finally:
        for folder in ("models", "data"):
            (place / f"away_{folder}").rename(place / folder)


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "dtype", "twice", "order", "sizes", "blueprint"])
def test_a_self_contained_file_that_is_not_its_network_is_refused(
    run: Callable[[str], Recorded], tmp_path: Path, what: str
) -> None:
    file, _ = export.export(run(GPTQ4).folder, "packed", tmp_path / "whole.safetensors")
    tensors, header = read_tensors(file)
    said = json.loads(header["run"])
    blueprint = said["network"]["blueprint"]
    bias = "state/model.classifier.bias"
    if what == "missing":
        del tensors[bias]
    elif what == "extra":
        tensors["state/other"] = tensors[bias]
    elif what == "shape":
        tensors[bias] = tensors[bias][:1]
    elif what == "dtype":
        tensors[bias] = tensors[bias].double()
    elif what == "twice":
        tensors["state/model.classifier.weight"] = torch.zeros(2, 32)
    elif what == "order":
        blueprint["order"] = [1, 7]
    elif what == "sizes":  # 16 TB, were it asked for
        blueprint["classifier"]["vocab_size"] = 2**37
    else:
        said["network"]["blueprint"] = [1, 2]
    write_tensors(file, tensors, header | {"run": json.dumps(said)})
    with pytest.raises(CorruptFile, match="its network cannot be built") as caught:
        bayesq.load_quantized(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_bare_timm_network_is_the_one_that_was_built(name: str, tmp_path: Path) -> None:
    import timm

    save_file(timm.create_model(name, num_classes=5).state_dict(), tmp_path / "weights.safetensors")
    images = Examples(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64), ["a", "b"])
    source = TimmModel(name, checkpoint=str(tmp_path / "weights.safetensors"))
    network = source.build(DataSplits(images, images, images, 5, "accuracy", {}), tmp_path)
    bare = source.bare(json.loads(json.dumps(network.blueprint)))
    assert not bare.training and repr(bare) == repr(network.module)
    bare.load_state_dict(network.module.state_dict())
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(bare(x), network.module(x))
    assert [part.fused_attn for part in bare.modules() if hasattr(part, "fused_attn")] == [False] * (
        sum(hasattr(part, "fused_attn") for part in network.module.modules())
    )


# --------------------------------------------------------------------------------------------------------- dequantized


def half(module: nn.Module) -> nn.Module:
    """The network with its weights rounded to fp16, in float32."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()
    return module


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_timm_loads_what_is_exported(place: Path, run: Callable[[str], Recorded], dtype: str, tmp_path: Path) -> None:
    from timm.models.resnet import BasicBlock, ResNet

    done = run(DIGITS_FULL)
    folder, lines = export.export(done.folder, "dequantized", tmp_path / "out", dtype=dtype)
    options = done.result["config"]["model"]
    with torch.random.fork_rng():
        module = ResNet(
            BasicBlock, options["depths"], num_classes=10, in_chans=1, stem_type="deep",
            stem_width=options["channels"][0] // 2, channels=options["channels"],
        ).eval()  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype), torch.int64}
    module.load_state_dict(weights)
    loaded = bayesq.load_quantized(done.file, cache_dir=str(place / "cache"))
    before = loaded.state_dict()
    assert all(torch.equal(value, before[name].to(value.dtype)) for name, value in weights.items())
    assert lines == [f"model.safetensors: {len(weights)} tensors of timm ResNet of BasicBlocks, deep stem"]
    assert torch.equal(done.again(module), done.logits) == (dtype == "float32")
    assert torch.equal(done.again(module), done.again(half(loaded) if dtype == "float16" else loaded))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_transformers_loads_what_is_exported(run: Callable[[str], Recorded], dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    done = run(FULL)
    folder, _ = export.export(done.folder, "dequantized", tmp_path / "out", dtype=dtype)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.dtype == getattr(torch, dtype) and loaded.config.id2label == {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    whole, _ = export.export(done.folder, "packed", tmp_path / "whole.safetensors")
    expected = bayesq.load_quantized(whole)
    (batch,) = done.examples.batches(64, CPU)
    with torch.no_grad():
        found = model(**batch.inputs).logits
        logits = (half(expected) if dtype == "float16" else expected)(**batch.inputs)
    # its weights lie elsewhere in memory, where products may sum in another order
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)
    tokens = AutoTokenizer.from_pretrained(folder)(["the good film"], return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 5)


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(Refused, match=r"w has entries beyond the range of float16: use float32 \(--dtype float32\)"):
        converted({"w": torch.tensor([1e6])}, "float16")
    assert converted({"w": torch.tensor([1e6])}, "float32")["w"] == 1e6


# ---------------------------------------------------------------------------------------------------------------- gptq


@pytest.mark.parametrize(
    ("overrides", "checkpoint_format"),
    [(RTN3, "gptq"), (GPTQ4, "gptq_v2")],
)
def test_an_independent_reader_finds_our_weights(
    run: Callable[[str], Recorded], overrides: str, checkpoint_format: str, tmp_path: Path
) -> None:
    done = run(overrides)
    bits = done.result["config"]["bits"]
    folder, lines = export.export(done.folder, "gptq", tmp_path / "out", checkpoint_format=checkpoint_format)
    whole, _ = export.export(done.folder, "packed", tmp_path / "whole.safetensors")
    expected = bayesq.load_quantized(whole).model.state_dict()
    found = read_gptq(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].half()) for name, value in found.items())
    assert f"13 layers as GPTQ (13 of {bits} bits) of BertForSequenceClassification" in lines[0]
    embeddings = "3 Embedding, " if "embeddings" in overrides else ""
    assert lines[1].endswith(f": {embeddings}1 Linear (of them Linear: classifier)")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said == json.loads((folder / "quantize_config.json").read_text())
    assert said["dynamic"] == {"-:^classifier$": {}} and said["group_size"] == (16 if overrides == GPTQ4 else -1)


def test_layers_of_other_widths_are_told_apart(run: Callable[[str], Recorded], tmp_path: Path) -> None:
    widths = "allocator=knapsack allocation.block=layer allocation.widths=[3,4] posterior=diag"
    done = run(f"{BERT} method=rtn bits=3.5 layers.include_embeddings=true {widths}")
    folder, lines = export.export(done.folder, "gptq", tmp_path / "out", checkpoint_format="gptq_v2")
    assert "of 3 bits" in lines[0] and "of 4 bits" in lines[0] and "3 Embedding" in lines[1]
    whole, _ = export.export(done.folder, "packed", tmp_path / "whole.safetensors")
    expected = bayesq.load_quantized(whole).model.state_dict()
    assert all(torch.equal(value, expected[name].half()) for name, value in read_gptq(folder).items())


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            FULL,
            r" of method=bayesq: the layout cannot hold layer model\..*: its levels are not uniform: choose method=",
        ),
        (MOMENTS, r"its rows have different widths \(.*\): choose allocator=uniform with a whole"),
        (AWQ, " of method=awq: .* it has scales for its inputs: choose method=gptq"),
        (DIGITS_RTN, "and this network has none( that is quantized: write it dequantized| inside)"),
    ],
)
def test_what_a_layout_cannot_hold_is_one_line(
    run: Callable[[str], Recorded], overrides: str, message: str, target: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^--to {target}.*{message}") as caught:
        export.export(run(overrides).folder, target, tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- command line


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str | None:
    """What `main` ends with: the error line, or None."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    try:
        export.main()
    except SystemExit as end:
        return str(end.code)
    return None


def test_errors_are_one_line(
    run: Callable[[str], Recorded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(GPTQ4)
    try_ = functools.partial(command, monkeypatch)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(done.folder, unfinished)
    (unfinished / "result.json").write_text(json.dumps(done.result | {"status": "failed"}))
    damaged = tmp_path / "damaged"
    shutil.copytree(done.folder, damaged)
    raw = done.file.read_bytes()
    (damaged / "quantized.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    output = tmp_path / "out"
    assert try_(unfinished, "--to", "packed").endswith("give a folder results/<run_id>")
    assert "does not match its digest" in try_(damaged, "--to", "packed", "--output", output)
    assert try_(done.folder, "--to", "onnx") == "error: --to onnx: choose dequantized, packed, gptq, compressed-tensors"
    assert "--dtype float16: belongs to --to dequantized, gptq, compressed-tensors" in try_(
        done.folder, "--to", "packed", "--dtype", "float16"
    )
    assert "--format gguf: choose gptq, gptq_v2" in try_(done.folder, "--to", "gptq", "--format", "gguf")
    assert "--set x: needs KEY=VALUE" in try_(done.folder, "--to", "packed", "--set", "x")
    gone = ("--set", f"model.checkpoint={tmp_path / 'gone'}")
    assert "gone: there is no such folder" in try_(done.folder, "--to", "packed", "--output", output, *gone)
    (damaged / "quantized.safetensors").unlink()
    assert "quantized.safetensors: there is no such file" in try_(damaged, "--to", "packed", "--output", output)
    assert not output.exists()
    assert try_(done.folder, "--to", "packed", "--output", output) is None
    written = output.read_bytes()
    assert "exists already; --force replaces it" in try_(done.folder, "--to", "packed", "--output", output)
    assert "a file is in the way" in try_(done.folder, "--to", "gptq", "--output", output)
    assert try_(done.folder, "--to", "packed", "--output", output, "--force") is None
    assert output.read_bytes() == written, "files are reproducible"
    folder = tmp_path / "folder"
    assert try_(done.folder, "--to", "dequantized", "--output", folder) is None
    (folder / "notes.txt").write_text("mine")
    assert "exists already" in try_(done.folder, "--to", "dequantized", "--output", folder)
    assert try_(done.folder, "--to", "dequantized", "--output", folder, "--force", "--dtype", "float32") is None
    assert (folder / "notes.txt").exists()
    assert load_file(folder / "model.safetensors")["classifier.bias"].dtype == torch.float32
    assert "a folder is in the way" in try_(done.folder, "--to", "packed", "--output", folder)
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert try_(done.folder, "--to", "packed", "--output", blocked / "x").startswith("error: ")
    capsys.readouterr()


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, bayesq; print('torch' in sys.modules, bayesq.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", bayesq.__version__]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bayesq.nothing  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- the suite's workloads


@pytest.mark.slow
def test_the_command_line_exports_the_demo_network(place: Path, tmp_path: Path) -> None:
    """MiniLM with a head of its own: the encoder goes to transformers, the head beside it."""
    from transformers import AutoModel, AutoTokenizer

    glue = "model=minilm dataset=glue dataset.task=sst2 dataset.root={place}/data dataset.calibration_pool=20"
    done = recorded(place, f"{glue} calibration.examples=16 method=bayesq bits=3 layers.include_embeddings=true")
    same_outputs(done, tmp_path / "packed.safetensors", str(place / "cache"))
    ended = subprocess.run(
        [sys.executable, "-m", "bayesq.suite.export", done.folder, "--to", "dequantized", "--output", tmp_path / "out"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{tmp_path / 'out'}\n  model.safetensors: 101 tensors of BertModel")
    encoder = AutoModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    head = load_file(tmp_path / "out" / "head.safetensors")
    expected = half(bayesq.load_quantized(tmp_path / "packed.safetensors"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(
        ["the good film", "bad"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1)
        found = mean @ head["classifier.weight"].float().T + head["classifier.bias"].float()
        torch.testing.assert_close(found, expected(tokens["input_ids"], tokens["attention_mask"]))
    refused = subprocess.run(
        [sys.executable, "-m", "bayesq.suite.export", done.folder, "--to", "gptq"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert refused.returncode == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: --to gptq of method=bayesq: the layout cannot hold layer encoder.")


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "model=cifar_resnet56 dataset=cifar10 dataset.root={shared}/data/cifar10 dataset.limit=64 "
        "model.checkpoint={shared}/models/cifar10/resnet56-4bfd9763.th method=gptq correction=moments bits=3",
        "model=minilm model.checkpoint={shared}/models/glue/sst2 dataset=glue dataset.task=sst2 dataset.limit=64 "
        "dataset.root={shared}/data/glue method=gptq bits=4",
        "model=efficientnet_lite0 dataset=imagenet dataset.root={shared}/data/imagenet_nips2017 dataset.limit=32 "
        "dataset.calibration_pool=16 method=rtn bits=4",
    ],
)
def test_published_checkpoints(place: Path, overrides: str, tmp_path: Path) -> None:
    done = recorded(place, f"{overrides} calibration.examples=16".replace("{shared}", str(SHARED)))
    same_outputs(done, tmp_path / "packed.safetensors", str(place / "cache"))
    folder, _ = export.export(done.folder, "dequantized", tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    if "efficientnet" in overrides:
        import timm

        module = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(folder / "model.safetensors")).eval()
        expected = half(bayesq.load_quantized(tmp_path / "packed.safetensors"))
        assert torch.equal(done.again(module), done.again(expected))
    assert all(value.dtype in (torch.float16, torch.int64) for value in weights.values())
