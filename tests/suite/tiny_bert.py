"""Random BERT classifiers of a few kilobytes with a tokenizer of a few words, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "a", "good", "bad", "fine", "poor", "warm", "cold", "film", "story", "number", "of", "train", "dev")
LENGTHS = {"vocab_size": 64, "max_position_embeddings": 64}
SIZES = LENGTHS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tiny_tokenizer(folder: Path, pad: str | None = "[PAD]", **options: Any) -> None:
    """Save a WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *WORDS, *map(str, range(30))]
    backend = BertWordPieceTokenizer(vocab={name: i for i, name in enumerate(names)})
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    if pad is not None:
        tokens["pad_token"] = pad
    names_of_inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        **{"model_max_length": 64, "model_input_names": names_of_inputs, **tokens, **options},
    ).save_pretrained(folder)


def tiny_bert(
    folder: Path, outputs: int, classes: Sequence[str] = (), seed: int = 0, kind: str = "bert", **changed: int
) -> Path:
    """Save a random classifier of `outputs` logits, named after `classes` if there are any, with its tokenizer.

    Sizes may be `changed`.
    """
    import transformers

    config_class, model_class = {
        "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "encoder": (transformers.BertConfig, transformers.BertModel),
        "distilbert": (transformers.DistilBertConfig, transformers.DistilBertForSequenceClassification),
    }[kind]
    sizes = SIZES | changed
    if kind == "distilbert":
        sizes = LENGTHS | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    names = {"id2label": dict(enumerate(classes))} if classes else {"num_labels": outputs}
    config = config_class(initializer_range=0.3, **sizes, **names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    tiny_tokenizer(folder, model_max_length=sizes["max_position_embeddings"])
    return folder
