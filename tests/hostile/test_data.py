"""Damaged data files, labels out of range, and sets too small for what is asked: one clear line before long work."""

import io
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from damage import damaged, report
from PIL import Image
from torch import nn

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.datasets.cifar10 import Cifar10
from bayesq.suite.datasets.glue import Glue
from bayesq.suite.datasets.imagenet import ImageNet, wnids
from bayesq.suite.errors import UserError
from bayesq.suite.models.photos import PhotoEncoder

HEADER = "index\tsentence1\tsentence2\tlabel\n"
ROWS = "".join(
    f'{i}\tthe cat sat {i}.\tA "cat" sat é.\t{"entailment" if i % 2 else "not_entailment"}\n' for i in range(20)
)


def tried(what: str, least: int, whole: bytes, file: Path, load: Callable[[], object], named: str = "") -> Counter[str]:
    """Damage a file `least` times and load it: a UserError that names it, or a data set."""
    outcomes, draw = Counter[str](), random.Random(what)
    file.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(least):
        file.write_bytes(damaged(whole, draw)[1])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load()
        except UserError as error:
            assert (named or file.name) in one_line(str(error))
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    report(what, outcomes, least)
    return outcomes


def rte(root: Path) -> DataSplits:
    return Glue(str(root), "rte", 0, 10).load(root)


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    folder = tmp_path / "RTE"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(HEADER + ROWS, encoding="utf-8")
    return folder


def test_damaged_tsv(tmp_path: Path, tsv: Path) -> None:
    whole = (HEADER + ROWS).encode()
    found = tried("TSV files", 500, whole, tsv / "dev.tsv", lambda: rte(tmp_path), "dataset.root")
    assert found["refused"] > 200


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ((HEADER + ROWS).encode("utf-16"), "is not UTF-8 text"),
        ((HEADER + ROWS).encode("latin-1"), "is not UTF-8 text"),
        ((HEADER + ROWS.replace("cat", "c\0t")).encode(), "NUL bytes"),
        ((HEADER.replace("sentence2", "text") + ROWS).encode(), "has no column 'sentence2'"),
        ((HEADER + ROWS.replace("\tnot_entailment", "")).encode(), r"line 2: expected .*label"),
        ((HEADER + ROWS.replace("not_entailment", "2")).encode(), r"line 2: expected .*label"),
        ((HEADER + ROWS.replace("not_entailment", "-1")).encode(), r"line 2: expected .*label"),
        ((HEADER + ROWS.replace("not_entailment", "neutral")).encode(), r"line 2: expected .*label"),
        (HEADER.encode(), "has no rows"),
        (b"", "has no column"),
        (b"PAR1" + bytes(80), "NUL bytes"),
    ],
)
def test_tsv_of_other_encodings_columns_and_labels(tmp_path: Path, tsv: Path, content: bytes, line: str) -> None:
    (tsv / "dev.tsv").write_bytes(content)
    with pytest.raises(UserError, match=line):
        rte(tmp_path)


def parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def test_damaged_parquet_of_texts(tmp_path: Path) -> None:
    folder = tmp_path / "rte"
    folder.mkdir()
    whole = parquet(pd.DataFrame({"sentence1": ["a b"] * 12, "sentence2": ["c"] * 12, "label": [0, 1] * 6}))
    (folder / "train.parquet").write_bytes(whole)
    tried("parquet files of texts", 150, whole, folder / "validation.parquet", lambda: rte(tmp_path), "dataset.root")


