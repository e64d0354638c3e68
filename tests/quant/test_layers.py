"""The matrix view: W[g, r, c] times the samples is what the layer computes, for every kind of convolution."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from bayesq.quant.layers import (
    embedding_tables,
    groups_of,
    input_blocks,
    input_samples,
    mask_samples,
    matrix_to_weight,
    output_samples,
    quantizable_layers,
    sample_shape,
    weight_to_matrix,
)

CONVOLUTIONS = {
    "plain": ({"in_channels": 3, "out_channels": 5, "kernel_size": 3}, (9, 8)),
    "pointwise": ({"in_channels": 6, "out_channels": 4, "kernel_size": 1}, (5, 7)),
    "pointwise strided": ({"in_channels": 4, "out_channels": 4, "kernel_size": 1, "stride": 2}, (7, 6)),
    "no bias": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "bias": False}, (6, 6)),
    "grouped": ({"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "padding": 1}, (6, 5)),
    "grouped pointwise": ({"in_channels": 8, "out_channels": 4, "kernel_size": 1, "groups": 4}, (4, 4)),
    "depthwise": ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1}, (7, 7)),
    "depthwise multiplier": ({"in_channels": 3, "out_channels": 6, "kernel_size": 3, "groups": 3}, (6, 8)),
    "non-square": (
        {
            "in_channels": 3,
            "out_channels": 4,
            "kernel_size": (2, 5),
            "stride": (2, 1),
            "padding": (1, 2),
            "dilation": (1, 2),
        },
        (9, 12),
    ),
    "dilated": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "dilation": 2, "padding": 2}, (8, 9)),
    "same odd": ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "same"}, (6, 7)),
    "same even": ({"in_channels": 3, "out_channels": 4, "kernel_size": (4, 2), "padding": "same"}, (6, 7)),
    "same dilated": (
        {"in_channels": 2, "out_channels": 4, "kernel_size": (2, 3), "padding": "same", "dilation": (3, 2)},
        (8, 9),
    ),
    "valid": ({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "valid", "stride": 2}, (8, 9)),
    "reflect": (
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
        (6, 7),
    ),
    "circular": (
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}
        | {"groups": 2},
        (6, 7),
    ),
    "replicate": (
        {"in_channels": 3, "out_channels": 4, "kernel_size": 5, "padding": 2, "padding_mode": "replicate"}
        | {"stride": 3},
        (7, 8),
    ),
    "reflect same even": (
        {"in_channels": 2, "out_channels": 3, "kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
        (7, 8),
    ),
}
SAME = [
    ((11, 8), {"kernel_size": 3, "stride": 2}),
    ((8, 8), {"kernel_size": 3, "stride": 2}),
    ((9, 10), {"kernel_size": 5, "stride": 2, "groups": 4}),
    ((7, 12), {"kernel_size": (3, 5), "stride": (1, 3), "dilation": (2, 1)}),
    ((13, 5), {"kernel_size": 2, "stride": (3, 2), "groups": 2}),
    ((6, 6), {"kernel_size": 1, "stride": 2}),
]


def convolution(name: str) -> tuple[nn.Conv2d, Tensor]:
    settings, size = CONVOLUTIONS[name]
    torch.manual_seed(1)
    layer = nn.Conv2d(**settings).double()
    return layer, torch.randn(3, layer.in_channels, *size, dtype=torch.float64)


def as_rows(layer: nn.Module, output: Tensor, examples: int) -> Tensor:
    """The layer's own output, element by element, as [b, g, l, r]; leading dimensions fold into positions."""
    groups = groups_of(layer)
    if isinstance(layer, nn.Linear):
        return torch.stack([torch.stack([part.reshape(-1, part.shape[-1])]) for part in output.chunk(examples)])
    rows = []
    for part in output.chunk(examples):  # [n, channels, h, w]
        by_group = part.split(part.shape[1] // groups, dim=1)
        rows.append(torch.stack([torch.cat([image.flatten(1).T for image in group]) for group in by_group]))
    return torch.stack(rows)


def check_view(layer: nn.Module, x: Tensor, examples: int) -> None:
    """Both halves of the convention: the product is the output, and d^T x per example is autograd's gradient."""
    matrix = weight_to_matrix(layer)
    samples = input_samples(layer, x, examples)
    output = layer(x)
    rows = output_samples(layer, output.detach(), examples)
    torch.testing.assert_close(rows, as_rows(layer, output.detach(), examples), rtol=0, atol=0)

    product = torch.einsum("grc,bglc->bglr", matrix, samples)
    if layer.bias is not None:
        product = product + layer.bias.detach().reshape(len(matrix), 1, -1)
    torch.testing.assert_close(product, rows, rtol=1e-10, atol=1e-10)

    upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    d = output_samples(layer, upstream, examples)
    share = len(x) // examples
    for b in range(examples):
        part = slice(b * share, (b + 1) * share)
        (gradient,) = torch.autograd.grad((output[part] * upstream[part]).sum(), layer.weight, retain_graph=True)
        ours = torch.einsum("glr,glc->grc", d[b], samples[b])
        torch.testing.assert_close(matrix_to_weight(layer, ours), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_its_matrix_times_its_samples(name: str) -> None:
    layer, x = convolution(name)
    check_view(layer, x, len(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("rows", [0.5, 1, 2.5, 100])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_blocks_of_positions_are_the_samples_in_their_order(name: str, rows: float) -> None:
    layer, x = convolution(name)
    check_blocks(layer, x[:1], rows)


@pytest.mark.parametrize(("size", "settings"), SAME)
def test_blocks_follow_timms_padding_too(size: tuple[int, int], settings: dict) -> None:
    torch.manual_seed(3)
    check_blocks(Conv2dSame(4, 8, **settings).double(), torch.randn(1, 4, *size, dtype=torch.float64), 1)


def check_blocks(layer: nn.Conv2d, x: Tensor, rows: float) -> None:
    """Blocks of so many rows of output pixels put together are all samples; none has more, save that of one row."""
    expected = input_samples(layer, x, 1)
    assert sample_shape(layer, x, 1) == expected.shape
    row = expected.numel() // layer(x).shape[2]
    blocks = list(input_blocks(layer, x, int(rows * row)))
    assert torch.equal(torch.cat([samples for _, samples in blocks], 2), expected)
    positions = torch.arange(expected.shape[2])
    assert torch.equal(torch.cat([positions[where] for where, _ in blocks]), positions)
    assert all(samples.numel() <= max(rows, 1) * row for _, samples in blocks)
    assert len(blocks) == -(-layer(x).shape[2] // max(int(rows), 1))


def test_samples_that_are_no_convolution_of_one_image_come_at_once() -> None:
    for layer, x in ((nn.Linear(4, 2), torch.randn(1, 6, 4)), (nn.Conv2d(4, 2, 1), torch.randn(3, 4, 5, 5))):
        ((where, samples),) = input_blocks(layer, x, 1)
        assert torch.equal(samples, input_samples(layer, x, 1))
        assert where == slice(0, samples.shape[2]) and samples.shape == sample_shape(layer, x, 1)


@pytest.mark.parametrize(("size", "settings"), SAME)
def test_timm_same_padding(size: tuple[int, int], settings: dict) -> None:
    torch.manual_seed(3)
    layer = Conv2dSame(4, 8, **settings).double()
    check_view(layer, torch.randn(2, 4, *size, dtype=torch.float64), 2)


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 3, 2, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_with_any_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(4)
    layer = nn.Linear(6, 5, bias=bias).double()
    x = torch.randn(*shape, dtype=torch.float64)
    check_view(layer, x, 4)
    assert input_samples(layer, x, 4).shape == (4, 1, x[0].numel() // 6, 6)


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise"])
def test_a_folded_batch_of_images_becomes_positions(name: str) -> None:
    layer, _ = convolution(name)
    x = torch.randn(6, layer.in_channels, 5, 6, dtype=torch.float64)  # 2 examples of 3 windows
    check_view(layer, x, 2)
    samples = input_samples(layer, x, 2)
    for b in range(2):
        windows = [input_samples(layer, x[b * 3 + k : b * 3 + k + 1], 1)[0] for k in range(3)]
        torch.testing.assert_close(samples[b], torch.cat(windows, dim=1), rtol=0, atol=0)


def test_a_folded_batch_of_tokens_becomes_positions() -> None:
    torch.manual_seed(5)
    layer = nn.Linear(4, 3).double()
    x = torch.randn(6, 5, 4, dtype=torch.float64)  # 2 examples x 3 windows
    check_view(layer, x, 2)
    torch.testing.assert_close(input_samples(layer, x, 2)[1, 0], x[3:].reshape(-1, 4), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["grouped", "non-square", "depthwise multiplier"])
def test_columns_are_channel_major_and_matrix_to_weight_inverts(name: str) -> None:
    layer, _ = convolution(name)
    matrix = weight_to_matrix(layer)
    kh, kw = layer.kernel_size
    rows = layer.out_channels // layer.groups
    assert matrix.shape == (layer.groups, rows, layer.in_channels // layer.groups * kh * kw)
    for g in range(layer.groups):
        for r in range(rows):
            for channel in range(layer.in_channels // layer.groups):
                for i in range(kh):
                    for j in range(kw):
                        column = (channel * kh + i) * kw + j
                        assert matrix[g, r, column] == layer.weight[g * rows + r, channel, i, j]
    assert torch.equal(matrix_to_weight(layer, matrix), layer.weight)


def test_layers_are_linear_and_conv2d_in_definition_order() -> None:
    module = nn.Sequential()
    module.add_module("stem", nn.Conv2d(3, 4, 3))
    module.add_module("norm", nn.BatchNorm2d(4))
    module.add_module("wave", nn.Conv1d(4, 4, 3))
    module.add_module("block", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    module.add_module("head", nn.Linear(2, 2))
    assert list(quantizable_layers(module)) == ["stem", "block.0", "block.2", "head"]
    assert list(quantizable_layers(module, ["head", "block.[01]"])) == ["stem", "block.2"]
    assert list(quantizable_layers(module, ["block*"])) == ["stem", "head"]
    with pytest.raises(ValueError, match=r"layers\.exclude.*'Head'"):
        quantizable_layers(module, ["stem", "Head"])
    with pytest.raises(ValueError, match=r"layers\.exclude.*'norm'"):
        quantizable_layers(module, ["norm"])
    with pytest.raises(ValueError, match=r"layers\.exclude leaves no"):
        quantizable_layers(module, ["*"])


def test_embeddings_are_found_apart_and_share_the_patterns() -> None:
    module = nn.Sequential()
    module.add_module("words", nn.Embedding(5, 4))
    module.add_module("places", nn.Embedding(3, 4))
    module.add_module("head", nn.Linear(4, 2))
    module.add_module("second", nn.Linear(2, 2))
    assert list(embedding_tables(module)) == ["words", "places"]
    assert list(embedding_tables(module, ["p*"])) == ["words"]
    assert list(quantizable_layers(module, ["words", "head"])) == ["second"]
    matrix = weight_to_matrix(module.words)
    assert matrix.shape == (1, 5, 4) and torch.equal(matrix[0, 3], module.words(torch.tensor(3)))
    assert torch.equal(matrix_to_weight(module.words, matrix), module.words.weight)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no Linear or Conv2d layer to quantize: choose another model"):
        quantizable_layers(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)))


def test_masked_positions_are_zero_and_not_counted() -> None:
    samples = torch.randn(2, 1, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept, count = mask_samples(samples, mask)
    assert count == 3
    for b in range(2):
        for position in range(3):
            expected = samples[b, 0, position] if mask[b, position] else torch.zeros(4)
            assert torch.equal(kept[b, 0, position], expected)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((2, 1, 3, 4), None),
        ((2, 1, 1, 4), torch.tensor([[1], [0]])),  # pooled: one position an example
        ((2, 1, 6, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])),  # not the tokens' positions
    ],
)
def test_positions_the_mask_does_not_describe_all_count(shape: tuple[int, ...], mask: Tensor | None) -> None:
    samples = torch.randn(*shape)
    kept, count = mask_samples(samples, mask)
    assert torch.equal(kept, samples)
    assert count == shape[0] * shape[2]


def test_layers_that_transform_their_weight_are_refused_unless_excluded() -> None:
    from timm.layers import StdConv2d

    module = nn.Sequential(nn.Conv2d(3, 4, 3), StdConv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"layer 1 is a StdConv2d .* add 1 to layers\.exclude"):
        quantizable_layers(module)
    assert list(quantizable_layers(module, ["1"])) == ["0"]
