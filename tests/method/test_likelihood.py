"""Likelihoods against torch.distributions and naive float64 loops, and the stages that use them."""

import math

import pytest
import torch
from test_distillation import Batch, loaded, quantize
from torch import Tensor, nn
from torch.distributions import Categorical as Classes
from torch.distributions import Distribution, Independent, Normal
from torch.distributions import kl_divergence as reference_kl

from bayesq import likelihood as module
from bayesq import teacher as teachers
from bayesq.distillation import DistillationSettings, distill
from bayesq.likelihood import LIKELIHOODS, Categorical, Gaussian, Likelihood, Tokens
from bayesq.posterior import Kfac
from bayesq.proxy import measure_kappa
from bayesq.quant.layers import weight_to_matrix
from bayesq.teacher import posterior_predictive

CATEGORICAL, GAUSSIAN, TOKENS = Categorical(), Gaussian(), Tokens()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distribution(outputs: Tensor, likelihood: Likelihood) -> Distribution:
    if likelihood == GAUSSIAN:
        return Independent(Normal(outputs, torch.ones_like(outputs)), 1)
    return Classes(logits=outputs)


def draw_target(likelihood: Likelihood, outputs: int, count: int) -> Tensor:
    if likelihood == GAUSSIAN:
        return normal(count, outputs, seed=5)
    return torch.randint(outputs, (count,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("likelihood", [CATEGORICAL, GAUSSIAN])
@pytest.mark.parametrize("outputs", [1, 3])
def test_divergences_are_those_of_the_distributions(likelihood, outputs):
    f, g = normal(20, outputs, seed=0), normal(20, outputs, seed=1)
    expected = reference_kl(distribution(f, likelihood), distribution(g, likelihood))
    torch.testing.assert_close(likelihood.kl(f, g), expected)
    torch.testing.assert_close(likelihood.kl_from_mean(likelihood.mean_output(f), g), expected)
    assert likelihood.kl(f.float(), g.float()).dtype == torch.float64
    target = draw_target(likelihood, outputs, 20)
    torch.testing.assert_close(likelihood.nll(f, target), -distribution(f, likelihood).log_prob(target))
    assert likelihood.predictions(f).tolist() == [1.0] * 20
    assert likelihood.counted({"x": f}) is None and likelihood.target({"x": f}, target) is target


def test_kl_is_the_sum_over_classes_and_never_negative():
    full, other = (2 * normal(50, 4, seed=seed).float() for seed in (0, 1))
    found = CATEGORICAL.kl(full, other)
    for i in range(len(full)):
        p, q = ([math.exp(x) / sum(map(math.exp, row.tolist())) for x in row.tolist()] for row in (full[i], other[i]))
        assert float(found[i]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-9)
    assert bool((found >= 0).all()) and not CATEGORICAL.kl(full, full).any()
    assert bool((CATEGORICAL.kl(full, full + 7.5).abs() < 1e-6).all())  # a shift of all logits is no change
    assert bool((CATEGORICAL.kl(full.double(), full.double() + 1e-9 * other) > -1e-15).all())
    extreme = CATEGORICAL.kl(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]))
    assert float(extreme) == pytest.approx(400)


def test_mean_outputs():
    f = normal(5, 3, seed=0)
    torch.testing.assert_close(CATEGORICAL.mean_output(f), distribution(f, CATEGORICAL).probs)
    assert torch.equal(GAUSSIAN.mean_output(f), f)


def test_a_gaussians_target_has_the_shape_of_its_means():
    f = normal(6, 1, seed=0)
    assert torch.equal(GAUSSIAN.nll(f, f[:, 0] + 1), GAUSSIAN.nll(f, f + 1))
    with pytest.raises(RuntimeError):
        GAUSSIAN.nll(normal(6, 2, seed=0), normal(6, seed=1))


