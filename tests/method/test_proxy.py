"""The proxy against softmax layers whose divergence is known, and its guards."""

import math

import pytest
import torch
from torch import Tensor, nn

from bayesq.likelihood import Categorical
from bayesq.proxy import KAPPA_RANGE, measure_kappa
from bayesq.quant.layers import weight_to_matrix


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Ensemble(nn.Module):
    """Logits are the sum of two linear layers, each with Fisher F = E_x[(diag p - p pT) (x) x xT]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
        for k, x in enumerate(self.parameters()):
            x.data = 0.5 * normal(*x.shape, seed=k)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def quadratic(network: Ensemble, delta: Tensor, x: Tensor) -> float:
    """1/2 deltaT F delta in float64, delta [4, 5]."""
    p = network(x).detach().double().softmax(1)
    change = x.double() @ delta.double().T
    return float(((p * change.square()).sum(1) - (p * change).sum(1).square()).mean() / 2)


def no_noise(name: str, generator: torch.Generator) -> Tensor:
    raise AssertionError("nothing is drawn")


def test_kappa_is_one_where_the_prediction_is_exact():
    network, x = Ensemble().eval(), normal(64, 5, seed=9)
    deltas = {"a": 0.01 * normal(4, 5, seed=3), "b": 0.02 * normal(4, 5, seed=4)}
    predicted = {name: quadratic(network, delta, x) for name, delta in deltas.items()}
    predicted["b"] /= 3

    def rounded(name: str) -> Tensor:
        return weight_to_matrix(network.get_submodule(name)) + deltas[name]

    kappa = measure_kappa(
        network, ["a", "b"], rounded, no_noise, predicted, {"x": x}, 0, torch.Generator(), Categorical()
    )
    assert kappa.factors == pytest.approx({"a": 1.0, "b": 3.0}, rel=0.02)
    assert kappa.measured["a"] == pytest.approx(predicted["a"], rel=0.02)
    assert kappa.fallbacks == {"kappa_undefined": 0, "kappa_clamped": 0}


def test_draws_add_the_posterior_noise_of_the_layer_alone():
    """E[KL] = 1/2 deltaT F delta + 1/2 tr(F C): the noise of the other layer cancels, being in both networks."""
    network, x = Ensemble().eval(), normal(64, 5, seed=9)
    delta, spread = 0.02 * normal(4, 5, seed=3), {"a": 0.01, "b": 0.1}
    noise = sum(quadratic(network, direction.reshape(4, 5), x) for direction in torch.eye(20)) * spread["a"] ** 2
    predicted = {"a": quadratic(network, delta, x) + noise}

    def sample(name: str, generator: torch.Generator) -> Tensor:
        return spread[name] * torch.randn(1, 4, 5, generator=generator)

    def rounded(name: str) -> Tensor:
        return weight_to_matrix(network.get_submodule(name)) + (delta if name == "a" else 0)

    generator = torch.Generator().manual_seed(0)
    predicted["b"] = 1.0
    kappa = measure_kappa(network, ["a", "b"], rounded, sample, predicted, {"x": x}, 400, generator, Categorical())
    assert kappa.factors["a"] == pytest.approx(1.0, rel=0.06)
    without_noise = measure_kappa(
        network, ["a", "b"], rounded, no_noise, predicted, {"x": x}, 0, generator, Categorical()
    )
    assert without_noise.factors["a"] == pytest.approx(1 - noise / predicted["a"], rel=0.06)


def test_all_layers_meet_the_same_draws():
    """Equal to the definition, draw by draw in float64; layers rounded once; nothing changes in the network."""
    network, x = Ensemble().eval(), normal(16, 5, seed=9)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    asked = []

    def sample(name: str, generator: torch.Generator) -> Tensor:
        return 0.3 * torch.randn(1, 4, 5, generator=generator)

    def rounded(name: str) -> Tensor:
        asked.append(name)
        return (weight_to_matrix(network.get_submodule(name)) * 2).round() / 2

    predicted = {"a": 0.1, "b": 0.2}
    generator = torch.Generator().manual_seed(5)
    kappa = measure_kappa(network, ["a", "b"], rounded, sample, predicted, {"x": x}, 3, generator, Categorical())
    assert asked == ["a", "b"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    generator = torch.Generator().manual_seed(5)
    expected = {"a": 0.0, "b": 0.0}
    for _ in range(3):
        w = {name: (before[f"{name}.weight"] + 0.3 * torch.randn(4, 5, generator=generator)).double() for name in "ab"}
        for name in expected:
            other = {**w, name: (before[f"{name}.weight"] * 2).round().double() / 2}
            p, q = (((v["a"] + v["b"]) @ x.double().T).T + before["a.bias"].double() for v in (w, other))
            log_p, log_q = p.log_softmax(1), q.log_softmax(1)
            expected[name] += float((log_p.exp() * (log_p - log_q)).sum(1).mean()) / 3
    assert kappa.measured == pytest.approx(expected, rel=1e-4)
    assert kappa.factors == pytest.approx({name: expected[name] / predicted[name] for name in predicted}, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "predicted", "kappa", "fallback"),
    [
        (0.0, 1.0, 1.0, "kappa_undefined"),
        (0.1, 0.0, 1.0, "kappa_undefined"),
        (0.1, -1.0, 1.0, "kappa_undefined"),
        (0.1, math.nan, 1.0, "kappa_undefined"),
        (math.nan, 1.0, 1.0, "kappa_undefined"),
        (0.1, 1e9, KAPPA_RANGE[0], "kappa_clamped"),
        (0.1, 1e-9, KAPPA_RANGE[1], "kappa_clamped"),
    ],
)
def test_what_cannot_be_a_factor_is_counted(change, predicted, kappa, fallback):
    network = Ensemble().eval()

    def rounded(name: str) -> Tensor:
        return weight_to_matrix(network.get_submodule(name)) + change * normal(1, 4, 5, seed=1)

    inputs = {"x": normal(8, 5, seed=2)}
    result = measure_kappa(
        network, ["a"], rounded, no_noise, {"a": predicted}, inputs, 0, torch.Generator(), Categorical()
    )
    assert result.factors == {"a": kappa}
    assert result.fallbacks == {"kappa_undefined": 0, "kappa_clamped": 0, fallback: 1}


def test_it_refuses_what_it_cannot_measure():
    network, inputs = Ensemble().eval(), {"x": normal(8, 5, seed=2)}
    with pytest.raises(ValueError, match="no predicted risk for b"):
        measure_kappa(network, ["a", "b"], no_noise, no_noise, {"a": 1.0}, inputs, 0, torch.Generator(), Categorical())
    with pytest.raises(ValueError, match="eval mode"):
        measure_kappa(
            network.train(), ["a"], no_noise, no_noise, {"a": 1.0}, inputs, 0, torch.Generator(), Categorical()
        )


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_batches_give_the_same_divergence(batch_size):
    network, x = Ensemble().eval(), normal(16, 5, seed=9)
    sizes = []
    network.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["x"])), with_kwargs=True)

    def measured(size: int | None) -> dict[str, float]:
        def rounded(name: str) -> Tensor:
            return weight_to_matrix(network.get_submodule(name)) + 0.1 * normal(4, 5, seed=3)

        noise = torch.Generator().manual_seed(0)
        arguments = ({"a": 1.0, "b": 1.0}, {"x": x}, 2, noise, Categorical(), size)
        return measure_kappa(
            network, ["a", "b"], rounded, lambda _, g: 0.1 * torch.randn(1, 4, 5, generator=g), *arguments
        ).measured

    whole = measured(None)
    sizes.clear()
    assert measured(batch_size) == pytest.approx(whole, rel=1e-5)
    assert max(sizes) == batch_size and sum(sizes) == 16 * 2 * 3
