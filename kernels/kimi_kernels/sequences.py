"""Where tokens and chunks lie: found on the GPU, so that packed rows need no host sync."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64


@triton.jit
def sequence(cu_seqlens, i_n, T):
    """First token (int64) and length of packed sequence i_n, never outside the T tokens."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n), 0), T).to(tl.int64)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1), 0), T).to(tl.int64)
    return begin, tl.maximum(end - begin, 0).to(tl.int32)


@triton.jit
def chunk_table_kernel(
    cu_seqlens, offsets, owner,
    T, N, NT,
    C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """offsets[n] = chunks before sequence n; owner[c] = sequence of chunk c, -1 past the last."""
    i_n = tl.program_id(0)  # 0..N; program N fills what no sequence owns
    o_b = tl.arange(0, BN)
    before = 0
    for j in range(0, i_n, BN):
        m = j + o_b < i_n
        _, length = sequence(cu_seqlens, tl.where(m, j + o_b, 0), T)
        before += tl.sum(tl.where(m, (length + C - 1) // C, 0), 0)
    tl.store(offsets + i_n, before)
    last, value = NT, -1
    if i_n < N:
        _, length = sequence(cu_seqlens, i_n, T)
        last, value = before + (length + C - 1) // C, i_n
    last = tl.minimum(last, NT)
    for c in range(before, last, BC):
        o_c = c + tl.arange(0, BC)
        tl.store(owner + o_c, tl.full([BC], value, tl.int32), mask=o_c < last)


def chunk_table(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Chunk offsets [N+1] and the sequence that owns each chunk [NT], int32.

    NT is an upper bound known to the host: every sequence adds at most one partial chunk.
    """
    N = cu_seqlens.numel() - 1
    NT = T // CHUNK + N
    offsets = torch.empty(N + 1, dtype=torch.int32, device=cu_seqlens.device)
    owner = torch.empty(NT, dtype=torch.int32, device=cu_seqlens.device)
    chunk_table_kernel[(N + 1,)](cu_seqlens, offsets, owner, T, N, NT, C=CHUNK, BN=256, BC=1024)
    return offsets, owner


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` [B, T, ...] with one stride per token; copied only if it is not laid out like that."""
    B, T = x.shape[:2]
    inner = x.shape[2:].numel()
    uneven = B > 1 and T > 1 and x.stride(0) != T * x.stride(1)
    if uneven or not x[:1, :1].is_contiguous():
        x = x.contiguous()
    return x, x.stride(1) if T > 1 else x.stride(0) if B > 1 else inner
