"""The training loss without the logits [tokens, V]: Liger-Kernel's fused linear cross-entropy.

It goes through the tokens in chunks: a chunk's logits, its loss, their gradient in the same memory,
and from it the gradients of the hidden states and of the head's weight, all in the forward pass.
"""

from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from kimi_kernels.dispatch import use_triton
from kimi_linear.linear import call_as, is_bare, is_sharded

LIGER = "0.8.5"  # or later; earlier ones have another signature
try:
    HAS_LIGER = Version(metadata.version("liger_kernel")) >= Version(LIGER)
except metadata.PackageNotFoundError:
    HAS_LIGER = False

# Tokens whose logits exist at once: 1.3 GB at the released sizes. A chunk also reads and writes
# the weight's fp32 gradient. Forward and backward of 8192 tokens on an H200 in bf16 take 43 ms in
# chunks of 512, 35 of 1024, 30 of 2048, 28 of 4096, and 2.3, 2.3, 2.3 and 2.9 GB; 41 ms and 16 GB
# from logits.
CHUNK = 4096


def skips_logits(
    model: Any, asked: bool | None, labels: Tensor | None, logits_to_keep: int | Tensor
) -> bool:
    """Whether `model`'s forward computes the loss alone; `asked` is its argument `skip_logits`.

    Raises:
        ValueError: `asked` is True, but the fused loss cannot be used; says why.
    """
    if asked is False or (asked is None and (labels is None or not model.training)):
        return False
    reason = why_not_fused(model, labels, logits_to_keep)
    if asked and reason is not None:
        raise ValueError(f"skip_logits is True, but {reason}")
    return reason is None


def keeps_all(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def check_labels(
    labels: Tensor | None, x: Tensor | None, logits_to_keep: int | Tensor, shifted: Tensor | None
) -> None:
    """Raise a `ValueError` unless labels are of all tokens of x [B, T, ...], and logits of them."""
    if labels is None or x is None:
        return
    if labels.shape != x.shape[:2]:
        raise ValueError(f"labels has shape {list(labels.shape)}, want {list(x.shape[:2])}")
    if shifted is None and not keeps_all(logits_to_keep):
        raise ValueError("logits_to_keep with labels: the loss takes all logits, want 0")


def why_not_fused(model: Any, labels: Tensor | None, logits_to_keep: int | Tensor) -> str | None:
    """What keeps the fused loss from being used, or None.

    The weight is read without calling `lm_head`. That is right where it is a whole, plain tensor
    during the model's forward, as under FSDP when the head is in the unit of the whole model; in a
    unit of FSDP 2 of its own, accelerate's way, the loss takes the place of the head's forward. Not
    where something else around the call fetches, adds or splits it: DeepSpeed ZeRO-3, tensor
    parallelism, adapters, quantization, offloading.
    """
    if torch.compiler.is_compiling():  # first: nothing below is traced
        return "torch.compile cannot trace the fused loss"
    if labels is None:
        return "labels is None"
    if not keeps_all(logits_to_keep):
        return "logits_to_keep is given: the fused loss is that of all positions"
    if model.loss_function is not ForCausalLMLoss:
        return "loss_function is not transformers' ForCausalLMLoss"
    head = model.lm_head
    sharded = is_sharded(head)
    kind = type(head).__bases__[-1] if sharded else type(head)  # FSDP makes a class of two
    if kind is not nn.Linear or head.bias is not None:
        return f"lm_head is a {type(head).__name__}, want a torch.nn.Linear without bias"
    if not (sharded or is_bare(head)):
        return "lm_head has hooks or a forward of its own"
    weight, shape = head.weight, [model.config.vocab_size, model.config.hidden_size]
    if not sharded and type(weight) not in (Tensor, nn.Parameter):
        return f"lm_head.weight is a {type(weight).__name__}, want a plain tensor"
    if list(weight.shape) != shape:
        return f"lm_head.weight has shape {list(weight.shape)}, want {shape}"
    if not HAS_LIGER:
        return f"liger-kernel >= {LIGER} is not installed"
    if not use_triton(weight):
        return f"no Triton kernel runs: lm_head.weight is {weight.dtype} on {weight.device}"
    return None


def head_loss(head: nn.Linear, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """`fused_loss` with the weight of `head`, which FSDP 2 may have to gather."""

    def loss(x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return fused_loss(x, head.weight, labels, **kwargs)

    if is_sharded(head):
        return call_as(head, loss, x, labels, **kwargs)
    return loss(x, labels, **kwargs)


def fused_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """What transformers' `ForCausalLMLoss` gives for the logits `x weight^T`, without them.

    The weight's gradient is summed over the chunks in fp32 and rounded once, as one product of all
    tokens would be; in bf16 every chunk would add a rounding. At the released sizes this takes
    1.5 GB in place of 0.75, whatever the number of tokens, and nothing where the weight is frozen.

    The gradients are scaled in place in the backward pass, so there can be only one.

    Args:
        x: `[B, T, D]`, hidden states. weight: `[V, D]`.
        labels: `[B, T]`, shifted here, or `shift_labels`, which are not.
        num_items_in_batch: divides the sum of the losses. Default: their number, for a mean.

    Returns:
        The loss, fp32; nan where it is divided by 0.

    Raises:
        ValueError: labels that are no tokens, or a wrong number of them.
        RuntimeError: in a second backward pass.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    (V, D), x = weight.shape, x.flatten(0, -2)
    name, targets = "shift_labels", shift_labels
    if targets is None:
        name, targets = "labels", pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = targets.flatten().to(x.device)
    if len(targets) != len(x):  # the kernel would read past the end
        raise ValueError(f"{name} has {len(targets)} elements, want {len(x)}")
    counted = targets != ignore_index
    if (counted & ((targets < 0) | (targets >= V))).any():  # waits for the GPU, as Liger does next
        raise ValueError(f"{name} must be from 0 to {V - 1}, or {ignore_index} to be ignored")
    if weight.requires_grad and not x.requires_grad and torch.is_grad_enabled():
        x = x.detach().requires_grad_()  # else Liger gives the weight no gradient
    # Liger scales the gradients at the end unless by 1, as here with all items: 0.7 ms. Those of a
    # mean are too small for fp16, and GradScaler's factor comes after them.
    cuda = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if cuda else x.dtype
    reduction = "sum" if dtype == torch.float16 else "mean"
    total: Any = liger_fused_linear_cross_entropy(
        x,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        accum_dtype=torch.float32,
        chunk_mem_const=max(1, -(-CHUNK * V // max(1, len(x) * D))),  # its chunks: this D / V of x
    )
    count = counted.sum()
    items = count if num_items_in_batch is None else num_items_in_batch
    items = torch.as_tensor(items, device=x.device)
    scale = count if reduction == "mean" else 1
    loss = total * (scale / items.masked_fill(items == 0, 1))
    loss = loss.masked_fill(items == 0, torch.nan)  # with gradients of 0, as from full logits
    if loss.requires_grad:
        loss.register_hook(_OneBackward())
    return loss


class _OneBackward:
    """A hook of a tensor, to refuse a second backward pass through it."""

    done = False

    def __call__(self, grad: Tensor) -> None:
        if self.done:
            raise RuntimeError("skip_logits: the loss without logits has only one backward pass")
        self.done = True
