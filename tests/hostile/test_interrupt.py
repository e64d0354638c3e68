"""SIGINT and SIGTERM in every stage: a clean stop, one line, W&B closed, and the same command then completes."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from program import Program

COMMAND = (
    *("model=resnet", "dataset=digits", "model.epochs=1", "method=gptq", "inputs=full"),
    *("calibration.batch_size=1", "evaluation.batch_size=1"),  # slow enough to be met in the middle
)
CODES = {"interrupted": (signal.SIGINT, 130), "terminated": (signal.SIGTERM, 143)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    started = Program(tmp_path_factory.mktemp("interrupt"))
    code, output = started.run(
        [*COMMAND, "bits=3", "results_dir=first", "cache_dir=cache", "dataset.limit=5", "wandb.mode=disabled"],
        "first.txt",
    )
    assert code == 0, output
    yield started
    started.close()


def calibrating(results: Path, cache: Path) -> bool:
    """The lock of a statistic is held and there is no file yet: well over a hundred passes are ahead."""
    return any(cache.glob("statistics/*/input_moment.safetensors.lock"))


def quantizing(results: Path, cache: Path) -> bool:
    return any(cache.glob("statistics/*/input_moment.safetensors"))


def evaluating(results: Path, cache: Path) -> bool:
    return len(list(results.glob("*/quantized.safetensors"))) > len(list(results.glob("*/result.json")))


STAGES: dict[str, Callable[[Path, Path], bool]] = {
    "calibrate": calibrating,
    "quantize": quantizing,
    "evaluate": evaluating,
}


def stop(program: Program, name: str, arguments: list[str], stage: str, number: int) -> tuple[int, str, Path]:
    """Begin a command, send a signal to its processes when the stage is met, and wait; code, output, results folder."""
    results, cache = program.folder / name, program.folder / f"{name}-cache"
    cache.mkdir()
    shutil.copytree(program.folder / "cache" / "models", cache / "models")
    process = program.begin([*arguments, f"results_dir={name}", f"cache_dir={name}-cache"], f"{name}.txt")
    deadline = time.monotonic() + 300
    while not STAGES[stage](results, cache):
        assert time.monotonic() < deadline, (program.folder / f"{name}.txt").read_text()
        time.sleep(0.002)
    os.killpg(process, number)  # as a terminal does
    return program.wait(process), (program.folder / f"{name}.txt").read_text(), results


def wandb_runs(results: Path) -> list[dict]:
    """Every W&B run below a folder, as the client's own reader finds it."""
    found = []
    for file in results.glob("wandb/offline-run-*/*.wandb"):
        command = ["wandb", "leet", "inspect", "--summary", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found.append(json.loads(done.stdout))
    return found


def check_stopped(code: int, output: str, word: str, results: Path, finished: int = 0) -> None:
    assert code == CODES[word][1], output
    assert output.count(f"{word}: the same command continues with what is not finished\n") == 1
    assert "Traceback" not in output and "error:" not in output, output
    assert len(list(results.glob("*/result.json"))) == finished
    assert not list(results.parent.glob(f"{results.name}*/**/*.tmp"))


@pytest.mark.parametrize(("stage", "word"), [("calibrate", "interrupted"), ("evaluate", "terminated")])
def test_a_run_stops_cleanly_and_completes_afterwards(program: Program, stage: str, word: str) -> None:
    arguments = [*COMMAND, "bits=3", "calibration.examples=200"]
    code, output, results = stop(program, f"one-{stage}", arguments, stage, CODES[word][0])
    check_stopped(code, output, word, results)
    (run,) = wandb_runs(results)
    assert run["config"]["method"] and "q/accuracy" not in json.dumps(run)
    again = [*arguments, "wandb.mode=disabled", f"results_dir={results.name}", f"cache_dir={results.name}-cache"]
    assert program.run(again, f"one-{stage}-again.txt")[0] == 0
    assert len(list(results.glob("*/result.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "word"), [("quantize", "interrupted"), ("evaluate", "interrupted"), ("calibrate", "terminated")]
)
def test_other_stages_stop_as_cleanly(program: Program, stage: str, word: str) -> None:
    name = f"slow-{stage}-{word}"
    arguments = [*COMMAND, "bits=3", "calibration.examples=100", "wandb.mode=disabled"]
    code, output, results = stop(program, name, arguments, stage, CODES[word][0])
    check_stopped(code, output, word, results)
    again = [*arguments, f"results_dir={name}", f"cache_dir={name}-cache"]
    assert program.run(again, f"{name}-again.txt")[0] == 0


def test_a_signal_ends_the_whole_sweep_and_keeps_what_is_finished(program: Program) -> None:
    arguments = ["-m", *COMMAND, "bits=3,4,5", "calibration.examples=16", "dataset.limit=100", "wandb.mode=disabled"]
    name = "sweep"
    STAGES["second"] = lambda results, cache: any(results.glob("*/result.json")) and evaluating(results, cache)
    code, output, results = stop(program, name, arguments, "second", signal.SIGINT)
    check_stopped(code, output, "interrupted", results, finished=1)
    code, output = program.run([*arguments, f"results_dir={name}", f"cache_dir={name}-cache"], "sweep-again.txt")
    assert code == 0 and output.count("skipped (finished)") == 1
    assert len(list(results.glob("*/result.json"))) == 3


@pytest.mark.slow
def test_signals_at_any_moment_end_cleanly(program: Program) -> None:
    """Libraries call back into Python at many places, and what they make of an interruption there differs."""
    moments, met = random.Random(0), Counter[int]()
    for k in range(30):
        name = f"any-{k}"
        shutil.copytree(program.folder / "cache" / "models", program.folder / f"{name}-cache" / "models")
        many = ["-m"] if k % 3 == 0 else []
        bits = "bits=3,4" if many else "bits=3"
        arguments = [*many, *COMMAND, bits, "calibration.examples=32", "dataset.limit=64", "wandb.mode=disabled"]
        process = program.begin([*arguments, f"results_dir={name}", f"cache_dir={name}-cache"], f"{name}.txt")
        time.sleep(moments.uniform(0.2, 2.5))
        word = moments.choice(list(CODES))
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process, CODES[word][0])
        code, output = program.wait(process), (program.folder / f"{name}.txt").read_text()
        # Once the table is printed there is nothing left to end cleanly, and a signal has its usual effect.
        allowed = {0, CODES[word][1]} | ({-CODES[word][0]} if "full precision" in output else set())
        assert code in allowed, output
        assert "error" not in output and "failed" not in output, output
        met[code] += 1
    assert met[130] and met[143], met
