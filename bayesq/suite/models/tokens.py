"""Texts as the tokens of a network of the transformers library, in batches that do not change what it computes."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesq.batches import PADDED, EncodedExamples, Layout, TensorExamples
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError
from bayesq.suite.models.padding import find_layout
from bayesq.suite.models.text import Texts, texts_of, token_examples

log = logging.getLogger(__name__)

PROBED = 64  # texts whose longest tells whether the network may see padding


class Tokens:
    """Encodes texts with a tokenizer of the transformers library.

    Args:
        tokenizer: with a padding token.
        max_length: tokens of a text or pair, at most.
        key: of the model, for messages.

    Raises:
        UserError: it has no padding token, or does not take so many tokens.
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
        """Give the model token_type_ids if it takes them and the tokenizer makes them, and the token for padding.

        Raises:
            UserError: the model has fewer positions or token embeddings than may be asked for.
        """
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:  # XLNet's -1: as many as one likes
            self._check_length(positions)
        if len(self.tokenizer) > _known_tokens(model):
            raise UserError(f"{self.key}: its tokenizer knows more tokens than its embedding table has rows")
        text = model.config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:  # decoders look for the last token that is no padding
            text.pad_token_id = self.tokenizer.pad_token_id
        takes = inspect.signature(model.forward).parameters
        if "token_type_ids" in takes and "token_type_ids" in self.tokenizer.model_input_names:
            self.names = ("input_ids", "attention_mask", "token_type_ids")

    def try_layouts(self, module: nn.Module, examples: Examples) -> None:
        """Batch texts in the way that changes nothing of what the network computes; see `find_layout`.

        It is tried on the longest of a few texts, on its beginning, and on a text of the same length: its second token
        in place of all in between.

        Raises:
            UserError: the network cannot run them.
        """
        texts = texts_of(examples.select(torch.arange(min(len(examples), PROBED))), "transformers")
        text = max(texts, key=_characters)
        rows = self.rows(cast(Texts, [text, _each(text, self._beginning)]))
        if len({len(tokens) for tokens in rows["input_ids"]}) == 1:  # of one word, say
            rows = self.rows(cast(Texts, [_each(text, lambda part: f"{part} {part}"), text]))
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
        """A quarter of what is read of the text, or less."""
        return text[: min(len(text), self.max_length) // 4 + 1]

    def rows(self, texts: Texts) -> dict[str, list[list[int]]]:
        """Numbers of the tokens of each text, by name of the module's argument."""
        single = [text if isinstance(text, str) else text[0] for text in texts]
        second = [text[1] for text in texts if not isinstance(text, str)]
        encoded = self.tokenizer(
            single,
            second or None,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_token_type_ids="token_type_ids" in self.names,
        )
        return {name: encoded[name] for name in self.names}

    def padded(self, rows: Mapping[str, list[list[int]]], labels: Tensor, layout: Layout) -> TensorExamples:
        """Padded to the longest."""
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return token_examples(rows, labels, padding, layout)

    def __call__(self, examples: Examples) -> EncodedExamples:
        """Token numbers, padded to the longest example."""
        return self.padded(self.rows(texts_of(examples, "transformers")), examples.labels, self.layout)


def _characters(text: str | tuple[str, str]) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _each(text: str | tuple[str, str], change: Callable[[str], str]) -> str | tuple[str, str]:
    """A text, or both of a pair, changed."""
    return change(text) if isinstance(text, str) else (change(text[0]), change(text[1]))


def _known_tokens(model: Any) -> float:
    """Rows of the embedding table; without limit for networks that have none (CANINE hashes, Perceiver maps bytes)."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return math.inf
    return table.num_embeddings if isinstance(table, nn.Embedding) else math.inf
