"""AWQ with codec=entropy: channel scales by a naive search, and the same codes as RTN where scales gain nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_awq import inputs
from torch import Tensor

from baselines.awq import AWQ
from baselines.rtn import RTN
from bayesq.budget import Budget
from bayesq.contract import Context, LayerProblem, Method
from bayesq.entropy import StreamAllocation
from bayesq.entropy_scalar import ScalarRounds
from bayesq.errors import Refused
from bayesq.loop import quantize_layers
from bayesq.quant.accounting import buffer_bytes, code_bits
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.uniform import Uniform

EXPONENTS = 6


def layer(groups: int, spread: float, positions: int = 4, magnitude: float | None = None) -> LayerProblem:
    generator = torch.Generator().manual_seed(2)
    moment, size = inputs(groups, 8, positions, generator, spread)
    if magnitude is not None:
        size = torch.full_like(size, magnitude)
    weight = torch.randn(groups, 150, 8 * positions, generator=generator)
    given = {"input_moment": moment, "input_magnitude": size}
    return LayerProblem("layer", "Conv2d", weight, given.__getitem__, positions)


def stream_of(problem: LayerProblem, bits: float, count: str = "code") -> StreamAllocation:
    return StreamAllocation(Uniform(), Budget(bits, count), {problem.name: problem})


def coded(method: Method, problem: LayerProblem, bits: float, count: str = "code") -> QuantizedTensor:
    context = replace(Context.of_seed(0), stream=stream_of(problem, bits, count))
    ((_, tensor),) = quantize_layers(method, [problem], lambda *_: {}, context)
    return tensor


def error(values: Tensor, problem: LayerProblem) -> float:
    delta, moment = (values - problem.weight).double(), problem.statistic("input_moment")
    return float(sum((d @ a * d).sum() for d, a in zip(delta, moment, strict=True)))


def naive_scale(problem: LayerProblem, step: np.ndarray) -> np.ndarray:
    """Channel scale [g, channels] of least error with these steps [R]; every candidate keeps the mean square."""
    weight, k = problem.weight.double().numpy(), problem.positions_per_channel
    moment, size = (problem.statistic(key).numpy() for key in ("input_moment", "input_magnitude"))
    best, least = None, np.inf
    for e in range(EXPONENTS + 1):
        channel = size.reshape(len(weight), -1, k).mean(2) ** (e / EXPONENTS)
        scale = (channel / np.sqrt(channel.max() * channel.min())).astype(np.float16).astype(float)
        ratio = np.linalg.norm(weight * scale.repeat(k, 1)[:, None]) / np.linalg.norm(weight)
        scale = (scale / ratio).astype(np.float16)
        spread = scale.astype(float).repeat(k, 1)
        total = 0.0
        for i, s in enumerate(step):
            g, r = divmod(i, weight.shape[1])
            value = np.rint(weight[g, r] * spread[g] / s) * s / spread[g] - weight[g, r]
            total += value @ moment[g] @ value
        if total < least * (1 - 1e-4):
            best, least = scale, total
    return best


@pytest.mark.parametrize(("groups", "spread"), [(1, 2.0), (2, 1.0)])
def test_the_scale_is_that_of_a_naive_search(groups: int, spread: float) -> None:
    problem = layer(groups, spread)
    tensor = coded(AWQ(EXPONENTS, 4, 0.5), problem, 3)
    step = ScalarRounds(stream_of(problem, 3), [problem]).first_steps(problem).to(torch.float16).double().numpy()
    np.testing.assert_array_equal(tensor.column_scale.numpy(), naive_scale(problem, step))
    # nearest levels of the stored steps
    spreads = tensor.column_scale.double().repeat_interleave(4, 1)[:, None]
    units = (problem.weight.double() * spreads).flatten(0, 1) / tensor.scale.double()
    assert torch.equal(units.round() + 128, tensor.codes.double())
    assert error(tensor.dequantize(), problem) < error(coded(RTN("mse"), problem, 3).dequantize(), problem)


def test_equal_channels_are_rounded_as_by_rtn_and_store_no_scales() -> None:
    problem = layer(2, 1.0, magnitude=0.7)
    awq, rtn = coded(AWQ(EXPONENTS, 4, 0.5), problem, 2.5), coded(RTN("mse"), problem, 2.5)
    assert awq.column_scale is None
    assert torch.equal(awq.codes, rtn.codes) and torch.equal(awq.scale, rtn.scale)


@pytest.mark.parametrize("bits", [1, 2.5, 6])
@pytest.mark.parametrize("count", ["code", "stored"])
def test_the_budget_is_never_exceeded_and_the_file_reads_back(bits: float, count: str) -> None:
    problem = layer(1, 2.0, positions=9)
    tensor = coded(AWQ(EXPONENTS, 4, 0.5), problem, bits, count)
    buffers, header = pack_model({"layer": tensor})
    stored, weights = 8 * buffer_bytes(buffers), problem.weight.numel()
    taken = stored if count == "stored" else code_bits(tensor)
    assert (bits - 0.3) * weights < taken <= bits * weights
    assert torch.equal(unpack_model(buffers, header)["layer"].dequantize(), tensor.dequantize())


def test_column_groups_are_refused() -> None:
    with pytest.raises(Refused, match=r"method\.group_size=16: codec=entropy has one step per row; choose null"):
        coded(AWQ(EXPONENTS, 4, 0.5, 16), layer(1, 1.0), 3)
