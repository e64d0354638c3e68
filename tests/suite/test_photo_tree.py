"""Trees of photos as they come: what is read, what it is called, and what is said of the rest."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from bayesq.suite.datasets.base import Examples
from bayesq.suite.datasets.imagenet import ImageNet, wnids
from bayesq.suite.datasets.photo_tree import PhotoTree
from bayesq.suite.errors import UserError
from bayesq.suite.results import write_csv

W = wnids()


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """Three classes of two photos each."""
    for wnid in W[:3]:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (8, 8)).save(tmp_path / "val" / wnid / f"{name}.JPEG")
    return tmp_path / "val"


def tree(val: Path) -> PhotoTree:
    return PhotoTree(val.parent, val.name, W)


def everything(val: Path) -> Examples:
    photos = tree(val)
    return photos.select(torch.arange(len(photos)))


PLAIN = [f"{wnid}/{name}" for wnid in W[:3] for name in ("a", "b")]


def test_a_plain_tree_needs_no_word(val: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert everything(val).ids == PLAIN and tree(val).left_out == ""
    assert "left_out" not in ImageNet(str(val.parent), 0, 1, 0).load(val).source
    assert not caplog.records


def clutter(val: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.JPEG", ".hidden.jpg"):
        (val / W[0] / name).write_bytes(b"x")
    for folder in (".ipynb_checkpoints", f"{W[1]}/.thumbnails"):
        (val / folder).mkdir(parents=True)
        (val / folder / ".a.JPEG").write_bytes(b"x")
    (val / W[1] / ".thumbnails" / "a.JPEG").write_bytes(b"x")


def links(val: Path) -> None:
    os.rename(val / W[0], val.parent / "elsewhere")
    os.symlink(val.parent / "elsewhere", val / W[0])
    os.rename(val / W[1] / "a.JPEG", val.parent / "a.JPEG")
    os.symlink(val.parent / "a.JPEG", val / W[1] / "a.JPEG")


@pytest.mark.parametrize("change", [clutter, links])
def test_trees_that_only_look_unusual(val: Path, change, caplog: pytest.LogCaptureFixture) -> None:
    change(val)
    found = everything(val)
    assert found.ids == PLAIN and all(file.is_file() for file in found.inputs)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{W[0]}/c.webp", rf"1 \.webp \(such as {W[0]}/c\.webp\)"),
        (f"{W[0]}/c.TIF", r"1 \.tif "),
        (f"{W[0]}/c", r"1 \(no suffix\) "),
        (f"{W[0]}/c.JPEG.part", r"1 \.part "),
        (f"{W[0]}/images/c.JPEG", rf"1 folders \(such as {W[0]}/images/\)"),
        (f"{W[0]}/x.jpg/y/c.png", rf"1 folders \(such as {W[0]}/x.jpg/"),
        ("c.JPEG", r"1 \.jpeg \(such as c\.JPEG\)"),
        (f"{W[7]}.tar", r"1 \.tar "),
    ],
)
def test_what_is_left_out_is_said_and_kept(val: Path, name: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    (val / name).parent.mkdir(parents=True, exist_ok=True)
    (val / name).write_bytes(b"x")
    data = ImageNet(str(val.parent), 0, 1, 0).load(val)
    assert sorted([*data.evaluation.ids, *data.calibration_pool.ids]) == PLAIN
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.message
    assert record.message.startswith(f"dataset.root={val.parent}: 6 photos of val/ are read; left out: ")
    assert re.search(said, record.message)
    assert record.message.endswith(data.source["left_out"])


def test_counts_of_several_kinds_and_empty_classes(val: Path) -> None:
    for name in ("a", "b"):
        os.rename(val / W[0] / f"{name}.JPEG", val / W[0] / f"{name}.bmp")
    for i in range(3):
        (val / W[1] / f"{i}.gif").write_bytes(b"x")
    (val / W[5]).mkdir()
    found = tree(val)
    assert found.left_out == (f"2 .bmp, 3 .gif, 2 folders (such as {W[0]}/)")
    assert len(found) == 4 and set(found.labels.tolist()) == {1, 2}


@pytest.mark.parametrize("other", ["a.png", "a.jpg", "a.Jpeg"])
def test_photos_of_one_stem_keep_two_ids(val: Path, other: str, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (8, 8)).save(val / W[1] / other)
    Image.new("RGB", (8, 8)).save(val / W[1] / f"{other}.png")  # whose stem is the whole name of another
    ids = everything(val).ids
    assert len(set(ids)) == 8
    assert [name for name in ids if not name.startswith(W[1])] == PLAIN[:2] + PLAIN[4:]
    assert {f"{W[1]}/a.JPEG", f"{W[1]}/{other}", f"{W[1]}/b.JPEG"} < set(ids)
    assert not caplog.records


def test_a_link_that_leads_nowhere_is_a_photo_that_cannot_be_read(val: Path) -> None:
    os.symlink("/nowhere/at/all", val / W[0] / "q.JPEG")
    found = everything(val)
    assert f"{W[0]}/q" in found.ids
    with pytest.raises(FileNotFoundError):
        found.checksum()


@pytest.mark.parametrize("name", ["a b  c", "x\ny", "x\ry", "\N{PILE OF POO}", os.fsdecode(b"\xff\xfe"), "a,\"b'"])
def test_any_file_name_has_an_id_that_can_be_stored(val: Path, tmp_path: Path, name: str) -> None:
    os.rename(val / W[1] / "a.JPEG", val / W[1] / f"{name}.JPEG")
    found = everything(val)
    assert len(set(found.ids)) == 6 and all(file.is_file() for file in found.inputs)
    write_csv(tmp_path / "predictions.csv", [{"id": name} for name in found.ids])
    assert pd.read_csv(tmp_path / "predictions.csv", dtype=str)["id"].tolist() == found.ids
    json.dumps(found.ids).encode()
    if name.isprintable():
        assert f"{W[1]}/{name}" in found.ids


def upper_case(val: Path) -> None:
    os.rename(val / W[0], val / W[0].upper())


def number(val: Path) -> None:
    os.rename(val / W[0], val / "0")


def flat(val: Path) -> None:
    for wnid in W[:3]:
        os.rename(val / wnid / "a.JPEG", val / f"{wnid}.JPEG")
        shutil.rmtree(val / wnid)


def deeper(val: Path) -> None:
    for wnid in W[:3]:
        os.rename(val / wnid, val / "images")
        (val / wnid).mkdir()
        os.rename(val / "images", val / wnid / "images")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (upper_case, rf"val/{W[0].upper()} is not a WordNet id"),
        (number, "val/0 is not a WordNet id"),
        (flat, r"no photo .*in val/<wnid>/; left out: 3 \.jpeg \(such as "),
        (deeper, rf"no photo .*; left out: 6 folders \(such as {W[0]}/\)"),
    ],
)
def test_trees_that_would_give_wrong_numbers_are_refused(val: Path, change, said: str) -> None:
    change(val)
    with pytest.raises(UserError, match=rf"^dataset\.root=.*{said}") as caught:
        tree(val)
    assert "\n" not in str(caught.value)
