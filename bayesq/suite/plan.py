"""From a configuration to the objects of a run: recipe, workload, statistics, and what they will need."""

import json
from pathlib import Path

from omegaconf import DictConfig

from bayesq.allocation import DAMPING, Budget, Knapsack, make_allocator
from bayesq.distillation import DistillationSettings
from bayesq.likelihood import LIKELIHOODS, Likelihood
from bayesq.posterior import AUTO
from bayesq.recipe import Distillation, Proxy, Recipe
from bayesq.suite.calibration import Calibration, CalibrationSettings
from bayesq.suite.config import reads_posterior, resolved
from bayesq.suite.construct import build
from bayesq.suite.errors import UserError
from bayesq.suite.workload import Selection, Workload, load, select_device
from bayesq.whitening import WhiteningStore


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
    return load(build(cfg.dataset), build(cfg.model), cfg.model.name, selection, select_device(cfg.device), cache_dir)


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


def open_statistics(cfg: DictConfig, recipe: Recipe, work: Workload, cache_dir: Path) -> Calibration:
    """The calibration statistics that a run reads; nothing is computed yet."""
    subject, network, posterior = work.subject, work.network, recipe.whitenings and recipe.whitenings.posterior
    settings = CalibrationSettings(
        1 if subject.usage.alone else int(cfg.calibration.batch_size),
        posterior.samples if posterior else None,
        int(cfg.seed),
        gradient_examples=posterior.examples if posterior else None,
        likelihood=fisher_likelihood(recipe.whitenings, subject.likelihood),
        draws=posterior.draws if posterior else "signs",
    )
    offload = cfg.calibration.offload == "disk"
    return Calibration(network.module, network.identity, subject, settings, cache_dir, offload)


def place_whitenings(
    cfg: DictConfig,
    store: WhiteningStore | None,
    statistics: Calibration,
    folder: Path,
    previous: WhiteningStore | None,
) -> None:
    """Keep whitenings on disk if asked to; else go on with those of the command's previous run that still hold."""
    if store is None:
        return
    if cfg.calibration.offload == "disk":
        store.use_disk(folder)
        return
    files = sorted(str(statistics.path(statistic)) for statistic in store.statistics)
    store.take_over(json.dumps([resolved(cfg)["posterior"], files]), previous)
