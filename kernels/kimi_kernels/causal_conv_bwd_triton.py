"""Triton backward of the causal convolution; the equations are in causal_conv.py."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.sequences import CHUNK, chunk_table, sequence, token_rows
from kimi_kernels.triton_math import sigmoid

# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def load_rows(
    x, dy, begin, t, end, m,
    s_x: tl.constexpr, s_dy: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x and dy of ROWS tokens from t on, zeros from token `end` on."""
    x, dy = x + (begin + t) * s_x, dy + (begin + t) * s_dy
    xs, dys = (), ()
    for i in tl.static_range(ROWS):
        m_i = m & (i < end - t)
        xs += (tl.load(x + i * s_x, mask=m_i, other=0.0),)
        dys += (tl.load(dy + i * s_dy, mask=m_i, other=0.0),)
    return xs, dys


@triton.jit
def slide(
    xs, dys, dx, dstate, dfinal, w, dw, window, das, begin, t, t0, end, length, m,
    D: tl.constexpr, D_i: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, OWN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Slide over ROWS tokens from t on: dx W-1 tokens before each and, if OWN, their dweight.

    The program's tokens are t0 to `end`, and `begin` is the first of the sequence in memory.
    """
    dx += (begin + t - (W - 1)) * D_i
    for i in tl.static_range(ROWS):
        window += (xs[i].to(tl.float32),)
        # fma says what is contracted: the same bits wherever the program starts
        a = window[0] * w[0]
        for j in tl.static_range(1, W):
            a = tl.fma(window[j], w[j], a)
        s = sigmoid(a)
        das += (dys[i].to(tl.float32) * (s * tl.fma(a, 1.0 - s, 1.0)),)
        b_dx = das[0] * w[W - 1]
        for j in tl.static_range(1, W):
            b_dx = tl.fma(das[j], w[W - 1 - j], b_dx)
        if OWN:
            sums = ()
            for j in tl.static_range(W):
                sums += (tl.fma(window[j], das[W - 1], dw[j]),)
            dw = sums
        if HAS_FINAL:
            r = t + i - length
            m_r = m & (r >= 0) & (r < W - 1)
            b_dx += tl.load(dfinal + r * D, mask=m_r, other=0.0).to(tl.float32)
        b_dx = b_dx.to(dx.dtype.element_ty)
        if HAS_STATE:
            tl.store(dstate + (t + i) * D, b_dx, mask=m & (t0 == 0) & (t + i < W - 1))
        m_i = m & (i >= t0 - t + (W - 1)) & (i < end - t + (W - 1))
        tl.store(dx + i * D_i, b_dx, mask=m_i)
        window, das = window[1:], das[1:]
    return dw, window, das


@triton.jit(do_not_specialize=["T", "N", "NT", "chunks", "share"])
def causal_conv_bwd_kernel(
    x, dy, dx, weight, dweight, state, dstate, dfinal, cu_seqlens, offsets, owner,
    T, N, NT, chunks, share, first,
    s_x: tl.constexpr, s_dy: tl.constexpr, D: tl.constexpr, D_i: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    VARLEN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """dx, dstate and a part of dweight from `share` chunks of BT tokens and BD of D_i channels.

    The chunks of one sequence are one run of tokens. Two windows slide in registers, of W inputs
    and of W values da. Token t completes dx of token t - (W-1), so a run ends W-1 tokens late. Past
    the sequence dy is 0 and the gradient of the final state enters instead; what would be dx before
    the sequence is the gradient of the initial state. ROWS tokens are loaded ahead.
    """
    i_p, i_d = tl.program_id(0), tl.program_id(1)
    c = i_d * BD + tl.arange(0, BD)
    m = c < D_i
    x, dy, dx = x + c, dy + c, dx + c
    w, dw = (), ()
    for j in tl.static_range(W):
        w += (tl.load(weight + (first + c) * W + j, mask=m, other=0.0).to(tl.float32),)
        dw += (tl.zeros([BD], tl.float32),)
    i_c = i_p * share
    last = tl.minimum(i_c + share, chunks)
    if VARLEN:
        last = tl.minimum(last, tl.load(offsets + N))
    while i_c < last:
        if VARLEN:
            i_n = tl.load(owner + i_c)
            begin, length = sequence(cu_seqlens, i_n, T)
            before, after = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
        else:
            i_n = i_c // NT
            begin, length = i_n.to(tl.int64) * T, T
            before, after = i_n * NT, (i_n + 1) * NT
        after = tl.minimum(after, last)
        # from here on, tokens count from the first of the sequence
        t0, end = (i_c - before) * BT, tl.minimum((after - before) * BT, length)
        seen = tl.minimum(end + (W - 1), length)
        i_c = after
        p_dstate, p_dfinal, at = None, None, i_n.to(tl.int64) * (W - 1) * D + first + c
        if HAS_STATE:
            p_dstate = dstate + at
        if HAS_FINAL:
            p_dfinal = dfinal + at
        window, das = (), ()
        for j in tl.static_range(W - 1):
            t = t0 - (W - 1) + j
            b_x = tl.load(x + (begin + t) * s_x, mask=m & (t >= 0), other=0.0)
            if HAS_STATE:
                p = state + at + (t + (W - 1)) * D
                b_x += tl.load(p, mask=m & (t < 0), other=0.0)
            window += (b_x.to(tl.float32),)
            das += (tl.zeros([BD], tl.float32),)
        xs, dys = load_rows(x, dy, begin, t0, seen, m, s_x, s_dy, ROWS)
        for t in range(t0, end, ROWS):
            next_xs, next_dys = load_rows(x, dy, begin, t + ROWS, seen, m, s_x, s_dy, ROWS)
            dw, window, das = slide(
                xs, dys, dx, p_dstate, p_dfinal, w, dw, window, das, begin, t, t0, end, length, m,
                D, D_i, W, ROWS, True, HAS_STATE, HAS_FINAL,
            )  # fmt: skip
            xs, dys = next_xs, next_dys
        # ROWS divides BT, so tokens that the loop took past `end` are past the sequence
        t = t0 + tl.cdiv(end - t0, ROWS) * ROWS
        for i in tl.static_range(0, W - 1, ROWS):
            if i > 0:
                t += ROWS
                xs, dys = load_rows(x, dy, begin, t, seen, m, s_x, s_dy, ROWS)
            dw, window, das = slide(
                xs, dys, dx, p_dstate, p_dfinal, w, dw, window, das, begin, t, t0, end, length, m,
                D, D_i, W, min(ROWS, W - 1 - i), False, HAS_STATE, HAS_FINAL,
            )  # fmt: skip
    for j in tl.static_range(W):
        tl.store(dweight + (i_p.to(tl.int64) * W + j) * D + first + c, dw[j], mask=m)


# ---- launcher ----------------------------------------------------------------------------------

TILE_BYTES = 1024  # of one token: 8 per thread, 4 channels in 16 bits; 8 channels do not fit
ROWS = 4  # loaded ahead; 8 do not fit in MAX_REGISTERS
MAX_REGISTERS = 128  # four programs per multiprocessor; no spills up to W = 4
PROGRAMS = 512  # per projection: four for each of the 132 multiprocessors of an H200


def causal_conv_bwd(
    xs: Sequence[Tensor],
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dys: Sequence[Tensor],
    dfinal: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Gradients of xs, weight and initial state, from those of the outputs and the final state."""
    (B, T), (D, W) = xs[0].shape[:2], weight.shape
    N, NT, chunks = B, triton.cdiv(T, CHUNK), B * triton.cdiv(T, CHUNK)
    offsets = owner = state = dstate = None
    if cu_seqlens is not None:
        N = cu_seqlens.numel() - 1
        offsets, owner = chunk_table(cu_seqlens, T)
        chunks = owner.numel()
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    if initial_state is not None:
        state = initial_state.contiguous()
        # no program comes to an empty sequence; its final state is its initial state
        dstate = torch.zeros_like(state) if dfinal is None else dfinal.clone()
    w = weight.contiguous()
    BD = TILE_BYTES // xs[0].element_size()
    tiles = triton.cdiv(max(x.shape[-1] for x in xs), BD)
    share = max(1, triton.cdiv(chunks * tiles, PROGRAMS))  # chunks, the same for all programs
    parts = triton.cdiv(chunks, share)
    dweight = torch.empty(parts, W, D, dtype=torch.float32, device=w.device)
    dxs, first = [], 0
    for x, dy in zip(xs, dys, strict=True):
        (x, s_x), (dy, s_dy) = token_rows(x), token_rows(dy)
        D_i = x.shape[-1]
        dx = torch.empty(B, T, D_i, dtype=x.dtype, device=x.device)
        tile = min(BD, triton.next_power_of_2(D_i))
        if parts:
            causal_conv_bwd_kernel[(parts, triton.cdiv(D_i, tile))](
                x, dy, dx, w, dweight, state, dstate, dfinal, cu_seqlens, offsets, owner,
                T, N, NT, chunks, share, first,
                s_x=s_x, s_dy=s_dy, D=D, D_i=D_i, W=W, BT=CHUNK, BD=tile, ROWS=ROWS,
                VARLEN=cu_seqlens is not None, HAS_STATE=state is not None,
                HAS_FINAL=dfinal is not None,
                num_warps=4, maxnreg=MAX_REGISTERS if W <= 4 else None,
            )  # fmt: skip
        dxs.append(dx)
        first += D_i
    return dxs, dweight.sum(0).T.to(weight.dtype).contiguous(), dstate
