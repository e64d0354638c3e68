"""Users' own data without code: texts in files, photos in folders, data sets on the hub."""

import csv
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from tiny_bert import tiny_bert

from bayesq.batches import TensorExamples
from bayesq.likelihood import Categorical
from bayesq.suite.composition import preflight
from bayesq.suite.datasets.base import DataSplits, Photo
from bayesq.suite.datasets.csv_files import CsvFiles
from bayesq.suite.datasets.hub_data import HubData
from bayesq.suite.datasets.image_folder import ImageFolder
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import state_checksum
from bayesq.suite.models.minilm import MiniLM
from bayesq.suite.models.timm_model import TimmModel
from bayesq.suite.models.transformers_model import TransformersClassifier
from bayesq.suite.plan import load_workload
from bayesq.suite.runner import Evaluator
from bayesq.suite.tasks import TEXT_REGRESSION

COMMIT = "0123456789abcdef" * 2 + "01234567"


def texts(count: int = 20, kinds: tuple[Any, ...] = ("bad", "good")) -> pd.DataFrame:
    rows = range(count)
    labels = [kinds[i % len(kinds)] for i in rows]
    scores = [i / 4 for i in rows]
    return pd.DataFrame({"text": [f'film {i}, a "story"' for i in rows], "label": labels, "score": scores})


def write(table: pd.DataFrame, file: Path) -> str:
    if file.suffix == ".csv":
        table.to_csv(file, index=False)
    elif file.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in [table.columns, *table.itertuples(index=False)]]
        file.write_text("\n".join(lines) + "\n")
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")))
    else:
        table.to_parquet(file, index=False)
    return str(file)


def parts(data: DataSplits) -> list[list[Any]]:
    return [list(part.inputs) for part in (data.train, data.calibration_pool, data.evaluation)]


def load(file: str, **options: Any) -> DataSplits:
    return CsvFiles(file=file, **options).load(Path("unused"))


