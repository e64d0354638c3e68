"""One experiment from config to result, in the order the data flows.

config -> dataset and model -> calibration statistics -> method (posterior, allocation, rounding) -> QuantizedTensors
-> packed file -> the model loaded from it -> evaluation -> result.json
"""

import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from baselines.rtn import RTN
from bayesq.allocation import DAMPING, Allocator, Budget, Knapsack, Uniform, make_allocator
from bayesq.distillation import DistillationSettings, Distilled, distill, posterior_predictive
from bayesq.posterior import AUTO, LayerPosterior, Posterior
from bayesq.proxy import Kappa, measure_kappa
from bayesq.quant.accounting import code_bits, stored_bytes
from bayesq.quant.correction import MAX_EXAMPLES, Correction, correct_moments
from bayesq.quant.grids import FP16_MAX, FP16_TINY
from bayesq.quant.layers import (
    Layer,
    embedding_tables,
    kind_of,
    quantizable_layers,
    same_layer,
    weight_to_matrix,
)
from bayesq.quant.method import Distortion, LayerProblem, Method, naming, stack_groups
from bayesq.quant.tensor import QuantizedTensor
from bayesq.quant.usage import OtherUseError, Usage, usage_of
from bayesq.suite import code_digest, evaluation
from bayesq.suite.cache import resolve_cache_dir
from bayesq.suite.calibration import (
    OFFLOADED_SUM_BYTES,
    SUM_BYTES,
    Calibration,
    CalibrationSettings,
    forward_order,
)
from bayesq.suite.config import resolved, run_dir, run_id
from bayesq.suite.construct import build
from bayesq.suite.coverage import Coverage, coverage, report
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.forward import naming_model
from bayesq.suite.labels import model_label
from bayesq.suite.memory import give_back_freed, halving, peak_bytes, resident_bytes
from bayesq.suite.models.base import EncodedExamples, Network, in_one_batch, needs_no_padding, two_examples
from bayesq.suite.packed import Packed, fill, read_packed, run_record, write_packed
from bayesq.suite.prefix import PrefixInputs
from bayesq.suite.preflight import Choices, Needs, activations, check, estimate
from bayesq.suite.provenance import git_state, host, process, versions
from bayesq.suite.rehearsal import rehearse, small_problems
from bayesq.suite.results import (
    LAYERS_FILE,
    PREDICTIONS_FILE,
    QUANTIZED_FILE,
    RESULT_FILE,
    unit,
    write_csv,
    write_json,
)
from bayesq.suite.scratch import DiskShelf
from bayesq.suite.stopping import stop_if_asked
from bayesq.suite.summary import two_digits
from bayesq.suite.terminal import elapsed
from bayesq.suite.tracking import ERROR_KEY, track
from bayesq.whitening import Shelf

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
FALLBACKS = (
    "dead_columns",
    "damping_retries",
    "unseen_layers",
    "clamped_scales",
    "uncorrected_layers",
    "kappa_undefined",
    "kappa_clamped",
    "oom_retries",
)
# Geometries of layers are kept in memory where all of them take no more than this, and in a file otherwise, if the disk
# has room: where layers are wide, memory is needed for work on one of them, and reading a geometry is much cheaper than
# making it again. Without that room, as many as fit are kept. All of MiniLM's do.
KEPT_WHITENING_BYTES = 160 * 2**20
# The file is made where so many times its size are free.
SPARE_DISK = 4
# Geometries of the last run, for the next one of a sweep if it has the same posterior: by what they depend on.
_shared: dict[str, Shelf] = {}
# A distillation matches moments on the examples of so many of its batches at most: where these are halved, so is that.
START_BATCHES = 16


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
        result[ERROR_KEY] = tracker.error
        write_json(folder / RESULT_FILE, result)  # last: a run that has it is finished
        tracker.log_result(result, layers, predictions, folder / QUANTIZED_FILE)
    if tracker.error != result[ERROR_KEY]:
        result[ERROR_KEY] = tracker.error
        try:
            write_json(folder / RESULT_FILE, result)
        except (
            OSError
        ) as error:  # a disk that is full by now: the run is finished, W&B is told again by the next command
            log.warning("%s: what W&B has of it cannot be noted (%s)", folder / RESULT_FILE, error.strerror)
    metric = result["primary_metric"]
    log.info(
        f"{name} {result['method']} {result['bits/target']:g} bits, seed {result['seed']}: "
        f"{metric} {100 * result[f'q/{metric}']:.2f} {unit(metric)} ({100 * result[f'delta/{metric}']:+.2f}), "
        f"KL {two_digits(result['q/kl_to_fp'])}, {result['bits/stored']:.3f} bits stored, "
        f"{result['time/total_s']:.1f} s"
    )
    return result


