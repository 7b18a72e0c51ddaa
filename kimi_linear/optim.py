"""Muon for matrices and AdamW for everything else, as Kimi Linear was trained (arXiv 2510.26692).

For a matrix W [m, n] with gradient G, and c the bound of Muon's update per element (2502.16982):

    B  = mu B + (1 - mu) G
    O  = NewtonSchulz(mu B + (1 - mu) G)            near the orthogonal factor U V^T of U S V^T
    W  = (1 - lr decay) W - lr c O                  c = 0.2 sqrt(max(m, n))

c gives the update the RMS that AdamW's has, so that both take the same lr and decay.
`torch.optim.Muon` is that for 2-D parameters, and refuses others (torch 2.11 to 2.13): the stacked
experts are done here, with batched products. QK-Clip, the other half of MuonClip, is not here.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from transformers import TrainingArguments

MATRIX = re.compile(r"(_proj|_with_mqa|\.gate)\.weight$|\.(gate_up|down)_proj$|_flat_param$")
STACKED_ROWS = {"gate_up_proj": 2}  # matrices on top of each other in each one of a stack
COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # of torch.optim.Muon
BATCH = 64  # matrices at a time: 64 experts' gates of the release take 0.6 GB of fp32


def muon_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as groups for `MuonAdamW`, each in exactly one.

    Muon gets the weights of linear layers and of the router, `[m, n]`, and the stacked experts
    `[E, m, n]`, where a gate and the up matrix below it count as two. AdamW gets embeddings,
    `lm_head`, convolutions and LoRA factors; and norms, A_log and dt_bias, which do not decay.

    Args:
        model: may be wrapped (PEFT, DDP, FSDP 2).
        lr, weight_decay: of both rules; decay is decoupled.
        momentum: of Muon, with Nesterov's step.
        betas, eps: of AdamW.

    Raises:
        ValueError: a matrix that a wrapper (FSDP 1, DeepSpeed ZeRO 3) has flattened.
    """
    muon = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"betas": betas, "eps": eps}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = 0.0 if p.ndim < 2 or name.endswith("A_log") else weight_decay
        rule, options = "adamw", adamw
        if "lora_" not in name and MATRIX.search(name):
            if p.ndim not in (2, 3):
                raise ValueError(f"{name} has shape {list(p.shape)}, want [m, n] or [E, m, n]")
            rule, options, decay = "muon", muon, weight_decay
            if p.ndim == 3:
                rows = STACKED_ROWS.get(name.rpartition(".")[2], 1)
                rule, options = "muon_stack", muon | {"rows": rows}
        group = {"rule": rule, "lr": lr, "weight_decay": decay, **options}
        groups.setdefault(tuple(group.values()), group | {"params": []})["params"].append(p)
    return list(groups.values())


def orthogonalize(x: Tensor) -> Tensor:
    """`[E, m, n]` -> near the orthogonal factors, bf16: torch.optim.Muon's iteration, batched.

    torch.vmap of torch's own function splits each addmm, so that a product is rounded to bf16
    before it is added: twice as far from float64 as this one.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


class StackedMuon(Optimizer):
    """torch.optim.Muon for stacks of matrices `[E, rows m, n]`; groups as `muon_groups` has them.

    DTensors may be sharded by experts, which needs no communication.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    self._update(group, p, p.grad, self.state[p]["momentum_buffer"])

    @staticmethod
    def _update(group: dict[str, Any], *tensors: Tensor) -> None:
        p, grad, buffer = map(_own_matrices, tensors)
        shape = (-1, p.shape[1] // group["rows"], p.shape[2])
        parts = (p.view(shape), grad.reshape(shape), buffer.view(shape))
        lr, momentum = group["lr"], group["momentum"]
        for w, g, b in zip(*(x.split(BATCH) for x in parts), strict=True):
            b.lerp_(g, 1 - momentum)
            update = orthogonalize(g.lerp(b, momentum))
            w.mul_(1 - lr * group["weight_decay"])
            w.add_(update, alpha=-lr * 0.2 * math.sqrt(max(w.shape[1:])))


def _own_matrices(x: Tensor) -> Tensor:
    """The whole matrices of a stack that this rank has."""
    placements = getattr(x, "placements", ())
    if not all(p.is_replicate() or p.is_shard(0) for p in placements):
        raise ValueError(f"stacked experts are placed as {placements}, want whole ones: Shard(0)")
    return x.to_local() if placements else x  # pyright: ignore[reportAttributeAccessIssue]


class MuonAdamW(Optimizer):
    """One optimizer, with one state dict, of torch.optim.Muon, StackedMuon and torch.optim.AdamW.

        optimizer = MuonAdamW(muon_groups(model, lr=1e-3))

    Args:
        groups: of `muon_groups`; each one's `rule` says which of the three updates it.
    """

    RULES: dict[str, Callable] = {
        "muon": torch.optim.Muon,
        "muon_stack": StackedMuon,
        "adamw": torch.optim.AdamW,
    }

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends here
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Make the inner optimizers, which have this one's groups and states as their own."""
        self._inner = []
        for rule, kind in self.RULES.items():
            if groups := [g for g in self.param_groups if g["rule"] == rule]:
                self._inner.append(kind(groups))
                self._inner[-1].state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._inner:
            optimizer.step()
        return loss


def muon(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Muon and AdamW for a Trainer, with the lr, decay, betas and eps of its arguments.

        Trainer(model, args, optimizer_cls_and_kwargs=muon(args))

    The Trainer makes the optimizer once it has placed and wrapped the model. `optim` is not read.
    """
    options = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return _trainer_factory, options


def _trainer_factory() -> Callable[..., MuonAdamW]:
    """What a Trainer calls, to call the result with its model and the options."""
    return lambda model, **options: MuonAdamW(muon_groups(model, **options))