class TestTexts:
    @pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
    def test_every_kind_of_file_gives_the_same(self, ending: str, tmp_path: Path) -> None:
        data = load(write(texts(), tmp_path / f"mine.{ending}"))
        train, pool, evaluation = parts(data)
        assert (len(train), len(pool), len(evaluation)) == (8, 8, 4)
        assert sorted(train + pool + evaluation) == sorted(texts()["text"])
        assert data.classes == ("bad", "good") and data.num_classes == 2
        for part in (data.train, data.calibration_pool, data.evaluation):
            kinds = ["good" if int(text.split()[1][:-1]) % 2 else "bad" for text in part.inputs]
            assert [data.classes[label] for label in part.labels] == kinds
            assert kinds.count("good") == kinds.count("bad")
        again = load(str(tmp_path / f"mine.{ending}"))
        assert parts(again) == parts(data) and again.source == data.source
        assert parts(load(str(tmp_path / f"mine.{ending}"), split_seed=1)) != parts(data)

    def test_a_file_of_its_own_is_evaluated_in_its_order(self, tmp_path: Path) -> None:
        train, val = texts(10), texts(30)[10:]
        files = write(train, tmp_path / "train.csv"), write(val, tmp_path / "val.jsonl")
        data = load(files[0], val=files[1], calibration_pool=3)
        assert list(data.evaluation.inputs) == list(val["text"]) and data.evaluation.ids[0] == "val/0"
        assert (len(data.train), len(data.calibration_pool)) == (7, 3)
        assert len(load(files[0], val=files[1], limit=6).evaluation) == 6

    @pytest.mark.parametrize(
        ("kinds", "classes", "labels"),
        [
            ((0, 1, 2), (), [0, 1, 2]),
            ((1, 5, 10), ("1", "5", "10"), [0, 1, 2]),
            (("b", "a", "c"), ("a", "b", "c"), [1, 0, 2]),
            ((0.0, 1.0), (), [0, 1]),
            ((True, False), ("False", "True"), [1, 0]),
        ],
    )
    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    def test_labels(self, kinds: tuple[Any, ...], classes: Any, labels: list[int], ending: str, tmp_path: Path) -> None:
        data = load(
            write(texts(12, kinds), tmp_path / f"train.{ending}"), val=write(texts(3, kinds), tmp_path / "v.csv")
        )
        assert data.classes == classes
        assert data.evaluation.labels.tolist() == (labels * 3)[:3]

    def test_pairs_and_scores(self, tmp_path: Path) -> None:
        table = texts().rename(columns={"text": "one"}).assign(two=[f"second {i}" for i in range(20)])
        data = load(write(table, tmp_path / "pairs.csv"), text="one", pair="two", score="score", held_out=0.5)
        assert data.task == TEXT_REGRESSION and data.num_classes == 1 and data.primary_metric == "pearson"
        assert [metric.name for metric in data.metrics] == ["pearson", "spearman"]
        for (one, two), score in zip(data.evaluation.inputs, data.evaluation.labels.tolist(), strict=True):
            number = int(two.split()[1])
            assert one.startswith(f"film {number},") and score == number / 4

    def test_recorded_class_names(self, tmp_path: Path) -> None:
        """Of the `datasets` library: they give the order, and classes that no row has."""
        table = pa.table({"text": ["a", "b", "c", "d"], "kind": [2, 0, 2, 0]})
        features = {"kind": {"names": ["no", "maybe", "yes"], "_type": "ClassLabel"}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
            tmp_path / "train.parquet",
        )
        data = load(str(tmp_path / "train.parquet"), label="kind", held_out=0.5)
        assert data.classes == ("no", "maybe", "yes") and data.evaluation.labels.tolist() == [2, 0]

    @pytest.mark.parametrize(
        ("evaluated", "line"),
        [
            (["a", "b"], ""),
            (["a", "B"], "only evaluated examples have the labels B: "),
            (["-1", "-1"], "only evaluated examples have the labels -1: "),
        ],
    )
    def test_classes_that_are_only_evaluated_are_told(
        self, evaluated: list[str], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        val = pd.DataFrame({"text": ["one", "two"], "label": evaluated})
        load(write(texts(20, ("a", "b")), tmp_path / "mine.csv"), val=write(val, tmp_path / "val.csv"))
        assert [line in message for message in caplog.messages] == [True] * bool(line)

    def test_evaluated_texts_that_are_calibrated_on_are_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        table = texts(20)
        val = table.assign(text=[text if row < 7 else f"new {row}" for row, text in enumerate(table["text"])])
        load(write(table, tmp_path / "mine.csv"), val=write(val, tmp_path / "val.csv"))
        assert [message.partition(": ")[2].partition(", ")[0] for message in caplog.messages] == [
            "7 of 20 evaluated texts are also calibrated or fitted on"
        ]

    def test_long_cells_and_line_ends_in_cells(self, tmp_path: Path) -> None:
        limit = csv.field_size_limit()
        table = texts(10).assign(text=["x" * 200_000, *(f"one\ntwo {i}" for i in range(9))])
        data = load(write(table, tmp_path / "mine.csv"))
        assert sorted(text for part in parts(data) for text in part) == sorted(table["text"])
        assert csv.field_size_limit() == limit

    def test_empty_texts_are_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "bayesq"):
            load(write(texts().assign(text=[" ", *["x"] * 19]), tmp_path / "mine.csv"))
        assert "1 of 20 texts are empty (line 2)" in caplog.text

    @pytest.mark.parametrize(
        ("change", "options", "line"),
        [
            ({}, {"text": "txt"}, r"dataset.text=txt: .*mine.csv has no such column, but text, label, score; did you"),
            ({}, {"pair": "second"}, r"dataset.pair=second: .* has no such column"),
            ({}, {"label": "text"}, r"dataset.label=text: has 30 values in 30 rows, too many for classes"),
            ({}, {"score": "label"}, r"line 2: score 'bad' is not a number"),
            ({"label": "same"}, {}, r"dataset.label=label: needs at least two classes, has same"),
            ({"label": ["", *["x", "y"] * 14, "x"]}, {}, r"line 2: label '' is none of the classes x, y"),
            ({}, {"limit": 99}, r"dataset.limit=99 is not possible: choose 1 to 6"),
            ({"score": [1e39, *[1.0] * 29]}, {"score": "score"}, r"line 2: score '1e\+39' is not a number"),
            ({"label": [*["x", "y"] * 14, "x", "nan"]}, {}, r"line 31: label 'nan' is none of the classes x, y"),
            ({"label": "x\n" * 300}, {"text": "txt"}, r"dataset.text=txt: .{1,400}$"),
            ({}, {"held_out": float("nan")}, r"dataset.held_out=nan: evaluates 0 of 30 examples"),
            ({}, {"held_out": 0.0}, r"dataset.held_out=0.0: evaluates 0 of 30 examples"),
            ({}, {"calibration_pool": 0}, r"dataset.calibration_pool=0: 24 examples"),
        ],
    )
    def test_what_does_not_fit(self, change: Any, options: Any, line: str, tmp_path: Path) -> None:
        file = write(texts(30).assign(**change), tmp_path / "mine.csv")
        with pytest.raises(UserError, match=line):
            load(file, **options)

    @pytest.mark.parametrize(("count", "refused"), [(20, False), (21, True)])
    def test_many_fractions_are_no_classes(self, count: int, refused: bool, tmp_path: Path) -> None:
        file = write(texts(100, tuple(i + 0.5 for i in range(count))), tmp_path / "mine.csv")
        if refused:
            with pytest.raises(UserError, match=r"has 21 values in 100 rows, too many for classes; dataset.score=COL"):
                load(file)
        else:
            assert load(file).num_classes == 20

    @pytest.mark.parametrize(
        ("name", "content", "line"),
        [
            ("a.txt", "x", r"dataset.file=.*a.txt: needs a file that ends in one of .csv, .tsv, .jsonl, .parquet"),
            ("a.csv", "text,label\nx\n", r"a.csv, line 2: has 1 cells, the header 2"),
            ("a.csv", 'text,label\n"x,1\n', r"a.csv, line 2: is not CSV"),
            ("a.csv", 'text,label\nx,1\n"y,1\nz,0\n', r"a.csv, line 3: is not CSV"),
            ("a.csv", "text;label\nx, y;1\n", r"a.csv: its first line has one column, 'text;label': .*commas"),
            ("a.tsv", "text,label\nx,1\n", r"a.tsv: its first line has one column, 'text,label': .*tabs"),
            ("a.csv", "text,text,label\nx,y,1\n", r"dataset.text=text: .*a.csv has more than one such column"),
            ("a.jsonl", "[" * 99_999, r"a.jsonl, line 1: is not JSON"),
            ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', r"a.jsonl, line 1: needs text in text, got '.ud800'"),
            ("a.jsonl", '{"text": "x", "label": [1]}\n', r"dataset.label=label: needs at least two classes, has none"),
            ("a.tsv", "text\tlabel\nx\t1\ty\n", r"a.tsv, line 2: has 3 cells, the header 2"),
            ("a.jsonl", "[1]\n", r"a.jsonl, line 1: needs an object"),
            ("a.jsonl", "{\n", r"a.jsonl, line 1: is not JSON"),
            ("a.jsonl", '{"text": 3, "label": 1}\n', r"a.jsonl, line 1: needs text in text, got 3"),
            ("a.csv", "text,label\n", r"a.csv has no rows"),
            ("a.parquet", "x", r"a.parquet is not parquet"),
        ],
    )
    def test_files_that_cannot_be_read(self, name: str, content: str, line: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=line):
            load(str(tmp_path / name))
        with pytest.raises(UserError, match="cannot be read"):
            load(str(tmp_path / "absent.csv"))

    def test_a_checkpoint_gets_the_order_of_its_logits_by_name(self, tmp_path: Path) -> None:
        data = load(write(texts(), tmp_path / "mine.csv"))
        folder = tiny_bert(tmp_path / "bert", 2, ["Good", "BAD"])
        network = TransformersClassifier(max_length=16, checkpoint=str(folder)).build(data, tmp_path)
        assert network.blueprint["order"] == [1, 0]
        folder = tiny_bert(tmp_path / "three", 3, ["good", "bad", "fine"])
        with pytest.raises(UserError, match=r"has 3 outputs, but the data set has 2 classes \(bad, good\): choose"):
            TransformersClassifier(max_length=16, checkpoint=str(folder)).build(data, tmp_path)

    def test_a_head_is_fitted(self, tmp_path: Path) -> None:
        """MiniLM tells these texts apart that it has not seen."""
        good, bad = ("a wonderful, moving film", "an awful, boring mess")
        table = pd.DataFrame({"text": [f"{kind}, number {i}" for i in range(15) for kind in (good, bad)]})
        data = load(write(table.assign(label=["good", "bad"] * 15), tmp_path / "mine.csv"))
        network = MiniLM(max_length=32).build(data, tmp_path / "cache")
        (batch,) = network.encode(data.evaluation).batches(64, "cpu")
        with torch.no_grad():
            assert torch.equal(network.module(**batch.inputs).argmax(1), data.evaluation.labels)


