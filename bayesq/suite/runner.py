"""One experiment from config to result, in the order the data flows.

config -> dataset and model -> calibration statistics -> method (posterior, allocation, rounding) -> QuantizedTensors
-> packed file -> the network loaded from it -> evaluation -> result.json
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from bayesq.pipeline import quantize_network
from bayesq.progress import elapsed
from bayesq.suite import evaluation
from bayesq.suite.cache import resolve_cache_dir
from bayesq.suite.config import run_dir, run_id
from bayesq.suite.errors import UserError
from bayesq.suite.forward import naming_model
from bayesq.suite.packed import run_record
from bayesq.suite.plan import check_patterns, load_workload, make_recipe, open_statistics, place_whitenings
from bayesq.suite.preflight import preflight
from bayesq.suite.record import flat_result, layer_rows, log_decisions
from bayesq.suite.rehearsal import rehearse
from bayesq.suite.results import LAYERS_FILE, PREDICTIONS_FILE, QUANTIZED_FILE, RESULT_FILE, write_csv, write_json
from bayesq.suite.summary import two_digits
from bayesq.suite.tracking import ERROR_KEY, track
from bayesq.suite.workload import check_outputs
from bayesq.whitening import WhiteningStore

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


@dataclass
class Session:
    """What the runs of one command hand on to each other.

    Attributes:
        whitenings: of the last run, for the next one if they depend on the same.
    """

    whitenings: WhiteningStore | None = None


def run(cfg: DictConfig, session: Session | None = None) -> dict[str, Any]:
    """Execute one configuration and write its files; returns the flat result of the contract (SPEC section 8).

    Args:
        cfg: composed and validated.
        session: of the command; None = the run stands alone.

    Raises:
        UserError: the configuration cannot be run; the message names the key.
    """
    folder, name = run_dir(cfg), run_id(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with logging_redirect_tqdm(), track(cfg, name, folder) as tracker:
        result, layers, predictions = execute(cfg, folder, session or Session())
        write_csv(folder / LAYERS_FILE, layers)
        write_csv(folder / PREDICTIONS_FILE, predictions)
        result[ERROR_KEY] = tracker.error
        write_json(folder / RESULT_FILE, result)  # last: a run that has it is finished
        tracker.log_result(result, layers, predictions, folder / QUANTIZED_FILE)
    if tracker.error != result[ERROR_KEY]:
        result[ERROR_KEY] = tracker.error
        try:
            write_json(folder / RESULT_FILE, result)
        except OSError as error:  # the disk is full by now: the run is finished, the next command logs it again
            log.warning("%s: what W&B has of it cannot be noted (%s)", folder / RESULT_FILE, error.strerror)
    key = result["primary_metric"]
    metric = metric_of(key)
    log.info(
        f"{name} {result['method']} {result['bits/target']:g} bits, seed {result['seed']}: {key} "
        f"{metric.scaled(result[f'q/{key}']):.2f} {metric.unit} ({metric.scaled(result[f'delta/{key}']):+.2f}), "
        f"KL {two_digits(result['q/kl_to_fp'])}, {result['bits/stored']:.3f} bits stored, "
        f"{result['time/total_s']:.1f} s"
    )
    return result


def execute(cfg: DictConfig, folder: Path, session: Session) -> tuple[dict[str, Any], Rows, Rows]:
    """The stages of a run; returns the result, the rows of layers.csv and those of predictions.csv.

    time/prepare_s is what comes before the statistics: libraries, data, network (trained or fetched at first use), its
    full-precision predictions, compilation. time/total_s is all that follows, with statistics and whitenings at what
    they once took, so that neither the order of runs nor an empty cache changes it.
    """
    began = time.perf_counter()
    title, cache_dir = f"{cfg.method.name} {cfg.bits:g} bits", resolve_cache_dir(cfg.cache_dir)
    recipe = make_recipe(cfg)  # first: a value that no constructor accepts must not cost a model's loading
    with elapsed(f"load {cfg.model.name} and {cfg.dataset.name}"):
        work = load_workload(cfg, cache_dir)
    check_patterns(recipe, work)
    statistics = open_statistics(cfg, recipe, work, cache_dir)
    place_whitenings(cfg, recipe.whitenings, statistics, folder, session.whitenings)
    session.whitenings = recipe.whitenings
    needs = preflight(cfg, recipe, work, statistics, {"cache_dir": cache_dir, "results_dir": folder.parent})
    if recipe.whitenings and needs.scratch:
        recipe.whitenings.use_disk(folder)
    settings = evaluation.Settings(int(cfg.evaluation.batch_size), cfg.evaluation.autocast)
    with naming_model(cfg.model.name, "evaluating it"):
        full = evaluation.full_precision(work.network, work.evaluation, settings, work.subject.device, cache_dir)
    check_outputs(
        full.outputs, f"model={cfg.model.name} overflows before anything is rounded; choose other weights or data"
    )
    with elapsed("compile"):
        rehearse(make_recipe(cfg), work.subject.layers)

    # What is done by now no method is charged with: some or all of it is much faster in a second run.
    start = time.perf_counter()
    try:
        quantized = quantize_network(work.subject, recipe, statistics)
    except ValueError as error:
        raise UserError(str(error)) from error
    log_decisions(title, quantized)
    sizes, network = store(folder / QUANTIZED_FILE, quantized, run_record(cfg, work.network), work)
    evaluate_start = time.perf_counter()
    metrics, predictions = evaluation.evaluate(network, full, work, settings, f"evaluate {title}", int(cfg.seed))
    now = time.perf_counter()
    seconds = {
        "evaluate": now - evaluate_start,
        "total": now - start + quantized.reused_s,
        "prepare": start - began,
    }
    result = flat_result(cfg, work, quantized, sizes, metrics, seconds, needs.memory)
    return result, layer_rows(quantized), predictions
