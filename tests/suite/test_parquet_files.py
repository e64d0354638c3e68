"""Which parquet files make up a split, and classes that they record: in every data set that comes as parquet."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bayesq.suite.datasets import imagenet
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.datasets.cifar10 import CLASSES, Cifar10
from bayesq.suite.datasets.glue import Glue
from bayesq.suite.datasets.imagenet import ImageNet, wnids
from bayesq.suite.datasets.parquet_files import of_split, shards
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.errors import UserError


def message(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def png(shade: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, (shade, shade, shade) if mode == "RGB" else shade).save(buffer, "PNG")
    return buffer.getvalue()


def write(file: Path, columns: dict[str, list], classes: list[str] | None = None) -> Path:
    """A parquet file; with `classes`, the record of them that the library `datasets` makes."""
    table = pa.table(columns)
    if classes is not None:
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file


def images(first: int, count: int = 3, **options: object) -> dict[str, list]:
    rows = [{"bytes": png(first + i, **options), "path": None} for i in range(count)]  # type: ignore[arg-type]
    return {"image": rows, "label": [i % 10 for i in range(count)]}


def sentences(first: int, count: int = 3) -> dict[str, list]:
    return {"sentence": [f"text {first + i}" for i in range(count)], "label": [i % 2 for i in range(count)]}


def load_imagenet(root: Path) -> DataSplits:
    return ImageNet(str(root), 0, 1, 0).load(root)


def load_cifar(root: Path) -> DataSplits:
    return Cifar10(str(root)).load(root)


def load_glue(root: Path) -> DataSplits:
    return Glue(str(root), "sst2", 0, 2).load(root)


# folder, name of the evaluation split, columns of a file, loader
READERS = {
    "imagenet": ("data", "validation", images, load_imagenet),
    "imagenet, no folder": (".", "val", images, load_imagenet),
    "cifar10": (".", "test", images, load_cifar),
    "glue": ("sst2", "validation", sentences, load_glue),
}


@pytest.fixture(params=READERS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, Callable, Callable]:
    """A data set of one training file and three evaluation files: folder, evaluation split, columns, load."""
    name, val, columns, load = READERS[request.param]
    folder = tmp_path / name
    write(folder / "train-00000-of-00001.parquet", columns(100))
    for number in range(3):
        write(folder / f"{val}-{number:05}-of-00003.parquet", columns(10 * number))
    return folder, val, columns, lambda: load(tmp_path)


def test_all_files_of_a_set_in_order(whole: tuple) -> None:
    *_, load = whole
    data = load()
    assert len(data.evaluation) == 9 == len(set(data.evaluation.ids))
    assert data.evaluation.labels.tolist() == ([0, 1, 0] if data.subset else [0, 1, 2]) * 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_file_is_named(whole: tuple, number: int) -> None:
    folder, val, _, load = whole
    (folder / f"{val}-{number:05}-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=rf"^dataset\.root=.*{val}-0000{number}-of-00003\.parquet is missing") as caught:
        load()
    message(caught)


@pytest.mark.parametrize(
    "extra",
    [
        "{val}-00000-of-00002",
        "{val}-00003-of-00003",
        "{val}-00001-of-00003 (1)",
        "{val}-00001-of-00003-0a1b",
        "{val}-old-00000-of-00001",
        "{val}-extra",
        "{val}",
    ],
)
def test_a_file_too_many_is_named(whole: tuple, extra: str) -> None:
    folder, val, columns, load = whole
    file = write(folder / f"{extra.format(val=val)}.parquet", columns(50))
    with pytest.raises(UserError, match=r"^dataset\.root=.*not one of the \d files") as caught:
        load()
    assert file.name in message(caught)


def test_hidden_files_do_not_count(whole: tuple) -> None:
    folder, val, _, load = whole
    (folder / f"._{val}-00000-of-00003.parquet").write_bytes(b"\0\5\26\7")
    (folder / ".cache.parquet").write_bytes(b"x")
    assert len(load().evaluation) == 9


def test_a_training_file_is_missed_as_well(whole: tuple) -> None:
    folder, _, _, load = whole
    shutil.move(folder / "train-00000-of-00001.parquet", folder / "train-00001-of-00002.parquet")
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet is missing, .* remove -of-00002 from"):
        load()
    shutil.move(folder / "train-00001-of-00002.parquet", folder / "train-00001.parquet")  # the remedy
    assert len(load().evaluation) == 9


def paths(*names: str) -> list[Path]:
    return [Path("d") / f"{name}.parquet" for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ["train"],
        ["train0", "train1", "train2"],
        ["train-00000-of-00002-1a2b", "train-00001-of-00002-c3d4"],  # hashes of older releases
        ["train-00000-of-00001"],
    ],
)
def test_sets_that_are_whole(names: list[str]) -> None:
    assert of_split(reversed(paths(*names)), "x") == paths(*names)


def test_the_order_is_that_of_the_numbers() -> None:
    names = [f"train-{number}-of-12" for number in range(12)]
    assert of_split(sorted(paths(*names)), "x") == paths(*names)


@pytest.mark.parametrize(
    "names", [["train", "train_old"], ["train", "train1"], ["train-a", "train-b"], ["val", "validation"]]
)
def test_files_that_more_than_a_number_tells_apart(names: list[str]) -> None:
    with pytest.raises(
        UserError, match=rf"^x: {names[0]}\.parquet and {names[1]}\.parquet in d do not belong to one set"
    ):
        of_split(paths(*names), "x")


def test_one_set_in_two_folders_is_none() -> None:
    files = [Path("a/train-00000-of-00002.parquet"), Path("b/train-00001-of-00002.parquet")]
    with pytest.raises(UserError, match=r"b/train-00001-of-00002\.parquet is not one of the 2 files"):
        shards(files, "x")


def test_files_of_no_split_beside_those_of_one(tmp_path: Path) -> None:
    write(tmp_path / "val.parquet", images(0))
    write(tmp_path / "more.parquet", images(0))
    with pytest.raises(UserError, match=r"^dataset\.root=.*more\.parquet begins with none of train, val, test"):
        load_imagenet(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the hub's cache: three training files, of which the first two are here, and both validation files."""
    for name in (
        "train-00000-of-00003",
        "train-00001-of-00003",
        "validation-00000-of-00002",
        "validation-00001-of-00002",
    ):
        write(tmp_path / "data" / f"{name}.parquet", images(0))
    monkeypatch.setattr(imagenet, "hub_files", lambda *_: tmp_path)
    return tmp_path