class SharedPosterior:
    """A posterior that knows how long its fits took, and keeps the layers' geometries in memory and on disk.

    Attributes:
        seconds: of the fits.
        inherited: seconds that the geometries which the run before has left once took.
        inherited_bytes: what they take.
    """

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        self.statistics, self.samples, self.examples = posterior.statistics, posterior.samples, posterior.examples
        self.likelihood, self.draws = posterior.likelihood, posterior.draws
        self.rank = getattr(posterior, "rank", 16)
        self.whitenings: MutableMapping[tuple[object, ...], Any] | None = Shelf(KEPT_WHITENING_BYTES)
        self._file: DiskShelf | None = None
        self.seconds = self.inherited = 0.0
        self.inherited_bytes = 0

    def share(self, key: str) -> None:
        """Go on with the geometries of the run before, if they depend on the same, and leave all for the next run.

        Args:
            key: of all that geometries depend on beside layer and damping.
        """
        shelf = _shared.get(key, Shelf(KEPT_WHITENING_BYTES))
        _shared.clear()  # one set of them: a sweep over seeds must not fill the memory
        _shared[key] = self.whitenings = shelf
        self.inherited = sum(geometry.seconds for geometry in shelf.values())
        self.inherited_bytes = sum(geometry.nbytes for geometry in shelf.values())

    def offload(self, folder: Path) -> None:
        """Keep the geometries of all layers in a file of `folder`."""
        self.whitenings = self._file = DiskShelf(folder)

    def spill(self, folder: Path) -> None:
        """Keep them in a file of `folder` for as long as the disk has room."""
        self._file = DiskShelf(folder)
        self.whitenings = Shelf(0, self._file)

    def release(self) -> None:
        """Give back what the geometries take: everything is rounded. Those that are shared wait for the next run."""
        self.whitenings = None
        if self._file is not None:
            self._file.close()

    def prepare(self, layers: Sequence[LayerProblem]) -> None:
        """What needs all layers at once."""
        start = time.perf_counter()
        self.posterior.prepare(layers)
        self.seconds += time.perf_counter() - start

    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer."""
        start = time.perf_counter()
        give_back_freed()  # the factors of a wide layer are the largest tensors of a run
        with naming(layer):
            fitted = self.posterior.fit(layer)
        self.seconds += time.perf_counter() - start
        return fitted


@dataclass
class Plan:
    """What a run will do to its network."""

    method: Method
    posterior: SharedPosterior | None
    allocator: Allocator
    budget: Budget


@dataclass
class Workload:
    """Network and data of a run, encoded; of the network, what is quantized: layers, and embeddings if asked for.

    Attributes:
        usage: how the network uses its layers; only those that take part in its forward pass are quantized.
        coverage: what share of the network that is.
    """

    network: Network
    data: DataSplits
    usage: Usage
    embeddings: dict[str, nn.Embedding]
    coverage: Coverage
    calibration: EncodedExamples
    evaluation: EncodedExamples
    device: torch.device

    @property
    def layers(self) -> dict[str, Layer]:
        """Layers to quantize, by name, in definition order."""
        return self.usage.layers

    @property
    def alone(self) -> bool:
        """Whether a padded batch has to be taken apart into its examples before the network sees it."""
        return bool(self.usage.alone) or needs_no_padding(self.calibration)


@dataclass
class Quantized:
    """What a method made of a network.

    Attributes:
        tensors: by layer, in forward order.
        parameters: biases and norm parameters that correction and distillation changed, by state_dict name.
        problems: the layers as the method saw them, with its notes and fallbacks.
        seconds: wall time of each layer.
        calibrate_s, posterior_s, quantize_s, distill_s: cost of the stages; reused statistics and geometries count
            what they once took, and the correction belongs to quantize_s.
        reused_s: what reused statistics and geometries once took, less what reading them took.
        distilled: what the distillation found, if there was one.
        oom_retries: how often a stage began again with smaller batches because memory ran out.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, LayerProblem] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calibrate_s: float = 0.0
    posterior_s: float = 0.0
    quantize_s: float = 0.0
    distill_s: float = 0.0
    reused_s: float = 0.0
    distilled: Distilled | None = None
    oom_retries: int = 0

    def layers(self, work: Workload) -> dict[str, QuantizedTensor]:
        """The tensors of layers: embeddings are rounded once and stay."""
        return {name: tensor for name, tensor in self.tensors.items() if name in work.layers}


