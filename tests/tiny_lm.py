"""Random language models of a few kilobytes, with a tokenizer that makes a token of each letter, for tests."""

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
SPECIAL = ("<unk>", "<s>")
VOCABULARY = len(SPECIAL) + len(LETTERS)
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def letters(bos: bool = True) -> Any:
    """A tokenizer of the transformers library: one token for each letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({token: k for k, token in enumerate([*SPECIAL, *LETTERS])}, unk_token=SPECIAL[0])
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    begin = {"bos_token": SPECIAL[1]} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=SPECIAL[0], **begin)


def tiny_lm(folder: Path, kind: str = "llama", bos: bool = True, **sizes: Any) -> Path:
    """Save a random language model of a kind that the transformers library knows, and the tokenizer `letters`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {"vocab_size": VOCABULARY, **(LLAMA if kind == "llama" else {}), **sizes}
    config = AutoConfig.for_model(kind, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters(bos).save_pretrained(folder)
    return folder


def prose(count: int, seed: int = 0) -> str:
    """A text of `count` random letters in lines."""
    drawn = torch.randint(len(LETTERS), (count,), generator=torch.Generator().manual_seed(seed))
    return "".join(LETTERS[k] for k in drawn.tolist())
