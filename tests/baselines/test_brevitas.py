"""GPTQ, GPTAQ and Qronos against Brevitas 0.13, given the same inputs, grids, column order and damping.

Brevitas has GPTQ and Qronos. It has no GPTAQ, so `Gptaq` adds the published term to its GPTQ loop.
"""

import copy
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from naive_quant import FixedWidths
from rounding_loop import rounded
from torch import Tensor, nn

import bayesq
from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from baselines.qronos import Qronos
from bayesq.calibration.paired import PairedSums
from bayesq.contract import LayerProblem
from bayesq.quant.grids import zero_value
from bayesq.quant.layers import input_samples, weight_to_matrix
from bayesq.quant.tensor import QuantizedTensor
from bayesq.suite.plan import build

MISSING = "needs Brevitas 0.13: pip install -c constraints.txt -e '.[test]'"
qnn = pytest.importorskip("brevitas.nn", reason=MISSING)
calibrate = pytest.importorskip("brevitas.graph.calibrate", reason=MISSING)
gpfq = pytest.importorskip("brevitas.graph.gpfq", reason=MISSING)
gptq = pytest.importorskip("brevitas.graph.gptq", reason=MISSING)
gpxq = pytest.importorskip("brevitas.graph.gpxq", reason=MISSING)
qronos = pytest.importorskip("brevitas.graph.qronos", reason=MISSING)
shifted = pytest.importorskip("brevitas.quant.shifted_scaled_int", reason=MISSING)
StopFwdException = pytest.importorskip("brevitas.utils.torch_utils", reason=MISSING).StopFwdException

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data and weights of {SHARED}")
DAMPING = 0.01  # Brevitas's fraction of the mean diagonal for GPTQ
RIDGE = 1e-6  # its fraction of the largest eigenvalue for Qronos


class Gptaq(qronos.Qronos):
    """Brevitas's sums of Qronos and loop of GPTQ; before column j is rounded, w_j P[j, k] moves all later columns k."""

    def single_layer_update(self) -> None:
        pairs = zip(self.H.clone(), self.G.clone(), strict=True)
        self.drifts = [self.drift(h, c) for h, c in pairs]
        gptq.GPTQ.single_layer_update(self, DAMPING)

    def drift(self, h: Tensor, c: Tensor) -> Tensor:
        """P = triu((C - H) VT, 1) V in visiting order, VT V = H^-1."""
        dead = h.diagonal() == 0
        h[dead, dead] = c[dead, dead] = 1
        order = h.diagonal().argsort(descending=True) if self.act_order else torch.arange(len(h))
        h, c = (x[order][:, order] for x in (h, c))
        v = torch.linalg.cholesky(torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(len(h))), upper=True)
        return ((c - h) @ v.T).triu(1) @ v

    def get_quant_weights(self, i: int, i1: int, permutation_list: list[Tensor], **options: Any) -> Tensor:
        quantized = super().get_quant_weights(i, i1, permutation_list, **options)
        j = i1 + i
        weight = self.layer.weight.data.view(self.groups, -1, self.columns)
        for matrix, order, drift in zip(weight, permutation_list, self.drifts, strict=True):
            matrix[:, order[j + 1 :]] += matrix[:, order[j], None] * drift[j, j + 1 :]
        return quantized


THEIRS = {"gptq": gptq.GPTQ, "gptaq": Gptaq, "qronos": qronos.Qronos}


