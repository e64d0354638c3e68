"""One experiment from config to result, in the order the data flows.

config -> dataset and model -> calibration statistics -> method (posterior, allocation, rounding) -> QuantizedTensors
-> packed file -> the network loaded from it -> evaluation -> result.json
"""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from bayesq.evaluation import Rows as EvaluationRows
from bayesq.evaluation import compare, paired_rows, prediction_rows
from bayesq.likelihood import Categorical
from bayesq.metrics import metric_of
from bayesq.observer import Observer
from bayesq.pipeline import quantize_network
from bayesq.posterior import WhiteningStore
from bayesq.progress import elapsed
from bayesq.quant.file import Packed, read_packed, write_packed
from bayesq.quant.network import quantized_copy
from bayesq.report import layer_rows
from bayesq.suite import results
from bayesq.suite.config import resolve_cache_dir, run_dir
from bayesq.suite.errors import UserError
from bayesq.suite.full_precision import cached_logits, cached_scores
from bayesq.suite.packed import run_record
from bayesq.suite.plan import check_patterns, for_user, load_workload, make_recipe, open_statistics, placed_whitenings
from bayesq.suite.preflight import preflight
from bayesq.suite.provenance import git_diff
from bayesq.suite.record import flat_result, log_decisions
from bayesq.suite.rehearsal import rehearse
from bayesq.suite.summary import two_digits
from bayesq.suite.tracking import ERROR_KEY, track
from bayesq.suite.workload import Workload, check_finite, naming_model, warn_below_chance
from bayesq.suite.zeroshot import Answers, ZeroShot, open_zeroshot

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def run(cfg: DictConfig, previous: list[WhiteningStore] | None = None) -> dict[str, Any]:
    """Execute one configuration and write its files; returns the flat result.

    `cfg` is composed and validated. The runs of one command share `previous`, see `placed_whitenings`.

    Raises:
        UserError: the configuration cannot be run; the message names the key.
    """
    folder = run_dir(cfg)
    name = folder.name
    folder.mkdir(parents=True, exist_ok=True)
    keep_diff(cfg, folder / results.DIFF_FILE)
    with logging_redirect_tqdm(), track(cfg, name, folder) as tracker:
        result, layers, predictions = execute(cfg, folder, [] if previous is None else previous, tracker.history)
        results.write_csv(folder / results.LAYERS_FILE, layers)
        results.write_csv(folder / results.PREDICTIONS_FILE, predictions)
        result[ERROR_KEY] = tracker.error
        results.write_json(folder / results.RESULT_FILE, result)  # written last: it marks the run as finished
        tracker.log_result(result, layers, predictions, folder / results.QUANTIZED_FILE)
    if tracker.error != result[ERROR_KEY]:
        result[ERROR_KEY] = tracker.error
        try:
            results.write_json(folder / results.RESULT_FILE, result)
        except OSError as error:  # the run is finished; the next command logs it again
            log.warning("%s: cannot note whether W&B has this run (%s)", folder / results.RESULT_FILE, error.strerror)
    key = result["primary_metric"]
    metric = metric_of(key)
    log.info(
        f"{name} {result['method']} {result['bits/target']:g} bits, seed {result['seed']}: {key} "
        f"{metric.scaled(result[f'q/{key}']):.2f} {metric.unit} ({metric.scaled(result[f'delta/{key}']):+.2f}), "
        f"KL {two_digits(result['q/kl_to_fp'])}, {result['bits/stored']:.3f} bits stored, "
        f"{result['time/total_s']:.1f} s"
    )
    return result


def keep_diff(cfg: DictConfig, path: Path) -> None:
    """Write the diff of the code with wandb.diff=true; else remove that of an earlier attempt at the run."""
    path.unlink(missing_ok=True)
    if not cfg.wandb.get("diff"):
        return
    if (diff := git_diff()) is None:
        log.warning("wandb.diff=true: the code is in no git checkout, so there is no diff")
    else:
        path.write_bytes(diff)


