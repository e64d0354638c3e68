"""QTIP (Tseng et al., arXiv 2406.11235): rotate both sides of a layer, then trellis codes with LDLQ feedback.

The rotated weights W' = R_r W R_cT are nearly Gaussian, so levels designed for a Gaussian serve all layers. Feedback
runs over the columns of W' in the metric R_c A R_cT, and the codes of each column lie on a trellis. The codes are those
of `bayesq.quant.codes.trellis`; the published ones shift a window of bits and have more states.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.codebook import level_unit, normal_distortion, table_bits, table_widths
from bayesq.contract import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.quant.codes import Codebook, shared_code
from bayesq.quant.codes.trellis import POLYNOMIALS
from bayesq.quant.feedback import feedback_factors, feedback_round
from bayesq.quant.grids import AffineGrid, mse_grid, stored_scale, zero_code
from bayesq.quant.rotation import SEED_BYTES, Rotation
from bayesq.quant.tensor import QuantizedTensor
from bayesq.quant.trellis import LEAST_TRELLIS_ROWS, TrellisGrid, normal_trellis, trellis_distortion


class QTIP:
    """Incoherence processing, trellis codes and feedback.

    Args:
        states: of the trellis, 4 to 256.
        damping: fraction of the mean diagonal added to the input moment.
    """

    statistics: frozenset[Statistic] = frozenset({INPUT_MOMENT})

    def __init__(self, states: int, damping: float) -> None:
        if states not in POLYNOMIALS:
            raise Refused(f"method.states={states}: choose one of {', '.join(map(str, POLYNOMIALS))}")
        if not damping >= 0:
            raise Refused(f"method.damping={damping}: must be 0 or more")
        self.states, self.damping = states, damping

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths, and which of them have a table of levels; count tables and seeds."""
        self.tables = table_widths(sum(layer.weight.numel() for layer in layers), self.states)
        seeds = 8 * SEED_BYTES * len(layers)
        return allocate(layers, table_bits(self.tables, self.states) + seeds, self.distortion)

    def distortion(self, layer: LayerProblem, width: int) -> float:
        """Expected squared error of a code of `width` bits in this layer, for weights of unit variance."""
        if layer.weight.shape[1] < LEAST_TRELLIS_ROWS:
            return normal_distortion("uniform", width)
        return trellis_distortion(width, self.states, width in self.tables)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Rotate the layer, round it with feedback, and store the rotation's seed."""
        check_finite(layer)
        rotation = Rotation(int(torch.randint(2 ** (8 * SEED_BYTES), (1,), generator=context.generator)))
        weight = rotation.forward(layer.weight.double())
        moments = rotation.moment(layer.input_statistic("input_moment").double())
        factors = feedback_factors(moments, self.damping, act_order=False)
        layer.count("damping_retries", sum(factor.retries for factor in factors))
        groups, rows, _ = weight.shape
        few = rows < LEAST_TRELLIS_ROWS
        tables = {} if few else {w: self._table(w) for w in width.unique().tolist() if w in self.tables}
        books = {w: table.levels.double() for w, table in tables.items()}
        scale, zero = mse_grid(stack_groups(weight), width) if few else self._rows(stack_groups(weight), width)
        codes = []
        for g, factor in enumerate(factors):
            part = slice(g * rows, (g + 1) * rows)
            grid: AffineGrid | TrellisGrid
            if few:
                grid = AffineGrid(scale[part, None], zero[part, None], width[part])
            else:
                equal = torch.ones(rows, dtype=torch.float64)
                grid = TrellisGrid(scale[part], zero[part], width[part], books, equal, self.states)
            codes.append(feedback_round(weight[g], factor, grid)[0])
        return QuantizedTensor(
            codes=torch.cat(codes),
            width=width,
            scale=scale[:, None].to(torch.float16),
            zero=zero_code(zero, width)[:, None],
            groups=groups,
            code=shared_code(tables, None if few else self.states),
            rotation=rotation,
        )

    def _table(self, width: int) -> Codebook:
        """Levels for a Gaussian, in level units around the centre of the codes."""
        levels = normal_trellis(width, self.states, True)[0] / level_unit(width) + (2**width - 1) / 2
        return Codebook(f"gaussian/{width}", levels.to(torch.float16))

    def _rows(self, weight: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [R]: levels of the row's root mean square, around zero."""
        unit = torch.ones(len(width), dtype=torch.float64)
        for w in width.unique().tolist():
            if w in self.tables:
                unit[width == w] = level_unit(w)
            else:  # uniform levels are half a level unit apart
                levels = normal_trellis(w, self.states, False)[0]
                unit[width == w] = 2 * float(levels[1] - levels[0])
        return stored_scale(weight.square().mean(1).sqrt() * unit), (2 ** width.double() - 1) / 2
