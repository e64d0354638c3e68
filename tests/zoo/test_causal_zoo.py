"""Causal language models of many kinds, tiny and random: which layers are quantized, and one run each."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from tiny_lm import prose, tiny_lm

from bayesq.suite import plan, runner, schema
from bayesq.suite.config import run_dir
from bayesq.suite.results import LAYERS_FILE, read_rows
from bayesq.walker import Walker

ROOT = Path(__file__).parents[2]
WINDOW = 12
COMMON: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
# kind: sizes, and the kinds of layers that are quantized with their number in the network
ZOO: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({**COMMON, "num_key_value_heads": 1}, {"Linear": 14}),
    "qwen2": ({**COMMON, "num_key_value_heads": 1}, {"Linear": 14}),
    "qwen3": ({**COMMON, "num_key_value_heads": 1, "head_dim": 8}, {"Linear": 14}),
    "gemma3_text": ({**COMMON, "num_key_value_heads": 1, "head_dim": 8}, {"Linear": 14}),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}, {"Conv1D": 8}),
    "opt": ({**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3}, {"Linear": 12}),
    "gpt_neox": (COMMON, {"Linear": 8}),
    "phi": (COMMON, {"Linear": 12}),
    "mixtral": (
        {**COMMON, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"Linear": 8, "Experts": 4},
    ),
}


@pytest.mark.parametrize("kind", ZOO)
def test_a_language_model_is_quantized(kind: str, tmp_path: Path) -> None:
    sizes, expected = ZOO[kind]
    folder = tiny_lm(tmp_path / kind, kind, **sizes)
    text = tmp_path / "prose.txt"
    text.write_text(prose(1500), encoding="utf-8")
    overrides = [
        *("model=causal_lm", f"model.checkpoint={folder}", "dataset=text", f"dataset.path={text}", "device=cpu"),
        *(f"dataset.window={WINDOW}", "dataset.limit=4", "calibration.examples=16", "method=gptq", "bits=4"),
        *("wandb.mode=disabled", f"results_dir={tmp_path}", f"cache_dir={tmp_path}/cache"),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides)
    schema.validate(cfg)
    result = runner.run(cfg)
    kinds = [row["kind"] for row in read_rows(run_dir(cfg) / LAYERS_FILE)]
    assert {name: kinds.count(name) for name in kinds} == expected
    assert 0 < result["q/kl_to_fp"] < 5
    rest = ("embed", "wte", "wpe", "lm_head", "mlp.gate.weight")  # the last one sends tokens to experts
    assert all(any(part in name for part in rest) for name in result["quantized/left_out"])


def test_every_block_is_walked(tmp_path: Path) -> None:
    """A pass for the layers of the last block runs that block alone."""
    folder = tiny_lm(tmp_path / "llama", "llama", **{**ZOO["llama"][0], "num_hidden_layers": 4})
    text = tmp_path / "prose.txt"
    text.write_text(prose(1500), encoding="utf-8")
    overrides = [
        *("model=causal_lm", f"model.checkpoint={folder}", "dataset=text", f"dataset.path={text}", "device=cpu"),
        *(f"dataset.window={WINDOW}", "dataset.limit=4", "calibration.examples=16", f"cache_dir={tmp_path}"),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        work = plan.load_workload(compose("config", overrides), tmp_path)
    module, layers = work.subject.module, work.subject.layers
    walker = Walker(module, work.subject.blocks, layers, lambda: work.subject.examples.batches(8, "cpu"))
    runs = dict.fromkeys(range(4), 0)
    for k, layer in enumerate(module.model.model.layers):

        def count(*_: object, k: int = k) -> None:
            runs[k] += 1

        layer.register_forward_hook(count)
    groups = [[name] for name in layers if "down_proj" in name]
    for group in groups[:2]:  # the first pass is of the whole network, the second one finds out what can be stored
        for _, step in walker.passes(group):
            step()
    before = dict(runs)
    for group in groups[2:]:
        for _, step in walker.passes(group):
            step()
    batches = 2
    assert runs[3] - before[3] == batches  # once for each batch
    assert runs[0] == before[0]
