"""The cache of calibration statistics on disk."""

import importlib
import itertools
import logging
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from naive_fisher import seeded
from tiny_sets import (
    STATISTICS,
    Counting,
    WithIdleLayers,
    collect,
    images,
    open_calibration,
)
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.passes import SUM_BYTES, sum_bytes
from bayesq.calibration.statistic import Statistic
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT, GradientDirections
from bayesq.likelihood import LIKELIHOODS, Categorical
from bayesq.quant.layers import quantizable_layers
from bayesq.suite import code_digest, plan

KINDS = frozenset({INPUT_MOMENT, GRADIENT_MOMENT})
NAMES = {statistic.name for statistic in KINDS}


@pytest.fixture
def module() -> Counting:
    return seeded(Counting())


def test_files_are_computed_once_and_read_afterwards(module, tmp_path):
    first = open_calibration(module, tmp_path)
    first.prepare(KINDS)
    assert module.passes == 3 and first.reused == dict.fromkeys(NAMES, False)  # 3 batches, inputs and gradients at once
    second = open_calibration(module, tmp_path)
    second.prepare(iter(KINDS))
    assert module.passes == 3 and second.reused == dict.fromkeys(NAMES, True)
    assert second.seconds == pytest.approx(first.seconds, abs=1e-3) and second.seconds.keys() == NAMES
    expected = collect(module, images())
    for kind in NAMES:
        for name in quantizable_layers(module):
            assert torch.equal(second.statistic(name, kind), expected[kind][name])


def test_only_what_is_missing_is_computed(module, tmp_path):
    open_calibration(module, tmp_path).prepare([GRADIENT_MOMENT])
    assert module.passes == 3
    later = open_calibration(module, tmp_path)
    later.prepare([GRADIENT_MOMENT, FISHER_DIAGONAL, INPUT_MAGNITUDE])
    assert module.passes == 6
    assert later.reused == {"gradient_moment": True, "fisher_diagonal": False, "input_magnitude": False}


@pytest.mark.parametrize("gradient_examples", [None, 2])
def test_one_pass_gives_the_bits_of_two(gradient_examples, module, tmp_path):
    both = open_calibration(module, tmp_path / "both", gradient_examples=gradient_examples)
    both.prepare(KINDS)
    assert module.passes == 3
    apart = open_calibration(module, tmp_path / "apart", gradient_examples=gradient_examples)
    for statistic in (GRADIENT_MOMENT, INPUT_MOMENT):
        apart.prepare([statistic])
    assert module.passes == 3 + 3 + (3 if gradient_examples is None else 1)
    for kind in NAMES:
        for name in quantizable_layers(module):
            assert torch.equal(both.statistic(name, kind), apart.statistic(name, kind))


def test_what_a_run_is_charged_with_does_not_depend_on_what_was_computed_before(module, tmp_path, monkeypatch):
    """AWQ's two statistics and BayesQ's two share the forward pass, whichever of them comes first."""
    now = [0.0]

    def passing(seconds: float, function):
        def timed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Categorical, "fisher_directions", passing(10.0, Categorical.fisher_directions))
    module.register_forward_pre_hook(passing(1.0, lambda *_: None))
    wanted = ([INPUT_MOMENT, INPUT_MAGNITUDE], [INPUT_MOMENT, GRADIENT_MOMENT], [FISHER_DIAGONAL])
    for order in itertools.permutations(range(3)):
        for run in order:
            found = open_calibration(module, tmp_path / "".join(map(str, order)))
            found.prepare(wanted[run])
            backward = 0.0 if run == 0 else 30.0
            assert (found.forward_s, sum(found.seconds.values())) == (3.0, backward), (order, run)
            assert found.total_s == 3.0 + backward


