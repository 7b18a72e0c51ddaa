"""Triton forward of the causal convolution, and its operators; causal_conv.py defines it."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.causal_conv_bwd_triton import causal_conv_bwd
from kimi_kernels.operators import dispatch, first_order
from kimi_kernels.sequences import CHUNK, chunk_table, sequence, token_rows

BD = 512  # channels per program: 4 per thread take .134 ms at 1 x 8192 x 12288, 8 take .42 (H200)
GROUP = tl.constexpr(16)  # tokens


@triton.jit(do_not_specialize=["T", "NT"])
def causal_conv_kernel(
    x, y, weight, state, cu_seqlens, offsets, owner,
    T, NT, first,
    s_x: tl.constexpr, D: tl.constexpr, D_i: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, VARLEN: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """y = SiLU(conv(x)) for BT tokens and BD of D_i channels, weight from row `first` on.

    The window of W inputs slides in registers, so every input is read once, 16 bytes per thread.
    """
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
    c = i_d * BD + tl.arange(0, BD)
    m = c < D_i
    # from here on, tokens count from t0
    x, y = x + (begin + t0) * s_x, y + (begin + t0) * D_i
    length -= t0
    w, window = (), ()
    for j in tl.static_range(W):
        w += (tl.load(weight + (first + c) * W + j, mask=m, other=0.0).to(tl.float32),)
    if HAS_STATE:
        state += i_n.to(tl.int64) * (W - 1) * D + first
    for j in tl.static_range(W - 1):
        i = t0 - (W - 1) + j
        b_x = tl.load(x + (j - W + 1) * s_x + c, mask=m & (i >= 0), other=0.0).to(tl.float32)
        if HAS_STATE:
            b_x += tl.load(state + (i + W - 1) * D + c, mask=m & (i < 0), other=0.0).to(tl.float32)
        window += (b_x,)
    for start in tl.static_range(0, BT, GROUP):
        rows = ()  # a load waits for the store before it, so load a group of rows, then store them
        for t in tl.static_range(start, start + GROUP):
            rows += (tl.load(x + t * s_x + c, mask=m & (t < length), other=0.0),)
        for t in tl.static_range(start, start + GROUP):
            b_x = rows[t - start].to(tl.float32)
            acc = b_x * w[W - 1]
            for j in tl.static_range(W - 1):  # fma: every token is rounded alike
                acc = tl.fma(window[j], w[j], acc)
            b_y = (acc * tl.sigmoid(acc)).to(y.dtype.element_ty)
            tl.store(y + t * D_i + c, b_y, mask=m & (t < length))
            window = window[1:] + (b_x,)  # Triton has no unpacking


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
    xs: Sequence[Tensor],
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
        tile = min(BD, triton.next_power_of_2(D_i))
        meta = {"s_x": stride, "D": D, "D_i": D_i, "W": W, "BD": tile}
        meta |= {"VARLEN": cu_seqlens is not None, "HAS_STATE": state is not None}
        tiles = triton.cdiv(D_i, tile)
        if chunks:
            causal_conv_kernel[(chunks, tiles)](
                x, y, weight, state, cu_seqlens, offsets, owner, T, NT, first,
                BT=CHUNK, num_warps=4, **meta,
            )  # fmt: skip
        if output_final_state:
            conv_state_kernel[(N, tiles)](
                x, state, new, cu_seqlens, T, first, num_warps=1, **meta
            )  # fmt: skip
        ys.append(y)
        first += D_i
    return ys, new


def gradients(xs, weight, initial_state, cu_seqlens, dys):
    """`causal_conv_bwd`; the last of `dys` is that of the final state, empty if not asked for."""
    *dys, dfinal = dys
    dfinal = dfinal if dfinal.numel() else None
    return causal_conv_bwd(xs, weight, initial_state, cu_seqlens, dys, dfinal)


@torch.library.custom_op("kimi_kernels::causal_conv", mutates_args=())
def causal_conv_op(
    xs: list[Tensor],
    weight: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """See `causal_conv_fwd`: the outputs, then the state."""
    ys, state = causal_conv_fwd(xs, weight, initial_state, output_final_state, cu_seqlens)
    return [*ys, state]


@causal_conv_op.register_fake
def _(xs, weight, initial_state, output_final_state, cu_seqlens):
    ys = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    N = xs[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, weight.shape[1] - 1, weight.shape[0]) if output_final_state else (0,)
    return [*ys, xs[0].new_empty(shape)]


@torch.library.custom_op("kimi_kernels::causal_conv_backward", mutates_args=())
def causal_conv_backward_op(
    xs: list[Tensor],
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dys: list[Tensor],
) -> list[Tensor]:
    """See `gradients`: dxs, dweight and, if there is an initial state, its gradient."""
    dxs, dw, dstate = gradients(xs, weight, initial_state, cu_seqlens, dys)
    return [*dxs, dw] if dstate is None else [*dxs, dw, dstate]


@causal_conv_backward_op.register_fake
def _(xs, weight, initial_state, cu_seqlens, dys):
    given = [*xs, weight] + ([] if initial_state is None else [initial_state])
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _setup(ctx, inputs, output) -> None:
    xs, weight, initial_state, _, cu_seqlens = inputs
    ctx.save_for_backward(*xs, weight, initial_state, cu_seqlens)


def _backward(ctx, grads):
    *xs, weight, initial_state, cu_seqlens = ctx.saved_tensors
    out = causal_conv_backward_op(xs, weight, initial_state, cu_seqlens, list(grads))
    return out[: len(xs)], out[len(xs)], None if initial_state is None else out[-1], None, None


causal_conv_op.register_autograd(_backward, setup_context=_setup)


def eager(weight, initial_state, output_final_state, cu_seqlens, *xs) -> tuple[Tensor, ...]:
    ys, state = causal_conv_fwd(xs, weight, initial_state, output_final_state, cu_seqlens)
    return *ys, state


def compiled(weight, initial_state, output_final_state, cu_seqlens, *xs) -> list[Tensor]:
    return causal_conv_op(list(xs), weight, initial_state, output_final_state, cu_seqlens)


class CausalConv(torch.autograd.Function):
    """`causal_conv_op` and its gradient, without operators; the inputs come last."""

    forward = staticmethod(eager)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, initial_state, _, cu_seqlens, *xs = inputs
        ctx.save_for_backward(*xs, weight, initial_state, cu_seqlens)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        *xs, weight, initial_state, cu_seqlens = ctx.saved_tensors
        dxs, dw, dstate = gradients(xs, weight, initial_state, cu_seqlens, grads)
        return dw, dstate, None, None, *dxs


causal_conv_triton = dispatch(compiled, CausalConv, eager)
