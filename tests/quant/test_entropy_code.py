"""Entropy-coded codes: streams decode to what was coded, have the same bytes everywhere; wrong ones are refused."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_entropy.write import golden_layers
from quant_strategies import identical

from bayesq.entropy import RateClasses, SymbolSums
from bayesq.entropy_rounding import PRICE
from bayesq.quant.accounting import code_bits
from bayesq.quant.codes import EntropyCode, RateTables
from bayesq.quant.codes.entropy import level_sets
from bayesq.quant.codes.rate_tables import BINS
from bayesq.quant.codes.trellis import POLYNOMIALS
from bayesq.quant.entropy_search import EntropyGrid
from bayesq.quant.file import Packed, read_packed, write_packed
from bayesq.quant.packing import pack, pack_model, unpack, unpack_model
from bayesq.quant.tensor import QuantizedTensor

GOLDEN = Path(__file__).parent / "packed_entropy" / "golden.safetensors"


def tables(classes: int = 3, seed: int = 0) -> RateTables:
    """Tables of normal symbols, wider from class to class."""
    random = np.random.default_rng(seed)
    codes = [np.rint(random.normal(0, 2.0**k, (2, 4000))).clip(-128, 127).astype(int) + 128 for k in range(classes)]
    return RateTables.of(np.array([[np.bincount(part, minlength=256) for part in both] for both in codes]))


@st.composite
def coded_layers(draw: st.DrawFn) -> QuantizedTensor:
    """Layers of odd shapes, with and without a trellis, with any codes."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    rows, columns = groups * draw(st.integers(1, 6)), draw(st.integers(1, 20))
    states, classes = draw(st.sampled_from([None, 4, 8, 64])), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = 128 + random.normal(0, draw(st.sampled_from([0.1, 2, 60])), (rows, columns)).round().clip(-128, 127)
    rate_class = torch.from_numpy(random.integers(0, classes, rows).astype(np.uint8))
    return QuantizedTensor(
        codes=torch.from_numpy(codes.astype(np.uint8)),
        width=torch.full((rows,), 8, dtype=torch.uint8),
        scale=torch.from_numpy(random.uniform(1e-3, 2, (rows, 1))).half(),
        zero=torch.full((rows, 1), 128, dtype=torch.uint8),
        groups=groups,
        code=EntropyCode(tables(classes), rate_class, states),
    )


