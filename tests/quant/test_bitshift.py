"""Bitshift codes: decoding against strings of digits, the search against enumeration, distortion of normal weights."""

from itertools import product

import numpy as np
import pytest
import torch
from naive_quant import naive_dequantize
from quant_strategies import identical, tensor_of

from bayesq.quant.bitshift import BitshiftGrid, best_ring, bitshift_distortion
from bayesq.quant.codes import Bitshift
from bayesq.quant.codes.bitshift import normal_levels
from bayesq.quant.feedback import feedback_factor, feedback_round
from bayesq.quant.packing import pack_model, unpack, unpack_model

# Expected squared errors for a standard normal source with 2**16 states, as published.
PUBLISHED = {2: 0.0683, 3: 0.0176, 4: 0.0047}


def test_levels_are_the_normal_quantiles_in_another_order() -> None:
    levels = normal_levels(4096)
    quantiles = torch.special.ndtri((torch.arange(4096).double() + 0.5) / 4096).half().float()
    assert torch.equal(levels.sort().values, quantiles)
    assert torch.equal(levels, levels.half().float())
    # states that share all bits but the newest or the oldest have unrelated levels
    for other in (torch.arange(4096) ^ 1, torch.arange(4096) ^ 2048):
        assert abs(float((levels * levels[other]).mean())) < 0.05


@pytest.mark.parametrize("widths", [[3] * 7, [2, 8, 3, 2, 5, 4]])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_codes_are_decoded_digit_by_digit(widths: list[int], groups: int) -> None:
    tensor = tensor_of(groups * len(widths), 5, groups * widths, code=Bitshift(512))
    tensor = type(tensor)(**{**vars(tensor), "groups": groups})
    expected = torch.from_numpy(naive_dequantize(tensor)).float()
    torch.testing.assert_close(tensor.dequantize(), expected)
    read = unpack_model(*pack_model({"layer": tensor}))["layer"]
    assert identical(read, tensor)


def test_bad_headers_are_refused() -> None:
    buffers, _ = pack_model({"layer": tensor_of(4, 3, [4] * 4, code=Bitshift(256))})
    facts = {"shape": [4, 3], "groups": 1, "group_size": None, "mixed": False, "code": "bitshift", "states": 256}
    own = {key.removeprefix("layer/"): value for key, value in buffers.items()}
    assert unpack(own, facts, {}).code.states == 256
    for states in (100, 2**17, -1, None, "256", True):
        with pytest.raises(ValueError, match=r"^states: needs one of 256, 512"):
            unpack(own, facts | {"states": states}, {})


@pytest.mark.parametrize("widths", [[2] * 5, [3, 2, 4, 2]])
def test_the_search_finds_the_best_of_all_rings(widths: list[int]) -> None:
    """With the right bits before the first row; what `round` guesses is no better."""
    generator = torch.Generator().manual_seed(len(widths))
    x = torch.randn(12, len(widths), generator=generator, dtype=torch.float64)
    scale = torch.rand(len(widths), generator=generator, dtype=torch.float64) + 0.5
    every = torch.tensor(list(product(*(range(2**w) for w in widths))), dtype=torch.uint8).T.contiguous()
    width = torch.tensor(widths, dtype=torch.uint8)
    values = normal_levels(256)[Bitshift(256).positions(every, width, 1)] * scale[:, None]
    grid, total, least = BitshiftGrid(scale, width, 256), 0.0, 0.0
    for column in x:
        errors = (column[:, None] - values).square().sum(0)
        best = int(errors.argmin())
        code, value = grid.round(column, 0)
        first = int(Bitshift(256).positions(every[:, best : best + 1], width, 1)[-1, 0]) & ((256 >> widths[0]) - 1)
        state = np.empty(len(widths), np.int64)
        weight = scale.square().float().numpy()
        best_ring((column / scale).float().numpy(), weight, np.array(widths), normal_levels(256).numpy(), first, state)
        assert (state & (2 ** np.array(widths) - 1)).tolist() == every[:, best].tolist()
        decoded = normal_levels(256)[Bitshift(256).positions(code[:, None], width, 1)][:, 0] * scale
        torch.testing.assert_close(decoded, value)
        total, least = total + float((value - column).square().sum()), least + float(errors[best])
    assert least <= total


def test_the_state_at_the_seam_is_guessed_well() -> None:
    """In columns of 16 rows the ring is nearly as good as the best one over all states at the seam."""
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, ones, widths = normal_levels(1024).numpy(), np.ones(16, np.float32), np.full(16, 3)
    grid, state = BitshiftGrid(torch.ones(16), torch.full((16,), 3), 1024), np.empty(16, np.int64)
    least = total = 0.0
    for column in x:
        errors = []
        for first in range(1024 >> 3):
            best_ring(column.float().numpy(), ones, widths, levels, first, state)
            errors.append(float(np.square(levels[state] - column.numpy()).sum()))
        least, total = least + min(errors), total + float((grid.round(column, 0)[1] - column).square().sum())
    assert 0.9999 * least <= total < 1.08 * least


def test_columns_are_rounded_one_by_one_with_feedback() -> None:
    """The compiled block is the same as one search per column, with the errors fed to later columns."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    x = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    factor = feedback_factor(x.T @ x, 0.01, act_order=False)
    grid = BitshiftGrid(torch.full((12,), 1.1), torch.full((12,), 3), 256)
    codes, _, targets = feedback_round(weight, factor, grid)
    moved = weight.clone()
    for j in range(40):
        code, value = grid.round(moved[:, j], j)
        torch.testing.assert_close(moved[:, j], targets[:, j])
        assert torch.equal(code, codes[:, j])
        moved[:, j + 1 :] += (weight[:, j] - value)[:, None] * factor.upper[j, j + 1 :]
    with pytest.raises(ValueError, match="fewer bits than a state"):
        BitshiftGrid(torch.ones(3), torch.full((3,), 2), 256)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_distortion_of_normal_weights_nears_the_published_one(width: int) -> None:
    few, more = (bitshift_distortion(width, states, 256, 1.1) for states in (256, 4096))
    assert PUBLISHED[width] < more < few
    assert more < 1.25 * PUBLISHED[width]


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 3, 4])
def test_distortion_with_as_many_states_as_published(width: int) -> None:
    assert bitshift_distortion(width, 2**16, 256, 1.1) == pytest.approx(PUBLISHED[width], rel=0.05)
