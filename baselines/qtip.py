"""QTIP (Tseng et al., arXiv 2406.11235): rotate both sides of a layer, then trellis codes with LDLQ feedback.

The rotated weights W' = R_r W R_cT are nearly Gaussian, so levels designed for a Gaussian serve all layers. Feedback
runs over the columns of W' in the metric R_c A R_cT, and the codes of each column lie on a bitshift trellis, with
levels as published or with those of BayesQ (`bayesq.quant.codes.bitshift`). The published code rounds tiles of 16 x 16
weights along one path, with feedback from tile to tile. Here a path runs down one column, so that every column gets
feedback.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.codebook import normal_distortion
from bayesq.contract import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.quant.bitshift import BitshiftGrid, bitshift_distortion
from bayesq.quant.codes import Affine, Bitshift, Congruential
from bayesq.quant.codes.bitshift import MULTIPLIERS, STATES, trellis_for
from bayesq.quant.feedback import feedback_factors, feedback_round
from bayesq.quant.grids import AffineGrid, mse_grid, stored_scale, zero_code
from bayesq.quant.rotation import SEED_BYTES, Rotation
from bayesq.quant.tensor import QuantizedTensor

# Standard deviation of the levels in units of a row's root mean square, as in the published code. Feedback increases
# the weights' variance, and wide levels are better for normal weights too.
SPREAD = 1 / 0.9
# With hashed levels, columns of fewer bits get scalar codes.
LEAST_BITS = 24
CODES = {"hash": (Bitshift, STATES), "congruential": (Congruential, tuple(MULTIPLIERS))}


class QTIP:
    """Incoherence processing, trellis codes and feedback.

    Args:
        states: of the trellis, a power of 2 from 256 to 65,536; short columns get fewer, see `code_for`.
        levels: "hash", as published, or "congruential", as BayesQ has them (256, 1,024 or 4,096 states).
        damping: fraction of the mean diagonal added to the input moment.
    """

    statistics: frozenset[Statistic] = frozenset({INPUT_MOMENT})
    rotates = True

    def __init__(self, states: int, levels: str, damping: float) -> None:
        if levels not in CODES:
            raise Refused(f"method.levels={levels}: choose one of {', '.join(CODES)}")
        self.code, allowed = CODES[levels]
        if states not in allowed:
            raise Refused(f"method.states={states}: choose one of {', '.join(map(str, allowed))}")
        if not damping >= 0:
            raise Refused(f"method.damping={damping}: must be 0 or more")
        self.states, self.damping = states, damping

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths; count the seeds."""
        return allocate(layers, 8 * SEED_BYTES * len(layers), self.distortion)

    def distortion(self, layer: LayerProblem, width: int) -> float:
        """Expected squared error of a code of `width` bits in this layer, for weights of unit variance."""
        rows = layer.weight.shape[1]
        code = self.code_for(rows * width)
        if code is None:
            return normal_distortion("uniform", width)
        return bitshift_distortion(width, code, rows, SPREAD * code.unit(width))

    def code_for(self, bits: int) -> Bitshift | None:
        """The code of columns of `bits` bits; None: scalar codes are better.

        A path has to close to a ring, which costs more if a state is long compared to the column. The rules fit what
        was best for normal weights in columns of 16 to 64 rows at 2 to 4 bits.
        """
        if self.code is Congruential:
            return trellis_for(bits, self.states)
        if bits < LEAST_BITS:
            return None
        return Bitshift(min(max(STATES[0], 1 << (6 + bits // 12)), self.states))

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Rotate the layer, round it with feedback, and store the rotation's seed."""
        check_finite(layer)
        rotation = Rotation(int(torch.randint(2 ** (8 * SEED_BYTES), (1,), generator=context.generator)))
        weight = rotation.forward(layer.weight.double())
        moments = rotation.moment(layer.input_statistic("input_moment").double())
        factors = feedback_factors(moments, self.damping, act_order=False)
        layer.count("damping_retries", sum(factor.retries for factor in factors))
        rows = stack_groups(weight)
        code = self.code_for(int(width.reshape(len(weight), -1).sum(1).min()))
        if code is None:
            scale, zero = mse_grid(rows, width)
        else:
            unit, zero = (
                torch.tensor([of(w) for w in width.tolist()], dtype=rows.dtype) for of in (code.unit, code.middle)
            )
            scale = stored_scale(SPREAD * unit * rows.square().mean(1).sqrt())
        codes = []
        parts = (part.chunk(len(weight)) for part in (scale, zero, width))
        for matrix, factor, s, z, w in zip(weight, factors, *parts, strict=True):
            grid = AffineGrid(s[:, None], z[:, None], w) if code is None else BitshiftGrid(s, z, w, code)
            codes.append(feedback_round(matrix, factor, grid)[0])
        return QuantizedTensor(
            codes=torch.cat(codes),
            width=width,
            scale=scale[:, None].to(torch.float16),
            zero=zero_code(zero, width)[:, None],
            groups=len(weight),
            code=code or Affine(),
            rotation=rotation,
        )
