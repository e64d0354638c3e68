"""The nine tasks of GLUE (Wang et al., 2019): sentences or sentence pairs with a class, or with a score (STS-B).

They are read from the published TSV files, from parquet files in the layout of the hub, or from the hub itself.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bayesq.files import file_sha256
from bayesq.metrics import METRICS, Metric
from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import DataSplits, Examples, limited, stratified
from bayesq.suite.datasets.parquet_files import check_classes, listed, of_split, recorded_classes
from bayesq.suite.errors import UserError
from bayesq.suite.hub import MAIN, hub_files, tell_commit
from bayesq.suite.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION

log = logging.getLogger(__name__)

SCORES = (0.0, 5.0)  # of STS-B, from unrelated to equivalent


@dataclass(frozen=True)
class Task:
    """How a task is read and what is measured on it.

    Attributes:
        folder: of its published TSV files; files may also lie in a folder of the task's own name.
        layouts: known sets of columns, the published TSV's first: those of the one or two texts, then the label's.
        classes: names in the order of the labels 0, 1, ...; none: the labels are scores.
        metrics: keys of bayesq.metrics.METRICS, the primary one first.
        dev: endings of the names of the evaluation files. The first has the metrics under their plain names, others
            with their ending added.
        headerless: columns of the published files if those begin without a line of names.
        incomplete: the published files hold rows that break off; they are left out and counted.
    """

    folder: str
    layouts: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    dev: tuple[str, ...] = ("",)
    headerless: tuple[str, ...] = ()
    incomplete: bool = False


ENTAILMENT = ("entailment", "not_entailment")
SENTENCE = ("sentence", "label")
PAIR = ("sentence1", "sentence2", "label")

TASKS = {
    "cola": Task(
        "CoLA",
        (SENTENCE,),
        ("unacceptable", "acceptable"),
        metrics=("matthews",),
        headerless=("source", "label", "mark", "sentence"),
    ),
    "sst2": Task("SST-2", (SENTENCE,), ("negative", "positive")),
    "mrpc": Task(
        "MRPC",
        (("#1 String", "#2 String", "Quality"), PAIR),
        ("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    "qqp": Task(
        "QQP",
        (("question1", "question2", "is_duplicate"), ("question1", "question2", "label")),
        ("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        incomplete=True,
    ),
    "stsb": Task("STS-B", (("sentence1", "sentence2", "score"), PAIR), (), metrics=("pearson", "spearman")),
    "mnli": Task(
        "MNLI",
        (("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label"), PAIR),
        ("entailment", "neutral", "contradiction"),
        dev=("_matched", "_mismatched"),
    ),
    "qnli": Task("QNLI", (("question", "sentence", "label"),), ENTAILMENT),
    "rte": Task("RTE", (PAIR,), ENTAILMENT),
    "wnli": Task("WNLI", (PAIR,), ("not_entailment", "entailment")),
}


@dataclass
class _Table:
    """Rows of one split before they are examples.

    Attributes:
        where: the beginning of every error line.
        header: names of the columns.
        rows: each row's name in messages, and its cells.
        files: the files that were read.
    """

    where: str
    header: list[str]
    rows: list[tuple[str, Sequence[Any]]]
    files: list[Path]


class Glue:
    """One task; evaluated are its dev examples in their order, of MNLI the matched ones and then the mismatched.

    The pool is drawn from the training examples, and the rest of them is the train split of models that fit a head
    here. A checkpoint fine-tuned elsewhere has seen the pool as well: it stands for unlabelled training text.

    Args:
        root: folder that holds the tasks' folders (SST-2/ or sst2/, ...) with train.tsv and dev.tsv, or with parquet
            files (train.parquet or train-*.parquet, and validation); a TSV file is read in place of parquet, and its
            quotation marks are part of the text, as in the published files. None: the hub.
        task: one of TASKS.
        split_seed: seed that draws the calibration pool and the evaluation examples of `limit`.
        calibration_pool: number of training examples calibration sets are drawn from; at most half of them, so that
            small tasks (WNLI has 635) need no number of their own.
        limit: evaluate only so many examples, each class in proportion; None: all.
        hub: id of the data set on the hub, with a configuration per task; read when root is None.
        revision: of the hub's data set, a commit or a tag; None: the newest.
    """

    def __init__(
        self,
        root: str | None,
        task: str,
        split_seed: int,
        calibration_pool: int,
        limit: int | None = None,
        hub: str = "nyu-mll/glue",
        revision: str | None = None,
    ) -> None:
        if task not in TASKS:
            raise UserError(f"dataset.task={task}: choose one of {', '.join(TASKS)}")
        self.root = None if root is None else Path(root)
        self.name, self.task = task, TASKS[task]
        self.split_seed = split_seed
        self.calibration_pool = calibration_pool
        self.limit = limit
        self.hub, self.revision = hub, revision

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with sentences, or pairs of them, as inputs; `cache_dir` stays untouched (the hub has its own).

        Raises:
            UserError: a file is missing or in none of the known layouts, the hub cannot be reached, or the pool or the
                limit is not possible.
        """
        where, root, source = self._root()
        files, parts, incomplete = [], [], 0
        for split in ("train", *(f"dev{ending}" for ending in self.task.dev)):
            table = self._table(split, root, where)
            examples, left_out = self._examples(split, table)
            files += table.files
            parts.append(examples)
            incomplete += left_out
        rows, *dev = parts
        pool = min(self.calibration_pool, len(rows) // 2)
        if pool < 1:
            raise UserError(
                f"dataset.calibration_pool={self.calibration_pool} is not possible: choose at least 1, of at least 2 "
                f"training examples ({self.task.folder} has {len(rows)})"
            )
        source["sha256"] = ", ".join(map(file_sha256, files))
        source["split_seed"] = str(self.split_seed)
        if pool < self.calibration_pool:
            source["calibration_pool"] = f"{pool}, half of the training examples"
        if self.task.incomplete:
            source["incomplete_rows"] = str(incomplete)
        evaluation, metrics = self._evaluation(dev)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed))
        return DataSplits(
            train=rows.select(order[pool:]),
            calibration_pool=rows.select(order[:pool]),
            evaluation=evaluation,
            num_classes=len(self.task.classes) or 1,
            primary_metric=self.task.metrics[0],
            source=source,
            metrics=metrics,
            task=TEXT_CLASSIFICATION if self.task.classes else TEXT_REGRESSION,
            classes=self.task.classes,
            subset=self.name,
        )

    def _evaluation(self, dev: list[Examples]) -> tuple[Examples, tuple[Metric, ...]]:
        """The evaluation examples of all parts, within the limit, and the metrics of each part."""
        part = torch.cat([torch.full((len(examples),), i) for i, examples in enumerate(dev)])
        inputs: list[Any] = [item for examples in dev for item in examples.inputs]
        labels = torch.cat([examples.labels for examples in dev])
        whole = Examples(inputs, labels, [name for examples in dev for name in examples.ids])
        count = limited(len(whole), self.limit)
        strata = part * (len(self.task.classes) or 1)
        if self.task.classes:
            strata += whole.labels
        rows = stratified(strata, count, self.split_seed)
        ends = [0, *torch.bincount(part[rows], minlength=len(dev)).cumsum(0).tolist()]
        metrics: list[Metric] = []
        for i, ending in enumerate(self.task.dev):
            suffix = ending if i else ""
            for name in self.task.metrics:
                metrics.append(replace(METRICS[name], name=f"{name}{suffix}", start=ends[i], stop=ends[i + 1]))
        return whole.select(rows), tuple(metrics)

    def _root(self) -> tuple[str, Path, dict[str, str]]:
        """The beginning of every error line, the folder of the tasks, and the provenance for the result."""
        if self.root is not None:
            return f"dataset.root={self.root}", self.root, {"origin": f"GLUE {self.name} in {self.root}"}
        where = f"dataset.hub={self.hub}"
        remedy = "give dataset.root=DIR with the TSV or parquet files"
        files = hub_files(self.hub, [f"{self.name}/*.parquet"], self.revision or MAIN, where, remedy)
        tell_commit(where, self.revision, files.commit, "dataset.revision")
        return where, files.folder, {"origin": f"GLUE {self.name} in {self.hub} on the hub", "revision": files.commit}

    def _table(self, split: str, root: Path, where: str) -> _Table:
        """The rows of a split: train, or dev with an ending of the task's.

        Raises:
            UserError: the split has no file, or its file cannot be read.
        """
        on_hub = split.replace("dev", "validation")
        for folder in (root / self.task.folder, root / self.name):
            for stem in (split, on_hub):
                tsv = folder / f"{stem}.tsv"
                if tsv.is_file():
                    return self._tsv(tsv, where)
                if files := listed(folder, f"{stem}.parquet", f"{stem}-*.parquet"):
                    return self._parquet(of_split(files, where), where)
        raise UserError(
            f"{where}: {self.task.folder}/{split}.tsv cannot be read (No such file, nor {self.name}/{on_hub}-*.parquet)"
            "; dataset.root=null reads the hub"
        )

    def _tsv(self, file: Path, where: str) -> _Table:
        where = f"{where}: {file.parent.name}/{file.name}"
        try:
            # utf-8-sig: the published MRPC files begin with a byte order mark.
            text = file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text") from error
        if "\0" in text:
            raise UserError(f"{where} is not text: it holds NUL bytes")
        # Neither splitlines() nor the csv module: texts hold rarer line separators and unpaired quotation marks.
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"line {number}", line.rstrip("\r").split("\t")) for number, line in lines if line.strip()]
        header = rows[0][1] if rows else []
        if self.task.headerless and not any(set(layout) <= set(header) for layout in self.task.layouts):
            return _Table(where, list(self.task.headerless), [*rows], [file])
        return _Table(where, header, [*rows[1:]], [file])

    def _parquet(self, files: list[Path], where: str) -> _Table:
        import pandas as pd

        header: list[str] = []
        rows: list[tuple[str, Sequence[Any]]] = []
        for file in files:
            here = f"{where}: {file.parent.name}/{file.name}"
            try:
                frame = pd.read_parquet(file)
                names = recorded_classes(file)
            except ImportError as error:
                raise UserError(f"{here} needs pyarrow: run `python -m pip install pyarrow`") from error
            except Exception as error:  # of a damaged file pandas and pyarrow raise more than they document
                raise UserError(f"{here} cannot be read ({one_line(str(error))[:200]})") from error
            check_classes(names, len(self.task.classes), self.task.classes, here)
            header = header or list(frame.columns)
            if set(header) != set(frame.columns):
                raise UserError(f"{here} has other columns than {files[0].name}")
            of = f" of {file.name}" if len(files) > 1 else ""
            columns = (frame[name].tolist() for name in header)
            rows += ((f"row {number}{of}", row) for number, row in enumerate(zip(*columns, strict=True)))
        return _Table(f"{where}: {files[0].parent.name}/{files[0].name}", header, rows, files)

    def _examples(self, split: str, table: _Table) -> tuple[Examples, int]:
        """The rows as examples, ids being `split` and the number of the row, from 0; and how many were left out.

        Raises:
            UserError: no known layout, a bad row, or no rows.
        """
        layout = max(self.task.layouts, key=lambda columns: sum(name in table.header for name in columns))
        if missing := [name for name in layout if name not in table.header]:
            raise UserError(f"{table.where} has no column '{missing[0]}'")
        if twice := [name for name in layout if table.header.count(name) > 1]:
            raise UserError(f"{table.where} has more than one column '{twice[0]}'")
        places = [table.header.index(name) for name in layout]
        by_name = {name: label for label, name in enumerate(self.task.classes)}
        by_name |= {str(label): label for label in range(len(self.task.classes))}
        texts, labels, left_out = [], [], 0
        empty: list[str] = []
        for number, row in table.rows:
            if len(row) <= max(places) and self.task.incomplete:
                left_out += 1
                continue
            # A tab inside a text adds a cell and shifts the later columns.
            ragged = len(row) < len(table.header) or any(row[len(table.header) :])
            if ragged and not self.task.incomplete:
                raise _bad_row(table.where, number, layout, row)
            *text, label = (row[place] for place in places)
            try:
                labels.append(by_name[str(label).strip()] if self.task.classes else _score(label))
            except (KeyError, ValueError) as error:
                raise _bad_row(table.where, number, layout, row) from error
            if not all(isinstance(part, str) for part in text):
                raise _bad_row(table.where, number, layout, row)
            if not all(part.strip() for part in text):
                empty.append(number)
            texts.append(text)
        if empty:
            log.warning(
                f"{table.where}: {len(empty)} of {len(texts)} examples have an empty text ({empty[0]}); they count"
            )
        if not texts:
            raise UserError(f"{table.where} has no rows")
        ids = [f"{split}/{row}" for row in range(len(texts))]
        targets = torch.tensor(labels, dtype=torch.int64 if self.task.classes else torch.float32)
        if len(layout) == 3:
            return Examples([(first, second) for first, second in texts], targets, ids), left_out
        return Examples([sentence for (sentence,) in texts], targets, ids), left_out


def _score(label: Any) -> float:
    """A score within SCORES; ValueError for anything else."""
    score = float(label)
    if not (math.isfinite(score) and SCORES[0] <= score <= SCORES[1]):
        raise ValueError(label)
    return score


def _bad_row(where: str, number: str, layout: tuple[str, ...], row: Sequence[Any]) -> UserError:
    return UserError(f"{where}, {number}: expected {', '.join(layout)}, got {list(row)}")
