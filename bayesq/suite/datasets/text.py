"""Text for language models: WikiText-2, or a file of the user's.

Perplexity is measured on windows of a text that do not overlap. Calibration windows come from another text, or from
another part of the same file.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

from bayesq.errors import Refused
from bayesq.metrics import METRICS
from bayesq.suite.datasets.base import DataSplits, Examples, Excerpt
from bayesq.suite.errors import UserError
from bayesq.suite.tasks import NEXT_TOKEN

# WikiText-2 as published; calibration text is the first of the last two that the folder holds.
TEST, OTHERS = "wiki.test.raw", ("wiki.train.raw", "wiki.valid.raw")
SHORTEST = 2  # tokens of a window: one predicts the other


@dataclass(frozen=True)
class TextSplits(DataSplits):
    """Splits whose examples are windows: each split holds one `Excerpt`."""

    def calibration(self, examples: int, seed: int) -> Examples:
        """`examples` windows of the calibration text, drawn without replacement.

        Raises:
            ValueError: `examples` is below 1. Encoding refuses more windows than the text has.
        """
        if examples < 1:
            raise Refused(f"calibration.examples={examples} is not possible: choose at least 1 window")
        excerpt = self.calibration_pool.inputs[0]
        assert isinstance(excerpt, Excerpt)
        drawn = replace(excerpt, count=examples, count_key="calibration.examples", seed=seed)
        return one_excerpt(drawn, self.calibration_pool.ids[0])


@dataclass(frozen=True)
class _Windows:
    """Settings of both data sets; conf/dataset/wikitext.yaml explains them."""

    window: int
    bos: bool = False
    limit: int | None = None
    calibration_source: str | None = None

    def __post_init__(self) -> None:
        if self.window < SHORTEST + self.bos:
            raise UserError(
                f"dataset.window={self.window} is not possible: choose at least {SHORTEST + self.bos} tokens"
            )

    def splits(self, test: tuple[str, str, str], other: tuple[str, str, str]) -> DataSplits:
        """Splits from two texts, each with the setting that names it and its name; UserError if they are the same."""
        if self.calibration_source is not None:
            path = Path(self.calibration_source)
            other = (f"calibration.source={path}", path.name, read_text(path, f"calibration.source={path}"))
        (test_key, test_name, text), (other_key, other_name, calibration) = test, other
        if text == calibration:
            raise UserError(f"{other_key}: is the text that is evaluated: calibrate on another one")
        evaluated = Excerpt(text, test_key, self.window, self.bos, self.limit)
        return TextSplits(
            train=Examples([], torch.zeros(0, dtype=torch.int64), []),
            calibration_pool=one_excerpt(Excerpt(calibration, other_key, self.window, self.bos), other_name),
            evaluation=one_excerpt(evaluated, test_name),
            num_classes=0,
            primary_metric="perplexity",
            source={
                "origin": test_name,
                "sha256": sha256(text.encode()).hexdigest(),
                "calibration": other_name,
                "calibration_sha256": sha256(calibration.encode()).hexdigest(),
                "window": str(self.window),
            },
            metrics=(METRICS["perplexity"],),
            task=NEXT_TOKEN,
        )


@dataclass(frozen=True)
class WikiText(_Windows):
    """WikiText-2 raw, the text of the test file as it is; `root` is the folder of the raw files."""

    root: str = ""

    def load(self, cache_dir: Path) -> DataSplits:
        """Evaluated windows of the test file; calibration windows of the train or valid file, or of another text.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        folder, key = Path(self.root), f"dataset.root={self.root}"
        test = (key, TEST, read_text(folder / TEST, key))
        if self.calibration_source is not None:
            return self.splits(test, test)
        name = next((name for name in OTHERS if (folder / name).is_file()), None)
        if name is None:
            raise UserError(f"{key}: has no {' or '.join(OTHERS)} to calibrate on: add calibration.source=FILE")
        return self.splits(test, (key, name, read_text(folder / name, key)))


@dataclass(frozen=True)
class TextFile(_Windows):
    """A text file of the user's; conf/dataset/text.yaml explains the keys.

    Without another text to calibrate on, the file is cut in two at the end of a line.
    """

    path: str = ""
    calibration_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.calibration_share < 1:
            raise UserError(f"dataset.calibration_share={self.calibration_share} is not possible: choose 0.1 to 0.9")

    def load(self, cache_dir: Path) -> DataSplits:
        """Disjoint parts of the file, or the whole file and another text.

        Raises:
            UserError: the file is missing, empty, no text, or has a single line.
        """
        path = Path(self.path)
        key = f"dataset.path={self.path}"
        text = read_text(path, key)
        if self.calibration_source is not None:
            return self.splits((key, path.name, text), ("", "", ""))
        cut = text.find("\n", int(self.calibration_share * len(text))) + 1
        if not (text[:cut].strip() and text[cut:].strip()):
            raise UserError(f"{key}: has no line end to divide it at: add calibration.source=FILE")
        return self.splits((key, f"{path.name}, end", text[cut:]), (key, f"{path.name}, beginning", text[:cut]))


def one_excerpt(excerpt: Excerpt, name: str) -> Examples:
    """A split that holds an excerpt."""
    return Examples([excerpt], torch.zeros(1, dtype=torch.int64), [name])


def read_text(path: Path, key: str) -> str:
    """Content of a text file in UTF-8, with its line ends; UserError, which names `key`, if it is missing or empty."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{key}: {path.name} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{key}: {path.name} is empty")
    return text
