"""Exported language models: transformers, compressed-tensors and naive readers give the run's network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from layout_readers import read_gptq
from tiny_lm import prose, tiny_lm
from torch import Tensor, nn

from bayesq.suite import runner, schema
from bayesq.suite.errors import UserError
from bayesq.suite.export import export
from bayesq.suite.loading import load_quantized

ROOT = Path(__file__).parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
TOKENS = torch.arange(2, 26).reshape(2, 12)
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}


def run(model: str, place: Path, *more: str) -> Path:
    """The folder of a finished run on `place`/prose.txt."""
    (place / "prose.txt").write_text(prose(2000), encoding="utf-8")
    overrides = [
        *(f"model={model.split()[0]}", *model.split()[1:], "dataset=text", f"dataset.path={place}/prose.txt"),
        *("dataset.window=12", "dataset.limit=3", "calibration.examples=16", "wandb.mode=disabled", "device=cpu"),
        *(f"results_dir={place}", f"cache_dir={place}/cache", *more),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides)
    schema.validate(cfg)
    return place / str(runner.run(cfg)["run_id"])


def network(folder: Path) -> nn.Module:
    """The run's own network."""
    return load_quantized(folder / "quantized.safetensors", cache_dir=str(folder.parent / "cache"))


def logits(module: Any) -> Tensor:
    """Of TOKENS, by a network of ours or of transformers."""
    with torch.no_grad():
        output = module(TOKENS)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")
def test_transformers_reads_the_dequantized_network(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(f"tiny_stories model.checkpoint={STORIES}", tmp_path, "method=gptq", "bits=3")
    output, lines = export(folder, "dequantized", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(network(folder)))
    assert "tokenizer" in lines[1] and AutoTokenizer.from_pretrained(output).decode(TOKENS[0]) != ""


@pytest.mark.parametrize("intermediate", [64, 40])
def test_a_naive_reader_finds_the_weights_in_the_layout_of_gptq(intermediate: int, tmp_path: Path) -> None:
    """The layout holds layers in blocks of 32; others stay plain, and readers are told which."""
    checkpoint = tiny_lm(tmp_path / "llama", intermediate_size=intermediate, **SIZES)
    more = ("method=gptq", "bits=4", "method.group_size=16")
    folder = run(f"causal_lm model.checkpoint={checkpoint}", tmp_path, *more)
    output, lines = export(folder, "gptq", checkpoint_format="gptq_v2")
    found, expected = read_gptq(output), network(folder).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].half()) for name, value in found.items())
    held = 14 if intermediate == 64 else 8
    assert f"{held} layers as GPTQ ({held} of 4 bits) of LlamaForCausalLM" in lines[0]
    assert ("6 Linear (of them Linear: model.layers.0.mlp.gate_proj, " in lines[1]) == (intermediate == 40)
    from transformers import AutoConfig

    said = AutoConfig.from_pretrained(output).quantization_config
    assert said["lm_head"] is False and len(said["modules_in_block_to_quantize"][0]) == held
    assert said["modules_in_block_to_quantize"][0][:1] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    "more",
    [
        ("method=gptq", "bits=4", "method.group_size=8"),
        ("method=rtn", "bits=8"),
        ("method=gptq", "bits=4", "method.symmetric=true"),
    ],
    ids=" ".join,
)
def test_compressed_tensors_gives_the_network(more: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    checkpoint = tiny_lm(tmp_path / "llama", intermediate_size=40, **SIZES)
    folder = run(f"causal_lm model.checkpoint={checkpoint}", tmp_path, *more)
    output, lines = export(folder, "compressed-tensors", dtype="float32")
    assert lines[0].startswith("model.safetensors: 14 layers as compressed-tensors (14 of ")
    # transformers loads packed zero points only if it decodes them at once
    options = (
        {} if "method.symmetric=true" in more else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    )
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, **options)
    assert torch.equal(logits(theirs), logits(network(folder)))


def test_transformers_reads_the_layout_of_gptq(tmp_path: Path) -> None:
    """Its reader needs `pip install optimum gptqmodel`, which compiles C++ and computes in fp16."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    checkpoint = tiny_lm(tmp_path / "llama", intermediate_size=40, **SIZES)
    more = ("method=gptq", "bits=4", "method.group_size=32")
    folder = run(f"causal_lm model.checkpoint={checkpoint}", tmp_path, *more)
    output, _ = export(folder, "gptq", checkpoint_format="gptq_v2")
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float16, device_map="cpu")
    torch.testing.assert_close(logits(theirs).float(), logits(network(folder)), rtol=0, atol=0.05)
    assert sum(hasattr(layer, "qweight") for layer in theirs.modules()) == 8


def test_widths_of_which_the_package_has_no_single_layout_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_lm(tmp_path / "llama", **SIZES)
    folder = run(f"causal_lm model.checkpoint={checkpoint}", tmp_path, "method=rtn", "bits=3")
    with pytest.raises(UserError, match=r"--to compressed-tensors of method=rtn: .* it has 3 bits: choose bits=4, 8"):
        export(folder, "compressed-tensors")
