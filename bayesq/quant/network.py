"""Quantized weights in a network: in place of its full-precision ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayesq.quant.layers import find_layer, matrix_to_weight, weight_key, weight_to_matrix
from bayesq.quant.tensor import QuantizedTensor


def fill(
    module: nn.Module, tensors: Mapping[str, QuantizedTensor], parameters: Mapping[str, Tensor] | None = None
) -> None:
    """Replace layers' weights by what their QuantizedTensors stand for, and `parameters` by state_dict name.

    Raises:
        ValueError: the module has no such layer or parameter, or one of another shape or dtype. It stays as it was.
    """
    layers = {name: find_layer(module, name) for name in tensors}
    state = module.state_dict() if parameters else {}
    for name, tensor in tensors.items():
        shape = list(weight_to_matrix(layers[name]).shape)
        if shape != [tensor.groups, len(tensor.codes) // tensor.groups, tensor.codes.shape[1]]:
            raise ValueError(f"layer {name} has groups, rows and columns {shape}, not those of its codes")
    quantized = {weight_key(name, layer) for name, layer in layers.items()}
    for name, value in (parameters or {}).items():
        if name not in state or name in quantized:
            raise ValueError(f"the network has no parameter {name:.100} beside its quantized weights")
        if state[name].shape != value.shape or state[name].dtype != value.dtype:
            raise ValueError(f"parameter {name} has another shape or dtype in the network")
    for name, tensor in tensors.items():
        with torch.no_grad():
            layers[name].weight.copy_(matrix_to_weight(layers[name], tensor.dequantize()))
    if parameters:
        module.load_state_dict(dict(parameters), strict=False)