def test_gradients_are_charged_with_the_backward_passes_only(module, tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    found = open_calibration(module, tmp_path)
    found.prepare(KINDS)
    # three readings about the pass, two about the gradients of each of the 3 batches: 8 ticks, 3 of them backward
    assert found.seconds == {"input_moment": 0.0, "gradient_moment": 3.0} and found.forward_s == 5.0
    fits = max(sum(sum_bytes(layer, [kind]) for layer in found.layers.values()) for kind in KINDS)
    apart = open_calibration(module, tmp_path / "apart", room=fits)
    assert len(apart.passes.plan([INPUT_MOMENT, GRADIENT_MOMENT])) == 2
    apart.prepare(KINDS)
    # a pass of their own is theirs, from the reading before it to the one after it
    assert apart.seconds == {"input_moment": 0.0, "gradient_moment": 7.0} and apart.forward_s == 3.0


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
@pytest.mark.parametrize("kind", sorted(NAMES))
def test_damaged_files_are_noticed_and_computed_again(damage, kind, module, tmp_path, caplog):
    first = open_calibration(module, tmp_path)
    first.prepare(KINDS)
    path = first.path(STATISTICS[kind])
    whole = path.read_bytes()
    broken = bytearray(whole)
    if damage == "truncate":
        broken = broken[: len(broken) // 2]
    elif damage == "flip":
        broken[-5] ^= 4
    elif damage == "empty":
        broken = bytearray()
    else:
        broken = bytearray(b"not a safetensors file at all")
    path.write_bytes(bytes(broken))
    second = open_calibration(module, tmp_path)
    with caplog.at_level(logging.WARNING):
        second.prepare(KINDS)
    assert len(caplog.records) == 1 and str(path) in caplog.text and "computing it again" in caplog.text
    assert second.reused == {name: name != kind for name in NAMES} and module.passes == 6
    again = open_calibration(module, tmp_path)
    again.prepare(KINDS)
    assert module.passes == 6
    assert all(torch.equal(again.statistic(n, kind), collect(module, images())[kind][n]) for n in again.layers)


class Narrow(Counting):
    """Runs out of memory with more than two images at a time, once its first layer has run."""

    def forward(self, image: Tensor) -> Tensor:
        self.stem(image)
        if len(image) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(image)


def test_running_out_of_memory_halves_the_batch_begins_again_and_is_remembered(tmp_path):
    narrow = seeded(Narrow())
    found = open_calibration(narrow, tmp_path, batch_size=5, gradient_examples=3)
    found.prepare(KINDS)
    assert sum(found.oom_retries.values()) == 1
    again = open_calibration(narrow, tmp_path, batch_size=5, gradient_examples=3)
    again.prepare(KINDS)
    assert narrow.passes == 3 and again.oom_retries == found.oom_retries
    twos = open_calibration(seeded(Counting()), tmp_path / "twos", batch_size=2, gradient_examples=3)
    twos.prepare(KINDS)
    for kind in NAMES:
        for name in ("grouped", "head"):
            assert torch.equal(found.statistic(name, kind), twos.statistic(name, kind))


def test_what_changes_a_number_changes_the_file(module, tmp_path):
    base = open_calibration(module, tmp_path)
    other_weights = seeded(Counting(), seed=1)
    excluded = open_calibration(module, tmp_path)
    excluded.layers = quantizable_layers(module, ["head"])
    everything = {
        "weights": open_calibration(other_weights, tmp_path),
        "examples": open_calibration(module, tmp_path, images(4)),
        "batch size": open_calibration(module, tmp_path, batch_size=3),
        "layers": excluded,
    }
    for what, changed in everything.items():
        for kind, statistic in STATISTICS.items():
            assert changed.path(statistic) != base.path(statistic), (what, kind)
    for changes in (
        {"seed": 1},
        {"samples": 2},
        {"gradient_examples": 3},
        {"likelihood": LIKELIHOODS["gaussian"]},
        {"draws": "labels"},
    ):
        gradients_only = open_calibration(module, tmp_path, **changes)
        for kind, statistic in STATISTICS.items():
            assert (gradients_only.path(statistic) == base.path(statistic)) == kind.startswith("input"), kind
    assert len({base.path(one) for one in (*STATISTICS.values(), GradientDirections(3))}) == len(STATISTICS) + 1
    same = open_calibration(seeded(Counting()), tmp_path)
    assert all(same.path(one) == base.path(one) for one in STATISTICS.values())


def test_seeds_draw_different_labels(module, tmp_path):
    found = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(found))
        opened = open_calibration(module, folder, samples=1, seed=seed)
        opened.prepare([FISHER_DIAGONAL])
        found.append(opened.statistic("head", "fisher_diagonal"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_unseen_layers_are_known_from_the_cache_as_well(tmp_path):
    module = seeded(WithIdleLayers())
    for _ in range(2):
        opened = open_calibration(module, tmp_path)
        opened.prepare([INPUT_MOMENT])
        assert opened.unseen == {"unused"}


def test_two_processes_at_once_compute_once(tmp_path):
    script = textwrap.dedent("""
        import sys, time, torch
        from pathlib import Path
        import tiny_sets as t
        from naive_fisher import TinyConvNet, seeded

        class Slow(TinyConvNet):
            def forward(self, image):
                with open(sys.argv[1] + "/passes", "a") as file:
                    file.write("x")
                time.sleep(0.2)
                return super().forward(image)

        folder = Path(sys.argv[1])
        (folder / f"ready{sys.argv[2]}").touch()
        while len(list(folder.glob("ready*"))) < 2:
            time.sleep(0.01)
        opened = t.open_calibration(seeded(Slow()), folder)
        opened.prepare([t.INPUT_MOMENT])
        print(opened.reused["input_moment"], float(opened.statistic("head", "input_moment").sum()))
    """)
    here = Path(__file__).parent
    path = [str(here.parent), str(here.parents[1])]
    code = f"import sys; sys.path[:0] = {path!r}\n{script}"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(output[0] for output in outputs) == ["False", "True"] and outputs[0][1] == outputs[1][1]
    assert (tmp_path / "passes").read_text() == "xxx"


def test_a_statistic_nobody_declared_is_refused_by_name(module, tmp_path):
    opened = open_calibration(module, tmp_path)
    with pytest.raises(ValueError, match="layer head: statistic input_moment was not computed, only none: declare it"):
        opened.statistic("head", "input_moment")
    opened.prepare([INPUT_MAGNITUDE])
    with pytest.raises(ValueError, match="input_moment was not computed, only input_magnitude: declare it"):
        opened.statistic("head", "input_moment")


def test_two_statistics_of_one_name_are_refused(module, tmp_path):
    opened = open_calibration(module, tmp_path)
    with pytest.raises(ValueError, match="two statistics are called gradient_directions"):
        opened.prepare([GradientDirections(2), GradientDirections(3)])
    opened.prepare([GradientDirections(2)])
    with pytest.raises(ValueError, match="two statistics are called gradient_directions"):
        opened.prepare([GradientDirections(3)])
    assert len(opened.statistic("head", "gradient_directions")) == 2


def users_statistic(folder: Path, module: str, factor: float, patch: pytest.MonkeyPatch) -> Statistic:
    """A statistic of a user's module, called as one of the suite."""
    (folder / f"{module}.py").write_text(
        textwrap.dedent(f"""
            from bayesq.calibration.inputs import InputMagnitude


            class Scaled(InputMagnitude):
                def contribution(self, values):
                    return {factor} * super().contribution(values)
        """)
    )
    for cached in (code_digest.sources, code_digest.digest):
        cached.cache_clear()
    patch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    statistic: Statistic = importlib.import_module(module).Scaled()
    return statistic


def test_a_users_statistic_has_files_of_its_class_and_source(module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    values, paths = [], []
    for factor in (1.0, 3.0):
        opened = open_calibration(module, tmp_path / "cache")
        statistic = users_statistic(tmp_path, "scaled_magnitude", factor, monkeypatch)
        opened.prepare([statistic])
        values.append(opened.statistic("head", "input_magnitude"))
        paths.append(opened.path(statistic))
    builtin = open_calibration(module, tmp_path / "cache")
    builtin.prepare([INPUT_MAGNITUDE])
    assert len({*paths, builtin.path(INPUT_MAGNITUDE)}) == 3
    torch.testing.assert_close(values[1], 3 * values[0])
    torch.testing.assert_close(values[0], builtin.statistic("head", "input_magnitude"))
    sys.modules.pop("scaled_magnitude")


def test_a_gpu_has_room_for_more_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40 * 2**30, 80 * 2**30))
    assert plan.room_for_sums(torch.device("cuda")) == 10 * 2**30
    assert plan.room_for_sums(torch.device("cpu")) == SUM_BYTES
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**30, 80 * 2**30))
    assert plan.room_for_sums(torch.device("cuda")) == SUM_BYTES
