"""One experiment from config to result, in the order the data flows.

config -> dataset and model -> calibration statistics -> method (posterior, allocation, rounding) -> QuantizedTensors
-> packed file -> the model loaded from it -> evaluation -> result.json
"""

import copy
import logging
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bayesq.allocation import Allocator, Budget, make_allocator
from bayesq.posterior import LayerPosterior, Posterior
from bayesq.quant.accounting import buffer_bytes, code_bits, stored_bytes
from bayesq.quant.layers import Layer, matrix_to_weight, quantizable_layers, weight_to_matrix
from bayesq.quant.method import LayerProblem, Method
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.suite import evaluation
from bayesq.suite.cache import read_tensors, resolve_cache_dir, write_tensors
from bayesq.suite.calibration import Calibration, CalibrationSettings, SequentialInputs, forward_order
from bayesq.suite.config import resolved, run_dir, run_id
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import EncodedExamples, Network
from bayesq.suite.provenance import git_state, host, versions
from bayesq.suite.results import RESULT_FILE, write_csv, write_json
from bayesq.suite.tracking import track

log = logging.getLogger(__name__)

QUANTIZED_FILE = "quantized.safetensors"
LAYERS_FILE = "layers.csv"
PREDICTIONS_FILE = "predictions.csv"
# Keys of a group that describe a choice and are not arguments of its constructor.
DESCRIPTIVE = ("name", "modality", "allocator", "uses_posterior")
FALLBACKS = ("dead_columns", "damping_retries", "unseen_layers")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Execute one configuration and write its files; returns the flat result of the contract (SPEC section 8).

    Raises:
        UserError: the configuration cannot be run; the message names the key.
    """
    folder, name = run_dir(cfg), run_id(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with logging_redirect_tqdm(), track(cfg, name, folder) as tracker:
        result, layers, predictions = execute(cfg, name, folder)
        write_csv(folder / LAYERS_FILE, layers)
        write_csv(folder / PREDICTIONS_FILE, predictions)
        write_json(folder / RESULT_FILE, result)  # last: a run that has it is finished
        tracker.log_result(result, layers)
    metric = result["primary_metric"]
    log.info(
        f"{name} {result['method']} {result['bits/target']:g} bits, seed {result['seed']}: "
        f"{metric} {100 * result[f'q/{metric}']:.2f} % ({100 * result[f'delta/{metric}']:+.2f}), "
        f"KL {result['q/kl_to_fp']:.4f}, {result['bits/stored']:.3f} bits stored, {result['time/total_s']:.1f} s"
    )
    return result


class TimedPosterior:
    """A posterior that knows how long its fits took."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        self.statistics, self.samples = posterior.statistics, posterior.samples
        self.seconds = 0.0

    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer."""
        start = time.perf_counter()
        fitted = self.posterior.fit(layer)
        self.seconds += time.perf_counter() - start
        return fitted


@dataclass
class Plan:
    """What a run will do to its network."""

    method: Method
    posterior: TimedPosterior | None
    allocator: Allocator
    budget: Budget


@dataclass
class Workload:
    """Network and data of a run, encoded."""

    network: Network
    data: DataSplits
    layers: dict[str, Layer]
    calibration: EncodedExamples
    evaluation: EncodedExamples
    device: torch.device


@dataclass
class Quantized:
    """What a method made of a network.

    Attributes:
        tensors: by layer, in forward order.
        problems: the layers as the method saw them, with its notes and fallbacks.
        seconds: wall time of each layer.
        calibrate_s, posterior_s, quantize_s: cost of the stages; reused statistics count what they once took.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    problems: dict[str, LayerProblem] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calibrate_s: float = 0.0
    posterior_s: float = 0.0
    quantize_s: float = 0.0


