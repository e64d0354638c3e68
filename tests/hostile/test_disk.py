"""Disks that are full or read-only: one line that names the folder's key, nothing half written, and then it works."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import Program

COMMAND = (
    *("model=resnet", "dataset=digits", "method=gptq", "inputs=full", "bits=3", "model.epochs=1"),
    *("dataset.limit=50", "calibration.examples=16", "wandb.mode=disabled"),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    started = Program(tmp_path_factory.mktemp("disk"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def cache(program: Program) -> Path:
    """A cache that a finished run has filled, with the size of its files."""
    code, output = program.run([*COMMAND, "results_dir=first", "cache_dir=cache"], "first.txt")
    assert code == 0, output
    return program.folder / "cache"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mount of its own, which `mount -o remount` changes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root may mount a file system, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def errors(output: str) -> list[str]:
    assert "Traceback" not in output and "Logging error" not in output, output
    return [line for line in output.splitlines() if line.startswith("error:")]


def check_refused(code: int, output: str, key: str, folder: Path | str) -> None:
    found = errors(output)
    assert code == 1 and len(found) == 1, output
    assert found[0].startswith(f"error: {key}={folder}: "), found
    assert re.search(r"No space left|Read-only|File too large|are free", found[0])
    remedies = "free space there, or choose another|needs a folder that can be|choose \\w+ with more space"
    assert re.search(remedies, found[0]), found


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name == "result.json" or path.suffix == ".tmp"]


# where the disk is full: Hydra's first file, the packed file, the tables, the result
@pytest.mark.parametrize("kilobytes", [4, 24, 64, 80])
def test_full_results(program: Program, cache: Path, disk: Path, kilobytes: int) -> None:
    remount(disk, f"size={kilobytes}k")
    command = [*COMMAND, f"results_dir={disk}/results", "cache_dir=cache"]
    check_refused(*program.run(command, f"results{kilobytes}.txt"), "results_dir", f"{disk}/results")
    assert half_written(disk) == []
    remount(disk, "size=4m")
    code, output = program.run(command, f"room{kilobytes}.txt")
    assert code == 0 and errors(output) == [], output
    (result,) = disk.glob("results/*/result.json")
    assert json.loads(result.read_text())["status"] == "finished"
    assert not (result.parent / "status.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.95])
def test_full_cache(program: Program, cache: Path, disk: Path, share: float) -> None:
    size = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    remount(disk, f"size={max(int(share * size) // 1024, 8)}k")
    command = [*COMMAND, f"results_dir=cached{share}", f"cache_dir={disk}"]
    check_refused(*program.run(command, f"cache{share}.txt"), "cache_dir", disk)
    assert half_written(disk) == [] == half_written(program.folder / f"cached{share}")
    remount(disk, "size=8m")
    code, output = program.run(command, f"cacheroom{share}.txt")
    assert code == 0 and errors(output) == [] and "computing it again" not in output, output


@pytest.mark.parametrize("key", ["results_dir", "cache_dir"])
def test_read_only(program: Program, cache: Path, disk: Path, key: str) -> None:
    remount(disk, "ro")
    folders = {"results_dir": "writable", "cache_dir": "cache", key: f"{disk}/folder"}
    command = [*COMMAND, *(f"{name}={folder}" for name, folder in folders.items())]
    check_refused(*program.run(command, f"ro-{key}.txt"), key, f"{disk}/folder")
    remount(disk, "rw")
    if key == "results_dir":
        assert program.run(command, f"rw-{key}.txt")[0] == 0


# every file that a run writes is larger than one of these limits
@pytest.mark.parametrize("largest", [1000, 20_000])
def test_files_that_may_not_grow(program: Program, cache: Path, largest: int) -> None:
    """What a quota does, for those who may not mount anything."""
    command = [*COMMAND, f"results_dir=limited{largest}", "cache_dir=cache"]
    check_refused(*program.run(command, f"limited{largest}.txt", largest), "results_dir", f"limited{largest}")
    assert half_written(program.folder / f"limited{largest}") == []
    assert program.run(command, f"unlimited{largest}.txt")[0] == 0


def test_a_full_disk_ends_no_sweep_before_its_other_runs(program: Program, cache: Path, disk: Path) -> None:
    remount(disk, "size=100k")
    command = ["-m", *COMMAND, "seed=0,1", f"results_dir={disk}/results", "cache_dir=cache"]
    code, output = program.run(command, "sweep.txt")
    assert code == 1 and "Traceback" not in output and "Logging error" not in output, output
    assert all(f"results_dir={disk}/results" in line for line in errors(output))
    remount(disk, "size=4m")
    assert program.run(command, "sweep-room.txt")[0] == 0
    assert len(list(disk.glob("results/*/result.json"))) == 2
