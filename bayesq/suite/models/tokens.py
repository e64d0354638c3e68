"""Encode texts for a network of the transformers library, in batches that do not change its outputs."""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.batches import PADDED, EncodedExamples, Layout, TensorExamples
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.padding import find_layout
from bayesq.suite.models.text import parts_of, token_examples

log = logging.getLogger(__name__)

PROBED = 64  # the longest of this many texts tests whether padding is safe


class Tokens:
    """Encodes texts (or pairs) as at most `max_length` tokens; messages name the model by `key`.

    Raises:
        UserError: the tokenizer has no padding token, or takes fewer than `max_length` tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int, key: str) -> None:
        self.tokenizer, self.max_length, self.key = tokenizer, max_length, key
        self.names: tuple[str, ...] = ("input_ids", "attention_mask")
        self.layout = Layout()
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"{key}: its tokenizer has no padding token, which batches need: name one as pad_token in "
                "tokenizer_config.json"
            )
        self._check_length(tokenizer.model_max_length)

    def _check_length(self, longest: int) -> None:
        if self.max_length > longest:
            raise UserError(f"model.max_length={self.max_length} is not possible: {self.key} takes at most {longest}")

    def fit_to(self, model: Any) -> None:
        """Pass token_type_ids if model and tokenizer have them, and tell the model the padding token.

        Raises:
            UserError: the model has too few positions or token embeddings.
        """
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:  # XLNet has -1: no limit
            self._check_length(positions)
        if len(self.tokenizer) > _known_tokens(model):
            raise UserError(f"{self.key}: its tokenizer knows more tokens than its embedding table has rows")
        text = model.config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:  # decoders classify at the last token that is not padding
            text.pad_token_id = self.tokenizer.pad_token_id
        takes = inspect.signature(model.forward).parameters
        if "token_type_ids" in takes and "token_type_ids" in self.tokenizer.model_input_names:
            self.names = ("input_ids", "attention_mask", "token_type_ids")

    def try_layouts(self, module: nn.Module, examples: Examples) -> None:
        """Choose the layout of batches that does not change the network's outputs; see `find_layout`.

        Three texts are tried: the longest of a few texts, its beginning, and a text of the same length that repeats its
        second token.

        Raises:
            UserError: the network cannot run them, or its outputs are random.
        """
        texts = parts_of(examples.select(torch.arange(min(len(examples), PROBED))), "transformers")
        text = max(texts, key=lambda parts: sum(map(len, parts)))
        rows = self.rows([text, tuple(map(self._beginning, text))])
        if len({len(tokens) for tokens in rows["input_ids"]}) == 1:  # for example, texts of one word
            rows = self.rows([tuple(f"{part} {part}" for part in text), text])
        for name, numbers in rows.items():
            first, between, last = numbers[0][:1], numbers[0][1:-1], numbers[0][1:][-1:]
            numbers.append([*first, *between[:1] * len(between), *last] if name == "input_ids" else numbers[0])

        def encode(layout: Layout) -> TensorExamples:
            return self.padded(rows, torch.zeros(len(rows["input_ids"])), layout)

        side = "left" if self.tokenizer.padding_side == "left" else "right"
        try:
            self.layout, fault = find_layout(module, encode, side)
        except ValueError as error:
            raise UserError(f"{self.key}: {error}") from error
        if fault is not None:
            level = logging.INFO if self.layout.together == PADDED else logging.WARNING
            log.log(level, f"{self.key}: {fault}; calibration and evaluation use batches {self.layout}")

    def _beginning(self, text: str) -> str:
        """The first quarter of the text, at most about `max_length` / 4 characters."""
        return text[: min(len(text), self.max_length) // 4 + 1]

    def rows(self, texts: Sequence[tuple[str, ...]]) -> dict[str, list[list[int]]]:
        """Token numbers of each text or pair, by name of the module's argument."""
        encoded = self.tokenizer(
            *map(list, zip(*texts, strict=True)),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_token_type_ids="token_type_ids" in self.names,
        )
        return {name: encoded[name] for name in self.names}

    def padded(self, rows: Mapping[str, list[list[int]]], labels: Tensor, layout: Layout) -> TensorExamples:
        """Examples from `rows`, padded to the longest."""
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return token_examples(rows, labels, padding, layout)

    def __call__(self, examples: Examples) -> EncodedExamples:
        """Token numbers, padded to the longest example."""
        return self.padded(self.rows(parts_of(examples, "transformers")), examples.labels, self.layout)


def _known_tokens(model: Any) -> float:
    """Rows of the embedding table; infinite for networks without one (CANINE hashes, Perceiver maps bytes)."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return math.inf
    return table.num_embeddings if isinstance(table, nn.Embedding) else math.inf
