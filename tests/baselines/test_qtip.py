"""QTIP: distortion of Gaussian weights, rotated feedback against its definition, and what is stored."""

from dataclasses import replace

import numpy as np
import odd_networks as odd
import pytest
import torch
from naive_quant import FixedWidths, moment_of, problem
from rounding_loop import rounded

import bayesq
from baselines.qtip import QTIP
from bayesq.contract import Context
from bayesq.errors import Refused
from bayesq.in_step import scaled
from bayesq.quant.accounting import stored_bytes
from bayesq.quant.codes import Affine, Bitshift
from bayesq.quant.layout import obstacle
from bayesq.quant.packing import pack_model, unpack_model

# Expected squared errors for a standard normal source with 2**16 states, as published.
PUBLISHED = {2: 0.0683, 3: 0.0176, 4: 0.0047}


@pytest.mark.parametrize("width", [2, 3, 4])
def test_distortion_of_gaussian_weights(width: int) -> None:
    """4096 states are worse than the published 65,536 by up to a sixth, and better than scalar Lloyd-Max levels."""
    weight = torch.randn(1, 512, 128, generator=torch.Generator().manual_seed(width))
    widths = torch.full((512,), width, dtype=torch.uint8)
    ((_, tensor),) = rounded(
        QTIP(4096, "hash", 0.01), [problem(weight, torch.eye(128)[None])], FixedWidths(layer=widths)
    )
    distortion = float((tensor.dequantize() - weight).square().mean() / weight.square().mean())
    assert 4.0**-width < PUBLISHED[width] < distortion < 1.17 * PUBLISHED[width]
    assert distortion < 0.7 * {2: 0.1175, 3: 0.03454, 4: 0.009497}[width]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_distortion_with_congruential_levels(width: int) -> None:
    """1,024 of these states are better than 4,096 of the others, and 4,096 about as good as the published 65,536."""
    weight = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(width))
    widths, distortion = torch.full((512,), width, dtype=torch.uint8), {}
    for levels, states in (("hash", 4096), ("congruential", 1024), ("congruential", 4096)):
        method = QTIP(states, levels, 0.01)
        ((_, tensor),) = rounded(method, [problem(weight, torch.eye(64)[None])], FixedWidths(layer=widths))
        distortion[levels, states] = float((tensor.dequantize() - weight).square().mean() / weight.square().mean())
    assert distortion["congruential", 4096] < distortion["congruential", 1024] < distortion["hash", 4096]
    assert distortion["congruential", 4096] < 1.05 * PUBLISHED[width]


def test_short_columns_get_fewer_states_or_scalar_codes() -> None:
    method = QTIP(4096, "hash", 0.01)
    assert method.code_for(23) is None
    assert [method.code_for(b).states for b in (24, 48, 60, 96, 4608)] == [256, 1024, 2048, 4096, 4096]
    assert QTIP(256, "hash", 0.01).code_for(4608).states == 256
    assert QTIP(65536, "hash", 0.01).code_for(96).states == 16384
    other = QTIP(4096, "congruential", 0.01)
    assert other.code_for(11) is None
    assert [other.code_for(b).states for b in (12, 59, 60, 127, 128)] == [256, 256, 1024, 1024, 4096]
    layer = problem(torch.zeros(1, 12, 4), torch.eye(4)[None])
    assert method.distortion(layer, 3) < 0.03 < method.distortion(problem(torch.zeros(1, 4, 4), torch.eye(4)[None]), 3)


def test_outliers_are_spread_before_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 48, 36, generator=generator)
    weight[0, 5, 7], weight[0, :, 9] = 40.0, weight[0, :, 9] * 8
    widths = torch.full((48,), 3, dtype=torch.uint8)
    ((_, tensor),) = rounded(QTIP(256, "hash", 0.01), [problem(weight, torch.eye(36)[None])], FixedWidths(layer=widths))
    assert (tensor.dequantize() - weight).square().mean() < 0.04 * weight.square().mean()


