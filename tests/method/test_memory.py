"""Out of memory: the same work in smaller batches, from the beginning, and counted."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayesq.memory import available_memory, halving, out_of_memory, peak_bytes, resident_bytes


def refusing(limit: int, error: Exception, seen: list[int]):
    def attempt(size: int) -> str:
        seen.append(size)
        if size > limit:
            raise error
        return f"done with {size}"

    return attempt


def cpu_error() -> RuntimeError:
    """What the CPU's allocator itself says when asked for an exabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        cpu_error(),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GiB)"),
    ],
)
def test_the_size_is_halved_until_it_fits(error, caplog):
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        assert halving(64, refusing(20, error, seen), "evaluate") == ("done with 16", 2)
    assert seen == [64, 32, 16]
    assert [record.getMessage() for record in caplog.records] == [
        "evaluate: out of memory with 64 examples at a time; again with 32",
        "evaluate: out of memory with 32 examples at a time; again with 16",
    ]


def test_what_fits_is_done_once():
    seen: list[int] = []
    assert halving(7, refusing(7, MemoryError(), seen), "x") == ("done with 7", 0)
    assert seen == [7]


def test_single_examples_that_do_not_fit_are_an_error():
    seen: list[int] = []
    with pytest.raises(MemoryError):
        halving(4, refusing(0, MemoryError(), seen), "x")
    assert seen == [4, 2, 1]


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes do not match")])
def test_other_errors_pass(error):
    seen: list[int] = []
    assert not out_of_memory(error)
    with pytest.raises(type(error)):
        halving(4, refusing(0, error, seen), "x")
    assert seen == [4]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back() -> None:
    """Small blocks between others stay with the process until it is asked to return them."""
    program = """
from pathlib import Path
from bayesq.memory import give_back_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

import torch
blocks = [torch.ones(10_000) for _ in range(3000)]  # 40 KB each, on the heap
kept = blocks[::100]
full = resident()
del blocks
freed = resident()
give_back_freed()
print((full - freed) // 2**20, (full - resident()) // 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert after >= 80, (before, after)  # of 114 MiB


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    8000 kB\n"}


def test_available_is_what_the_kernel_says(tmp_path):
    assert available_memory(tree(tmp_path, MEMINFO)) == 8000 * 1024


@pytest.mark.parametrize("inside", ["", "job/step"])
def test_a_control_group_limits_it_files_that_it_may_drop_left_aside(inside, tmp_path):
    group = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/memory.max": "max\n",
        f"sys/fs/cgroup/{inside}/memory.max": "5000000\n",
        f"sys/fs/cgroup/{inside}/memory.current": "4000000\n",
        f"sys/fs/cgroup/{inside}/memory.stat": "anon 3\ninactive_file 100000\n",
    }
    assert available_memory(tree(tmp_path, MEMINFO | group)) == 1100000


def test_the_tightest_of_nested_groups_counts_and_never_below_zero(tmp_path):
    group = {
        "proc/self/cgroup": "3:cpu:/x\n4:memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1500000",
        "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 600000\n",
    }
    root = tree(tmp_path, MEMINFO | group)
    assert available_memory(root) == 100000
    tree(tmp_path, {"sys/fs/cgroup/memory/job/memory.usage_in_bytes": "9900000"})
    assert available_memory(root) == 0


def test_a_system_that_tells_nothing_has_at_most_its_memory(tmp_path):
    found = available_memory(tmp_path)
    assert found is None or found > 2**28


def test_this_process_holds_what_it_allocates():
    before = resident_bytes()
    held = torch.ones(2**24)
    assert resident_bytes() - before > 2**25 and peak_bytes() >= resident_bytes() - 2**24
    assert held[0] == 1
