"""Multi-head latent attention without positional encoding (MLA, NoPE).

A token leaves behind one latent [c | k_r] of R + P numbers, shared by all heads: c is expanded per
head into a key part and a value, k_r is the rest of the key as it is.

    k_h = [W_k,h c | k_r],  v_h = W_v,h c           [D_n + P], [D_v]
    o_h = softmax(scale q_h k_h^T) v_h

Two equal forms. Expanded: build k and v of every head, then ordinary attention. Absorbed: move W_k
into the query and W_v behind the softmax, so that all heads attend to the latents themselves,

    q_h k_h^T = [W_k,h^T q_n | q_r] [c | k_r]^T     o_h = W_v,h (softmax(...) c)

which reads R + P numbers per past token for all heads together. It needs more arithmetic per pair
and none per past token: the right form for few queries, and the one that has a Triton kernel, for
decoding (mla_decode_triton.py), without a gradient.

Many queries after other tokens (a long prompt in pieces), without a gradient, take the expanded
form, one tile of tokens after the other. Each gives an output and the log-sum-exp of its scores,
which merge into those of all tokens:

    lse = log(sum_i exp(lse_i))     o = sum_i exp(lse_i - lse) o_i

Only the queries' own tokens need a causal mask, on a square; tiles of the past are rectangles
without one, and cuDNN has both. For a mask with its diagonal at the lower right, 192 and 128
channels leave torch its memory-efficient kernel alone: 77.7 ms for 8192 queries and 65536 keys of
32 heads, in bf16 on an H200 with torch 2.11. The rectangle takes cuDNN 17.4. With a gradient, keys
and values of all tokens are there anyway: one rectangle, in mla_past.py. Which library attends,
and which shapes it gets, is in attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.attention import (
    attend,
    causal_attention,
    document_groups,
    packed_attention,
    planned_length,
    plans,
)
from kimi_kernels.checks import (
    accumulation_dtype,
    check_float,
    check_like,
    check_number,
    check_shape,
    count_sequences,
    sequence_bounds,
)
from kimi_kernels.dispatch import reference_only, use_triton
from kimi_kernels.latents import QuantizedLatents, check_latents, check_quantized
from kimi_kernels.mla_past import merge
from kimi_kernels.operators import wants_gradient

AT_ONCE = 2**30  # numbers of expanded keys and values, or of a mask
STEP = 128  # tokens that the shortest tile has, where there are to be few shapes


def absorbed_is_cheaper(T: int, R: int, P: int, D_n: int, D_v: int) -> bool:
    """Compare multiplications per past token and head: T queries absorbed against expanded."""
    return R * (D_n + D_v) + T * (D_n + P + D_v) > T * (R + P + R)


def _visible(positions: Tensor, S: int) -> Tensor:
    """[B, T] -> [B, T, S]: which latents each query sees."""
    return torch.arange(S, device=positions.device) <= positions[..., None]


def _keys_and_values(latent, w_kv, R, D_n) -> tuple[Tensor, Tensor]:
    """latent [B, S, R+P], w_kv [H, D_n+D_v, R] -> k [B, H, S, D_n+P], v [B, H, S, D_v]."""
    kv = torch.einsum("bsr,hdr->bshd", latent[..., :R], w_kv)
    k_c, v = (x.transpose(1, 2) for x in kv.split((D_n, kv.shape[3] - D_n), -1))
    k_r = latent[:, None, :, R:].expand(-1, kv.shape[2], -1, -1)
    return torch.cat((k_c, k_r), -1), v


def _pad(x: Tensor, front: int, back: int) -> Tensor:
    """Zeros before and behind the tokens of x [B, T, ...]."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (front, back)) if front or back else x


