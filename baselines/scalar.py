"""What RTN, GPTQ and its variants, AWQ and WaterSIC share: scalar codes, of fixed width or entropy coded."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from bayesq.contract import Allocate, Context, LayerProblem
from bayesq.entropy import full_width
from bayesq.entropy_scalar import ScalarRounds
from bayesq.errors import Refused
from bayesq.quant.accounting import group_scale_bits


class ScalarMethod:
    """Prepares widths, or with codec=entropy steps.

    Attributes:
        group_size: columns that share a scale and zero; None = one per row.
        rounds: plans the steps.
    """

    entropy = True
    group_size: int | None = None
    rounds: type[ScalarRounds] = ScalarRounds
    _coded: ScalarRounds | None = None  # with codec=entropy

    def column_scale_bits(self, layer: LayerProblem) -> int:
        """Bits of the column scales that a layer may store."""
        return 0

    def planned(self, layer: LayerProblem) -> LayerProblem:
        """The layer with the weights that codec=entropy plans its budget for."""
        return layer

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths, or with codec=entropy the steps, tables and each layer's part of the budget.

        Raises:
            Refused: column groups with codec=entropy.
        """
        scales = sum(self.column_scale_bits(layer) for layer in layers)
        if context.stream is None:
            groups = sum(group_scale_bits(layer.rows, layer.columns, self.group_size) for layer in layers)
            return allocate(layers, scales=scales + groups)
        if self.group_size is not None:
            raise Refused(f"method.group_size={self.group_size}: codec=entropy has one step per row; choose null")
        self._coded = self.rounds(context.stream, [self.planned(layer) for layer in layers], scales)
        return {layer.name: full_width(layer.rows) for layer in layers}
