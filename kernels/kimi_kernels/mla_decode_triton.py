"""Triton kernels of latent attention for a few new tokens: the absorbed form of mla.py.

    q_c = W_k,h^T q_n        a product per head: cuBLAS, or mla_heads_triton.py for a few rows
    decode                   softmax(scale [q_c | q_r] [c | k_r]^T) c over a run of latents: scores,
                             softmax and output in one pass, which reads a latent once for all heads
    combine                  merges the runs of a sequence
    o_h = W_v,h o_c          as q_c

Tiles of BN latents, those of all sequences one after the other, are dealt to P programs in runs of
equal length. The lengths are read on the GPU: no sequence, short or long, leaves a multiprocessor
idle, the host waits for nothing, and a CUDA graph stays valid when they change. A run ends with its
program or with its sequence. What program p finds in sequence b goes to slot p + b, which no two
runs share: from a run to the next, p or b grows. A sequence with one run is finished by `decode`.
The order of every sum is fixed by the lengths, so two runs are bit-equal.

Scores are [latents, queries] and the output [channels, queries]: of latents and channels there are
enough for the rows of a product, 64 in a `wgmma`, and a tile of latents is the left operand of both
products. Sums are in fp32, weights are 2^(s - x) in the dtype of q. x is 7 below the maximum when
it is set, and set again when the maximum is more than 15 above it: sums are seldom rescaled, and in
fp16 a weight is lost only 2^31 below the largest. Hopper has a `decode` of its own for the usual
latents, in mla_decode_gluon.py and mla_fp8_gluon.py; the one here takes all, from pointers.

The scale a of a latent in fp8 (latents.py) is taken out of both products: the first is multiplied
by it, and in the second it is a part of the weight, 2^(s + log2 a - x), whose maximum x follows.
The sum of weights has it divided by a.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels import latents
from kimi_kernels.dispatch import device_limits
from kimi_kernels.latents import QuantizedLatents
from kimi_kernels.latents_triton import from_e4m3
from kimi_kernels.linears import MOST_ROWS
from kimi_kernels.mla_heads_triton import absorb, expand
from kimi_kernels.overlap import overlap, prefer_shared, wait_for_inputs
from kimi_kernels.triton_math import RCP_LN2, ex2, lg2

LEAST = tl.constexpr(latents.LEAST)
LOW = tl.constexpr(-1e38)  # maximum of no scores; finite, so that no difference is nan
SEQUENCES = 1024  # whose lengths a program looks at together

# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def count_visible(positions, i_b, m_b, i_m, T, S, H: tl.constexpr, BM: tl.constexpr):
    """Latents of sequence(s) i_b that block i_m of their queries sees, 0..S; 0 where not m_b."""
    n = i_b * 0
    for t in range(i_m * BM // H, tl.minimum((i_m * BM + BM - 1) // H, T - 1) + 1):
        if positions is None:
            seen = S - T + t + 1
        else:
            seen = tl.load(positions + i_b.to(tl.int64) * T + t, mask=m_b, other=-1) + 1
            seen = tl.maximum(tl.minimum(seen, S), 0).to(tl.int32)
        n = tl.maximum(n, seen)
    return tl.where(m_b, n, 0)


@triton.jit
def wait_for_new_latents(positions, i_b, end, T, S, OVERLAP: tl.constexpr):
    """Before latents below `end` of sequence i_b are read: wait, if new tokens are among them.

    Those are at its positions, and may still be on their way; older ones are from before.
    """
    n = S
    if positions is None:
        n = S - T
    else:
        for t in range(T):
            at = tl.load(positions + i_b.to(tl.int64) * T + t)
            n = tl.where(at < 0, n, tl.minimum(n, at)).to(tl.int32)
    if end > n:
        wait_for_inputs(OVERLAP)


@triton.jit
def find_run(
    positions, o_s, i_p, i_m, B, T, S, P, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Of program i_p: first and last+1 tile, their sequence, its first tile; tiles per program.

    o_s: 0, 1, .., the sequences looked at together, in any layout: Gluon calls this too.
    """
    BB: tl.constexpr = o_s.shape[0]
    tiles = 0
    for b in range(0, B, BB):
        o_b = b + o_s
        n = count_visible(positions, o_b, o_b < B, i_m, T, S, H, BM)
        tiles += tl.sum((n + BN - 1) // BN, 0)
    share = (tiles + P - 1) // P
    first = i_p * share
    i_b, start, end = 0, 0, 0
    for b in range(0, B, BB):
        o_b = b + o_s
        n = count_visible(positions, o_b, o_b < B, i_m, T, S, H, BM)
        n = (n + BN - 1) // BN
        m = (end + tl.cumsum(n, 0) <= first) & (o_b < B)  # they end before it
        i_b += tl.sum(m.to(tl.int32), 0)
        start += tl.sum(tl.where(m, n, 0), 0)
        end += tl.sum(n, 0)
    return first, tl.minimum(first + share, tiles), i_b, start, share


@triton.jit
def load_scales(p, m):
    """Of latents in fp8; of those that are nothing at all it may be 0, and is made small here."""
    x = tl.load(p, mask=m, other=1.0)
    return tl.where(x == 0, LEAST, x)


@triton.jit(do_not_specialize=["B", "T", "S", "P", "rows_c", "rows_r", "rows_f"])
def latent_decode_kernel(
    q_c, q, c, k_r, factors, positions, o, part, weight, runs,
    B, T, S, P, scale, rows_c, rows_r, rows_f,
    H: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    s_c: tl.constexpr, s_r: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BB: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Block i_m, BM of the T H queries of each sequence, on run i_p of the latents it sees.

    q_c, o [H, B, T, R]; q [B, T, H, D], k_r's part last; c: rows_c rows of s_c per sequence, each
    with k_r behind it. With `factors`, the scales, rows_f per sequence, c has the bytes of e4m3
    and k_r is apart, likewise.
    Of run p + b: part [P+B-1, T, H, R], sum of 2^(s - x) c; weight [P+B-1, T, H, 2], x and sum of
    2^(s - x). runs [B, blocks, 2]: first slot and number of a sequence.
    """
    wait_for_inputs(OVERLAP)
    blocks = tl.cdiv(T * H, BM)
    i_m, i_p = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    lo, hi, i_b, start, share = find_run(
        positions, tl.arange(0, BB), i_p, i_m, B, T, S, P, H, BM, BN
    )
    o_n, o_r, o_l = tl.arange(0, BN), tl.arange(0, BR), tl.arange(0, BL)
    o_m = i_m * BM + tl.arange(0, BM)
    i_h, i_t = o_m % H, o_m // H
    m_m, m_r, m_l = o_m < T * H, o_r < R, o_l < L - R
    while lo < hi:  # a run in sequence i_b, whose first tile is `start`
        n = count_visible(positions, i_b, i_b < B, i_m, T, S, H, BM)
        end = start + (n + BN - 1) // BN
        stop = tl.minimum(end, hi)
        p_c = c + (i_b.to(tl.int64) * rows_c + (lo - start) * BN) * s_c
        if factors is not None:
            p_r = k_r + (i_b.to(tl.int64) * rows_r + (lo - start) * BN) * s_r
        token = i_b.to(tl.int64) * T + i_t
        if positions is None:
            last = S - T + i_t
        else:
            last = tl.load(positions + token, mask=m_m, other=-1)
            last = tl.maximum(tl.minimum(last, S - 1), -1).to(tl.int32)
        last = tl.where(m_m, last, -1)
        p_q = (i_h.to(tl.int64) * B * T + token) * R  # in q_c and o
        b_q = tl.load(q_c + p_q[:, None] + o_r, mask=m_m[:, None] & m_r, other=0.0)  # [BM, BR]
        if L > R:
            p_qr = q + (token * H + i_h) * D + (D - (L - R))
            b_qr = tl.load(p_qr[:, None] + o_l, mask=m_m[:, None] & m_l, other=0.0)  # [BM, BL]
        b_o = tl.zeros([BR, BM], tl.float32)
        b_m, b_w = tl.full([BM], LOW, tl.float32), tl.zeros([BN, BM], tl.float32)
        for i in range(lo - start, stop - start):
            o_i = i * BN + o_n
            m_i = o_i[:, None] < n
            b_c = tl.load(p_c + (o_n * s_c)[:, None] + o_r, mask=m_i & m_r, other=0)  # [BN, BR]
            if factors is not None:
                p_f = factors + i_b.to(tl.int64) * rows_f + o_i
                b_f, b_c = load_scales(p_f, o_i < n), from_e4m3(b_c, b_q.dtype)
            b_s = tl.dot(b_c, tl.trans(b_q), input_precision="ieee")  # [BN, BM]
            if factors is not None:
                b_s *= b_f[:, None]
            if L > R:
                if factors is None:
                    p_l = p_c + (o_n * s_c)[:, None] + (R + o_l)
                else:
                    p_l = p_r + (o_n * s_r)[:, None] + o_l
                b_r = tl.load(p_l, mask=m_i & m_l, other=0.0)  # [BN, BL]
                b_s = tl.dot(b_r, tl.trans(b_qr), b_s, input_precision="ieee")
            b_s *= scale * RCP_LN2
            if factors is not None:
                b_s += lg2(b_f)[:, None]
            b_s = tl.where(o_i[:, None] <= last[None, :], b_s, -float("inf"))
            b_x = tl.max(b_s, 0)
            b_x = tl.where(b_x > b_m + 15, b_x - 7, b_m)
            b_p, b_d = ex2(b_s - b_x[None, :]), ex2(b_m - b_x)
            b_z = b_p if factors is None else b_p * (1 / b_f)[:, None]
            b_w = b_w * b_d[None, :] + b_z  # summed over the latents at the end
            b_p = b_p.to(b_c.dtype)
            b_o = tl.dot(tl.trans(b_c), b_p, b_o * b_d[None, :], input_precision="ieee")
            b_m, p_c = b_x, p_c + BN * s_c
            if factors is not None:
                p_r += BN * s_r
        b_z = tl.sum(b_w, 0)
        m_o = m_m[None, :] & m_r[:, None]
        if (lo == start) & (stop == end):
            b_o *= (1 / tl.where(b_z > 0, b_z, 1.0))[None, :]
            tl.store(o + p_q[None, :] + o_r[:, None], b_o.to(o.dtype.element_ty), mask=m_o)
        else:
            slot = (i_p + i_b).to(tl.int64) * T * H + o_m
            tl.store(part + slot[None, :] * R + o_r[:, None], b_o, mask=m_o)
            tl.store(weight + slot * 2, b_m, mask=m_m)
            tl.store(weight + slot * 2 + 1, b_z, mask=m_m)
        if lo == start:
            p_runs = runs + (i_b.to(tl.int64) * blocks + i_m) * 2
            tl.store(p_runs, i_p + i_b)
            tl.store(p_runs + 1, (end - 1) // share - i_p + 1)
        i_b, start, lo = i_b + 1, end, stop


@triton.jit
def load_runs(part, weight, first, number, stride, o_s, o_r, m_r, R: tl.constexpr):
    """Maximum and sum of runs o_s [BS], and their channels o_r [BS, BR]; `stride` queries apart."""
    m_s = o_s < number
    slot = (first + o_s).to(tl.int64) * stride
    b_m = tl.load(weight + slot * 2, mask=m_s, other=LOW)
    b_w = tl.load(weight + slot * 2 + 1, mask=m_s, other=0.0)
    b_p = tl.load(part + slot[:, None] * R + o_r, mask=m_s[:, None] & m_r, other=0.0)
    return b_m, b_w, b_p


@triton.jit(do_not_specialize=["B", "T", "S"])
def latent_combine_kernel(
    part, weight, runs, positions, o,
    B, T, S,
    H: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BR channels of one query: the weighted mean of its runs; zeros if its block sees nothing.

    BS and BS / 8 runs together: those of 132 programs are a few more than a power of two.
    """
    i_b, i_q = tl.program_id(0) // (T * H), tl.program_id(0) % (T * H)
    blocks, i_m = tl.cdiv(T * H, BM), i_q // BM
    MORE: tl.constexpr = BS // 8
    o_s, o_more = tl.arange(0, BS), BS + tl.arange(0, MORE)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_r = o_r < R
    n = count_visible(positions, i_b, i_b < B, i_m, T, S, H, BM)
    wait_for_inputs(OVERLAP, EARLY=True)
    p_runs = runs + (i_b.to(tl.int64) * blocks + i_m) * 2
    first, number = tl.load(p_runs), tl.where(n > 0, tl.load(p_runs + 1), 0)
    if number != 1:
        part += i_q.to(tl.int64) * R
        weight += i_q * 2
        b_o, z = tl.zeros([BR], tl.float32), 0.0
        b_x = tl.full([], LOW, tl.float32)
        for s in range(0, number, BS + MORE):
            m_0, w_0, p_0 = load_runs(part, weight, first, number, T * H, s + o_s, o_r, m_r, R)
            m_1, w_1, p_1 = load_runs(part, weight, first, number, T * H, s + o_more, o_r, m_r, R)
            top = tl.maximum(b_x, tl.maximum(tl.max(m_0, 0), tl.max(m_1, 0)))
            d_0, d_1, moved = ex2(m_0 - top), ex2(m_1 - top), ex2(b_x - top)
            z = z * moved + tl.sum(d_0 * w_0, 0) + tl.sum(d_1 * w_1, 0)
            b_o = b_o * moved + tl.sum(d_0[:, None] * p_0, 0) + tl.sum(d_1[:, None] * p_1, 0)
            b_x = top
        b_o = b_o / tl.where(z > 0, z, 1.0)
        p_o = o + (((i_q % H).to(tl.int64) * B + i_b) * T + i_q // H) * R
        tl.store(p_o + o_r, b_o.to(o.dtype.element_ty), mask=m_r)


# ---- launchers ---------------------------------------------------------------------------------


@functools.cache
def pick_tiles(queries: int, R: int, P: int, itemsize: int, shared: int) -> dict[str, int]:
    """Tiles for so many queries per sequence, of which a stage less than `num_stages` is stored.

    Not measured, but compiled for sm_80, 90, 100 and 120: at R = 512, P = 64 they take up to 80
    bytes of stack per thread, 64 latents or four warps 500 to 2000; fp32 products on tensor cores
    (tf32x3) 10000, so those are exact.

    Raises:
        ValueError: not even the smallest tiles fit into `shared` bytes.
    """
    BR, BL = (max(16, triton.next_power_of_2(x)) for x in (R, P))
    BM = 32 if itemsize == 2 and queries > 16 and BR <= 512 else 16
    for BN in (32, 16) if itemsize == 2 else (16,):
        for stages in (3, 2):
            stored = itemsize * (BR + BL) * (BM + (stages - 1) * BN)
            if stored + 16 * BR + 2048 <= shared:  # and what threads exchange
                size = {"BM": BM, "BN": BN, "BR": BR, "BL": BL}
                return size | {"num_stages": stages, "num_warps": 8}
    raise ValueError(f"latent has {R} + {P} channels, too many for {shared} bytes of shared memory")


@functools.cache
def count_programs(blocks: int, tiles: int, processors: int) -> int:
    """Runs P for each of `blocks` blocks, at most `tiles`: the fewest that finish soonest."""
    most = min(tiles, processors // blocks + 3)
    return min(range(1, most + 1), key=lambda P: triton.cdiv(P * blocks, processors) / P)


class Rows(NamedTuple):
    """A part of the latents in memory: `rows` rows of `stride` elements per sequence."""

    x: Tensor  # [B, S, channels]
    stride: int
    rows: int


def cache_rows(x: Tensor) -> Rows:
    """Of x [B, S, L], with unit stride in L. A slice of a longer cache stays where it is.

    Other layouts are copied.
    """
    B, S, L = x.shape
    s_b, s_t, s_l = x.stride()
    if (s_l != 1 and L > 1) or s_t < L or (B > 1 and s_b % s_t):
        x, s_b, s_t = x.clone(memory_format=torch.contiguous_format), S * L, L
    return Rows(x, s_t, s_b // s_t if B > 1 else S)


def latent_rows(latent: Tensor | QuantizedLatents, R: int) -> tuple[Rows, Rows, Tensor | None]:
    """c, k_r, and of latents in fp8 their scales, with unit stride within a sequence."""
    if isinstance(latent, QuantizedLatents):
        (c, k_r), scale = (cache_rows(x) for x in latent[:2]), latent.scale
        scale = scale if scale.stride(1) == 1 else scale.contiguous()
        return c._replace(x=c.x.view(torch.uint8)), k_r, scale
    whole = cache_rows(latent)
    return whole._replace(x=whole.x[..., :R]), whole._replace(x=whole.x[..., R:]), None


def latent_decode_fwd(
    q: Tensor,
    latent: Tensor | QuantizedLatents,
    w_kv: Tensor,
    scale: float,
    positions: Tensor | None,
) -> Tensor:
    """Arguments of `latent_attention` -> o [B, T, H, D_v]. A query that sees nothing gets zeros."""
    from kimi_kernels import mla_decode_gluon, mla_fp8_gluon  # not above: they import from here

    (B, T, H, D), (_, R) = q.shape, w_kv.shape
    c, k_r, factors = latent_rows(latent, R)
    (_, S, P_r), w = k_r.x.shape, w_kv.view(H, -1, R)
    D_n = D - P_r
    o = q.new_empty(B * T, H, w.shape[1] - D_n)
    if o.numel() == 0 or S == 0:
        return o.zero_().unflatten(0, (B, T))
    q = q.contiguous()
    few = B * T <= MOST_ROWS and w.stride(1) == R
    if few:
        q_c = absorb(q.flatten(0, 1), w[:, :D_n])
    else:
        q_c = torch.bmm(q[..., :D_n].flatten(0, 1).transpose(0, 1), w[:, :D_n])  # [H, B T, R]
    positions = None if positions is None else positions.contiguous()
    processors, shared = device_limits(q.device)
    form = mla_decode_gluon if factors is None else mla_fp8_gluon
    gluon = form.takes(c, k_r)
    if gluon:
        size, resident = form.pick_tiles(T * H, R, P_r)
        processors *= resident
    else:
        size = pick_tiles(T * H, R, P_r, q.element_size(), shared)
    BM, BN = size["BM"], size["BN"]
    blocks = triton.cdiv(T * H, BM)
    P = count_programs(blocks, min(B * triton.cdiv(S, BN), processors), processors)

    o_c = torch.empty_like(q_c)
    part = torch.empty(P + B - 1, T, H, R, dtype=torch.float32, device=q.device)
    weight = torch.empty(P + B - 1, T, H, 2, dtype=torch.float32, device=q.device)
    runs = torch.empty(B, blocks, 2, dtype=torch.int32, device=q.device)
    args = (positions, o_c, part, weight, runs, B, T, S, P, float(scale))
    BB = min(SEQUENCES, max(32, triton.next_power_of_2(B)))  # at least 32: one binary for few
    constants: dict[str, Any] = size | {"H": H, "R": R, "L": R + P_r, "D": D, "BB": BB}
    constants |= overlap(q.device)
    if gluon:
        form.launch((blocks * P,), q_c, q, c, k_r, factors, args, constants)
    else:
        latent_decode_kernel[(blocks * P,)](
            q_c, q, c.x, k_r.x, factors, *args,
            c.rows, k_r.rows, 0 if factors is None else factors.stride(0),
            s_c=c.stride, s_r=k_r.stride, **constants,
        )  # fmt: skip
    # all runs of a sequence are best merged in one step: 132 of one of 131,072 tokens
    BS = 128 if P > 32 * B else 32 if P > 8 * B else 8
    BC = min(4096 // BS, triton.next_power_of_2(R))
    kernel = latent_combine_kernel[(B * T * H, triton.cdiv(R, BC))](
        part, weight, runs, positions, o_c, B, T, S,
        H=H, R=R, BM=BM, BS=BS, BR=BC, num_warps=4, **overlap(q.device, always=True),
    )  # fmt: skip
    prefer_shared(kernel)
    if few:
        expand(o_c, w[:, D_n:], o)
    else:
        torch.bmm(o_c, w[:, D_n:].mT, out=o.transpose(0, 1))
    return o.unflatten(0, (B, T))


# ---- operators ---------------------------------------------------------------------------------


@torch.library.custom_op("kimi_kernels::latent_decode", mutates_args=())
def latent_decode_op(
    q: Tensor,
    latent: Tensor,
    w_kv: Tensor,
    scale: float,
    positions: Tensor | None,
    k_r: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """See `latent_decode_fwd`; without a gradient. With k_r and factors `latent` is c."""
    parts = latent if k_r is None or factors is None else QuantizedLatents(latent, k_r, factors)
    return latent_decode_fwd(q, parts, w_kv, scale, positions)


@latent_decode_op.register_fake
def _(q, latent, w_kv, scale, positions, k_r=None, factors=None):
    P_r = latent.shape[2] - w_kv.shape[1] if k_r is None else k_r.shape[2]
    return q.new_empty(*q.shape[:3], w_kv.shape[0] // q.shape[2] - (q.shape[3] - P_r))


def latent_decode_triton(
    q: Tensor,
    latent: Tensor | QuantizedLatents,
    w_kv: Tensor,
    scale: float,
    positions: Tensor | None,
) -> Tensor:
    """`latent_decode_op` for a compiler, otherwise `latent_decode_fwd`."""
    if not torch.compiler.is_compiling():
        return latent_decode_fwd(q, latent, w_kv, scale, positions)
    if isinstance(latent, QuantizedLatents):
        return latent_decode_op(q, latent.c, w_kv, scale, positions, latent.k_r, latent.scale)
    return latent_decode_op(q, latent, w_kv, scale, positions)
