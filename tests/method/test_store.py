"""Whitenings made once: in memory, on disk, handed to the next run; and a posterior from outside the package."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from estimates import needs_of
from posterior_layers import N, posterior_of, problem
from rounding_loop import rounded
from torch import Tensor, nn

from bayesq.allocation import Knapsack
from bayesq.budget import Budget
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.contract import LayerProblem
from bayesq.method import BayesQ
from bayesq.posterior import Laplace, LayerPosterior, WhiteningStore
from bayesq.posterior.factors import standard_normal
from bayesq.quant.feedback import FeedbackFactor, feedback_factors
from bayesq.scratch_file import TensorFile
from bayesq.whitening import Whitening

DAMPING = 0.01


def layer(name: str, **shape: int) -> LayerProblem:
    one = problem(**shape)
    one.name = name
    return one


class Counted:
    """A posterior that notes which layers it fits."""

    def __init__(self, kind: str = "kfac") -> None:
        self.posterior = posterior_of(kind)
        self.statistics = self.posterior.statistics
        self.fitted: list[str] = []

    def prepare(self, layers: list[LayerProblem]) -> None:
        self.posterior.prepare(layers)

    def fit(self, one: LayerProblem) -> LayerPosterior:
        self.fitted.append(one.name)
        return self.posterior.fit(one)


def expected(name: str, feedback: bool = True, damping: float = DAMPING) -> Whitening:
    return posterior_of("kfac").fit(layer(name)).whitening(feedback, damping)


def parts(factor: FeedbackFactor) -> tuple[Tensor, ...]:
    return factor.upper, factor.order, factor.column_curvature, factor.dead


def same(one: Whitening, other: Whitening) -> bool:
    tensors = [
        [w.row_curvature, w.column_curvature, *(x for f in w.factors or [] for x in parts(f))] for w in (one, other)
    ]
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(*tensors, strict=True))


SIZE = expected("a").nbytes


def test_a_layer_is_whitened_once_for_each_setting():
    posterior = Counted()
    store = WhiteningStore(posterior)
    first = store.whitening(layer("a"), True, DAMPING)
    assert same(first, expected("a")) and first.seconds > 0
    assert store.whitening(layer("a"), True, DAMPING) is first and posterior.fitted == ["a"]
    others = [("b", True, DAMPING), ("a", False, DAMPING), ("a", True, 2 * DAMPING)]
    made = [store.whitening(layer(name), *setting) for name, *setting in others]
    assert len({id(whitening) for whitening in [first, *made]}) == 4
    assert posterior.fitted == ["a", "b", "a", "a"]
    assert store.statistics == posterior.statistics and store.seconds > 0


def test_what_the_memory_does_not_hold_is_made_again():
    # U [c, c] of each group, float64, is most of it
    assert SIZE >= 2 * 8 * 4 * 4
    for limit, fits in ((2 * SIZE - 1, 3), (2 * SIZE, 2), (0, 4)):
        posterior = Counted()
        store = WhiteningStore(posterior, memory_limit=limit)
        for _ in range(2):
            for name in "ab":
                assert same(store.whitening(layer(name), True, DAMPING), expected(name))
        assert len(posterior.fitted) == fits and store.nbytes <= limit


def test_what_the_memory_does_not_hold_goes_to_the_file(tmp_path):
    posterior = Counted()
    store = WhiteningStore(posterior, memory_limit=SIZE, folder=tmp_path)
    first = [store.whitening(layer(name), True, DAMPING) for name in "abc"]
    again = [store.whitening(layer(name), True, DAMPING) for name in "abc"]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, False, False]
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert posterior.fitted == ["a", "b", "c"] and store.nbytes == SIZE
    assert list(tmp_path.iterdir()) == []
    store.release()
    assert same(again[2], expected("c"))  # what was read stays
    store.whitening(layer("a"), True, DAMPING)  # and so does what is in memory
    assert posterior.fitted == ["a", "b", "c"]
    assert same(store.whitening(layer("c"), True, DAMPING), expected("c")) and posterior.fitted[3:] == ["c"]


def test_use_disk_puts_everything_into_the_file(tmp_path):
    posterior = Counted()
    store = WhiteningStore(posterior)
    store.use_disk(tmp_path)
    for _ in range(2):
        for name in "ab":
            assert same(store.whitening(layer(name), True, DAMPING), expected(name))
    assert posterior.fitted == ["a", "b"] and store.nbytes == 0
    store.use_disk(tmp_path)  # another file
    assert same(store.whitening(layer("b"), True, DAMPING), expected("b")) and posterior.fitted[2:] == ["b"]
    with pytest.raises(OSError):
        store.use_disk(tmp_path / "absent")


def test_a_full_disk_costs_time_only(tmp_path, monkeypatch):
    written: list[Whitening] = []
    write = TensorFile.write

    def refuse(file: TensorFile, value: Whitening) -> Whitening:
        if written:
            written.append(value)
            raise OSError("no space left")
        written.append(value)
        return write(file, value)

    monkeypatch.setattr(TensorFile, "write", refuse)
    posterior = Counted()
    store = WhiteningStore(posterior, memory_limit=0, folder=tmp_path)
    for name in "abcab":
        assert same(store.whitening(layer(name), True, DAMPING), expected(name))
    assert posterior.fitted == ["a", "b", "c", "b"]
    assert len(written) == 2, "nothing is written after the first refusal"


def test_the_next_run_takes_over_what_depends_on_the_same():
    first, second, third = (WhiteningStore(Counted()) for _ in range(3))
    first.take_over("key", None)
    assert first.inherited_seconds == first.inherited_bytes == 0
    made = [first.whitening(layer(name), True, DAMPING) for name in "ab"]
    second.take_over("key", first)
    assert second.inherited_seconds == sum(whitening.seconds for whitening in made) > 0
    assert second.inherited_bytes == second.nbytes == 2 * SIZE and first.nbytes == 0
    assert [second.whitening(layer(name), True, DAMPING) for name in "ab"] == made
    assert second.posterior.fitted == []
    third.take_over("other key", second)
    assert third.inherited_seconds == third.inherited_bytes == second.nbytes == 0
    third.whitening(layer("a"), True, DAMPING)
    assert third.posterior.fitted == ["a"]


def test_what_was_taken_over_counts_towards_the_limit():
    first, second = WhiteningStore(Counted()), WhiteningStore(Counted(), memory_limit=SIZE)
    first.take_over("key", None)
    first.whitening(layer("a"), True, DAMPING)
    second.take_over("key", first)
    second.whitening(layer("b"), True, DAMPING)
    assert second.nbytes == SIZE


def test_errors_name_the_layer():
    one = layer("conv1")
    store = WhiteningStore(posterior_of("kfac", 1.0))
    one.statistic = lambda kind: torch.full((2, 4, 4) if kind == "input_moment" else (2, 3, 3), torch.nan)
    with pytest.raises(ValueError, match=r"^layer conv1: the input moment has NaN"):
        store.whitening(one, True, DAMPING)
    one.statistic = lambda kind: problem().statistic(kind)[:2]
    with pytest.raises(ValueError, match=r"^layer conv1: posterior\.rank=3: the calibration has 2"):
        WhiteningStore(posterior_of("lowrank", 1.0)).fit(one)


def test_prepare_reaches_the_posterior_and_is_timed():
    layers = [layer("a"), layer("b", rows=2)]
    store = WhiteningStore(posterior_of("diag", prior_scope="global"))
    store.prepare(layers)
    assert store.seconds > 0 and all("prior_precision" in one.notes for one in layers)


# -------------------------------------------------------------------------------- a posterior from outside the package


@dataclass
class InputPosterior(LayerPosterior):
    """P = A + tau / N I, the same for every row: what GPTQ takes for the truth."""

    moment: Tensor
    rows: int
    num_data: int
    prior_precision: float
    effective_parameters: float | None

    def diagonal(self) -> Tensor:
        return self.moment.diagonal(dim1=-2, dim2=-1)[:, None, :].repeat(1, self.rows, 1)

    def variance(self) -> Tensor:
        inverse = torch.linalg.inv(self.num_data * self.moment)
        return inverse.diagonal(dim1=-2, dim2=-1)[:, None, :].repeat(1, self.rows, 1)

    def risk(self, delta: Tensor) -> Tensor:
        d = delta.to(torch.float64)
        return 0.5 * ((d @ self.moment) * d).sum(-1)

    row_risk = risk

    def sample(self, generator: torch.Generator) -> Tensor:
        root = torch.linalg.cholesky(torch.linalg.inv(self.num_data * self.moment))
        return standard_normal((len(root), self.rows, root.shape[-1]), generator) @ root.mT

    def whiten(self, weight: Tensor) -> Tensor:
        return weight.to(torch.float64) @ torch.linalg.cholesky(self.moment)


@dataclass
class FeedbackInputPosterior(InputPosterior):
    """The same with error feedback."""

    def whitening(self, feedback: bool, damping: float) -> Whitening:
        factors = feedback_factors(self.moment, damping)
        gain = torch.stack([factor.column_curvature for factor in factors])[:, None, :]
        return Whitening(torch.ones(len(factors), self.rows, dtype=torch.float64), gain, factors)


class InputsOnly(Laplace):
    """Fits one of the above; arguments as in `Laplace`."""

    statistics = frozenset({INPUT_MOMENT})
    structure = InputPosterior

    def spectrum(self, layer: LayerProblem) -> Tensor:
        values = torch.linalg.eigvalsh(layer.statistic("input_moment").to(torch.float64))
        return values.repeat_interleave(layer.weight.shape[1])

    def fit(self, layer: LayerProblem) -> InputPosterior:
        tau, gamma = self.prior(layer)
        moment = layer.statistic("input_moment").to(torch.float64)
        damped = moment + tau / self.num_data * torch.eye(moment.shape[-1], dtype=torch.float64)
        return self.structure(damped, layer.weight.shape[1], self.num_data, tau, gamma)


class FeedbackInputsOnly(InputsOnly):
    """With feedback, and with estimates of its memory."""

    structure = FeedbackInputPosterior

    def fit_bytes(self, shape: tuple[int, int, int]) -> int:
        return 10**7

    def whitening_bytes(self, shape: tuple[int, int, int]) -> int:
        return 1000


def layers() -> list[LayerProblem]:
    return [layer("body", groups=1, rows=24, columns=30), layer("head", groups=2, rows=6, columns=12)]


@pytest.mark.parametrize("kind", [InputsOnly, FeedbackInputsOnly])
def test_a_posterior_from_outside_fits_whitens_stores_and_quantizes(kind, tmp_path):
    posterior = kind(None, N, None)
    one = layers()[0]
    fitted, w = posterior.fit(one), one.weight
    other = w + 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    distance = (fitted.whiten(w) - fitted.whiten(other)).square().sum()
    assert float(distance) == pytest.approx(2 * float(fitted.risk(w.double() - other.double()).sum()), rel=1e-6)
    assert 0 < one.notes["effective_parameters"] < w.numel()
    assert fitted.sample(torch.Generator().manual_seed(0)).shape == w.shape

    store = WhiteningStore(posterior, memory_limit=0, folder=tmp_path)
    whitening = store.whitening(one, True, DAMPING)
    assert same(store.whitening(one, True, DAMPING), whitening)
    assert (whitening.factors is None) == (kind is InputsOnly)

    method = BayesQ(WhiteningStore(posterior), "lloyd", 256, False, "feedback", 1, DAMPING)
    knapsack = Knapsack(method.whitenings, "row", [2, 3, 4, 6])
    found = {}

    def allocate(given: list[LayerProblem], *more: object) -> dict[str, Tensor]:
        return knapsack.allocate(given, Budget(3, "code"), *more)

    for one, tensor in rounded(method, layers(), allocate):
        delta = tensor.dequantize().double() - one.weight.double()
        found[one.name] = float(method.whitenings.fit(one).risk(delta).sum())
        # the risk of rounding all weights to zero is far larger
        assert found[one.name] < 0.2 * float(method.whitenings.fit(one).risk(one.weight).sum())
        assert found[one.name] == pytest.approx(one.notes["predicted_risk"], rel=1)
    assert set(found) == {"body", "head"} and method.statistics == {INPUT_MOMENT}


def test_the_preflight_asks_the_posterior_for_its_memory():
    module = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))

    def rounding(posterior: Laplace) -> int:
        return needs_of(module, posterior, [INPUT_MOMENT], whitening_disk=0).stages["rounding"]

    plain, told = (kind(None, N, None) for kind in (InputsOnly, FeedbackInputsOnly))
    difference = rounding(told) - rounding(plain)
    fit = max(8 * max(5 * c * c + 2 * r * r + 3 * r * c, 10 * r * c + 2 * c * c) for r, c in ((20, 30), (5, 20)))
    gains = 8 * (20 * 30 + 20 + 5 * 20 + 5)
    assert difference == 10**7 - fit + 2 * 1000 - gains


def test_folders_are_left_empty(tmp_path: Path):
    WhiteningStore(posterior_of("diag"), folder=tmp_path).release()
    assert list(tmp_path.iterdir()) == []
