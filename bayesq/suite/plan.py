"""From a configuration to the objects of a run: recipe, workload, statistics, and the place of whitenings."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bayesq.allocation import DAMPING, Knapsack, make_allocator
from bayesq.batches import two_examples
from bayesq.budget import Budget
from bayesq.calibration.passes import SUM_BYTES, CalibrationSettings
from bayesq.coverage import coverage, report
from bayesq.defaults import construct, misfits
from bayesq.distillation import DistillationSettings
from bayesq.errors import Refused
from bayesq.likelihood import LIKELIHOODS
from bayesq.observer import Observer
from bayesq.posterior import AUTO, WhiteningStore
from bayesq.quant.layers import embedding_tables, quantizable_layers
from bayesq.quant.usage import OtherUseError, usage_of
from bayesq.recipe import Distillation, Proxy, Recipe, Subject
from bayesq.suite.calibration import OFFLOADED_SUM_BYTES, Calibration
from bayesq.suite.config import one_line, plain, reads_posterior, refuse, resolved
from bayesq.suite.errors import UserError
from bayesq.suite.workload import Workload, check_network, naming_model, select_device


@contextmanager
def for_user(kind: type[ValueError] = Refused) -> Iterator[None]:
    """Turn an error of the library into a UserError with its text."""
    try:
        yield
    except kind as error:
        raise UserError(str(error)) from error


@for_user(ValueError)
def build(node: DictConfig, **more: Any) -> Any:
    """The object that a config group describes; UserError if its constructor refuses a value."""
    return construct(plain(node, resolve=True), **more)


@for_user()
def make_recipe(cfg: DictConfig, folder: Path | None = None) -> Recipe:
    """Instantiate method, posterior and allocator; UserError if a constructor refuses an argument.

    `folder` is for temporary files.
    """
    config = resolved(cfg)
    store = WhiteningStore(build(cfg.posterior)) if reads_posterior(config) else None
    method = build(cfg.method, **({"whitenings": store} if cfg.method.get("uses_posterior") else {}))
    proxy, distillation = None, None
    if cfg.proxy == "mc":
        proxy = Proxy(cfg.monte_carlo.samples, cfg.monte_carlo.examples)
    if cfg.distill:
        options = cfg.distillation
        settings = DistillationSettings(options.steps, options.evaluations, options.held_out)
        distillation = Distillation(settings, options.samples, options.moments, options.batch_size)
    damping = cfg.method.get("damping", DAMPING)
    return Recipe(
        method=method,
        allocator=make_allocator(cfg.allocator, store, **config["allocation"], damping=damping),
        budget=Budget(float(cfg.bits), cfg.budget.count),
        whitenings=store,
        proxy=proxy,
        correction=cfg.correction,
        distillation=distillation,
        seed=int(cfg.seed),
        inputs=cfg.inputs,
        codec=cfg.codec,
        rotate=cfg.rotate,
        folder=folder,
    )


def check_objects(config: Mapping[str, Any]) -> None:
    """Make the objects of a resolved configuration and drop them, before anything is loaded.

    Raises:
        UserError: a constructor refuses a value, or a class does not exist.
    """
    groups = ["model", "dataset", "method", *(["posterior"] if reads_posterior(config) else [])]
    try:
        for group in reversed(groups):
            for key, needs in misfits(config[group]):
                refuse(f"{group}.{key}", config[group][key], needs)
        cfg = OmegaConf.create(dict(config))
        make_recipe(cfg)
        build(cfg.dataset)
        build(cfg.model)
    except UserError:
        raise
    except Exception as error:
        names = " ".join(f"{group}={config[group].get('name')}" for group in groups)
        raise UserError(f"{names} cannot be made ({one_line(f'{type(error).__name__}: {error}')})") from error


def load_workload(cfg: DictConfig, cache_dir: Path) -> Workload:
    """Load data and network, encode the examples, and find the layers that the forward pass uses.

    Raises:
        UserError: the calibration set cannot be drawn, no layer is left to quantize, there are no embeddings to
            include, the model is not for the data set's task, or the network has NaN or infinite weights.
    """
    name, device = cfg.model.name, select_device(cfg.device)
    data = build(cfg.dataset).load(cache_dir)
    if data.task.name not in cfg.model.tasks:
        raise UserError(
            f"dataset={cfg.dataset.name} is for {data.task.name}, but model={name} is for "
            f"{' or '.join(cfg.model.tasks)}: choose a dataset and a model of one task"
        )
    with for_user():
        examples = data.calibration(int(cfg.calibration.examples), int(cfg.seed))
    source = build(cfg.model)
    with naming_model(name, "building it"):
        network = source.build(data, cache_dir)
    module, exclude = network.module, [*cfg.layers.exclude, *network.left_out]
    check_network(module, name)
    module.to(device)
    with for_user():
        layers = quantizable_layers(module, exclude)
    embeddings = embedding_tables(module, exclude) if cfg.layers.include_embeddings else {}
    if cfg.layers.include_embeddings and not embeddings:
        raise UserError(f"layers.include_embeddings=true: model={name} has no embedding left to quantize")
    with naming_model(name, "encoding its inputs"):
        calibration, evaluation = network.encode(examples), network.encode(data.evaluation)
    with naming_model(name, "its forward pass"):
        try:
            batches = calibration.batches(int(cfg.calibration.batch_size), device)
            more = (batch.inputs for batch in batches)
            usage = usage_of(module, layers, two_examples(calibration, device).inputs, more)
        except OtherUseError as error:
            raise UserError(f"model={name}: {error}") from error
    if not usage.layers:
        raise UserError(f"model={name}: no layer takes part in the forward pass: choose another model")
    covered = coverage(module, {**usage.layers, **embeddings})
    report(covered, module, usage.unreached)
    subject = Subject(module, usage, calibration, data.likelihood, device, embeddings, network.blocks)
    return Workload(network, data, subject, evaluation, covered, name)


@for_user()
def check_patterns(recipe: Recipe, work: Workload) -> None:
    """Raise UserError if a pattern of the allocation matches no layer, before the calibration."""
    if isinstance(recipe.allocator, Knapsack):
        recipe.allocator.choices(list(work.subject.layers))


def room_for_sums(device: torch.device) -> int:
    """Bytes of running sums in one pass: a quarter of a GPU's free memory, because each pass runs the whole network."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return max(SUM_BYTES, free // 4)


