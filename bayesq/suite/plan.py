"""From a configuration to the objects of a run: recipe, workload, statistics, and what they will need."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bayesq.allocation import DAMPING, Budget, Knapsack, make_allocator
from bayesq.calibration.passes import SUM_BYTES, CalibrationSettings
from bayesq.defaults import construct
from bayesq.distillation import DistillationSettings
from bayesq.likelihood import LIKELIHOODS, Likelihood
from bayesq.memory import resident_bytes
from bayesq.posterior import AUTO, WhiteningStore
from bayesq.quant.correction import MAX_EXAMPLES
from bayesq.recipe import Distillation, Proxy, Recipe
from bayesq.suite.calibration import OFFLOADED_SUM_BYTES, Calibration
from bayesq.suite.config import plain, reads_posterior, resolved
from bayesq.suite.errors import UserError
from bayesq.suite.forward import naming_model
from bayesq.suite.preflight import Choices, Needs, activations, check, estimate
from bayesq.suite.session import Session
from bayesq.suite.workload import Names, Selection, Workload, load, select_device

# Whitenings may take this share of the free disk, 1 / SPARE_DISK.
SPARE_DISK = 4


def build(node: DictConfig, **more: Any) -> Any:
    """The object that a config group describes.

    Raises:
        UserError: the constructor refused a value.
    """
    try:
        return construct(plain(node, resolve=True), **more)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_recipe(cfg: DictConfig) -> Recipe:
    """Instantiate method, posterior and allocator.

    Raises:
        UserError: a constructor refused an argument.
    """
    store = WhiteningStore(build(cfg.posterior)) if reads_posterior(resolved(cfg)) else None
    method = build(cfg.method, **({"whitenings": store} if cfg.method.get("uses_posterior") else {}))
    options = cfg.distillation
    try:
        damping = cfg.method.get("damping", DAMPING)
        return Recipe(
            method=method,
            allocator=make_allocator(cfg.allocator, store, **resolved(cfg)["allocation"], damping=damping),
            budget=Budget(float(cfg.bits), cfg.budget.count),
            whitenings=store,
            proxy=Proxy(int(cfg.monte_carlo.samples), int(cfg.monte_carlo.examples)) if cfg.proxy == "mc" else None,
            correction=cfg.correction == "moments",
            distillation=Distillation(
                DistillationSettings(options.steps, options.evaluations, options.held_out),
                int(options.samples),
                bool(options.moments),
                int(options.batch_size),
            )
            if cfg.distill
            else None,
            seed=int(cfg.seed),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def load_workload(cfg: DictConfig, cache_dir: Path) -> Workload:
    """`workload.load` of a configuration."""
    selection = Selection(
        exclude=list(cfg.layers.exclude),
        include_embeddings=cfg.layers.include_embeddings,
        examples=int(cfg.calibration.examples),
        batch_size=int(cfg.calibration.batch_size),
        seed=int(cfg.seed),
    )
    named = Names(cfg.dataset.name, cfg.model.name, list(cfg.model.tasks))
    return load(build(cfg.dataset), build(cfg.model), named, selection, select_device(cfg.device), cache_dir)


def check_patterns(recipe: Recipe, work: Workload) -> None:
    """Refuse patterns of the allocation that match no layer, before the calibration.

    Raises:
        UserError: naming the pattern.
    """
    if isinstance(recipe.allocator, Knapsack):
        try:
            recipe.allocator.choices(list(work.subject.layers))
        except ValueError as error:
            raise UserError(str(error)) from error


def fisher_likelihood(store: WhiteningStore | None, of_data: Likelihood) -> Likelihood:
    """The likelihood that the Fisher is of: the data set's, unless posterior.likelihood names one.

    Raises:
        UserError: a categorical likelihood of a single output has no Fisher.
    """
    if store is None or store.posterior.likelihood == AUTO:
        return of_data
    if of_data.name == "gaussian" and store.posterior.likelihood == "categorical":
        raise UserError("posterior.likelihood=categorical: a regression has a gaussian likelihood; leave it at auto")
    return LIKELIHOODS[store.posterior.likelihood]


def open_statistics(cfg: DictConfig, store: WhiteningStore | None, work: Workload, cache_dir: Path) -> Calibration:
    """The calibration statistics that a run reads; nothing is computed yet."""
    subject, network, posterior = work.subject, work.network, store and store.posterior
    settings = CalibrationSettings(
        1 if subject.usage.alone else int(cfg.calibration.batch_size),
        posterior.samples if posterior else None,
        int(cfg.seed),
        gradient_examples=posterior.examples if posterior else None,
        likelihood=fisher_likelihood(store, subject.likelihood),
        draws=posterior.draws if posterior else "signs",
    )
    return Calibration(
        network.module,
        network.identity,
        subject.layers,
        subject.examples,
        settings,
        cache_dir,
        subject.device,
        OFFLOADED_SUM_BYTES if cfg.calibration.offload == "disk" else SUM_BYTES,
        subject.usage.overwritten,
    )


def place_whitenings(
    cfg: DictConfig, store: WhiteningStore | None, statistics: Calibration, folder: Path, session: Session
) -> None:
    """Keep whitenings on disk if asked to; else go on with those of the command's previous run that still hold."""
    if store is None:
        return
    if cfg.calibration.offload == "disk":
        store.use_disk(folder)
        return
    files = sorted(str(statistics.path(statistic)) for statistic in store.statistics)
    store.take_over(json.dumps([resolved(cfg)["posterior"], files]), session.whitenings)
    session.whitenings = store


def preflight(
    cfg: DictConfig, recipe: Recipe, work: Workload, statistics: Calibration, folders: Mapping[str, Path]
) -> Needs:
    """Say what memory and disk the run will need, and return it.

    Raises:
        UserError: it cannot fit.
    """
    subject, module, store = work.subject, work.network.module, recipe.whitenings
    first = [next(examples.batches(1, subject.device)).inputs for examples in (subject.examples, work.evaluation)]
    with naming_model(cfg.model.name, "its forward pass"):
        small, large = (activations(module, inputs) for inputs in first)
    offload = cfg.calibration.offload == "disk"
    choices = Choices(
        statistics=recipe.statistics,
        posterior=store.posterior if store else None,
        bits=float(cfg.bits),
        calibration_batch=statistics.batch_size,
        evaluation_batch=int(cfg.evaluation.batch_size),
        distillation_batch=recipe.distillation.batch_size if recipe.distillation else None,
        corrected=min(MAX_EXAMPLES, len(subject.examples)) if recipe.correction else 0,
        sequential=recipe.method.inputs == "prefix",
        examples=len(subject.examples),
        offload=offload,
        room=statistics.passes.room,
        whitening_memory=store.memory_limit if store else 0,
        whitening_disk=int(shutil.disk_usage(folders["results_dir"]).free // SPARE_DISK),
        inherited=store.inherited_bytes if store else 0,
    )
    missing, accelerated = statistics.missing(recipe.statistics), subject.device.type != "cpu"
    needs = estimate(resident_bytes(), module, subject.layers, choices, small, large, missing, accelerated)
    check(needs, folders, cfg.resources.memory, offload)
    return needs
