"""Prior precision by evidence: MacKay's fixed point tau <- gamma / ||mu||^2."""

import math

import torch
from torch import Tensor

EVIDENCE_STEPS = 100
EVIDENCE_TOLERANCE = 1e-6
# Weights that are all zero do not determine the prior precision; any finite one keeps P invertible.
LARGEST_PRIOR_PRECISION = 1e12


def prior_precision_by_evidence(eigenvalues: Tensor, squared_norm: float, num_data: int) -> tuple[float, float]:
    """Prior precision tau that maximises the Laplace evidence, by MacKay's fixed point.

        tau <- gamma / ||mu||^2,   gamma = sum_i N f_i / (N f_i + tau)

    Args:
        eigenvalues: f_i of the Fisher, any shape, float64.
        squared_norm: ||mu||^2.
        num_data: N.

    Returns:
        tau, and gamma: how many parameters the data determine. If all f_i are 0, tau is 1 / ||mu||^2 and gamma is 0.
    """
    scaled = (num_data * eigenvalues.clamp(min=0)).flatten()
    if squared_norm <= 0 or float(scaled.amax()) <= 0:
        return LARGEST_PRIOR_PRECISION if squared_norm <= 0 else 1 / squared_norm, 0.0
    tau = len(scaled) / squared_norm
    gamma = 0.0
    for _ in range(EVIDENCE_STEPS):
        gamma = effective_parameters(scaled, tau)
        # gamma falls as tau grows, so the plain iteration oscillates about its fixed point, almost undamped if tau
        # outweighs the data. The geometric mean of old and new tau has the same fixed point and at least halves the
        # error. The floor of gamma keeps tau above 0 if the Fisher is nearly 0.
        updated = min(math.sqrt(tau * max(gamma, 1e-6) / squared_norm), LARGEST_PRIOR_PRECISION)
        done = abs(updated - tau) <= EVIDENCE_TOLERANCE * tau
        tau = updated
        if done:
            break
    return tau, gamma


def effective_parameters(scaled: Tensor, tau: float) -> float:
    """gamma = sum_i N f_i / (N f_i + tau), the number of parameters the data determine.

    Args:
        scaled: N f_i >= 0, any shape.
        tau: prior precision; with 0, eigenvalues of 0 count nothing.
    """
    share = scaled + tau
    torch.div(scaled, share, out=share)
    if tau == 0:
        share.nan_to_num_(0.0)
    return float(share.sum(dtype=torch.float64))
