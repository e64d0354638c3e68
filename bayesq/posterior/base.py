"""What every posterior shares: risk, draws and whitening of a layer; settings, prior precision and memory of a fit."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bayesq.calibration.statistic import Statistic
from bayesq.contract import LayerProblem
from bayesq.errors import Refused
from bayesq.likelihood import DRAWS, LIKELIHOODS
from bayesq.posterior.evidence import effective_parameters, prior_precision_by_evidence
from bayesq.whitening import FLOAT64_BYTES, Whitening, nearest_bytes, nearest_whitening

PRIOR_SCOPES = ("layer", "global")
# The likelihood of the data set.
AUTO = "auto"
# Convolution groups g, rows r and columns c of a layer.
Shape = tuple[int, int, int]


class LayerPosterior(ABC):
    """Posterior q(w) = N(mu, (N P)^-1) of one layer W[g, r, c].

    Attributes:
        num_data: N.
        prior_precision: tau.
        effective_parameters: gamma; None where tau was given.
    """

    num_data: int
    prior_precision: float
    effective_parameters: float | None

    @abstractmethod
    def diagonal(self) -> Tensor:
        """[g, r, c] diagonal of P: twice the risk of a unit error in one weight alone."""

    @abstractmethod
    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight, the diagonal of (N P)^-1."""

    @abstractmethod
    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to R = 1/2 deltaT P delta, in nats per example.

        Args:
            delta: [g, r, c] weight error w_hat - mu.
        """

    @abstractmethod
    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r] risk of each row's error if all other rows were exact."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] float64, one draw of delta = w - mu ~ N(0, (N P)^-1).

        Args:
            generator: CPU generator.
        """

    @abstractmethod
    def whiten(self, weight: Tensor) -> Tensor:
        """Whitened coordinates z [g, r, c], float64, of weights [g, r, c]: |z - z_hat|^2 = 2 R.

        This is the paper's equation, and tests use it. Rounding uses `whitening`, which needs no z.
        """

    def whitening(self, feedback: bool, damping: float) -> Whitening:
        """What rounding needs of the layer; by default for rounding to nearest, with the diagonal of P as curvature.

        Args:
            feedback: whether rounding errors are fed to later columns, if the structure couples columns.
            damping: fraction of the mean diagonal added to the input moment before it is factored, against the noise
                of few calibration examples; in addition to the prior.
        """
        return nearest_whitening(self.diagonal())


