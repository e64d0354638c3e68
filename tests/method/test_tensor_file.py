"""A file of tensors: same bits and strides, little memory, and no file that outlives its process."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayesq.scratch_file import TensorFile

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@dataclass
class Inner:
    upper: Tensor
    order: Tensor
    retries: int


@dataclass
class Outer:
    gain: Tensor
    factors: list[Inner] | None
    scale: Tensor


def value(seed: int) -> Outer:
    draw = torch.Generator().manual_seed(seed)
    upper = torch.randn(7, 5, generator=draw, dtype=torch.float64).T
    cube = torch.randn(2, 3, 4, generator=draw).permute(2, 0, 1)
    factors = [Inner(upper, torch.randperm(5, generator=draw), seed), Inner(upper[1:3], torch.empty(0, 3), 0)]
    return Outer(cube, factors, torch.tensor(0.5))


def tensors(outer: Outer) -> list[Tensor]:
    return [outer.gain, outer.scale, *(x for inner in outer.factors for x in (inner.upper, inner.order))]


def test_values_come_back_with_their_bits_and_strides(tmp_path):
    file = TensorFile(tmp_path)
    written = [file.write(value(seed)) for seed in range(3)]
    for seed in range(3):
        found, expected = file.read(written[seed]), value(seed)
        assert [inner.retries for inner in found.factors] == [seed, 0]
        for got, wanted in zip(tensors(found), tensors(expected), strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)
            assert got.is_contiguous() == wanted.is_contiguous()
            assert got.data_ptr() % 64 == 0
    first, expected = file.read(written[0]), value(0)
    assert first.gain.stride() == expected.gain.stride()
    assert first.factors[0].upper.stride() == expected.factors[0].upper.stride()


def test_what_a_reader_changes_no_other_reader_sees(tmp_path):
    file = TensorFile(tmp_path)
    written = file.write(value(0))
    file.read(written).gain.zero_()
    assert torch.equal(file.read(written).gain, value(0).gain)


def test_a_value_without_factors(tmp_path):
    file = TensorFile(tmp_path)
    assert file.read(file.write(Outer(torch.ones(2), None, torch.zeros(1)))).factors is None


def test_the_folder_stays_empty_and_what_was_read_outlives_the_file(tmp_path):
    file = TensorFile(tmp_path)
    written = file.write(value(0))
    assert os.listdir(tmp_path) == [] and file.nbytes > 0
    read = file.read(written)
    file.close()
    assert torch.equal(read.gain, value(0).gain)


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        TensorFile(tmp_path / "absent")


@linux
def test_a_full_disk_is_an_os_error_once(tmp_path):
    code = """
        import resource, sys, torch
        from pathlib import Path
        from bayesq.scratch_file import TensorFile

        file = TensorFile(Path(sys.argv[1]))
        first = file.write(torch.full((1000,), 3.0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4200, 4200))
        try:
            file.write(torch.zeros(100))  # fits the buffer, not the disk
        except OSError:
            assert bool((file.read(first) == 3).all())
            file.close()
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "refused\n" and done.returncode == 0, done.stderr


@linux
def test_a_killed_process_leaves_no_file_and_what_waits_takes_no_memory(tmp_path):
    code = """
        import os, signal, sys, torch
        from pathlib import Path
        from bayesq.scratch_file import TensorFile

        def resident():
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

        file = TensorFile(Path(sys.argv[1]))
        before = resident()
        written = [file.write(torch.full((2**22,), float(i))) for i in range(8)]
        for i in range(8):
            assert float(file.read(written[i]).sum()) == i * 2**22
        print(file.nbytes, resident() - before, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    script = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    # freed tensors go back to the system at once, so that what is resident is what is held
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | environment)
    size, grown = map(int, done.stdout.split())
    assert done.returncode == -9 and size == 8 * 2**24 and grown < 2**26
    assert list(Path(tmp_path).iterdir()) == []
