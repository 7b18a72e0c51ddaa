"""The definition of Kimi Delta Attention in PyTorch, token by token and chunk by chunk.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T      [K, V]   (TR eq. 1)
    o_t = scale * S_t^T q_t                                                    [V]

Both forms compute in fp32, or in fp64 for fp64 inputs, and differentiate through autograd.
How the chunk form stays finite for every gate is derived in README.md beside this file.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_kernels.causal_conv import causal_convs_ref
from kimi_kernels.checks import accumulation_dtype, sequence_bounds
from kimi_kernels.gated_norm import gated_rms_norm_ref
from kimi_kernels.kda.gate import kda_gate, l2norm

CHUNK = 64
# exp(-1e4) is 0 in every dtype; the clamp keeps 0 * (-inf) out of the masked sums of the chunk form
MIN_LOG_DECAY = -1e4

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def recurrent_form(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor):
    """q, k, g [B, H, T, K], v [B, H, T, V], beta [B, H, T], S [B, H, K, V] -> o, S."""
    o = []
    for t in range(q.shape[2]):
        S = S * g[:, :, t].exp()[..., None]
        e = v[:, :, t] - (k[:, :, t, None] @ S).squeeze(-2)  # [B, H, V]
        S = S + (beta[:, :, t, None] * k[:, :, t])[..., None] * e[:, :, None]
        o.append((q[:, :, t, None] @ S).squeeze(-2))
    return torch.stack(o, 2), S


def tree_matrices(device: torch.device, dtype: torch.dtype):
    """0/1 matrices of the chunk form, see README.md: per level (M, pairs), then LOW and UP."""
    r = torch.arange(CHUNK, device=device)
    levels = []
    for level in range(CHUNK.bit_length() - 1):
        anchor = ((r >> (level + 1)) << (level + 1)) + (1 << level)  # first row of the odd block
        lo, hi = torch.minimum(r, anchor), torch.maximum(r, anchor)
        M = (r[None] > lo[:, None]) & (r[None] <= hi[:, None])
        block = r >> level
        pairs = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None])
        levels.append((M.to(dtype), pairs.to(dtype)))
    ones = torch.ones(CHUNK, CHUNK, device=device, dtype=dtype)
    return levels, ones.tril(), ones.triu(1)


@functools.lru_cache
def anchor_tree(device: torch.device, dtype: torch.dtype):
    """`tree_matrices`, kept; not as inference tensors, which a later backward pass may not save."""
    with torch.inference_mode(False):
        return tree_matrices(device, dtype)


def chunk_form(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor):
    """The same in chunks of 64 tokens (TR section 3.1, eqs. 6-9); shapes as `recurrent_form`."""
    T, K = q.shape[2:]
    pad = -T % CHUNK
    q, k, v, g = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for x in (q, k, v, g))
    beta = F.pad(beta, (0, pad)).unflatten(2, (-1, CHUNK))[..., None]  # [B, H, NT, C, 1]
    levels, LOW, UP = anchor_tree(q.device, q.dtype)

    # A_qk[i, j] = sum_d q_i k_j exp(G_i - G_j) for i >= j, and A_kk likewise for i > j  [.., C, C]
    A_qk = torch.diag_embed((q * k).sum(-1))
    A_kk = torch.zeros_like(A_qk)
    for M, pairs in levels:
        E = (M @ g).exp()  # exp(G_i - G_n) on odd rows, exp(G_n - G_j) on even rows, both <= 1
        qE, kE = q * E, k * E
        A_qk = A_qk + pairs * (qE @ kE.mT)
        A_kk = A_kk + pairs * (kE @ kE.mT)

    decay = (LOW @ g).exp()  # exp(G_i), from the start of the chunk
    q_in, k_out = q * decay, k * (UP @ g).exp()
    eye = torch.eye(CHUNK, device=q.device, dtype=q.dtype)
    rhs = beta * torch.cat((k * decay, v), -1)
    w, u = torch.linalg.solve_triangular(
        eye + beta * A_kk, rhs, upper=False, unitriangular=True
    ).split((K, v.shape[-1]), -1)

    o = []
    for c in range(q.shape[2]):
        v_new = u[:, :, c] - w[:, :, c] @ S
        o.append(q_in[:, :, c] @ S + A_qk[:, :, c] @ v_new)
        S = decay[:, :, c, -1, :, None] * S + k_out[:, :, c].mT @ v_new
    return torch.cat(o, 2)[:, :, :T], S


def kda_ref(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run one form on public layouts; arguments as `kimi_kernels.chunk_kda`, nothing checked."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    acc = accumulation_dtype(q.dtype)
    q, k = (x.to(acc).repeat_interleave(HV // H, 2) for x in (q, k))
    g = g.to(acc).clamp(min=MIN_LOG_DECAY)
    x = [t.to(acc).transpose(1, 2) for t in (q * scale, k, v, g, beta)]
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, v)
    if initial_state is None:
        N = B if bounds is None else len(bounds)
        initial_state = q.new_zeros(N, HV, K, V)

    def run(start: int, end: int, S: Tensor) -> tuple[Tensor, Tensor]:
        part = [t[:, :, start:end] for t in x]
        return form(*part, S) if end > start else (part[2], S.clone())

    if bounds is None:
        o, S = run(0, T, initial_state)
    else:
        parts = [run(*bounds[n], initial_state[n : n + 1]) for n in range(len(bounds))]
        o, S = torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts])
    return o.transpose(1, 2).to(v.dtype), S


def fused_kda_ref(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with the activations in front; arguments as `kimi_kernels.fused_kda`."""
    acc = accumulation_dtype(q.dtype)
    g = kda_gate(f.to(acc), A_log, dt_bias, lower_bound)
    qn, kn, beta = l2norm(q.to(acc)), l2norm(k.to(acc)), b.to(acc).sigmoid()
    scale = q.shape[-1] ** -0.5
    o, S = kda_ref(form, qn, kn, v.to(acc), g, beta, scale, initial_state, cu_seqlens)
    return o.to(v.dtype), S


def kda_step_ref(
    xs: Sequence[Tensor],
    conv_weight: Tensor,
    conv_state: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """The definition of `kimi_kernels.kda_step`, from those of its parts."""
    with torch.no_grad():
        *qkv, new_conv_state = causal_convs_ref(xs, conv_weight, conv_state, None)
        q, k, v = (x.unflatten(-1, (f.shape[2], -1)) for x in qkv)
        o, S = fused_kda_ref(recurrent_form, q, k, v, f, b, A_log, dt_bias, None, state, None)
        conv_state.copy_(new_conv_state)
        state.copy_(S)
        return gated_rms_norm_ref(o, gate, norm_weight, eps)
