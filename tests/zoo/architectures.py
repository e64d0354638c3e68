"""Tiny random networks of the two libraries, a line each: how they are built, and what a run must make of them.

`refused` says that a run must end with one line on it, and is a part of that line: the name of the layer, or of what it
is in, or what is wrong with the network as a whole. `unreached` names layers that no example reaches.
"""

# ruff: noqa: E501

import importlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

CLASSES = 3


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        name: of the test.
        factory: timm: a name of its registry, or module.Class; transformers: a model type.
        options: of the factory, or of the configuration.
        size: pixels a side of timm's input.
        refused: see above; None: the network is accepted.
        unreached: see above.
        padding: side on which its tokenizer fills short texts.
    """

    name: str
    factory: str
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    refused: str | None = None
    unreached: tuple[str, ...] = ()
    padding: str = "right"

    @property
    def pixels(self) -> int:
        """Side of the images it reads."""
        own = self.options.get("img_size", self.size)
        return int(own[0] if isinstance(own, tuple) else own)


def _image(name: str, factory: str, size: int = 32, refused: str | None = None, **options: Any) -> Architecture:
    return Architecture(name, factory, options, size, refused)


def _part(path: str) -> Any:
    """An object of timm, by its place below the package: it is imported when a network is built."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"timm.{module}"), name)


class Part:
    """An option that is an object of timm, named by its place below the package.

    Args:
        path: place.
        arguments: what it is called with; without any, it is the option itself.
    """

    def __init__(self, path: str, **arguments: Any) -> None:
        self.path, self.arguments = path, arguments

    def made(self) -> Any:
        """The option."""
        found = _part(self.path)
        return found(**self.arguments) if self.arguments else found


VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
EVA = VIT | {"embed_dim": 48}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}
STAGES = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
COAT = {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 8, "img_size": 64}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32}
ATTENTION = {
    "dims": (8, 8, 32, 32),
    "depths": (1, 1, 1, 1),
    "norm_layers": [Part("models.metaformer.LayerNorm2dNoBias")] * 2 + [Part("models.metaformer.LayerNormNoBias")] * 2,
    "token_mixers": [Part("models.metaformer.SepConv")] * 2 + [Part("models.metaformer.Attention")] * 2,
}
RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32), "stem_width": 8}