def from_hub(**patterns: str | None) -> DataSplits:
    return ImageNet(None, 0, 1, 0, hub="a/b", **patterns).load(Path("unused"))  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [None, "data/train-00000-of-*.parquet", "data/train-0000[01]-*.parquet"])
def test_a_pattern_may_ask_for_a_part(hub: Path, train: str | None) -> None:
    assert len(from_hub(train_files=train).evaluation) == (5 if train is None else 6)


def test_what_a_pattern_asks_for_must_be_there(hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"^dataset\.train_files=data/train-\*: .*train-00002-of-00003\.parquet is miss"
    ):
        from_hub(train_files="data/train-*")
    (hub / "data" / "validation-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"^dataset\.val_files=.*validation-00000-of-00002\.parquet is missing"):
        from_hub()


def test_two_editions_in_one_pattern(hub: Path) -> None:
    write(hub / "data" / "validation-00000-of-00001.parquet", images(0))
    with pytest.raises(UserError, match=r"^dataset\.val_files=.*is not one of the 1 files"):
        from_hub()


def test_ids_of_files_of_one_name_hold_their_folders(tmp_path: Path) -> None:
    files = [write(tmp_path / folder / "val.parquet", images(0)) for folder in ("a", "b")]
    ids = ParquetPhotos(files, "x", CLASSES).select(torch.arange(6)).ids
    assert ids[0] == "a/val.parquet/0" and len(set(ids)) == 6


# ------------------------------------------------------------------------------------------------------------ classes


def test_recorded_classes_that_fit(tmp_path: Path) -> None:
    write(tmp_path / "c" / "train.parquet", images(0), list(CLASSES))
    write(tmp_path / "c" / "test.parquet", images(0), ["plane", "car", *CLASSES[2:]])  # synonyms
    assert len(load_cifar(tmp_path / "c").evaluation) == 3
    write(tmp_path / "i" / "val.parquet", images(0), [f"thing {i}" for i in range(1000)])
    assert len(load_imagenet(tmp_path / "i").evaluation) == 2
    for split in ("train", "validation"):
        write(tmp_path / "sst2" / f"{split}.parquet", sentences(0), ["Negative", "positive"])
    assert len(load_glue(tmp_path).evaluation) == 3


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (list(CLASSES[::-1]), r"test\.parquet calls label 0 'truck', which must be label 9"),
        ([CLASSES[1], CLASSES[0], *CLASSES[2:]], r"calls label 0 'automobile', which must be label 1"),
        ([f"class {i}" for i in range(100)], r"names 100 classes in place of 10"),
    ],
)
def test_cifar_of_other_classes(tmp_path: Path, classes: list[str], line: str) -> None:
    write(tmp_path / "train.parquet", images(0))
    write(tmp_path / "test.parquet", images(0), classes)
    with pytest.raises(UserError, match=rf"^dataset\.root=.*{line}") as caught:
        load_cifar(tmp_path)
    message(caught)


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (list(wnids()[:10]), r"names 10 classes in place of 1000"),
        ([wnids()[1], wnids()[0], *wnids()[2:]], rf"calls label 0 '{wnids()[1]}', which must be label 1"),
    ],
    ids=["ten of them", "two exchanged"],
)
def test_photos_of_other_classes(tmp_path: Path, classes: list[str], line: str) -> None:
    write(tmp_path / "val.parquet", images(0), classes)
    with pytest.raises(UserError, match=rf"^dataset\.root=.*val\.parquet {line}") as caught:
        load_imagenet(tmp_path)
    message(caught)


