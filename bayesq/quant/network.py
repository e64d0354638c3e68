"""Put quantized weights into a network, or into a copy of it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayesq.quant.layers import find_layers, matrix_to_weight, weight_key, weight_to_matrix
from bayesq.quant.tensor import QuantizedTensor


def fill(
    module: nn.Module, tensors: Mapping[str, QuantizedTensor], parameters: Mapping[str, Tensor] | None = None
) -> None:
    """Replace layers' weights by the decoded QuantizedTensors, and `parameters` by state_dict name.

    Raises:
        ValueError: the module has no such layer or parameter, or one of another shape or dtype. It is not changed.
    """
    layers = find_layers(module, tensors)
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
    with torch.no_grad():
        for name, tensor in tensors.items():
            layers[name].weight.copy_(matrix_to_weight(layers[name], tensor.dequantize()))
        for name, value in (parameters or {}).items():  # load_state_dict would touch other buffers of the module too
            state[name].copy_(value)


def quantized_copy(
    module: nn.Module, tensors: Mapping[str, QuantizedTensor], parameters: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A quantized copy of the full-precision network, which does not change.

    Parameters that are not replaced are the same tensors in both networks, so the copy only takes the memory of its
    buffers and of the replaced parameters. Use it for evaluation only: training it would change the other network.

    Args:
        tensors: the quantized layers and embeddings by name.
        parameters: changed biases and norm parameters by state_dict name.

    Raises:
        ValueError: as `fill`.
    """
    layers = find_layers(module, tensors)
    replaced = {weight_key(name, layer) for name, layer in layers.items()} | set(parameters or {})
    writable = {id(x) for name, x in module.named_parameters(remove_duplicate=False) if name in replaced}
    shared = {id(x): x for x in module.parameters() if id(x) not in writable}
    quantized = copy.deepcopy(module, dict[int, object](shared))
    fill(quantized, tensors, parameters)
    return quantized
