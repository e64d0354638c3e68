"""Divergences and mean outputs against torch.distributions, and the stages that use them on a regression."""

import math

import pytest
import torch
from test_distillation import Batch, loaded, quantize
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.distributions import kl_divergence as reference_kl

from bayesq.distillation import DistillationSettings, distill, posterior_predictive
from bayesq.likelihood import divergence_from_mean, kl_divergence, mean_output
from bayesq.posterior import Kfac
from bayesq.proxy import measure_kappa
from bayesq.quant.layers import weight_to_matrix


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distribution(logits: Tensor, likelihood: str) -> torch.distributions.Distribution:
    if likelihood == "gaussian":
        return Independent(Normal(logits, torch.ones_like(logits)), 1)
    return Categorical(logits=logits)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_divergences_are_those_of_the_distributions(likelihood, outputs):
    f, g = normal(20, outputs, seed=0), normal(20, outputs, seed=1)
    expected = reference_kl(distribution(f, likelihood), distribution(g, likelihood))
    torch.testing.assert_close(kl_divergence(f, g, likelihood), expected)
    torch.testing.assert_close(divergence_from_mean(mean_output(f, likelihood), g, likelihood), expected)
    assert kl_divergence(f.float(), g.float(), likelihood).dtype == torch.float64


def test_mean_outputs():
    f = normal(5, 3, seed=0)
    torch.testing.assert_close(mean_output(f), distribution(f, "categorical").probs)
    assert torch.equal(mean_output(f, "gaussian"), f)


def test_posteriors_take_the_data_sets_likelihood():
    assert Kfac(None, 1000, None, 0.5, likelihood="auto").likelihood == "auto"
    with pytest.raises(ValueError, match=r"posterior\.likelihood=poisson: choose from auto, categorical, gaussian"):
        Kfac(None, 1000, None, 0.5, likelihood="poisson")


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
    teacher = posterior_predictive(network, ["hidden", "head"], sample, batches(x), 2, generator, "gaussian")
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(40, 1)
    for _ in range(2):
        state = network.state_dict()
        drawn = {f"{name}.weight": state[f"{name}.weight"] + sample(name, generator)[0] for name in ("hidden", "head")}
        expected += torch.func.functional_call(network, drawn, (x,)) / 2
    torch.testing.assert_close(teacher, expected.double(), atol=1e-6, rtol=1e-5)


def test_distillation_lowers_the_squared_difference(network):
    x = inputs(200)
    teacher = posterior_predictive(network, [], None, batches(x), 0, torch.Generator(), "gaussian")
    torch.testing.assert_close(teacher, network(x).double(), atol=1e-6, rtol=1e-5)
    tensors = quantize(network, {"hidden": 3, "head": 3})
    student = loaded(network, tensors, {})
    settings, generator = DistillationSettings(steps=3), torch.Generator().manual_seed(0)
    found = distill(student, tensors, batches(x), teacher, settings, generator, None, "gaussian")

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
    kappa = measure_kappa(module, ["layer"], rounded, draw, {"layer": predicted}, {"x": x}, 0, generator, "gaussian")
    assert kappa.factors["layer"] == pytest.approx(1, rel=1e-4) and math.isfinite(kappa.measured["layer"])