def naive_weights(tensor: QuantizedTensor) -> np.ndarray:
    """The docstring of `bayesq.quant.codes.entropy`, weight by weight, from the bytes of the tables."""
    assert isinstance(tensor.code, EntropyCode)
    stored, shifts, place = tensor.code.tables.buffer.tolist(), [], 1
    for _ in range(2 * stored[0]):
        shifts.append(stored[place + 1 : place + 3])
        place += 3 + stored[place]
    rows, columns = tensor.codes.shape
    weights = np.zeros((rows, columns))
    for column in range(columns):
        bits: list[int] = []
        for row in range(rows):
            if row % (rows // tensor.groups) == 0:
                bits = []
            symbol, which = int(tensor.codes[row, column]) - 128, 0
            if tensor.code.states is not None:
                h0, h1 = POLYNOMIALS[tensor.code.states]
                memory = int(math.log2(tensor.code.states))
                past = sum(bit << (i + 1) for i, bit in enumerate(reversed(bits[-memory:])))
                which = bin(past & h1).count("1") % 2
                parity = (symbol % 2) ^ (which and symbol < 0)
                bits.append(int(parity) ^ bin(past & h0).count("1") % 2)
            shift = shifts[2 * int(tensor.code.rate_class[row]) + which][0 if abs(symbol) == 1 else 1]
            level = np.sign(symbol) * (abs(symbol) - which / 2 + (shift - 128) / 512)
            weights[row, column] = float(tensor.scale[row, 0]) * level
    return weights


@settings(max_examples=40, deadline=None)
@given(coded_layers())
def test_layers_survive_packing_and_decode_as_documented(tensor: QuantizedTensor) -> None:
    buffers, facts = pack(tensor)
    assert "zero" not in buffers and facts["code"] == "entropy"
    again = unpack(buffers, facts, {"entropy": tensor.code.codebooks()[0]})
    assert identical(again, tensor)
    rows = tensor.codes.shape[0]
    np.testing.assert_allclose(
        tensor.dequantize().reshape(rows, -1).double(), naive_weights(tensor), atol=1e-4, rtol=1e-5
    )
    assert code_bits(tensor) == 8 * len(buffers["codes"])


def test_streams_have_their_ideal_length() -> None:
    generator = np.random.default_rng(0)
    codes = torch.from_numpy((128 + generator.normal(0, 2, (64, 300)).round()).astype(np.uint8))
    code = EntropyCode(tables(), torch.ones(64, dtype=torch.uint8), 8)
    lengths = code.tables.lengths()
    sets = level_sets(codes.numpy(), 8, 1)
    ideal = sum(lengths[1, which, k] for which, k in zip(sets.flat, codes.numpy().flat, strict=True))
    assert ideal <= code.code_bits(codes, torch.full((64,), 8), 1) < 1.002 * ideal + 64
    # the table of a wider class takes more bits
    assert EntropyCode(code.tables, torch.full((64,), 2, dtype=torch.uint8), 8).code_bits(codes, codes, 1) > 1.1 * ideal


def test_golden_file_is_written_and_read_bit_for_bit(tmp_path: Path) -> None:
    layers = golden_layers()
    packed = read_packed(GOLDEN)
    assert all(identical(packed.tensors[name], layers[name]) for name in layers)
    write_packed(tmp_path / "again.safetensors", Packed(layers))
    assert (tmp_path / "again.safetensors").read_bytes() == GOLDEN.read_bytes()
    assert packed.tensors["trellis"].code.code_bits(packed.tensors["trellis"].codes, torch.zeros(1), 1) == 3872


def test_frequencies_follow_from_the_stored_bytes() -> None:
    stored = golden_layers()["trellis"].code.codebooks()[0]
    lengths = stored.lengths()[0, 0]
    frequency = [max(math.floor(2 ** (20 - b / 8)), 1) for b in (10, 20, 26, 34, 44)] + [1] * 124
    total = sum(frequency[abs(k - 128)] for k in range(256))
    for k in range(256):
        assert lengths[k] == pytest.approx(-math.log2(frequency[abs(k - 128)] / total), abs=1e-5)
    # sizes from 16 on share bins, of the same frequency
    assert BINS[15] == 15 and BINS[16] == BINS[17] == 16 and BINS[18] == 17 and BINS[127] < 48


@pytest.mark.parametrize(
    "buffer", [[], [0], [17], [1, 1, 128, 128], [1, 0, 1, 1, 1, 128, 128, 5], [1, 1, 1, 1, 0, 1, 1, 1, 0, 9]]
)
def test_bytes_that_are_no_tables_are_refused(buffer: list[int]) -> None:
    with pytest.raises(ValueError, match="tables: "):
        RateTables("entropy", torch.tensor(buffer, dtype=torch.uint8))


def test_streams_that_were_not_written_are_refused() -> None:
    tensor = golden_layers()["trellis"]
    buffers, facts = pack(tensor)
    books = {"entropy": tensor.code.codebooks()[0]}
    stream = buffers["codes"]
    for wrong in (
        stream[:-4],
        stream[:-1],
        torch.cat([stream, stream[:4]]),
        torch.cat([stream, stream[:1] * 0]),
        stream[:2],
    ):
        with pytest.raises(ValueError, match="codes: "):
            unpack(buffers | {"codes": wrong}, facts, books)
    for place in range(0, len(stream), 7):
        flipped = stream.clone()
        flipped[place] ^= 16
        try:
            other = unpack(buffers | {"codes": flipped}, facts, books)
        except ValueError:
            continue
        assert torch.equal(pack(other)[0]["codes"], flipped) and not torch.equal(other.codes, tensor.codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": 5}, "states: needs"),
        ({"states": True}, "states: needs"),
        ({"tables": "other"}, "there are no code tables"),
        ({"tables": 3}, "there are no code tables"),
        ({"shape": [24, 400000]}, "cannot hold"),
        ({"mixed": True}, "width: "),
    ],
)
def test_facts_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    tensor = golden_layers()["trellis"]
    buffers, facts = pack(tensor)
    with pytest.raises(ValueError, match=message):
        unpack(buffers, facts | change, {"entropy": tensor.code.codebooks()[0]})


