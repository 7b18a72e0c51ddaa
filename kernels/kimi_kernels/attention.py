"""Causal attention among the tokens of a prompt, by the fastest library that is there.

    flash-attn-4   where it is installed, in 16 bits at the released widths on Hopper: a document, a
                   row of them, and with a gradient one after other tokens are a call
    cuDNN          many tokens, or any with a gradient: a document by itself; after other tokens in
                   two calls (mla_past.py), or without a gradient in tiles (mla.py)
    torch's flash  few tokens without a gradient, and rows of short documents
    SDPA           what these do not take: its memory-efficient kernel, or plain arithmetic

cuDNN plans for each shape and set of strides, once per process: on an H100 50 to 100 ms, with a
gradient 130 to 170, where attention to 8192 tokens takes 1.2 and 5.2. So it is given few lengths: a
document goes to it with zeros behind its tokens, which no token sees (in mla_past.py it is not).
torch's FlashAttention 2 is half as fast and plans nothing.

`torch.backends.cuda.enable_flash_sdp(False)`, or `sdpa_kernel` without flash attention, turns off
flash-attn-4 as it does torch's.
"""

import functools
import importlib
import itertools
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
    flash_sdp_enabled,
)

from kimi_kernels.checks import accumulation_dtype
from kimi_kernels.dispatch import capability, use_triton
from kimi_kernels.mla_past import attend_after_others, cudnn_attention
from kimi_kernels.operators import first_order, wants_gradient

FLASH_WIDTHS = 192, 128  # at others 4.0.0b36 fails, or has wrong gradients of q (72 and 64, say)
WORTH_A_PLAN = 4096  # tokens from which cuDNN is worth its plan
PAIRS = 2**27  # with keys before the queries: some 6 ms longer by torch's flash, in each layer


@functools.cache
def flash_attn() -> ModuleType | None:
    """flash-attn-4; None without it, or with a warning where it cannot be imported."""
    try:
        return importlib.import_module("flash_attn.cute")
    except Exception as error:
        if getattr(error, "name", None) not in ("flash_attn", "flash_attn.cute"):
            warnings.warn(
                f"flash-attn-4 cannot be imported, torch attends in its place: {error}",
                stacklevel=2,
            )
    return None


def _is_eager(q: Tensor) -> bool:
    """Whether a library for GPUs may be chosen by what the tensors are."""
    return q.is_cuda and not torch.compiler.is_compiling()


def _takes_flash(q: Tensor, D_v: int) -> bool:
    return (
        _is_eager(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and (q.shape[3], D_v) == FLASH_WIDTHS
        and capability(q.device)[0] == 9
        and flash_sdp_enabled()
        and use_triton(q)  # not where the PyTorch reference is forced
        and flash_attn() is not None
    )


def _takes_torch_flash(q: Tensor, D_v: int) -> bool:
    """With zeros that make values as wide as keys, which it wants in whole 16 bytes."""
    if not _is_eager(q) or D_v > q.shape[3] or q.shape[3] % 8:
        return False
    return can_use_flash_attention(SDPAParams(q, q, q, None, 0.0, True, False))


def _takes_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> bool:
    return _is_eager(q) and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, causal, False))


def _is_few(q: Tensor, S: int, D_v: int) -> bool:
    """Whether q [B, H, T, D] is too little to plan for, and torch's flash attention takes it."""
    tokens = q.shape[0] * q.shape[2]
    return _takes_torch_flash(q, D_v) and tokens < WORTH_A_PLAN and tokens * S < PAIRS


def plans(q: Tensor, S: int, D_v: int, trains: bool) -> bool:
    """Whether attention of q [B, H, T, D], the last T of S tokens, is cuDNN's."""
    if _takes_flash(q, D_v) or (not trains and _is_few(q, S, D_v)):
        return False
    return _takes_cudnn(q, q, q[..., :D_v])


