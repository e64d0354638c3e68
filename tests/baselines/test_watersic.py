"""WaterSIC against a float64 loop, the rate-distortion bound of Gaussian weights, and its packed form."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesq
from baselines.gptq import GPTQ
from baselines.watersic import WaterSIC, cheapest_classes, column_scale, refitted
from bayesq.budget import Budget
from bayesq.contract import Context, LayerProblem, Method
from bayesq.entropy import StreamAllocation, full_width
from bayesq.errors import Refused
from bayesq.loop import quantize_layers
from bayesq.quant.accounting import buffer_bytes, code_bits, stored_bytes
from bayesq.quant.codes import RateTables
from bayesq.quant.codes.column_entropy import ColumnEntropyCode
from bayesq.quant.feedback import feedback_factor
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.uniform import Uniform


def moments(groups: int, columns: int, decay: float, seed: int = 0) -> Tensor:
    """Covariances with eigenvalues 1 to 10**-decay and random eigenvectors: float32 [g, c, c]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, -decay, columns, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64))[0]
    return ((basis * values) @ basis.mT).float()


def problem(weight: Tensor, moment: Tensor, name: str = "layer") -> LayerProblem:
    given = {"input_moment": moment, "input_magnitude": moment.diagonal(dim1=1, dim2=2).sqrt()}
    return LayerProblem(name, "Linear", weight, given.__getitem__)


def gaussian(groups: int, rows: int, columns: int, decay: float, name: str = "layer") -> LayerProblem:
    weight = torch.randn(groups, rows, columns, generator=torch.Generator().manual_seed(7))
    return problem(weight, moments(groups, columns, decay), name)


def coded(method: Method, layers: list[LayerProblem], bits: float, count: str = "code") -> dict[str, QuantizedTensor]:
    stream = StreamAllocation(Uniform(), Budget(bits, count), {layer.name: layer for layer in layers})
    context = replace(Context.of_seed(0), stream=stream)
    return {layer.name: tensor for layer, tensor in quantize_layers(method, layers, lambda *_: {}, context)}


def distortion(tensor: QuantizedTensor, layer: LayerProblem) -> float:
    error = (tensor.dequantize() - layer.weight).double()
    moment = layer.statistic("input_moment").double()
    return float(sum((e @ a * e).sum() for e, a in zip(error, moment, strict=True))) / layer.weight.numel()


def gaussian_bound(distortion: float, eigenvalues: np.ndarray) -> float:
    """Least bits per weight of unit variance at this distortion, by reverse water-filling."""
    low, high = 1e-12, float(eigenvalues.max())
    for _ in range(200):
        level = math.sqrt(low * high)
        low, high = (level, high) if np.minimum(eigenvalues, level).mean() < distortion else (low, level)
    return float(np.maximum(0.5 * np.log2(eigenvalues / level), 0).mean())


@pytest.mark.parametrize(("decay", "bits"), [(0, 2), (0, 3), (1, 4), (2, 5)])
def test_gaussian_weights_are_a_quarter_bit_above_the_bound(decay: float, bits: float) -> None:
    """.2546 bit in theory; code tables of whole classes and rounded frequencies may take .015 bit more."""
    layer = gaussian(1, 512, 96, decay)
    tensor = coded(WaterSIC(True, 1e-6), [layer], bits)["layer"]
    rate = code_bits(tensor) / layer.weight.numel()
    eigenvalues = np.logspace(0, -decay, 96)
    assert bits - 0.06 < rate <= bits
    assert 0.2 < rate - gaussian_bound(distortion(tensor, layer), eigenvalues) < 0.255 + 0.015


def test_it_has_less_error_than_gptq_where_inputs_are_correlated() -> None:
    layer = gaussian(1, 512, 96, 4)
    error = {}
    for method in (WaterSIC(True, 1e-3), GPTQ("mse", True, 1e-3, None)):
        error[type(method)] = distortion(coded(method, [layer], 4)["layer"], layer)
    assert error[WaterSIC] < 0.7 * error[GPTQ]


def naive(weight: np.ndarray, moment: np.ndarray, damping: float, step: np.ndarray) -> np.ndarray:
    """Integers [r, c] of the paper's loop, columns in order of decreasing energy: Y = W L, one column after another.

    Args:
        step: [r] whitened step of each row, equal in all columns.
    """
    order = np.argsort(-np.diag(moment), kind="stable")
    a = moment[np.ix_(order, order)] + damping * np.diag(moment).mean() * np.eye(len(moment))
    # the column that is rounded first must see all later ones: a lower factor of the reversed moment
    lower = np.linalg.cholesky(a[::-1, ::-1])
    y = weight[:, order][:, ::-1] @ lower
    codes = np.zeros(weight.shape)
    for j in reversed(range(len(a))):
        column_step = step / lower[j, j]
        z = np.rint(y[:, j] / (column_step * lower[j, j]))
        y -= (column_step * z)[:, None] * lower[j]
        codes[:, j] = z
    restored = np.zeros(weight.shape)
    restored[:, order] = codes[:, ::-1]
    return restored


