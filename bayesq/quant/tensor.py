"""QuantizedTensor: the one representation every method returns and everything reported comes from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH, zero_value
from bayesq.quant.trellis import level_indices, subset_table, uniform_levels


@dataclass(frozen=True)
class Codebook:
    """Increasing levels shared by any number of layers; stored once per model under its name.

    Attributes:
        name: unique within a model, for instance "lloyd/3".
        levels: [2**width] fp16, twice as many for trellis codes.
    """

    name: str
    levels: Tensor

    def __post_init__(self) -> None:
        if self.levels.dtype != torch.float16:
            raise ValueError(f"codebook {self.name}: levels must be stored as float16, not {self.levels.dtype}")
        if not bool((self.levels[1:] >= self.levels[:-1]).all()):
            raise ValueError(f"codebook {self.name}: levels must not decrease")


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes of one layer and what turns them back into weights.

        W[g, r, c] = scale * (level(code) - zero) / column_scale[c]

    Attributes:
        codes: [R, C] uint8, R = groups * rows per group; codes of row i are below 2**width[i].
        width: [R] uint8 bits per code.
        scale: [R, S] fp16, S column groups.
        zero: [R, S] uint8 zero point in units of 2**(width - 8) levels, see `grids.zero_code`.
        groups: convolution groups g (Linear: 1).
        group_size: columns per column group; None = whole row.
        codebooks: width -> Codebook for rows of that width; a width without one is affine, level(code) = code.
        trellis: states of the trellis the codes run along (see `bayesq.quant.trellis`), or None: each code names its
            level. A width without a codebook then has `trellis.uniform_levels`.
        column_scale: [groups, C / k] fp16 per-input-channel factor folded out of the codes (AWQ), or None; each covers
            the k = kh * kw neighbouring columns that read the channel.
    """

    codes: Tensor
    width: Tensor
    scale: Tensor
    zero: Tensor
    groups: int = 1
    group_size: int | None = None
    codebooks: dict[int, Codebook] = field(default_factory=dict)
    column_scale: Tensor | None = None
    trellis: int | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        column_groups = 1 if self.group_size is None else -(-columns // self.group_size)
        if self.codes.dtype != torch.uint8 or self.width.dtype != torch.uint8:
            raise ValueError("codes and width must be uint8")
        if self.width.shape != (rows,) or not bool(((self.width >= MIN_WIDTH) & (self.width <= MAX_WIDTH)).all()):
            raise ValueError(f"width must be [{rows}] with entries in [{MIN_WIDTH}, {MAX_WIDTH}]")
        if bool((self.codes.amax(1).int() >= 2 ** self.width.int()).any()):
            raise ValueError("a code does not fit its row's width")
        if self.scale.dtype != torch.float16 or self.scale.shape != (rows, column_groups):
            raise ValueError(f"scale must be float16 [{rows}, {column_groups}]")
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError("scale must be finite")
        if self.zero.dtype != torch.uint8 or self.zero.shape != self.scale.shape:
            raise ValueError(f"zero must be uint8 {list(self.scale.shape)}")
        if rows % self.groups:
            raise ValueError(f"{rows} rows do not divide into {self.groups} groups")
        if self.column_scale is not None and (
            self.column_scale.dtype != torch.float16
            or self.column_scale.shape[0] != self.groups
            or columns % self.column_scale.shape[1]
        ):
            raise ValueError(f"column_scale must be float16 [{self.groups}, a divisor of {columns}]")
        for width, book in self.codebooks.items():
            needed = 2**width if self.trellis is None else 2 ** (width + 1)
            if len(book.levels) != needed:
                raise ValueError(f"codebook {book.name} has {len(book.levels)} levels, width {width} needs {needed}")
        if self.trellis is not None:
            subset_table(self.trellis)

    def level_indices(self) -> Tensor:
        """Which level of its row's width each weight has, int64 [R, C]."""
        if self.trellis is None:
            return self.codes.long()
        return level_indices(self.codes, self.trellis, self.groups)

    def levels(self, width: int) -> Tensor:
        """Increasing levels of a width in level units, float32."""
        if width in self.codebooks:
            return self.codebooks[width].levels.to(torch.float32)
        if self.trellis is not None:
            return uniform_levels(width).to(torch.float32)
        return torch.arange(2**width, dtype=torch.float32)

    def dequantize(self) -> Tensor:
        """The weights as a float32 stack of matrices [g, r, c]."""
        rows, columns = self.codes.shape
        index = self.level_indices()
        level = torch.empty(rows, columns)
        for width in self.width.unique().tolist():
            chosen = self.width == width
            level[chosen] = self.levels(width)[index[chosen]]
        scale = self.scale.to(torch.float32)
        zero = zero_value(self.zero, self.width[:, None], torch.float32)
        if self.group_size is not None:
            group = torch.arange(columns) // self.group_size
            scale, zero = scale[:, group], zero[:, group]
        value = scale * (level - zero)
        value = value.reshape(self.groups, rows // self.groups, columns)
        if self.column_scale is not None:
            spread = self.column_scale.repeat_interleave(columns // self.column_scale.shape[1], dim=1)
            value = value / spread.to(torch.float32)[:, None, :]
        return value
