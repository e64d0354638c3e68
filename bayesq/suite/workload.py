"""Network and data of a run, checks of their numbers, and errors raised by the code of a network."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesq.batches import EncodedExamples
from bayesq.coverage import Coverage
from bayesq.memory import out_of_memory
from bayesq.recipe import Subject
from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workload:
    """Network and data of a run.

    `subject` has the network's module, which is quantized, and the calibration examples; `name` is for messages.
    """

    network: Network
    data: DataSplits
    subject: Subject
    evaluation: EncodedExamples
    coverage: Coverage
    name: str

    @property
    def ids(self) -> list[str]:
        """A stable name of each evaluation example: that of the data set, or of the text and the window's number."""
        ids, count = self.data.evaluation.ids, len(self.evaluation)
        return ids if len(ids) == count else [f"{ids[0]}:{k}" for k in range(count)]


@contextmanager
def naming_model(name: str, step: str) -> Iterator[None]:
    """Turn an error in the block into a UserError that names the model.

    The code of a network can raise any error, for example NotImplementedError, or RuntimeError for shapes that do not
    fit. UserError, OSError and out-of-memory errors pass unchanged, because the network is not their cause.

    `step` is what the block does, for example "its forward pass".
    """
    try:
        yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}".rstrip(": "))[:300]
        raise UserError(
            f"model={name}: {step} fails ({reason}): choose another model or other data; HYDRA_FULL_ERROR=1 shows where"
        ) from error


def check_network(module: nn.Module, name: str) -> None:
    """Raise UserError, which names it, at the first tensor with NaN or infinite entries or negative variances."""
    running = ("running_mean", "running_var")
    buffers = ((key, buffer) for key, buffer in module.named_buffers() if key.rpartition(".")[2] in running)
    for key, tensor in (*module.named_parameters(), *buffers):
        if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor.detach())):
            raise UserError(f"model={name}: {key} has NaN or infinite entries: choose other weights")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise UserError(f"model={name}: {key} has variances below zero: choose other weights")


def check_finite(outputs: Tensor, remedy: str) -> None:
    """Raise UserError, which ends with `remedy`, if outputs [n, ...] have NaN or infinite entries."""
    wrong = int((~torch.isfinite(outputs)).reshape(len(outputs), -1).any(1).sum())
    if wrong:
        raise UserError(f"logits are NaN or infinite for {wrong} of {len(outputs)} evaluation examples: {remedy}")


def warn_below_chance(logits: Tensor, labels: Tensor, name: str) -> None:
    """Warn if a classifier is worse than guessing: its classes may be in another order than those of the data set.

    `logits` [n, classes] are in full precision, `labels` are [n].
    """
    right, chance = float((logits.argmax(1) == labels).float().mean()), 1 / logits.shape[1]
    if right < chance - 4 * (chance * (1 - chance) / len(labels)) ** 0.5:
        log.warning(
            "model=%s: full precision is right for %.2f %% of the examples, guessing for %.2f %%: check that its "
            "classes have the data set's order (sorted; model.label_order or id2label in config.json change it)",
            *(name, 100 * right, 100 * chance),
        )


def select_device(name: str) -> torch.device:
    """The torch device `name`; "auto" prefers cuda, then mps, then cpu."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