def test_summaries_of_classes_and_numbers():
    f, g, target = normal(30, 4, seed=0), normal(30, 4, seed=1), draw_target(CATEGORICAL, 4, 30)
    found = CATEGORICAL.summary(f, target)
    predicted = [row.index(max(row)) for row in f.tolist()]
    assert found["prediction"].tolist() == predicted
    assert found["correct"].tolist() == [int(a == b) for a, b in zip(predicted, target.tolist(), strict=True)]
    torch.testing.assert_close(
        found["confidence"], torch.stack([p[k] for p, k in zip(f.softmax(1), predicted, strict=True)])
    )
    assert torch.equal(found["nll"], CATEGORICAL.nll(f, target))
    others = [row.index(max(row)) for row in g.tolist()]
    assert CATEGORICAL.agreement(f, g).tolist() == [float(a == b) for a, b in zip(predicted, others, strict=True)]
    numbers = GAUSSIAN.summary(f[:, :1], g[:, 0])
    assert numbers.keys() == {"prediction", "nll"} and torch.equal(numbers["prediction"], f[:, 0])
    assert GAUSSIAN.agreement(f, g) is None


def test_posteriors_take_the_data_sets_likelihood():
    assert Kfac(None, 1000, None, 0.5, likelihood="auto").likelihood == "auto"
    with pytest.raises(ValueError, match=r"posterior\.likelihood=poisson: choose from auto, categorical, gaussian"):
        Kfac(None, 1000, None, 0.5, likelihood="poisson")
    with pytest.raises(ValueError, match=r"posterior\.likelihood=tokens: choose from"):
        Kfac(None, 1000, None, 0.5, likelihood="tokens")
    assert LIKELIHOODS == {"categorical": CATEGORICAL, "gaussian": GAUSSIAN}


# ------------------------------------------------------------------------------------------------------------ Fisher


def outer_products(directions: list[Tensor]) -> Tensor:
    """sum_k v_k v_kT over the last dimension."""
    return sum(v.double().unsqueeze(-1) * v.double().unsqueeze(-2) for v in directions)


def fisher(outputs: Tensor, likelihood: Likelihood) -> Tensor:
    """E_{y ~ p(.|f)}[score scoreT], by enumeration of the classes, or the identity."""
    if likelihood == GAUSSIAN:
        return torch.eye(outputs.shape[-1], dtype=torch.float64).expand(*outputs.shape, -1)
    p = torch.softmax(outputs.double(), -1)
    identity = torch.eye(outputs.shape[-1], dtype=torch.float64)
    scores = [identity[y] - p for y in range(outputs.shape[-1])]
    return sum(p[..., y, None, None] * s.unsqueeze(-1) * s.unsqueeze(-2) for y, s in enumerate(scores))


