"""The same configuration gives the same bits again in a new process, and nearly the same with more threads.

Again: no tolerance. Codes, scales and metrics are compared for equality. More threads may sum in another order: a code
that was next to a boundary may change, and a few after it. Statistics come from caches of their own, so that they are
computed anew with each number of threads.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import load_results
from program import ROOT
from torch import Tensor

from bayesq.quant.feedback import feedback_factor
from bayesq.quant.packing import unpack_model
from bayesq.tensor_file import read_tensors

METHODS = ("rtn", "awq", "gptq", "bayesq")
COMMAND = (
    "-m",
    "model=resnet",
    "dataset=digits",
    "model.epochs=1",
    "bits=3",
    "wandb.mode=disabled",
    "dataset.limit=100",
)


def run(folder: Path, name: str, threads: int, cache: str, *more: str) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *COMMAND, f"method={','.join(METHODS)}", *more]
    done = subprocess.run(
        [*command, f"results_dir={name}", f"cache_dir={cache}"],
        cwd=folder,
        # threads that wait must not keep those from working for which there is no core of their own
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def contents(results: Path) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Measured numbers and every stored buffer, by method."""
    found = {}
    for file in results.glob("*/result.json"):
        result = json.loads(file.read_text())
        numbers = {key: x for key, x in result.items() if key.partition("/")[0] in ("q", "fp", "delta", "risk", "bits")}
        buffers = {name: x.clone() for name, x in read_tensors(file.parent / "quantized.safetensors")[0].items()}
        found[result["method"]] = numbers, buffers
    assert found.keys() == set(METHODS)
    return found


def check_equal(a: Path, b: Path) -> None:
    first, second = contents(a), contents(b)
    for method in METHODS:
        assert first[method][0] == second[method][0], method
        assert first[method][1].keys() == second[method][1].keys()
        differing = [name for name, x in first[method][1].items() if not torch.equal(x, second[method][1][name])]
        assert differing == [], method


def check_alike(a: Path, b: Path) -> None:
    first, second = ({result["method"]: result for result in load_results(folder)} for folder in (a, b))
    assert first.keys() == second.keys() == set(METHODS)
    for method, result in first.items():
        assert second[method]["q/kl_to_fp"] == pytest.approx(result["q/kl_to_fp"], rel=0.05), method
        one, other = (
            unpack_model(*read_tensors(folder / result["run_id"] / "quantized.safetensors")) for folder in (a, b)
        )
        equal = [other[name].codes == tensor.codes for name, tensor in one.items()]
        assert float(torch.cat([x.flatten() for x in equal]).double().mean()) > 0.99, method


@pytest.mark.slow
def test_new_processes_give_equal_bits_and_more_threads_nearly_equal_codes(tmp_path: Path) -> None:
    run(tmp_path, "one", 1, "cache1")
    shutil.copytree(tmp_path / "one", tmp_path / "before")
    run(tmp_path, "one", 1, "cache1", "force=true")
    check_equal(tmp_path / "before", tmp_path / "one")
    # Behind the prefix one code that differs would change the inputs of all later layers.
    full = ("inputs=full", "correction=none")
    run(tmp_path, "full", 1, "cache1", *full)
    shutil.copytree(tmp_path / "cache1" / "models", tmp_path / "cache3" / "models")
    run(tmp_path, "with3", 3, "cache3", *full)
    check_alike(tmp_path / "full", tmp_path / "with3")


def test_a_factorization_is_the_same_in_one_process_again() -> None:
    x = torch.randn(300, 90, generator=torch.Generator().manual_seed(0))
    moment = x.T @ x / 300
    first, second = feedback_factor(moment, 0.01), feedback_factor(moment.clone(), 0.01)
    assert torch.equal(first.upper, second.upper) and torch.equal(first.order, second.order)
