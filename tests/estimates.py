"""The estimate of memory and disk for a network whose run is described by a few numbers."""

from types import SimpleNamespace

import torch
from torch import nn

from bayesq.posterior import Posterior, WhiteningStore
from bayesq.quant.layers import quantizable_layers
from bayesq.suite.preflight import SPARE_DISK, Activations, Needs, estimate

NOTHING = Activations(0, 0)


def needs_of(
    module: nn.Module,
    posterior: Posterior | None,
    statistics,
    missing=(),
    calibration: Activations = NOTHING,
    evaluation: int = 0,
    batch: int = 1,
    examples: int = 1,
    distillation_batch: int | None = None,
    correction: bool = False,
    inputs: str = "full",
    offload: bool = False,
    room: int = 10**9,
    whitening_memory: int = 10**9,
    whitening_disk: int = 10**9,
    inherited: int = 0,
    device: str = "cpu",
    held: int = 0,
) -> Needs:
    store = None
    if posterior is not None:
        store = WhiteningStore(posterior, whitening_memory)
        store.inherited_bytes = inherited
    recipe = SimpleNamespace(
        statistics=statistics,
        whitenings=store,
        budget=SimpleNamespace(bits=4),
        inputs=inputs,
        in_step=inputs == "paired",
        rotate=False,
        correction="moments" if correction else "none",
        distillation=SimpleNamespace(batch_size=distillation_batch) if distillation_batch else None,
    )
    subject = SimpleNamespace(
        module=module, layers=quantizable_layers(module), examples=range(examples), device=torch.device(device)
    )
    opened, disk = SimpleNamespace(batch_size=batch, room=room), SPARE_DISK * whitening_disk
    return estimate(recipe, subject, opened, missing, calibration, evaluation, held, offload, disk)
