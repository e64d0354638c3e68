"""Multi-head attention written out, so that the products with its weights can be watched one by one.

It computes what `torch.nn.functional.multi_head_attention_forward` does, and takes the same arguments. The query, key
and value parts of in_proj_weight are three separate matrices here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    **more: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Output [L, b, e] and attention weights [b, L, S] (or [b, h, L, S]); without a batch, the same without b.

    None if an option is used that this function does not support: bias_k, bias_v, add_zero_attn, weights of separate
    projections, static keys, or training.

    Args:
        query, key, value: [L, b, e], [S, b, e], [S, b, e], or without the b dimension.
    """
    unusual = bias_k is not None or bias_v is not None or add_zero_attn or use_separate_proj_weight or training
    static = more.get("static_k") is not None or more.get("static_v") is not None
    if unusual or static or in_proj_weight is None:
        return None
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    (length, b, e), source = query.shape, key.shape[0]
    weights = [in_proj_weight[k * e : (k + 1) * e] for k in range(3)]
    biases = [None] * 3 if in_proj_bias is None else [in_proj_bias[k * e : (k + 1) * e] for k in range(3)]
    q, k, v = (
        F.linear(x, w, bias).reshape(len(x), b, num_heads, -1).permute(1, 2, 0, 3)
        for x, w, bias in zip((query, key, value), weights, biases, strict=True)
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(e // num_heads)  # [b, h, L, S]
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            shaped = mask.reshape(b, num_heads, length, source) if mask.dim() == 3 else mask
            scores = scores.masked_fill(shaped, -math.inf) if mask.dtype == torch.bool else scores + shaped
    shares = scores.softmax(-1)
    if not need_weights:  # torch then returns zeros, not NaN, for a query whose keys are all masked
        shares = shares.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0)
    out = F.linear((shares @ v).permute(2, 0, 1, 3).reshape(length, b, e), out_proj_weight, out_proj_bias)
    averaged = (shares.mean(1) if more.get("average_attn_weights", True) else shares) if need_weights else None
    if batched:
        return out, averaged
    return out.squeeze(1), None if averaged is None else averaged.squeeze(0)
