"""Kimi Delta Attention: the public ops. README.md beside this file derives what they compute."""

from collections.abc import Sequence

from torch import Tensor

from kimi_kernels.checks import (
    accumulation_dtype,
    check_float,
    check_like,
    check_number,
    check_shape,
    check_state,
    count_sequences,
)
from kimi_kernels.dispatch import use_triton
from kimi_kernels.kda.gate import kda_gate, kda_gate_checks, l2norm
from kimi_kernels.kda.reference import (
    chunk_form,
    fused_kda_ref,
    kda_ref,
    kda_step_ref,
    recurrent_form,
)

__all__ = ["chunk_kda", "fused_kda", "kda_gate", "kda_step", "l2norm", "recurrent_kda"]

RECURRENT_BELOW = 16  # tokens: under it the token loop costs less than one padded chunk of 64


def _check(q, k, v, g, beta, names, initial_state, cu_seqlens) -> None:
    g_name, beta_name = names
    for name, x, ndim in (
        ("q", q, 4),
        ("k", k, 4),
        ("v", v, 4),
        (g_name, g, 4),
        (beta_name, beta, 3),
    ):
        if x.ndim != ndim:
            want = "[B, T, H, K]" if ndim == 4 else "[B, T, H]"
            raise ValueError(f"{name} has shape {list(x.shape)}, want {want}")
    check_float("q", q, q)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    check_shape("k", k, B, T, H, K)
    check_shape("v", v, B, T, HV, V)
    if K == 0:
        raise ValueError(f"q has shape {list(q.shape)}, want [B, T, H, K] with K > 0")
    if H == 0 or HV % H:
        raise ValueError(f"v has {HV} heads, want a multiple of the {H} heads of q and k")
    check_shape(g_name, g, B, T, HV, K)
    check_shape(beta_name, beta, B, T, HV)
    for name, x in (("k", k), ("v", v)):
        check_like(name, x, "q", q)
    for name, x in ((g_name, g), (beta_name, beta)):
        check_float(name, x, q)
    N = count_sequences(cu_seqlens, q)
    check_state("initial_state", initial_state, q, accumulation_dtype(q.dtype), N, HV, K, V)


