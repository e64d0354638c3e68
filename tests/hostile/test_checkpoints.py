"""Damaged and malicious weights: one clear line, no code is run, and no other weights than the file's pass for them."""

import json
import math
import pickle
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import damaged, report
from safetensors.torch import save_file
from torch import Tensor, nn

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.checkpoint import load_weights, read_checkpoint
from bayesq.suite.models.minilm import MiniLM
from bayesq.suite.models.transformers_model import TransformersClassifier
from bayesq.suite.workload import check_finite, check_network


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).eval()


STATE = network().state_dict()


def old_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file(STATE, path),
    "pt": lambda path: torch.save(STATE, path),
    "pth": lambda path: torch.save({"state_dict": STATE, "epoch": 3}, path),
    "bin": lambda path: old_format(STATE, path),
}


def load(path: Path) -> dict[str, Tensor]:
    """What a run would compute with, or why it would not."""
    module = network()
    load_weights(module, read_checkpoint(path), path, "model=test")
    check_network(module, "test")
    return module.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ending", WRITERS)
def test_damaged_files_are_refused_in_one_line_or_give_numbers_of_the_right_shape(tmp_path: Path, ending: str) -> None:
    file, draw, tried = tmp_path / f"w.{ending}", random.Random(ending), Counter[str]()
    WRITERS[ending](file)
    whole = file.read_bytes()
    for _ in range(600):
        file.write_bytes(damaged(whole, draw)[1])
        try:
            found = load(file)
        except UserError as error:
            assert str(file) in one_line(str(error)) or "has NaN" in str(error) or "below zero" in str(error)
            tried["refused"] += 1
            continue
        assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
            name: (x.shape, x.dtype) for name, x in STATE.items()
        }
        # the zip format has checksums: what passes is what was saved
        assert ending not in ("pt", "pth") or same(found, STATE)
        tried["as saved" if same(found, STATE) else "other finite weights, which no checksum guards"] += 1
    report(f".{ending} checkpoints", tried, 600)
    assert tried["refused"] > 200


@pytest.mark.parametrize("length", [2**60, 2**63 + 1, 2**64 - 1, 10**8, 0])
def test_oversized_safetensors_headers_take_no_memory(tmp_path: Path, length: int) -> None:
    file = tmp_path / "w.safetensors"
    save_file(STATE, file)
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(UserError, match="not a checkpoint that holds tensors"):
        read_checkpoint(file)


def header(file: Path, **changes: object) -> None:
    """Replace facts about the first tensor in a safetensors header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    facts = json.loads(content[8 : 8 + length])
    facts[next(iter(STATE))].update(changes)
    text = json.dumps(facts).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [4, 3, 3, 2**40]},
        {"shape": [-4, 3, 3, 3]},
        {"shape": [2**63, 2, 1, 1]},
        {"dtype": "F128"},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [8, 4]},
        {"dtype": "I32"},
        {"dtype": "F16", "shape": [4, 3, 3, 6]},
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    file = tmp_path / "w.safetensors"
    save_file(STATE, file)
    header(file, **changes)
    with pytest.raises(UserError, match=r"w\.safetensors"):
        load(file)


FIRST = "0.weight"
WRONG_STATES = [
    (lambda s: s | {FIRST: s[FIRST][:, :2]}, "size mismatch"),
    (lambda s: s | {FIRST: s[FIRST].flatten()}, "size mismatch"),
    (lambda s: s | {FIRST: torch.zeros(0, 3, 3, 3)}, "size mismatch"),
    (lambda s: s | {FIRST: s[FIRST].to(torch.int8)}, "holds torch.int8"),
    (lambda s: s | {FIRST: s[FIRST].to(torch.complex64)}, "holds torch.complex64"),
    (lambda s: s | {FIRST: s[FIRST] > 0}, "holds torch.bool"),
    (lambda s: s | {FIRST: s[FIRST].double() * 1e300}, "0.weight has NaN or infinite"),
    (lambda s: s | {FIRST: s[FIRST] * math.nan}, "0.weight has NaN or infinite"),
    (lambda s: s | {"3.bias": s["3.bias"] / 0}, "3.bias has NaN or infinite"),
    (lambda s: s | {"1.running_mean": s["1.running_mean"] * math.nan}, "1.running_mean has NaN"),
    (lambda s: s | {"1.running_var": s["1.running_var"] - 5}, "1.running_var has variances below zero"),
    (lambda s: {name: x for name, x in s.items() if name != FIRST}, 'Missing key.*"0.weight"'),
    (lambda s: s | {"4.weight": s[FIRST].clone()}, 'Unexpected key.*"4.weight"'),
    (lambda s: {}, "not a checkpoint that holds tensors"),
]


@pytest.mark.parametrize(("change", "line"), WRONG_STATES)
@pytest.mark.parametrize("ending", ["safetensors", "pt", "bin"])
def test_other_names_shapes_and_numbers_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], line: str, ending: str
) -> None:
    file = tmp_path / f"w.{ending}"
    state = {name: x.contiguous() for name, x in change(dict(STATE)).items()}
    if ending == "safetensors":
        save_file(state, file)
    else:
        (torch.save if ending == "pt" else old_format)(state, file)
    with pytest.raises(UserError, match=line) as refused:
        load(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_of_the_same_weights_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({name: x.to(dtype) if x.is_floating_point() else x for name, x in STATE.items()}, tmp_path / "w.pt")
    assert torch.allclose(load(tmp_path / "w.pt")[FIRST], STATE[FIRST], rtol=1e-2)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.canary, "the payload ran")


class EvalPayload(Payload):
    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"open({str(self.canary)!r}, 'w').write('x')",)


class SystemPayload(Payload):
    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self.canary}",)


def _zip_of(content: object, file: Path) -> None:
    """A zip file as PyTorch writes it, whose data.pkl is a plain pickle of `content`."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


