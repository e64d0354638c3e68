"""QuantizedTensor: what every method returns, and what all results are computed from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.quant.codes import Affine, Code, SparseOverlay
from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH, zero_value
from bayesq.quant.rotation import Rotation


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes of one layer and all that is needed to decode them.

        W'[g, r, c] = scale * (level(code) - zero) / column_scale[c]
        W = W',   or with `rotation` W' R_c or R_rT W' R_c,   or the overlay's weight

    Attributes:
        codes: [R, C] uint8, R = groups * rows per group; codes of row i are below 2**width[i].
        width: [R] uint8 bits per code.
        scale: [R, S] fp16, S column groups. S = 0 if the code's levels are weights (`Code.absolute`); then
            W' = level(code) / column_scale.
        zero: [R, S] uint8 zero point in units of 2**(width - 8) levels, see `grids.zero_code`.
        groups: convolution groups g (Linear: 1).
        group_size: columns per column group; None = whole row.
        code: decodes codes to levels.
        column_scale: [groups, C / k] fp16 factors folded out of the codes (AWQ, WaterSIC), or None; each covers k
            neighbouring columns, in AWQ the kh * kw ones that read an input channel, in WaterSIC one.
        rotation: W' is R_r W R_cT or W R_cT, see `bayesq.quant.rotation`; None = W.
        overlay: single weights in fp16, or None.
    """

    codes: Tensor
    width: Tensor
    scale: Tensor
    zero: Tensor
    groups: int = 1
    group_size: int | None = None
    code: Code = field(default_factory=Affine)
    column_scale: Tensor | None = None
    overlay: SparseOverlay | None = None
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.codes.dtype != torch.uint8 or self.width.dtype != torch.uint8:
            raise Refused("codes and width must be uint8")
        if self.width.shape != (rows,) or not bool(((self.width >= MIN_WIDTH) & (self.width <= MAX_WIDTH)).all()):
            raise Refused(f"width must be [{rows}] with entries in [{MIN_WIDTH}, {MAX_WIDTH}]")
        if bool((self.codes.amax(1).int() >= 2 ** self.width.int()).any()):
            raise Refused("a code does not fit its row's width")
        scale_columns = column_groups(self.code, columns, self.group_size)
        if self.scale.dtype != torch.float16 or self.scale.shape != (rows, scale_columns):
            raise Refused(f"scale must be float16 [{rows}, {scale_columns}]")
        if not bool(torch.isfinite(self.scale).all()):
            raise Refused("a scale is NaN, or too large for float16")
        if self.zero.dtype != torch.uint8 or self.zero.shape != self.scale.shape:
            raise Refused(f"zero must be uint8 {list(self.scale.shape)}")
        if rows % self.groups:
            raise Refused(f"{rows} rows do not divide into {self.groups} groups")
        if self.column_scale is not None and (
            self.column_scale.dtype != torch.float16
            or self.column_scale.shape[0] != self.groups
            or columns % self.column_scale.shape[1]
        ):
            raise Refused(f"column_scale must be float16 [{self.groups}, a divisor of {columns}]")
        self.code.check(self.width)
        if self.overlay is not None:
            self.overlay.check(rows, columns)

    def positions(self) -> Tensor:
        """Position of each weight's level in the code's table, int64 [R, C]."""
        return self.code.positions(self.codes, self.width, self.groups)

    def table(self) -> Tensor:
        """All levels that the layer's rows read, float32 [K]."""
        return torch.cat([part.levels for part in self.code.parts(self.width)])

    def dequantize(self) -> Tensor:
        """The weights as a float32 stack of matrices [g, r, c]."""
        return self.weights(self.table()[self.positions()], self.scale.to(torch.float32))

    def weights(self, level: Tensor, scale: Tensor) -> Tensor:
        """The weights [g, r, c] for these levels and scales in place of the tensor's, differentiable in both.

        Args:
            level: [R, C] float32, on any device.
            scale: [R, S] float32, on the same device.
        """
        rows, columns = level.shape
        value = level
        if not self.code.absolute:
            zero = zero_value(self.zero, self.width[:, None], torch.float32).to(level.device)
            if self.group_size is not None:
                size = min(self.group_size, columns)
                scale, zero = (x.repeat_interleave(size, dim=1)[:, :columns] for x in (scale, zero))
            value = scale * (level - zero)
        value = value.reshape(self.groups, rows // self.groups, columns)
        if self.column_scale is not None:
            spread = self.column_scale.repeat_interleave(columns // self.column_scale.shape[1], dim=1)
            value = value / spread.to(level.device, torch.float32)[:, None, :]
        if self.rotation is not None:
            value = self.rotation.inverse(value)
        return value if self.overlay is None else self.overlay.replace_in(value)


def column_groups(code: Code | type[Code], columns: int, group_size: int | None) -> int:
    """Number of scales of a row.

    Raises:
        ValueError: a group size for rows without scales.
    """
    if code.absolute:
        if group_size is not None:
            raise Refused(f"group_size={group_size} has no meaning where rows have no scale")
        return 0
    # integer division, because floats are not exact for large numbers
    return 1 if group_size is None else -(-columns // group_size)
