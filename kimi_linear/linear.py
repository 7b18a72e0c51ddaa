"""Linear layers that may be adapted, quantized, offloaded or split, and those that are plain."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_kernels import fused_linears
from kimi_kernels.linears import few_rows, share_a_launch
from kimi_linear.norm import KimiLinearRMSNorm

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """What runs around its forward, or around the backward pass of it."""
    return [hook for name in HOOKS for hook in getattr(module, name).values()]


def is_bare(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward and nothing else."""
    own = vars(module)  # a module looks for what it does not have in several places
    hooked = "_hf_hook" in own or any(own[name] for name in HOOKS)
    return not hooked and "forward" not in own


def has_plain_weight(module: nn.Module, x: Tensor) -> bool:
    """Whether a kernel may read its weight instead of calling it: bare, not split, dtype of x."""
    w = module.weight
    return is_bare(module) and type(w) in (Tensor, nn.Parameter) and w.dtype == x.dtype


def is_sharded(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward on weights that FSDP 2 gathers for it alone."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    own = all(hook.__module__.startswith("torch.distributed.fsdp.") for hook in hooks_of(module))
    return isinstance(module, FSDPModule) and own and "forward" not in vars(module)


def call_as(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives, called with the module's hooks around it in place of its forward."""
    vars(module)["forward"] = function
    try:
        return module(*args, **kwargs)
    finally:
        del vars(module)["forward"]


def are_plain(modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether all are linear layers without bias, of plain weights in the dtype of x."""
    return all(type(m) is nn.Linear and m.bias is None and has_plain_weight(m, x) for m in modules)


def decodes(x: Tensor) -> bool:
    """Whether x [..., D] are few tokens without a gradient, whose weights are what takes time."""
    return few_rows(x) and infers(x)


def infers(x: Tensor) -> bool:
    """Whether x is on a GPU and only kernels of its dtype work on it, without a gradient."""
    return x.is_cuda and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))


def project(
    xs: Tensor | Sequence[Tensor],
    *modules: nn.Module,
    norm: KimiLinearRMSNorm | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Every module on its x, or all on the same: in one launch where few tokens are decoded.

    norm: of the one x, first. residual: added to the one output.
    """
    x = xs if isinstance(xs, Tensor) else xs[0]
    fused = infers(x) and share_a_launch(x, len(modules)) and are_plain(modules, x)
    if norm is not None and not (fused and few_rows(x) and has_plain_weight(norm, x)):
        x, norm = norm(x), None
    if isinstance(xs, Tensor):
        xs = [x] * len(modules)
    if fused:
        weights: Any = [m.weight for m in modules]
        given = None if norm is None else (norm.weight, norm.eps)
        return fused_linears(xs, weights, norm=given, residual=residual)
    ys = tuple(m(x) for m, x in zip(modules, xs, strict=True))
    return ys if residual is None else (residual + ys[0],)
