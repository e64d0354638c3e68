"""A text that a model's tokenizer cuts into windows of equal length: the raw input of language models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Excerpt:
    """Windows of a text, which do not overlap. The last tokens that fill no window are left out.

    Attributes:
        text: as it is in the file.
        key: the setting that gave the text, for messages.
        window: tokens of a window, with the bos token if there is one.
        bos: whether every window begins with the tokenizer's bos token.
        count: number of windows; None: all.
        count_key: the setting that gave `count`, for messages.
        seed: draws the windows, without replacement; None: the first ones. For one seed, a smaller draw is the
            beginning of a larger one.
    """

    text: str
    key: str
    window: int
    bos: bool = False
    count: int | None = None
    count_key: str = "dataset.limit"
    seed: int | None = None
