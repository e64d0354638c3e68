"""Which sequences share a batch, on which side padding lies, and how calibration counts such batches."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bayesq.batches import (
    ALONE,
    EQUAL,
    PADDED,
    Layout,
    TensorExamples,
    count_batches,
    in_one_batch,
    needs_no_padding,
    two_examples,
)
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.passes import CalibrationSettings
from bayesq.fisher import GRADIENT_MOMENT
from bayesq.suite.calibration import Calibration
from bayesq.suite.models.padding import find_layout
from bayesq.suite.models.text import token_examples
from bayesq.tensor_file import verify

ROWS = [[1, 2], [3, 4, 5, 6], [7], [8, 9], [10, 11, 12, 13], [14, 15]]
CPU = torch.device("cpu")


def encoded(together: str = PADDED, side: str = "right") -> TensorExamples:
    rows = {"input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS]}
    return token_examples(rows, torch.arange(6), {"input_ids": 99}, Layout(side, together))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("together", "batch_size", "index"),
    [
        (PADDED, 4, [[1, 4, 0, 3], [5, 2]]),
        (EQUAL, 4, [[1, 4], [0, 3, 5], [2]]),
        (EQUAL, 2, [[1, 4], [0, 3], [5], [2]]),
        (ALONE, 4, [[1], [4], [0], [3], [5], [2]]),
    ],
)
def test_batches(side, together, batch_size, index):
    examples = encoded(together, side)
    batches = list(examples.batches(batch_size, "cpu"))
    assert [batch.index.tolist() for batch in batches] == index
    assert count_batches(examples, batch_size) == len(index)
    for batch in batches:
        longest = max(len(ROWS[k]) for k in batch.index.tolist())
        for k, tokens, mask in zip(batch.index.tolist(), *batch.inputs.values(), strict=True):
            assert len(tokens) == longest and tokens[mask == 1].tolist() == ROWS[k]
            assert (tokens[mask == 0] == 99).all() and mask[0 if side == "right" else -1] == 1
    assert needs_no_padding(examples) == (together != PADDED)
    if together != PADDED:
        assert all(bool(batch.inputs["attention_mask"].all()) for batch in batches)


def test_checksums_tell_what_shares_a_batch():
    checksums = {encoded(together).checksum() for together in (PADDED, EQUAL, ALONE)}
    assert len(checksums) == 3
    examples = encoded()
    assert examples.checksum() == TensorExamples(examples.inputs, examples.labels, examples.lengths).checksum()


@pytest.mark.parametrize("together", [PADDED, EQUAL, ALONE])
def test_examples_in_one_batch(together):
    batch = in_one_batch(encoded(together), 4, "cpu")
    assert batch.index.tolist() == [1, 4, 0, 3] and batch.inputs["input_ids"].shape == (4, 4)
    assert len(in_one_batch(encoded(together), 6, "cpu").index) == 6


def test_two_examples():
    assert two_examples(encoded(ALONE), "cpu").index.tolist() == [1]
    assert two_examples(encoded(EQUAL), "cpu").index.tolist() == [1, 4]
    rows = [[1, 2, 3], [4, 5], [6, 7]]
    longest_alone = token_examples({"input_ids": rows}, torch.arange(3), None, Layout("right", EQUAL))
    assert two_examples(longest_alone, "cpu").index.tolist() == [1, 2]


def test_a_text_without_tokens_keeps_the_others_whole_numbers():
    examples = token_examples({"input_ids": [[], [5, 6]]}, torch.arange(2))
    assert (
        examples.inputs["input_ids"].tolist() == [[0, 0], [5, 6]]
        and not examples.inputs["input_ids"].is_floating_point()
    )


class Mixing(nn.Module):
    """A network that mixes positions in one of several ways."""

    def __init__(self, mix) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(100, 4)
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.mix = mix

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.table(input_ids)))
        logits: Tensor = self.head(self.mix(x, attention_mask[..., None].to(x)))
        return logits


def mean_of_tokens(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(1) / mask.sum(1)


def mean_of_all(x: Tensor, mask: Tensor) -> Tensor:
    return x.mean(1)


def last(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, -1]


def first(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, 0]


def mean_of_the_batch(x: Tensor, mask: Tensor) -> Tensor:
    return mean_of_tokens(x, mask) - mean_of_tokens(x, mask).mean(0, keepdim=True) / 2


@pytest.mark.parametrize(
    ("mix", "side", "expected"),
    [
        (mean_of_tokens, "right", Layout("right")),
        (mean_of_tokens, "left", Layout("left")),
        (first, "right", Layout("right")),
        (first, "left", Layout("right")),
        (last, "right", Layout("left")),
        (mean_of_all, "right", Layout("right", EQUAL)),
        (mean_of_the_batch, "left", Layout("left", ALONE)),
    ],
)
def test_the_first_layout_that_changes_nothing(mix, side, expected):
    def encode(layout: Layout) -> TensorExamples:
        rows = [[1, 2, 3, 4, 5], [6], [1, 2, 2, 2, 5]]
        return token_examples(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}, torch.zeros(3), None, layout
        )

    layout, fault = find_layout(Mixing(mix).eval(), encode, side)
    assert layout == expected and (fault is None) == (layout == Layout(side))
    assert fault is None or fault.startswith(f"padding on the {side} changes its outputs by up to ")


def test_layers_whose_positions_are_not_the_masks():
    """Outputs that do not depend on padding, but a layer that reads two tokens at once."""

    class Pooled(Mixing):
        def __init__(self) -> None:
            super().__init__(mean_of_tokens)
            self.pair = nn.Linear(8, 1)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.table(input_ids)
            self.pair(nn.functional.pad(x, (0, 0, 0, x.shape[1] % 2)).reshape(len(x), -1, 8))
            return super().forward(input_ids, attention_mask)

    def encode(layout: Layout) -> TensorExamples:
        rows = [[1, 2, 3, 4, 5], [6], [1, 2, 2, 2, 5]]
        return token_examples(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}, torch.zeros(3), None, layout
        )

    layout, fault = find_layout(Pooled().eval(), encode, "right")
    assert layout == Layout("right", EQUAL)
    assert fault == "padding on the right cannot be distinguished from tokens in the input of layer pair"


@pytest.mark.parametrize(
    ("together", "asked", "used"),
    [(PADDED, None, 6), (EQUAL, None, 6), (ALONE, None, 6), (EQUAL, 3, 4), (ALONE, 3, 3), (EQUAL, 1, 1), (ALONE, 1, 1)],
)
def test_gradients_come_from_as_many_examples_as_asked_for(together, asked, used, tmp_path):
    module = Mixing(mean_of_tokens).eval()
    layers = {"layer": module.layer, "head": module.head}
    examples = replace(encoded(together), inputs={k: v % 90 for k, v in encoded(together).inputs.items()})
    settings = CalibrationSettings(4, None, 0, gradient_examples=asked)
    calibration = Calibration(module, layers, examples, settings, CPU, identity="weights", cache_dir=tmp_path)
    calibration.prepare([INPUT_MOMENT, GRADIENT_MOMENT])
    assert int(verify(calibration.path(GRADIENT_MOMENT))["examples"]) == used
