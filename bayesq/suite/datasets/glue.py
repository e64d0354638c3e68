"""Tasks of GLUE (Wang et al., 2019) from their published TSV files: sentences or sentence pairs with a class."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from bayesq.suite.datasets.base import DataSplits, Examples, limited
from bayesq.suite.errors import UserError


@dataclass(frozen=True)
class Task:
    """Where a task lies and how it is read: folder, columns of the one or two texts, column of the label."""

    folder: str
    texts: tuple[str, ...]
    label: str
    num_classes: int


TASKS = {
    "sst2": Task("SST-2", ("sentence",), "label", 2),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", 2),
}


class Glue:
    """One task; evaluated is dev.tsv in its order.

    The pool is drawn from train.tsv, and the rest of that file is the train split of models that fit a head here. A
    checkpoint fine-tuned elsewhere has seen the pool as well: it stands for unlabelled training text.

    Args:
        root: folder that holds the tasks' folders (SST-2/, MRPC/).
        task: sst2 | mrpc.
        split_seed: seed that draws the calibration pool.
        calibration_pool: number of training examples calibration sets are drawn from.
        limit: keep only the first `limit` evaluation examples.
    """

    def __init__(self, root: str, task: str, split_seed: int, calibration_pool: int, limit: int | None = None) -> None:
        if task not in TASKS:
            raise UserError(f"dataset.task={task}: choose one of {', '.join(TASKS)}")
        self.root = Path(root)
        self.task = task
        self.split_seed = split_seed
        self.calibration_pool = calibration_pool
        self.limit = limit

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with sentences, or pairs of them, as inputs; `cache_dir` stays untouched.

        Raises:
            UserError: a file is missing or not in the published layout, or the pool or the limit is not possible.
        """
        rows, evaluation = self._read("train"), self._read("dev")
        if not 1 <= self.calibration_pool < len(rows):
            raise UserError(
                f"dataset.calibration_pool={self.calibration_pool} is not possible: choose 1 to {len(rows) - 1}, "
                f"so that a train split remains ({TASKS[self.task].folder}/train.tsv has {len(rows)} rows)"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed))
        return DataSplits(
            train=rows.select(order[self.calibration_pool :]),
            calibration_pool=rows.select(order[: self.calibration_pool]),
            evaluation=evaluation.select(torch.arange(limited(len(evaluation), self.limit))),
            num_classes=TASKS[self.task].num_classes,
            primary_metric="accuracy",
            source={
                "origin": f"GLUE {self.task} in {self.root}",
                "sha256": ", ".join(hashlib.sha256(self._file(s).read_bytes()).hexdigest() for s in ("train", "dev")),
                "split_seed": str(self.split_seed),
            },
        )

    def _file(self, split: str) -> Path:
        return self.root / TASKS[self.task].folder / f"{split}.tsv"

    def _read(self, split: str) -> Examples:
        """All rows of a file; ids are `split` and the number of the row, from 0."""
        task, file = TASKS[self.task], self._file(split)
        where = f"dataset.root={self.root}: {task.folder}/{file.name}"
        try:
            # utf-8-sig: the published MRPC files begin with a byte order mark.
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text") from error
        # Neither splitlines() nor the csv module: texts hold rarer line separators and unpaired quotation marks.
        header, *rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()] or [[]]
        columns = (*task.texts, task.label)
        if missing := [name for name in columns if name not in header]:
            raise UserError(f"{where} has no column '{missing[0]}'")
        places = [header.index(name) for name in columns]
        texts, labels = [], []
        for number, row in enumerate(rows, start=2):
            try:
                *text, label = (row[place] for place in places)
                labels.append(range(task.num_classes).index(int(label)))
            except (LookupError, ValueError) as error:
                raise UserError(f"{where}, line {number}: expected {', '.join(columns)}, got {row}") from error
            texts.append(text)
        if not texts:
            raise UserError(f"{where} has no rows")
        ids = [f"{split}/{row}" for row in range(len(texts))]
        if len(task.texts) == 2:
            return Examples([(first, second) for first, second in texts], torch.tensor(labels), ids)
        return Examples([sentence for (sentence,) in texts], torch.tensor(labels), ids)
