"""The memory and disk that a run will need, logged before it begins; a run that cannot fit is refused.

Peak memory is what the process holds with model and data loaded, plus the most that one stage adds. Both follow from
the shapes of the layers and from the activations of one example. The factors in the formulas are rough.
"""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from bayesq.calibration.memory import NetworkStatistics
from bayesq.calibration.statistic import Statistic
from bayesq.memory import available_memory, resident_bytes
from bayesq.quant.correction import MAX_EXAMPLES
from bayesq.quant.layers import weight_to_matrix
from bayesq.recipe import Recipe, Subject
from bayesq.suite.calibration import Calibration
from bayesq.suite.errors import UserError
from bayesq.suite.workload import Workload, naming_model
from bayesq.walker import STORED_BYTES

log = logging.getLogger(__name__)
# written to the run's log file only, see conf/hydra/job_logging/bayesq.yaml
details = logging.getLogger("bayesq.details")

MIB, GIB = 2**20, 2**30
# Memory of libraries once they have computed something, and gaps between large tensors.
RUNTIME_BYTES = 128 * MIB
# The estimate is shown on the terminal if a run needs more than this share of the free memory or disk.
TIGHT = 0.5
# Stored bytes per code byte: scales, zero points, tables of levels, width maps.
OVERHEAD = 1.1
# Whitenings may take this share of the free disk, 1 / SPARE_DISK.
SPARE_DISK = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of the modules' outputs for one example: in total, as a backward pass stores them, and the largest."""

    total: int
    largest: int


@dataclass(frozen=True)
class Needs:
    """What a run will need, in bytes."""

    held: int  # memory of the process before the first stage
    stages: dict[str, int]  # memory that each stage adds
    disk: dict[str, int]  # bytes written, by the key of the folder
    spilled: int = 0  # whitenings that go to a file in the run's folder, because they exceed the memory limit

    @property
    def largest(self) -> str:
        """The stage that adds most."""
        return max(self.stages, key=self.stages.__getitem__)

    @property
    def memory(self) -> int:
        """Peak of the process."""
        return self.held + self.stages[self.largest]


@torch.no_grad()
def activations(module: nn.Module, inputs: Mapping[str, Tensor]) -> Activations:
    """Measure the outputs of modules without children in a forward pass of one example, `inputs` [1, ...]."""
    sizes = [0]

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    handles = [child.register_forward_hook(hook) for child in module.modules() if not any(child.children())]
    try:
        module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Activations(sum(sizes), max(sizes))


def estimate(
    recipe: Recipe,
    subject: Subject,
    statistics: NetworkStatistics,
    missing: Sequence[Statistic],
    calibration: Activations,
    evaluation: int,
    held: int,
    offload: bool,
    free: int,
) -> Needs:
    """Memory and disk of a run from the shapes of its layers.

    Args:
        missing: statistics to compute.
        calibration: activations of one calibration example.
        evaluation: bytes of the largest output of an evaluation batch.
        held: bytes of the process with model and data.
        offload: whitenings go to disk.
        free: bytes on the disk of the results.
    """
    shapes = [(g, r, c) for g, r, c in (weight_to_matrix(layer).shape for layer in subject.layers.values())]
    weights = sum(map(math.prod, shapes))
    network = sum(x.nbytes for x in (*subject.module.parameters(), *subject.module.buffers()))
    packed = int(OVERHEAD * weights * recipe.budget.bits / 8)
    batch = statistics.batch_size
    sums = [sum(statistic.sum_bytes(*shape) for statistic in missing) for shape in shapes]
    widest = max(sums, default=0)
    collected = max(min(sum(sums), statistics.room), widest)
    total, largest, examples = calibration.total, calibration.largest, len(subject.examples)
    inputs = min(STORED_BYTES, examples * total)
    if subject.device.type != "cpu":  # running sums and activations are in the memory of the accelerator
        collected = total = largest = evaluation = inputs = 0
    stages = {
        "calibration": collected + batch * total + widest,
        # the weights of the quantized network, its codes and the packed file twice
        "evaluation": 4 * weights + 2 * (weights + packed) + 3 * evaluation,
        # codes, and rotated weights
        "rounding": (5 if recipe.rotate else 1) * weights + max(_work(shape, recipe) for shape in shapes),
    }
    if recipe.inputs != "full":  # inputs of one block, and outputs of its modules, are stored for all examples
        stages["rounding"] += network + (2 if recipe.in_step else 1) * (2 * batch * largest + inputs)
    if recipe.correction != "none" and recipe.inputs == "full":
        stages["correction"] = weights + 3 * network + 3 * min(MAX_EXAMPLES, examples) * largest
    if recipe.distillation is not None:
        # the student, and for each weight: value, gradient and two moments in float32, draw and index of 2 bytes each
        stages["distillation"] = network + 20 * weights + 2 * recipe.distillation.batch_size * total

    whitenings, in_memory, spilled = _whitenings(shapes, recipe, offload, free)
    for stage in stages:  # whitenings stay after the rounding, for the next run
        stages[stage] += RUNTIME_BYTES + (in_memory if stage != "calibration" else 0)
    disk = {
        "cache_dir": 4 * sum(math.prod(one.shape(*shape)) for one in missing for shape in shapes),
        "results_dir": packed + (whitenings if offload else 0),
    }
    return Needs(held, stages, disk, spilled)


