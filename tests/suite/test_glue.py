"""GLUE: nine tasks in the layouts they come in, the draw of a limit, and errors in one line."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from glue_files import ROWS, write_parquet, write_tsv

from bayesq.metrics import ACCURACY
from bayesq.suite.datasets.glue import TASKS, Glue
from bayesq.suite.errors import UserError
from bayesq.suite.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION


def load(root: Path | None, task: str, **changes):
    options = {"split_seed": 0, "calibration_pool": 4} | changes
    return Glue(None if root is None else str(root), task, **options).load(Path("unused"))


def refused(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=list(TASKS))
def task(request) -> str:
    return request.param


def expected(task: str, split: str) -> tuple[list, list]:
    """Inputs and labels of the examples that the files of `glue_files` hold."""
    rows = ROWS(task, split)
    inputs = [text[0] if len(text) == 1 else tuple(text) for *text, _ in rows]
    return inputs, [label for *_, label in rows]


DEV = {"mnli": ("dev_matched", "dev_mismatched")}


@pytest.mark.parametrize("write", [write_tsv, write_parquet])
def test_every_task_in_every_layout(write, task, tmp_path):
    write(tmp_path, task)
    data = load(tmp_path, task)
    inputs, labels, ids = [], [], []
    for split in DEV.get(task, ("dev",)):
        own_inputs, own_labels = expected(task, split)
        inputs, labels = inputs + own_inputs, labels + own_labels
        ids += [f"{split}/{i}" for i in range(len(own_labels))]
    assert list(data.evaluation.inputs) == inputs
    assert data.evaluation.labels.tolist() == pytest.approx(labels)
    assert data.evaluation.ids == ids
    assert data.subset == task and len(data.calibration_pool) == 4
    train_inputs, _ = expected(task, "train")
    assert sorted([*data.train.inputs, *data.calibration_pool.inputs]) == sorted(train_inputs)
    regression = task == "stsb"
    assert data.task == (TEXT_REGRESSION if regression else TEXT_CLASSIFICATION)
    assert data.evaluation.labels.dtype == (torch.float32 if regression else torch.int64)
    assert data.num_classes == {"stsb": 1, "mnli": 3}.get(task, 2)
    assert len(data.classes) == (0 if regression else data.num_classes)


def test_a_small_task_keeps_half_of_its_training_examples(tmp_path):
    write_tsv(tmp_path, "wnli")
    data = load(tmp_path, "wnli", calibration_pool=1024)
    assert len(data.calibration_pool) == len(data.train) == 24
    assert data.source["calibration_pool"].startswith("24, half")
    assert "calibration_pool" not in load(tmp_path, "wnli").source


def test_without_a_training_file_the_pool_is_a_part_of_dev(tmp_path, caplog):
    write_tsv(tmp_path, "mnli")
    matched, mismatched = (len(ROWS("mnli", split)) for split in DEV["mnli"])
    whole = load(tmp_path, "mnli").evaluation
    (tmp_path / "MNLI" / "train.tsv").unlink()
    data = load(tmp_path, "mnli")
    pool, rest = data.calibration_pool.ids, data.evaluation.ids
    assert len(pool) == 4 and len(data.train) == 0 and all(name.startswith("dev_matched/") for name in pool)
    assert rest == [name for name in whole.ids if name not in pool] and set(pool) <= set(whole.ids)
    assert [metric.rows for metric in data.metrics] == [
        slice(0, matched - 4),
        slice(matched - 4, matched - 4 + mismatched),
    ]
    assert data.source["pool"].startswith("4 dev examples") and len(data.source["sha256"].split(", ")) == 2
    assert "MNLI has no train.tsv: calibration draws from 4 dev examples, which are not evaluated" in caplog.text
    assert "pool" not in load_with_train(tmp_path).source
    assert load(tmp_path, "mnli", calibration_pool=99).source["calibration_pool"].endswith("half of the dev examples")


def load_with_train(root: Path):
    write_tsv(root / "trained", "mnli")
    return load(root / "trained", "mnli")


def test_metrics_of_the_tasks(task, tmp_path):
    write_tsv(tmp_path, task)
    data = load(tmp_path, task)
    names = [metric.name for metric in data.metrics]
    known = {
        "cola": ["matthews"],
        "mrpc": ["accuracy", "f1"],
        "qqp": ["accuracy", "f1"],
        "stsb": ["pearson", "spearman"],
        "mnli": ["accuracy", "accuracy_mismatched"],
    }
    assert names == known.get(task, ["accuracy"]) and data.primary_metric == names[0]


def test_mnli_measures_matched_and_mismatched_apart(tmp_path):
    write_tsv(tmp_path, "mnli")
    data = load(tmp_path, "mnli")
    matched = len(ROWS("mnli", "dev_matched"))
    assert data.metrics == (
        replace(ACCURACY, start=0, stop=matched),
        replace(ACCURACY, name="accuracy_mismatched", start=matched, stop=len(data.evaluation)),
    )
    limited = load(tmp_path, "mnli", limit=9)
    first, second = (metric.rows for metric in limited.metrics)
    assert all(name.startswith("dev_matched/") for name in limited.evaluation.ids[first])
    assert all(name.startswith("dev_mismatched/") for name in limited.evaluation.ids[second])
    assert len(limited.evaluation.ids[first]) + len(limited.evaluation.ids[second]) == 9


def test_folders_may_be_named_like_the_task_and_files_like_the_hubs(tmp_path):
    write_tsv(tmp_path, "rte")
    (tmp_path / "RTE").rename(tmp_path / "rte")
    (tmp_path / "rte" / "dev.tsv").rename(tmp_path / "rte" / "validation.tsv")
    assert load(tmp_path, "rte").evaluation.ids[0] == "dev/0"


def test_cola_with_a_line_of_names(tmp_path):
    (tmp_path / "CoLA").mkdir()
    for split in ("train", "dev"):
        text = "idx\tlabel\tsentence\n" + "".join(f"{i}\t{i % 2}\tsentence {i}\n" for i in range(8))
        (tmp_path / "CoLA" / f"{split}.tsv").write_text(text)
    data = load(tmp_path, "cola")
    assert data.evaluation.inputs[1] == "sentence 1" and data.evaluation.labels.tolist() == [0, 1] * 4


def test_parquet_in_several_files_keeps_their_order(tmp_path):
    write_parquet(tmp_path, "sst2")
    (file,) = (tmp_path / "sst2").glob("train-*.parquet")
    frame = pd.read_parquet(file)
    file.unlink()
    for number, part in enumerate((frame.iloc[:5], frame.iloc[5:])):
        part.to_parquet(file.with_name(f"train-{number:05}-of-00002.parquet"))
    data = load(tmp_path, "sst2")
    assert len(data.train) + 4 == len(frame) and len(data.source["sha256"].split(", ")) == 3
    by_id = dict(zip(data.train.ids, data.train.inputs, strict=True))
    assert all(frame["sentence"][int(name.split("/")[1])] == text for name, text in by_id.items())


# -------------------------------------------------------------------------------------------------------------- limit


def skewed(root: Path, ones: int, zeros: int) -> None:
    (root / "SST-2").mkdir()
    rows = ["sentence\tlabel", *(f"one {i}\t1" for i in range(ones)), *(f"zero {i}\t0" for i in range(zeros))]
    for split in ("train", "dev"):
        (root / "SST-2" / f"{split}.tsv").write_text("\n".join(rows))


def test_a_limit_keeps_the_share_of_every_class(tmp_path):
    skewed(tmp_path, 30, 10)
    data = load(tmp_path, "sst2", limit=8)
    assert Counter(data.evaluation.labels.tolist()) == {1: 6, 0: 2}
    places = [int(name.split("/")[1]) for name in data.evaluation.ids]
    assert places == sorted(places) and places != list(range(8))
    assert load(tmp_path, "sst2", limit=8).evaluation.ids == data.evaluation.ids
    assert load(tmp_path, "sst2", limit=8, split_seed=1).evaluation.ids != data.evaluation.ids
    for count in range(1, 40):
        ones = int(load(tmp_path, "sst2", limit=count).evaluation.labels.sum())
        assert abs(ones - 0.75 * count) <= 0.5
    assert load(tmp_path, "sst2", limit=40).evaluation.ids == load(tmp_path, "sst2").evaluation.ids


def test_a_limit_of_scores_is_a_draw(tmp_path):
    write_tsv(tmp_path, "stsb")
    ids = load(tmp_path, "stsb", limit=5).evaluation.ids
    assert len(set(ids)) == 5 and ids != [f"dev/{i}" for i in range(5)]


# ------------------------------------------------------------------------------------------------------------- errors


def spoil(root: Path, task: str, change) -> None:
    write_tsv(root, task)
    file = root / TASKS[task].folder / "train.tsv"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("rte", lambda text: text.replace("sentence2", "text"), r"RTE/train\.tsv has no column 'sentence2'"),
        ("qnli", lambda text: text.replace("question", "query", 1), r"QNLI/train\.tsv has no column 'question'"),
        ("mnli", lambda text: text.replace("gold_label", "silver"), r"MNLI/train\.tsv has no column 'gold_label'"),
        ("qqp", lambda text: text.replace("is_duplicate", "same"), r"QQP/train\.tsv has no column 'is_duplicate'"),
        ("rte", lambda text: text.replace("\tentailment", "\tmaybe", 1), r"line \d+: expected sentence1, .*'maybe'"),
        ("mnli", lambda text: text.replace("neutral\n", "-\n", 1), r"line \d+: expected sentence1, sentence2, gold_l"),
        ("stsb", lambda text: text.replace("\t0.500\n", "\t5.5\n", 1), r"line \d+: expected .*score, got .*'5.5'"),
        ("stsb", lambda text: text.replace("\t0.500\n", "\tnan\n", 1), r"line \d+: expected .*score, got .*'nan'"),
        ("stsb", lambda text: text.replace("\t0.500\n", "\t\n", 1), r"line \d+: expected .*score, got "),
        ("cola", lambda text: "a\tb\n", r"CoLA/train\.tsv, line 1: expected sentence, label, got \['a', 'b'\]"),
        ("cola", lambda text: "", r"CoLA/train\.tsv has no rows"),
        ("wnli", lambda text: text.splitlines()[0], r"WNLI/train\.tsv has no rows"),
        ("qqp", lambda text: "", r"QQP/train\.tsv has no column 'question1'"),
        # cells too many or too few, of which the columns that are read would seem to be there
        (
            "sst2",
            lambda text: text.replace("\t", "\t1\t").replace("\t1\t", "\t", 1),
            r"SST-2/train\.tsv, line 2: expec",
        ),
        ("cola", lambda text: text.replace("film", "fi\tlm", 1), r"CoLA/train\.tsv, line 1: expected sentence, label"),
        ("mrpc", lambda text: text.replace("story", "sto\try", 1), r"MRPC/train\.tsv, line 2: expected #1 String, #2"),
        ("mrpc", lambda text: text.replace(" film", "\tfilm", 1), r"MRPC/train\.tsv, line 2: expected #1 String, #2"),
        (
            "rte",
            lambda text: text.replace("entailment\n", "entailment\tx\n", 1),
            r"line \d+: expected sentence1, sentence",
        ),
        ("stsb", lambda text: text + text, r"line 50: expected sentence1, sentence2, score, got .*'score'"),
        ("rte", lambda text: text + text, r"line 50: expected sentence1, sentence2, label, got .*'label'"),
        ("qnli", lambda text: text.replace("index", "sentence", 1), r"has more than one column 'sentence'"),
        ("rte", lambda text: text.replace("\n", "\n\n", 3) + "x", r"line 53: expected .* got \['x'\]"),
        ("wnli", lambda text: text.replace("\n", "\r"), r"WNLI/train\.tsv has no column 'label'"),
    ],
)
def test_spoilt_files(task, change, message, tmp_path):
    spoil(tmp_path, task, change)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, task)
    assert refused(caught).startswith(f"dataset.root={tmp_path}: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\n\n") + " \n\t\n",
        lambda text: text.removesuffix("\n"),
        lambda text: text.replace("\n", "\t\n"),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last end", "tabs at the ends"],
)
def test_line_ends_and_marks_change_nothing(task, change, tmp_path):
    write_tsv(tmp_path / "plain", task)
    spoil(tmp_path, task, lambda text: change(text.removeprefix("\ufeff")))
    whole, changed = load(tmp_path / "plain", task), load(tmp_path, task)
    assert changed.train.checksum() == whole.train.checksum()
    assert changed.calibration_pool.checksum() == whole.calibration_pool.checksum()


@pytest.mark.parametrize(("cell", "empty"), [("", 1), ("  ", 1), ('"', 0), ('""', 0), ("\N{NO-BREAK SPACE}", 1)])
def test_empty_texts_count_and_are_said(cell, empty, tmp_path, caplog):
    write_tsv(tmp_path, "rte")
    file = tmp_path / "RTE" / "dev.tsv"
    lines = file.read_text(encoding="utf-8").split("\n")
    number, _, second, label = lines[4].split("\t")
    lines[4] = "\t".join((number, cell, second, label))
    file.write_text("\n".join(lines), encoding="utf-8")
    assert load(tmp_path, "rte").evaluation.inputs[3] == (cell, second)
    said = [record.message for record in caplog.records]
    assert len(said) == empty and all("RTE/dev.tsv: 1 of 12 examples" in line and "line 5" in line for line in said)


def test_rows_of_qqp_that_break_off_are_left_out_and_counted(tmp_path):
    spoil(tmp_path, "qqp", lambda text: text + "9\t1\t2\tonly one question\nthe rest\t0\n")
    data = load(tmp_path, "qqp")
    assert data.source["incomplete_rows"] == "2"
    assert len(data.train) + len(data.calibration_pool) == len(ROWS("qqp", "train"))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"sentence": ["a", "b"], "label": [0, -1]}, r"row 1: expected sentence, label, got \['b', -1\]"),
        ({"sentence": ["a", None], "label": [0, 1]}, r"row 1: expected sentence, label"),
        ({"text": ["a"], "label": [0]}, r"has no column 'sentence'"),
        ({"sentence": [], "label": []}, r"has no rows"),
        ({"sentence": ["a"], "label": [1.5]}, r"row 0: expected sentence, label, got \['a', 1.5\]"),
        ({"sentence": [b"a"], "label": [1]}, r"row 0: expected sentence, label"),
    ],
)
def test_spoilt_parquet(frame, message, tmp_path):
    (tmp_path / "sst2").mkdir()
    pd.DataFrame(frame).to_parquet(tmp_path / "sst2" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "sst2")
    assert "sst2/train-00000-of-00001.parquet" in refused(caught)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"sentence": ["c", "d"], "label": [0, 2]}, r"row 1 of train-00001-of-00002\.parquet: expected sentence"),
        ({"text": ["c", "d"], "label": [0, 1]}, r"train-00001-of-00002\.parquet has other columns than train-00000"),
        (None, r"train-00001-of-00002\.parquet is not parquet"),
    ],
)
def test_the_spoilt_one_of_two_files_is_named(second, message, tmp_path):
    (tmp_path / "sst2").mkdir()
    files = [tmp_path / "sst2" / f"train-0000{number}-of-00002.parquet" for number in range(2)]
    pd.DataFrame({"sentence": ["a", "b"], "label": [0, 1]}).to_parquet(files[0])
    if second is None:
        files[1].write_bytes(b"text")
    else:
        pd.DataFrame(second).to_parquet(files[1])
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "sst2")
    refused(caught)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.parquet").write_text("text")
    with pytest.raises(UserError, match=r"sst2/train\.parquet is not parquet") as caught:
        load(tmp_path, "sst2")
    refused(caught)


def test_missing_files_name_both_layouts_and_the_hub(tmp_path):
    write_tsv(tmp_path, "mnli")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(UserError, match=r"MNLI/dev_mismatched\.tsv .*mnli/validation_mismatched-\*\.parquet") as caught:
        load(tmp_path, "mnli")
    assert "dataset.root=null reads the hub" in refused(caught)


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the hub's cache: a folder of parquet files, and what was asked of it."""
    asked = []
    folder = tmp_path / ("ab" * 20)
    folder.mkdir()

    def snapshot_download(repository, *, repo_type, revision, allow_patterns, local_files_only):
        assert repo_type == "dataset" and not local_files_only
        asked.append((repository, allow_patterns, revision))
        return str(folder)

    monkeypatch.setattr("bayesq.suite.hub._absence", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return folder, asked


def test_the_hub_gives_parquet_files(hub, caplog):
    root, asked = hub
    write_parquet(root, "mnli")
    with caplog.at_level("INFO"):
        data = load(None, "mnli")
    assert asked == [("nyu-mll/glue", ["mnli/*.parquet"], "main")]
    assert data.evaluation.labels.tolist() == [label for split in DEV["mnli"] for *_, label in ROWS("mnli", split)]
    assert data.source["revision"] == "ab" * 20 and len(data.source["sha256"].split(", ")) == 3
    assert data.source["origin"] == "GLUE mnli in nyu-mll/glue on the hub"
    told = f"dataset.hub=nyu-mll/glue is at commit {'ab' * 20} of main; dataset.revision={'ab' * 20} pins it"
    assert told in caplog.text
    load(None, "mnli", revision="abc")
    assert asked[1][2] == "abc"


def test_a_hub_that_lacks_files_or_numbers_the_classes_otherwise_is_refused(hub):
    with pytest.raises(UserError, match=r"^dataset\.hub=nyu-mll/glue: SST-2/train\.tsv cannot be read") as caught:
        load(None, "sst2")
    refused(caught)
    (hub[0] / "sst2").mkdir()
    names = json.dumps({"info": {"features": {"label": {"names": ["positive", "negative"]}}}})
    table = pa.table({"sentence": ["a", "b"], "label": [0, 1]}).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, hub[0] / "sst2" / "train-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"^dataset\.hub=nyu-mll/glue: .*sst2/train.* calls label 0 'positive'"
    ) as caught:
        load(None, "sst2")
    refused(caught)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr("bayesq.suite.hub._absence", lambda: "it cannot be reached: Try again")
    with pytest.raises(UserError, match=r"^dataset\.hub=nyu-mll/glue could not be .*Try.*dataset\.root=DIR") as caught:
        load(None, "sst2")
    refused(caught)


