"""Split a padded batch into examples, for networks that must not see padding."""

from collections.abc import Mapping

from torch import Tensor

from bayesq.quant.layers import MASK


def one_by_one(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each example as a separate batch, without the positions of its padding.

    Args:
        inputs: module arguments [n, ...]; sequences [n, length, ...] are padded where inputs["attention_mask"]
            [n, length] is 0.
    """
    mask = inputs.get(MASK)
    count = len(next(iter(inputs.values())))
    examples = [{name: x[k : k + 1] for name, x in inputs.items()} for k in range(count)]
    if mask is None or mask.dim() != 2:
        return examples
    return [
        {name: x[:, mask[k] != 0] if x.shape[1:2] == mask.shape[1:] else x for name, x in example.items()}
        for k, example in enumerate(examples)
    ]