def open_statistics(
    cfg: DictConfig, store: WhiteningStore | None, work: Workload, cache_dir: Path, observer: Observer | None = None
) -> Calibration:
    """The statistics that a run reads, not computed yet; UserError if posterior.likelihood does not suit the task."""
    subject, posterior = work.subject, store and store.posterior
    chosen = posterior.likelihood if posterior else AUTO
    if subject.likelihood.name == "gaussian" and chosen == "categorical":
        raise UserError("posterior.likelihood=categorical: a regression has a gaussian likelihood; leave it at auto")
    if subject.likelihood.streams and chosen != AUTO:
        raise UserError(f"posterior.likelihood={chosen}: is not the likelihood of next tokens; leave it at auto")
    settings = CalibrationSettings(
        1 if subject.usage.alone else int(cfg.calibration.batch_size),
        posterior.samples if posterior else None,
        int(cfg.seed),
        gradient_examples=posterior.examples if posterior else None,
        likelihood=subject.likelihood if chosen == AUTO else LIKELIHOODS[chosen],
        draws=posterior.draws if posterior else "signs",
    )
    return Calibration(
        subject.module,
        subject.layers,
        subject.examples,
        settings,
        subject.device,
        OFFLOADED_SUM_BYTES if cfg.calibration.offload == "disk" else room_for_sums(subject.device),
        subject.usage.overwritten,
        observer=observer or Observer(),
        identity=work.network.identity,
        cache_dir=cache_dir,
    )


@contextmanager
def placed_whitenings(
    cfg: DictConfig, store: WhiteningStore | None, statistics: Calibration, folder: Path, previous: list[WhiteningStore]
) -> Iterator[None]:
    """Write whitenings to a file in `folder` with calibration.offload=disk; else reuse those of the previous run.

    Files are released when the block ends, also after an error. `previous` has the store of the last run with
    whitenings in memory, or is empty; this run's store replaces it.
    """
    if store is None:
        yield
        return
    if cfg.calibration.offload == "disk":
        store.use_disk(folder)
    else:
        files = sorted(str(statistics.path(statistic)) for statistic in store.statistics)
        store.take_over(json.dumps([resolved(cfg)["posterior"], files]), previous[0] if previous else None)
        previous[:] = [store]
    try:
        yield
    finally:
        store.release()
