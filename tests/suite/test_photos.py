"""Photos by the million: seeded subsets, parquet files read row by row, decoding in bounded memory."""

import io
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from bayesq.batches import EncodedExamples
from bayesq.suite.datasets import parquet_photos
from bayesq.suite.datasets.base import Examples, Photo, stratified
from bayesq.suite.datasets.cifar10 import CLASSES
from bayesq.suite.datasets.imagenet import ImageNet, wnids
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.errors import UserError
from bayesq.suite.models import photos
from bayesq.suite.models.photos import EncodedPhotos, PhotoEncoder, StreamedPhotos, prefetched


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------ seeded subsets


def naive_places(counts: list[int], size: int) -> tuple[list[int], int]:
    """Whole places of every class, and how many more there are to give."""
    whole = [size * count // sum(counts) for count in counts]
    return whole, size - sum(whole)


class TestStratified:
    counts = (40, 3, 17, 1, 9)

    @pytest.fixture
    def labels(self) -> torch.Tensor:
        labels = torch.repeat_interleave(torch.tensor([7, 2, 900, 4, 5]), torch.tensor(self.counts))
        return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]

    @pytest.mark.parametrize("size", [1, 5, 23, 69, 70])
    def test_every_class_keeps_its_share_up_to_one_place(self, labels: torch.Tensor, size: int) -> None:
        chosen = stratified(labels, size, 0)
        assert len(chosen) == size == len(set(chosen.tolist()))
        assert chosen.tolist() == sorted(chosen.tolist())
        found = [int((labels[chosen] == label).sum()) for label in (7, 2, 900, 4, 5)]
        whole, left = naive_places(list(self.counts), size)
        extra = [a - b for a, b in zip(found, whole, strict=True)]
        assert set(extra) <= {0, 1} and sum(extra) == left
        # the largest remainders are served first
        remainder = [size * count % sum(self.counts) for count in self.counts]
        served = [r for r, e in zip(remainder, extra, strict=True) if e]
        waiting = [r for r, e in zip(remainder, extra, strict=True) if not e]
        assert not served or not waiting or min(served) >= max(waiting)

    def test_the_seed_draws_members_and_breaks_ties(self, labels: torch.Tensor) -> None:
        assert stratified(labels, 30, 0).tolist() == stratified(labels, 30, 0).tolist()
        assert stratified(labels, 30, 0).tolist() != stratified(labels, 30, 1).tolist()
        balanced = torch.arange(100).repeat_interleave(3)
        first, second = (set(balanced[stratified(balanced, 20, seed)].tolist()) for seed in (0, 1))
        assert len(first) == len(second) == 20 and first != second and max(first) > 50

    def test_regression_labels_are_drawn_plainly(self) -> None:
        chosen = stratified(torch.linspace(0, 5, 50), 12, 3)
        assert len(set(chosen.tolist())) == 12 and chosen.tolist() == sorted(chosen.tolist())

    def test_the_global_generator_is_left_alone(self, labels: torch.Tensor) -> None:
        before = torch.get_rng_state()
        stratified(labels, 10, 0)
        assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------- parquet


