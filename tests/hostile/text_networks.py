"""Random sequence classifiers of the transformers library, of a few kilobytes each, with a tokenizer of a few words."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "suite"))

from tiny_bert import tiny_tokenizer

# Most configurations know these names, by themselves or as other names of their own.
USUAL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "id2label": {0: "bad", 1: "good"},  # BART's has three if they have no names
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TWO_SIDED: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 3,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "max_relative_positions": -1,
    "position_biased_input": False,
}
UNLIMITED = {"max_position_embeddings": None, "num_hidden_layers": None}
# What a family needs beside or instead; None: it does not take what most do.
KINDS: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 16},
    "Arcee": GROUPED,
    "Bart": TWO_SIDED,
    "Bert": {},
    "BigBird": {},
    "BioGpt": {},
    "Bloom": {"n_layer": 2, "n_head": 2},
    "Camembert": {},
    "Canine": {"num_hash_buckets": 64},
    "ConvBert": {"embedding_size": 32, "head_ratio": 1, "conv_kernel_size": 3},
    "CTRL": {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 64, "n_positions": 128},
    "Data2VecText": {},
    "Deberta": RELATIVE,
    "DebertaV2": {**RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "Electra": {"embedding_size": 32},
    "Ernie": {},
    "Esm": {"position_embedding_type": "absolute"},
    "Falcon": {},
    "Flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    "FNet": {},
    "Funnel": {**UNLIMITED, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1},
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "GPT2": {},
    "GPTBigCode": {},
    "GPTJ": {"rotary_dim": 8},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2},
    "GPTNeoX": {},
    "IBert": {},
    "JetMoe": {"num_key_value_heads": 1, "kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "LayoutLM": {},
    "Lilt": {"hidden_size": 48},
    "Llama": GROUPED,
    "Longformer": {"attention_window": 4},
    "Luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "MBart": TWO_SIDED,
    "MegatronBert": {},
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Mixtral": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "MobileBert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "ModernBert": {"cls_token_id": 2, "sep_token_id": 3},
    "MPNet": {},
    "MPT": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "Mra": {"block_per_row": 1},
    "MT5": T5,
    "Mvp": TWO_SIDED,
    "Nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3},
    "OpenAIGPT": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
    },
    "Phi": GROUPED,
    "PLBart": TWO_SIDED,
    "Qwen2": GROUPED,
    "Qwen2Moe": {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "Qwen3": GROUPED,
    "Reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 64,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_hashes": 1,
        "num_buckets": 4,
        "is_decoder": False,
    },
    "RemBert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "Roberta": {},
    "RobertaPreLayerNorm": {},
    "RoCBert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "RoFormer": {},
    "SqueezeBert": {"embedding_size": 32, **{f"{name}_groups": 1 for name in ("q", "k", "v")}},
    "StableLm": GROUPED,
    "T5": T5,
    "UMT5": T5,
    "XLM": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    "XLMRoberta": {},
    "XLNet": {**UNLIMITED, "n_layer": 2, "n_head": 2, "d_head": 16, "d_inner": 64},
    "Xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "Yoso": {"num_hash": 2},
}


def random_classifier(kind: str, folder: Path, padding_side: str = "right", **changed: Any) -> Path:
    """Save a random classifier of two classes; `changed` are options of its configuration."""
    import transformers

    given = {key: value for key, value in {**USUAL, **KINDS[kind], **changed}.items() if value is not None}
    name = {"MPT": "Mpt"}.get(kind, kind)
    config = getattr(transformers, f"{name}Config")(**given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForSequenceClassification")(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # larger than a fresh network's, so that every part has a say
                nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    # Positions of some begin behind the number of the padding token.
    tiny_tokenizer(folder, model_max_length=100, padding_side=padding_side)
    return folder
