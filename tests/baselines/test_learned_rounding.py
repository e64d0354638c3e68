"""Learned rounding against its formulas and the enumerated optimum of tiny layers, and BRECQ's blocks on a network."""

import itertools
import math

import numpy as np
import odd_networks as odd
import pytest
import torch
import torch.nn.functional as F
from naive_quant import FixedWidths, affine_nearest, minmax, moment_of, mse, problem
from rounding_loop import rounded
from torch import nn

import bayesq
from baselines.adaround import AdaRound
from baselines.brecq import BRECQ
from baselines.learned_rounding import Schedule, SoftLayer, learn
from baselines.rtn import RTN
from bayesq.errors import Refused

SETTINGS = {"clip": "mse", "steps": 300, "learning_rate": 0.02, "strength": 0.01}


def quadratic(delta: np.ndarray, moment: np.ndarray) -> float:
    return float(sum(d @ moment @ d for d in delta))


def test_adaround_comes_close_to_the_optimum_and_beats_nearest() -> None:
    generator, widths = torch.Generator().manual_seed(0), [2, 3, 3, 3, 4, 2, 3, 4]
    weight = torch.randn(1, len(widths), 6, generator=generator)
    moment = moment_of(6, 40, generator)
    moment = moment / moment.diagonal().mean()
    allocate = FixedWidths(layer=torch.tensor(widths, dtype=torch.uint8))
    layer = problem(weight, moment[None])
    ((_, learned),) = rounded(AdaRound(**SETTINGS), [layer], allocate)
    ((_, nearest),) = rounded(RTN("mse"), [layer], allocate)
    w, best = weight[0].double().numpy(), []
    for row, width in zip(w, widths, strict=True):  # rows are independent: every choice of down or up in each
        scale, zero = mse(row, width)
        floor = np.floor(row / scale) + zero
        ups = (np.clip(floor + np.array(up), 0, 2**width - 1) for up in itertools.product((0, 1), repeat=6))
        best.append(min(quadratic((scale * (code - zero) - row)[None], moment.numpy()) for code in ups))
    errors = [quadratic(tensor.dequantize()[0].double().numpy() - w, moment.numpy()) for tensor in (learned, nearest)]
    assert sum(best) - 1e-9 <= errors[0] <= 1.2 * sum(best)
    assert errors[0] <= 0.8 * errors[1]


def test_a_layer_starts_at_its_weights_and_its_codes_are_one_of_two() -> None:
    weight = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(3))
    width = torch.tensor([2, 3, 4, 8], dtype=torch.uint8)
    soft = SoftLayer.of(problem(weight, torch.eye(9)), width, "minmax")
    start, tensor = soft.weight().detach().flatten(0, 1), soft.tensor()
    for i, row in enumerate(weight.flatten(0, 1).double().numpy()):
        scale, zero = minmax(row, int(width[i]))
        for c, w in enumerate(row):
            clipped = min(max(w, -scale * zero), scale * (2 ** int(width[i]) - 1 - zero))
            assert float(start[i, c]) == pytest.approx(clipped, abs=1e-4)
            assert int(tensor.codes[i, c]) == affine_nearest(float(w), scale, float(zero), int(width[i]))[0]


def test_the_schedule_is_the_published_one() -> None:
    schedule = Schedule(1000, 0.01, 0.01)
    assert [schedule.beta(step) for step in (0, 199)] == [None, None]
    assert schedule.beta(200) == 20 and schedule.beta(600) == pytest.approx(11) and schedule.beta(999) < 2.01


def test_the_loss_is_the_error_and_the_regulariser() -> None:
    weight = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))
    soft = SoftLayer.of(problem(weight, torch.eye(4)), torch.tensor([3], dtype=torch.uint8), "mse")
    shares = [min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0), 1) for v in soft.v.flatten().tolist()]
    expected = sum(1 - abs(2 * h - 1) ** 7 for h in shares)
    assert float(soft.regulariser(7.0).detach()) == pytest.approx(expected, rel=1e-4)
    # with no error to pay the regulariser alone rounds every weight to nearest
    learn([soft], lambda step: 0.0 * soft.weight().sum(), Schedule(400, 0.05, 1.0))
    assert all(share in (0, 1) for share in soft.share().flatten().tolist())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.second(F.relu(self.first(x), inplace=True))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=2.0)
        return self.head(x)