# fmt: off
TIMM = [
    _image("vit", "vit_tiny_patch16_224", **VIT, img_size=32),
    _image("deit3", "deit3_small_patch16_224", **VIT, img_size=32),
    _image("deit_distilled", "deit_tiny_distilled_patch16_224", **VIT, img_size=32),
    _image("clip", "vit_base_patch16_clip_224", **VIT, img_size=32),
    _image("siglip", "vit_base_patch16_siglip_224", **VIT, img_size=32),  # attention pooling
    _image("parallel", "vit_base_patch16_xp_224", **VIT, img_size=32),
    _image("rope_mixed", "vit_base_patch16_rope_mixed_224", **VIT, img_size=32),
    _image("relpos", "vit_relpos_small_patch16_224", **VIT, img_size=32),  # no batch axis
    _image("srelpos", "vit_srelpos_small_patch16_224", **VIT, img_size=32),
    _image("samvit", "samvit_base_patch16_224", **VIT, img_size=32, window_size=2, global_attn_indexes=(1,)),
    _image("naflexvit", "naflexvit_base_patch16_gap", **EVA),
    _image("hybrid", "vit_tiny_r_s16_p8_224", embed_dim=32, depth=2, num_heads=4, img_size=32, refused="patch_embed.backbone"),
    _image("beit", "beit_base_patch16_224", **VIT, img_size=32),  # F.linear on qkv.weight
    _image("beitv2", "beitv2_base_patch16_224", **VIT, img_size=32),
    _image("eva", "eva_giant_patch14_224", **VIT, img_size=32),
    _image("eva02_fused", "eva02_tiny_patch14_224", **EVA, img_size=32),
    _image("eva02", "eva02_large_patch14_224", **EVA, img_size=32),
    _image("pe_core", "vit_pe_core_tiny_patch16_384", **EVA, img_size=32),
    _image("dinov3", "vit_small_patch16_dinov3", **EVA, img_size=32),
    _image("swin", "swin_tiny_patch4_window7_224", **SWIN, img_size=16),
    _image("swinv2", "swinv2_tiny_window8_256", **SWIN, img_size=16),
    _image("swinv2_cr", "swinv2_cr_tiny_ns_224", **SWIN, img_size=16),
    _image("xcit", "xcit_nano_12_p16_224", img_size=32, embed_dim=32, depth=1, num_heads=4),
    _image("cait", "cait_xxs24_224", img_size=32, embed_dim=32, depth=1, num_heads=4),
    _image("coatnet", "coatnet_nano_rw_224", 64, **COAT),
    _image("coatnet_rmlp", "coatnet_rmlp_1_rw_224", 64, **COAT),
    _image("maxvit_rmlp", "maxvit_rmlp_pico_rw_256", 64, **COAT | {"embed_dim": (32, 32), "depths": (1, 1)}),
    _image("levit", "levit_128s", 64, img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)),
    _image("volo", "volo.VOLO", layers=(1, 1), img_size=32, embed_dims=(16, 32), num_heads=(2, 4), downsamples=(True, False), outlook_attention=(True, False), stem_hidden_dim=16),
    _image("coat_lite", "coat.CoaT", 64, img_size=64, patch_size=4, embed_dims=(16, 16, 16, 16), serial_depths=(2, 1, 1, 1), num_heads=8, mlp_ratios=(2, 2, 2, 2)),
    _image("coat", "coat.CoaT", 64, img_size=64, patch_size=4, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), parallel_depth=1, num_heads=8, mlp_ratios=(2, 2, 2, 2)),
    _image("convit", "convit_tiny", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, local_up_to_layer=1),
    _image("visformer", "visformer_tiny", img_size=32, embed_dim=48, depth=(1, 1, 1), num_heads=3),
    _image("tnt", "tnt_s_legacy_patch16_224", img_size=32, embed_dim=48, inner_dim=8, depth=1, num_heads_outer=4),
    _image("davit", "davit.DaVit", 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), window_size=4),
    _image("nest", "nest.Nest", img_size=32, patch_size=2, embed_dims=(16, 32, 48), depths=(1, 1, 1), num_heads=(1, 2, 3)),
    _image("gcvit", "gcvit.GlobalContextVit", 64, depths=(1, 1), embed_dim=16, num_heads=(1, 2), img_size=64, window_size=(4, 4)),
    _image("twins_svt", "twins_svt_small", 64, img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), wss=(4, 4, 2, 2)),
    _image("pvt_v2", "pvt_v2_b0", 64, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)),
    _image("hiera", "hiera_tiny_224", 64, img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1), q_pool=2),
    _image("crossvit", "crossvit.CrossVit", 48, img_size=48, img_scale=(1.0, 1.0), patch_size=(8, 16), embed_dim=(16, 32), depth=((1, 1, 1),), num_heads=(2, 2), mlp_ratio=(2.0, 2.0, 1.0)),
    _image("mixer", "mlp_mixer.MlpMixer", **MIXER),
    _image("resmlp", "mlp_mixer.MlpMixer", **MIXER, mlp_ratio=4, block_layer=Part("models.mlp_mixer.ResBlock"), norm_layer=Part("models.mlp_mixer.Affine")),
    _image("gmlp", "mlp_mixer.MlpMixer", **MIXER, mlp_ratio=4, block_layer=Part("models.mlp_mixer.SpatialGatingBlock"), mlp_layer=Part("layers.GatedMlp")),
    _image("poolformer", "metaformer.MetaFormer", **STAGES),
    _image("caformer", "metaformer.MetaFormer", **ATTENTION),
    _image("convnext", "convnext_atto", **STAGES),
    _image("convnextv2", "convnextv2_atto", **STAGES),
    _image("mambaout", "test_mambaout", 64),
    _image("focalnet", "focalnet.FocalNet", 64, embed_dim=8, depths=(1, 1, 1, 1)),
    _image("convmixer", "convmixer.ConvMixer", dim=16, depth=2, kernel_size=5),
    _image("resnet", "resnet.ResNet", block=Part("models.resnet.BasicBlock"), **RESNET),
    _image("resnetv2", "resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_chs=16),
    _image("resnetv2_bit", "resnetv2.ResNetV2", layers=(1,), channels=(128,), stem_chs=32, refused="stem.conv"),
    _image("nfnet", "test_nfnet", 64, refused="stem.conv"),
    _image("efficientnet", "test_efficientnet", 64),
    _image("byobnet", "test_byobnet", 64),
    _image("densenet", "densenet.DenseNet", growth_rate=4, block_config=(1, 1, 1, 1)),
    _image("sequencer", "sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), hidden_sizes=(4, 4, 4, 4)),  # LSTM
    _image("mvitv2", "mvitv2.MultiScaleVit", 64, cfg=Part("models.mvitv2.MultiScaleVitCfg", depths=(1, 1), embed_dim=16, stride_q=((1, 1), (2, 2))), img_size=(64, 64)),
    _image("mobilenetv3", "lcnet_035"),  # a Linear class of its own
    _image("starnet", "starnet.StarNet", base_dim=8, depths=(1, 1)),
    _image("fasternet", "fasternet.FasterNet", embed_dim=16, depths=(1, 1)),
    _image("inception_next", "inception_next.MetaNeXt", depths=(1, 1), dims=(16, 32), token_mixers=Part("models.inception_next.InceptionDWConv2d"), mlp_ratios=(2, 2)),
    _image("pit", "pit.PoolingVisionTransformer", img_size=32, patch_size=8, stride=4, base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(2, 2, 2), mlp_ratio=2),
    _image("edgenext", "edgenext.EdgeNeXt", 64, dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), global_block_counts=(0, 1, 1, 1), heads=(2, 2, 2, 2), d2_scales=(2, 2, 3, 4)),
    _image("efficientvit_mit", "efficientvit_mit.EfficientVit", 64, widths=(8, 8, 8, 16, 16), depths=(1, 1, 1, 1, 1), head_dim=8, head_widths=(32, 32)),
    _image("repvit", "repvit.RepVit", 64, embed_dim=(8, 16), depth=(1, 1), mlp_ratio=2),
    _image("ghostnet", "ghostnet.GhostNet", 64, cfgs=[[[3, 16, 16, 0, 1]], [[3, 16, 24, 0.25, 2]]], width=0.5),
    _image("tiny_vit", "tiny_vit.TinyVit", 64, embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), window_sizes=(4, 4)),
]