def test_glue_of_other_classes(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / "sst2" / f"{split}.parquet", sentences(0), ["positive", "negative"])
    with pytest.raises(UserError, match=r"sst2/train\.parquet calls label 0 'positive', which must be label 1"):
        load_glue(tmp_path)


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


@pytest.mark.parametrize("size", [(1, 1), (32, 1), (1, 32), (31, 32), (64, 64)])
def test_images_of_other_sizes_are_not_stretched(tmp_path: Path, size: tuple[int, int]) -> None:
    write(tmp_path / "train.parquet", images(0))
    write(tmp_path / "test.parquet", images(0, size=size))
    with pytest.raises(
        UserError, match=rf"row 0 of .*test\.parquet is not a 32x32 image \(it has {size[0]}x{size[1]} pi"
    ):
        load_cifar(tmp_path)


@pytest.mark.parametrize(("mode", "shade", "value"), [("L", 128, 128), ("I;16", 128 * 257, 128), ("1", 1, 255)])
def test_grey_images(tmp_path: Path, mode: str, shade: int, value: int) -> None:
    write(tmp_path / "train.parquet", images(0))
    buffer = io.BytesIO()
    pixels = np.full((32, 32), shade, dtype={"L": np.uint8, "I;16": np.uint16, "1": bool}[mode])
    Image.fromarray(pixels).save(buffer, "PNG")
    write(tmp_path / "test.parquet", {"image": [{"bytes": buffer.getvalue()}], "label": [3]})
    assert torch.equal(load_cifar(tmp_path).evaluation.inputs, torch.full((1, 3, 32, 32), value / 255))
