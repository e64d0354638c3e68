"""Layers with random statistics, posteriors of each structure, and their dense precision matrices."""

import numpy as np
import torch
from torch import Tensor

from bayesq.contract import LayerProblem
from bayesq.posterior import (
    Diagonal,
    DiagonalPosterior,
    Ekfac,
    EkfacPosterior,
    Kfac,
    KroneckerPosterior,
    LayerPosterior,
    LowRank,
    LowRankPosterior,
)

N = 50
KINDS = ("diag", "kfac", "ekfac", "lowrank")


def moment(size: int, groups: int, seed: int, rank: int | None = None) -> Tensor:
    """Random second moments [g, size, size], float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return x @ x.transpose(1, 2) / x.shape[2]


def problem(groups: int = 2, rows: int = 3, columns: int = 4, **statistics: Tensor) -> LayerProblem:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(groups, rows, columns, generator=generator)
    given = {
        "input_moment": moment(columns, groups, 1),
        "gradient_moment": 0.1 * moment(rows, groups, 2),
        "fisher_diagonal": torch.rand(groups, rows, columns, generator=generator) ** 3,
        "gradient_directions": 0.2 * torch.randn(3, groups, rows, columns, generator=generator),
        "fisher_eigenvalues": torch.rand(groups, rows, columns, generator=generator) ** 3,
        **statistics,
    }
    given["fisher_diagonal"] = given["fisher_diagonal"] + given["gradient_directions"].square().sum(0)
    for factor in ("input", "gradient"):
        given[f"{factor}_basis"] = torch.linalg.eigh(given[f"{factor}_moment"])[1]
    return LayerProblem("layer", "Conv2d", weight, given.__getitem__)


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    whole, start = np.zeros((size, size)), 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole


def dense_precision(posterior: LayerPosterior) -> np.ndarray:
    """P for the weight [g, r, c] flattened: rows vary slower than columns, hence kron(G, A)."""
    if isinstance(posterior, DiagonalPosterior):
        return np.diag(posterior.precision.flatten().numpy())
    if isinstance(posterior, LowRankPosterior):
        whole = np.diag(posterior.residual.flatten().numpy())
        for u in posterior.directions.flatten(1).numpy():
            whole += np.outer(u, u)
        return whole
    if isinstance(posterior, EkfacPosterior):
        bases = [
            np.kron(q_g, q_a)
            for q_a, q_g in zip(posterior.input_basis.numpy(), posterior.gradient_basis.numpy(), strict=True)
        ]
        values = posterior.eigenvalues.flatten(1).numpy()
        return block_diagonal([q @ np.diag(v) @ q.T for q, v in zip(bases, values, strict=True)])
    assert isinstance(posterior, KroneckerPosterior)
    return block_diagonal(
        [torch.kron(g, a).numpy() for a, g in zip(posterior.input_factor, posterior.gradient_factor, strict=True)]
    )


def posterior_of(kind: str, prior_precision: float | None = None, **more):
    if kind == "diag":
        return Diagonal(prior_precision, N, None, **more)
    if kind == "kfac":
        return Kfac(prior_precision, N, None, shrinkage=0.3, evidence="eigenvalues", **more)
    if kind == "ekfac":
        return Ekfac(prior_precision, N, None, **more)
    return LowRank(prior_precision, N, None, rank=3, **more)


def fitted(kind: str) -> tuple[LayerPosterior, LayerProblem]:
    layer = problem()
    return posterior_of(kind).fit(layer), layer