@pytest.mark.parametrize("groups", [1, 3])
def test_codes_are_those_of_the_papers_loop(groups: int) -> None:
    layer = gaussian(groups, 20, 24, 2)
    method = WaterSIC(True, 0.01)
    factors = [feedback_factor(one, 0.01) for one in layer.statistic("input_moment")]
    scale = torch.stack([column_scale(factor) for factor in factors])
    tensor = coded(method, [layer], 3)["layer"]
    # the refit changes scales after the rounding: the row steps of the rounding are found from a run without it
    kept = coded_without_refit(layer, 3)
    assert torch.equal(kept.codes, tensor.codes) and torch.equal(kept.column_scale, scale)
    assert distortion(tensor, layer) < distortion(kept, layer)
    step = kept.scale.double().reshape(groups, 20).numpy()
    same = total = 0
    for g in range(groups):
        root = factors[g].column_curvature.sqrt().log().mean().exp()
        moment = layer.statistic("input_moment")[g].double().numpy()
        expected = naive(layer.weight[g].double().numpy(), moment, 0.01, step[g] * float(root))
        got = kept.codes.reshape(groups, 20, 24)[g].numpy().astype(float) - 128
        same, total = same + (got == expected).sum(), total + got.size
    # column scales are rounded to fp16, which moves some entries across the middle of two levels
    assert same / total > 0.99


def coded_without_refit(layer: LayerProblem, bits: float) -> QuantizedTensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baselines.watersic.refitted", lambda tensor, *_: tensor)
        return coded(WaterSIC(True, 0.01), [layer], bits)["layer"]


def test_the_refit_solves_its_least_squares() -> None:
    """Factors of column classes first, against a dense solution over all weights."""
    layer = gaussian(2, 200, 12, 2)
    tensor = coded_without_refit(layer, 2)
    moment, weight = layer.statistic("input_moment").double(), layer.weight.double()
    classes = tensor.code.column_class.tolist()
    designs, targets = [], []
    for g in range(2):
        root = torch.linalg.cholesky(moment[g] + 1e-12 * torch.eye(12))
        values = tensor.dequantize()[g].double()
        parts = [values * torch.tensor([float(c == k) for c in classes]) for k in sorted(set(classes))]
        designs.append(torch.stack([(part @ root).flatten() for part in parts], 1))
        targets.append((weight[g] @ root).flatten())
    factor = torch.linalg.lstsq(torch.cat(designs), torch.cat(targets)[:, None]).solution[:, 0]
    moved = refitted(tensor, weight, moment)
    by_class = dict(zip(sorted(set(classes)), factor.tolist(), strict=True))
    for c, k in enumerate(classes):
        ratio = tensor.column_scale[:, c].double() / moved.column_scale[:, c].double()
        torch.testing.assert_close(ratio, torch.full((2,), by_class[k], dtype=torch.float64), rtol=2e-3, atol=0)
    assert distortion(moved, layer) < distortion(tensor, layer)


def test_classes_are_the_cheapest_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(126, 131, (5, 7), generator=generator, dtype=torch.uint8)
    other = torch.tensor([0, 2, 1, 0, 3, 3, 2], dtype=torch.uint8)
    lengths = torch.rand(4, 256, generator=generator, dtype=torch.float64)
    for r, chosen in enumerate(cheapest_classes(codes, other, lengths).tolist()):
        costs = [
            sum(lengths[min(k + b, 3), c] for c, b in zip(codes[r].tolist(), other.tolist(), strict=True))
            for k in range(4)
        ]
        assert chosen == int(np.argmin(costs))


def test_classes_of_columns_are_paid_like_their_scales() -> None:
    """A stored budget pays 4 bits a column, .4 a weight here; a budget of code bits pays the tables, .2 a weight."""
    layers = [gaussian(1, 10, 160, 0, name) for name in "abcdefghijkl"]
    taken = sum(map(code_bits, coded(WaterSIC(True, 0.01), layers, 3).values())) / (12 * 10 * 160)
    assert 2.7 < taken <= 3


