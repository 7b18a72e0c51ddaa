"""The interface of `fla.ops.kda` in fla-core 0.6.0, on the ops of this package.

    from kimi_kernels.fla_compat import chunk_kda, fused_recurrent_kda

Names, order, defaults and meaning of the parameters are fla's, so that a code base moves over by
changing one import. Nothing is computed here that `kimi_kernels` does not export. Tensors: q, k
`[B, T, H, K]`, v `[B, T, HV, V]`, g `[B, T, HV, K]`, beta `[B, T, HV]`, in one dtype for q, k, v.
Both functions return (o, final state or None) and are differentiable, `fused_recurrent_kda` too;
each takes what fla's does, so those marked * are `chunk_kda`'s alone.

| parameter                    | here                                                            |
|------------------------------|-----------------------------------------------------------------|
| scale                        | of q, default `K**-0.5`                                         |
| initial_state                | `[N, HV, K, V]`; chunk_kda wants fp32 (fp64 with fp64 inputs),  |
|                              | as fla asserts; fused_recurrent_kda takes any float dtype       |
| output_final_state           | return the state after the last token, fp32                     |
| use_qk_l2norm_in_kernel      | `l2norm` of q and k                                             |
| use_gate_in_kernel           | g is the raw projection: `kda_gate(g, A_log, dt_bias,           |
|                              | lower_bound)`; without it these three are ignored, as in fla    |
| A_log, dt_bias               | HV and HV * K numbers in any shape. dt_bias None is 0; A_log    |
|                              | None needs lower_bound and stands for a factor of 1             |
| use_beta_sigmoid_in_kernel   | sigmoid of beta, in fp32                                        |
| allow_neg_eigval             | twice that sigmoid; needs use_beta_sigmoid_in_kernel            |
| lower_bound                  | of the gate, < 0; in `[-5, 0)` with safe_gate                   |
| safe_gate *                  | a promise that g >= -5, which selects a faster kernel in fla;   |
|                              | every g is safe here, so it changes nothing but is checked      |
| state_v_first                | states go in and out as `[N, HV, V, K]`                         |
| cu_seqlens, cu_seqlens_cpu * | `[N+1]`; the second, a copy on the host, is checked and unused  |
| disable_recompute *          | trades memory for speed in fla; accepted, changes no result     |
| chunk_size *                 | 32 or 64; accepted, changes no result                           |
| return_intermediate_states *,| ValueError unless left at the default                           |
| cp_context *, use_graph *,   |                                                                 |
| max_num_seqs *               |                                                                 |
| transpose_state_layout       | state_v_first under its old name, with a DeprecationWarning     |
| anything else                | ValueError (fla ignores it silently)                            |

Where l2norm, gate and sigmoid are all asked for, with the default scale, both functions are
`fused_kda`, which keeps q, k and beta in fp32 between the activations and the recurrence.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from kimi_kernels.checks import accumulation_dtype, check_shape
from kimi_kernels.kda import chunk_kda as _chunk_kda
from kimi_kernels.kda import fused_kda, kda_gate, l2norm
from kimi_kernels.kda import recurrent_kda as _recurrent_kda

__all__ = ["chunk_kda", "fused_recurrent_kda"]


def _refuse(**flags: Any) -> None:
    """Each flag must have its default, None or False."""
    for name, value in flags.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported, want {name} left out")


def _run(
    op, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
    use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
    lower_bound, state_v_first, cu_seqlens, kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if "transpose_state_layout" in kwargs:
        warnings.warn(
            "transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3
        )
        state_v_first = kwargs.pop("transpose_state_layout")
    for name in kwargs:
        raise ValueError(f"{name} is not a parameter of this function in fla-core 0.6.0")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval is True, want use_beta_sigmoid_in_kernel with it")
    if use_gate_in_kernel:
        if A_log is None and lower_bound is None:
            raise ValueError("A_log is None, want it given with use_gate_in_kernel, or lower_bound")
        for name, x in (("q", q), ("v", v)):
            if x.ndim != 4:
                raise ValueError(f"{name} has shape {list(x.shape)}, want [B, T, heads, channels]")
        (B, T, HV, _), K = v.shape, q.shape[-1]
        check_shape("g", g, B, T, HV, K)  # fused_kda would call them f and b
        check_shape("beta", beta, B, T, HV)
        A_log = g.new_zeros(HV, dtype=torch.float32) if A_log is None else A_log.flatten()
        dt_bias = g.new_zeros(HV * K, dtype=torch.float32) if dt_bias is None else dt_bias.flatten()
    if initial_state is not None and state_v_first:
        initial_state = initial_state.mT
    states = {
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }

    all_inside = use_qk_l2norm_in_kernel and use_gate_in_kernel and use_beta_sigmoid_in_kernel
    if all_inside and not allow_neg_eigval and scale in (None, q.shape[-1] ** -0.5):
        o, S = fused_kda(q, k, v, g, beta, A_log, dt_bias, lower_bound=lower_bound, **states)
    else:
        if use_qk_l2norm_in_kernel:
            q, k = l2norm(q), l2norm(k)
        if use_gate_in_kernel:
            g = kda_gate(g, A_log, dt_bias, lower_bound)
        if use_beta_sigmoid_in_kernel:
            beta = beta.to(accumulation_dtype(beta.dtype)).sigmoid()
            beta = 2 * beta if allow_neg_eigval else beta
        o, S = op(q, k, v, g, beta, scale=scale, **states)
    return o, S.mT.contiguous() if S is not None and state_v_first else S


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.chunk_kda` of fla-core 0.6.0; the module's docstring has every parameter.

    Raises:
        ValueError: as `kimi_kernels.chunk_kda`, and for a parameter that is not supported.
    """
    _refuse(
        return_intermediate_states=return_intermediate_states,
        cp_context=cp_context,
        use_graph=use_graph,
        max_num_seqs=max_num_seqs,
    )
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size is {chunk_size}, `chunk_size` must be either 32 or 64")
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound is {lower_bound}, want it in [-5, 0) with safe_gate")
    if cu_seqlens_cpu is not None and (
        cu_seqlens is None or cu_seqlens_cpu.shape != cu_seqlens.shape
    ):
        want = "None without cu_seqlens" if cu_seqlens is None else list(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens_cpu has shape {list(cu_seqlens_cpu.shape)}, want {want}")
    return _run(
        _chunk_kda, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, cu_seqlens, kwargs,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fla.ops.kda.fused_recurrent_kda` of fla-core 0.6.0; parameters as in the module's docstring.

    Raises:
        ValueError: as `kimi_kernels.recurrent_kda`, and for a parameter that is not supported.
    """
    if initial_state is not None and initial_state.is_floating_point():
        initial_state = initial_state.to(accumulation_dtype(q.dtype))
    return _run(
        _recurrent_kda, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, cu_seqlens, kwargs,
    )  # fmt: skip
