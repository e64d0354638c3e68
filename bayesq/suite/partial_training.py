"""Fine-tuning of a small part of a classifier: BitFit and LoRA, and the delta that they leave.

BitFit (Ben Zaken et al. 2022) trains biases; here LayerNorms and the head train too. LoRA (Hu et al. 2021) trains a
low-rank change of each linear layer of the encoder, and the head. `bayesq.suite.models.adapter` reads the deltas.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.suite.errors import UserError
from bayesq.suite.models.adapter import DOWN, UP

ALL, BITFIT, LORA = "all", "bitfit", "lora"
# The usual peak learning rate of each way of training. Fewer parameters take larger steps.
LEARNING_RATES = {ALL: 2e-5, BITFIT: 1e-3, LORA: 5e-4}
RANK = 8
SCALE = 2.0  # of the low-rank change: alpha / rank


def check_way(way: str) -> None:
    """Raise UserError if the package that this way of training needs is missing."""
    if way == LORA and importlib.util.find_spec("peft") is None:
        raise UserError("--train lora needs the package peft: run `python -m pip install peft`")


def prepared(model: Any, way: str) -> Any:
    """The classifier of transformers with only the part trainable that `way` names; for LoRA wrapped by peft."""
    if way == BITFIT:
        chosen = bitfit_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
    if way != LORA:
        return model
    from peft import LoraConfig, get_peft_model

    encoder = f"{model.base_model_prefix}."
    linear = [
        name for name, child in model.named_modules() if isinstance(child, nn.Linear) and name.startswith(encoder)
    ]
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    config = LoraConfig(r=RANK, lora_alpha=int(RANK * SCALE), target_modules=linear, modules_to_save=head)
    return get_peft_model(model, config)


def bitfit_names(model: Any) -> set[str]:
    """Names of the parameters that BitFit trains: biases, LayerNorms, and all outside of the encoder."""
    norms = {f"{name}.weight" for name, child in model.named_modules() if isinstance(child, nn.LayerNorm)}
    encoder = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if name.endswith(".bias") or name in norms or not name.startswith(encoder)}


@torch.no_grad()
def delta_of(model: Any, way: str) -> tuple[Any, dict[str, Tensor]]:
    """The plain classifier after training, with merged low-rank changes, and its delta; `model` is from `prepared`."""
    if way == BITFIT:
        return model, _plain(model, bitfit_names(model))
    delta: dict[str, Tensor] = {}
    base = model.get_base_model()
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            (adapter,) = layer.lora_A
            delta[f"{name}.weight{DOWN}"] = layer.lora_A[adapter].weight.detach().clone()
            delta[f"{name}.weight{UP}"] = layer.lora_B[adapter].weight * layer.scaling[adapter]
    merged = model.merge_and_unload()
    encoder = f"{merged.base_model_prefix}."
    head = {name for name, _ in merged.named_parameters() if not name.startswith(encoder)}
    return merged, {**delta, **_plain(merged, head)}


def _plain(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    return {name: x.detach().contiguous().clone() for name, x in model.named_parameters() if name in names}
