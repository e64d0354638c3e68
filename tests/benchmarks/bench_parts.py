"""Statistics, codebook design, packing and entropy coding. `pytest -s tests/benchmarks/bench_parts.py`."""

import pytest
import torch
from references import TIMER, compare, layer
from torch import nn

from bayesq.batches import Batch
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.codebook import Atoms, expected_lloyd, normal_levels
from bayesq.entropy import RateClasses, coded_tensor, row_rate
from bayesq.fisher import FISHER_DIAGONAL, GRADIENT_MOMENT, GradientDirections
from bayesq.ilp import ilp_knapsack
from bayesq.knapsack import greedy_knapsack
from bayesq.quant.bitshift import bitshift_distortion
from bayesq.quant.codes import Congruential
from bayesq.quant.grids import zero_code
from bayesq.quant.layers import quantizable_layers
from bayesq.quant.packing import pack_model, unpack_model
from bayesq.quant.tensor import QuantizedTensor

pytestmark = pytest.mark.benchmark(timer=TIMER)
BERT_BASE = 12 * (4 * 768 * 768 + 2 * 768 * 3072)  # weights of its twelve blocks
STATISTICS = {
    "inputs": (INPUT_MOMENT,),
    "kfac": (INPUT_MOMENT, GRADIENT_MOMENT),
    "diag": (FISHER_DIAGONAL,),
    "lowrank": (GradientDirections(16),),
}


def network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A few layers of a ResNet's or a BERT's shape, and a batch of inputs."""
    if kind == "convolutions":
        body = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2), nn.ReLU())
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), torch.randn(
            16, 64, 28, 28
        )
    body = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    return nn.Sequential(body, nn.AvgPool2d((32, 1)), nn.Flatten(), nn.Linear(768, 2)), torch.randn(16, 32, 768)


@pytest.mark.parametrize("kind", ["convolutions", "linear"])
@pytest.mark.parametrize("kinds", STATISTICS.values(), ids=STATISTICS)
def test_statistics(benchmark, kinds, kind):
    """One batch, against the forward pass, and forward and backward pass, of the network alone."""
    module, inputs = network(kind)
    batch = Batch({"input": inputs}, torch.zeros(len(inputs)).long(), torch.arange(len(inputs)))
    collector = Collector(module, quantizable_layers(module), kinds, None, torch.Generator())

    def forward() -> None:
        with torch.no_grad():
            module(inputs)

    references = {"forward": forward, "forward and backward": lambda: module(inputs).sum().backward()}
    compare(benchmark, lambda: collector.add(batch), references)


def test_codebook_of_scalar_codes(benchmark):
    """Lloyd on compressed weights, against Lloyd on every weight."""
    weight = 2 * layer(64, 256)[0].double() + 3.5
    one, little = torch.ones_like(weight), torch.full_like(weight, 1e-4)
    start = 2 * normal_levels("lloyd", 3) + 3.5

    def direct() -> None:
        expected_lloyd(weight.flatten(), little.flatten().sqrt(), one.flatten(), start)

    compare(
        benchmark,
        lambda: expected_lloyd(*Atoms.of(weight, little, one, 3).gaussians(), start),
        {"all weights": direct},
        rounds=3,
    )


def test_distortion_of_a_trellis(benchmark):
    """Made once per width and length of the columns, from draws; against the closed form of scalar codes."""
    references = {"scalar": lambda: normal_levels.__wrapped__("lloyd", 4)}
    compare(benchmark, lambda: bitshift_distortion.__wrapped__(4, Congruential(1024), 256, 0.6), references, rounds=3)


@pytest.mark.parametrize("width", [3, 4])
def test_packing(benchmark, width):
    """There and back, against copying the codes."""
    rows, columns = 3072, 768
    widths = torch.full((rows,), width, dtype=torch.uint8)
    codes = torch.randint(2**width, (rows, columns), dtype=torch.uint8)
    zero = zero_code(torch.ones(rows, 1), widths[:, None])
    tensor = QuantizedTensor(codes=codes, width=widths, scale=torch.ones(rows, 1).half(), zero=zero, groups=1)
    packed = pack_model({"layer": tensor})
    references = {"unpack": lambda: unpack_model(*packed), "copy": lambda: codes.clone()}
    compare(benchmark, lambda: pack_model({"layer": tensor}), references)


@pytest.mark.parametrize("ratio", [1.96, 3.92], ids=["3 bits", "4 bits"])
def test_decoding_a_stream(benchmark, ratio):
    """Of normal weights with a trellis, against encoding; prints the seconds for BERT-base, and asks for 20 at most."""
    rows, columns = 3072, 768
    ratios = torch.full((rows,), ratio, dtype=torch.float64)
    tables = RateClasses.covering([ratios]).normal_tables()
    symbols = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * ratio
    codes = symbols.round().clamp(-127, 127).add(128).to(torch.uint8)
    tensor = coded_tensor(codes, torch.ones(rows), tables, 64, 1)
    buffers = tensor.code.pack(codes, tensor.width, 1)
    references = {"encode": lambda: tensor.code.pack(codes, tensor.width, 1)}
    times = compare(benchmark, lambda: tensor.code.unpack_codes(buffers, tensor.width, columns, 1), references)
    whole = times["ours"] * BERT_BASE / codes.numel()
    bits = 8 * buffers["codes"].numel() / codes.numel()
    print(f"{bits:.2f} bits per weight, {float(row_rate(ratios)[0]):.2f} expected; BERT-base: {whole:.1f} s")
    assert whole < 20


def test_allocation(benchmark):
    """The exact allocation of BERT-base's rows at 3 bits, against the greedy one; prints the risk that greedy adds."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.tensor([768] * (4 * 768 + 3072) + [3072] * 768, dtype=torch.float64).repeat(12)[:, None]
    widths = torch.arange(2, 9, dtype=torch.float64)
    price = torch.randn(len(columns), 1, dtype=torch.float64, generator=generator).mul(2).exp()
    risk, bits = price * columns * 4**-widths, columns * widths
    capacity = 3.0 * float(columns.sum())
    references = {"greedy": lambda: greedy_knapsack(risk, bits, capacity)}
    compare(benchmark, lambda: ilp_knapsack(risk, bits, capacity), references, rounds=3)
    totals = [float(risk.gather(1, of(risk, bits, capacity)[:, None]).sum()) for of in (greedy_knapsack, ilp_knapsack)]
    print(f"greedy: {totals[0] / totals[1] - 1:.2g} more risk than the integer program")
    assert 0 <= totals[0] / totals[1] - 1 < 1e-3
