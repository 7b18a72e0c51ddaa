"""Triton forward of the causal convolution; the definition is in causal_conv.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.sequences import CHUNK, chunk_table, sequence, token_rows

BD = 128  # channels per program: one 256-byte line of 16-bit values per token


@triton.jit(do_not_specialize=["T", "NT"])
def causal_conv_kernel(
    x, y, weight, state, cu_seqlens, offsets, owner,
    T, NT, first,
    s_x: tl.constexpr, D: tl.constexpr, D_i: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, VARLEN: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BD] of y = SiLU(conv(x)) for one input of D_i channels, rows `first`.. of weight."""
    i_c, i_d = tl.program_id(0), tl.program_id(1)
    if VARLEN:
        i_n = tl.load(owner + i_c)
        if i_n < 0:
            return
        begin, length = sequence(cu_seqlens, i_n, T)
        t0 = (i_c - tl.load(offsets + i_n)) * BT
    else:
        i_n = i_c // NT
        begin, t0, length = i_n.to(tl.int64) * T, i_c % NT * BT, T
    t, c = t0 + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_c = c < D_i
    m = (t < length)[:, None] & m_c[None, :]
    x += begin * s_x
    acc = tl.zeros([BT, BD], tl.float32)
    for j in tl.static_range(W):
        i = t - (W - 1) + j
        p = x + i.to(tl.int64)[:, None] * s_x + c[None, :]
        b_x = tl.load(p, mask=m & (i >= 0)[:, None], other=0.0)
        if HAS_STATE:
            p = state + (i_n * (W - 1) + W - 1).to(tl.int64) * D + first
            p += i[:, None] * D + c[None, :]
            b_x += tl.load(p, mask=m & (i < 0)[:, None], other=0.0)
        b_w = tl.load(weight + (first + c) * W + j, mask=m_c, other=0.0).to(tl.float32)
        acc += b_x.to(tl.float32) * b_w[None, :]
    acc = acc * tl.sigmoid(acc)
    p = y + (begin + t)[:, None] * D_i + c[None, :]
    tl.store(p, acc.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def conv_state_kernel(
    x, state_in, state_out, cu_seqlens,
    T, first,
    s_x: tl.constexpr, D: tl.constexpr, D_i: tl.constexpr, W: tl.constexpr,
    BD: tl.constexpr, VARLEN: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of every sequence, from x and, where it is shorter, the state before."""
    i_n, i_d = tl.program_id(0), tl.program_id(1)
    if VARLEN:
        begin, length = sequence(cu_seqlens, i_n, T)
    else:
        begin, length = i_n.to(tl.int64) * T, T
    c = i_d * BD + tl.arange(0, BD)
    m = c < D_i
    at = i_n.to(tl.int64) * (W - 1) * D + first
    for r in tl.static_range(W - 1):
        i = length - (W - 1) + r
        b_x = tl.load(x + (begin + i) * s_x + c, mask=m & (i >= 0), other=0.0)
        if HAS_STATE:
            b_x += tl.load(state_in + at + (i + W - 1) * D + c, mask=m & (i < 0), other=0.0)
        tl.store(state_out + at + r * D + c, b_x, mask=m)


def causal_conv_fwd(
    xs: list[Tensor],
    weight: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs [B, T, D_i] and the state [N, W-1, D], empty if not wanted; arguments are checked."""
    (B, T), (D, W) = xs[0].shape[:2], weight.shape
    N, NT, chunks = B, triton.cdiv(T, CHUNK), B * triton.cdiv(T, CHUNK)
    offsets = owner = None
    if cu_seqlens is not None:
        N = cu_seqlens.numel() - 1
        offsets, owner = chunk_table(cu_seqlens, T)
        chunks = owner.numel()
    weight = weight.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    new = xs[0].new_empty((N, W - 1, D) if output_final_state else 0)
    ys, first = [], 0
    for x in xs:
        x, stride = token_rows(x)
        D_i = x.shape[-1]
        y = torch.empty(B, T, D_i, dtype=x.dtype, device=x.device)
        meta = dict(s_x=stride, D=D, D_i=D_i, W=W, BD=BD, VARLEN=cu_seqlens is not None)
        tiles = triton.cdiv(D_i, BD)
        if chunks:
            causal_conv_kernel[(chunks, tiles)](
                x, y, weight, state, cu_seqlens, offsets, owner, T, NT, first,
                BT=CHUNK, HAS_STATE=state is not None, num_warps=4, **meta,
            )  # fmt: skip
        if output_final_state:
            conv_state_kernel[(N, tiles)](
                x, state, new, cu_seqlens, T, first, HAS_STATE=state is not None, num_warps=1, **meta
            )
        ys.append(y)
        first += D_i
    return ys, new
