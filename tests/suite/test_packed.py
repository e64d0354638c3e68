"""Packed files from anywhere: whatever is done to one, it is refused in one line, or read as what it says."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from bayesq.quant.codes import Codebook, RowTable, SharedTable, SparseOverlay, Trellis
from bayesq.quant.codes.trellis import POLYNOMIALS
from bayesq.quant.file import Packed, write_packed
from bayesq.quant.packing import pack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.suite.config import id_of
from bayesq.suite.packed import read_run
from bayesq.tensor_file import HEADER_KEY, CorruptFile, digest, read_tensors, write_tensors

CONFIG = {"bits": 2.5, "model": {"_target_": "bayesq.suite.models.resnet.SmallResNet", "name": "resnet"}}
# What a header may say in place of anything.
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 8, 64, 255, 2**31, 2**63, 10**30, -(2**63), 1.0, 2.5, math.nan, math.inf,
    "", "3", "8", "a/3", "é", [], [4], [4, 6], [6, 4], [-4, -6], [4, 6, 1], [2**40, 2**40], [10**30, 1], [True, 6],
    "row_table", {}, {"3": "a/3"}, {"2": "a/2"}, {"9": "a/3"}, {"3": 3}, [[]], {"a": {"b": []}},
]  # fmt: skip


def layer(rows: int, columns: int, widths: list[int], seed: int, **options: Any) -> QuantizedTensor:
    """A random layer; options as of QuantizedTensor."""
    random = np.random.default_rng(seed)
    width = np.resize(np.array(widths, dtype=np.uint8), rows)
    groups = -(-columns // (options.get("group_size") or columns))
    if isinstance(options.get("code"), RowTable):
        groups = 0
    return QuantizedTensor(
        codes=torch.from_numpy(random.integers(0, 2 ** width.astype(int)[:, None], (rows, columns)).astype(np.uint8)),
        width=torch.from_numpy(width),
        scale=torch.from_numpy(random.uniform(0.1, 1, (rows, groups))).half(),
        zero=torch.from_numpy(random.integers(0, 256, (rows, groups)).astype(np.uint8)),
        **options,
    )


def book(name: str, levels: int) -> Codebook:
    return Codebook(name, torch.linspace(-1, 4, levels).half())


def row_table(widths: list[int]) -> RowTable:
    return RowTable(torch.cat([torch.linspace(-1, 1 + w, 2**w) for w in widths]).half())


def overlay_of(rows: int, columns: int, count: int) -> SparseOverlay:
    chosen = np.random.default_rng(count).permutation(rows * columns).reshape(rows, columns) < count
    return SparseOverlay.of(torch.randn(rows, columns), torch.from_numpy(chosen))


@pytest.fixture(scope="module")
def original() -> Packed:
    """Every kind of layer in a few bytes each."""
    tensors = {
        "conv": layer(4, 6, [3], 0, groups=2, code=SharedTable({3: book("a/3", 8)})),
        "mixed": layer(5, 7, [2, 3, 8], 1, code=SharedTable({2: book("a/2", 4), 3: book("a/3", 8)})),
        "trellis": layer(6, 5, [3, 2], 2, code=Trellis({3: book("t/3", 16)}, 8)),
        "grouped": layer(3, 8, [4], 3, group_size=3, column_scale=torch.rand(1, 4).half() + 0.5),
        "head.fc": layer(2, 4, [8], 4),
        "rows": layer(3, 6, [3, 2], 5, code=row_table([3, 2, 3]), column_scale=torch.rand(1, 3).half() + 0.5),
        "kept": layer(4, 20, [2], 6, groups=2, overlay=overlay_of(4, 20, 7)),
    }
    run = {"run_id": id_of(CONFIG, "0"), "bayesq": "0", "config": CONFIG, "network": {"weights": "ab"}}
    return Packed(tensors, {"norm.weight": torch.rand(3), "norm.count": torch.tensor(4)}, run=run)


def weights_of(packed: Packed) -> dict[str, Tensor]:
    return {name: tensor.dequantize() for name, tensor in packed.tensors.items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in ((first[name], second[name]) for name in first)
    )


def naive_weights(buffers: Mapping[str, Tensor], facts: Mapping[str, Any], name: str) -> Tensor:
    """What the format's description says a layer's weights are, digit by digit."""
    (rows, columns), said = facts[name]["shape"], facts[name]
    own = {key.removeprefix(f"{name}/"): value for key, value in buffers.items() if key.startswith(f"{name}/")}
    bits = "".join(f"{byte:08b}" for byte in own["width"].tolist())
    widths = [2 + int(bits[3 * r : 3 * r + 3], 2) if said["mixed"] else int(own["width"][0]) for r in range(rows)]
    stream = "".join(f"{byte:08b}" for byte in own["codes"].tolist())
    codes, start = {}, 0
    for r in sorted(range(rows), key=lambda r: (widths[r], r)):
        codes[r] = [int(stream[start + c * widths[r] : start + (c + 1) * widths[r]], 2) for c in range(columns)]
        start += columns * widths[r]
    per_group, row_tables, trellis = rows // said["groups"], said.get("code") == "row_table", said.get("trellis")
    found = torch.empty(rows, columns, dtype=torch.float64)
    scales, zeros = own["scale"].tolist(), own["zero"].tolist()
    column_scales = own["column_scale"].tolist() if "column_scale" in own else None
    for r in range(rows):
        width = widths[r]
        levels = range(2**width) if trellis is None else [k / 2 - 0.25 for k in range(2 ** (width + 1))]
        if row_tables:
            levels = own["table"].tolist()[sum(2**w for w in widths[:r]) :]
        elif str(width) in said["codebooks"]:
            levels = buffers[f"codebook/{said['codebooks'][str(width)]}"].tolist()
        for c in range(columns):
            index = codes[r][c]
            if trellis is not None:
                memory = trellis.bit_length() - 1
                above = [codes[r - i][c] & 1 for i in range(memory + 1) if i <= r % per_group]
                window = sum(bit << i for i, bit in enumerate(above))
                h0, h1 = POLYNOMIALS[trellis]
                subset = 2 * ((window & h0).bit_count() % 2) + (window & h1).bit_count() % 2
                index = subset + 4 * (codes[r][c] >> 1)
            s = 0 if said["group_size"] is None else c // said["group_size"]
            value = levels[index]
            if not row_tables:
                value = scales[r][s] * (value - zeros[r][s] * 2.0 ** (width - 8))
            if column_scales is not None:
                value /= column_scales[r // per_group][c * len(column_scales[0]) // columns]
            found[r, c] = value
    if "overlay_index" in own:
        bits = "".join(f"{byte:08b}" for byte in own["overlay_index"].tolist())
        each, digits = columns.bit_length(), max((columns - 1).bit_length(), 1)
        counts = [int(bits[each * r : each * (r + 1)], 2) for r in range(rows)]
        kept_rows = [r for r, count in enumerate(counts) for _ in range(count)]
        for k, (r, value) in enumerate(zip(kept_rows, own["overlay_value"].tolist(), strict=True)):
            start = each * rows + digits * k
            found[r, int(bits[start : start + digits], 2)] = value
    return found.reshape(said["groups"], per_group, columns)


def check_naively(weight: Tensor, buffers: Mapping[str, Tensor], facts: Mapping[str, Any], name: str) -> None:
    torch.testing.assert_close(weight.double(), naive_weights(buffers, facts, name), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- as written


def test_a_file_is_read_as_it_was_written(original: Packed, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    sizes = write_packed(file, original)
    found = read_run(file)
    assert same(weights_of(found), weights_of(original)) and same(found.parameters, original.parameters)
    assert found.run == original.run and found.state == {}
    raw = file.read_bytes()
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + sizes.packed + sizes.parameters
    assert sizes.parameters == 3 * 4 + 8
    buffers, header = read_tensors(file)
    for name, weight in weights_of(original).items():
        check_naively(weight, buffers, json.loads(header["layers"]), name)


@pytest.mark.parametrize("name", ["codebook", "parameter/x", "state"])
def test_names_of_the_format_are_no_layers(name: str, original: Packed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a layer cannot be named"):
        pack_model({name: original.tensors["conv"]})


# ----------------------------------------------------------------------------------------------------------- the digest


def damaged(raw: bytes, random: np.random.Generator) -> bytes:
    """`raw` after one of the things that happen to files, or are done to them."""
    kind = random.integers(7)
    head = 8 + int.from_bytes(raw[:8], "little")
    if kind == 0:
        return raw[: random.integers(len(raw))]
    if kind == 1:
        return raw + random.bytes(int(random.integers(1, 40)))
    if kind == 2:
        start, stop = sorted(random.integers(0, len(raw), 2))
        return raw[:start] + bytes(int(stop - start)) + raw[stop:]
    if kind == 3:
        length = [0, 1, 2, head - 9, head - 7, len(raw), 2**31, 2**40, 2**63, 2**64 - 1][random.integers(10)]
        return int(length).to_bytes(8, "little") + raw[8:]
    if kind == 4:  # pieces of the header elsewhere
        start, stop = sorted(random.integers(8, head, 2))
        return raw[:start] + raw[stop:head] + raw[start:stop] + raw[head:]
    changed = bytearray(raw)
    for place in random.integers(0, head if kind == 5 else len(raw), random.integers(1, 4)):
        changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed)


def test_damage_is_found(original: Packed, tmp_path: Path) -> None:
    """Files are refused, or hold the very weights: a flipped bit may turn one blank of JSON into another."""
    file, random = tmp_path / "file.safetensors", np.random.default_rng(0)
    write_packed(file, original)
    raw, expected, outcomes = file.read_bytes(), weights_of(original), Counter[str]()
    for _ in range(2400):
        file.write_bytes(damaged(raw, random))
        try:
            found = read_run(file)
        except CorruptFile as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["accepted"] += 1
        assert same(weights_of(found), expected) and same(found.parameters, original.parameters)
        assert found.run == original.run
    assert outcomes["accepted"] < 25, "nearly all of these change something"


# ------------------------------------------------------------------------------------- files whose digest was made anew


def edited(
    buffers: dict[str, Tensor], header: dict[str, Any], random: np.random.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Buffers and header after one or two edits."""
    buffers, header = dict(buffers), dict(header)
    for _ in range(random.integers(1, 3)):
        kind = random.integers(9)
        name = sorted(buffers)[random.integers(len(buffers))]
        value = buffers[name]
        if kind == 0:
            del buffers[name]
        elif kind == 1:
            names = [
                f"{name}x",
                "codebook/",
                "",
                "conv",
                "/codes",
                "parameter/",
                f"other/{name}",
                "conv/column_scale",
                "conv/table",
            ]
            buffers[names[random.integers(len(names))]] = value
        elif kind == 2:
            dtypes = [torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool]
            buffers[name] = value.to(dtypes[random.integers(len(dtypes))])
        elif kind == 3 and value.ndim:
            axis = int(random.integers(value.ndim))
            size = int(random.integers(2 * value.shape[axis] + 1))
            buffers[name] = torch.cat([value, value], axis).narrow(axis, 0, size)
        elif kind == 4:
            shapes = [value.reshape(-1), value[None], value[..., None], value.mT if value.ndim == 2 else value]
            buffers[name] = shapes[random.integers(len(shapes))]
        elif kind == 5 and value.numel():  # other bytes, NaN and infinity among them
            raw = bytearray(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            raw[random.integers(len(raw))] = random.choice([0, 1, 2, 8, 9, 124, 126, 127, 252, 255])
            again = torch.frombuffer(raw, dtype=torch.uint8).view(value.dtype)
            buffers[name] = again.reshape(value.shape)
        elif kind == 6:  # another letter in the text of the header
            key = ["layers", "run"][random.integers(2)]
            text = header[key]
            if isinstance(text, str) and text:
                place = int(random.integers(len(text)))
                letter = '0123456789-.eE"{}[],:ntx\\'[random.integers(25)]
                header[key] = text[:place] + letter + text[place + int(random.integers(2)) :]
        else:
            header = reworded(header, random)
    return buffers, header


def reworded(header: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """The header with an odd value in place of one, or with one more or less."""
    key = ["layers", "layers", "layers", "run"][random.integers(4)]
    try:
        content = json.loads(header[key])
    except (ValueError, TypeError, KeyError):
        return header
    odd = deepcopy(ODD[random.integers(len(ODD))])
    if random.integers(20) == 0:
        texts = [odd, json.dumps(odd), "[" * 100_000, '{"a":' * 50_000, "1" * 5000, header[key][:-1], header[key] * 2]
        return header | {key: texts[random.integers(len(texts))]}
    node = content
    while isinstance(node, dict) and node:
        name = list(node)[random.integers(len(node))]
        if not isinstance(node[name], dict | list) or random.integers(2):
            if random.integers(5) == 0:
                node[f"{name}2"] = node.pop(name) if random.integers(2) else odd
            else:
                node[name] = odd
            break
        node = node[name]
    return header | {key: json.dumps(content)}


def overwrite(file: Path, buffers: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A file with a digest of its own; in place, which takes a tenth of the time of replacing it."""
    whole = {name: value.contiguous().clone() for name, value in buffers.items()}
    text = json.dumps({"digest": digest(whole, header), "metadata": header})
    file.write_bytes(save(whole, {HEADER_KEY: text}))


def test_contradictions_are_found_though_the_digest_is_right(original: Packed, tmp_path: Path) -> None:
    """What is accepted has one meaning: packed again it is the same file, and a naive reader finds the same weights."""
    file, random = tmp_path / "file.safetensors", np.random.default_rng(1)
    write_packed(tmp_path / "whole.safetensors", original)  # tensors that are read may lie in the file's own pages
    whole, known, outcomes = read_tensors(tmp_path / "whole.safetensors"), weights_of(original), Counter[str]()
    for _ in range(900):
        buffers, header = edited(*whole, random)
        overwrite(file, buffers, header)
        try:
            found = read_run(file)
        except CorruptFile as error:
            assert "\n" not in str(error) and len(str(error)) < 500 + len(str(file))
            outcomes["refused"] += 1
            continue
        outcomes["accepted"] += 1
        facts = json.loads(header["layers"])
        again, said = pack_model(found.tensors)
        kept = {key: value for key, value in buffers.items() if not key.startswith(("parameter/", "state/"))}
        assert same(again, kept) and json.loads(said["layers"]) == facts
        for name, weight in weights_of(found).items():
            if name not in known or not torch.equal(weight, known[name]):
                check_naively(weight, buffers, facts, name)
    assert 12 < outcomes["accepted"] < 500, "other scales make another file, but most edits make none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40, 6]}, r"scale: needs \[1099511627776, 1\], not \[4, 1\]"),
        ({"shape": [4, 2**60]}, "codes: 9 bytes cannot hold 4 rows of"),
        ({"shape": [-4, -6]}, "two positive whole numbers"),
        ({"groups": 3}, "needs a divisor of the 4 rows"),
        ({"groups": 0}, "needs a divisor of the 4 rows"),
        ({"group_size": 1}, r"scale: needs \[4, 6\]"),
        ({"mixed": True}, "width: 1 bytes cannot hold exactly 12 bits"),
        ({"trellis": 10**30}, "trellis: needs one of 4, 8"),
        ({"trellis": 8}, "codebook a/3 has 8 levels, width 3 needs 16"),
        ({"codebooks": {"3": "a/2"}}, "codebook a/2 has 4 levels, width 3 needs 8"),
        ({"codebooks": {"3": "none"}}, "there is no codebook 'none'"),
        ({"codebooks": {"4": "a/3"}}, "no row has '4' bits"),
        ({"extra": 1}, "the facts of a layer are shape, groups"),
        ({"code": "row_table"}, "the facts of a layer are shape, groups, group_size, mixed, code, not"),
        (
            {"code": "shared_table"},
            "code: needs one of row_table, bitshift, congruential, entropy, column_entropy, not 'shared_table'",
        ),
    ],
)
def test_one_fact_against_the_rest(original: Packed, tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "file.safetensors"
    write_packed(file, original)
    buffers, header = read_tensors(file)
    facts = json.loads(header["layers"])
    facts["conv"] |= change
    write_tensors(file, buffers, header | {"layers": json.dumps(facts)})
    with pytest.raises(CorruptFile, match=f"layer 'conv': .*{message}"):
        read_run(file)


def test_a_run_id_that_is_not_the_settings_is_found(original: Packed, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    write_packed(file, original)
    buffers, header = read_tensors(file)
    said = json.loads(header["run"])
    said["config"]["bits"] = 4
    write_tensors(file, buffers, header | {"run": json.dumps(said)})
    with pytest.raises(CorruptFile, match="does not belong to the config"):
        read_run(file)
    assert HEADER_KEY.encode() in file.read_bytes()[:100]
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "none.safetensors")
