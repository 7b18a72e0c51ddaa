"""The public names and signatures. Who changes one of them breaks callers, and changes it here."""

import inspect
import re

import pytest

import kimi_kernels
from kimi_kernels import fla_compat

PUBLIC = {
    "add_rms_norm": """(x: Tensor, residual: Tensor, w: Tensor,
        eps: float = 1e-05) -> tuple[Tensor, Tensor]""",
    "backend": "(name: str) -> Iterator[None]",
    "causal_conv": """(xs: Sequence[Tensor], weight: Tensor, *,
        initial_state: Tensor | None = None, output_final_state: bool = False,
        cu_seqlens: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor | None]""",
    "chunk_kda": """(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
        scale: float | None = None, initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor | None]""",
    "expert_mlp": """(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor,
        weights: Tensor, shared: tuple[Tensor, Tensor, Tensor] | None = None,
        norm: tuple[Tensor, float] | None = None) -> Tensor""",
    "fused_kda": """(q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor, A_log: Tensor,
        dt_bias: Tensor, *, lower_bound: float | None = None,
        initial_state: Tensor | None = None, output_final_state: bool = False,
        cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor | None]""",
    "fused_linears": """(xs: Sequence[Tensor], weights: Sequence[Tensor],
        dtype: dtype | None = None, *, norm: tuple[Tensor, float] | None = None,
        residual: Tensor | None = None) -> tuple[Tensor, ...]""",
    "gated_rms_norm": "(x: Tensor, g: Tensor, w: Tensor, eps: float = 1e-05) -> Tensor",
    "kda_gate": """(f: Tensor, A_log: Tensor, dt_bias: Tensor,
        lower_bound: float | None = None) -> Tensor""",
    "kda_step": """(xs: Sequence[Tensor], conv_weight: Tensor, conv_state: Tensor, f: Tensor,
        b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor, gate: Tensor,
        norm_weight: Tensor, eps: float = 1e-05) -> Tensor""",
    "l2norm": "(x: Tensor) -> Tensor",
    "latent_attention": """(q: Tensor, latent: Tensor | QuantizedLatents, w_kv: Tensor, *,
        scale: float, positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None) -> Tensor""",
    "quantize_latents": "(latent: Tensor, R: int) -> QuantizedLatents",
    "recurrent_kda": """(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
        scale: float | None = None, initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor | None]""",
    "rms_norm": "(x: Tensor, w: Tensor, eps: float = 1e-05) -> Tensor",
    "route": """(logits: Tensor, bias: Tensor, top_k: int, *, n_group: int = 1,
        topk_group: int = 1, renormalize: bool = True,
        scale: float = 1.0) -> tuple[Tensor, Tensor]""",
    "store_latents": """(latent: Tensor, into: Tensor | QuantizedLatents, rows: Tensor | None,
        columns: Tensor, norm: tuple[Tensor, float] | None = None) -> None""",
}

FLA_COMPAT = {
    "chunk_kda": """(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
        scale: float | None = None, initial_state: Tensor | None = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        use_gate_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False, safe_gate: bool = False,
        lower_bound: float | None = None, disable_recompute: bool = False,
        return_intermediate_states: bool = False, state_v_first: bool = False,
        cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
        cp_context: Any = None, use_graph: bool = False, max_num_seqs: int | None = None, *,
        A_log: Tensor | None = None, dt_bias: Tensor | None = None, chunk_size: int = 64,
        **kwargs: Any) -> tuple[Tensor, Tensor | None]""",
    "fused_recurrent_kda": """(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
        A_log: Tensor | None = None, dt_bias: Tensor | None = None,
        scale: float | None = None, initial_state: Tensor | None = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        use_gate_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False, lower_bound: float | None = None,
        state_v_first: bool = False, cu_seqlens: Tensor | None = None,
        **kwargs: Any) -> tuple[Tensor, Tensor | None]""",
}


def signature(function) -> str:
    """Its signature without the module in front of a type's name."""
    return re.sub(
        r"\b(torch|typing|collections\.abc|kimi_kernels\.latents)\.",
        "",
        str(inspect.signature(function)),
    )


@pytest.mark.parametrize(
    "module, frozen", [(kimi_kernels, PUBLIC), (fla_compat, FLA_COMPAT)], ids=["", "fla_compat"]
)
def test_signatures(module, frozen):
    assert module.__all__ == sorted(frozen)
    for name, text in frozen.items():
        assert signature(getattr(module, name)) == re.sub(r"\s+", " ", text), name


def test_names_are_functions_with_docstrings():
    for module in (kimi_kernels, fla_compat):
        for name in module.__all__:
            function = getattr(module, name)
            assert inspect.isfunction(function) and function.__doc__, name