def _run(recurrent, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    _check(q, k, v, g, beta, ("g", "beta"), initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton(q):
        from kimi_kernels.kda.autograd import kda

        none = (None, None, scale, None)
        o, S, _ = kda(q, k, v, g, beta, *none, initial_state, cu_seqlens, recurrent)
    else:
        form = recurrent_form if recurrent else chunk_form
        o, S = kda_ref(form, q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return o, S if output_final_state else None


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention in chunks of 64 tokens (arXiv 2510.26692, eqs. 1 and 6-9).

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
        o_t = scale S_t^T q_t

    Exact for every gate: nothing overflows, whatever the decay within a chunk. Strictly causal. On
    a GPU K from 16 to 128 and V from 16 on have kernels of chunks; others go token by token, and
    backward in PyTorch, which is many times slower.

    Args:
        q, k: `[B, T, H, K]`, used as they come (`fused_kda` normalises them). bf16, fp16, fp32 or
            fp64.
        v: `[B, T, HV, V]`, HV a multiple of H: value head h reads query/key head h // (HV / H).
        g: log-decay per key channel, natural log, <= 0, `[B, T, HV, K]`. -inf resets a channel.
        beta: write strength after its sigmoid, `[B, T, HV]`.
        scale: of q; default `K**-0.5`.
        initial_state: S before the first token, `[N, HV, K, V]`, fp32 (fp64 for fp64 inputs);
            N = B, or the number of packed sequences. Default zeros. It is not modified.
        output_final_state: also return S after the last token of each sequence.
        cu_seqlens: `[N+1]` int32 or int64, ends of the sequences packed into one row (B = 1), from
            0 to T; empty sequences are allowed and hand their initial state on. On a GPU its values
            are not checked, as the host would wait: a token of no sequence has an undefined output.

    Returns:
        o `[B, T, HV, V]` in `v.dtype`, and S `[N, HV, K, V]` in fp32 (fp64), or None. Both
        differentiable in q, k, v, g, beta and initial_state.

    Raises:
        ValueError: a wrong shape, dtype or device, or a cu_seqlens on a CPU that does not go from 0
            up to T.
    """
    args = (scale, initial_state, output_final_state, cu_seqlens)
    return _run(False, q, k, v, g, beta, *args)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda` token by token: the same arguments, results and errors. For decoding."""
    args = (scale, initial_state, output_final_state, cu_seqlens)
    return _run(True, q, k, v, g, beta, *args)


def fused_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    lower_bound: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The op of the model: `chunk_kda` on raw projections, with the activations inside.

        q, k <- l2norm(q), l2norm(k)        g = -exp(A_log) softplus(f + dt_bias)  (TR section 4)
        beta = sigmoid(b)                   or lower_bound sigmoid(exp(A_log) (f + dt_bias))

    Args:
        q, k: `[B, T, H, K]` after the convolution. bf16, fp16, fp32 or fp64.
        v: `[B, T, HV, V]`, HV a multiple of H.
        f: gate projection, `[B, T, HV, K]`.
        b: logits of beta, `[B, T, HV]`.
        A_log: `[HV]`, fp32.
        dt_bias: `[HV * K]`, head-major, fp32.
        lower_bound: of the gate, finite and < 0; None (the released checkpoint) is unbounded.
        initial_state, output_final_state, cu_seqlens: as in `chunk_kda`.

    Returns:
        o `[B, T, HV, V]` in `v.dtype`, and S `[N, HV, K, V]` in fp32 (fp64), or None.
        Differentiable in every tensor.

    Raises:
        ValueError: as `chunk_kda`, and for A_log, dt_bias or lower_bound.
    """
    _check(q, k, v, f, b, ("f", "b"), initial_state, cu_seqlens)
    recurrent = q.shape[1] < RECURRENT_BELOW
    if use_triton(q):
        kda_gate_checks(f, A_log, dt_bias, lower_bound)
        from kimi_kernels.kda.autograd import kda

        gate = (A_log.contiguous(), dt_bias.contiguous(), q.shape[-1] ** -0.5, lower_bound)
        o, S, _ = kda(q, k, v, f, b, *gate, initial_state, cu_seqlens, recurrent)
    else:
        form = recurrent_form if recurrent else chunk_form
        o, S = fused_kda_ref(
            form, q, k, v, f, b, A_log, dt_bias, lower_bound, initial_state, cu_seqlens
        )
    return o, S if output_final_state else None


def kda_step(
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
    eps: float = 1e-5,
) -> Tensor:
    """One decode step of a KDA layer, from its projections to its output projection.

    The same as `causal_conv`, `fused_kda` and `gated_rms_norm` one after the other, without a
    gradient.

    Args:
        xs: projections for q, k and v of the new tokens, `[B, T, H*K]` twice and `[B, T, H*V]`.
            Meant for few tokens: they are taken one by one.
        conv_weight: `[2*H*K + H*V, W]`.
        conv_state: the last W-1 inputs, `[B, W-1, 2*H*K + H*V]`, dtype of `xs`. Advanced in place.
        f, b, A_log, dt_bias: as in `fused_kda`; the gate is unbounded.
        state: S, `[B, H, K, V]` fp32 (fp64 for fp64 inputs). Advanced in place.
        gate, norm_weight, eps: as in `gated_rms_norm`; gate `[B, T, H, V]`.

    Returns:
        `[B, T, H, V]` in the dtype of `xs`.

    Raises:
        ValueError: a wrong shape, dtype or device, or a state that is not contiguous.
    """
    if len(xs) != 3:
        raise ValueError(f"xs has {len(xs)} tensors, want those for q, k and v")
    for name, x in (("f", f), ("gate", gate)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}, want 4 dimensions")
    (B, T, H, K), V = f.shape, gate.shape[-1]
    D = 2 * H * K + H * V
    for i, size in enumerate((H * K, H * K, H * V)):
        check_shape(f"xs[{i}]", xs[i], B, T, size)
        check_like(f"xs[{i}]", xs[i], "f", f)
    check_float("f", f, f)
    check_number("eps", eps)
    check_shape("b", b, B, T, H)
    check_shape("gate", gate, B, T, H, V)
    check_like("gate", gate, "f", f)
    check_shape("norm_weight", norm_weight, V)
    if conv_weight.ndim != 2 or conv_weight.shape[0] != D or conv_weight.shape[1] < 2:
        raise ValueError(f"conv_weight has shape {list(conv_weight.shape)}, want [{D}, W], W >= 2")
    for name, x in (("b", b), ("norm_weight", norm_weight), ("conv_weight", conv_weight)):
        check_float(name, x, f)
    check_state("conv_state", conv_state, f, f.dtype, B, conv_weight.shape[1] - 1, D)
    check_state("state", state, f, accumulation_dtype(f.dtype), B, H, K, V)
    for name, x in (("conv_state", conv_state), ("state", state)):
        if x is None:
            raise ValueError(f"{name} is None, want one that is advanced in place")
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}, want a contiguous tensor")
    kda_gate_checks(f, A_log, dt_bias, None)
    args = (f, b, A_log, dt_bias, state, gate, norm_weight, eps)
    if use_triton(f):
        from kimi_kernels.kda.autograd import kda_step_op

        return kda_step_op(list(xs), conv_weight, conv_state, *args)
    return kda_step_ref(xs, conv_weight, conv_state, *args)