def _expanded(q, latent, w_kv, R, scale, positions, lengths=None) -> Tensor:
    """q [B, T, H, D_n+P], latent [B, S, R+P], w_kv [H, D_n+D_v, R], positions [B, T].

    Without positions the queries are the last T of S tokens, or all of them, in documents of
    `lengths`. Where keys and values of all heads would be too many numbers at once, some heads go
    after the others; where the mask that positions make would, some queries.
    """
    (B, T, H, D), S = q.shape, latent.shape[1]
    D_n = D - (latent.shape[2] - R)
    D_v = w_kv.shape[1] - D_n
    if positions is None and lengths is None and S == T:
        if plans(q.transpose(1, 2), S, D_v, wants_gradient(q, latent, w_kv)):
            q, latent = (_pad(x, 0, planned_length(T) - T) for x in (q, latent))
    heads = max(1, AT_ONCE // max(1, B * S * (D + w_kv.shape[1])))
    queries = max(1, min(T, AT_ONCE // max(1, B * S)))
    parts = []
    for h in range(0, H, heads):
        k, v = _keys_and_values(latent, w_kv[h : h + heads], R, D_n)
        q_h = q[:, :, h : h + heads].transpose(1, 2)
        if lengths is not None:
            o = packed_attention(q_h, k, v, scale, lengths)
        elif positions is None:
            o = causal_attention(q_h, k, v, scale)
        else:
            masks = (_visible(x, S)[:, None] for x in positions.split(queries, 1))
            some = q_h.split(queries, 2) if queries < T else [q_h]  # `split` copies a gradient
            outputs = [
                F.scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=scale)
                for x, mask in zip(some, masks, strict=True)
            ]
            o = _join(outputs, 2)
        parts.append(o)
    return _join(parts, 1).transpose(1, 2)[:, :T]


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _packed(q, latent, w_kv, R, scale, lengths) -> Tensor:
    """As `_expanded`, of documents in groups of which each is a call of its own."""
    D_v = w_kv.shape[1] - (q.shape[3] - (latent.shape[2] - R))
    groups = document_groups(lengths, q.transpose(1, 2), D_v)
    parts = [(q, latent)]
    if len(groups) > 1:  # without the strides of the row, which would be others in the next one
        rows = (x.squeeze(0).split([sum(group) for group in groups]) for x in (q, latent))
        parts = [(q_i[None], c_i[None]) for q_i, c_i in zip(*rows, strict=True)]
    outputs = [
        _expanded(*part, w_kv, R, scale, None, group if len(group) > 1 else None)
        for part, group in zip(parts, groups, strict=True)
    ]
    return _join(outputs, 1)


def _in_tiles(q, latent, w_kv, R, scale) -> Tensor:
    """As `_expanded` without positions, but no gradient; latent may be `QuantizedLatents`.

    There are keys and values of one tile of tokens at a time, and sums in fp32 of as many queries.
    For cuDNN, which plans for each shape, a tile has 2^n tokens, at least `STEP`, and the queries'
    own, which the rest before them joins, are as many as it has a plan for.
    """
    fp8 = isinstance(latent, QuantizedLatents)
    (B, T, H, D), S = q.shape, (latent.c if fp8 else latent).shape[1]
    P = latent.k_r.shape[2] if fp8 else latent.shape[2] - R
    D_n = D - P
    D_v = w_kv.shape[1] - D_n
    most = AT_ONCE // max(1, B * H * (P + w_kv.shape[1]))
    tile = 2 ** (max(1, most).bit_length() - 1)
    few_shapes = plans(q.transpose(1, 2), S, D_v, trains=False)

    def attend_to(queries: Tensor, a: int, b: int, causal=False) -> tuple[Tensor, Tensor]:
        """Those from a to b, with as many zeros behind them as `queries` is longer if causal."""
        if fp8:
            part = QuantizedLatents(*(x[:, a:b] for x in latent)).dequantize()
        else:
            part = latent[:, a:b]
        if causal:
            part = _pad(part, 0, queries.shape[2] - (b - a))
        k, v = _keys_and_values(part, w_kv, R, D_n)
        v = v.contiguous()  # cuDNN wants it aligned, and what it is a part of can go
        return attend(queries, k, v, causal, scale, few_shapes)

    out = q.new_empty(B, T, H, D_v)
    for t in range(0, T, tile):
        queries, past = q[:, t : t + tile], S - T + t
        n, front = queries.shape[1], 0
        if few_shapes:
            front = past % STEP
            queries = _pad(queries, front, planned_length(front + n) - front - n)
        queries = queries.transpose(1, 2)
        o, lse = attend_to(queries, past - front, past + n, causal=True)
        o = o.to(lse.dtype)
        a, past = 0, past - front
        while a < past:
            b = a + min(tile, past - a)
            if few_shapes:
                b = a + 2 ** ((b - a).bit_length() - 1)
            o_i, lse_i = attend_to(queries, a, b)
            o, lse = merge(o, lse, o_i, lse_i)
            a = b
        out[:, t : t + n] = o[:, :, front : front + n].transpose(1, 2)
    return out


def _absorbed(q, latent, w_kv, R, scale, positions) -> Tensor:
    """As `_expanded`, with positions always."""
    D_n = q.shape[-1] - (latent.shape[-1] - R)
    q_c = torch.einsum("bthd,hdr->bthr", q[..., :D_n], w_kv[:, :D_n])
    s = torch.einsum("bthr,bsr->bhts", torch.cat((q_c, q[..., D_n:]), -1), latent)
    s = s.to(accumulation_dtype(s.dtype)) * scale
    unseen = ~_visible(positions, latent.shape[1])[:, None]
    p = s.masked_fill(unseen, -torch.inf).softmax(-1).masked_fill(unseen, 0).to(latent.dtype)
    o_c = torch.einsum("bhts,bsr->bthr", p, latent[..., :R])
    return torch.einsum("bthr,hdr->bthd", o_c, w_kv[:, D_n:])


def latent_attention(
    q: Tensor,
    latent: Tensor | QuantizedLatents,
    w_kv: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention of T queries to S latents; few queries take the absorbed form.

    Many, the last of more tokens and without a gradient, attend to keys and values of one tile of
    tokens at a time. A gradient, `positions` and `torch.compile` take those of all tokens, of some
    heads at a time if need be. Attention itself is a library's, on a GPU and in 16 bits
    flash-attn-4's where it is installed, or cuDNN's or torch's flash attention (attention.py).

    The absorbed form has a Triton kernel for what lies between the products with W_k and W_v
    (scores, softmax and the sum of latents). It runs where no gradient is wanted, reads each latent
    once for 32 or 64 queries, waits for nothing on the host, and can be captured in a CUDA graph:
    `latent` may then be longer than any sequence is yet, and `positions` change between replays.

    Args:
        q: queries, `[B, T, H, D_n + P]`; bf16, fp16, fp32 or fp64.
        latent: `[B, S, R + P]`: normalised c, then k_r. Same dtype. A slice `cache[:, :S]` is not
            copied. What no query sees counts for nothing, but must be finite. Or latents in fp8 as
            `quantize_latents` makes them: the same as their `dequantize()`, without a gradient; to
            Hopper's kernel a query is 8 bits then, in fp16 as in bf16.
        w_kv: `kv_b_proj.weight`, `[H * (D_n + D_v), R]`, per head D_n key rows, then D_v value
        rows.
        scale: of the scores; the model uses `(D_n + P) ** -0.5`.
        positions: index of the last latent that each query sees, `[B, T]` int64; a query with a
            negative one sees none, and its output is 0. Default: the queries are the last T of S
            tokens.
        cu_seqlens: `[N+1]` int32 or int64, ends of the sequences packed into one row (B = 1, S =
            T); not with `positions`. The host reads it: on a GPU it is waited for, on the CPU not.

    Returns:
        `[B, T, H, D_v]` in `q.dtype`. Differentiable in `q`, `latent` and `w_kv`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or Triton is forced on what
            has no kernel.
    """
    check_latents("latent", latent)
    check_number("scale", scale)
    fp8 = isinstance(latent, QuantizedLatents)
    c = latent.c if fp8 else latent
    if q.ndim != 4 or c.ndim != 3 or (fp8 and latent.k_r.ndim != 3) or w_kv.ndim != 2:
        shapes = [list(x.shape) for x in (q, *(latent if fp8 else (latent,)), w_kv)]
        raise ValueError(
            f"q, latent, w_kv have shapes {shapes}, want [B, T, H, D], [B, S, R+P], [H*(Dn+Dv), R]"
        )
    (B, T, H, D), S, R = q.shape, c.shape[1], w_kv.shape[1]
    check_float("q", q, q)
    if H == 0:
        raise ValueError("q has no heads, want [B, T, H, D] with H > 0")
    if isinstance(latent, QuantizedLatents):
        L = R + latent.k_r.shape[2]
        check_quantized(latent, B, S, R, L - R, q)
    else:
        L = latent.shape[2]
        check_shape("latent", latent, B, S, L)
        check_like("latent", latent, "q", q)
    check_like("w_kv", w_kv, "q", q)
    P, per_head = L - R, w_kv.shape[0] // H
    if P < 0 or D <= P or w_kv.shape[0] % H or per_head <= D - P:
        raise ValueError(
            f"w_kv has shape {list(w_kv.shape)}, which does not fit {H} heads of {D} query dims "
            f"and latents of {L}: want [H*(Dn+Dv), R] with Dn = {D} - ({L} - R) > 0 and Dv > 0"
        )
    if positions is not None:
        check_shape("positions", positions, B, T)
        if positions.dtype != torch.int64 or positions.device != q.device:
            raise ValueError(
                f"positions is {positions.dtype} on {positions.device}, want int64 on {q.device}"
            )
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens cannot be combined with positions")
    elif S < T or (cu_seqlens is not None and S != T):
        raise ValueError(f"latent has {S} tokens, want at least the {T} of q, and {T} when packed")
    count_sequences(cu_seqlens, q, on_host=True)

    w, D_n = w_kv.view(H, per_head, R), D - P
    decodes = positions is not None or (cu_seqlens is None and S > T)
    absorbed = decodes and absorbed_is_cheaper(T, R, P, D_n, per_head - D_n)
    if not absorbed:
        reference_only("the expanded form of latent_attention")
        plain = torch.compiler.is_compiling() or wants_gradient(q, latent, w_kv)
        if decodes and positions is None and not plain:
            return _in_tiles(q, latent, w, R, scale)
    elif wants_gradient(q, latent, w_kv):
        reference_only("the gradient of latent_attention")
    elif use_triton(q):
        from kimi_kernels.mla_decode_triton import latent_decode_triton

        return latent_decode_triton(q, latent, w_kv, scale, positions)
    if isinstance(latent, QuantizedLatents):
        latent = latent.dequantize()

    if cu_seqlens is not None:
        return _packed(q, latent, w, R, scale, [b - a for a, b in sequence_bounds(cu_seqlens, q)])
    if not absorbed:
        return _expanded(q, latent, w, R, scale, positions)
    if positions is None:
        positions = torch.arange(S - T, S, device=q.device).expand(B, T)
    return _absorbed(q, latent, w, R, scale, positions)
