"""Encode texts for language models: windows of token numbers, all of the same length."""

from typing import Any

import torch
from torch import Tensor

from bayesq.batches import TensorExamples
from bayesq.likelihood import TOKENS
from bayesq.suite.datasets.base import Examples, Excerpt, shuffled
from bayesq.suite.errors import UserError


class Windows:
    """Encodes the excerpt of a split as windows, with a tokenizer of transformers; `key` names the model in messages.

    The model takes at most `positions` tokens (None: no limit), and its embedding table has `vocabulary` rows.
    """

    def __init__(self, tokenizer: Any, key: str, positions: int | None, vocabulary: int) -> None:
        self.tokenizer, self.key, self.positions, self.vocabulary = tokenizer, key, positions, vocabulary

    def __call__(self, examples: Examples) -> TensorExamples:
        """Windows input_ids [n, window]; the labels are zeros, because the next tokens are the targets.

        Raises:
            UserError: the text or the model is too short for a window, the text has too few windows, the tokenizer has
                no bos token where one is asked for, or it knows more tokens than the model.
        """
        excerpt = examples.inputs[0]
        if not isinstance(excerpt, Excerpt):
            raise UserError(f"{self.key}: is a language model and reads text: choose dataset=wikitext or dataset=text")
        if self.positions is not None and excerpt.window > self.positions:
            raise UserError(
                f"dataset.window={excerpt.window} is not possible: {self.key} takes at most {self.positions} tokens"
            )
        windows = self._cut(excerpt)
        count = len(windows) if excerpt.count is None else excerpt.count
        if not 1 <= count <= len(windows):
            raise UserError(
                f"{excerpt.count_key}={count} is not possible: {excerpt.key} has {len(windows)} windows of "
                f"{excerpt.window} tokens; choose 1 to {len(windows)}"
            )
        order = torch.arange(len(windows)) if excerpt.seed is None else shuffled(len(windows), excerpt.seed)
        return TensorExamples({TOKENS: windows[order[:count]]}, torch.zeros(count, dtype=torch.int64))

    def _cut(self, excerpt: Excerpt) -> Tensor:
        """All windows of the text, [n, window]."""
        tokens = torch.tensor(self.tokens(excerpt.text))
        length = excerpt.window - excerpt.bos
        count = len(tokens) // length
        if not count:
            raise UserError(
                f"{excerpt.key}: its text has {len(tokens)} tokens, fewer than a window: lower "
                f"dataset.window={excerpt.window}, or give a longer text"
            )
        windows = tokens[: count * length].reshape(count, length)
        if not excerpt.bos:
            return windows
        if self.tokenizer.bos_token_id is None:
            raise UserError(f"dataset.bos=true: the tokenizer of {self.key} has no bos token; choose dataset.bos=false")
        return torch.cat([torch.full((count, 1), self.tokenizer.bos_token_id), windows], 1)

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without special tokens; UserError if the model does not know one of them."""
        numbers: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if numbers and max(numbers) >= self.vocabulary:
            raise UserError(
                f"{self.key}: its tokenizer returns token {max(numbers)}, but its embedding table has "
                f"{self.vocabulary} rows: the tokenizer belongs to another model"
            )
        return numbers