def photo(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(folder: Path, **counts: int) -> Path:
    """Photos of classes; `val__cat=3` is folder/val/cat with three."""
    for name, count in counts.items():
        below = folder / name.replace("__", "/")
        below.mkdir(parents=True)
        for i in range(count):
            (below / f"{i}.png").write_bytes(photo(i))
    return folder


class TestPhotos:
    def test_train_and_val(self, tmp_path: Path) -> None:
        tree(tmp_path, train__cat=4, train__dog=4, val__dog=2, val__eel=1, test__cat=1)
        data = ImageFolder(folder=str(tmp_path)).load(tmp_path)
        assert data.classes == ("cat", "dog", "eel") and data.source["photos"] == "train 8, val 3"
        assert data.evaluation.ids == ["dog/0", "dog/1", "eel/0"] and data.evaluation.labels.tolist() == [1, 1, 2]
        assert len(data.calibration_pool) == 8 and not len(data.train)
        assert all(isinstance(item, Photo) and "/train/" in str(item) for item in data.calibration_pool.inputs)

    @pytest.mark.parametrize("below", ["", "train__", "val__"])
    def test_without_one_of_them_a_share_is_held_out(self, below: str, tmp_path: Path) -> None:
        tree(tmp_path, **{f"{below}cat": 10, f"{below}dog": 20})
        data = ImageFolder(folder=str(tmp_path)).load(tmp_path)
        assert data.evaluation.labels.bincount().tolist() == [2, 4]
        assert sorted(data.evaluation.ids + data.calibration_pool.ids) == sorted(
            f"{name}/{i}" for name, count in (("cat", 10), ("dog", 20)) for i in range(count)
        )

    @pytest.mark.parametrize(
        ("counts", "line"),
        [
            (
                {"training__cat": 9, "training__dog": 9, "validation__cat": 5, "validation__dog": 5},
                "validation/ is calibrated on and evaluated, training/ is not read: ",
            ),
            (
                {"train__cat": 5, "train__dog": 5, "Val__cat": 5, "extra": 1},
                "train/ is calibrated on and evaluated, Val/, extra/ is not read: ",
            ),
            ({"train__cat": 5, "train__dog": 5, "val": 5}, "val/ is not read: "),
            ({"train__cat": 5, "train__dog": 5, "val__cat": 5, "test__cat": 5}, ""),
            ({"cat": 5, "dog": 5}, ""),
        ],
    )
    def test_folders_that_are_not_read_are_told(
        self, counts: dict[str, int], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "__MACOSX").mkdir()
        data = ImageFolder(folder=str(tree(tmp_path, **counts))).load(tmp_path)
        assert data.classes == ("cat", "dog")
        assert [line in message for message in caplog.messages] == [True] * bool(line)

    def test_a_class_named_train_is_a_class(self, tmp_path: Path) -> None:
        assert ImageFolder(folder=str(tree(tmp_path, train=5, car=5))).load(tmp_path).classes == ("car", "train")

    @pytest.mark.parametrize(
        ("counts", "line"),
        [
            ({}, r"needs a folder for each class, as in .*/train/CLASS/PHOTO.jpg"),
            ({"cat": 3}, r"needs a folder for each class"),
            ({"cat": 0, "dog": 0}, r"dataset.folder=.*: no photo \(.jpeg, .jpg, .png\) in CLASS/"),
        ],
    )
    def test_what_does_not_fit(self, counts: dict[str, int], line: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=line):
            ImageFolder(folder=str(tree(tmp_path, **counts))).load(tmp_path)
        with pytest.raises(UserError, match=r"dataset.folder=nowhere: there is no such folder"):
            ImageFolder(folder="nowhere").load(tmp_path)

    def test_a_published_network_keeps_the_logits_of_the_classes(self, tmp_path: Path, cache: Path) -> None:
        import timm

        torch.manual_seed(0)
        whole = timm.create_model("test_resnet.r160_in1k", pretrained=False).eval()
        repository = cache / "models--timm--test_resnet.r160_in1k"
        place(repository, {"model.safetensors": lambda file: save_file(whole.state_dict(), file)}, "main")
        tree(tmp_path / "photos", tench=6, n01484850=6, goldfish=6)
        data = ImageFolder(folder=str(tmp_path / "photos")).load(tmp_path)
        source = TimmModel("test_resnet.r160_in1k")
        network = source.build(data, tmp_path)
        assert data.classes == ("goldfish", "n01484850", "tench")
        (batch,) = network.encode(data.evaluation).batches(64, "cpu")
        with torch.no_grad():
            expected = whole(batch.inputs["x"])[:, [1, 2, 0]]
            torch.testing.assert_close(network.module(**batch.inputs), expected)
        assert network.description["logits"] == "3 of 1000"
        bare = source.bare(network.blueprint)
        bare.load_state_dict(network.module.state_dict())
        assert state_checksum(bare) == network.checksum

    @pytest.mark.parametrize(
        ("classes", "line"),
        [
            (("cat", "tench"), r"1 of 2 classes are none of them \(cat\): .*model.checkpoint=FILE"),
            (("crane", "tench"), r"'crane' names several classes of ImageNet: call it one of n02012849, n03126707"),
            (("n01440764", "tench"), r"n01440764 and tench are one class of ImageNet"),
        ],
    )
    def test_classes_that_it_does_not_know(
        self, classes: tuple[str, ...], line: str, tmp_path: Path, cache: Path
    ) -> None:
        data = ImageFolder(folder=str(tree(tmp_path, **dict.fromkeys(classes, 5)))).load(tmp_path)
        with pytest.raises(UserError, match=line):
            TimmModel("test_resnet.r160_in1k").build(data, tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def place(repository: Path, files: dict[str, Any], ref: str) -> None:
    """What a download would have left in the cache; each file is written by its function."""
    (repository / "refs" / ref).parent.mkdir(parents=True)
    (repository / "refs" / ref).write_text(COMMIT)
    for name, save in files.items():
        file = repository / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file)


def hub(**options: Any) -> DataSplits:
    return HubData(id="me/mine", **options).load(Path("unused"))


class TestHub:
    def test_texts_of_the_conversion(self, cache: Path) -> None:
        files = {
            "default/train/0000.parquet": lambda file: texts(12).to_parquet(file),
            "default/train/0001.parquet": lambda file: texts(20)[12:].to_parquet(file),
            "default/validation/0000.parquet": lambda file: texts(6).to_parquet(file),
        }
        place(cache / "datasets--me--mine", files, "refs/convert/parquet")
        data = hub()
        assert sorted(data.train.inputs + data.calibration_pool.inputs) == sorted(texts()["text"])  # type: ignore[operator]
        assert list(data.evaluation.inputs) == list(texts(6)["text"]) and data.classes == ("bad", "good")
        assert data.source["revision"] == COMMIT
        assert hub(score="score").task == TEXT_REGRESSION
        with pytest.raises(UserError, match=r"dataset.val=test: there is no such split at refs.* dataset.val=null"):
            hub(val="test")
        with pytest.raises(UserError, match=r"dataset.train=train: there is no such split .*dataset.subset=other"):
            hub(subset="other")

    @pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "train.csv", "train.jsonl"])
    def test_files_of_the_repository_itself(self, name: str, cache: Path) -> None:
        files = {name: lambda file: write(texts(), file), "test.tsv": lambda file: write(texts(4), file)}
        place(cache / "datasets--me--mine", files, "main")
        assert len(hub(revision="main", val="test").evaluation) == 4
        assert len(hub(revision="main", val=None).evaluation) == 4

    def test_photos(self, cache: Path) -> None:
        def save(file: Path) -> None:
            table = pa.table(
                {"photo": [{"bytes": photo(i), "path": None} for i in range(20)], "kind": [i % 2 for i in range(20)]}
            )
            features = {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
            pq.write_table(
                table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file
            )

        place(cache / "datasets--me--mine", {"default/train/0000.parquet": save}, "refs/convert/parquet")
        data = hub(val=None, image="photo", label="kind")
        assert data.classes == ("cat", "dog") and len(data.evaluation) == 4
        shades = [int(name.rpartition("/")[2]) for name in data.evaluation.ids]
        assert [shade % 2 for shade in shades] == data.evaluation.labels.tolist()
        assert [item.read_bytes() for item in data.evaluation.inputs] == [photo(shade) for shade in shades]  # type: ignore[union-attr]

        with pytest.raises(
            UserError, match=r"dataset.image=image: dataset.name=me/mine has no such column, but photo,"
        ):
            hub(val=None, image="image", label="kind")
        with pytest.raises(UserError, match=r"dataset.label=label: .* has no such column, but photo, kind$"):
            hub(val=None, image="photo")

    def test_photos_whose_labels_have_no_names(self, cache: Path) -> None:
        def save(file: Path, shades: range) -> None:
            photos = [{"bytes": photo(i), "path": None} for i in shades]
            pq.write_table(pa.table({"image": photos, "label": [i % 3 for i in shades]}), file)

        files = {
            "default/train/0000.parquet": lambda file: save(file, range(2)),
            "default/train/0001.parquet": lambda file: save(file, range(2, 15)),
        }
        place(cache / "datasets--me--mine", files, "refs/convert/parquet")
        data = hub(val=None, image="image")
        assert data.classes == () and data.num_classes == 3
        assert data.evaluation.labels.bincount().tolist() == [1, 1, 1]

    def test_what_is_not_cached(self, cache: Path) -> None:
        with pytest.raises(
            UserError,
            match=r"^dataset.name=me/mine at dataset.revision=\S+ could not be read from the hub .*dataset=csv",
        ):
            hub()


def test_too_few_texts_are_refused_before_the_network_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(texts(), tmp_path / "mine.csv")
    keys = ["model=minilm", "dataset=csv", f"dataset.file={file}", "dataset.text=text", "dataset.label=label"]
    (job,) = preflight([*keys, "method=rtn"]) or ()
    monkeypatch.setattr(MiniLM, "build", lambda *_: pytest.fail("the network was built"))
    with pytest.raises(UserError, match=r"^calibration.examples=256 is not possible: choose 1 to \d+,"):
        load_workload(OmegaConf.create(job.config), tmp_path)


class Given(torch.nn.Module):
    """Its logits are its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("shift", "lines"), [(0, 0), (1, 1), (None, 0)], ids=["same order", "other", "one answer"])
def test_a_network_whose_classes_have_another_order_is_remarked_before_work(
    shift: int | None, lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = torch.arange(60) % 3
    answers = (labels + shift) % 3 if shift is not None else torch.zeros_like(labels)
    examples = TensorExamples({"x": torch.nn.functional.one_hot(answers, 3).float()}, labels)
    network = SimpleNamespace(module=Given(), identity="given")
    subject = SimpleNamespace(likelihood=Categorical(), device=torch.device("cpu"))
    work: Any = SimpleNamespace(name="given", network=network, subject=subject, evaluation=examples)
    Evaluator(work, 32, None, tmp_path)
    assert len(caplog.messages) == lines
    assert all("right for 0.00 % of the examples, guessing for 33.33 %: check" in line for line in caplog.messages)