def test_models_store_the_tables_once_and_no_zero_points() -> None:
    layers = golden_layers()
    buffers, header = pack_model(layers)
    assert [key for key in buffers if key.startswith("codebook/")] == ["codebook/entropy"]
    with pytest.raises(ValueError, match="belongs to no layer"):
        unpack_model(buffers | {"scalar/zero": layers["scalar"].zero}, header)
    other = replace(layers["scalar"], code=EntropyCode(tables(), layers["scalar"].code.rate_class, None))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="two different codebooks are named entropy"):
        pack_model(layers | {"scalar": other})


@pytest.mark.parametrize("states", [None, 4])
def test_search_finds_the_cheapest_codes(states: int | None) -> None:
    """Against all 5^4 codes of short columns."""
    coded, generator = tables(), torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, dtype=torch.float64, generator=generator)
    scale = torch.tensor([0.5, 0.8, 1.0, 0.7], dtype=torch.float64)
    cost = torch.tensor([3.0, 5.0, 8.0, 2.0], dtype=torch.float64)
    curvature = torch.rand(4, 12, dtype=torch.float64, generator=generator) + 0.5
    rate_class = torch.tensor([0, 1, 1, 2], dtype=torch.uint8)
    codes, values = EntropyGrid(scale, cost, curvature, rate_class, coded, states).round_matrix(x)

    def total(candidate: torch.Tensor) -> torch.Tensor:
        """Cost of each column of codes [4, n] for x."""
        sets = torch.from_numpy(level_sets(candidate.numpy(), states, 1)).long()
        place = rate_class.long()[:, None], sets, candidate.long()
        level, bits = coded.levels()[place].double(), torch.from_numpy(coded.lengths())[place]
        return level, bits

    every = torch.tensor(list(itertools.product(range(126, 131), repeat=4)), dtype=torch.uint8).T.contiguous()
    level, bits = total(every)
    found_level, found_bits = total(codes)
    torch.testing.assert_close(values, scale[:, None] * found_level)
    for c in range(12):
        weight = (cost * curvature[:, c])[:, None]
        all_costs = (weight * (x[:, c : c + 1] / scale[:, None] - level).square() + bits).sum(0)
        found = (weight[:, 0] * (x[:, c] / scale - found_level[:, c]).square() + found_bits[:, c]).sum()
        assert float(found) <= float(all_costs.min()) + 1e-5


@pytest.mark.parametrize("step", [0.53, 1.1])  # about 3 and 2 bits
def test_a_trellis_comes_close_to_the_rate_distortion_bound(step: float) -> None:
    """Normal weights, 1,024 rows: bits above 1/2 log2(1 / D) at BayesQ's third rounding and with tables at rest.

    `pytest -s -k rate_distortion_bound` prints them. Scalar codes are .25 bit above it.
    """
    x = torch.randn(1024, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones, rate_class = torch.ones(1024, dtype=torch.float64), torch.zeros(1024, dtype=torch.uint8)
    gaps = {}
    for states in (64, None):
        coded = RateClasses.covering([torch.tensor([1 / step], dtype=torch.float64)]).normal_tables()
        for rounding in range(1, 9):
            grid = EntropyGrid(step * ones, ones / PRICE, torch.ones_like(x), rate_class, coded, states)
            codes, values = grid.round_matrix(x)
            bits = EntropyCode(coded, rate_class, states).code_bits(codes, codes, 1) / x.numel()
            gaps[states, rounding] = bits - 0.5 * math.log2(float(x.var() / (x - values).square().mean()))
            sums = SymbolSums.empty(1)
            sums.add(codes, level_sets(codes.numpy(), states, 1), rate_class, x / step, torch.ones_like(x))
            coded, _ = sums.tables()
            print(
                f"states {states}, rounding {rounding}: {bits:.2f} bits, {gaps[states, rounding]:.3f} above the bound"
            )
    assert gaps[64, 3] < 0.1 and gaps[64, 8] < 0.06 and 0.23 < gaps[None, 8] < 0.27