def execute(
    cfg: DictConfig, name: str, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The stages of a run; returns the result, the rows of layers.csv and those of predictions.csv.

    time/prepare_s is what comes before the statistics: libraries, data, network (trained or fetched at first use), its
    full-precision predictions, compilation. time/total_s is all that follows, with statistics and geometries at what
    they once took, so that neither the order of runs nor a cache that is empty changes it.
    """
    began = time.perf_counter()
    cache_dir = resolve_cache_dir(cfg.cache_dir)
    plan = make_plan(cfg)  # first: a value that no constructor accepts must not cost a model's loading
    if plan.posterior and cfg.calibration.offload == "disk":
        plan.posterior.offload(folder)
    with elapsed(f"load {cfg.model.name} and {cfg.dataset.name}"):
        work = load(cfg, cache_dir)
    if isinstance(plan.allocator, Knapsack):  # a pattern that matches nothing must not cost the calibration
        try:
            plan.allocator.choices(list(work.layers))
        except ValueError as error:
            raise UserError(str(error)) from error
    calibration = open_calibration(cfg, plan.posterior, work, cache_dir)
    if plan.posterior and cfg.calibration.offload == "memory":
        statistics = [str(calibration.path(kind)) for kind in sorted(plan.posterior.statistics)]
        plan.posterior.share(json.dumps([resolved(cfg)["posterior"], statistics]))
    needs = preflight(cfg, plan, work, calibration, {"cache_dir": cache_dir, "results_dir": folder.parent})
    if plan.posterior and needs.scratch:
        plan.posterior.spill(folder)
    batch_size, autocast = int(cfg.evaluation.batch_size), cfg.evaluation.autocast
    reference = partial(
        evaluation.cached_logits,
        work.network.module,
        work.network.identity,
        work.evaluation,
        batch_size,
        work.device,
        cache_dir,
    )
    with naming_model(cfg.model.name, "evaluating it"):
        full, retries = reference(autocast)
    check_logits(full, f"model={cfg.model.name} overflows before anything is rounded; choose other weights or data")
    unlowered = reference(None)[0] if autocast is not None else full
    with elapsed("compile"):
        few = small_problems(work.layers, kernel_positions, calibration.settings.rank)
        rehearse(make_plan(cfg), few, proxy=cfg.proxy == "mc")

    # What is done by now no method is charged with: some or all of it is much faster in a second run.
    start = time.perf_counter()
    quantized = quantize(cfg, plan, work, calibration)
    if plan.posterior:
        plan.posterior.release()
    quantized.oom_retries += retries
    if cfg.correction == "moments":
        correct(work, quantized)
    if cfg.distill:
        distill_student(cfg, plan, work, quantized)
    packed = Packed(quantized.tensors, quantized.parameters, run=run_record(cfg, work.network))
    with elapsed("pack"):
        sizes = write_packed(folder / QUANTIZED_FILE, packed)
        # Everything reported comes from the file: what could not be stored is not evaluated.
        stored = read_packed(folder / QUANTIZED_FILE)
    # The full-precision weights have served: a copy of the network would take as much memory again.
    module = work.network.module
    fill(module, stored.tensors, stored.parameters)
    evaluate_start = time.perf_counter()
    label = f"evaluate {cfg.method.name} {cfg.bits:g} bits"
    logits, retries = evaluation.logits(module, work.evaluation, batch_size, work.device, label, autocast)
    quantized.oom_retries += retries
    check_logits(logits, f"bits={cfg.bits:g} leaves no working network; choose more bits or another method")
    evaluate_s = time.perf_counter() - evaluate_start
    with elapsed("compare"):
        metrics, predictions = evaluation.compare(
            full, logits, work.evaluation.labels, int(cfg.seed), work.data.metrics, work.data.likelihood
        )
    for row, example in zip(predictions, work.data.evaluation.ids, strict=True):
        row["id"] = example
    if autocast is not None:
        metrics |= evaluation.autocast_effect(unlowered, full, work.data.likelihood)

    weights = sum(layer.weight.numel() for layer in (*work.layers.values(), *work.embeddings.values()))
    layers = layer_rows(quantized)
    result = {
        "run_id": name,
        "status": "finished",
        "model": model_label(resolved(cfg)),
        "dataset": cfg.dataset.name,
        "method": cfg.method.name,
        "posterior": cfg.posterior.name if reads_posterior(cfg) else "none",
        "allocator": cfg.allocator,
        "correction": cfg.correction,
        "seed": cfg.seed,
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
        **distillation_metrics(quantized.distilled),
        "risk/rank_correlation": risk_rank_correlation(layers),
        "time/calibrate_s": quantized.calibrate_s,
        "time/posterior_s": quantized.posterior_s,
        "time/quantize_s": quantized.quantize_s,
        "time/distill_s": quantized.distill_s,
        "time/evaluate_s": evaluate_s,
        "time/total_s": time.perf_counter() - start + quantized.reused_s,
        "time/prepare_s": start - began,
        "memory/peak_rss_bytes": peak_bytes(),
        "memory/process": process(),
        "memory/estimate_bytes": needs.memory,
        "memory/peak_device_bytes": torch.cuda.max_memory_allocated(work.device) if work.device.type == "cuda" else 0,
        "calibration/examples": len(work.calibration),
        "evaluation/examples": len(work.evaluation),
        **{f"fallback/{kind}": times for kind, times in fallbacks(quantized, len(work.usage.unreached)).items()},
        "config": resolved(cfg),
        "versions": versions(),
        "host": host(work.device),
        "git": git_state(),
        code_digest.KEY: code_digest.digests(code_digest.targets(resolved(cfg))),
        "source": {
            "dataset": work.data.source,
            "model": work.network.description,
            "weights": work.network.checksum,
            "calibration": work.calibration.checksum(),
            "evaluation": work.evaluation.checksum(),
        },
    }
    return result, layers, predictions


def load(cfg: DictConfig, cache_dir: Path) -> Workload:
    """Data, network and the encoded calibration and evaluation examples.

    Raises:
        UserError: the calibration set cannot be drawn, no layer is left to quantize, there are no embeddings to
            include, or the network has weights that are no numbers.
    """
    device = select_device(cfg.device)
    data = build(cfg.dataset).load(cache_dir)
    with naming_model(cfg.model.name, "building it"):
        network = build(cfg.model).build(data, cache_dir)
    check_network(network.module, cfg.model.name)
    network.module.to(device)
    try:
        examples = data.calibration(cfg.calibration.examples, cfg.seed)
        layers = quantizable_layers(network.module, list(cfg.layers.exclude))
    except ValueError as error:
        raise UserError(str(error)) from error
    embeddings = embedding_tables(network.module, list(cfg.layers.exclude)) if cfg.layers.include_embeddings else {}
    if cfg.layers.include_embeddings and not embeddings:
        raise UserError(f"layers.include_embeddings=true: model={cfg.model.name} has no embedding left to quantize")
    with naming_model(cfg.model.name, "encoding its inputs"):
        calibration, evaluation = network.encode(examples), network.encode(data.evaluation)
    with naming_model(cfg.model.name, "its forward pass"):
        try:
            more = (batch.inputs for batch in calibration.batches(int(cfg.calibration.batch_size), device))
            usage = usage_of(network.module, layers, two_examples(calibration, device).inputs, more)
        except OtherUseError as error:
            raise UserError(f"model={cfg.model.name}: {error}") from error
    if not usage.layers:
        raise UserError(f"model={cfg.model.name}: no layer takes part in the forward pass: choose another model")
    covered = coverage(network.module, {**usage.layers, **embeddings})
    report(covered, network.module, usage.unreached)
    return Workload(network, data, usage, embeddings, covered, calibration, evaluation, device)


def check_network(module: nn.Module, name: str) -> None:
    """Refuse parameters and statistics of norms that are no numbers: whatever is measured with them would be none.

    Args:
        name: of the model, for the message.

    Raises:
        UserError: NaN or infinite entries, or a variance below zero; the message names the first.
    """
    running = ("running_mean", "running_var")
    buffers = ((key, buffer) for key, buffer in module.named_buffers() if key.rpartition(".")[2] in running)
    for key, tensor in (*module.named_parameters(), *buffers):
        if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor.detach())):
            raise UserError(f"model={name}: {key} has NaN or infinite entries: choose other weights")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise UserError(f"model={name}: {key} has variances below zero: choose other weights")


def check_logits(logits: Tensor, remedy: str) -> None:
    """Refuse predictions that are no numbers, before metrics of them pass for results.

    Args:
        logits: [n, classes].
        remedy: what the message ends with.

    Raises:
        UserError: some are NaN or infinite.
    """
    wrong = int((~torch.isfinite(logits)).any(1).sum())
    if wrong:
        raise UserError(f"logits are NaN or infinite for {wrong} of {len(logits)} evaluation examples: {remedy}")


def make_plan(cfg: DictConfig) -> Plan:
    """Instantiate method, posterior and allocator.

    Raises:
        UserError: a constructor refused an argument.
    """
    posterior = SharedPosterior(build(cfg.posterior)) if reads_posterior(cfg) else None
    method = build(cfg.method, **({"posterior": posterior} if cfg.method.get("uses_posterior") else {}))
    try:
        damping = cfg.method.get("damping", DAMPING)
        allocator = make_allocator(cfg.allocator, posterior, **resolved(cfg)["allocation"], damping=damping)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Plan(method, posterior, allocator, Budget(float(cfg.bits), cfg.budget.count))


def statistics_of(plan: Plan) -> frozenset[str]:
    """Names of the statistics that a run reads from disk."""
    method, posterior = plan.method, plan.posterior
    kinds = plan.allocator.statistics | (posterior.statistics if posterior else frozenset())
    return kinds if method.sequential and not posterior else kinds | method.statistics


def open_calibration(
    cfg: DictConfig, posterior: SharedPosterior | None, work: Workload, cache_dir: Path
) -> Calibration:
    """The calibration statistics that a run with this posterior reads; nothing is computed yet."""
    settings = CalibrationSettings(
        1 if work.usage.alone else int(cfg.calibration.batch_size),
        posterior.samples if posterior else None,
        int(cfg.seed),
        gradient_examples=posterior.examples if posterior else None,
        likelihood=likelihood_of_fisher(posterior, work.data.likelihood),
        draws=posterior.draws if posterior else "signs",
        rank=posterior.rank if posterior else 16,
    )
    room = OFFLOADED_SUM_BYTES if cfg.calibration.offload == "disk" else SUM_BYTES
    network = work.network
    return Calibration(
        network.module,
        network.identity,
        work.layers,
        work.calibration,
        settings,
        cache_dir,
        work.device,
        room,
        work.usage.overwritten,
    )


def preflight(
    cfg: DictConfig, plan: Plan, work: Workload, calibration: Calibration, folders: Mapping[str, Path]
) -> Needs:
    """Say what memory and disk the run will need, and return it.

    Raises:
        UserError: it cannot fit.
    """
    first = [next(examples.batches(1, work.device)).inputs for examples in (work.calibration, work.evaluation)]
    with naming_model(cfg.model.name, "its forward pass"):
        small, large = (activations(work.network.module, inputs) for inputs in first)
    offload = cfg.calibration.offload == "disk"
    kinds = statistics_of(plan)
    choices = Choices(
        kinds=sorted(kinds),
        posterior=cfg.posterior.name if plan.posterior else None,
        rank=calibration.settings.rank,
        bits=float(cfg.bits),
        calibration_batch=calibration.settings.batch_size,
        evaluation_batch=int(cfg.evaluation.batch_size),
        distillation_batch=int(cfg.distillation.batch_size) if cfg.distill else None,
        corrected=min(MAX_EXAMPLES, len(work.calibration)) if cfg.correction == "moments" else 0,
        sequential=plan.method.sequential,
        examples=len(work.calibration),
        offload=offload,
        room=calibration.room,
        kept=KEPT_WHITENING_BYTES,
        scratch=int(shutil.disk_usage(folders["results_dir"]).free // SPARE_DISK),
        inherited=plan.posterior.inherited_bytes if plan.posterior else 0,
    )
    needs = estimate(
        resident_bytes(),
        work.network.module,
        work.layers,
        choices,
        small,
        large,
        calibration.missing(kinds),
        work.device.type != "cpu",
    )
    check(needs, folders, cfg.resources.memory, offload)
    return needs


def layer_problems(work: Workload, calibration: Calibration, groups: Sequence[Sequence[str]]) -> list[LayerProblem]:
    """The layers as methods see them, in forward order.

    Args:
        groups: names of the layers, of `forward_order`.
    """
    return [
        LayerProblem(
            name=name,
            kind=kind_of(work.layers[name]),
            weight=weight_to_matrix(work.layers[name]).float().cpu(),
            statistic=partial(calibration.statistic, name),
            positions_per_channel=kernel_positions(work.layers[name]),
        )
        for group in groups
        for name in group
    ]


def quantize(cfg: DictConfig, plan: Plan, work: Workload, calibration: Calibration) -> Quantized:
    """Statistics, then the method over all layers.

    Raises:
        UserError: no allocation meets the budget, or a layer's weights or statistics are not finite.
    """
    method, posterior, allocator = plan.method, plan.posterior, plan.allocator
    module, layers, examples, device = work.network.module, work.layers, work.calibration, work.device
    asked = time.perf_counter()
    try:
        with elapsed("statistics"):
            calibration.prepare(statistics_of(plan))
    except ValueError as error:
        raise UserError(str(error)) from error
    prepared, inherited = time.perf_counter(), posterior.inherited if posterior else 0.0
    if calibration.unseen:  # a statistic that nothing was measured for must not decide widths
        raise UserError(
            f"no calibration example reaches {', '.join(sorted(calibration.unseen))}: add them to layers.exclude, or "
            "raise calibration.examples"
        )

    groups = forward_order(module, layers, next(examples.batches(1, device)))
    problems = layer_problems(work, calibration, groups)
    result = Quantized(problems={problem.name: problem for problem in problems})
    result.reused_s = calibration.total_s + inherited - (prepared - asked)
    round_embeddings(work, plan.budget, result)
    given: list[LayerProblem] = problems
    prefix: PrefixInputs | None = None
    if method.sequential:
        # A copy whose layers are replaced one by one. Only the method sees its inputs: bits are allocated before
        # anything is rounded.
        working = quantized_copy(work, result)
        own = {name: same_layer(layer, working, name) for name, layer in layers.items()}
        size, calls = calibration.settings.batch_size, work.usage.calls
        prefix = PrefixInputs(working, work.network.blocks, own, groups, examples, size, device, calls)
        given = [replace(problem, prefix_statistic=partial(prefix.statistic, problem.name)) for problem in problems]

    start = time.perf_counter()
    try:
        if posterior:
            with elapsed("posterior"):
                posterior.prepare(problems)
        if cfg.proxy == "mc":
            result.oom_retries += weigh_by_proxy(cfg, plan, work, problems)
    except ValueError as error:
        raise UserError(str(error)) from error
    result.posterior_s = time.perf_counter() - start + inherited
    fitted = posterior.seconds if posterior else 0.0

    def allocate(
        layers: Sequence[LayerProblem], codebook_bits: int = 0, distortion: Distortion | None = None
    ) -> Mapping[str, Tensor]:
        return allocator.allocate(problems, plan.budget, codebook_bits, distortion)

    bar = tqdm(total=len(problems), desc=f"quantize {cfg.method.name} {cfg.bits:g} bits", disable=None, leave=False)
    start = last = time.perf_counter()
    with bar:
        try:
            for problem, tensor in method.quantize(given, allocate):
                stop_if_asked()
                result.tensors[problem.name] = tensor
                problem.count("clamped_scales", clamped_scales(problem.weight, tensor))
                if prefix:
                    fill(prefix.module, {problem.name: tensor})
                now = time.perf_counter()
                result.seconds[problem.name], last = now - last, now
                bar.update()
        except ValueError as error:
            raise UserError(str(error)) from error
    result.oom_retries += sum(calibration.oom_retries.values()) + (prefix.oom_retries if prefix else 0)
    fits = posterior.seconds - fitted if posterior else 0.0
    result.posterior_s += fits
    result.calibrate_s = calibration.total_s + (prefix.seconds if prefix else 0.0)
    result.quantize_s += last - start - fits - (prefix.seconds if prefix else 0.0)
    if posterior:
        for problem in tqdm(problems, desc="achieved risk", disable=None, leave=False):
            delta = result.tensors[problem.name].dequantize() - problem.weight
            problem.notes["achieved_risk"] = float(posterior.fit(problem).risk(delta).sum())
    _report(cfg, result)
    return result


def clamped_scales(weight: Tensor, tensor: QuantizedTensor) -> int:
    """Rows whose weights need a larger or a smaller step than fp16 has, and got the last one there is.

    Args:
        weight: [g, r, c] that `tensor` stands for; rows that are all zero need no step.
    """
    scale = tensor.scale.to(torch.float32)
    clamped = ((scale >= FP16_MAX) | (scale <= FP16_TINY)).any(1)
    return int((clamped & (stack_groups(weight) != 0).any(1)).sum())


def round_embeddings(work: Workload, budget: Budget, result: Quantized) -> None:
    """Round the embeddings the run includes to nearest, each row on its own grid, for every method alike.

    A row is read by itself and multiplies nothing, so there are no input correlations to exploit; a fractional budget
    gives some rows the next width, those whose error falls most.

    Raises:
        UserError: a table has NaN or infinite entries, or the budget does not allow the smallest width.
    """
    problems = [
        LayerProblem(name, type(table).__name__, weight_to_matrix(table).float().cpu(), statistic=_no_statistic)
        for name, table in work.embeddings.items()
    ]
    if not problems:
        return
    start = time.perf_counter()
    try:
        for problem, tensor in RTN("mse").quantize(problems, lambda layers, *_: Uniform().allocate(layers, budget)):
            result.problems[problem.name], result.tensors[problem.name] = problem, tensor
            problem.count("clamped_scales", clamped_scales(problem.weight, tensor))
            result.seconds[problem.name] = time.perf_counter() - start
            result.quantize_s += result.seconds[problem.name]
            start = time.perf_counter()
    except ValueError as error:
        raise UserError(str(error)) from error


def _no_statistic(kind: str) -> Tensor:
    raise ValueError(f"embeddings have no statistic {kind}")


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
                "kappa": problem.notes.get("kappa", 1.0),
                "prior_precision": problem.notes.get("prior_precision"),
                "effective_parameters": problem.notes.get("effective_parameters"),
                "seconds": quantized.seconds[name],
            }
        )
    return rows


def quantized_copy(work: Workload, quantized: Quantized) -> nn.Module:
    """The network with what has been quantized and corrected so far."""
    module = copy.deepcopy(work.network.module)
    fill(module, quantized.tensors, quantized.parameters)
    return module


def correct(work: Workload, quantized: Quantized) -> None:
    """Match activation moments to the full-precision network's (SPEC section 5), whatever the method."""
    start = time.perf_counter()
    batch = in_one_batch(work.calibration, len(work.calibration), CPU)

    def attempt(examples: int) -> Correction:
        student = quantized_copy(work, quantized)
        return correct_moments(work.network.module, student, list(work.layers), batch.inputs, examples, work.alone)

    try:
        with elapsed("match moments"):
            found, retries = halving(min(MAX_EXAMPLES, len(work.calibration)), attempt, "correction")
    except ValueError as error:
        raise UserError(f"correction=moments is not possible ({error}): choose correction=none") from error
    quantized.oom_retries += retries
    quantized.parameters |= found.tensors
    for name in found.uncorrected:
        quantized.problems[name].count("uncorrected_layers")
    quantized.quantize_s += time.perf_counter() - start


def distill_student(cfg: DictConfig, plan: Plan, work: Workload, quantized: Quantized) -> None:
    """Train scales, levels, biases and norms towards the posterior-predictive teacher, whatever the method.

    Raises:
        UserError: the settings or the calibration set do not allow it.
    """
    start = time.perf_counter()
    options = {key: cfg.distillation[key] for key in ("steps", "evaluations", "held_out")}
    # Methods without a posterior learn from the full-precision network itself: the teacher at its mean.
    samples = int(cfg.distillation.samples) if plan.posterior else 0
    tensors, likelihood = quantized.layers(work), work.data.likelihood

    def attempt(batch_size: int) -> Distilled:
        batches = list(work.calibration.batches(batch_size, CPU))  # each goes to the device in turn
        generator = torch.Generator().manual_seed(int(cfg.seed))
        draw = posterior_draw(plan, quantized.problems)
        teacher = posterior_predictive(work.network.module, tensors, draw, batches, samples, generator, likelihood)
        moments = None
        # moments that correction=moments has matched already have no second start to offer
        if cfg.distillation.moments and cfg.correction == "none":
            moments = moment_start(work, quantized, START_BATCHES * batch_size)
        student = quantized_copy(work, quantized)
        return distill(student, tensors, batches, teacher, settings, generator, moments, likelihood)

    try:
        settings = DistillationSettings(**options)
        found, retries = halving(int(cfg.distillation.batch_size), attempt, "distillation")
    except ValueError as error:
        raise UserError(str(error)) from error
    quantized.oom_retries += retries
    quantized.tensors |= found.tensors
    quantized.distilled = found
    quantized.parameters |= found.parameters
    quantized.distill_s = time.perf_counter() - start
    log.info(
        f"distillation: {'moments matched, ' if found.started else ''}step {found.best_step} of {found.steps} kept, "
        f"held-out KL {two_digits(found.heldout_kl_before)} -> {two_digits(found.heldout_kl_after)}"
    )


def moment_start(work: Workload, quantized: Quantized, examples: int) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Biases and norm parameters that match activation moments on some calibration examples, told by bool [n].

    Args:
        examples: so many of them at most.
    """

    def start(chosen: Tensor) -> Mapping[str, Tensor]:
        batch = in_one_batch(work.calibration, len(work.calibration), CPU)
        rows = chosen[batch.index]
        inputs = {name: x[rows] for name, x in batch.inputs.items()}
        student = quantized_copy(work, quantized)
        layers, most = list(work.layers), min(examples, MAX_EXAMPLES)
        try:
            return correct_moments(work.network.module, student, layers, inputs, most, work.alone).tensors
        except ValueError as error:
            raise UserError(f"distillation.moments=true is not possible ({error}): set it to false") from error

    return start


def posterior_draw(plan: Plan, problems: Mapping[str, LayerProblem]) -> Callable[[str, torch.Generator], Tensor]:
    """Draws w - mu [g, r, c] of a layer by name; nothing is drawn for runs without a posterior."""

    def draw(name: str, generator: torch.Generator) -> Tensor:
        assert plan.posterior is not None
        with naming(problems[name]):
            return plan.posterior.fit(problems[name]).sample(generator)

    return draw


def distillation_metrics(distilled: Distilled | None) -> dict[str, Any]:
    """Result keys of a distillation; none without one."""
    if distilled is None:
        return {}
    return {
        "distill/best_step": distilled.best_step,
        "distill/moments": distilled.started,
        "distill/heldout_kl_before": distilled.heldout_kl_before,
        "distill/heldout_kl_after": distilled.heldout_kl_after,
    }


def weigh_by_proxy(cfg: DictConfig, plan: Plan, work: Workload, problems: Sequence[LayerProblem]) -> int:
    """Note kappa in each layer: measured divergence over predicted risk at one width (SPEC section 5).

    Returns:
        how often it began again with smaller batches because memory ran out.

    Raises:
        UserError: the run allocates nothing by risk.
    """
    knapsack = plan.allocator
    if not isinstance(knapsack, Knapsack) or plan.posterior is None:
        raise UserError("proxy=mc weighs predicted risks: it needs allocator=knapsack")
    options, widths = cfg.monte_carlo, knapsack.widths
    width = min(widths, key=lambda w: (abs(w - float(cfg.bits)), w))
    predicted = {p.name: float(knapsack.predict(p)[:, widths.index(width)].sum()) for p in problems}
    by_name = {problem.name: problem for problem in problems}
    batch = in_one_batch(work.calibration, int(options.examples), work.device)
    alone = needs_no_padding(work.calibration)

    def attempt(batch_size: int) -> Kappa:
        return measure_kappa(
            work.network.module,
            list(by_name),
            lambda name: knapsack.rounded(by_name[name], width),
            posterior_draw(plan, by_name),
            predicted,
            batch.inputs,
            int(options.samples),
            torch.Generator().manual_seed(int(cfg.seed)),
            work.data.likelihood,
            batch_size,
            alone,
        )

    found, retries = halving(len(batch.labels), attempt, "proxy")
    for name, kappa in found.factors.items():
        by_name[name].notes["kappa"] = kappa
    for kind, times in found.fallbacks.items():
        problems[0].count(kind, times)
    return retries


def risk_rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation of predicted and achieved risk over layers; None without predictions."""
    pairs = [
        (row["predicted_risk"], row["achieved_risk"])
        for row in rows
        if row["predicted_risk"] is not None and row["achieved_risk"] is not None
    ]
    if len(pairs) < 2:
        return None
    import pandas as pd

    ranks = pd.DataFrame(pairs).rank().to_numpy()
    correlation = float(np.corrcoef(ranks, rowvar=False)[0, 1])
    return None if math.isnan(correlation) else correlation


def reads_posterior(cfg: DictConfig) -> bool:
    """Whether the run computes a posterior: its method asks for one, or the knapsack needs predicted risks."""
    return cfg.allocator == "knapsack" or cfg.method.get("uses_posterior") is True


def likelihood_of_fisher(posterior: SharedPosterior | None, of_data: str) -> str:
    """The likelihood that the Fisher is of: the data set's, unless posterior.likelihood names one.

    Raises:
        UserError: a categorical likelihood of a single output has no Fisher.
    """
    if posterior is None or posterior.likelihood == AUTO:
        return of_data
    if of_data == "gaussian" and posterior.likelihood == "categorical":
        raise UserError("posterior.likelihood=categorical: a regression has a gaussian likelihood; leave it at auto")
    return posterior.likelihood


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


def fallbacks(quantized: Quantized, unseen: int = 0) -> dict[str, int]:
    """How often something else than asked was done, of each kind in FALLBACKS.

    Args:
        unseen: layers that take no part in the forward pass and stay in full precision.
    """
    total = dict.fromkeys(FALLBACKS, 0) | {"oom_retries": quantized.oom_retries, "unseen_layers": unseen}
    for problem in quantized.problems.values():
        for kind, times in problem.fallbacks.items():
            total[kind] += times
    return total
