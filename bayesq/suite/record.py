"""The flat result of a run."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from bayesq.memory import peak_bytes
from bayesq.quant.accounting import code_bits
from bayesq.quant.file import Sizes
from bayesq.recipe import Quantized
from bayesq.report import fallbacks
from bayesq.suite import code_digest
from bayesq.suite.config import reads_posterior, resolved, run_id
from bayesq.suite.labels import model_label
from bayesq.suite.provenance import git_state, host, process, versions
from bayesq.suite.workload import Workload

log = logging.getLogger(__name__)


def flat_result(
    cfg: DictConfig,
    work: Workload,
    quantized: Quantized,
    statistics: Mapping[str, str],
    layers: Sequence[Mapping[str, Any]],
    sizes: Sizes,
    metrics: Mapping[str, Any],
    seconds: Mapping[str, float],
    estimate_bytes: int,
) -> dict[str, Any]:
    """The flat result of a run, from the rows of layers.csv, the metrics by result key, and the times by stage.

    `statistics` has the keys of the statistics by name, `estimate_bytes` is the memory estimate of the preflight.
    """
    config = resolved(cfg)
    device, weights, unreached = work.subject.device, work.subject.weights, len(work.subject.usage.unreached)
    return {
        "run_id": run_id(cfg),
        "status": "finished",
        "model": model_label(config),
        "dataset": cfg.dataset.name,
        "method": cfg.method.name,
        "posterior": cfg.posterior.name if reads_posterior(config) else "none",
        **{key: config[key] for key in ("allocator", "inputs", "correction", "seed")},
        "primary_metric": work.data.primary_metric,
        "quantized/share": work.coverage.share,
        "quantized/left_out": work.coverage.left_out,
        "bits/target": float(cfg.bits),
        "bits/code": sum(code_bits(tensor) for tensor in quantized.tensors.values()) / weights,
        "bits/stored": 8 * sizes.packed / weights,
        "bytes/packed": sizes.packed,
        "bytes/parameters": sizes.parameters,
        "bytes/fp32": 4 * weights,
        **metrics,
        **{f"distill/{key}": value for key, value in quantized.distillation.items()},
        "risk/rank_correlation": risk_rank_correlation(layers),
        "risk/explained": explained_risk(layers, metrics["q/kl_to_fp"]),
        **{f"time/{stage}_s": value for stage, value in (quantized.seconds | dict(seconds)).items()},
        "memory/peak_rss_bytes": peak_bytes(),
        "memory/process": process(),
        "memory/estimate_bytes": estimate_bytes,
        "memory/peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "calibration/examples": len(work.subject.examples),
        "evaluation/examples": len(work.evaluation),
        **{f"fallback/{kind}": times for kind, times in fallbacks(quantized, unreached).items()},
        "config": config,
        "versions": versions(),
        "host": host(device),
        "git": git_state(),
        code_digest.KEY: code_digest.digest(code_digest.packages(config)),
        "source": {
            "dataset": work.data.source,
            "model": work.network.description,
            "weights": work.network.checksum,
            "calibration": work.subject.examples.checksum(),
            "evaluation": work.evaluation.checksum(),
            "statistics": dict(statistics),
        },
    }


def risk_rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation of predicted and achieved risk over layers; None without predictions."""
    pairs = [(row["predicted_risk"], row["achieved_risk"]) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) < 2:
        return None
    import pandas as pd

    ranks = pd.DataFrame(pairs).rank().to_numpy()
    correlation = float(np.corrcoef(ranks, rowvar=False)[0, 1])
    return None if math.isnan(correlation) else correlation


def explained_risk(rows: Sequence[Mapping[str, Any]], kl: float) -> float | None:
    """Sum of the layers' achieved risks over the measured KL to full precision; None without risks or if KL <= 0."""
    risks = [row["achieved_risk"] for row in rows if row["achieved_risk"] is not None]
    return sum(risks) / kl if risks and kl > 0 else None


def log_decisions(title: str, quantized: Quantized) -> None:
    """Log the percentage of weights of each width, and the range of the prior precisions, in one line."""
    share = Counter[int]()
    for tensor in quantized.tensors.values():
        for width in tensor.width.tolist():
            share[width] += tensor.codes.shape[1]
    widths = ", ".join(f"{width}: {100 * share[width] / share.total():.1f} %" for width in sorted(share))
    tau = sorted(p.notes["prior_precision"] for p in quantized.problems.values() if "prior_precision" in p.notes)
    prior = f"; prior precision {tau[0]:.3g} to {tau[-1]:.3g}, median {tau[len(tau) // 2]:.3g}" if tau else ""
    log.info(f"{title}: weights by width {widths}{prior}")
