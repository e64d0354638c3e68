"""The nine tasks of GLUE (Wang et al., 2019): sentences or sentence pairs with a class, or with a score (STS-B).

They are read from the published TSV files, from parquet files in the layout of the hub, or from the hub itself.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bayesq.files import file_sha256
from bayesq.metrics import METRICS, Metric
from bayesq.suite.datasets.base import DataSplits, Examples, shuffled, stratified
from bayesq.suite.datasets.parquet_files import listed, of_split
from bayesq.suite.datasets.tables import Table, parquet_table, tab_separated, text_of
from bayesq.suite.errors import UserError
from bayesq.suite.hub import hub_files
from bayesq.suite.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION

log = logging.getLogger(__name__)

SCORES = (0.0, 5.0)  # of STS-B, from unrelated to equivalent


@dataclass(frozen=True)
class Task:
    """How a task is read and what is measured on it.

    Attributes:
        folder: of its published TSV files; a folder with the task's name is read also.
        layouts: known sets of columns (one or two texts, then the label), first the set of the published TSV files.
        classes: names in the order of the labels 0, 1, ...; (): the labels are scores.
        metrics: keys of bayesq.metrics.METRICS, the primary one first.
        dev: endings of the names of the evaluation files; metrics of the second file have the ending in their names.
        headerless: columns of the published files if these have no header line.
        incomplete: whether the published files have incomplete rows, which are left out and counted.
    """

    folder: str
    layouts: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    dev: tuple[str, ...] = ("",)
    headerless: tuple[str, ...] = ()
    incomplete: bool = False


SENTENCE = ("sentence", "label")
PAIR = ("sentence1", "sentence2", "label")
MRPC = ("#1 String", "#2 String", "Quality")
QQP = (("question1", "question2", "is_duplicate"), ("question1", "question2", "label"))
MNLI = (("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label"), PAIR)
COLA = ("source", "label", "mark", "sentence")  # the columns of its published files, which have no header line
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", (SENTENCE,), ("unacceptable", "acceptable"), ("matthews",), headerless=COLA),
    "sst2": Task("SST-2", (SENTENCE,), ("negative", "positive")),
    "mrpc": Task("MRPC", (MRPC, PAIR), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task("QQP", QQP, ("not_duplicate", "duplicate"), ("accuracy", "f1"), incomplete=True),
    "stsb": Task("STS-B", (("sentence1", "sentence2", "score"), PAIR), (), ("pearson", "spearman")),
    "mnli": Task("MNLI", MNLI, ("entailment", "neutral", "contradiction"), dev=("_matched", "_mismatched")),
    "qnli": Task("QNLI", (("question", "sentence", "label"),), ENTAILMENT),
    "rte": Task("RTE", (PAIR,), ENTAILMENT),
    "wnli": Task("WNLI", (PAIR,), ("not_entailment", "entailment")),
}


@dataclass(frozen=True)
class Glue:
    """One task, evaluated on its dev examples in their order; MNLI has the matched ones, then the mismatched ones.

    The pool is drawn from the training examples; a model that fits a head here trains on the others. A checkpoint that
    was fine-tuned elsewhere has trained on the pool also, so the pool stands for unlabelled training text.

    A task's folder holds train.tsv and dev.tsv, or parquet files (train.parquet or train-*.parquet, and validation).
    TSV files come first; their quotation marks are part of the text, as in the published files. The pool has at most
    half of the training examples, so that small tasks (WNLI has 635) need no other setting. Without a training
    file, the pool is drawn from the dev examples, and only the others are evaluated; a warning and the result say so.

    Attributes: the keys of conf/dataset/glue.yaml, which explains them.
    """

    root: str | None
    task: str
    split_seed: int
    calibration_pool: int
    limit: int | None = None
    hub: str = "nyu-mll/glue"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"dataset.task={self.task}: choose one of {', '.join(TASKS)}")

    @property
    def _task(self) -> Task:
        return TASKS[self.task]

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with sentences, or pairs of them, as inputs; `cache_dir` stays untouched (the hub has its own).

        Raises:
            UserError: a file is missing or in none of the known layouts, the hub cannot be reached, or the pool or the
                limit is not possible.
        """
        where, root, source = self._root()
        splits = [f"dev{ending}" for ending in self._task.dev]
        # if the dev examples are missing too, the error names train
        if trained := bool(self._files("train", root) or not self._files(splits[0], root)):
            splits = ["train", *splits]
        parts = (self._examples(split, self._table(split, root, where)) for split in splits)
        examples, files, left_out = zip(*parts, strict=True)
        rows, kind = examples[0], "training" if trained else "dev"
        pool = min(self.calibration_pool, len(rows) // 2)
        if pool < 1:
            raise UserError(
                f"dataset.calibration_pool={self.calibration_pool} is not possible: choose at least 1, of at least 2 "
                f"{kind} examples ({self._task.folder} has {len(rows)})"
            )
        source["sha256"] = ", ".join(file_sha256(file) for part in files for file in part)
        source["split_seed"] = str(self.split_seed)
        if pool < self.calibration_pool:
            source["calibration_pool"] = f"{pool}, half of the {kind} examples"
        if self._task.incomplete:
            source["incomplete_rows"] = str(sum(left_out))
        order = shuffled(len(rows), self.split_seed)
        train, dev = order[pool:], [*examples[1:]]
        if not trained:
            source["pool"] = f"{pool} dev examples, which are not evaluated: there is no training file"
            log.warning(f"{where}: {self._task.folder} has no train.tsv: calibration draws from {source['pool']}")
            train, dev = order[:0], [rows.select(order[pool:].sort().values), *dev]
        evaluation, metrics = self._evaluation(dev)
        return DataSplits(
            train=rows.select(train),
            calibration_pool=rows.select(order[:pool]),
            evaluation=evaluation,
            num_classes=len(self._task.classes) or 1,
            primary_metric=self._task.metrics[0],
            source=source,
            metrics=metrics,
            task=TEXT_CLASSIFICATION if self._task.classes else TEXT_REGRESSION,
            classes=self._task.classes,
            subset=self.task,
        )

    def _evaluation(self, dev: list[Examples]) -> tuple[Examples, tuple[Metric, ...]]:
        """The evaluation examples of all parts, within the limit, and the metrics of each part."""
        part = torch.cat([torch.full((len(examples),), i) for i, examples in enumerate(dev)])
        inputs: list[Any] = [item for examples in dev for item in examples.inputs]
        labels = torch.cat([examples.labels for examples in dev])
        whole = Examples(inputs, labels, [name for examples in dev for name in examples.ids])
        strata = part * (len(self._task.classes) or 1)
        if self._task.classes:
            strata += whole.labels
        rows = stratified(strata, self.limit, self.split_seed)
        ends = [0, *torch.bincount(part[rows], minlength=len(dev)).cumsum(0).tolist()]
        metrics = (
            replace(METRICS[name], name=f"{name}{ending if i else ''}", start=ends[i], stop=ends[i + 1])
            for i, ending in enumerate(self._task.dev)
            for name in self._task.metrics
        )
        return whole.select(rows), tuple(metrics)

    def _root(self) -> tuple[str, Path, dict[str, str]]:
        """The beginning of every error line, the folder of the tasks, and the provenance for the result."""
        if self.root is not None:
            root = Path(self.root)
            return f"dataset.root={root}", root, {"origin": f"GLUE {self.task} in {root}"}
        where = f"dataset.hub={self.hub}"
        remedy = "give dataset.root=DIR with the TSV or parquet files"
        folder = hub_files(self.hub, [f"{self.task}/*.parquet"], self.revision, where, remedy)
        return where, folder, {"origin": f"GLUE {self.task} in {self.hub} on the hub", "revision": folder.name}

    def _files(self, split: str, root: Path) -> list[Path]:
        """The TSV file or the parquet files of a split: train, or dev with one of the endings of the task."""
        for folder in (root / self._task.folder, root / self.task):
            for stem in (split, split.replace("dev", "validation")):
                if (tsv := folder / f"{stem}.tsv").is_file():
                    return [tsv]
                if files := listed(folder, f"{stem}.parquet", f"{stem}-*.parquet"):
                    return files
        return []

    def _table(self, split: str, root: Path, where: str) -> Table:
        """The rows of a split."""
        files = self._files(split, root)
        if not files:
            raise UserError(
                f"{where}: {self._task.folder}/{split}.tsv cannot be read (No such file, nor "
                f"{self.task}/{split.replace('dev', 'validation')}-*.parquet); dataset.root=null reads the hub"
            )
        if files[0].suffix == ".parquet":
            return parquet_table(of_split(files, where), where, self._task.classes)
        where = f"{where}: {files[0].parent.name}/{files[0].name}"
        rows = tab_separated(text_of(files[0], where))
        header = list(rows[0][1]) if rows else []
        if self._task.headerless and not any(set(layout) <= set(header) for layout in self._task.layouts):
            return Table(where, list(self._task.headerless), rows, files)
        return Table(where, header, rows[1:], files)

    def _examples(self, split: str, table: Table) -> tuple[Examples, list[Path], int]:
        """The rows as examples with ids <split>/<row from 0>, the files, and the number of incomplete rows left out."""
        layout = max(self._task.layouts, key=lambda columns: sum(name in table.header for name in columns))
        if missing := [name for name in layout if name not in table.header]:
            raise UserError(f"{table.where} has no column '{missing[0]}'")
        if twice := [name for name in layout if table.header.count(name) > 1]:
            raise UserError(f"{table.where} has more than one column '{twice[0]}'")
        places = [table.header.index(name) for name in layout]
        width, classes, incomplete = len(table.header), self._task.classes, self._task.incomplete
        by_name = {name: label for label, name in enumerate(classes)}
        by_name |= {str(label): label for label in range(len(classes))}
        texts, labels, left_out = [], [], 0
        empty: list[str] = []
        for number, row in table.rows:
            if len(row) <= max(places) and incomplete:
                left_out += 1
                continue
            try:
                *text, cell = (row[place] for place in places)
                label = by_name.get(str(cell).strip()) if classes else float(cell)
            except (IndexError, TypeError, ValueError):
                label = None
            known = label is not None and (bool(classes) or SCORES[0] <= label <= SCORES[1])
            # A tab inside a text adds a cell and shifts the later columns.
            ragged = len(row) < width or any(row[width:])
            if not known or (ragged and not incomplete) or not all(isinstance(part, str) for part in text):
                raise UserError(f"{table.where}, {number}: expected {', '.join(layout)}, got {list(row)}")
            if not all(part.strip() for part in text):
                empty.append(number)
            texts.append(tuple(text))
            labels.append(label)
        if empty:
            log.warning(
                f"{table.where}: {len(empty)} of {len(texts)} examples have an empty text ({empty[0]}); they count"
            )
        if not texts:
            raise UserError(f"{table.where} has no rows")
        targets = torch.tensor(labels, dtype=torch.int64 if classes else torch.float32)
        inputs: list[Any] = texts if len(layout) == 3 else [sentence for (sentence,) in texts]
        examples = Examples(inputs, targets, [f"{split}/{row}" for row in range(len(texts))])
        return examples, table.files, left_out
