"""Caches that were damaged or swapped: recomputed, never used, and said so."""

import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import damaged, report
from finished_runs import load_results
from safetensors.torch import save_file
from torch import nn

from bayesq.batches import TensorExamples
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.passes import CalibrationSettings
from bayesq.fisher import GRADIENT_MOMENT
from bayesq.suite.calibration import Calibration
from bayesq.suite.full_precision import cached_logits
from bayesq.suite.models.base import fit_once
from bayesq.suite.results import FAILURE_FILE, RESULT_FILE, finished_result, write_json
from bayesq.tensor_file import CorruptFile, read_tensors, verify, write_tensors

TENSORS = {"a": torch.arange(64.0).reshape(8, 8), "half": torch.ones(5).half(), "codes": torch.arange(9).byte()}


def test_no_damage_of_a_cache_file_goes_unnoticed(tmp_path: Path) -> None:
    file, draw, tried = tmp_path / "entry.safetensors", random.Random(0), Counter[str]()
    write_tensors(file, TENSORS, {"seconds": "1.0", "unseen": "[]"})
    whole = file.read_bytes()
    for read in (verify, read_tensors):
        for _ in range(750):
            file.write_bytes(damaged(whole, draw)[1])
            with pytest.raises(CorruptFile, match=r"entry\.safetensors"):
                read(file)
            tried["refused"] += 1
    report("cache files", tried, 1500)
    file.write_bytes(whole)
    assert verify(file)["seconds"] == "1.0"


def test_no_damaged_result_counts_as_finished_with_other_keys(tmp_path: Path) -> None:
    file, draw, tried = tmp_path / "run" / RESULT_FILE, random.Random(1), Counter[str]()
    write_json(file, {"status": "finished", "run_id": "run", "q/accuracy": 0.5, "config": {"bits": 3}})
    whole = file.read_bytes()
    for _ in range(600):
        file.write_bytes(damaged(whole, draw)[1])
        found = finished_result(file.parent)
        if found is None:
            tried["not finished"] += 1
        else:  # JSON has no checksum: what still parses is an object that says it is finished
            assert found["status"] == "finished"
            tried["parses"] += 1
    report("result files", tried, 600)
    file.write_bytes(whole[: len(whole) // 2])
    write_json(file.parent / FAILURE_FILE, {"status": "failed"})
    assert load_results(tmp_path) == []


# --------------------------------------------------------------------------------------------- caches that runs share

DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "a flipped bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "empty": lambda file: file.write_bytes(b""),
    "an oversized header": lambda file: file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:]),
    "a foreign file": lambda file: save_file({"a": torch.zeros(3)}, file),
    "NaN": lambda file: save_file({name: x * float("nan") for name, x in _content(file).items()}, file),
    "a pickle": lambda file: torch.save({"a": torch.zeros(3)}, file),
}


def _content(file: Path) -> dict[str, torch.Tensor]:
    # copies: what is read is mapped from the file that is about to be overwritten
    return {name: x.clone() for name, x in read_tensors(file)[0].items() if x.is_floating_point()}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(x)
        return logits


EXAMPLES = TensorExamples(
    {"x": torch.randn(12, 5, generator=torch.Generator().manual_seed(1))}, torch.arange(12) % 3, None
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_full_precision_logits_are_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def logits() -> torch.Tensor:
        return cached_logits(Named(), "checksum", EXAMPLES, 4, torch.device("cpu"), tmp_path)[0]

    expected = logits()
    (file,) = tmp_path.glob("full_precision/*.safetensors")
    whole = file.read_bytes()
    DAMAGES[damage](file)
    assert torch.equal(logits(), expected)
    assert "computing it again" in caplog.text and file.read_bytes() == whole
    caplog.clear()
    assert torch.equal(logits(), expected) and caplog.text == ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_statistics_are_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    module = Named()
    layers = {name: x for name, x in module.named_modules() if isinstance(x, nn.Linear)}
    settings = CalibrationSettings(4, None, 0)

    def calibration() -> Calibration:
        cpu = torch.device("cpu")
        found = Calibration(module, layers, EXAMPLES, settings, cpu, identity="checksum", cache_dir=tmp_path)
        found.prepare([INPUT_MOMENT, GRADIENT_MOMENT])
        return found

    first = calibration()
    expected = {
        (name, kind): first.statistic(name, kind).clone()
        for name in layers
        for kind in ("input_moment", "gradient_moment")
    }
    files = [first.path(statistic) for statistic in (INPUT_MOMENT, GRADIENT_MOMENT)]
    for file in files:
        DAMAGES[damage](file)
    again = calibration()
    assert caplog.text.count("computing it again") == 2
    assert all(torch.equal(again.statistic(*key), value) for key, value in expected.items())


def test_an_entry_of_another_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """The key is in the file's name: a copy under another name passes its digest, so names must not be guessed."""
    first = fit_once(tmp_path, "net", {"epochs": 1}, lambda: {"w": torch.ones(2)})
    second = fit_once(tmp_path, "net", {"epochs": 2}, lambda: {"w": torch.zeros(2)})
    assert not torch.equal(first["w"], second["w"])
    a, b = sorted(tmp_path.glob("models/*.safetensors"))
    recipes = {json.loads(verify(file)["recipe"])["epochs"] for file in (a, b)}
    assert recipes == {1, 2}
    shutil.copy(a, b)  # by hand, or by a broken synchronisation
    fitted = [
        fit_once(tmp_path, "net", {"epochs": n}, lambda n=n: {"w": torch.full((2,), float(n % 2))}) for n in (1, 2)
    ]
    assert torch.equal(fitted[0]["w"], first["w"]) and torch.equal(fitted[1]["w"], second["w"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_fitted_networks_are_fitted_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fits: list[int] = []

    def fit() -> dict[str, torch.Tensor]:
        fits.append(1)
        return {"w": torch.arange(6.0)}

    fit_once(tmp_path, "net", {"epochs": 1}, fit)
    (file,) = tmp_path.glob("models/*.safetensors")
    DAMAGES[damage](file)
    assert torch.equal(fit_once(tmp_path, "net", {"epochs": 1}, fit)["w"], torch.arange(6.0))
    assert len(fits) == 2 and "fitting again" in caplog.text