def test_brecq_gets_each_blocks_inputs_outputs_and_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Small().eval(), torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    blocks, inside = [], []
    learn_block = BRECQ.learn_block

    def watched(self, block, context):
        full = {name: self._layers[name].weight for name in block.layers}
        blocks.append(block)
        inside.append([block.output(full, batch) for batch in block.batches])
        return learn_block(self, block, context)

    monkeypatch.setattr(BRECQ, "learn_block", watched)
    quantized, _ = bayesq.quantize(module, [x], method="brecq", bits=3, steps=5)
    assert [list(block.layers) for block in blocks] == [
        ["stem"],
        ["blocks.0.first", "blocks.0.second"],
        ["blocks.1.first", "blocks.1.second"],
        ["head"],
    ]
    # inputs of the second block: behind the quantized stem and first block; its output there, with its own weights
    with torch.no_grad():
        before = quantized.blocks[0](quantized.stem(x), scale=2.0)
        assert torch.allclose(torch.cat([batch.arguments[0][0] for batch in blocks[2].batches]), before)
        assert torch.allclose(torch.cat(inside[2]).detach(), module.blocks[1](before, scale=2.0), atol=1e-6)
    # targets and Fisher: of the full-precision network, where the expectation over three classes is exact
    z = module.blocks[1](module.blocks[0](module.stem(x), scale=2.0), scale=2.0).detach().requires_grad_(True)
    logits = module.head(z).log_softmax(1)
    fisher = torch.zeros_like(z)
    for k in range(3):
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), z, retain_graph=True)
        fisher += logits[:, k].detach().exp()[:, None] * gradient.square()
    assert torch.allclose(torch.cat([batch.target for batch in blocks[2].batches]), z.detach(), atol=1e-6)
    assert torch.allclose(torch.cat([batch.fisher for batch in blocks[2].batches]), fisher, atol=1e-6)


def test_brecq_reconstructs_a_block_better_than_nearest_rounding() -> None:
    module, x = Small().eval(), torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    error = {}
    for method, more in (("brecq", {"steps": 300, "fisher": False}), ("rtn", {})):
        quantized, _ = bayesq.quantize(
            module, [x], method=method, bits=2, exclude=["stem", "head", "blocks.1*"], **more
        )
        with torch.no_grad():
            z = module.stem(x)
            error[method] = float((quantized.blocks[0](z, 2.0) - module.blocks[0](z, 2.0)).square().mean())
    assert error["brecq"] < 0.7 * error["rtn"]


def test_bad_values_are_refused_with_their_key() -> None:
    for key, value in (("steps", 0), ("learning_rate", 0.0), ("strength", -1.0), ("clip", "best")):
        with pytest.raises(Refused, match=rf"^method\.{key}={value}: "):
            AdaRound(**{**SETTINGS, key: value})
        with pytest.raises(Refused, match=rf"^method\.{key}={value}: "):
            BRECQ(**{**SETTINGS, key: value}, fisher=True)
    with pytest.raises(Refused, match=r"inputs=full: .* choose inputs=paired"):
        bayesq.quantize(Small().eval(), [torch.randn(4, 5)], method="brecq", inputs="full")


def test_a_stack_of_matrices_is_learned_inside_its_block() -> None:
    module, x = odd.SelfAttention().eval(), torch.randn(8, 4, odd.WIDTH, generator=torch.Generator().manual_seed(0))
    quantized, _ = bayesq.quantize(module, [x], method="brecq", steps=3, bits=4)
    for name in ("odd.in_proj_weight", "odd.out_proj.weight"):
        before, after = module.state_dict()[name], quantized.state_dict()[name]
        assert not torch.equal(before, after) and torch.allclose(before, after, atol=0.3)


class Attention(nn.MultiheadAttention):
    """The network itself uses the weights, so no module that contains them is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x, x)[0].mean(1)


def test_a_layer_in_no_block_that_is_called_is_refused_with_what_to_exclude() -> None:
    module, x = Attention(6, 2, batch_first=True).eval(), torch.randn(8, 4, 6)
    for name, exclude in (("in_proj_weight", []), ("out_proj", ["in_proj_weight"])):
        with pytest.raises(Refused, match=rf"^layer {name}: .* exclude=\[{name}\]"):
            bayesq.quantize(module, [x], method="brecq", steps=3, exclude=exclude)
