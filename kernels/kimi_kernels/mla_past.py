"""Attention of queries to tokens before them and to their own, by cuDNN, with a gradient.

cuDNN has a causal square and a rectangle without a mask, and no 192 and 128 channels for a mask
with its diagonal at the lower right. So the queries attend to their own tokens by the one and to
those before by the other, and the two are merged (mla.py). The weights of all tokens are p = exp(s
- lse), and a gradient needs besides them do^T o alone. Both are of the whole: with the merged o and
lse for its own, cuDNN's gradient of either part is the part of the whole's that goes through it.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_kernels.operators import first_order

aten = torch.ops.aten


def cudnn_attention(q, k, v, causal: bool, scale: float) -> tuple[Tensor, Tensor, list]:
    """-> o [B, H, T, D_v], lse [B, H, T, 1] in fp32, and what cuDNN wants back for the gradient."""
    o, lse, *rest = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
    return o, lse, [seed, offset, None, cum_q, cum_k, max_q, max_k]


def cudnn_gradient(do, q, k, v, o, lse, state, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """-> dq, dk, dv"""
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse, *state, 0.0, causal, scale=scale
    )


def merge(o: Tensor, lse: Tensor, o_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of tokens -> to both; o, in the dtype of lse, changes in place."""
    o.lerp_(o_2.to(o.dtype), torch.sigmoid(lse_2 - lse))  # exp(lse_2 - the lse of both)
    return o, torch.logaddexp(lse, lse_2)


class _AttendAfterOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float):
        n = k.shape[2] - q.shape[2]
        o, lse, own = cudnn_attention(q, k[:, :, n:], v[:, :, n:], True, scale)
        o_2, lse_2, past = cudnn_attention(q, k[:, :, :n], v[:, :, :n], False, scale)
        o, lse = merge(o.to(lse.dtype), lse, o_2, lse_2)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.own, ctx.past, ctx.scale = own, past, scale
        return o

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        n = k.shape[2] - q.shape[2]
        parts = (slice(n), False, ctx.past), (slice(n, None), True, ctx.own)
        dqs, dks, dvs = zip(
            *(
                cudnn_gradient(
                    grads[0], q, k[:, :, part], v[:, :, part], o, lse, state, causal, ctx.scale
                )
                for part, causal, state in parts
            ),
            strict=True,
        )
        return dqs[0] + dqs[1], torch.cat(dks, 2), torch.cat(dvs, 2), None


def attend_after_others(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, D_v] -> [B, H, T, D_v] in fp16 or bf16; T < S.

    The queries are the last T of S tokens, and cuDNN takes them. Differentiable once.
    """
    return _AttendAfterOthers.apply(q, k, v, scale)
