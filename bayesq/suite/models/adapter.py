"""Small deltas of a fine-tuned network: the tensors that training changed, applied to published weights.

An adapter is a folder with delta.safetensors. A tensor there replaces the network's tensor of the same name. The pair
NAME.lora_A [k, c] and NAME.lora_B [r, k] adds lora_B lora_A to NAME [r, c], with the scale of the adapter in lora_B
(Hu et al. 2021, LoRA, eq. 3). `bayesq.suite.finetune` writes such folders.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bayesq.files import file_sha256
from bayesq.suite.errors import UserError
from bayesq.suite.models.checkpoint import reading

FILE = "delta.safetensors"
DOWN, UP = ".lora_A", ".lora_B"


def apply_adapter(module: nn.Module, folder: Path, needed: Iterable[str] = ()) -> str:
    """Change the weights of `module` as the adapter says; returns the sha256 hex of the file.

    The adapter must have the tensors that are `needed`, such as those of a new head.

    Raises:
        UserError: the file is missing or damaged, a tensor of it does not fit the module, or a needed one is missing.
    """
    where = f"model.adapter={folder}"
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{where}: needs a folder with {FILE}; `python -m bayesq.suite.finetune` makes one")
    delta = reading(where, lambda: load_file(file))
    if missing := sorted(set(needed) - delta.keys()):
        raise UserError(f"{where}: {FILE} lacks {', '.join(missing)}, which the published weights lack too")
    state = module.state_dict()
    for name, value in _merged(delta, state, where).items():
        _check(name, value, state, where)
        state[name].copy_(value)
    return file_sha256(file)


def _merged(delta: dict[str, Tensor], state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The delta with each low-rank pair as a whole tensor."""
    whole = {name: value for name, value in delta.items() if not name.endswith((DOWN, UP))}
    for name in sorted({name[: -len(DOWN)] for name in delta if name.endswith((DOWN, UP))}):
        try:
            change = delta[name + UP] @ delta[name + DOWN]
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{where}: {name}{DOWN} and {name}{UP} in {FILE} are not a pair") from error
        _check(name, change, state, where)
        whole[name] = state[name] + change
    return whole


def _check(name: str, value: Tensor, state: dict[str, Tensor], where: str) -> None:
    """Raise UserError if the network has no such tensor, or one of another shape, or the values are not finite."""
    if name not in state:
        raise UserError(f"{where}: the network has no tensor {name}: this adapter is of another network")
    if value.shape != state[name].shape:
        shapes = f"{list(value.shape)}, but the network and data set need {list(state[name].shape)}"
        raise UserError(f"{where}: {name} in {FILE} has shape {shapes}")
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise UserError(f"{where}: {name} in {FILE} has values that are not finite floating-point numbers")
