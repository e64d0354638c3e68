"""Small files in the layouts of GLUE, for tests: every row differs, labels follow from the number of the row."""

from pathlib import Path

import pandas as pd

from bayesq.suite.datasets.glue import TASKS

COUNTS = {"train": 48, "dev": 12, "dev_matched": 10, "dev_mismatched": 8}
WORDS = ("good", "bad", "fine", "poor", "warm", "cold")
# Published columns; {label}, {one} and {two} are filled in.
LINES = {
    "cola": (None, "src{i}\t{label}\t*\t{one}"),
    "sst2": ("sentence\tlabel", "{one}\t{label}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t{i}\t{i}\t{one}\t{two}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t1\t2\t{one}\t{two}\t{label}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{i}\tg\tf\t2012\t1\ts\ts\t{one}\t{two}\t{label:.3f}",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{i}\t1\t2\tg\t( a )\t( b )\t(c)\t(d)\t{one}\t{two}\t{name}\t{name}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "{i}\t{one}\t{two}\t{name}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{i}\t{one}\t{two}\t{name}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{i}\t{one}\t{two}\t{label}"),
}
HUB_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
}


def ROWS(task: str, split: str) -> list[tuple]:  # noqa: N802
    """Texts and label of each example."""
    rows = []
    for i in range(COUNTS[split]):
        one = f'the {WORDS[i % 6]} film "number {i} of {split}'
        two = f"a {WORDS[(i // 2) % 6]} story"
        label = (i % 11) / 2 if task == "stsb" else (7 * i + i // 3) % len(TASKS[task].classes)
        rows.append((one, label) if task in ("cola", "sst2") else (one, two, label))
    return rows


def splits(task: str) -> tuple[str, ...]:
    return ("train", *(f"dev{ending}" for ending in TASKS[task].dev))


def write_tsv(root: Path, task: str) -> None:
    """The published layout."""
    folder = root / TASKS[task].folder
    folder.mkdir(parents=True)
    header, line = LINES[task]
    for split in splits(task):
        lines = [] if header is None else [header]
        for i, (one, *two, label) in enumerate(ROWS(task, split)):
            name = "" if task == "stsb" else TASKS[task].classes[label]
            lines.append(line.format(i=i, one=one, two="".join(two), label=label, name=name))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(root: Path, task: str) -> None:
    """The layout of the hub."""
    (root / task).mkdir(parents=True)
    columns = (*HUB_COLUMNS.get(task, ("sentence1", "sentence2")), "label")
    for split in splits(task):
        frame = pd.DataFrame(ROWS(task, split), columns=list(columns))
        frame["idx"] = range(len(frame))
        frame.to_parquet(root / task / f"{split.replace('dev', 'validation')}-00000-of-00001.parquet")
