"""Weights are found, watched and counted whichever way a network uses them."""

from functools import partial

import odd_networks as odd
import pytest
import torch
import torch.nn.functional as F
from odd_networks import WIDTH, seeded, vectors
from torch import nn

from bayesq.quant.attention import attention
from bayesq.quant.layers import (
    ParameterLayer,
    embedding_tables,
    find_layer,
    matrix_to_weight,
    quantizable_layers,
    same_layer,
    weight_key,
    weight_to_matrix,
)
from bayesq.quant.usage import usage_of
from bayesq.quant.watch import watching

BY_FUNCTION = [
    odd.FunctionByKeywords,
    odd.FunctionInWindows,
    odd.ProductWithTransposed,
    odd.MatmulFunction,
    odd.AddmmFlattened,
    odd.OwnForward,
    odd.TiedLayers,
]
BY_CALL = [odd.Plain, odd.KeywordCall, odd.Loop]
WITHOUT_BATCH = [
    odd.SharedPositions,
    partial(odd.SharedPositions, (1, 4, WIDTH)),
    partial(odd.SharedPositions, (2, 2, WIDTH)),
    odd.ContentAndPositions,
    odd.SharedConvolution,
    odd.PositionsFirst,
    odd.Mixture,
    partial(odd.Mixture, transposed=True),
    odd.SelfAttention,
    partial(odd.SelfAttention, batch_first=False, bias=False),
    odd.CrossAttention,
]
REFUSED = {
    odd.Normalised: "odd",
    odd.Concatenated: "odd by cat",
    odd.LeftFactor: "odd by",
    odd.PartOfTheRows: "odd by linear",
    odd.ConvolutionByFunction: "odd by conv2d",
}


def usage(module: nn.Module):
    return usage_of(module, quantizable_layers(module), {"x": vectors(2)})


@pytest.mark.parametrize("build", BY_FUNCTION)
def test_weights_that_functions_use_are_watched_as_products(build):
    module = seeded(build)
    found = usage(module)
    assert isinstance(found.layers["odd"], ParameterLayer) and found.layers["odd"].weight is module.odd.weight
    assert isinstance(found.layers["head"], nn.Linear)
    assert not found.alone and not found.unreached


@pytest.mark.parametrize("build", BY_CALL)
def test_layers_that_are_called_are_watched_by_their_calls(build):
    module = seeded(build)
    found = usage(module)
    assert found.layers["odd"] is module.odd and not found.alone
    assert found.calls == {"odd": 3 if build is odd.Loop else 1, "head": 1}


@pytest.mark.parametrize("build", WITHOUT_BATCH)
def test_inputs_without_the_batch_in_front_need_examples_alone(build):
    found = usage(seeded(build))
    assert found.alone and all(name.startswith("odd") for name in found.alone)


def test_positions_that_are_not_the_masks_need_examples_alone():
    module = seeded(odd.TwoLengths)
    assert not usage(module).alone

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x, attention_mask):
            return self.inner(x * attention_mask[..., None])

    masked = Masked()
    inputs = {"x": vectors(2), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    assert usage_of(masked, quantizable_layers(masked), inputs).alone == ("inner.odd",)


@pytest.mark.parametrize(("build", "message"), REFUSED.items())
def test_weights_that_take_part_in_another_way_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=rf"layer {message}.*layers\.exclude"):
        usage(seeded(build))


def test_attention_that_is_not_written_out_is_refused_by_name():
    with pytest.raises(ValueError, match=r"odd\.in_proj_weight, odd\.out_proj by multi_head_attention_forward"):
        usage(seeded(odd.ExtraAttention))


@pytest.mark.parametrize("build", [odd.InNumpy, odd.SharedMemory])
def test_weights_that_are_used_unseen_are_refused_by_name(build):
    module = seeded(build)
    before = module.odd.weight.clone()
    with pytest.raises(ValueError, match=r"layer (odd|twin).*layers\.exclude"):
        usage(module)
    assert torch.equal(module.odd.weight, before)


@pytest.mark.parametrize("build", [odd.AddsInPlace, odd.ActsInPlace])
def test_inputs_that_are_changed_in_place_are_known(build):
    assert usage(seeded(build)).overwritten == {"odd"}
    assert not usage(seeded(odd.Plain)).overwritten


