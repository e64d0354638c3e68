"""Distillation: an exact teacher, a held-out divergence that never rises, frozen codes and unchanged stored bits."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bayesq import teacher as teachers
from bayesq.distillation import DistillationSettings, distill
from bayesq.likelihood import Categorical
from bayesq.observer import Observer
from bayesq.quant.accounting import buffer_bytes
from bayesq.quant.codes import Codebook, RowTable, SharedTable, SparseOverlay, Trellis, shared_code
from bayesq.quant.grids import mse_grid, round_affine, zero_code, zero_value
from bayesq.quant.layers import groups_of, matrix_to_weight, weight_to_matrix
from bayesq.quant.packing import pack, pack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.student import Student, trained_parameters
from bayesq.teacher import posterior_predictive


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]
    index: Tensor


class SmallNet(nn.Module):
    """A digits classifier with a grouped convolution, BatchNorm and LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(32)
        self.hidden, self.norm3, self.head = nn.Linear(32 * 9, 32), nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x))).flatten(1)
        return self.head(torch.relu(self.norm3(self.hidden(x))))


LAYERS = ("conv1", "conv2", "hidden", "head")
FAST = DistillationSettings(steps=4)
CATEGORICAL = Categorical()


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor]:
    """A trained network and images it has not seen, in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 16 - 0.3
    labels = torch.from_numpy(data.target)[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(6):
        for part in torch.arange(900).split(64):
            loss = nn.functional.cross_entropy(network(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False), images[900:]


def batches_of(images: Tensor, size: int = 32) -> list[Batch]:
    return [Batch({"x": images[index]}, index) for index in torch.arange(len(images)).split(size)]


def quantize(network: nn.Module, widths: dict[str, int], group_size: int | None = None) -> dict[str, QuantizedTensor]:
    """Nearest rounding on uniform grids; layers of 3 bits share a codebook that spells out the same levels."""
    book = Codebook("shared/3", torch.arange(8).half())
    tensors = {}
    for name, bits in widths.items():
        matrix = weight_to_matrix(network.get_submodule(name))
        groups, rows, columns = matrix.shape
        rows_of = matrix.reshape(groups * rows, columns)
        width = torch.full((groups * rows,), bits, dtype=torch.uint8)
        parts = rows_of.split(group_size or columns, dim=1)
        codes, scales, zeros = [], [], []
        for part in parts:
            scale, zero = mse_grid(part, width)
            codes.append(round_affine(part, scale, zero, width)[0].to(torch.uint8))
            scales.append(scale.half())
            zeros.append(zero_code(zero, width))
        tensors[name] = QuantizedTensor(
            codes=torch.cat(codes, 1),
            width=width,
            scale=torch.stack(scales, 1),
            zero=torch.stack(zeros, 1),
            groups=groups_of(network.get_submodule(name)),
            group_size=group_size,
            code=shared_code({3: book} if bits == 3 and group_size is None else {}),
        )
    return tensors


def loaded(network: nn.Module, tensors: dict[str, QuantizedTensor], parameters: dict[str, Tensor]) -> nn.Module:
    student = copy.deepcopy(network)
    for name, tensor in tensors.items():
        layer = student.get_submodule(name)
        layer.weight.data = matrix_to_weight(layer, tensor.dequantize())
    student.load_state_dict(parameters, strict=False)
    return student


def divergence(teacher: Tensor, network: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        q = network(images).double().log_softmax(1)
    return float((teacher * (teacher.clamp_min(1e-300).log() - q)).sum(1).mean())


def teacher_of(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).double().softmax(1)


def identical(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """All that is stored is equal, to the bit and by type."""
    (x, facts), (y, others) = pack(a), pack(b)
    books = [{book.name: book.levels.tolist() for book in t.code.codebooks()} for t in (a, b)]
    return (
        facts == others
        and books[0] == books[1]
        and x.keys() == y.keys()
        and all(x[key].dtype == y[key].dtype and torch.equal(x[key], y[key]) for key in x)
    )


# -------------------------------------------------------------------------------------------------------- teacher


def test_the_teacher_is_the_mean_prediction_of_the_drawn_networks(monkeypatch):
    full = nn.Linear(3, 4).eval()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    batches = [Batch({"input": x[index]}, index) for index in order.split(3)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = full

        def forward(self, input: Tensor) -> Tensor:
            return self.layer(input)

    def sample(name: str, generator: torch.Generator) -> Tensor:
        assert name == "layer"
        return torch.randn(1, 4, 3, generator=generator)

    teacher = posterior_predictive(
        Model().eval(), ["layer"], sample, batches, 5, torch.Generator().manual_seed(2), CATEGORICAL
    )
    generator = torch.Generator().manual_seed(2)
    expected = torch.zeros(7, 4, dtype=torch.float64)
    for _ in range(5):
        weight = (full.weight + torch.randn(1, 4, 3, generator=generator)[0]).detach().double()
        expected += torch.softmax(x.double() @ weight.T + full.bias.detach().double(), 1) / 5
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(teachers, "MOST_BYTES", 7 * 4 * 8 - 1)
    again = posterior_predictive(
        Model().eval(), ["layer"], sample, batches, 5, torch.Generator().manual_seed(2), CATEGORICAL
    )
    assert isinstance(again, teachers.Recomputed) and len(again) == 7
    for batch in batches:
        torch.testing.assert_close(again(batch.inputs), teacher[batch.index], rtol=1e-6, atol=1e-7)

    monkeypatch.undo()
    mean = posterior_predictive(Model().eval(), ["layer"], sample, batches, 0, generator, CATEGORICAL)
    torch.testing.assert_close(mean, full(x).detach().double().softmax(1), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- student


@pytest.mark.parametrize("group_size", [None, 5])
def test_it_lowers_the_divergence_and_changes_only_what_it_may(digits, group_size):
    network, images = digits
    tensors = quantize(network, {"conv1": 3, "conv2": 3, "hidden": 2, "head": 3}, group_size)
    student = loaded(network, tensors, {})
    calibration, unseen = images[:320], images[320:]
    teacher = teacher_of(network, calibration)
    state = copy.deepcopy(student.state_dict())
    settings = DistillationSettings(steps=8)
    result = distill(
        student, tensors, batches_of(calibration), teacher, settings, torch.Generator().manual_seed(0), CATEGORICAL
    )

    assert result.steps == 8 and result.best_step > 0
    assert result.heldout_kl_after < 0.8 * result.heldout_kl_before
    distilled = loaded(student, result.tensors, result.parameters)
    before, after = (divergence(teacher_of(network, unseen), x, unseen) for x in (student, distilled))
    assert after < 0.9 * before

    assert all(torch.equal(x, state[name]) for name, x in student.state_dict().items())
    assert all(x.grad is None for x in student.parameters())
    for name, tensor in tensors.items():
        kept = replace(result.tensors[name], scale=tensor.scale, code=tensor.code)
        assert identical(kept, tensor)
        assert not torch.equal(result.tensors[name].scale, tensor.scale)
    assert result.parameters.keys() == trained_parameters(network).keys()
    assert "norm1.weight" in result.parameters and "hidden.bias" in result.parameters
    sizes = [buffer_bytes(pack_model(x)[0]) for x in (tensors, result.tensors)]
    assert sizes[0] == sizes[1]
    if group_size is None:
        first, *others = (result.tensors[name].code.tables[3] for name in ("conv1", "conv2", "head"))
        assert all(book.name == first.name and torch.equal(book.levels, first.levels) for book in others)
        assert not torch.equal(first.levels, torch.arange(8).half())


class Listening(Observer):
    def __init__(self) -> None:
        self.heard: list[tuple[int, str, float]] = []

    def divergence_measured(self, step: int, part: str, kl: float) -> None:
        self.heard.append((step, part, kl))


def test_an_observer_hears_of_every_evaluation_and_changes_none(digits):
    network, images = digits
    tensors, calibration = quantize(network, dict.fromkeys(LAYERS, 3)), images[:100]
    student, teacher = loaded(network, tensors, {}), teacher_of(network, calibration)

    def run(observer: Observer | None):
        generator = torch.Generator().manual_seed(3)
        return distill(
            student, tensors, batches_of(calibration), teacher, FAST, generator, CATEGORICAL, observer=observer
        )

    listening = Listening()
    alone, watched = run(None), run(listening)
    assert all(identical(watched.tensors[name], tensor) for name, tensor in alone.tensors.items())
    parts = {part: [(step, kl) for step, of, kl in listening.heard if of == part] for part in ("heldout", "training")}
    assert len(listening.heard) == sum(map(len, parts.values()))
    assert [step for step, _ in parts["heldout"]] == [0, *range(1, watched.steps + 1)]
    assert parts["heldout"][0][1] == watched.heldout_kl_before
    assert parts["heldout"][watched.best_step][1] == watched.heldout_kl_after < watched.heldout_kl_before
    # the first evaluation of the training part is of the untouched student, on the examples that are not held out
    training = torch.randperm(100, generator=torch.Generator().manual_seed(3))[20:]
    expected = divergence(teacher[training], student, calibration[training])
    assert parts["training"][0] == (1, pytest.approx(expected, rel=1e-4))
    most = 1 + FAST.evaluations * FAST.steps
    assert {step for step, _ in parts["training"]} == {*range(1, watched.steps + 1)} and len(parts["training"]) <= most


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("steps", [1, 12])
def test_the_held_out_divergence_never_rises(digits, steps, hostile):
    """Also where the training part teaches the opposite of what the held-out part asks for."""
    network, images = digits
    tensors = quantize(network, dict.fromkeys(LAYERS, 3))
    student = loaded(network, tensors, {})
    settings = DistillationSettings(steps=steps)
    calibration = images[:100]
    teacher = teacher_of(network, calibration)
    if hostile:
        training = torch.randperm(100, generator=torch.Generator().manual_seed(3))[20:]
        teacher[training] = teacher[training].flip(1)
    result = distill(
        student, tensors, batches_of(calibration), teacher, settings, torch.Generator().manual_seed(3), CATEGORICAL
    )
    assert result.heldout_kl_after <= result.heldout_kl_before
    # the reported numbers are those of the stored network on the held-out fifth
    held_out = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:20]
    for tensors_, parameters, reported in (
        (tensors, {}, result.heldout_kl_before),
        (result.tensors, result.parameters, result.heldout_kl_after),
    ):
        stored = loaded(student, tensors_, parameters)
        assert divergence(teacher[held_out], stored, calibration[held_out]) == pytest.approx(reported, rel=1e-4)
    if result.best_step == 0:
        assert result.parameters == {}
        assert all(identical(result.tensors[name], tensor) for name, tensor in tensors.items())
    for tensor in result.tensors.values():
        levels = tensor.code.tables[3].levels
        assert bool((levels[1:] >= levels[:-1]).all())
    if hostile:
        assert result.best_step == 0


@pytest.mark.parametrize(("examples", "beats"), [(4, False), (10, True), (1000, True)])
def test_a_gain_has_to_stand_out_from_its_noise(examples, beats, digits, monkeypatch):
    """Gains of +0.5 and -0.3 in turn: mean 0.1, standard deviation 0.4."""
    gain = torch.tensor([0.5, -0.3], dtype=torch.float64).repeat(examples // 2)

    def held_out_kl(network: nn.Module, tensors: object, parameters: dict[str, Tensor], **_: object) -> Tensor:
        return 1 - gain if parameters else torch.ones_like(gain)

    monkeypatch.setattr("bayesq.distillation._held_out_kl", held_out_kl)
    network, images = digits
    tensors = quantize(network, dict.fromkeys(LAYERS, 3))
    teacher, settings = teacher_of(network, images[:100]), FAST
    result = distill(
        network, tensors, batches_of(images[:100]), teacher, settings, torch.Generator().manual_seed(0), CATEGORICAL
    )
    assert (result.best_step, result.heldout_kl_before) == (1 if beats else 0, 1.0)  # of equals, the first
    assert result.heldout_kl_after == pytest.approx(0.9 if beats else 1.0)


def test_it_starts_from_corrected_parameters(digits):
    network, images = digits
    tensors = quantize(network, dict.fromkeys(LAYERS, 4))
    student = loaded(network, tensors, {})
    student.norm1.bias += 0.05
    teacher = teacher_of(network, images[:100])
    result = distill(
        student,
        tensors,
        batches_of(images[:100]),
        teacher,
        replace(FAST, steps=0),
        torch.Generator().manual_seed(0),
        CATEGORICAL,
    )
    held_out = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:20]
    expected = divergence(teacher[held_out], student, images[held_out])
    assert result.heldout_kl_before == pytest.approx(expected, rel=1e-4)
    assert result.best_step == result.steps == 0 and result.heldout_kl_after == result.heldout_kl_before


@pytest.mark.parametrize(("shift", "kept"), [(0.0, True), (2.0, False)])
@pytest.mark.parametrize("steps", [0, 2])
def test_it_goes_on_from_a_start_that_the_held_out_part_accepts(digits, steps, shift, kept):
    """The network came with a wrong bias; the start repairs it, or makes it worse."""
    network, images = digits
    tensors = quantize(network, dict.fromkeys(LAYERS, 4))
    student = loaded(network, tensors, {})
    student.norm1.bias += 0.5
    asked = []

    def start(training: Tensor) -> dict[str, Tensor]:
        asked.append(training)
        return {"norm1.bias": network.norm1.bias.detach() - shift}

    teacher = teacher_of(network, images[:100])
    generator, settings = torch.Generator().manual_seed(0), replace(FAST, steps=steps)
    result = distill(student, tensors, batches_of(images[:100]), teacher, settings, generator, CATEGORICAL, start)
    held_out = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:20]
    (training,) = asked
    assert not training[held_out].any() and int(training.sum()) == 80
    assert result.started == kept
    stored = loaded(student, result.tensors, result.parameters)
    assert divergence(teacher[held_out], stored, images[held_out]) == pytest.approx(result.heldout_kl_after, rel=1e-4)
    if steps == 0:
        assert ("norm1.bias" in result.parameters) == kept
    if kept:
        assert result.heldout_kl_after < 0.5 * result.heldout_kl_before
        assert bool((result.parameters["norm1.bias"] - network.norm1.bias).abs().max() < 0.1)
    untrained = student.norm1.bias.detach()
    assert torch.equal(untrained, network.norm1.bias + 0.5)  # the network given stays as it came


def test_it_is_deterministic(digits):
    network, images = digits
    tensors = quantize(network, dict.fromkeys(LAYERS, 3))
    student, teacher = loaded(network, tensors, {}), teacher_of(network, images[:100])
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(0)
        results.append(distill(student, tensors, batches_of(images[:100]), teacher, FAST, generator, CATEGORICAL))
    a, b = results
    assert a.heldout_kl_after == b.heldout_kl_after and a.best_step == b.best_step > 0
    assert all(identical(a.tensors[name], b.tensors[name]) for name in LAYERS)
    assert all(torch.equal(x, b.parameters[name]) for name, x in a.parameters.items())


@pytest.mark.parametrize("group_size", [None, 4])
def test_decoding_is_dequantization_and_its_gradients_are_right(group_size):
    """Mixed widths, groups, column groups, column scales; gradients against those of a naive float64 decoder."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(6, 8, (1, 5), groups=2)
    model = nn.Sequential(layer)
    width = torch.tensor([2, 3, 3, 4, 2, 2, 8, 3], dtype=torch.uint8)
    codes = torch.stack([torch.randint(0, 2 ** int(w), (15,), generator=generator) for w in width]).to(torch.uint8)
    books = {w: Codebook(f"b/{w}", torch.randn(2**w, generator=generator).sort().values.half()) for w in (2, 3)}
    groups = 1 if group_size is None else 4
    tensor = QuantizedTensor(
        codes=codes,
        width=width,
        scale=(0.1 + torch.rand(8, groups, generator=generator)).half(),
        zero=torch.randint(0, 256, (8, groups), generator=generator).to(torch.uint8),
        groups=2,
        group_size=group_size,
        code=SharedTable(books),
        column_scale=(0.5 + torch.rand(2, 3, generator=generator)).half(),
    )
    student = Student(model, {"0": tensor})
    weight = student.overrides()["0.weight"]
    torch.testing.assert_close(weight, matrix_to_weight(layer, tensor.dequantize()))

    direction = torch.randn(weight.shape, generator=generator)
    leaves = [student.factors["0"], student.level_moves["b/2"], student.level_moves["b/3"]]
    gradients = torch.autograd.grad((weight * direction).sum(), leaves)
    copies = [student.factors["0"], student.levels["b/2"], student.levels["b/3"]]
    copies = [x.detach().double().requires_grad_(True) for x in copies]
    # a level moves by its move over the square root of the rows that read it
    units = [1.0, *(float((width == w).sum()) ** -0.5 for w in (2, 3))]
    rows = []
    for r in range(8):
        table = {2: copies[1], 3: copies[2]}.get(int(width[r]), torch.arange(256, dtype=torch.float64))
        row = []
        for c in range(15):
            s = 0 if group_size is None else c // group_size
            zero = float(tensor.zero[r, s]) * 2.0 ** (int(width[r]) - 8)
            value = float(tensor.scale[r, s]) * copies[0][r, s].exp() * (table[int(codes[r, c])] - zero)
            row.append(value / float(tensor.column_scale[r // 4, c // 5]))
        rows.append(torch.stack(row))
    naive = torch.autograd.grad((torch.stack(rows).flatten() * direction.double().flatten()).sum(), copies)
    for gradient, expected, unit in zip(gradients, naive, units, strict=True):
        torch.testing.assert_close(gradient.double(), unit * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_book", [False, True])
def test_trellis_codes_are_trained_like_any_other(with_book):
    """Their levels depend on the codes of the rows above; there are twice as many as codes."""
    generator = torch.Generator().manual_seed(0)
    width = torch.tensor([2, 3, 3, 2, 3, 8], dtype=torch.uint8)
    codes = torch.stack([torch.randint(0, 2 ** int(w), (7,), generator=generator) for w in width]).to(torch.uint8)
    table = Codebook("b/3", torch.randn(16, generator=generator).sort().values.half())
    tables = {3: table} if with_book else {}
    tensor = QuantizedTensor(
        codes=codes,
        width=width,
        scale=(0.1 + torch.rand(6, 1, generator=generator)).half(),
        zero=torch.randint(0, 256, (6, 1), generator=generator).to(torch.uint8),
        groups=2,
        code=Trellis(tables, 8),
    )
    layer = nn.Conv2d(14, 6, 1, groups=2)
    student = Student(nn.Sequential(layer), {"0": tensor})
    torch.testing.assert_close(student.overrides()["0.weight"], matrix_to_weight(layer, tensor.dequantize()))
    with torch.no_grad():
        student.factors["0"].fill_(0.25)
        for levels in student.levels.values():
            levels += 0.5
    stored = student.stored()[0]["0"]
    assert stored.code.states == 8 and torch.equal(stored.codes, codes)
    moved = student.overrides()["0.weight"]
    torch.testing.assert_close(moved, matrix_to_weight(layer, stored.dequantize()), rtol=1e-3, atol=2e-2)
    assert not torch.allclose(moved, matrix_to_weight(layer, tensor.dequantize()))


def test_levels_are_kept_in_order():
    tensor = QuantizedTensor(
        codes=torch.zeros(1, 2, dtype=torch.uint8),
        width=torch.tensor([3], dtype=torch.uint8),
        scale=torch.ones(1, 1).half(),
        zero=torch.zeros(1, 1, dtype=torch.uint8),
        code=SharedTable({3: Codebook("b", torch.arange(8).half())}),
    )
    student = Student(nn.Sequential(nn.Linear(2, 1)), {"0": tensor})
    ordered = torch.arange(8.0)
    assert torch.equal(student.stored()[0]["0"].code.tables[3].levels, ordered.half())
    with torch.no_grad():
        wanted = torch.tensor([0.0, 3, 2, 1, 4, 6, 5, 7])
        student.level_moves["b"].copy_((wanted - ordered) / student.level_units["b"])
    stored = student.stored()[0]["0"].code.tables[3].levels
    assert torch.equal(stored, torch.tensor([0.0, 2, 2, 2, 4, 5.5, 5.5, 7]).half())


def row_table_layer() -> tuple[nn.Linear, QuantizedTensor]:
    """Rows of two and three bits with tables of weights, one weight of two rows kept in fp16."""
    width = torch.tensor([2, 3, 2], dtype=torch.uint8)
    codes = torch.tensor([[0, 1, 2, 3], [7, 0, 5, 5], [1, 1, 0, 2]], dtype=torch.uint8)
    tables = [torch.tensor([-0.5, 0, 0.25, 1]), torch.arange(8) / 8, torch.tensor([2.0, 2, 2, 2])]
    overlay = SparseOverlay(torch.tensor([0, 1]), torch.tensor([1, 3]), torch.tensor([8.0, -8]).half())
    empty = torch.empty(3, 0)
    code = RowTable(torch.cat(tables).half())
    tensor = QuantizedTensor(codes, width, empty.half(), empty.to(torch.uint8), code=code, overlay=overlay)
    return nn.Linear(4, 3), tensor


def test_levels_of_rows_are_trained_in_units_of_their_distance():
    layer, tensor = row_table_layer()
    student = Student(nn.Sequential(layer), {"0": tensor})
    weight = student.overrides()["0.weight"]
    assert torch.equal(weight, matrix_to_weight(layer, tensor.dequantize()))
    unit = torch.cat([torch.full((4,), 0.5), torch.full((8,), 0.125), torch.zeros(4)])
    (gradient,) = torch.autograd.grad(weight.sum(), [student.level_moves["0/table"]])
    readers = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 2, 1, 0])  # without replaced weights
    torch.testing.assert_close(gradient, readers * unit)

    with torch.no_grad():
        student.level_moves["0/table"] += 1
    stored = student.stored()[0]["0"]
    torch.testing.assert_close(stored.code.levels.float(), tensor.code.levels.float() + unit)
    torch.testing.assert_close(student.overrides()["0.weight"], matrix_to_weight(layer, stored.dequantize()))
    assert stored.dequantize()[0, 0, 1] == 8 and stored.dequantize()[0, 1, 3] == -8


def test_row_tables_of_a_network_are_distilled(digits):
    """Each layer's tables move on their own; sizes stay and the divergence falls."""
    network, images = digits
    tensors = {}
    for name, tensor in quantize(network, {"hidden": 2, "head": 2}).items():
        zero = zero_value(tensor.zero, tensor.width[:, None], torch.float32)
        table = tensor.scale.float() * (torch.arange(4.0) - zero)
        empty = torch.empty(len(table), 0)
        code = RowTable(table.flatten().half())
        tensors[name] = replace(tensor, scale=empty.half(), zero=empty.to(torch.uint8), code=code)
    student = loaded(network, tensors, {})
    teacher = teacher_of(network, images[:100])
    settings = DistillationSettings(steps=4)
    generator = torch.Generator().manual_seed(0)
    result = distill(student, tensors, batches_of(images[:100]), teacher, settings, generator, CATEGORICAL)
    assert result.best_step > 0 and result.heldout_kl_after < result.heldout_kl_before
    for name, tensor in tensors.items():
        assert not torch.equal(result.tensors[name].code.levels, tensor.code.levels)
    sizes = [buffer_bytes(pack_model(x)[0]) for x in (tensors, result.tensors)]
    assert sizes[0] == sizes[1]


def test_biases_and_norms_move_in_units_of_their_own_size():
    """One unit of a move is the root mean square of the tensor, 1 where all is zero; unmoved ones are not stored."""
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with torch.no_grad():
        network[0].bias.copy_(torch.tensor([3.0, -4.0]))
    student = Student(network, quantize(network, {"0": 4}))
    assert student.stored()[1] == {}
    with torch.no_grad():
        student.affine_moves["0.bias"].copy_(torch.tensor([2.0, 0.0]))
        student.affine_moves["1.bias"].copy_(torch.tensor([0.0, 0.5]))
    expected = {"0.bias": torch.tensor([3 + 2 * 12.5**0.5, -4]), "1.bias": torch.tensor([0.0, 0.5])}
    stored = student.stored()[1]
    assert stored.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(stored[name], x)
        torch.testing.assert_close(student.overrides()[name], x)
    assert torch.equal(student.overrides()["1.weight"], torch.ones(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_training_that_is_no_longer_finite_keeps_the_network_as_it_came(digits, bad):
    network, images = digits
    tensors = quantize(network, dict.fromkeys(LAYERS, 3))
    calibration, teacher = images[:100].clone(), teacher_of(network, images[:100])
    # the first training example: the held-out part stays finite
    calibration[torch.randperm(100, generator=torch.Generator().manual_seed(0))[20]] = bad
    student = loaded(network, tensors, {})
    result = distill(
        student, tensors, batches_of(calibration), teacher, FAST, torch.Generator().manual_seed(0), CATEGORICAL
    )
    assert result.steps == result.best_step == 0 and result.parameters == {}
    assert 0 < result.heldout_kl_after == result.heldout_kl_before < 1
    assert all(identical(result.tensors[name], tensor) for name, tensor in tensors.items())


def test_text_batches_of_different_lengths():
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 16), nn.Linear(16, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            weight = attention_mask.float()[..., None]
            return self.head((self.embedding(input_ids) * weight).sum(1) / weight.sum(1))

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Text().eval()
    batches = []
    for k, index in enumerate(torch.randperm(48, generator=generator).split(12)):
        length = 6 - k
        ids = torch.randint(0, 9, (12, length), generator=generator)
        batches.append(Batch({"input_ids": ids, "attention_mask": torch.ones(12, length).long()}, index))
    tensors = quantize(network, {"head": 2})
    teacher = posterior_predictive(network, [], None, batches, 0, generator, CATEGORICAL)
    settings = DistillationSettings(steps=6)
    result = distill(loaded(network, tensors, {}), tensors, batches, teacher, settings, generator, CATEGORICAL)
    assert result.heldout_kl_after < result.heldout_kl_before
    assert network.embedding.weight.grad is None


def test_it_refuses_what_it_cannot_train(digits):
    network, images = digits
    tensors = quantize(network, {"head": 3, "hidden": 3})
    generator = torch.Generator()
    teacher = teacher_of(network, images[:20])
    batches = batches_of(images[:20])
    with pytest.raises(ValueError, match="eval mode"):
        distill(copy.deepcopy(network).train(), tensors, batches, teacher, FAST, generator, CATEGORICAL)
    with pytest.raises(ValueError, match="5 rows for 20"):
        distill(network, tensors, batches, teacher[:5], FAST, generator, CATEGORICAL)
    with pytest.raises(ValueError, match="too few"):
        distill(network, tensors, batches_of(images[:2]), teacher[:2], FAST, generator, CATEGORICAL)
    with pytest.raises(ValueError, match="every calibration example once"):
        distill(network, tensors, [batches[0], batches[0]], teacher, FAST, generator, CATEGORICAL)
    other = replace(tensors["head"], code=SharedTable({3: Codebook("shared/3", torch.arange(8).half() * 2)}))
    with pytest.raises(ValueError, match="two different codebooks"):
        distill(network, {**tensors, "head": other}, batches, teacher, FAST, generator, CATEGORICAL)
    for key, value in (("steps", -1), ("evaluations", 0)):
        with pytest.raises(ValueError, match=rf"distillation\.{key}={value}: needs a whole number"):
            DistillationSettings(**{key: value})
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="held_out"):
            DistillationSettings(held_out=share)
