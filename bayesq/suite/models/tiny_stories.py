"""A Llama of 260,000 parameters trained on TinyStories, read from the binary files of llama2.c.

The weight file begins with seven int32: width, hidden width, blocks, heads, key and value heads, vocabulary and
sequence length. The float32 weights follow, each kind for all blocks. The head shares the embedding's weight.

The tokenizer file begins with the length of the longest token, an int32; each token has a score (float32), a length
(int32) and its bytes. Texts are encoded by repeatedly merging the two neighbours whose token has the highest
score.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesq.files import file_sha256
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.causal_lm import LM_OPTIONS, CausalLM, language_model

WEIGHTS, TOKENS = "stories260K.bin", "tok512.bin"
HEADER = ("dim", "hidden", "blocks", "heads", "kv_heads", "vocabulary", "length")
SPECIAL = ("<unk>", "<s>", "</s>")
# The library writes the space of a token like this.
SPACE = "▁"


@dataclass(frozen=True)
class TinyStories:
    """The network in the folder `checkpoint`."""

    checkpoint: str

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network; UserError if a file is missing or has another size than its header says."""
        folder, key = Path(self.checkpoint), f"model.checkpoint={self.checkpoint}"
        try:
            content, tokens = (folder / WEIGHTS).read_bytes(), (folder / TOKENS).read_bytes()
        except OSError as error:
            raise UserError(f"{key}: needs {WEIGHTS} and {TOKENS} ({error.strerror or error})") from error
        try:
            sizes, weights = read_weights(content)
            tokenizer = read_tokenizer(tokens, sizes["vocabulary"])
        except (ValueError, struct.error) as error:
            raise UserError(f"{key}: is damaged, or not in the layout of llama2.c ({error})") from error
        model = llama(sizes, weights)
        description = {"fp_source": str(folder / WEIGHTS), "checkpoint_sha256": file_sha256(folder / WEIGHTS)}
        return language_model(model, tokenizer, key, description)

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        return CausalLM().bare(blueprint)


def read_weights(content: bytes) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes by the names of HEADER, and the tensors under the names of transformers' Llama, without the tied head.

    Raises:
        ValueError: the content is shorter or longer than its header says.
    """
    size = dict(zip(HEADER, struct.unpack(f"<{len(HEADER)}i", content[: 4 * len(HEADER)]), strict=True))
    dim, hidden, blocks = size["dim"], size["hidden"], size["blocks"]
    per_head = dim // size["heads"]
    kv = size["kv_heads"] * per_head
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("embed_tokens", (size["vocabulary"], dim)),
        ("input_layernorm", (blocks, dim)),
        ("self_attn.q_proj", (blocks, dim, dim)),
        ("self_attn.k_proj", (blocks, kv, dim)),
        ("self_attn.v_proj", (blocks, kv, dim)),
        ("self_attn.o_proj", (blocks, dim, dim)),
        ("post_attention_layernorm", (blocks, dim)),
        ("mlp.gate_proj", (blocks, hidden, dim)),
        ("mlp.down_proj", (blocks, dim, hidden)),
        ("mlp.up_proj", (blocks, hidden, dim)),
        ("norm", (dim,)),
        ("rotary", (2, size["length"], per_head // 2)),  # cosines and sines, which transformers computes itself
    ]
    numbers = np.frombuffer(content[4 * len(HEADER) :], dtype="<f4").copy()
    expected = sum(math.prod(shape) for _, shape in layout)
    if len(numbers) != expected:
        raise ValueError(f"{WEIGHTS} has {len(numbers)} weights, and its header asks for {expected}")
    weights: dict[str, Tensor] = {}
    for name, shape in layout:
        count = math.prod(shape)
        tensor, numbers = torch.from_numpy(numbers[:count]).reshape(shape), numbers[count:]
        if name in ("embed_tokens", "norm"):
            weights[f"model.{name}.weight"] = tensor
        elif name != "rotary":
            for k, matrix in enumerate(tensor):
                turned = name in ("self_attn.q_proj", "self_attn.k_proj")
                weights[f"model.layers.{k}.{name}.weight"] = halves_first(matrix, per_head) if turned else matrix
    return size, weights


def halves_first(matrix: Tensor, per_head: int) -> Tensor:
    """Rows of queries or keys in transformers' order.

    llama2.c rotates neighbours (0, 1), (2, 3), ... of each head, transformers rotates (0, d/2), (1, d/2 + 1), ...
    """
    rows = matrix.reshape(-1, per_head // 2, 2, matrix.shape[1])
    return rows.transpose(1, 2).reshape(matrix.shape).contiguous()


def llama(size: Mapping[str, int], weights: Mapping[str, Tensor]) -> nn.Module:
    """transformers' Llama of these sizes with these weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["dim"],
        intermediate_size=size["hidden"],
        num_hidden_layers=size["blocks"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=size["length"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model: nn.Module = initialised(lambda: AutoModelForCausalLM.from_config(config, **LM_OPTIONS))
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


def read_tokenizer(content: bytes, vocabulary: int) -> Any:
    """A tokenizer of the transformers library; ValueError or struct.error if the content is cut off."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    place, pieces, scores = 4, [], []
    for _ in range(vocabulary):
        score, length = struct.unpack_from("<fi", content, place)
        pieces.append(content[place + 8 : place + 8 + length].decode("utf-8").replace(" ", SPACE))
        scores.append(score)
        place += 8 + length
    pieces[: len(SPECIAL)] = SPECIAL
    model = models.BPE(
        {piece: k for k, piece in enumerate(pieces)},
        merges(pieces, scores),
        unk_token=SPECIAL[0],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end)


def merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, those of the highest score first."""
    number = {piece: k for k, piece in enumerate(pieces)}
    order = sorted(range(len(SPECIAL), len(pieces)), key=lambda k: (-scores[k], k))
    return [
        (pieces[k][:cut], pieces[k][cut:])
        for k in order
        if not (pieces[k].startswith("<0x") and len(pieces[k]) == 6)
        for cut in range(1, len(pieces[k]))
        if pieces[k][:cut] in number and pieces[k][cut:] in number
    ]