# fmt: on

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 8}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
MOE = LLAMA | {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEBERTA = BERT | {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "max_relative_positions": 16,
}


def _text(
    name: str,
    kind: str,
    refused: str | None = None,
    unreached: tuple[str, ...] = (),
    padding: str = "right",
    **options: Any,
) -> Architecture:
    return Architecture(name, kind, options, refused=refused, unreached=unreached, padding=padding)


# fmt: off
TRANSFORMERS = [
    _text("bert", "bert", **BERT),
    _text("roberta", "roberta", **BERT),
    _text("electra", "electra", **BERT, embedding_size=12),
    _text("albert", "albert", **BERT, embedding_size=12),  # one layer, called twice
    _text("distilbert", "distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    _text("mpnet", "mpnet", **BERT),
    _text("fnet", "fnet", **BERT),  # padding counts
    _text("convbert", "convbert", **BERT, embedding_size=12, conv_kernel_size=3, head_ratio=1),
    _text("longformer", "longformer", **BERT, attention_window=4),  # positions first
    _text("big_bird", "big_bird", **BERT, attention_type="original_full"),
    _text("roformer", "roformer", **BERT),
    _text("squeezebert", "squeezebert", **BERT, embedding_size=16),  # Conv1d
    _text("mobilebert", "mobilebert", **BERT, embedding_size=12, intra_bottleneck_size=12, true_hidden_size=12, num_feedforward_networks=2),
    _text("yoso", "yoso", **BERT),
    _text("rembert", "rembert", **BERT, input_embedding_size=12, output_embedding_size=12),
    _text("esm", "esm", **BERT, mask_token_id=4, unreached=("esm.contact_head.regression",)),
    _text("xmod", "xmod", **BERT, languages=["en_XX"], default_language="en_XX"),
    _text("layoutlm", "layoutlm", **BERT, max_2d_position_embeddings=16),
    _text("ernie", "ernie", **BERT),
    _text("megatron", "megatron-bert", **BERT),
    _text("modernbert", "modernbert", **BERT, local_attention=8),
    _text("nomic_bert", "nomic_bert", **BERT),
    _text("deberta", "deberta", **DEBERTA),  # no batch axis
    _text("deberta_v2", "deberta-v2", **DEBERTA, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm"),
    _text("deberta_v2_conv", "deberta-v2", **DEBERTA, conv_kernel_size=3),
    _text("funnel", "funnel", d_model=16, n_head=2, d_head=8, d_inner=24, block_sizes=[1, 1]),
    _text("xlnet", "xlnet", d_model=16, n_layer=1, n_head=2, d_inner=24, padding="left"),  # positions first
    _text("xlm", "xlm", emb_dim=16, n_layers=2, n_heads=2, pad_index=0),
    _text("flaubert", "flaubert", emb_dim=16, n_layers=2, n_heads=2, pad_index=0),
    _text("bart", "bart", **BART),
    _text("mbart", "mbart", **BART),
    _text("t5", "t5", **T5),
    _text("umt5", "umt5", **T5),
    _text("gpt2", "gpt2", **GPT2),  # Conv1D
    _text("openai_gpt", "openai-gpt", **GPT2),
    _text("gpt_neo", "gpt_neo", hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, attention_types=[[["global", "local"], 1]]),
    _text("gpt_neox", "gpt_neox", **BERT),
    _text("opt", "opt", **BERT, ffn_dim=24, word_embed_proj_dim=16),
    _text("bloom", "bloom", hidden_size=16, n_layer=2, n_head=2),
    _text("falcon", "falcon", **BERT),
    _text("llama", "llama", **LLAMA),
    _text("mistral", "mistral", **LLAMA),
    _text("qwen3", "qwen3", **LLAMA),
    _text("gemma", "gemma", **LLAMA),
    _text("gemma3", "gemma3_text", **LLAMA),
    _text("phi", "phi", **LLAMA),
    _text("phi3", "phi3", **LLAMA),
    _text("mixtral", "mixtral", **MOE),  # stacked experts
    _text("qwen2_moe", "qwen2_moe", **MOE, shared_expert_intermediate_size=12, decoder_sparse_step=1),
    _text("qwen3_moe", "qwen3_moe", **MOE, decoder_sparse_step=1),
    _text("canine", "canine", **BERT),
    _text("nystromformer", "nystromformer", refused="the network cannot run", **BERT, num_landmarks=4, segment_means_seq_len=16),
    _text("reformer", "reformer", refused="other outputs each time", hidden_size=16, attn_layers=["local", "lsh"], num_attention_heads=2, attention_head_size=8, feed_forward_size=24, axial_pos_embds=False, is_decoder=False, local_attn_chunk_length=4, lsh_attn_chunk_length=4, num_buckets=2),
    _text("ibert", "ibert", **BERT),
    _text("phimoe", "phimoe", **MOE),
    _text("gpt_oss", "gpt_oss", **MOE),
    _text("jetmoe", "jetmoe", **MOE, kv_channels=8),
    _text("jamba", "jamba", refused="mamba.dt_proj", **MOE, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    _text("big_bird_sparse", "big_bird", **BERT, attention_type="block_sparse", block_size=4, num_random_blocks=1),
]
# fmt: on


def build_image(architecture: Architecture, classes: int = CLASSES) -> nn.Module:
    """A network of timm as its constructor leaves it."""
    import timm

    options = {key: _resolved(value) for key, value in architecture.options.items()}
    if "." in architecture.factory:
        network: nn.Module = _part(f"models.{architecture.factory}")(num_classes=classes, **options)
    else:
        network = timm.create_model(architecture.factory, num_classes=classes, **options)
    return network


def _resolved(value: Any) -> Any:
    if isinstance(value, Part):
        return value.made()
    return [_resolved(item) for item in value] if isinstance(value, list) else value