class Posterior(Protocol):
    """What a posterior's YAML instantiates.

    Attributes:
        statistics: the calibration statistics it reads.
        samples: draws per example for the Fisher; None = exact if classes are few.
        examples: number of calibration examples for the Fisher, spread over the set; None = all.
        likelihood: of the outputs, one of LIKELIHOODS, or AUTO.
        draws: one of DRAWS.
    """

    statistics: frozenset[Statistic]
    samples: int | None
    examples: int | None
    likelihood: str
    draws: str

    def prepare(self, layers: Sequence[LayerProblem]) -> None:
        """Work that needs all layers at once; called before the first `fit`."""
        ...

    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer from its calibration statistics; notes the prior precision in the layer."""
        ...

    def fit_bytes(self, shape: Shape) -> int:
        """Memory for fitting a layer of this shape."""
        ...

    def whitening_bytes(self, shape: Shape) -> int:
        """Memory of the whitening of a layer of this shape."""
        ...


class Laplace(ABC):
    """Base of all posteriors: the settings, the choice of the prior precision, the memory of a fit.

    A subclass names its `statistics` and defines `spectrum` and `fit`; it may define closer estimates of memory.

    Args:
        prior_precision: tau; None = by evidence.
        num_data: N.
        samples: draws per example for the Fisher; None = the exact expectation if classes are few.
        examples: number of calibration examples for the Fisher, spread over the set; None = all.
        prior_scope: "layer" maximises the evidence of each layer, "global" that of all layers together.
        likelihood: of the outputs: "categorical" for classifiers, "gaussian" of unit variance for regression heads,
            "auto" for that of the data set.
        draws: how the predictive distribution is sampled where its expectation is not exact: "signs" or "labels"; see
            `bayesq.likelihood.Categorical.fisher_directions`.

    Raises:
        Refused: an argument is out of its range.
    """

    statistics: frozenset[Statistic]

    def __init__(
        self,
        prior_precision: float | None,
        num_data: int,
        samples: int | None,
        examples: int | None = None,
        prior_scope: str = "layer",
        likelihood: str = "categorical",
        draws: str = "signs",
    ) -> None:
        if likelihood not in (AUTO, *LIKELIHOODS):
            raise Refused(f"posterior.likelihood={likelihood}: choose from {', '.join((AUTO, *LIKELIHOODS))}")
        if draws not in DRAWS:
            raise Refused(f"posterior.draws={draws}: choose from {', '.join(DRAWS)}")
        if samples is not None and samples < 1:
            raise Refused(f"posterior.samples={samples}: must be at least 1, or null for the exact Fisher")
        if examples is not None and examples < 1:
            raise Refused(f"posterior.examples={examples}: must be at least 1, or null for all calibration examples")
        if prior_precision is not None and not prior_precision >= 0:
            raise Refused(f"posterior.prior_precision={prior_precision}: must be 0 or more, or null for evidence")
        if num_data < 1:
            raise Refused(f"posterior.num_data={num_data}: must be at least 1")
        if prior_scope not in PRIOR_SCOPES:
            raise Refused(f"posterior.prior_scope={prior_scope}: choose from {', '.join(PRIOR_SCOPES)}")
        self.prior_precision, self.num_data, self.prior_scope = prior_precision, num_data, prior_scope
        self.samples, self.examples, self.likelihood, self.draws = samples, examples, likelihood, draws

    @abstractmethod
    def spectrum(self, layer: LayerProblem) -> Tensor:
        """Eigenvalues f_i of the layer's F, any shape; with evidence="diagonal" `Kfac` gives A (x) G's diagonal."""

    @abstractmethod
    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer from its calibration statistics."""

    def fit_bytes(self, shape: Shape) -> int:
        """Memory for fitting a layer: by default several copies of both factors, [c, c] and [r, r]."""
        g, r, c = shape
        return FLOAT64_BYTES * g * (5 * c * c + 2 * r * r + 3 * r * c)

    def whitening_bytes(self, shape: Shape) -> int:
        """Memory of a layer's whitening: by default a curvature for each weight and each row."""
        return nearest_bytes(shape)

    def prepare(self, layers: Sequence[LayerProblem]) -> None:
        """With prior_scope=global: choose the one tau of all layers and note it in each.

        The eigenvalues of all layers are held at once, in float32.
        """
        if self.prior_scope == "layer" or self.prior_precision is not None:
            return
        if all("prior_precision" in layer.notes for layer in layers):
            return
        spectra = [self.spectrum(layer).flatten().to(torch.float32) for layer in layers]
        tau, _ = prior_precision_by_evidence(torch.cat(spectra), sum(map(_squared_norm, layers)), self.num_data)
        for layer, spectrum in zip(layers, spectra, strict=True):
            self._note(layer, spectrum, tau)

    def prior(self, layer: LayerProblem) -> tuple[float, float | None]:
        """tau, and gamma; gamma is None if tau is given, which needs no eigenvalues.

        The first fit of a layer computes both and notes them.

        Raises:
            RuntimeError: prior_scope=global and `prepare` has not seen the layer.
        """
        if self.prior_precision is not None:
            layer.notes["prior_precision"] = self.prior_precision
            return self.prior_precision, None
        if "prior_precision" not in layer.notes:
            if self.prior_scope == "global":
                raise RuntimeError(f"posterior.prior_scope=global: prepare() has not seen layer {layer.name}")
            f = self.spectrum(layer)
            self._note(layer, f, prior_precision_by_evidence(f, _squared_norm(layer), self.num_data)[0])
        return layer.notes["prior_precision"], layer.notes["effective_parameters"]

    def _note(self, layer: LayerProblem, spectrum: Tensor, tau: float) -> None:
        layer.notes["prior_precision"] = tau
        layer.notes["effective_parameters"] = effective_parameters(self.num_data * spectrum.clamp(min=0), tau)


def _squared_norm(layer: LayerProblem) -> float:
    return float(layer.weight.to(torch.float64).square().sum())
