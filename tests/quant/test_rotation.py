"""Rotations: Hadamard matrices against their definition, orthogonality, and exact inversion of what is stored."""

import numpy as np
import pytest
import torch

from bayesq.quant.packing import pack, unpack
from bayesq.quant.rotation import SEED_BYTES, Rotation, factors_of, hadamard, hartley
from bayesq.quant.tensor import QuantizedTensor

SIZES = [1, 2, 3, 8, 9, 10, 12, 20, 27, 36, 60, 144, 147, 384, 576]


def matrix(rotation: Rotation, size: int, side: str) -> np.ndarray:
    """R of one side, from what it makes of unit vectors."""
    eye = torch.eye(size, dtype=torch.float64)[None]
    turned = rotation.rows(eye) if side == "rows" else rotation.columns(eye).transpose(1, 2)
    return turned[0].numpy()


@pytest.mark.parametrize("order", [2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 76])
def test_hadamard_matrices_have_entries_of_one_and_orthogonal_rows(order: int) -> None:
    h = hadamard(order)
    assert set(np.unique(h)) == {-1.0, 1.0}
    assert np.array_equal(h @ h.T, order * np.eye(order))


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order 16"):  # made of smaller ones
        hadamard(16)


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal_and_spread_every_entry(size: int) -> None:
    rotation = Rotation(7)
    for side in ("rows", "columns"):
        r = matrix(rotation, size, side)
        assert np.allclose(r @ r.T, np.eye(size), atol=1e-12)
        assert np.abs(r).max() <= (2 / size) ** 0.5 + 1e-12  # sqrt(2) is the largest entry of cos + sin
    factors = factors_of(size)
    expected = np.eye(1)
    for factor in factors:
        expected = np.kron(expected, factor)
    signs = matrix(rotation, size, "rows") / expected
    assert np.allclose(np.abs(signs[np.abs(expected) > 1e-9]), 1)


def test_only_the_rest_of_a_size_is_no_hadamard_matrix() -> None:
    assert [len(factor) for factor in factors_of(384)] == [32, 12]
    assert [len(factor) for factor in factors_of(72)] == [2, 36]
    assert [len(factor) for factor in factors_of(27)] == [27] and np.allclose(factors_of(27)[0], hartley(27))
    assert [len(factor) for factor in factors_of(56)] == [56]


@pytest.mark.parametrize("shape", [(1, 6, 27), (2, 8, 12), (3, 1, 9)])
def test_a_layer_comes_back_and_its_error_keeps_its_size(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(50, shape[0], shape[2], generator=generator, dtype=torch.float64)
    moment = torch.einsum("ngi,ngj->gij", x, x) / 50
    rotation = Rotation(3)
    turned = rotation.forward(weight)
    for g in range(shape[0]):
        left, right = matrix(rotation, shape[1], "rows"), matrix(rotation, shape[2], "columns")
        assert np.allclose(turned[g].numpy(), left @ weight[g].numpy() @ right.T)
        assert np.allclose(rotation.moment(moment)[g].numpy(), right @ moment[g].numpy() @ right.T)
    assert torch.allclose(rotation.inverse(turned), weight, atol=1e-12)
    delta = torch.randn(shape, generator=generator, dtype=torch.float64)
    errors = [
        torch.einsum("grc,gcd,grd->", part, a, part)
        for part, a in ((delta, rotation.moment(moment)), (rotation.inverse(delta), moment))
    ]
    assert torch.allclose(*errors)


def test_seeds_give_other_signs_for_each_side() -> None:
    sides = [matrix(Rotation(seed), 12, side) for seed in (0, 1, 2**32 - 1) for side in ("rows", "columns")]
    assert len({side.tobytes() for side in sides}) == 6


def test_a_file_holds_the_seed_and_gives_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    width = torch.tensor([3] * 6, dtype=torch.uint8)
    tensor = QuantizedTensor(
        codes=torch.randint(0, 8, (6, 27), generator=generator, dtype=torch.uint8),
        width=width,
        scale=torch.rand(6, 1, generator=generator).to(torch.float16),
        zero=torch.full((6, 1), 112, dtype=torch.uint8),
        rotation=Rotation(2**31 + 5),
    )
    buffers, facts = pack(tensor)
    assert buffers["rotation"].dtype == torch.uint8 and buffers["rotation"].tolist() == [5, 0, 0, 128]
    read = unpack(buffers, facts, {})
    assert read.rotation == tensor.rotation and torch.equal(read.dequantize(), tensor.dequantize())
    plain = tensor.scale.double() * (tensor.codes.double() - 3.5)
    left, right = matrix(Rotation(2**31 + 5), 6, "rows"), matrix(Rotation(2**31 + 5), 27, "columns")
    assert np.allclose(tensor.dequantize()[0].numpy(), left.T @ plain.numpy() @ right, atol=1e-5)
    for damaged in (buffers["rotation"][:3], torch.tensor([5, 0, 0, 128, 1], dtype=torch.uint8)):
        with pytest.raises(ValueError, match=f"rotation: needs the {SEED_BYTES} bytes of a seed"):
            unpack(buffers | {"rotation": damaged}, facts, {})


@pytest.mark.parametrize("shape", [(1, 5, 12), (3, 2, 9)])
def test_columns_alone(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = Rotation(11, both=False)
    right = matrix(rotation, shape[2], "columns")
    assert np.allclose(rotation.forward(weight).numpy(), weight.numpy() @ right.T)
    assert torch.allclose(rotation.inverse(rotation.forward(weight)), weight, atol=1e-12)
    assert rotation.pack().tolist() == [11, 0, 0, 0, 0] and Rotation.unpack(rotation.pack()) == rotation