@pytest.mark.parametrize("likelihood", [CATEGORICAL, GAUSSIAN])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_few_outputs_have_an_exact_fisher(likelihood, outputs):
    f = normal(6, outputs, seed=0).float()
    found = outer_products(likelihood.fisher_directions(f, None, torch.Generator()))
    torch.testing.assert_close(found, fisher(f, likelihood), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("likelihood", [CATEGORICAL, GAUSSIAN])
@pytest.mark.parametrize("draws", module.DRAWS)
def test_draws_have_the_fisher_as_their_expectation(likelihood, draws):
    f = normal(2, 5, seed=0).float()
    found = outer_products(likelihood.fisher_directions(f, 20000, torch.Generator().manual_seed(0), draws))
    torch.testing.assert_close(found, fisher(f, likelihood), atol=0.03, rtol=0.05)


@pytest.mark.parametrize("likelihood", [CATEGORICAL, GAUSSIAN, TOKENS])
def test_another_kind_of_draw_is_refused(likelihood):
    with pytest.raises(ValueError, match="draws 'dice': choose from signs, labels"):
        likelihood.fisher_directions(normal(2, 3, 6, seed=0).float(), 1, torch.Generator(), "dice")


# ------------------------------------------------------------------------------------------------------------ tokens

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()


def sequences(seed: int, words: int = 5) -> Tensor:
    """Logits [3, 4, words] whose uncounted positions hold what padding may leave there."""
    return normal(3, 4, words, seed=seed).masked_fill(~MASK[..., None], math.nan)


def naive_mean(value: Tensor) -> list[float]:
    """Mean of [3, 4] over each sequence's counted positions, in plain Python."""
    rows = []
    for numbers, counts in zip(value.tolist(), MASK.tolist(), strict=True):
        chosen = [x for x, counted in zip(numbers, counts, strict=True) if counted]
        rows.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return rows


@pytest.mark.parametrize("chunk", [1, 10, 2**24])
def test_tokens_are_means_over_the_counted_positions(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    f, g = sequences(0), sequences(1)
    token = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(2)).masked_fill(~MASK, -100)
    clean = [x.nan_to_num(0) for x in (f, g)]
    kl = reference_kl(*(Classes(logits=x) for x in clean))
    assert TOKENS.kl(f, g, MASK).tolist() == pytest.approx(naive_mean(kl), rel=1e-12)
    assert TOKENS.kl_from_mean(TOKENS.mean_output(f), g, MASK).tolist() == pytest.approx(naive_mean(kl), rel=1e-12)
    nll = -Classes(logits=clean[0]).log_prob(token.clamp(min=0))
    assert TOKENS.nll(f, token, MASK).tolist() == pytest.approx(naive_mean(nll), rel=1e-12)
    right = (clean[0].argmax(-1) == token).double()
    found = TOKENS.summary(f, token, MASK)
    assert found["correct"].tolist() == naive_mean(right) and torch.equal(found["nll"], TOKENS.nll(f, token, MASK))
    same = (clean[0].argmax(-1) == clean[1].argmax(-1)).double()
    assert TOKENS.agreement(f, g, MASK).tolist() == naive_mean(same)
    assert TOKENS.predictions(f, MASK).tolist() == [3, 2, 0] and TOKENS.predictions(f).tolist() == [4, 4, 4]
    torch.testing.assert_close(TOKENS.kl(*clean), kl.mean(1))
    assert TOKENS.kl(f.float(), g.float(), MASK).dtype == torch.float64


def test_padding_passes_no_gradient_on():
    f, g = sequences(0), sequences(1).requires_grad_(True)
    TOKENS.kl_from_mean(TOKENS.mean_output(f), g, MASK).sum().backward()
    clean = g.detach().nan_to_num(0).requires_grad_(True)
    p = f.nan_to_num(0).softmax(-1)
    (-(p * clean.log_softmax(-1)).sum(-1) * MASK / MASK.sum(1, keepdim=True).clamp(min=1)).sum().backward()
    torch.testing.assert_close(g.grad, clean.grad)
    assert not g.grad[~MASK].any()


@pytest.mark.parametrize("draws", module.DRAWS)
@pytest.mark.parametrize("masked", [True, False])
def test_the_fisher_of_tokens_is_the_mean_over_positions(draws, masked):
    """Of one sequence: E[(sum_i J_iT v_i)(sum_i J_iT v_i)T] = 1/t sum_i J_iT F_i J_i, here with J_i scalars."""
    f, mask = (sequences(0), MASK) if masked else (normal(3, 4, 5, seed=0), None)
    counted = MASK if masked else torch.ones(3, 4, dtype=torch.bool)
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0])
    directions = TOKENS.fisher_directions(f.float(), 20000, torch.Generator().manual_seed(0), draws, mask)
    assert all(torch.isfinite(v).all() and not v[~counted].any() for v in directions[:3])
    pulled = torch.stack([(v * scale[:, None]).sum(1) for v in directions]).double()
    found = torch.einsum("kbi,kbj->bij", pulled, pulled)
    of_positions = fisher(f.nan_to_num(0), CATEGORICAL) * (scale.square() * counted)[..., None, None]
    expected = of_positions.sum(1) / counted.sum(1).clamp(min=1)[:, None, None]
    torch.testing.assert_close(found, expected, atol=0.06, rtol=0.06)


def test_draws_of_tokens_do_not_depend_on_padding():
    f = normal(1, 3, 6, seed=0).float()
    padded = torch.cat([f, torch.full((1, 2, 6), math.nan)], 1)
    mask = torch.tensor([[True, True, True, False, False]])
    alone, beside = (
        TOKENS.fisher_directions(x, 2, torch.Generator().manual_seed(0), "labels", m)
        for x, m in ((f, None), (padded, mask))
    )
    assert all(torch.equal(a, b[:, :3]) for a, b in zip(alone, beside, strict=True))