def planned_length(T: int) -> int:
    """T, or up to 64 tokens or a sixteenth more: one of 16 lengths per octave."""
    step = max(64, 2 ** (T.bit_length() - 1) // 16)
    return -(-T // step) * step


def document_groups(lengths: list[int], q: Tensor, D_v: int) -> list[list[int]]:
    """Documents of a row, q [1, H, T, D], that go into one call of `packed_attention` each."""
    if _takes_flash(q, D_v):
        return [lengths]
    if not _takes_torch_flash(q, D_v):
        alone = plans(q, q.shape[2], D_v, trains=True)
        return [[n] for n in lengths] if alone else [lengths]
    groups: list[list[int]] = []
    for n in lengths:
        if not groups or max(n, groups[-1][0]) >= WORTH_A_PLAN:
            groups.append([])
        groups[-1].append(n)
    return groups


class _Once(torch.autograd.Function):
    """o as it is: the backward pass of FlashAttention, behind it, is not `first_order` itself."""

    @staticmethod
    def forward(ctx: Any, o: Tensor) -> Tensor:
        return o.view_as(o)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal=True, lse=False, **packed):
    """As [..., tokens, heads, D] and back -> o and lse, None if there need be none."""
    library: Any = flash_attn()
    op = library.flash_attn_varlen_func if packed else library.flash_attn_func
    options = packed | {"deterministic": torch.are_deterministic_algorithms_enabled()}
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    with torch.cuda.device_of(q):
        o, found = op(q, k, v, softmax_scale=scale, causal=causal, return_lse=lse, **options)
    return _Once.apply(o).transpose(-3, -2), found


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float):
    """-> o and the log-sum-exp [B, H, T], without a gradient; S = T if causal."""
    D_v, v = v.shape[3], F.pad(v, (0, q.shape[3] - v.shape[3]))
    op = torch.ops.aten._scaled_dot_product_flash_attention
    o, lse, *_ = op(q, k, v, 0.0, causal, False, scale=scale)
    return o[..., :D_v], lse


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, D_v] -> [B, H, T, D_v]; the last T of S tokens.

    Differentiable.
    """
    T, S, D_v = q.shape[2], k.shape[2], v.shape[3]
    if _takes_flash(q, D_v):
        return _flash(q, k, v, scale)[0]
    if S == T and not wants_gradient(q, k, v) and _is_few(q, S, D_v):
        return _torch_flash(q, k, v, True, scale)[0]
    mask: Any = None
    if S > T:
        if _takes_cudnn(q, k, v):
            return attend_after_others(q, k, v.contiguous(), scale)
        mask = _last_queries(T, S, q)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def _last_queries(T: int, S: int, q: Tensor) -> Any:
    """A mask for T queries that are the last of S tokens; no tensor, except for a compiler."""
    if torch.compiler.is_compiling():
        return torch.arange(S, device=q.device) <= torch.arange(S - T, S, device=q.device)[:, None]
    from torch.nn.attention.bias import causal_lower_right  # it imports triton

    return causal_lower_right(T, S)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: list[int]) -> Tensor:
    """q, k [1, H, T, D], v [1, H, T, D_v] -> [1, H, T, D_v], of documents with T tokens in all.

    Differentiable. The host does not wait for a GPU.
    """
    D_v = v.shape[3]
    flash = _takes_flash(q, D_v)
    if flash or _takes_torch_flash(q, D_v):
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        ends, most = ends.to(q.device, non_blocking=True), max(lengths)
        q, k, v = q[0], k[0], v[0]
        if flash:
            packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
            packed |= {"max_seqlen_q": most, "max_seqlen_k": most}
            return _flash(q, k, v, scale, **packed)[0][None]
        from torch.nn.attention.varlen import varlen_attn  # it imports triton

        v = F.pad(v, (0, q.shape[2] - D_v))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        o = varlen_attn(q, k, v, ends, ends, most, most, scale=scale, window_size=(-1, 0))
        return _Once.apply(o)[..., :D_v].transpose(0, 1)[None]
    documents = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([causal_attention(*document, scale) for document in documents], 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, planned: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, D_v] -> o [B, H, T, D_v], lse [B, H, T, 1].

    lse is the natural log-sum-exp of a query's scaled scores, in fp32 or better. S = T if causal.
    Without a gradient. `planned` where T and S are among few numbers, as `plans` wants it.
    """
    D_v = v.shape[3]
    if _takes_flash(q, D_v):
        o, lse = _flash(q, k, v, scale, causal, lse=True)
        return o, lse[..., None]
    if not planned and _takes_torch_flash(q, D_v):
        o, lse = _torch_flash(q, k, v, causal, scale)
        return o, lse[..., None]
    if _takes_cudnn(q, k, v, causal):
        return cudnn_attention(q, k, v, causal, scale)[:2]
    params = SDPAParams(q, k, v, None, 0.0, causal, False)
    if q.is_cuda and can_use_efficient_attention(params):
        o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return o, lse[:, :, : q.shape[2], None]  # it is longer, for alignment
    q, k, v = (x.to(accumulation_dtype(x.dtype)) for x in (q, k, v))
    s = q @ k.mT * scale
    if causal:
        s = s.masked_fill(s.new_ones(s.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = s.logsumexp(-1, keepdim=True)
    return (s - lse).exp() @ v, lse