def photo(seed: int, kind: str = "PNG", size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def photos(count: int = 4, label: int | None = None) -> pd.DataFrame:
    images = [{"bytes": photo(i), "path": None} for i in range(count)]
    return pd.DataFrame({"image": images, "label": [i if label is None else label for i in range(count)]})


def test_damaged_parquet_of_images(tmp_path: Path) -> None:
    whole = parquet(photos())
    (tmp_path / "train.parquet").write_bytes(whole)
    load = lambda: Cifar10(str(tmp_path)).load(tmp_path)  # noqa: E731
    tried("parquet files of images", 100, whole, tmp_path / "test.parquet", load)


def encoder() -> PhotoEncoder:
    module = nn.Module()
    size = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
    module.pretrained_cfg = {**size, "mean": (0.5,) * 3, "std": (0.5,) * 3}  # type: ignore[assignment]
    return PhotoEncoder("test", module)


def test_damaged_parquet_of_photos(tmp_path: Path) -> None:
    encode = encoder()

    def load() -> None:
        encode(ImageNet(str(tmp_path), 0, 2, 0).load(tmp_path).evaluation)

    tried("parquet files of photos", 150, parquet(photos()), tmp_path / "validation.parquet", load)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_photos(tmp_path: Path, kind: str) -> None:
    file, encode = tmp_path / f"photo.{kind.lower()}", encoder()
    load = lambda: encode(Examples([file], torch.zeros(1, dtype=torch.long), ["a"]))  # noqa: E731
    found = tried(f"{kind} photos", 200, photo(3, kind), file, load)
    assert kind != "PNG" or found["refused"] > 150  # which has checksums


@pytest.mark.parametrize(
    ("label", "said"),
    [(10, "labels from 0 to 9, and has 10"), (-1, "labels from 0 to 9"), (2.5, "whole numbers"), (None, "whole numb")],
)
def test_labels_out_of_range(tmp_path: Path, label: float | None, said: str) -> None:
    (tmp_path / "train.parquet").write_bytes(parquet(photos()))
    frame = photos()
    frame["label"] = [0, 1, 2, label]
    (tmp_path / "test.parquet").write_bytes(parquet(frame))
    with pytest.raises(UserError, match=said):
        Cifar10(str(tmp_path)).load(tmp_path)


def test_photo_labels_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "validation.parquet").write_bytes(parquet(photos(label=1000)))
    with pytest.raises(UserError, match="labels from 0 to 999, and has 1000"):
        ImageNet(str(tmp_path), 0, 2, 0).load(tmp_path)
    tree = tmp_path / "tree" / "val" / "n99999999"
    tree.mkdir(parents=True)
    (tree / "a.png").write_bytes(photo(0))
    with pytest.raises(UserError, match="is not a WordNet id"):
        ImageNet(str(tmp_path / "tree"), 0, 1, 0).load(tmp_path)


# ------------------------------------------------------------------------------------------------- sets of odd sizes


def one_class(root: Path, count: int) -> None:
    tree = root / "val" / wnids()[7]
    tree.mkdir(parents=True)
    for i in range(count):
        (tree / f"{i}.png").write_bytes(photo(i))


def test_one_class_and_too_few_photos(tmp_path: Path) -> None:
    one_class(tmp_path, 3)
    data = ImageNet(str(tmp_path), 0, 2, 0, limit=1).load(tmp_path)
    assert (len(data.calibration_pool), len(data.evaluation)) == (2, 1)
    assert data.evaluation.labels.tolist() == [7]
    with pytest.raises(UserError, match=r"dataset\.calibration_pool=3 is not possible"):
        ImageNet(str(tmp_path), 0, 3, 0).load(tmp_path)
    for limit in (0, 2):
        with pytest.raises(UserError, match=rf"dataset\.limit={limit} is not possible: choose 1 to 1"):
            ImageNet(str(tmp_path), 0, 2, 0, limit=limit).load(tmp_path)


@pytest.mark.parametrize("examples", [0, -1, 11])
def test_calibration_sets_that_cannot_be_drawn(tmp_path: Path, tsv: Path, examples: int) -> None:
    data = rte(tmp_path)
    assert len(data.calibration(1, 0)) == 1
    with pytest.raises(ValueError, match=rf"calibration\.examples={examples} is not possible: choose 1 to 10"):
        data.calibration(examples, 0)