def execute(
    cfg: DictConfig,
    folder: Path,
    previous: list[WhiteningStore],
    observer: Observer,
) -> tuple[dict[str, Any], Rows, Rows]:
    """The stages of a run; returns the result, the rows of layers.csv and those of predictions.csv.

    `observer` is called after each batch of a statistics pass, each layer, and each evaluation of a distillation.

    time/prepare_s is the time before the statistics: libraries, data, network (trained or downloaded at first use),
    its full-precision predictions, compilation. time/total_s is the time of everything after. Cached statistics and
    whitenings count with the seconds they first took, so neither the cache nor the order of runs changes the total.
    """
    began = time.perf_counter()
    title, cache_dir = f"{cfg.method.name} {cfg.bits:g} bits", resolve_cache_dir(cfg.cache_dir)
    recipe = make_recipe(cfg, folder)  # first, so that a wrong value is refused before the network is loaded
    with elapsed(f"load {cfg.model.name} and {cfg.dataset.name}"):
        work = load_workload(cfg, cache_dir)
    check_patterns(recipe, work)
    statistics = open_statistics(cfg, recipe.whitenings, work, cache_dir, observer)
    with placed_whitenings(cfg, recipe.whitenings, statistics, folder, previous):
        needs = preflight(cfg, recipe, work, statistics, {"cache_dir": cache_dir, "results_dir": folder.parent})
        if recipe.whitenings and needs.spilled:
            recipe.whitenings.use_disk(folder)
        with naming_model(cfg.model.name, "evaluating it"):
            evaluator = Evaluator(work, int(cfg.evaluation.batch_size), cfg.evaluation.autocast, cache_dir)
        evaluator.ask(open_zeroshot(cfg.evaluation, work.network.encode, work.subject.device))
        with elapsed("compile"):
            rehearse(make_recipe(cfg), work.subject.layers)

        # Everything before this line is faster in a second run, so no method's time includes it.
        start = time.perf_counter()
        with for_user():
            quantized = quantize_network(work.subject, recipe, statistics, observer)
        log_decisions(title, quantized)
        record = run_record(cfg, work.network)
        with elapsed("pack"):
            file = folder / results.QUANTIZED_FILE
            sizes = write_packed(file, Packed(quantized.tensors, quantized.parameters, run=record))
            stored = read_packed(file)  # the stored network is the evaluated one
        stored_at = time.perf_counter()
        rows = evaluator.run_quantized(stored, f"evaluate {title}")
        evaluated_at = time.perf_counter()
        quantized.oom_retries += evaluator.oom_retries
        no_network = f"bits={cfg.bits:g} leaves no working network; choose more bits or another method"
        check_finite(rows["kl"], no_network)
        metrics = evaluator.metrics(rows, int(cfg.seed))
        seconds = {
            "evaluate": evaluated_at - stored_at,
            "total": time.perf_counter() - start + quantized.reused_s,
            "prepare": start - began,
        }
        layers = layer_rows(quantized)
        result = flat_result(cfg, work, quantized, statistics.keys, layers, sizes, metrics, seconds, needs.memory)
        return result, layers, prediction_rows(rows, work.ids)


class Evaluator:
    """Evaluates the full-precision and the quantized network of a run on the same examples.

    The outputs of the full-precision network are computed once and stored in the cache. Those of a language
    model are too large: both networks run on every batch.

    `autocast` is the torch dtype of matrix products by name; None = float32 throughout.

    Attributes:
        full: outputs [n, ...] of the full-precision network, or that network.
        oom_retries: how often memory ran out.
        zeroshot: tasks that both networks answer too, see `ask`.

    Raises:
        UserError: outputs of the full-precision network are not finite, or autocast is asked for a language model.
    """

    def __init__(self, work: Workload, batch_size: int, autocast: str | None, cache_dir: Path) -> None:
        self.work, self.batch_size, self.autocast, self.cache_dir = work, batch_size, autocast, cache_dir
        network, name = work.network, work.name
        self.full: Tensor | nn.Module = network.module
        self.oom_retries = 0
        self.zeroshot: ZeroShot | None = None
        self._full_answers: Answers = {}
        self._answers: dict[str, object] = {}
        self._overflow = f"model={name} overflows before anything is rounded; choose other weights or data"
        if work.subject.likelihood.streams:
            if autocast is not None:
                raise UserError(
                    f"evaluation.autocast={autocast}: language models are evaluated in float32; choose null"
                )
            return
        network_and_data = network.module, network.identity, work.evaluation, batch_size, work.subject.device, cache_dir
        self.full, self.oom_retries = cached_logits(*network_and_data, autocast)
        check_finite(self.full, self._overflow)
        if isinstance(work.subject.likelihood, Categorical):
            warn_below_chance(self.full, work.evaluation.labels, name)
        self._float32 = self.full if autocast is None else cached_logits(*network_and_data)[0]

    def ask(self, zeroshot: ZeroShot | None) -> None:
        """Let the full-precision network answer tasks, which the quantized one will answer too; None = no tasks."""
        self.zeroshot = zeroshot
        if zeroshot is not None:
            network = self.work.network
            score = partial(cached_scores, zeroshot, network.module, network.identity, self.cache_dir)
            self._full_answers = zeroshot.answers(score, "full precision")

    def run_quantized(self, stored: Packed, title: str) -> EvaluationRows:
        """The numbers of each example for both networks; UserError if those of full precision are not finite."""
        examples, subject = self.work.evaluation, self.work.subject
        student = quantized_copy(subject.module, stored.tensors, stored.parameters)
        likelihood, device = subject.likelihood, subject.device
        rows, retries = paired_rows(
            self.full, student, examples, likelihood, self.batch_size, device, title, self.autocast
        )
        self.oom_retries += retries
        check_finite(rows["fp_nll"], self._overflow)
        if self.zeroshot is not None:
            quantized = self.zeroshot.answers(partial(self.zeroshot.score, student), "quantized")
            self._answers = self.zeroshot.compare(self._full_answers, quantized)
        return rows

    def metrics(self, rows: EvaluationRows, seed: int) -> dict[str, object]:
        """All metrics under their result keys; `seed` is of the bootstrap."""
        with elapsed("compare"):
            metrics = compare(rows, seed, self.work.data.metrics) | self._answers
        if self.autocast is not None:
            assert isinstance(self.full, Tensor)
            kl = self.work.subject.likelihood.kl(self._float32, self.full)
            metrics["autocast/kl_to_float32"] = float(kl.mean())
        return metrics