def execute(
    cfg: DictConfig, name: str, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The stages of a run; returns the result, the rows of layers.csv and those of predictions.csv."""
    start = time.perf_counter()
    cache_dir = resolve_cache_dir(cfg.cache_dir)
    plan = make_plan(cfg)  # first: a value that no constructor accepts must not cost a model's loading
    work = load(cfg, cache_dir)
    batch_size = int(cfg.evaluation.batch_size)
    full = evaluation.cached_logits(
        work.network.module, work.network.checksum, work.evaluation, batch_size, work.device, cache_dir
    )

    quantized = quantize(cfg, plan, work, cache_dir)
    buffers, header = pack_model(quantized.tensors)
    write_tensors(folder / QUANTIZED_FILE, buffers, header)

    # Everything reported comes from the file: what could not be stored is not evaluated.
    buffers, header = read_tensors(folder / QUANTIZED_FILE)
    module = copy.deepcopy(work.network.module)
    load_quantized(module, unpack_model(buffers, header))
    evaluate_start = time.perf_counter()
    label = f"evaluate {cfg.method.name} {cfg.bits:g} bits"
    logits = evaluation.logits(module, work.evaluation, batch_size, work.device, label)
    evaluate_s = time.perf_counter() - evaluate_start
    metrics, predictions = evaluation.compare(full, logits, work.evaluation.labels, int(cfg.seed))
    for row, example in zip(predictions, work.data.evaluation.ids, strict=True):
        row["id"] = example

    weights = sum(layer.weight.numel() for layer in work.layers.values())
    layers = layer_rows(quantized)
    result = {
        "run_id": name,
        "status": "finished",
        "model": cfg.model.name,
        "dataset": cfg.dataset.name,
        "method": cfg.method.name,
        "posterior": cfg.posterior.name if reads_posterior(cfg) else "none",
        "allocator": cfg.allocator,
        "correction": "none",
        "seed": cfg.seed,
        "primary_metric": work.data.primary_metric,
        "bits/target": float(cfg.bits),
        "bits/code": sum(code_bits(tensor) for tensor in quantized.tensors.values()) / weights,
        "bits/stored": 8 * buffer_bytes(buffers) / weights,
        "bytes/packed": buffer_bytes(buffers),
        "bytes/fp32": 4 * weights,
        **metrics,
        "time/calibrate_s": quantized.calibrate_s,
        "time/posterior_s": quantized.posterior_s,
        "time/quantize_s": quantized.quantize_s,
        "time/distill_s": 0.0,
        "time/evaluate_s": evaluate_s,
        "time/total_s": time.perf_counter() - start,
        "memory/peak_rss_bytes": peak_rss_bytes(),
        "calibration/examples": len(work.calibration),
        "evaluation/examples": len(work.evaluation),
        **{f"fallback/{kind}": fallbacks(quantized.problems.values()).get(kind, 0) for kind in FALLBACKS},
        "config": resolved(cfg),
        "versions": versions(),
        "host": host(work.device),
        "git": git_state(),
        "source": {"dataset": work.data.source, "model": work.network.description, "weights": work.network.checksum},
    }
    return result, layers, predictions


def load(cfg: DictConfig, cache_dir: Path) -> Workload:
    """Data, network and the encoded calibration and evaluation examples.

    Raises:
        UserError: the calibration set cannot be drawn, or no layer is left to quantize.
    """
    device = select_device(cfg.device)
    data = build(cfg.dataset).load(cache_dir)
    network = build(cfg.model).build(data, cache_dir)
    network.module.to(device)
    try:
        examples = data.calibration(cfg.calibration.examples, cfg.seed)
        layers = quantizable_layers(network.module, list(cfg.layers.exclude))
    except ValueError as error:
        raise UserError(str(error)) from error
    return Workload(network, data, layers, network.encode(examples), network.encode(data.evaluation), device)


def make_plan(cfg: DictConfig) -> Plan:
    """Instantiate method, posterior and allocator.

    Raises:
        UserError: a constructor refused an argument.
    """
    posterior = TimedPosterior(build(cfg.posterior)) if reads_posterior(cfg) else None
    method = build(cfg.method, **({"posterior": posterior} if cfg.method.get("uses_posterior") else {}))
    allocator = make_allocator(cfg.allocator, posterior, cfg.allocation.block, list(cfg.allocation.widths))
    return Plan(method, posterior, allocator, Budget(float(cfg.bits), cfg.budget.count))


def quantize(cfg: DictConfig, plan: Plan, work: Workload, cache_dir: Path) -> Quantized:
    """Statistics, then the method over all layers.

    Raises:
        UserError: no allocation meets the budget, or a layer's weights or statistics are not finite.
    """
    method, posterior, allocator = plan.method, plan.posterior, plan.allocator
    module, layers, examples, device = work.network.module, work.layers, work.calibration, work.device
    samples = posterior.samples if posterior else None
    settings = CalibrationSettings(int(cfg.calibration.batch_size), samples, int(cfg.seed))
    calibration = Calibration(module, work.network.checksum, layers, examples, settings, cache_dir, device)
    kinds = allocator.statistics | (posterior.statistics if posterior else frozenset())
    calibration.prepare(kinds if method.sequential else kinds | method.statistics)

    groups = forward_order(module, layers, next(examples.batches(settings.batch_size, device)))
    problems = [
        LayerProblem(
            name=name,
            kind=type(layers[name]).__name__,
            weight=weight_to_matrix(layers[name]).float().cpu(),
            statistic=partial(calibration.statistic, name),
            positions_per_channel=kernel_positions(layers[name]),
            fallbacks={"unseen_layers": 1} if name in calibration.unseen else {},
        )
        for group in groups
        for name in group
    ]
    given: list[LayerProblem] = problems
    prefix: SequentialInputs | None = None
    if method.sequential:
        # A copy whose layers are replaced one by one. Only the method sees its inputs: bits are allocated before
        # anything is rounded.
        working = copy.deepcopy(module)
        own = {name: layer for name, layer in quantizable_layers(working).items() if name in layers}
        prefix = SequentialInputs(working, own, groups, examples, settings.batch_size, device)
        given = [replace(problem, statistic=partial(prefix.statistic, problem.name)) for problem in problems]

    def allocate(layers: Sequence[LayerProblem], codebook_bits: int = 0) -> Mapping[str, Tensor]:
        # `problems`, not `layers`: risks come from the full-precision statistics for sequential methods too.
        return allocator.allocate(problems, plan.budget, codebook_bits)

    result = Quantized(problems={problem.name: problem for problem in problems})
    bar = tqdm(total=len(problems), desc=f"quantize {cfg.method.name} {cfg.bits:g} bits", disable=None, leave=False)
    start = last = time.perf_counter()
    with bar:
        try:
            for problem, tensor in method.quantize(given, allocate):
                result.tensors[problem.name] = tensor
                if prefix:
                    load_quantized(prefix.module, {problem.name: tensor})
                now = time.perf_counter()
                result.seconds[problem.name], last = now - last, now
                bar.update()
        except ValueError as error:
            raise UserError(str(error)) from error
    result.posterior_s = posterior.seconds if posterior else 0.0
    result.calibrate_s = sum(calibration.seconds.values()) + (prefix.seconds if prefix else 0.0)
    result.quantize_s = last - start - result.posterior_s - (prefix.seconds if prefix else 0.0)
    if posterior:
        for problem in problems:
            delta = result.tensors[problem.name].dequantize() - problem.weight
            problem.notes["achieved_risk"] = float(posterior.fit(problem).risk(delta).sum())
    _report(cfg, result)
    return result


def _report(cfg: DictConfig, result: Quantized) -> None:
    """One line on what was decided: how many weights got which width, and the prior precisions."""
    share: dict[int, int] = {}
    for tensor in result.tensors.values():
        for width, rows in zip(*(column.tolist() for column in tensor.width.unique(return_counts=True)), strict=True):
            share[width] = share.get(width, 0) + rows * tensor.codes.shape[1]
    total = sum(share.values())
    widths = ", ".join(f"{width}: {100 * share[width] / total:.1f} %" for width in sorted(share))
    tau = sorted(p.notes["prior_precision"] for p in result.problems.values() if "prior_precision" in p.notes)
    prior = f"; prior precision {tau[0]:.3g} to {tau[-1]:.3g}, median {tau[len(tau) // 2]:.3g}" if tau else ""
    log.info(f"{cfg.method.name} {cfg.bits:g} bits: weights by width {widths}{prior}")


def layer_rows(quantized: Quantized) -> list[dict[str, Any]]:
    """The rows of layers.csv; risks in nats per example, empty where the run has no posterior."""
    rows = []
    for name, tensor in quantized.tensors.items():
        problem = quantized.problems[name]
        weights = problem.weight.numel()
        rows.append(
            {
                "name": name,
                "kind": problem.kind,
                "shape": "x".join(str(size) for size in problem.weight.shape),
                "bits/code": code_bits(tensor) / weights,
                "bits/stored": 8 * stored_bytes(tensor) / weights,
                "predicted_risk": problem.notes.get("predicted_risk"),
                "achieved_risk": problem.notes.get("achieved_risk"),
                "kappa": 1.0,  # the factor of proxy=none
                "prior_precision": problem.notes.get("prior_precision"),
                "effective_parameters": problem.notes.get("effective_parameters"),
                "seconds": quantized.seconds[name],
            }
        )
    return rows


def load_quantized(module: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Replace layers' weights by what their QuantizedTensors stand for; biases and everything else stay."""
    layers = dict(module.named_modules())
    for name, tensor in tensors.items():
        layer = layers[name]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        with torch.no_grad():
            layer.weight.copy_(matrix_to_weight(layer, tensor.dequantize()))


def build(node: DictConfig, **more: Any) -> Any:
    """Instantiate a config group without its descriptive keys.

    Raises:
        UserError: the constructor refused a value.
    """
    arguments = {key: value for key, value in node.items() if key not in DESCRIPTIVE}
    try:
        return instantiate(arguments, **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise UserError(str(error.__cause__)) from error
        raise


def reads_posterior(cfg: DictConfig) -> bool:
    """Whether the run computes a posterior: its method asks for one, or the knapsack needs predicted risks."""
    return cfg.allocator == "knapsack" or cfg.method.get("uses_posterior") is True


def select_device(name: str) -> torch.device:
    """The torch device of the key `device`; auto prefers cuda, then mps."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def kernel_positions(layer: Layer) -> int:
    """kh * kw of a convolution, 1 for Linear: neighbouring columns that read the same input channel."""
    return layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1


def fallbacks(problems: Iterable[LayerProblem]) -> dict[str, int]:
    """Fallback counters summed over layers."""
    total: dict[str, int] = {}
    for problem in problems:
        for kind, times in problem.fallbacks.items():
            total[kind] = total.get(kind, 0) + times
    return total


def peak_rss_bytes() -> int:
    """Largest resident size of the process so far, in bytes (a multirun in one process reports the largest run)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
