"""What a result says about where it comes from."""

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

import bayesq
from bayesq.suite import provenance
from bayesq.suite.models.checkpoint import checkpoint_sha256

ROOT = Path(__file__).parents[2]


def test_versions_are_those_that_are_installed() -> None:
    found = provenance.versions()
    assert found["bayesq"] == bayesq.__version__ and found["python"] == platform.python_version()
    assert {name: found[name] for name in ("torch", "numba", "pillow")} == {
        name: metadata.version(name) for name in ("torch", "numba", "pillow")
    }


def test_the_host_says_what_sums_depend_on_and_where_paths_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = provenance.host(torch.device("cpu"))
    assert (found["device"], found["directory"]) == ("cpu", str(tmp_path))
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_that_of_the_checkout() -> None:
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert provenance.git_state()["commit"] == head


def test_the_diff_is_of_the_tracked_files_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "bayesq" / "__init__.py"
    code.parent.mkdir()
    monkeypatch.setattr(bayesq, "__file__", str(code))
    provenance.git_diff.cache_clear()
    try:
        assert provenance.git_diff() is None
        provenance.git_diff.cache_clear()
        code.write_text("bits = 3\n")
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        for command in (("init",), ("add", "."), (*who, "commit", "-m", "code")):
            subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
        code.write_text("bits = 4\n")
        diff = provenance.git_diff()
        assert diff is not None and b"-bits = 3\n+bits = 4\n" in diff
    finally:
        provenance.git_diff.cache_clear()


def test_a_folder_outside_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bayesq, "__file__", str(tmp_path / "bayesq" / "__init__.py"))
    provenance.git_state.cache_clear()
    try:
        assert provenance.git_state() == {"commit": None, "dirty": None}
    finally:
        provenance.git_state.cache_clear()


def test_checkpoints_are_known_by_their_files(tmp_path: Path) -> None:
    contents = {"b.safetensors": b"2", "a.safetensors": b"1", "config.json": b"{}"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))
    assert checkpoint_sha256(tmp_path / "b.safetensors") == two
    assert checkpoint_sha256(tmp_path) == f"{one}, {two}"
