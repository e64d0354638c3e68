"""What a run will need of memory and disk, said before it begins, and refused where it cannot fit.

Memory is what the process holds once model and data are loaded, plus the most that one stage adds. What a stage adds
follows from the shapes of the layers and from the activations of one example. The factors in front of them are rough.
"""

import logging
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bayesq.calibration.statistic import Statistic
from bayesq.memory import available_memory
from bayesq.posterior import Posterior
from bayesq.quant.layers import Layer, weight_to_matrix
from bayesq.suite.errors import UserError
from bayesq.walker import STORED_BYTES

log = logging.getLogger(__name__)
# goes to the run's log file only, see hydra.job_logging in conf/config.yaml
details = logging.getLogger("bayesq.details")

MIB, GIB = 2**20, 2**30
# What libraries load and allocate when they first compute, and what an allocator holds between large tensors.
RUNTIME_BYTES = 128 * MIB
# Memory and disk are mentioned on the terminal where a run needs more than this share of what is left of one of them.
TIGHT = 0.5
# Stored bytes per code byte: scales, zero points, tables of levels, width maps.
OVERHEAD = 1.1


@dataclass(frozen=True)
class Activations:
    """Bytes of the modules' outputs for one example: all of them, which a backward pass keeps, and the largest."""

    total: int
    largest: int


@dataclass
class Needs:
    """What a run will need, in bytes.

    Attributes:
        held: memory the process has before the first stage.
        stages: memory that each stage adds to it.
        disk: what is written, by the key of the folder.
        spilled: whitenings that wait in a file of the run's folder while layers are rounded.
    """

    held: int
    stages: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    spilled: int = 0

    @property
    def largest(self) -> str:
        """The stage that adds most."""
        return max(self.stages, key=self.stages.__getitem__)

    @property
    def memory(self) -> int:
        """Peak of the process."""
        return self.held + self.stages[self.largest]


@dataclass(frozen=True)
class Choices:
    """What of a configuration decides how much is needed.

    Attributes:
        statistics: to read.
        posterior: None without one.
        bits: average width.
        calibration_batch, evaluation_batch, distillation_batch: examples per forward pass; distillation_batch None
            without distillation.
        corrected: examples that match moments together; 0 without correction.
        sequential: whether inputs come from behind the quantized prefix; a module's are kept for all examples then.
        examples: of the calibration set.
        offload: whether whitenings wait on disk.
        room: bytes of running sums in one pass.
        whitening_memory: bytes of whitenings that stay in memory; if there are more, all go to a file if it may be so
            large.
        whitening_disk: bytes this file may have.
        inherited: bytes of whitenings that the run before has left in memory.
    """

    statistics: Collection[Statistic]
    posterior: Posterior | None
    bits: float
    calibration_batch: int
    evaluation_batch: int
    distillation_batch: int | None
    corrected: int
    sequential: bool
    examples: int
    offload: bool
    room: int
    whitening_memory: int
    whitening_disk: int
    inherited: int


@torch.no_grad()
def activations(module: nn.Module, inputs: Mapping[str, Tensor]) -> Activations:
    """Measure the outputs of modules without children in a forward pass of one example.

    Args:
        inputs: module arguments [1, ...].
    """
    sizes: list[int] = []

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    handles = [child.register_forward_hook(hook) for child in module.modules() if not any(child.children())]
    try:
        module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Activations(sum(sizes), max(sizes, default=0))


def estimate(
    held: int,
    module: nn.Module,
    layers: Mapping[str, Layer],
    choices: Choices,
    calibration: Activations,
    evaluation: Activations,
    missing: Iterable[Statistic] = (),
    accelerated: bool = False,
) -> Needs:
    """Memory and disk of a run from the shapes of its layers.

    Args:
        held: bytes the process holds with model and data.
        module: the network.
        layers: what is quantized.
        calibration, evaluation: activations of one example of each set.
        missing: statistics that are not on disk yet.
        accelerated: activations and running sums are in the memory of an accelerator.
    """
    shapes = [_shape(layer) for layer in layers.values()]
    weights = sum(g * r * c for g, r, c in shapes)
    network = sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
    codes, packed = weights, int(OVERHEAD * weights * choices.bits / 8)
    missing = list(missing)
    activated = 0 if accelerated else 1

    sums = [sum(statistic.sum_bytes(*shape) for statistic in missing) for shape in shapes]
    collected = max(min(sum(sums), choices.room), max(sums, default=0)) if missing else 0
    needs = Needs(held)
    stages = {
        "calibration": activated * (collected + choices.calibration_batch * calibration.total) + max(sums, default=0),
        # the quantized network's weights stand beside the full-precision ones
        "evaluation": 4 * weights
        + 2 * (codes + packed)
        + 3 * activated * choices.evaluation_batch * evaluation.largest,
        "rounding": codes + max(_work(shape, choices) for shape in shapes),
    }
    whitenings = sum(map(choices.posterior.whitening_bytes, shapes)) if choices.posterior is not None else 0
    if choices.sequential:
        inputs = min(STORED_BYTES, choices.examples * calibration.largest)
        stages["rounding"] += network + activated * (2 * choices.calibration_batch * calibration.largest + inputs)
    stages |= _repairs(choices, weights, network, activated, calibration)
    stay = 0
    if not choices.offload:
        if choices.whitening_memory < whitenings <= choices.whitening_disk:
            needs.spilled = whitenings
        else:  # from the rounding on, for the next run too
            stay = max(min(whitenings, choices.whitening_memory) - choices.inherited, 0)
    needs.stages = {
        stage: size + RUNTIME_BYTES + (stay if stage != "calibration" else 0) for stage, size in stages.items()
    }

    needs.disk["cache_dir"] = 4 * sum(math.prod(one.shape(*shape)) for one in missing for shape in shapes)
    needs.disk["results_dir"] = packed + (whitenings if choices.offload else 0)
    return needs