def jpeg(shade: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(file: Path, labels: list[int | None], first: int = 0, group: int = 2) -> Path:
    """A parquet file whose photo of row r is grey of shade first + r."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": jpeg(first + row), "path": f"{row}.JPEG"} for row in range(len(labels))]
    pq.write_table(pa.table({"image": rows, "label": labels}), file, row_group_size=group)
    return file


def imagenet(root: Path, **changes: object) -> ImageNet:
    arguments = {"root": str(root), "split_seed": 0, "calibration_pool": 3, "seed": 0} | changes
    return ImageNet(**arguments)  # type: ignore[arg-type]


def shades(examples: Examples) -> list[int]:
    """Shade of every photo, which tells what row it is."""
    return [Image.open(io.BytesIO(photo.read_bytes())).getpixel((0, 0))[0] for photo in examples.inputs]


class TestParquetPhotos:
    def test_rows_of_several_files_and_row_groups(self, tmp_path: Path) -> None:
        files = [write(tmp_path / "a.parquet", [5, 1, 2, 3, 4]), write(tmp_path / "b.parquet", [9, 8, 7], first=50)]
        whole = ParquetPhotos(files, "dataset.root=x", CLASSES)
        assert whole.labels.tolist() == [5, 1, 2, 3, 4, 9, 8, 7] and len(whole) == 8
        examples = whole.select(torch.tensor([7, 0, 4, 5, 3]))
        assert examples.labels.tolist() == [7, 5, 4, 9, 3]
        assert examples.ids == ["b.parquet/2", "a.parquet/0", "a.parquet/4", "b.parquet/0", "a.parquet/3"]
        assert shades(examples) == [52, 0, 4, 50, 3]
        assert all(isinstance(photo, Photo) for photo in examples.inputs)
        assert [str(photo) for photo in sorted(examples.inputs)][-1] == f"row 2 of {files[1]}"

    def test_few_row_groups_stay_in_memory(self, tmp_path: Path) -> None:
        whole = ParquetPhotos([write(tmp_path / "a.parquet", list(range(9)))], "dataset.root=x", CLASSES)
        shades(whole.select(torch.arange(9)))
        assert whole._group.cache_info().currsize == parquet_photos.CACHED_GROUPS

    def test_threads_get_their_own_rows(self, tmp_path: Path) -> None:
        whole = ParquetPhotos([write(tmp_path / "a.parquet", [0] * 40)], "dataset.root=x", CLASSES)
        examples = whole.select(torch.arange(40))
        found: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: shades(examples.select(torch.arange(n, 40, 4)))}))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {n: list(range(n, 40, 4)) for n in range(4)}

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (b"text", r"a\.parquet is not parquet"),
            ({"img": [1], "label": [1]}, "has no column image with the encoded photo under bytes"),
            ({"image": ["x"], "label": [1]}, "has no column image with the encoded photo under bytes"),
            ({"image": [{"bytes": b"x"}]}, "has no column label of whole numbers"),
            ({"image": [{"bytes": b"x"}], "label": ["cat"]}, "has no column label of whole numbers"),
            ({"image": [{"bytes": b"x"}] * 2, "label": [1, None]}, "has 2 photos, but 1 have no label"),
            ({"image": [{"bytes": b"x"}] * 2, "label": [1, 10]}, "must hold labels from 0 to 9, and has 10"),
            ({"image": [{"bytes": b"x"}] * 2, "label": [-1, 1]}, "must hold labels from 0 to 9, and has -1"),
        ],
        ids=["text", "no image", "no bytes", "no label", "names", "missing label", "too large", "unlabelled"],
    )
    def test_other_files_are_refused(self, tmp_path: Path, table: object, message: str) -> None:
        file = tmp_path / "a.parquet"
        if isinstance(table, bytes):
            file.write_bytes(table)
        else:
            pq.write_table(pa.table(table), file)
        with pytest.raises(UserError, match=rf"^dataset\.root=x: .*{message}") as caught:
            ParquetPhotos([file], "dataset.root=x", CLASSES)
        assert str(file) in one_line(caught)

    def test_one_huge_row_group_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parquet_photos, "LARGEST_GROUP_BYTES", 1000)
        with pytest.raises(UserError, match="write it again with row_group_size=100"):
            ParquetPhotos([write(tmp_path / "a.parquet", [1] * 30, group=30)], "dataset.root=x", CLASSES)


class TestImageNetFromParquet:
    @pytest.mark.parametrize("folder", ["data", "."])
    @pytest.mark.parametrize("val", ["validation-0000{}-of-00002", "val{}"])
    def test_train_and_validation_files(self, tmp_path: Path, folder: str, val: str) -> None:
        write(tmp_path / folder / "train-00000-of-00001.parquet", [3, 4, 5, 6], first=100)
        write(tmp_path / folder / "test-00000-of-00001.parquet", [-1, -1])
        for number in range(2):
            write(tmp_path / folder / f"{val.format(number)}.parquet", [7, 8, 999], first=10 * number)
        data = imagenet(tmp_path).load(tmp_path)
        assert shades(data.evaluation) == [0, 1, 2, 10, 11, 12]  # from the beginning of a file to its end
        assert data.evaluation.labels.tolist() == [7, 8, 999] * 2 and data.num_classes == 1000
        assert len(data.calibration_pool) == 3 and min(shades(data.calibration_pool)) >= 100
        assert data.source["calibration_from"] == "train" and len(data.train) == 0

    def test_other_names_are_evaluation_photos_and_calibration_takes_its_share(self, tmp_path: Path) -> None:
        write(tmp_path / "some.parquet", list(range(8)))
        first, second = (imagenet(tmp_path, seed=seed).load(tmp_path) for seed in (0, 1))
        for data in (first, second):
            assert sorted(shades(data.evaluation) + shades(data.calibration_pool)) == list(range(8))
            assert data.source["calibration_from"] == "val"
        assert shades(first.calibration_pool) != shades(second.calibration_pool)

    def test_a_limit_is_stratified(self, tmp_path: Path) -> None:
        write(tmp_path / "train.parquet", [0] * 4)
        write(tmp_path / "val.parquet", [1] * 10 + [2] * 20)
        assert sorted(imagenet(tmp_path, limit=3).load(tmp_path).evaluation.labels.tolist()) == [1, 2, 2]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], r"there is no folder .*val of val/<wnid>/<photo>, and there are no parquet files"),
            (["train.parquet"], r"no photo in val\*\.parquet"),
        ],
    )
    def test_no_validation_photos(self, tmp_path: Path, files: list[str], message: str) -> None:
        for name in files:
            write(tmp_path / name, [1, 2])
        with pytest.raises(UserError, match=rf"^dataset\.root=.*{message}") as caught:
            imagenet(tmp_path).load(tmp_path)
        one_line(caught)

    @pytest.mark.parametrize("changes", [{"root": None}, {"hub": "a/b"}])
    def test_either_root_or_hub(self, tmp_path: Path, changes: dict[str, object]) -> None:
        arguments = {"root": str(tmp_path), "split_seed": 0, "calibration_pool": 3, "seed": 0} | changes
        with pytest.raises(UserError, match=r"either dataset\.root=DIR or dataset\.hub=REPOSITORY"):
            ImageNet(**arguments)  # type: ignore[arg-type]


def test_a_limit_on_a_tree_keeps_every_class_s_share_and_the_order(tmp_path: Path) -> None:
    for number, count in ((2, 4), (500, 8), (999, 12)):
        folder = tmp_path / "val" / wnids()[number]
        folder.mkdir(parents=True)
        for row in range(count):
            (folder / f"{row}.jpg").touch()
    (tmp_path / "train").symlink_to(tmp_path / "val")
    whole = imagenet(tmp_path).load(tmp_path).evaluation
    part = imagenet(tmp_path, limit=6).load(tmp_path).evaluation
    assert [label for label in (2, 500, 999) for _ in range(part.labels.tolist().count(label))] == [2] + [500] * 2 + [
        999
    ] * 3
    assert part.ids == [name for name in whole.ids if name in part.ids]


# ------------------------------------------------------------------------------------------------------------ decoding


def encoder(size: int = 4) -> PhotoEncoder:
    module = nn.Identity()
    module.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, size, size),
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.25, 0.2),
    }
    return PhotoEncoder("net", module)


def pictures(folder: Path, count: int) -> Examples:
    files = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{97 * i % count}.png")
        files.append(folder / f"{97 * i % count}.png")
    return Examples(files, torch.arange(count), [str(i) for i in range(count)])


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EncodedExamples, EncodedExamples]:
    """The same photos in memory and streamed."""
    examples = pictures(tmp_path, 23)
    kept = encoder()(examples)
    monkeypatch.setattr(photos, "DECODED_BYTES", 23 * 3 * 4 * 4 - 1)
    streamed = encoder()(examples)
    assert isinstance(kept, EncodedPhotos) and isinstance(streamed, StreamedPhotos)
    return kept, streamed


class TestStreaming:
    @pytest.mark.parametrize("batch_size", [1, 8, 23, 100])
    def test_batches_are_those_of_photos_in_memory(
        self, both: tuple[EncodedExamples, EncodedExamples], batch_size: int
    ) -> None:
        kept, streamed = both
        assert len(streamed) == 23
        for _ in range(2):  # as often as one likes
            for a, b in zip(kept.batches(batch_size, "cpu"), streamed.batches(batch_size, "cpu"), strict=True):
                assert torch.equal(a.inputs["x"], b.inputs["x"])
                assert torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)

    def test_decoding_runs_ahead_by_a_batch_and_no_more(self) -> None:
        before, begun = threading.active_count(), []

        def decode(photo: int) -> torch.Tensor:
            begun.append(photo)
            return torch.tensor(photo)

        found = prefetched(range(100), decode, 8)  # type: ignore[arg-type]
        assert [int(next(found)) for _ in range(5)] == [0, 1, 2, 3, 4]
        found.close()  # type: ignore[attr-defined]
        assert 5 <= len(begun) <= 5 + 8
        assert threading.active_count() == before
        assert [int(x) for x in prefetched(range(100), decode, 8)] == list(range(100))  # type: ignore[arg-type]
        assert threading.active_count() == before

    def test_checksum_reads_the_photos_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photos, "DECODED_BYTES", 0)
        streamed = encoder()(pictures(tmp_path, 3))
        first = streamed.checksum()
        for file in tmp_path.rglob("*.png"):
            file.unlink()
        assert streamed.checksum() == first

    def test_checksum_decodes_nothing_and_sees_content_labels_and_preprocessing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(photos, "DECODED_BYTES", 0)
        examples = pictures(tmp_path, 3)
        before = encoder()(examples)
        monkeypatch.setattr(PhotoEncoder, "_pixels", None)
        found = {before.checksum(), encoder()(examples).checksum()}
        assert len(found) == 1
        found.add(encoder(5)(examples).checksum())
        found.add(encoder()(Examples(examples.inputs, torch.tensor([0, 1, 1]), examples.ids)).checksum())
        found.add(encoder()(examples.select(torch.tensor([1, 0, 2]))).checksum())
        Image.new("RGB", (9, 9)).save(examples.inputs[2])
        found.add(encoder()(examples).checksum())
        assert len(found) == 5

    def test_a_damaged_photo_is_named_when_its_batch_comes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(photos, "DECODED_BYTES", 0)
        examples = pictures(tmp_path, 12)
        damaged = examples.inputs[9]
        damaged.write_bytes(damaged.read_bytes()[:60])
        batches = encoder()(examples).batches(4, "cpu")
        assert len(next(batches).labels) == 4
        with pytest.raises(
            UserError, match=rf"^{re.escape(str(damaged))} is not a readable photo \(.+\): replace or "
        ) as caught:
            list(batches)
        one_line(caught)

    @pytest.mark.parametrize("limit", [0, 2**30], ids=["streamed", "in memory"])
    def test_a_photo_missing_from_a_parquet_row_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
    ) -> None:
        monkeypatch.setattr(photos, "DECODED_BYTES", limit)
        table = pa.table({"image": [{"bytes": jpeg(3)}, {"bytes": None}], "label": [0, 1]})
        pq.write_table(table, tmp_path / "val.parquet")
        examples = ParquetPhotos([tmp_path / "val.parquet"], "dataset.root=x", CLASSES).select(torch.arange(2))
        with pytest.raises(UserError, match=r"^row 1 of .*val\.parquet is not a readable photo \(.*no bytes"):
            list(encoder()(examples).batches(2, "cpu"))

    def test_photos_in_memory_keep_the_order_of_the_examples(self, tmp_path: Path) -> None:
        files = [write(tmp_path / "a.parquet", [0] * 6), write(tmp_path / "b.parquet", [1] * 6, first=100)]
        whole = ParquetPhotos(files, "dataset.root=x", CLASSES)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        encoded = encoder()(whole.select(order))
        assert isinstance(encoded, EncodedPhotos)
        shade = [row if row < 6 else 100 + row - 6 for row in order.tolist()]
        assert encoded.pixels[:, 0, 0, 0].tolist() == shade


def test_examples_of_stored_photos_hash_their_content(tmp_path: Path) -> None:
    def checksum(first: int) -> str:
        whole = ParquetPhotos([write(tmp_path / "a.parquet", [0, 1], first)], "dataset.root=x", CLASSES)
        return whole.select(torch.arange(2)).checksum()

    assert checksum(3) == checksum(3) != checksum(4)
