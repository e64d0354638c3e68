"""A sweep that is killed at random moments and started again each time, beside the same sweep left alone.

python tests/suite/kill_sweep.py        60 runs on the digits, 10 kills; `--help` for smaller ones

Ends with exit code 0 if both sweeps have the same results, no finished run was run again, no statistics were computed
twice, and no half-written file is left.
"""

import argparse
import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKLOAD = ("model=resnet", "dataset=digits")
SIXTY_RUNS = ("ablation=full,codebook_lloyd,gptq,gptq_knapsack,rounding_nearest", "bits=2,3,3.5,4", "seed=0,1,2")
# what Hydra says when the first run is about to begin; a kill before that tests nothing
LAUNCHING = b"Launching "
COMMAND_TIMEOUT_S = 3600


@dataclass
class Outcome:
    """What happened to the killed sweep.

    Attributes:
        undisturbed_s: duration of the sweep that was left alone, from its first run on.
        disturbed_s: of all attempts of the other one together, from their start on.
        finished_at_kill: how many runs had a result after each kill.
        runs: results in the end.
        complaints: all that is not as it should be.
    """

    undisturbed_s: float = 0.0
    disturbed_s: float = 0.0
    finished_at_kill: list[int] = field(default_factory=list)
    runs: int = 0
    complaints: list[str] = field(default_factory=list)


def start(sweep: Sequence[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """The sweep as a process of its own, about to begin its first run, with results and caches below `folder`."""
    command = [sys.executable, str(ROOT / "run.py"), "-m", *WORKLOAD, *sweep]
    command += [f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}"]
    # every attempt has a W&B service of its own, as when typed in a shell
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    while process.poll() is None and LAUNCHING not in log.read_bytes():
        time.sleep(0.02)
    return process


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of all that must be made once: cached tensors, and the codes of each run that has a result.

    The result itself is written again when W&B has it.
    """
    files = {file: file for file in folder.glob("cache/**/*.safetensors")}
    files |= {result: result.with_name("quantized.safetensors") for result in folder.glob("results/*/result.json")}
    found = {str(name.relative_to(folder)): file.stat() for name, file in files.items()}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


def content(run: Path) -> dict[str, Any]:
    """All that a run found out; nothing about when, where and how fast, nor about W&B."""
    result = json.loads((run / "result.json").read_text())
    kept = {key: value for key, value in result.items() if not key.startswith(("time/", "memory/", "wandb/"))}
    kept["config"] = {k: v for k, v in result["config"].items() if k not in ("results_dir", "cache_dir")}
    kept["host"] = {k: v for k, v in result["host"].items() if k != "directory"}
    with (run / "layers.csv").open(newline="") as file:
        kept["layers.csv"] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    kept["predictions.csv"] = (run / "predictions.csv").read_text()
    kept["codes"] = (run / "quantized.safetensors").read_bytes()
    return kept


def compare(sweep: Sequence[str], kills: int, seed: int, folder: Path) -> Outcome:
    """Run the sweep undisturbed, then once more with `kills` SIGKILLs at moments that `seed` draws.

    A moment is a number of finished runs and a time after that, up to the mean duration of a run.
    """
    outcome, moments = Outcome(), random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    for place in (alone, killed):
        place.mkdir(parents=True)
    process = start(sweep, alone, folder / "alone.log")
    begin = time.monotonic()
    if process.wait(COMMAND_TIMEOUT_S):
        outcome.complaints.append("the undisturbed sweep failed")
    outcome.undisturbed_s = time.monotonic() - begin

    begin = time.monotonic()
    seen: dict[str, tuple[int, int]] = {}
    runs = len(list(alone.glob("results/*/result.json")))
    targets = sorted(moments.randrange(math.ceil(0.9 * runs)) for _ in range(kills))
    for kill, target in enumerate(targets):
        process = start(sweep, killed, folder / f"killed{kill}.log")
        while process.poll() is None and len(list(killed.glob("results/*/result.json"))) < target:
            time.sleep(0.05)
        try:
            code = process.wait(moments.uniform(0, outcome.undisturbed_s / runs))
            outcome.complaints.append(f"ended with {code} before kill {kill + 1}")
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        now = identities(killed)
        outcome.complaints += [f"made again: {name}" for name in seen if now.get(name) != seen[name]]
        seen = now
        outcome.finished_at_kill.append(sum(name.endswith("result.json") for name in now))
    if start(sweep, killed, folder / "last.log").wait(COMMAND_TIMEOUT_S):
        outcome.complaints.append("the killed sweep failed in its last attempt")
    outcome.disturbed_s = time.monotonic() - begin

    now = identities(killed)
    outcome.complaints += [f"made again: {name}" for name in seen if now.get(name) != seen[name]]
    outcome.complaints += [f"left behind: {file}" for file in killed.rglob("*.tmp")]
    expected, found = ({run.parent.name for run in place.glob("results/*/result.json")} for place in (alone, killed))
    outcome.runs = len(found)
    outcome.complaints += [f"lost: {name}" for name in expected - found] + [
        f"extra: {name}" for name in found - expected
    ]
    for name in sorted(found):
        if (error := json.loads((killed / "results" / name / "result.json").read_text())["wandb/error"]) is not None:
            outcome.complaints.append(f"W&B lacks {name}: {error}")
    for name in sorted(expected & found):
        one, other = content(alone / "results" / name), content(killed / "results" / name)
        differing = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        outcome.complaints += [f"{name} differs in {', '.join(sorted(differing))}"] if differing else []
    if identities(alone).keys() != now.keys():
        outcome.complaints.append(f"other files: {sorted(identities(alone).keys() ^ now.keys())}")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="*", default=SIXTY_RUNS, help=f"overrides (default: {' '.join(SIXTY_RUNS)})")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        outcome = compare(arguments.sweep, arguments.kills, arguments.seed, folder)
    finished = outcome.finished_at_kill
    print(
        f"undisturbed {outcome.undisturbed_s:.0f} s, killed {len(finished)} times {outcome.disturbed_s:.0f} s;", end=" "
    )
    print(f"{finished} runs were finished by then, {outcome.runs} in the end")
    for complaint in outcome.complaints:
        print(complaint)
    sys.exit(1 if outcome.complaints else 0)


if __name__ == "__main__":
    main()
