"""Linear layers that may be adapted, quantized, offloaded or split, and those that are plain."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kimi_kernels import fused_linears
from kimi_kernels.linears import few_rows

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_bare(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward and nothing else."""
    hooked = hasattr(module, "_hf_hook") or any(getattr(module, name) for name in HOOKS)
    return not hooked and "forward" not in vars(module)


def are_plain(modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether all are linear layers without bias, of plain weights in the dtype of x."""
    return all(
        type(m) is nn.Linear
        and m.bias is None
        and is_bare(m)
        and type(m.weight) in (Tensor, nn.Parameter)
        and m.weight.dtype == x.dtype
        for m in modules
    )


def decodes(x: Tensor) -> bool:
    """Whether x [..., D] are few tokens without a gradient, whose weights are what takes time."""
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))
    return few_rows(x) and x.is_cuda and plain


def project(xs: Tensor | Sequence[Tensor], *modules: nn.Module) -> tuple[Tensor, ...]:
    """Every module on its x, or all on the same: in one launch where few tokens are decoded."""
    xs = [xs] * len(modules) if isinstance(xs, Tensor) else xs
    if decodes(xs[0]) and are_plain(modules, xs[0]):
        weights: Any = [m.weight for m in modules]
        return fused_linears(xs, weights)
    return tuple(m(x) for m, x in zip(modules, xs, strict=True))
