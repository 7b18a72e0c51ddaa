"""How a Triton op is called. As an operator of torch it costs 0.1 ms of host time and more."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dispatch(op: Callable, function: type[torch.autograd.Function], forward: Callable) -> Callable:
    """One call of the same arguments: `op` for a compiler, `function` where a gradient is wanted.

    Otherwise `forward`. Tensors inside of lists are not seen.
    """

    def call(*args: Any):
        if torch.compiler.is_compiling():
            return op(*args)
        return function.apply(*args) if wants_gradient(*args) else forward(*args)

    return call


def first_order(backward: Callable) -> Callable:
    """For the backward pass of a kernel: an error where its gradients are to have gradients.

    Autograd does not see into it, and would leave them out without a word (`create_graph=True`).
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True, but a kernel's gradients have no gradients; those of the "
                'PyTorch reference do, on a CPU or in kimi_kernels.backend("reference")'
            )
        return backward(ctx, *grads)

    return checked


def wants_gradient(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
