"""Files that were packed before codes were classes; packed_before_codes/write.py tells how they were made."""

import json
from pathlib import Path

import pytest
import torch
from naive_quant import naive_dequantize
from safetensors.torch import load_file

from bayesq.quant.codes import Affine, Code, SharedTable, Trellis
from bayesq.quant.file import read_packed, write_packed
from bayesq.suite.packed import read_run
from bayesq.tensor_file import verify

FOLDER = Path(__file__).parent / "packed_before_codes"


@pytest.mark.parametrize(("name", "kind"), [("affine", Affine), ("shared_table", SharedTable), ("trellis", Trellis)])
def test_old_files_hold_the_weights_they_held(tmp_path: Path, name: str, kind: type[Code]) -> None:
    file = FOLDER / f"{name}.safetensors"
    packed = read_run(file)
    weights = load_file(FOLDER / "weights.safetensors")
    expected = {key.removeprefix(f"{name}/"): x for key, x in weights.items() if key.startswith(f"{name}/")}
    assert sorted(packed.tensors) == sorted(expected) and len(expected) >= 3
    for layer, tensor in packed.tensors.items():
        assert type(tensor.code) is kind
        assert torch.equal(tensor.dequantize(), expected[layer])
        torch.testing.assert_close(tensor.dequantize().double(), torch.from_numpy(naive_dequantize(tensor)))
    assert packed.parameters["norm.weight"].tolist() == [0.5, 1.5, 2.5] and packed.parameters["norm.count"] == 4
    assert packed.run["config"]["bits"] == 3 and not packed.state

    # and they are written as they were, header included
    write_packed(tmp_path / "again.safetensors", read_packed(file))
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    facts = ["shape", "groups", "group_size", "mixed", "trellis", "codebooks"]
    assert all(list(layer) == facts for layer in json.loads(verify(file)["layers"]).values())