class Given(nn.Module):
    """A scale or zero point that stays as it is, whatever the weights are."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: object) -> Tensor:
        return self.value


def brevitas_layer(layer: nn.Linear | nn.Conv2d, grid: QuantizedTensor) -> nn.Module:
    """The layer, with Brevitas's weight quantizer on the grid of a tensor of one width."""
    dtype = layer.weight.dtype
    scale = grid.scale.to(dtype)
    zero = zero_value(grid.zero, grid.width[:, None], dtype)
    shape = (-1, *(1,) * (layer.weight.ndim - 1))
    quantizer = {
        "weight_quant": shifted.ShiftedUint8WeightPerChannelFloat,
        "weight_bit_width": int(grid.width[0]),
        "weight_scaling_impl": Given(scale.reshape(shape)),
        "weight_zero_point_impl": Given(zero.reshape(shape)),
        "bias": layer.bias is not None,
    }
    if isinstance(layer, nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        new = qnn.QuantConv2d(**{name: getattr(layer, name) for name in names}, **quantizer)
    else:
        new = qnn.QuantLinear(layer.in_features, layer.out_features, **quantizer)
    new.load_state_dict(layer.state_dict(), strict=False)
    new = new.to(dtype).eval()
    new.weight.data.copy_(layer.weight)
    return new


@torch.no_grad()
def run_brevitas(name: str, layer: nn.Module, x: Tensor, prefix: Tensor, act_order: bool) -> None:
    """Round a layer of Brevitas by two batches of inputs in full precision and behind the prefix."""
    settings = {"act_order": act_order, "len_parallel_layers": 1, "create_weight_orig": True, "num_blocks": 3}
    algorithm = THEIRS[name](layer, "layer", **settings, dtype=torch.float64)
    for full, behind in zip(x.tensor_split(2), prefix.tensor_split(2), strict=True):
        for batch in (behind,) if name == "gptq" else (behind, full):
            manager = calibrate.quantization_status_manager(layer, disable_weight_quant=batch is full)
            with manager, suppress(StopFwdException):
                algorithm.update_batch(layer, (batch,), gpxq.LayerHandler())
    algorithm.single_layer_update()


def moments(layer: nn.Linear | nn.Conv2d, x: Tensor, prefix: Tensor) -> dict[str, Tensor]:
    """H and C [g, c, c] by our calibration."""
    samples = [input_samples(layer, each, len(x)) for each in (x, prefix)]
    sums = PairedSums()
    sums.add(*samples, torch.full((len(x),), samples[0].shape[2]), 0)
    found = sums.moments(centred=False)
    return {"input_moment": found.prefix, "cross_moment": found.cross}


def same_damping(name: str, h: Tensor) -> float:
    """Brevitas's damping of H [g, c, c] in units of ours, the mean diagonal of live columns.

    GPTQ's published code and Brevitas give dead columns the curvature 1 (of 2 H in Brevitas's GPTQ). Ours gives them
    the mean of the others, so that the scale of the inputs does not matter.
    """
    diagonal = h.diagonal(dim1=1, dim2=2)
    live = diagonal[diagonal != 0].mean()
    if name == "qronos":
        return float(RIDGE * torch.linalg.matrix_norm(h, 2).max() / live)
    return float(DAMPING * diagonal.where(diagonal != 0, 0.5 if name == "gptq" else 1.0).mean() / live)


def our_method(name: str, damping: float, act_order: bool) -> GPTQ:
    settings = {"clip": "minmax", "act_order": act_order, "damping": damping}
    if name == "qronos":
        return Qronos(**settings, ridge=RIDGE)
    return GPTQ(**settings, group_size=None) if name == "gptq" else GPTAQ(**settings, group_size=None, alpha=1.0)


def ours(layer: nn.Linear | nn.Conv2d, method: GPTQ, statistics: dict[str, Tensor], bits: int) -> QuantizedTensor:
    problem = LayerProblem("layer", type(layer).__name__, weight_to_matrix(layer), statistics.__getitem__, 1)
    widths = torch.full((problem.rows,), bits, dtype=torch.uint8)
    ((_, tensor),) = rounded(method, [problem], FixedWidths(layer=widths))
    return tensor


def check_codes(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, prefix: Tensor, act_order: bool, bits: int) -> None:
    """In float64 all codes agree, but for dead columns: ours become zero, as in GPTQ; in Qronos theirs are rounded."""
    statistics = moments(layer, x, prefix)
    h = statistics["input_moment"]
    tensor = ours(layer, our_method(name, same_damping(name, h), act_order), statistics, bits)
    theirs = brevitas_layer(layer, tensor)
    run_brevitas(name, theirs, x, prefix, act_order)
    codes = theirs.quant_weight().int().flatten(1)
    live = (h.diagonal(dim1=1, dim2=2) != 0).repeat_interleave(len(codes) // len(h), dim=0)
    assert live.float().mean() > 0.5
    assert torch.equal(tensor.codes[live], codes[live])


def synthetic(kind: str) -> tuple[nn.Linear | nn.Conv2d, Tensor, Tensor]:
    """A layer in float64 with correlated inputs x, and x' with noise and a share of a neighbouring column."""
    generator = torch.Generator().manual_seed(0)
    layer: nn.Linear | nn.Conv2d
    if kind in LINEAR:
        columns, rows, samples = LINEAR[kind]
        layer, x = nn.Linear(columns, rows), torch.randn(samples, columns, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5 + x / 2
    else:
        layer = nn.Conv2d(8, 12, 3, padding=1, **CONV[kind])
        x = torch.randn(12, 8, 8, 8, generator=generator, dtype=torch.float64).cumsum(2).cumsum(3).relu()
    layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator))
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    prefix = x + 0.3 * x.std() * noise + 0.1 * x.roll(1, 1)
    if kind == "dead columns":
        x[:, 5] = prefix[:, 5] = 0
        prefix[:, 9] = 0  # alive in full precision
    return layer.double().requires_grad_(False), x, prefix


LINEAR = {"linear": (40, 12, 300), "dead columns": (20, 8, 200), "more columns than a block": (290, 6, 700)}
CONV: dict[str, dict[str, Any]] = {"conv": {}, "stride": {"stride": 2}, "groups": {"groups": 4}}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", [*LINEAR, *CONV])
@pytest.mark.parametrize("name", THEIRS)
def test_codes_are_those_of_brevitas(name: str, kind: str, act_order: bool) -> None:
    check_codes(name, *synthetic(kind), act_order, bits=2 + len(kind) % 3)


# ------------------------------------------------------------------------------------------------------------ ResNets


def resnet(depth: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, calibration images and the first 2,000 test images."""
    names = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
    paths = [f"dataset.root={SHARED}/data/cifar10", f"model.checkpoint={SHARED}/models/cifar10/{names[depth]}"]
    choices = [f"model=cifar_resnet{depth}", "dataset=cifar10", "dataset.limit=2000", "dataset.subset=first"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*choices, *paths])
    data = build(cfg.dataset).load(Path("unused"))
    network = build(cfg.model).build(data, Path("unused"))
    encoded = (network.encode(part) for part in (data.calibration_pool, data.evaluation))
    pool, test = (torch.cat([next(iter(b.inputs.values())) for b in e.batches(500, "cpu")]) for e in encoded)
    return network.module.eval().requires_grad_(False), pool, test


@pytest.fixture(scope="module")
def inputs_of_resnet20() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """ResNet-20 and inputs of its layers for 32 images, in full precision and with all weights rounded to 3 bits."""
    module, pool, _ = resnet(20)
    rounded_module, _ = bayesq.quantize(module, [pool[:8]], bits=3, method="rtn")
    return module, *(passing(each.double(), pool[:32].double())[0] for each in (module, rounded_module))


@torch.no_grad()
def passing(module: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of all layers in one pass."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):

            def keep(_: nn.Module, given: tuple[Tensor], out: Tensor, name: str = name) -> None:
                inputs[name], outputs[name] = given[0].clone(), out.clone()

            handles.append(layer.register_forward_hook(keep))
    module(images)
    for handle in handles:
        handle.remove()
    return inputs, outputs


LAYERS = ["layer1.0.conv1", "layer1.1.conv2", "layer2.0.conv1", "layer2.2.conv1", "linear"]


@needs_shared
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", THEIRS)
def test_codes_on_layers_of_resnet20_are_those_of_brevitas(name: str, layer: str, inputs_of_resnet20) -> None:
    """In the columns' own order: with act-order, columns of equal energy are visited in either order."""
    module, full, prefix = inputs_of_resnet20
    check_codes(name, module.get_submodule(layer), full[layer], prefix[layer], act_order=False, bits=3)


@needs_shared
@torch.no_grad()
def test_the_damping_of_qronos_leaves_no_more_error_than_that_of_brevitas(inputs_of_resnet20) -> None:
    """After the first column, ours damps as GPTQ does, 1 % of the mean diagonal; Brevitas by 1e-6 of the eigenvalue."""
    module, full, prefix = inputs_of_resnet20
    logs = []
    for name in LAYERS[:-1]:  # the linear layer has more columns than samples: there ours leaves much less
        layer, x, behind = module.get_submodule(name), full[name], prefix[name]
        tensor = ours(layer, our_method("qronos", DAMPING, act_order=True), moments(layer, x, behind), bits=3)
        theirs = brevitas_layer(layer, tensor)
        run_brevitas("qronos", theirs, x, behind, act_order=True)
        mine = copy.deepcopy(layer)
        mine.weight.copy_(tensor.dequantize().reshape(layer.weight.shape))
        error, error_of_theirs = (float((layer(x) - each(behind)).square().sum()) for each in (mine, theirs))
        logs.append(math.log(error / error_of_theirs))
    assert sum(logs) / len(logs) <= math.log(1.05)


@torch.no_grad()
def brevitas_network(name: str, module: nn.Module, images: Tensor, grids: dict[str, QuantizedTensor]) -> nn.Module:
    """A copy of the network that Brevitas's walk over all layers has rounded."""
    network, result = copy.deepcopy(module), copy.deepcopy(module)
    for layer, grid in grids.items():
        network.set_submodule(layer, brevitas_layer(module.get_submodule(layer), grid))
    with gpfq.gpfq_mode(network, act_order=True, algorithm_impl=THEIRS[name]) as mode:
        for _ in range(mode.num_layers):
            for batch in images.split(64):
                mode.model(batch)
            mode.update()
    for layer in grids:
        result.get_submodule(layer).weight.copy_(network.get_submodule(layer).quant_weight().value)
    return result


@torch.no_grad()
def divergence(module: nn.Module, quantized: nn.Module, images: Tensor) -> float:
    """Mean KL divergence from full precision, nats."""
    q, p = (torch.cat([each(part) for part in images.split(250)]).log_softmax(1) for each in (quantized, module))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def mean_log_error(module: nn.Module, quantized: nn.Module, images: Tensor) -> float:
    """Mean over layers of the logarithm of the squared error of a layer's outputs, relative to these."""
    (_, right), (_, wrong) = (passing(each, images) for each in (module, quantized))
    return sum(math.log((wrong[k] - out).square().sum() / out.square().sum()) for k, out in right.items()) / len(right)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("gptaq", {}), ("qronos", {"damping": 1e-6})])
def test_resnet56_as_a_whole_is_no_worse_than_with_brevitas(name: str, options: dict[str, float]) -> None:
    """Grids of ours for both; Brevitas damps Qronos with 1e-6 of the largest eigenvalue.

    One flipped code changes all later inputs. Two runs of one algorithm then differ little in the mean error of the
    layers, but much more in KL, which therefore has the wider bound.
    """
    module, pool, test = resnet(56)
    images = pool[:32]
    quantized, report = bayesq.quantize(module, [images], bits=3, method=name, clip="mse", batch_size=64, **options)
    both = quantized, brevitas_network(name, module, images, report.packed.tensors)
    error, error_of_theirs = (mean_log_error(module, each, images) for each in both)
    kl, kl_of_theirs = (divergence(module, each, test[:500]) for each in both)
    assert error - error_of_theirs <= math.log(1.05)
    assert kl <= 1.3 * kl_of_theirs