def test_tokens_predict_the_next_token_and_padding_counts_nowhere():
    tokens = torch.tensor([[5, 6, 7, 8], [0, 0, 3, 4], [1, 2, 0, 0]])
    attention = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    inputs = {"input_ids": tokens, "attention_mask": attention}
    counted, target = TOKENS.counted(inputs), TOKENS.target(inputs, torch.zeros(3))
    assert counted.dtype == torch.bool
    pairs = [
        [(row[i], row[i + 1]) for i in range(3) if seen[i] and seen[i + 1]]
        for row, seen in zip(tokens.tolist(), attention.tolist(), strict=True)
    ]
    found = [list(zip(tokens[k][counted[k]].tolist(), target[k][counted[k]].tolist(), strict=True)) for k in range(3)]
    assert found == pairs
    assert TOKENS.counted({"input_ids": tokens}).sum(1).tolist() == [3, 3, 3]


# ------------------------------------------------------------------------------------------------------- regression


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.hidden(x))))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Regression().eval().requires_grad_(False)


def inputs(count: int, seed: int = 2) -> Tensor:
    return normal(count, 6, seed=seed).float()


def batches(x: Tensor) -> list[Batch]:
    return [Batch({"x": x[index]}, index) for index in torch.arange(len(x)).split(16)]


def test_the_teacher_of_a_regression_is_the_mean_output(network):
    x = inputs(40)

    def sample(name: str, generator: torch.Generator) -> Tensor:
        return 0.1 * torch.randn(weight_to_matrix(network.get_submodule(name)).shape, generator=generator)

    generator = torch.Generator().manual_seed(3)
    teacher = posterior_predictive(network, ["hidden", "head"], sample, batches(x), 2, generator, GAUSSIAN)
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(40, 1)
    for _ in range(2):
        state = network.state_dict()
        drawn = {f"{name}.weight": state[f"{name}.weight"] + sample(name, generator)[0] for name in ("hidden", "head")}
        expected += torch.func.functional_call(network, drawn, (x,)) / 2
    torch.testing.assert_close(teacher, expected.double(), atol=1e-6, rtol=1e-5)


def test_distillation_lowers_the_squared_difference(network):
    x = inputs(200)
    teacher = posterior_predictive(network, [], None, batches(x), 0, torch.Generator(), GAUSSIAN)
    torch.testing.assert_close(teacher, network(x).double(), atol=1e-6, rtol=1e-5)
    tensors = quantize(network, {"hidden": 3, "head": 3})
    student = loaded(network, tensors, {})
    settings, generator = DistillationSettings(steps=3), torch.Generator().manual_seed(0)
    found = distill(student, tensors, batches(x), teacher, settings, generator, GAUSSIAN)

    def loss(model: nn.Module, rows: Tensor) -> float:
        return float((model(rows) - network(rows)).square().mean() / 2)

    held_out = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:40]
    assert found.heldout_kl_before == pytest.approx(loss(student, x[held_out]), rel=1e-4)
    after = loaded(network, found.tensors, found.parameters)
    assert found.heldout_kl_after == pytest.approx(loss(after, x[held_out]), rel=1e-4)
    fresh = inputs(500, seed=7)
    assert found.best_step > 0 and loss(after, fresh) < 0.7 * loss(student, fresh)


def test_kappa_of_a_linear_regression_is_exact():
    linear = nn.Sequential(nn.Linear(6, 1)).eval()
    x, delta = inputs(64), 0.1 * normal(1, 6, seed=4).float()
    predicted = float((x @ delta.T).square().mean() / 2)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def rounded(name: str) -> Tensor:
        return weight_to_matrix(linear[0]) + delta

    def draw(name: str, generator: torch.Generator) -> Tensor:
        return torch.randn(1, 1, 6, generator=generator)

    module, generator = Named().eval(), torch.Generator().manual_seed(0)
    kappa = measure_kappa(module, ["layer"], rounded, draw, {"layer": predicted}, {"x": x}, 0, generator, GAUSSIAN)
    assert kappa.factors["layer"] == pytest.approx(1, rel=1e-4) and math.isfinite(kappa.measured["layer"])


# ---------------------------------------------------------------------------------------------------- a language model