def _whitenings(
    shapes: Sequence[tuple[int, int, int]], recipe: Recipe, offload: bool, free: int
) -> tuple[int, int, int]:
    """Bytes of all whitenings, of new ones in memory, and of those that exceed the memory limit and go to a file."""
    store = recipe.whitenings
    if store is None:
        return 0, 0, 0
    whitenings = sum(map(store.posterior.whitening_bytes, shapes))
    if offload:
        return whitenings, 0, 0
    if store.memory_limit < whitenings <= free // SPARE_DISK:
        return whitenings, 0, whitenings
    return whitenings, max(min(whitenings, store.memory_limit) - store.inherited_bytes, 0), 0


def _work(shape: tuple[int, int, int], recipe: Recipe) -> int:
    """Bytes of fitting and rounding one layer in float64."""
    g, r, c = shape
    inputs = g * c * c if recipe.statistics else 0
    fit = 8 * (inputs + 2 * c * c) if recipe.statistics else 0
    if recipe.whitenings is not None:
        fit = recipe.whitenings.posterior.fit_bytes(shape)
    # float32 sums of M and C, of all examples and of those held out, and their float64 means
    paired = (4 * 4 + 8 * 6) * g * c * c if recipe.in_step else 0
    return paired + max(fit, 8 * (10 * g * r * c + 2 * inputs))


REMEDIES = {
    "calibration": "lower calibration.batch_size",
    "rounding": "choose posterior=diag",
    "evaluation": "lower evaluation.batch_size",
    "correction": "choose correction=none",
    "distillation": "lower distillation.batch_size or choose distill=false",
}


def preflight(
    cfg: DictConfig, recipe: Recipe, work: Workload, statistics: Calibration, folders: Mapping[str, Path]
) -> Needs:
    """Log what memory and disk the run will need, and return it; UserError if it cannot fit.

    The `folders` cache_dir and results_dir exist.
    """
    subject, offload = work.subject, cfg.calibration.offload == "disk"
    with naming_model(cfg.model.name, "its forward pass"):
        calibration, evaluation = (
            activations(subject.module, next(examples.batches(1, subject.device)).inputs)
            for examples in (subject.examples, work.evaluation)
        )
    largest = int(cfg.evaluation.batch_size) * evaluation.largest
    free = shutil.disk_usage(folders["results_dir"]).free
    missing = statistics.missing(recipe.statistics)
    needs = estimate(recipe, subject, statistics, missing, calibration, largest, resident_bytes(), offload, free)
    check(needs, folders, cfg.resources.memory, offload)
    return needs


def check(needs: Needs, folders: Mapping[str, Path], limit: float | None, offload: bool) -> None:
    """Log the needs, on the terminal too if memory or disk is tight.

    Args:
        folders: by the keys of `needs.disk`; they exist.
        limit: GiB the process may take (resources.memory); None = the machine's free memory.
        offload: calibration.offload=disk is set.

    Raises:
        UserError: naming the key and what to change.
    """
    stage, extra = needs.largest, needs.stages[needs.largest]
    available = available_memory() if limit is None else max(int(limit * GIB) - needs.held, 0)
    left = math.inf if available is None else available
    free = {key: shutil.disk_usage(folder).free for key, folder in folders.items()}
    tight = extra > TIGHT * left or any(needs.disk[key] > TIGHT * free[key] for key in folders)
    (log if tight else details).info(
        f"memory: about {_size(needs.memory)} at most ({_size(needs.held)} now; {stage} adds most), "
        f"{_size(left)} left; disk: "
        + ", ".join(f"{_size(needs.disk[key])} of {_size(free[key])} free in {key}" for key in folders)
    )
    if extra > left:
        remedies = ["set calibration.offload=disk"] if stage in ("calibration", "rounding") and not offload else []
        where, last = "the machine has", "set resources.memory=GIB to try it"
        if limit is not None:
            where, last = f"resources.memory={limit:g} leaves", "raise resources.memory"
        raise UserError(
            f"not enough memory: {stage} needs about {_size(extra)} more than the {_size(needs.held)} held now, "
            f"{where} {_size(left)}: {', or '.join([*remedies, REMEDIES[stage], last])}"
        )
    for device in {folder.stat().st_dev for folder in folders.values()}:  # folders of one file system share its space
        keys = [key for key, folder in folders.items() if folder.stat().st_dev == device]
        wanted = sum(needs.disk[key] for key in keys)
        if wanted > free[keys[0]]:
            most = max(keys, key=lambda key: needs.disk[key])
            remedy = " or set calibration.offload=memory" if offload and most == "results_dir" else ""
            raise UserError(
                f"{most}={folders[most]}: the run writes about {_size(wanted)} and {_size(free[keys[0]])} are free: "
                f"choose {most} with more space{remedy}"
            )


def _size(count: float) -> str:
    if count == math.inf:
        return "unknown"
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"