def test_feedback_runs_in_the_rotated_metric() -> None:
    """The error under A is below that of rounding under the identity, and the codes are those of the rotated layer."""
    generator = torch.Generator().manual_seed(1)
    weight, moment = torch.randn(1, 24, 20, generator=generator), moment_of(20, 60, generator)
    widths = torch.full((24,), 3, dtype=torch.uint8)
    errors = {}
    for kind, seen in (("feedback", moment), ("identity", torch.eye(20, dtype=torch.float64))):
        ((_, tensor),) = rounded(QTIP(256, "hash", 0.01), [problem(weight, seen[None])], FixedWidths(layer=widths))
        delta = (tensor.dequantize() - weight)[0].double()
        errors[kind] = float(torch.einsum("rc,cd,rd->", delta, moment, delta))
    assert errors["feedback"] < 0.8 * errors["identity"]


def test_every_layer_has_its_seed_and_the_file_gives_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    layers = []
    for k, shape in enumerate([(1, 10, 27), (4, 1, 9), (2, 8, 12)]):
        moments = torch.stack([moment_of(shape[2], 40, generator) for _ in range(shape[0])])
        layer = problem(torch.randn(shape, generator=generator), moments)
        layer.name = f"layer{k}"
        layers.append(layer)
    widths = {layer.name: torch.full((layer.rows,), 3, dtype=torch.uint8) for layer in layers}
    tensors = {layer.name: tensor for layer, tensor in rounded(QTIP(256, "hash", 0.01), layers, FixedWidths(**widths))}
    assert len({tensor.rotation for tensor in tensors.values()}) == 3
    assert [isinstance(tensor.code, Bitshift) for tensor in tensors.values()] == [True, False, True]
    for layer in layers:
        error = (tensors[layer.name].dequantize() - layer.weight).square().mean() / layer.weight.square().mean()
        assert error < 0.1
    read = unpack_model(*pack_model(tensors))
    assert all(torch.equal(read[name].dequantize(), tensor.dequantize()) for name, tensor in tensors.items())
    codes, scales, zeros, width, seed = 10 * 27 * 3 / 8, 10 * 2, 10, 1, 4
    assert stored_bytes(tensors["layer0"]) == int(np.ceil(codes)) + scales + zeros + width + seed


def test_seeds_are_counted_against_the_budget() -> None:
    layers = [problem(torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)), torch.eye(32)[None])]
    counted = []

    def allocate(layers, codebook_bits=0, distortion=None):
        counted.append(codebook_bits)
        return {"layer": torch.full((64,), 3, dtype=torch.uint8)}

    QTIP(256, "hash", 0.01).prepare(layers, allocate, Context.of_seed(0))
    assert counted == [8 * 4]


def test_rows_of_rotated_weights_are_not_scaled_and_not_exported() -> None:
    weight = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    widths = torch.full((8,), 4, dtype=torch.uint8)
    ((_, tensor),) = rounded(QTIP(256, "hash", 0.01), [problem(weight, torch.eye(12)[None])], FixedWidths(layer=widths))
    assert scaled(tensor, torch.full((8,), 2.0)) is tensor
    affine = replace(tensor, code=Affine(), zero=torch.zeros_like(tensor.zero))
    assert obstacle(replace(affine, rotation=None), [4]) is None
    assert "rotated weights" in (obstacle(affine, [4]) or "")


@pytest.mark.parametrize("inputs", ["full", "prefix", "paired"])
def test_it_takes_correction_and_distillation(inputs: str) -> None:
    module, x = odd.Plain().eval(), torch.randn(40, 4, odd.WIDTH, generator=torch.Generator().manual_seed(0))
    found = []
    for more in ({}, {"correction": "moments"}, {"distill": True}):
        quantized, _ = bayesq.quantize(module, [x], method="qtip", bits=3, inputs=inputs, **more)
        found.append(torch.cat([part.flatten() for part in quantized.state_dict().values()]))
        assert torch.isfinite(found[-1]).all()
    assert not torch.equal(found[0], found[1])


def test_bad_values_are_refused_with_their_key() -> None:
    with pytest.raises(Refused, match=r"^method\.states=100: choose one of 256, 512"):
        QTIP(100, "hash", 0.01)
    with pytest.raises(Refused, match=r"^method\.states=2048: choose one of 256, 1024, 4096"):
        QTIP(2048, "congruential", 0.01)
    with pytest.raises(Refused, match=r"^method\.levels=other: choose one of hash, congruential"):
        QTIP(256, "other", 0.01)
    with pytest.raises(Refused, match=r"^method\.damping=-1: must be 0 or more"):
        QTIP(256, "hash", -1)