def test_layers_that_nothing_reaches_are_named():
    module = seeded(odd.Plain)
    module.unused = nn.Linear(3, 3)
    found = usage(module)
    assert found.unreached == ("unused",) and set(found.layers) == {"odd", "head"}


@pytest.mark.parametrize("make", [torch.nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weights_that_are_computed_from_others_are_refused_by_name(make):
    module = seeded(odd.Plain)
    make(module.odd)
    with pytest.raises(ValueError, match="layer odd computes its weight from other parameters"):
        quantizable_layers(module)
    assert set(quantizable_layers(module, ["odd"])) == {"head"}


class TestShared:
    def test_a_weight_of_two_layers_is_listed_once(self):
        module = seeded(odd.TiedLayers)
        assert set(quantizable_layers(module)) == {"odd", "head"}
        assert usage(module).calls["odd"] == 2
        with pytest.raises(ValueError, match="share"):  # the excluded twin keeps its weight
            quantizable_layers(module, ["again", "head"])

    def test_a_table_of_three_embeddings_is_listed_once(self):
        module = nn.ModuleDict({name: nn.Embedding(5, 4) for name in ("shared", "encoder", "decoder", "other")})
        module["encoder"].weight = module["decoder"].weight = module["shared"].weight
        assert set(embedding_tables(module)) == {"shared", "other"}
        assert set(embedding_tables(module, ["encoder"])) == {"other"}

    def test_a_tied_head_and_its_table_stay_as_they_are(self):
        module = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "inner": nn.Linear(4, 4)})
        module["head"].weight = module["table"].weight
        assert set(quantizable_layers(module)) == {"inner"} and not embedding_tables(module)


@pytest.mark.parametrize(
    "build", [odd.Plain, odd.Transposed, odd.Mixture, partial(odd.Mixture, transposed=True), odd.SelfAttention]
)
def test_matrices_of_weights_and_their_names(build):
    module, copy = seeded(build), seeded(build)
    for name, layer in quantizable_layers(module).items():
        matrix = weight_to_matrix(layer)
        assert torch.equal(matrix_to_weight(layer, matrix), layer.weight)
        assert dict(module.named_parameters())[weight_key(name, layer)] is layer.weight
        assert find_layer(copy, name).weight is dict(copy.named_parameters())[weight_key(name, layer)]
        assert same_layer(layer, copy, name).weight is find_layer(copy, name).weight
    with pytest.raises(ValueError, match="nowhere is not part of the network"):
        find_layer(module, "nowhere")


@pytest.mark.parametrize("build", [odd.Transposed, odd.Mixture, partial(odd.Mixture, transposed=True)])
def test_out_is_the_matrix_times_the_input(build):
    module = seeded(build)
    layers = {name: layer for name, layer in quantizable_layers(module).items() if name != "head"}
    compared = []

    def seen(name, group, x, output):
        matrix = weight_to_matrix(layers[name])[group or 0]
        torch.testing.assert_close(output, F.linear(x, matrix))
        compared.append(group)

    module.odd.register_parameter("bias", None)
    with watching({name: layer for name, layer in layers.items() if isinstance(layer, ParameterLayer)}, seen):
        if build is odd.Transposed:
            module.odd.bias = nn.Parameter(torch.zeros(WIDTH))
        module(vectors())
    assert len(compared) == (1 if build is odd.Transposed else 3)


@pytest.mark.parametrize("mask", [None, "boolean", "added", "by head", "padding", "all"])
@pytest.mark.parametrize("weights", [False, True])
def test_attention_is_torchs(mask, weights):
    query, source = (torch.randn(n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    layer = seeded(lambda: nn.MultiheadAttention(8, 2))
    upper = torch.ones(4, 5).triu(2)
    options = {
        None: {},
        "boolean": {"attn_mask": upper.bool()},
        "added": {"attn_mask": -3 * upper},
        "by head": {"attn_mask": -torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(0))},
        "all": {"attn_mask": torch.tensor([[True] * 5] + [[False] * 5] * 3)},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True] + [False] * 4])},
    }[mask]
    given = (query, source, source, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    given = (*given, layer.out_proj.weight, layer.out_proj.bias)
    options |= {"training": False, "need_weights": weights}
    expected, found = F.multi_head_attention_forward(*given, **options), attention(*given, **options)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    assert (found[1] is None) == (not weights)
    if weights:
        torch.testing.assert_close(found[1], expected[1], equal_nan=True)