def _repairs(choices: Choices, weights: int, network: int, activated: int, calibration: Activations) -> dict[str, int]:
    """Memory of correction and distillation, if they are asked for.

    Args:
        weights: number of quantized weights.
        network: bytes of the network.
        activated: 0 where activations are in the memory of an accelerator, else 1.
        calibration: activations of one calibration example.
    """
    stages = {}
    if choices.corrected:
        stages["correction"] = weights + 3 * network + 3 * activated * choices.corrected * calibration.largest
    if choices.distillation_batch is not None:
        # the student's copy, decoded weights, their gradients and sums, the teacher's draw; int16 indices
        backward = 2 * activated * choices.distillation_batch * calibration.total
        stages["distillation"] = 2 * weights + network + 16 * weights + 2 * weights + backward
    return stages


def _shape(layer: Layer) -> tuple[int, int, int]:
    """g, r, c of a layer."""
    g, r, c = weight_to_matrix(layer).shape
    return g, r, c


def _work(shape: tuple[int, int, int], choices: Choices) -> int:
    """Bytes of fitting and rounding one layer in float64."""
    g, r, c = shape
    inputs = g * c * c if choices.statistics else 0
    rounding = 8 * (10 * g * r * c + 2 * inputs)
    if choices.posterior is not None:
        return max(choices.posterior.fit_bytes(shape), rounding)
    return max(8 * (inputs + 2 * c * c), rounding) if choices.statistics else rounding


REMEDIES = {
    "calibration": "lower calibration.batch_size",
    "rounding": "choose posterior=diag",
    "evaluation": "lower evaluation.batch_size",
    "correction": "choose correction=none",
    "distillation": "lower distillation.batch_size or choose distill=false",
}


def check(needs: Needs, folders: Mapping[str, Path], limit: float | None, offload: bool) -> None:
    """Log what is needed, on the terminal too where it is tight, and refuse what cannot fit.

    Args:
        folders: by key, where the disk of `needs.disk` is; they exist.
        limit: GiB the process may take (resources.memory); None = what the machine has free.
        offload: calibration.offload=disk is chosen already.

    Raises:
        UserError: naming the key and what to change.
    """
    stage, extra = needs.largest, needs.stages[needs.largest]
    left = available_memory() if limit is None else int(limit * GIB) - needs.held
    free = {key: shutil.disk_usage(folder).free for key, folder in folders.items()}
    tight = left is not None and extra > TIGHT * left
    tight = tight or any(needs.disk[key] > TIGHT * free[key] for key in folders)
    (log if tight else details).info(
        f"memory: about {_size(needs.memory)} at most ({_size(needs.held)} now; {stage} adds most), "
        f"{'unknown' if left is None else _size(max(left, 0))} left; disk: "
        + ", ".join(f"{_size(needs.disk[key])} of {_size(free[key])} free in {key}" for key in folders)
    )
    if left is not None and extra > left:
        remedies = [REMEDIES[stage]]
        if stage in ("calibration", "rounding") and not offload:
            remedies.insert(0, "set calibration.offload=disk")
        where = f"resources.memory={limit:g} leaves" if limit is not None else "the machine has"
        remedies.append("raise resources.memory" if limit is not None else "set resources.memory=GIB to try it")
        raise UserError(
            f"not enough memory: {stage} needs about {_size(extra)} more than the {_size(needs.held)} held now, "
            f"{where} {_size(max(left, 0))}: {', or '.join(remedies)}"
        )
    # folders of one file system share what is free there
    devices: dict[int, list[str]] = {}
    for key, folder in folders.items():
        devices.setdefault(folder.stat().st_dev, []).append(key)
    for keys in devices.values():
        wanted = sum(needs.disk[key] for key in keys)
        if wanted > free[keys[0]]:
            most = max(keys, key=lambda key: needs.disk[key])
            remedy = " or set calibration.offload=memory" if offload and most == "results_dir" else ""
            raise UserError(
                f"{most}={folders[most]}: the run writes about {_size(wanted)} and {_size(free[keys[0]])} are free: "
                f"choose {most} with more space{remedy}"
            )


def _size(count: int) -> str:
    """Bytes as a short text."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"
