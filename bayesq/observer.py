"""What can be watched while a network is quantized. The pipeline calls an `Observer` and never reads it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesq.contract import LayerProblem
    from bayesq.quant.tensor import QuantizedTensor


class Observer:
    """Called after each step; does nothing. A subclass can show or log the steps."""

    def batch_seen(self, batch: int, batches: int, examples: int) -> None:
        """A pass over the calibration examples has used one more batch.

        Args:
            batch: its number in the pass, from 1.
            batches: of the pass.
            examples: in this batch.
        """

    def layer_rounded(self, problem: "LayerProblem", tensor: "QuantizedTensor", seconds: float) -> None:
        """A layer is rounded; `seconds` is its time."""

    def divergence_measured(self, step: int, part: str, kl: float) -> None:
        """A distillation has evaluated the student.

        Args:
            step: the optimizer's step, from 1; 0 = before training.
            part: "training" or "heldout", the examples.
            kl: mean KL(teacher || student) of them, in nats.
        """