@pytest.mark.parametrize("bits", [1.2, 3, 8])
@pytest.mark.parametrize("count", ["code", "stored"])
def test_the_budget_is_never_exceeded_and_the_file_reads_back(bits: float, count: str) -> None:
    layers = [gaussian(1, 200, 36, 2, "wide"), gaussian(4, 30, 18, 1, "grouped")]
    weights = sum(layer.weight.numel() for layer in layers)
    if count == "stored" and bits < 2:
        with pytest.raises(Refused):
            coded(WaterSIC(True, 0.01), layers, 0.5, count)
        return
    tensors = coded(WaterSIC(True, 0.01), layers, bits, count)
    buffers, header = pack_model(tensors)
    stored, taken = 8 * buffer_bytes(buffers) / weights, sum(map(code_bits, tensors.values())) / weights
    assert (stored if count == "stored" else taken) <= bits
    if bits == 3:
        assert (stored if count == "stored" else taken) > bits - 0.6
    again = unpack_model(buffers, header)
    for name, tensor in tensors.items():
        assert torch.equal(again[name].dequantize(), tensor.dequantize())
        # column scales and classes are counted to the byte
        packed = {key: value for key, value in buffers.items() if key.startswith(f"{name}/")}
        assert stored_bytes(tensor) == buffer_bytes(packed)
        assert packed[f"{name}/column_scale"].numel() == tensor.column_scale.numel()


def test_corrupt_classes_and_streams_are_refused() -> None:
    layer = gaussian(1, 100, 40, 2)
    buffers, header = pack_model(coded(WaterSIC(True, 0.01), [layer], 3))
    for key in ("codes", "column_class", "rate_class"):
        damaged = {name: buffer.clone() for name, buffer in buffers.items()}
        damaged[f"layer/{key}"][3] ^= 0x11
        try:
            other = unpack_model(damaged, header)
        except ValueError as error:
            assert "layer 'layer'" in str(error)
        else:  # another stream with one meaning: writing it again gives the same bytes
            assert torch.equal(pack_model(other)[0][f"layer/{key}"], damaged[f"layer/{key}"])
        short = {**buffers, f"layer/{key}": buffers[f"layer/{key}"][:-1]}
        with pytest.raises(ValueError, match="layer 'layer'"):
            unpack_model(short, header)


def test_wide_codes_are_refused() -> None:
    layer = gaussian(1, 100, 40, 2)
    tensor = coded(WaterSIC(True, 0.01), [layer], 3)["layer"]
    code = tensor.code
    assert isinstance(code, ColumnEntropyCode)
    with pytest.raises(ValueError, match="column_class: the tables have 16 classes"):
        replace(code, column_class=torch.full((40,), 16, dtype=torch.uint8)).check(tensor.width)
    with pytest.raises(ValueError, match="codes with column classes have no trellis"):
        replace(code, states=8).check(tensor.width)


def test_a_dead_column_and_dead_layer() -> None:
    layer = gaussian(1, 64, 20, 1)
    moment = layer.statistic("input_moment").clone()
    moment[0, 4], moment[0, :, 4] = 0, 0
    values = coded(WaterSIC(True, 0.01), [problem(layer.weight, moment)], 3)["layer"].dequantize()
    assert bool(torch.isfinite(values).all()) and not bool(values[0, :, 4].any())
    nothing = problem(layer.weight, torch.zeros(1, 20, 20))
    assert bool(torch.isfinite(coded(WaterSIC(True, 0.01), [nothing], 3)["layer"].dequantize()).all())


def test_it_runs_by_name_with_entropy_codes_as_its_default() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 6)).eval()
    batches = [torch.randn(32, 24, generator=torch.Generator().manual_seed(1)) for _ in range(4)]
    quantized, report = bayesq.quantize(network, batches, bits=1.7, method="watersic")
    assert sum(map(code_bits, report.packed.tensors.values())) <= 1.7 * (24 * 64 + 64 * 6)
    assert not torch.equal(quantized[0].weight, network[0].weight)
    with pytest.raises(Refused, match=r"codec='?fixed'?: .*choose codec='?entropy"):
        bayesq.quantize(network, batches, bits=3, method="watersic", codec="fixed")


def test_the_stream_is_the_same_on_every_machine() -> None:
    """Bytes of fixed codes; files with other ones could not be read any more."""
    counts = np.zeros((3, 2, 256))
    counts[:, 0, 120:137] = [[2 ** max(0, 8 - abs(s) * (3 - k)) for s in range(-8, 9)] for k in range(3)]
    place = torch.arange(40)
    codes = (128 + (place * place * 7 % 11 - 5) // (1 + place % 4)).to(torch.uint8).reshape(5, 8)
    row, column = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0, 1, 2, 1, 0, 2, 1])
    code = ColumnEntropyCode(RateTables.of(counts), row.to(torch.uint8), column_class=column.to(torch.uint8))
    packed = code.pack(codes, full_width(5), 1)
    assert {key: bytes(buffer.numpy()).hex() for key, buffer in packed.items()} == {
        "codes": "22be4603bd2e37ab7cc364963cda3f2e282f1d0b",
        "rate_class": "1840",  # two bits each, zeros behind
        "column_class": "0649",
    }
    assert torch.equal(code.unpack_codes(packed, full_width(5), 8, 1), codes)