PICKLERS: dict[str, Callable[[object, Path], object]] = {
    "zip": torch.save,
    "legacy": old_format,
    "plain pickle": lambda content, file: file.write_bytes(pickle.dumps(content)),
    "plain pickle in a zip": _zip_of,
    "protocol 5": lambda content, file: torch.save(content, file, pickle_protocol=5),
}
WRAPPINGS: dict[str, Callable[[object], object]] = {
    "alone": lambda x: x,
    "as a weight": lambda x: {**STATE, FIRST: x},
    "nested": lambda x: {"state_dict": dict(STATE), "extra": {"deep": [1, (2, x)]}},
    "as a key": lambda x: [STATE, x],
}


@pytest.mark.parametrize("ending", ["pt", "pth", "th", "bin"])
@pytest.mark.parametrize("pickler", PICKLERS)
def test_pickled_code_is_never_run(tmp_path: Path, pickler: str, ending: str) -> None:
    canary, file, tried = tmp_path / "canary", tmp_path / f"w.{ending}", Counter[str]()
    for wrap in WRAPPINGS.values():
        for kind in (Payload, EvalPayload, SystemPayload):
            PICKLERS[pickler](wrap(kind(canary)), file)
            with pytest.raises(UserError, match="not a checkpoint that holds tensors"):
                read_checkpoint(file)
            assert not canary.exists()
            tried["refused"] += 1
    report(f"payloads as {pickler} in .{ending}", tried, 12)
    torch.load(file, weights_only=False) if pickler != "plain pickle" else pickle.loads(file.read_bytes())
    assert canary.exists(), "the payload works where it is let"


def test_networks_that_compute_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="2 of 3 evaluation examples"):
        check_finite(torch.tensor([[0.0, math.nan], [1.0, 2.0], [math.inf, 0.0]]), "choose more bits")
    check_finite(torch.zeros(3, 2), "")


# -------------------------------------------------------------------------------------------- folders of transformers

WORD = Examples(["a good film"], torch.tensor([0]), ["0"])
DATA = DataSplits(WORD, WORD, WORD, 2, "accuracy", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.suite.tiny_bert import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("tiny"), 2)


def build(folder: Path) -> None:
    network = TransformersClassifier(16, checkpoint=str(folder)).build(DATA, folder)
    check_network(network.module, "transformers")
    network.encode(WORD)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def integers(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})


def nan(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config cut short": (lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()[:200]), "model.ch"),
    "config of another size": (lambda f: edited(f / "config.json", hidden_size=32), "model.checkpoint"),
    "config of heads that do not fit": (lambda f: edited(f / "config.json", num_attention_heads=3), "model.checkpoint"),
    "config of text": (lambda f: edited(f / "config.json", hidden_size="many"), "model.checkpoint"),
    "three labels": (lambda f: edited(f / "config.json", id2label={0: "a", 1: "b", 2: "c"}), "has 3 outputs"),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-99]),
        "model.safetensors: cannot be read",
    ),
    "integers": (integers, "holds I8"),
    "a NaN": (nan, "classifier.bias has NaN"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot be read .*tokenizer"),
    "tokenizer cut short": (
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:500]),
        "model.checkpoint",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_lack_or_break_something_are_refused(tmp_path: Path, folder: Path, case: str) -> None:
    change, line = FOLDERS[case]
    broken = copy(folder, tmp_path / "broken")
    change(broken)
    with pytest.raises(UserError, match=line):
        build(broken)


def test_weights_that_are_no_part_of_the_network_are_named(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    adapted = copy(folder, tmp_path / "adapted")
    weights = load_file(adapted / "model.safetensors")
    save_file({**weights, "lora_A.weight": torch.zeros(2)}, adapted / "model.safetensors", {"format": "pt"})
    build(adapted)
    assert "1 weights are not part of a BertForSequenceClassification and stay unused, lora_A.weight" in caplog.text


@pytest.mark.slow
def test_damaged_folders_are_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    broken, draw, tried = copy(folder, tmp_path / "broken"), random.Random(0), Counter[str]()
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    for _ in range(200):
        name = draw.choice(sorted(files))
        _, content = damaged(files[name], draw)
        for other, whole in files.items():
            (broken / other).write_bytes(content if other == name else whole)
        try:
            build(broken)
        except UserError as error:
            assert str(broken) in str(error) or "has NaN" in str(error)
            tried[f"{name} refused"] += 1
        else:
            tried[f"{name} read"] += 1
    report("transformers folders", tried, 200)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"hidden_size": 16'),
        ("config.json", b'{"hidden_size": 16, "num_attention_heads": 3}'),
        ("config.json", b"\xff\xfe"),
        ("model.safetensors", b"\0" * 100),
        ("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
    ],
)
def test_a_damaged_fine_tuned_minilm_is_refused(tmp_path: Path, folder: Path, name: str, content: bytes) -> None:
    broken = copy(folder, tmp_path / "broken")
    (broken / name).write_bytes(content)
    with pytest.raises(UserError, match=r"model\.checkpoint=.*broken: cannot be read"):
        MiniLM(16, str(broken)).build(DATA, tmp_path)