class NextToken(nn.Module):
    """Logits [b, t, 6] of the next token from this one and the one before; padding gives NaN, as in some networks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        logits = self.head(torch.tanh(self.hidden(x + nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))))
        return logits.masked_fill(attention_mask[..., None] == 0, math.nan)


@pytest.fixture(scope="module")
def speaker() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NextToken().eval().requires_grad_(False)


def sentences(count: int, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(6, (count, length), generator=generator)
    real = torch.randint(2, length + 1, (count,), generator=generator)
    return {"input_ids": tokens, "attention_mask": (torch.arange(length) < real[:, None]).long()}


def naive_tokens_kl(first: nn.Module, second: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """Mean KL over each sentence's next tokens, one sentence at a time without its padding."""
    found = []
    for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        sentence = {"input_ids": tokens[None, : mask.sum()], "attention_mask": torch.ones(1, int(mask.sum()))}
        f, g = (model(**sentence)[0, :-1].double() for model in (first, second))
        found.append(float(reference_kl(Classes(logits=f), Classes(logits=g)).mean()))
    return found


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_kappa_of_a_language_model_is_measured_per_token(speaker, alone, batch_size):
    inputs, delta = sentences(10), 0.1 * normal(8, 8, seed=4).float()

    def rounded(name: str) -> Tensor:
        return weight_to_matrix(speaker.hidden) + delta

    arguments = ({"hidden": 1.0}, inputs, 0, torch.Generator(), TOKENS, batch_size, alone)
    kappa = measure_kappa(speaker, ["hidden"], rounded, None, *arguments)
    other = loaded(speaker, {}, {"hidden.weight": speaker.hidden.weight + delta})
    expected = naive_tokens_kl(speaker, other, inputs)
    assert kappa.measured["hidden"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_language_model_is_distilled_from_outputs_that_are_computed_again(speaker, monkeypatch):
    """Outputs beyond the bound, and sequences of different length; the result is that of stored outputs."""
    inputs, tensors = sentences(40), quantize(speaker, {"hidden": 2, "head": 2})
    given = [Batch({name: x[index] for name, x in inputs.items()}, index) for index in torch.arange(40).split(8)]
    results = []
    for most in (2**30, 0):
        monkeypatch.setattr(teachers, "MOST_BYTES", most)
        teacher = posterior_predictive(speaker, [], None, given, 0, torch.Generator(), TOKENS)
        student, generator = loaded(speaker, tensors, {}), torch.Generator().manual_seed(0)
        results.append(distill(student, tensors, given, teacher, DistillationSettings(1), generator, TOKENS))
    stored, again = results
    assert again.heldout_kl_before == pytest.approx(stored.heldout_kl_before, rel=1e-4)
    assert again.heldout_kl_after == pytest.approx(stored.heldout_kl_after, rel=1e-4)
    monkeypatch.undo()
    given[-1] = Batch({name: x[:, :5] for name, x in given[-1].inputs.items()}, given[-1].index)
    teacher = posterior_predictive(speaker, [], None, given, 0, torch.Generator(), TOKENS)
    assert [tuple(teacher(batch.inputs).shape[1:]) for batch in given] == [(7, 6)] * 4 + [(5, 6)]


def test_a_language_model_is_distilled(speaker):
    inputs = sentences(80)
    given = [
        Batch({name: x[index] for name, x in inputs.items()}, index)
        for index in torch.randperm(80, generator=torch.Generator().manual_seed(0)).split(16)
    ]
    teacher = posterior_predictive(speaker, [], None, given, 0, torch.Generator(), TOKENS)
    assert teacher.shape == (80, 7, 6)
    tensors = quantize(speaker, {"hidden": 2, "head": 2})
    student = loaded(speaker, tensors, {})
    found = distill(student, tensors, given, teacher, DistillationSettings(3), torch.Generator().manual_seed(0), TOKENS)
    held_out = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:16]
    judged = {name: x[held_out] for name, x in inputs.items()}
    for tensors_, parameters, reported in (
        (tensors, {}, found.heldout_kl_before),
        (found.tensors, found.parameters, found.heldout_kl_after),
    ):
        expected = naive_tokens_kl(speaker, loaded(student, tensors_, parameters), judged)
        assert reported == pytest.approx(sum(expected) / 16, rel=1e-4)
    assert found.best_step > 0 and found.heldout_kl_after < 0.9 * found.heldout_kl_before