# --------------------------------------------------------------------------------------------------------- real files

SHARED = Path(__file__).parents[3] / "shared" / "data" / "glue"


@pytest.mark.skipif(not (SHARED / "RTE").is_dir(), reason="the real files of GLUE are not here")
@pytest.mark.parametrize(
    ("name", "train", "labels", "first"),
    [
        ("rte", 2490, [146, 131], "Dana Reeve, the widow of the actor Christopher Reeve"),
        ("wnli", 635, [40, 31], "The drain is clogged with hair."),
        ("qnli", None, [2702, 2761], "What came into force after the new constitution was herald?"),
    ],
)
def test_real_files(name, train, labels, first):
    """Published numbers of examples, and of the labels of dev in the order of the classes."""
    data = load(SHARED, name, calibration_pool=128)
    classes = Counter(data.evaluation.labels.tolist())
    if train is None:  # dev only: the pool is a part of it
        classes += Counter(data.calibration_pool.labels.tolist())
        assert len(data.train) == 0 and len(data.evaluation) == sum(labels) - 128
    else:
        assert len(data.train) + 128 == train and data.evaluation.inputs[0][0].startswith(first)
    assert [classes[label] for label in range(2)] == labels
    assert data.task == TEXT_CLASSIFICATION and len(data.calibration_pool) == 128
