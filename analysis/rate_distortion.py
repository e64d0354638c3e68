"""Lower bound on the bits of any code for a layer at a given risk, if its weights were Gaussian.

Each row of a layer is treated as a sample of a normal source with the row's mean and variance s_r^2 and independent
weights. The distortion is the risk 1/2 deltaT P delta of `bayesq.posterior`. With P = A (x) G,

    1/2 tr(G delta A deltaT),   delta = S^1/2 E,   S = diag(s_r^2),   E of unit variance,

separates in the eigenvectors of A and of S^1/2 G S^1/2 into independent components of variances

    v_ij = 1/2 mu_i lambda_j,   mu = eig(S^1/2 G S^1/2),   lambda = eig(A)

in nats. Their rate-distortion function is reverse water-filling (Cover and Thomas, Elements of Information Theory,
section 10.3.3): components above the water level theta are coded with distortion theta, the others not at all,

    D = sum_ij min(theta, v_ij),   R(D) = sum_ij 1/2 log2(v_ij / theta) over v_ij > theta   bits.

A single component gives D = v 2^(-2R). Row means are side information, like zero points. A Gaussian source needs the
most bits of all sources with its variance, so a real layer may need fewer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesq.posterior import DiagonalPosterior, KroneckerPosterior, LayerPosterior


def risk_components(posterior: LayerPosterior, weight: Tensor) -> Tensor:
    """Variances v of the independent components of a layer's risk, float64 [n] for its n weights, in nats.

    Args:
        posterior: diagonal or Kronecker; others have no components in closed form.
        weight: [g, r, c]; its row variances are those of the source.

    Raises:
        TypeError: another posterior.
    """
    variance = weight.to(torch.float64).var(-1, unbiased=False)
    if isinstance(posterior, DiagonalPosterior):
        return (0.5 * posterior.precision * variance[..., None]).flatten()
    if isinstance(posterior, KroneckerPosterior):
        std = variance.sqrt()
        rows = torch.linalg.eigvalsh(std[:, :, None] * posterior.gradient_factor * std[:, None, :])
        columns = torch.linalg.eigvalsh(posterior.input_factor)
        components: Tensor = 0.5 * rows.clamp(min=0)[:, :, None] * columns.clamp(min=0)[:, None, :]
        return components.flatten()
    raise TypeError(f"no rate-distortion bound for {type(posterior).__name__}")


def water_level(variances: Tensor, distortion: float) -> float:
    """theta with sum min(theta, v) = distortion; the largest variance if their sum is at most D.

    Args:
        variances: v [n].
        distortion: D > 0.
    """
    v = variances.to(torch.float64).sort(descending=True).values
    if float(v.sum()) <= distortion:
        return float(v[0])
    # if the k largest v exceed the level, it is (D - sum of the others) / k; the largest consistent k is chosen
    below = v.sum() - v.cumsum(0)
    level = (distortion - below) / torch.arange(1, len(v) + 1, dtype=torch.float64)
    consistent = (level > 0) & (level <= v)
    return float(level[consistent.nonzero()[-1, 0]])


def rate(variances: Tensor, level: float) -> float:
    """Bits of all components [n] together at a water level."""
    v = variances[variances > level].to(torch.float64)
    return float(0.5 * torch.log2(v / level).sum())


def layer_rates(components: Sequence[Tensor], risks: Sequence[float]) -> tuple[list[float], list[float]]:
    """Bits that each layer needs at least.

    Args:
        components: variances [n] of each layer.
        risks: achieved by each layer, nats.

    Returns:
        bits of each layer at its risk; and bits of each layer with one water level for the whole network at the sum of
        the risks. No allocation between layers has a smaller total than the latter.
    """
    separate = [
        rate(v, water_level(v, risk)) if risk > 0 else float("inf") for v, risk in zip(components, risks, strict=True)
    ]
    common = water_level(torch.cat(list(components)), sum(risks)) if sum(risks) > 0 else 0.0
    return separate, [rate(v, common) if common > 0 else float("inf") for v in components]
