"""The estimate before a run: sizes against sums over shapes, and refusals that name the key."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from estimates import needs_of
from naive_fisher import TinyConvNet, TinyEncoder
from omegaconf import OmegaConf
from torch import nn

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.fisher import GRADIENT_MOMENT
from bayesq.posterior import Diagonal, Ekfac, Kfac, LowRank, WhiteningStore
from bayesq.suite import preflight
from bayesq.suite.errors import UserError
from bayesq.suite.plan import placed_whitenings
from bayesq.suite.preflight import GIB, RUNTIME_BYTES, Activations, Needs, activations, check

STATISTICS = [GRADIENT_MOMENT, INPUT_MOMENT]
POSTERIORS = {
    "diag": Diagonal(None, 1000, None),
    "kfac": Kfac(None, 1000, None, 0.5),
    "ekfac": Ekfac(None, 1000, None),
    "lowrank": LowRank(None, 1000, None, 16),
}
SMALL, LARGE = Activations(total=1000, largest=100), 700


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5))


def needs(module: nn.Module | None = None, posterior=POSTERIORS["kfac"], **changes) -> Needs:
    settings = {"missing": STATISTICS, "calibration": SMALL, "evaluation": 8 * LARGE, "batch": 4, "examples": 16}
    return needs_of(module or network(), posterior, STATISTICS, **settings | {"held": 10**6} | changes)


def test_activations_are_the_outputs_of_the_leaves():
    measured = activations(network(), {"input": torch.zeros(1, 30)})
    assert measured == Activations(total=4 * (20 + 20 + 5), largest=4 * 20)
    ids = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "attention_mask": torch.ones(1, 5)}
    inner = activations(TinyEncoder(), ids)
    assert inner.largest == 4 * 5 * 8 and inner.total == 4 * (5 * (6 + 6 * 5 + 8) + 2)


def test_hooks_are_gone_after_an_error():
    module = network()
    with pytest.raises(RuntimeError):
        activations(module, {"input": torch.zeros(1, 3)})
    assert not any(child._forward_hooks for child in module.modules())


def test_statistics_take_their_sums_and_their_files():
    sums = 4 * (30**2 + 20**2 + 20**2 + 5**2)
    widest = 4 * (30**2 + 20**2)
    usual = needs()
    assert usual.stages["calibration"] == RUNTIME_BYTES + sums + widest + 4 * SMALL.total
    assert usual.disk["cache_dir"] == sums
    assert needs(room=1).stages["calibration"] == RUNTIME_BYTES + 2 * widest + 4 * SMALL.total
    assert needs(missing=()).disk["cache_dir"] == 0
    assert needs(missing=()).stages["calibration"] == RUNTIME_BYTES + 4 * SMALL.total
    assert needs(device="cuda").stages["calibration"] == RUNTIME_BYTES + widest


def test_whitenings_are_in_memory_or_on_disk():
    factors = 8 * (30 * 30 + 20 + 90 + 20 * 20 + 5 + 60)
    in_memory, offloaded, spilled = needs(), needs(offload=True), needs(whitening_memory=factors - 1)
    assert (in_memory.spilled, offloaded.spilled, spilled.spilled) == (0, 0, factors)
    assert needs(whitening_memory=0, posterior=None).spilled == 0
    assert offloaded.stages == spilled.stages
    assert offloaded.disk["results_dir"] - in_memory.disk["results_dir"] == factors
    crowded = needs(whitening_memory=100, whitening_disk=factors - 1)  # no room for the file
    assert crowded.spilled == 0
    for stage in in_memory.stages:
        stays = stage != "calibration"
        assert in_memory.stages[stage] - spilled.stages[stage] == stays * factors
        assert crowded.stages[stage] - spilled.stages[stage] == stays * 100
    # whitenings of the previous run are already in the memory of the process
    assert needs(inherited=factors).stages == spilled.stages
    assert in_memory.stages["rounding"] - needs(inherited=100).stages["rounding"] == 100


def test_every_stage_that_is_chosen_counts():
    parameters = 4 * (31 * 20 + 21 * 5)
    assert set(needs().stages) == {"calibration", "evaluation", "rounding"}
    more = needs(correction=True, distillation_batch=2)
    assert set(more.stages) - set(needs().stages) == {"correction", "distillation"}
    plain, prefix, paired = (needs(inputs=inputs).stages["rounding"] for inputs in ("full", "prefix", "paired"))
    walk = 2 * 4 * SMALL.largest + 16 * SMALL.total
    assert prefix - plain == parameters + walk
    assert paired - prefix > walk  # a second network's inputs, and the sums of both
    # behind the prefix the moments are matched while rounding
    assert "correction" not in needs(correction=True, inputs="prefix").stages
    assert needs(evaluation=9 * LARGE).stages["evaluation"] - needs().stages["evaluation"] == 3 * LARGE
    assert more.memory == 10**6 + max(more.stages.values())


def test_each_posterior_knows_what_its_fit_and_its_whitening_take():
    """In numbers of 8 bytes, for 2 groups of 3 rows and 5 columns."""
    fits = {"diag": 3 * 30, "kfac": 4 * 50 + 2 * 18, "ekfac": 5 * 50 + 2 * 18 + 3 * 30, "lowrank": (2 * 16 + 3) * 30}
    gains, factors = 30 + 6, 50 + 6 + 30
    stored = {"diag": gains, "kfac": factors, "ekfac": factors, "lowrank": gains}
    for kind, posterior in POSTERIORS.items():
        assert posterior.fit_bytes((2, 3, 5)) == 8 * fits[kind]
        assert posterior.whitening_bytes((2, 3, 5)) == 8 * stored[kind]
    assert LowRank(None, 1000, None, 4).fit_bytes((2, 3, 5)) == 8 * (2 * 4 + 3) * 30


@pytest.mark.parametrize("kind", [*POSTERIORS, None])
def test_wider_layers_never_need_less(kind):
    wide = nn.ModuleDict({"a": nn.Conv2d(8, 16, 3), "b": nn.Linear(100, 50)})
    small, large = (needs(module, POSTERIORS.get(kind), missing=()) for module in (TinyConvNet(), wide))
    assert all(small.stages[stage] <= large.stages[stage] for stage in small.stages)


def want(stage: str, size: int, **disk: int) -> Needs:
    stages = dict.fromkeys(("calibration", "rounding", "evaluation"), 1)
    return Needs(GIB, stages | {stage: size}, {"cache_dir": 0, "results_dir": 0} | disk)


@pytest.mark.parametrize(
    ("stage", "offload", "remedy"),
    [
        ("calibration", False, "set calibration.offload=disk, or lower calibration.batch_size"),
        ("calibration", True, "lower calibration.batch_size"),
        ("rounding", False, "set calibration.offload=disk, or choose posterior=diag"),
        ("evaluation", False, "lower evaluation.batch_size"),
        ("correction", False, "choose correction=none"),
        ("distillation", False, "lower distillation.batch_size or choose distill=false"),
    ],
)
def test_what_does_not_fit_in_memory_is_refused_with_a_remedy(stage, offload, remedy, tmp_path, monkeypatch):
    folders = {"cache_dir": tmp_path, "results_dir": tmp_path}
    monkeypatch.setattr(preflight, "available_memory", lambda: 2 * GIB)
    check(want(stage, 2 * GIB), folders, None, offload)
    with pytest.raises(UserError, match=f"{stage} needs about 2.00 GiB more .* has 2.00 GiB: {remedy}, or set"):
        check(want(stage, 2 * GIB + 1), folders, None, offload)
    check(want(stage, 2 * GIB + 1), folders, 3.5, offload)
    with pytest.raises(UserError, match=rf"resources\.memory=2\.5 leaves 1\.50 GiB: {remedy}, or raise resources\.mem"):
        check(want(stage, 2 * GIB), folders, 2.5, offload)


@pytest.mark.parametrize(
    ("memory", "disk", "said"),
    [
        (GIB, 0, False),  # half of the free memory
        (GIB + 1, 0, True),
        (1, 3 * GIB // 2, False),
        (1, 3 * GIB // 2 + 1, True),
    ],
)
def test_the_terminal_shows_tight_needs(memory, disk, said, tmp_path, monkeypatch, caplog):
    """The log file has them always: its logger does not write to the terminal, see conf/config.yaml."""
    monkeypatch.setattr(preflight, "available_memory", lambda: 2 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    with caplog.at_level(logging.INFO, "bayesq"):
        check(want("rounding", memory, results_dir=disk), {"cache_dir": tmp_path, "results_dir": tmp_path}, None, False)
    (record,) = caplog.records
    assert record.getMessage().startswith("memory: about ")
    assert record.name == ("bayesq.suite.preflight" if said else "bayesq.details")


def test_unknown_free_memory_refuses_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preflight, "available_memory", lambda: None)
    with caplog.at_level(logging.INFO, "bayesq"):
        check(want("rounding", 10**18), {"cache_dir": tmp_path, "results_dir": tmp_path}, None, False)
    assert "unknown left" in caplog.text


def test_what_does_not_fit_on_disk_is_refused_with_the_key(tmp_path, monkeypatch):
    folders = {"cache_dir": tmp_path / "cache", "results_dir": tmp_path / "results"}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    check(want("rounding", 1, cache_dir=2 * GIB, results_dir=GIB), folders, None, False)
    with pytest.raises(UserError, match=r"^cache_dir=.*/cache: the run writes about 3.50 GiB and 3.00 GiB are"):
        check(want("rounding", 1, cache_dir=2 * GIB, results_dir=3 * GIB // 2), folders, None, False)
    with pytest.raises(UserError, match=r"^results_dir=.*more space or set calibration.offload=memory"):
        check(want("rounding", 1, results_dir=4 * GIB), folders, None, True)


@pytest.mark.parametrize("offload", ["disk", "memory"])
def test_whitenings_on_disk_are_released_after_an_error(offload, tmp_path):
    store = WhiteningStore(POSTERIORS["diag"])
    cfg = OmegaConf.create({"calibration": {"offload": offload}, "posterior": {}})
    statistics = SimpleNamespace(path=lambda statistic: tmp_path / statistic.name)
    file = None
    with pytest.raises(KeyError), placed_whitenings(cfg, store, statistics, tmp_path, []):
        if offload == "memory":
            store.use_disk(tmp_path)  # as a run does whose whitenings exceed the memory
        file = store._file
        raise KeyError
    assert file is not None and file._file.closed and store._file is None
