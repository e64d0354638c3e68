"""The on-disk cache: whole or absent, and never trusted when damaged."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bayesq.files import atomic_path, is_locked, lock, remove_leftovers
from bayesq.suite.config import resolve_cache_dir
from bayesq.tensor_file import CorruptFile, digest, read_tensors, verify, write_tensors

TENSORS = {
    "float": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([0.5, -1.0], dtype=torch.float16),
    "codes": torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
}
METADATA = {"seconds": "1.250", "unseen": "[]"}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "file.safetensors"
    transposed = {**TENSORS, "strided": torch.arange(6.0).reshape(2, 3).T}
    write_tensors(path, transposed, METADATA)
    tensors, metadata = read_tensors(path)
    assert metadata == METADATA == verify(path)
    assert tensors.keys() == transposed.keys()
    for name, tensor in transposed.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


def test_the_file_is_what_the_safetensors_package_reads_and_no_larger_than_its_own(tmp_path):
    tensors = {**TENSORS, "brain": torch.tensor([0.5, 3.0]).bfloat16(), "double": torch.ones(3, 1, dtype=torch.float64)}
    write_tensors(tmp_path / "ours", tensors, METADATA)
    with safe_open(tmp_path / "ours", framework="pt") as file:
        header = file.metadata()
    save_file(tensors, tmp_path / "theirs", metadata=header)
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


MEMORY_PROGRAM = """
import sys, torch
from pathlib import Path
from bayesq.tensor_file import write_tensors

def peak():  # bytes since the last reset
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

tensors = {str(i): torch.full((2**20,), float(i)) for i in range(24)}
Path("/proc/self/clear_refs").write_text("5")
before = peak()
write_tensors(Path(sys.argv[1]), tensors)
print((peak() - before) / sum(tensor.nbytes for tensor in tensors.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_takes_no_second_copy_in_memory(tmp_path):
    program = [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 0.2


def test_absent_is_not_corrupt(tmp_path):
    for read in (verify, read_tensors):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "absent.safetensors")


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.arange(3.0), "b": torch.tensor([1], dtype=torch.uint8)}, METADATA)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(CorruptFile):
            verify(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, METADATA)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"file\.safetensors"):
            read_tensors(path)
    path.write_bytes(whole)
    assert verify(path) == METADATA


def test_a_file_without_a_digest_is_not_ours(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors", metadata={"seconds": "1"})
    with pytest.raises(CorruptFile, match=r"foreign\.safetensors"):
        verify(tmp_path / "foreign.safetensors")


def test_digest_covers_names_types_shapes_values_and_metadata():
    base = digest({"a": torch.zeros(2, 3)})
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0, 0], [0, 0, 1e-30]])},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ]
    assert len({base, *map(digest, others), digest({"a": torch.zeros(2, 3)}, {"k": "v"})}) == len(others) + 2
    assert digest({"a": torch.ones(1), "b": torch.zeros(1)}) == digest({"b": torch.zeros(1), "a": torch.ones(1)})
    assert digest({"a": torch.arange(6.0).reshape(2, 3).T}) == digest({"a": torch.arange(6.0).reshape(2, 3).T.clone()})


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_cache_folder_order_of_precedence(monkeypatch, tmp_path):
    monkeypatch.delenv("BAYESQ_CACHE_DIR", raising=False)
    assert resolve_cache_dir(None) == Path(platformdirs.user_cache_dir("bayesq")).absolute()
    monkeypatch.setenv("BAYESQ_CACHE_DIR", str(tmp_path / "environment"))
    assert resolve_cache_dir(None) == tmp_path / "environment"
    assert resolve_cache_dir(str(tmp_path / "config")) == tmp_path / "config"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_cache_dir("~/cache") == tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    assert resolve_cache_dir("relative").is_absolute()


def test_the_lock_admits_one_at_a_time(tmp_path):
    path, inside, most = tmp_path / "new" / "entry", [], []

    def work() -> None:
        with lock(path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


HOLDER = """
import sys, time
from pathlib import Path
from bayesq.files import atomic_path, lock
path = Path(sys.argv[1])
with lock(path), atomic_path(path) as temporary:
    temporary.write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path/entry and is in the middle of writing it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "entry")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_sigkilled_holder_leaves_neither_a_lock_nor_half_a_file_behind(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    path = tmp_path / "entry"
    assert is_locked(path)
    assert len(list(tmp_path.glob(".entry.*.tmp"))) == 1
    holder.send_signal(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert not is_locked(path)
    assert len(list(tmp_path.glob(".entry.*.tmp"))) == 1
    begin = time.monotonic()
    with lock(path):
        assert time.monotonic() - begin < 1
        assert [file.name for file in tmp_path.iterdir()] == ["entry.lock"]


def test_who_waits_says_once_what_for(
    tmp_path: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, taken = tmp_path / "entry", threading.Event()
    caplog.set_level(logging.INFO, logger="bayesq")

    def take() -> None:
        with lock(path):
            taken.set()

    waiting = threading.Thread(target=take, daemon=True)
    waiting.start()
    assert not taken.wait(1)
    assert len(list(tmp_path.glob(".entry.*.tmp"))) == 1, "what its holder writes is left alone"
    holder.kill()
    assert taken.wait(5)
    waiting.join()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bayesq")] == [
        f"waiting for another process, which holds {path}.lock"
    ]
    caplog.clear()
    with lock(path):
        assert caplog.records == []


def test_leftovers_of_other_machines_go_when_a_day_old(tmp_path: Path) -> None:
    own, fresh, old = (tmp_path / f".entry.{host}.0123.tmp" for host in (socket.gethostname(), "elsewhere", "far"))
    other = tmp_path / f".another.{socket.gethostname()}.0123.tmp"
    for file in (own, fresh, old, other):
        file.write_text("half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    remove_leftovers(tmp_path, "entry")
    assert set(tmp_path.iterdir()) == {fresh, other}
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh}


def test_a_folder_that_takes_no_lock_file_shows_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    assert not is_locked(path)
    assert list(tmp_path.iterdir()) == [], "asking leaves nothing"


def test_tensors_are_as_readable_as_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "file.safetensors", TENSORS)
    finally:
        os.umask(before)
    assert (tmp_path / "file.safetensors").stat().st_mode & 0o777 == 0o640
