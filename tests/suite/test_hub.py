"""Files of the hub through its real client: which commit, resumed, offline; each refusal is one line of one form."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
from hub_server import HubServer, serving
from huggingface_hub import constants, errors

from bayesq.suite.errors import UserError
from bayesq.suite.hub import from_hub, hub_file, hub_files, reachable, tell_commit

MODEL, DATA = "org/network", "org/photos"
LOST = "and the files are not in its cache here"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The only hub that the client knows, and an empty cache."""
    with serving() as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")[2]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{{template}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def publish(hub: HubServer, folder: Path, mark: bytes, **more: str) -> tuple[str, str]:
    """A model and a data set whose files consist of `mark`, and their commits."""
    for name in ("weights.bin", "data/train-0.parquet", "data/train-1.parquet", "data/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + mark)
    return hub.publish(MODEL, folder, **more), hub.publish(f"datasets/{DATA}", folder, **more)


def model(revision: str | None = None, file: str = "weights.bin", name: str = MODEL) -> Path:
    return hub_file(name, file, revision, "model.name=x", "give a file")


def data(revision: str | None = None, pattern: str = "data/train-*", name: str = DATA) -> Path:
    return hub_files(name, [pattern], revision, "dataset.hub=x", "give a folder")


def test_a_commit_stays_when_its_branch_moves(hub, tmp_path, monkeypatch, caplog):
    commits = publish(hub, tmp_path / "files", b"old")
    with caplog.at_level(logging.INFO, "bayesq"):
        assert (model().name, data().name) == commits
    told = re.findall(r"(\w+\.revision)=(\w+) pins it", caplog.text)
    assert told == [("model.revision", commits[0]), ("dataset.revision", commits[1])]
    moved = publish(hub, tmp_path / "files", b"new")
    assert set(moved).isdisjoint(commits)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    for revisions, mark in ((commits, b"old"), (moved, b"new"), ((None, None), b"new")):
        one, other = model(revisions[0]), data(revisions[1])
        assert (one / "weights.bin").read_bytes() == b"weights.bin" + mark
        assert (other / "data" / "train-1.parquet").read_bytes() == b"data/train-1.parquet" + mark
    assert not hub.downloads("notes.txt")  # what is not needed is not fetched


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, tmp_path):
    content = np.random.default_rng(0).bytes(2 * constants.DOWNLOAD_CHUNK_SIZE + 1000)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights.bin").write_bytes(content)
    hub.publish(MODEL, tmp_path / "files")
    hub.cuts["weights.bin"] = constants.DOWNLOAD_CHUNK_SIZE + 5000
    assert (model() / "weights.bin").read_bytes() == content
    first, second = hub.downloads("weights.bin")
    assert (first.status, first.range) == (200, "")
    assert (second.status, second.range) == (206, f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-")


def test_what_was_fetched_is_read_without_a_connection(hub, tmp_path, monkeypatch):
    commits = publish(hub, tmp_path / "files", b"x")
    folders = model(), data()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert (model(), data()) == folders and (model(commits[0]), data(commits[1])) == folders
    for load in (lambda: model("0" * 40), lambda: data("0" * 40), lambda: model(file="more.bin")):
        with pytest.raises(UserError, match=LOST):
            load()
    assert hub.requests == []


@pytest.mark.parametrize("token", ["", "hf_stranger"])
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"name": "org/gated"}, r"it is gated: accept its terms on the hub and log in with `hf auth login`"),
        ({"name": "org/absent"}, r"there is no such repository, or none that you may read"),
        ({"revision": "v9"}, r"it has no such revision"),
        ({"revision": "0" * 40}, r"it has no such revision"),
    ],
    ids=lambda value: next(iter(value.values()))[:10] if isinstance(value, dict) else "",
)
def test_a_refusal_is_one_line(asked, reason, token, hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "files", b"x")
    for prefix in ("", "datasets/"):
        hub.publish(f"{prefix}org/gated", tmp_path / "files")
        hub.repositories[f"{prefix}org/gated"].readers = frozenset({"hf_reader"})
    monkeypatch.setenv("HF_TOKEN", token)
    for load, said in ((model, "^model.name=x"), (data, "^dataset.hub=x")):
        with pytest.raises(UserError, match=rf"{said}\b.* could not be read from the hub \({reason}\): give") as caught:
            load(**asked)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    if asked.get("name") == "org/gated":
        assert (model(**asked) / "weights.bin").is_file() and (data(**asked) / "data" / "train-0.parquet").is_file()


def test_a_file_that_a_repository_lacks(hub, tmp_path):
    publish(hub, tmp_path / "files", b"x")
    with pytest.raises(UserError, match=r"^model.name=x could .*\(it does not hold that file\): give a file$"):
        model(file="more.bin")


def caused(error: Exception) -> OSError:
    """As transformers raises it: an error of its own with the hub's as the cause."""
    try:
        raise OSError("We could not load this.\nSee the documentation") from error
    except OSError as wrapped:
        return wrapped


def answer(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # the real ones want a response
    Exception.__init__(error, "404 Client Error. (Request ID: 1)")
    return error


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.GatedRepoError, "it is gated: accept its terms on the hub and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or none that you may read"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RemoteEntryNotFoundError, "it does not hold that file"),
    ],
)
def test_what_the_hub_refuses_is_said_alike_through_every_library(kind, reason, wrapped):
    error = caused(answer(kind)) if wrapped else answer(kind)

    def load():
        raise error

    with pytest.raises(UserError) as caught:
        from_hub("model.name=a/b", "give model.checkpoint=DIR", load)
    assert str(caught.value) == f"model.name=a/b could not be read from the hub ({reason}): give model.checkpoint=DIR"


@pytest.mark.parametrize(
    ("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "it cannot be reached: no route")]
)
def test_a_hub_out_of_reach_is_not_asked(offline, reason, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.get_session", Mock(side_effect=OSError("no\nroute")))
    assert not reachable()
    said = (
        rf"^model=x could not be read from the hub \({re.escape(reason)}, and the files are not in its cache here\): y"
    )
    with pytest.raises(UserError, match=said):
        hub_file("a/absent", "weights", None, "model=x", "y")


def test_what_the_cache_lacks_without_a_hub():
    def load():
        raise OSError("a long story")

    with pytest.raises(UserError, match=r"^model=x could .*HF_HUB_OFFLINE is set, and the files are not in its cache"):
        from_hub("model=x", "y", load, online=False)
    assert from_hub("model=x", "y", lambda: 3, online=False) == 3


@pytest.mark.parametrize(
    ("asked", "commit", "said"),
    [
        (None, "a" * 40, f"at commit {'a' * 40} of main; model.revision={'a' * 40} pins it"),
        ("v1", "b" * 40, f"at commit {'b' * 40} of v1; model.revision={'b' * 40} pins it"),
        ("c" * 40, "c" * 40, ""),
        (None, "main", ""),
    ],
)
def test_a_commit_that_is_not_pinned_is_told(asked, commit, said, caplog):
    with caplog.at_level(logging.INFO, "bayesq"):
        tell_commit("model=x", asked, commit, "model.revision")
    assert (said in caplog.text) if said else not caplog.text
