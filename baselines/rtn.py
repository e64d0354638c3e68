"""RTN: round each weight to the nearest value of a per-row affine grid. Uses no calibration data."""

from torch import Tensor

from baselines.scalar import ScalarMethod
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Context, LayerProblem, stack_groups
from bayesq.entropy_scalar import nearest_codes
from bayesq.errors import Refused
from bayesq.nearest import round_to_nearest
from bayesq.quant.grids import CLIP_RULES, check_flag, check_group_size
from bayesq.quant.tensor import QuantizedTensor


class RTN(ScalarMethod):
    """Round to nearest.

    Args:
        clip: "minmax" spans each row's range, "mse" shrinks it to the least rounding error.
        group_size: columns that share a grid; None = one grid per row.
        symmetric: ranges are symmetric, and zero is the code 2**(width - 1).
    """

    statistics: frozenset[Statistic] = frozenset()

    def __init__(self, clip: str, group_size: int | None = None, symmetric: bool = False) -> None:
        if clip not in CLIP_RULES:
            raise Refused(f"method.clip={clip}: choose from {', '.join(CLIP_RULES)}")
        self.group_size, self.symmetric = check_group_size(group_size), check_flag("symmetric", symmetric)
        self.clip = clip

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Round every weight to the nearest level of its row's grid."""
        if self._coded is not None:
            weight = stack_groups(layer.weight).double()
            return self._coded.fit(layer, lambda step: nearest_codes(weight, step))
        return round_to_nearest(layer, width, self.clip, self.group_size, self.symmetric)
