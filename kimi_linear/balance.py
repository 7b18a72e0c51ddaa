"""Load balancing of the experts in training: metrics, the bias update, and freezing the router.

With c_i the tokens that chose expert i of a layer in one optimizer step, over all accumulated
batches and all ranks, and m the mean of c over the E experts (arXiv 2408.15664):

    MaxVio = (max_i c_i - m) / m                     0 for even loads, E / top_k - 1 at worst
    b_i   += rate sign(m - c_i)                      mode "sign", the paper's algorithm 1
    b_i   += rate (m - c_i) / m                      mode "proportional", relative to the mean

b is `e_score_correction_bias`. It moves the choice and not the weights, has no gradient, and is
saved with the model. The rest of the file counts c where the model runs, without a host sync. The
auxiliary loss, which does have a gradient, is `kimi_linear.moe.sequence_balance_loss`.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from kimi_linear.modeling_kimi_linear import KimiLinearModel
from kimi_linear.moe import KimiLinearTopkRouter

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

MODES = ("sign", "proportional")


def expert_routers(model: nn.Module) -> dict[int, KimiLinearTopkRouter]:
    """The router of each layer that has experts, by layer, counted from 0 as in `model.layers`.

    `model` may be wrapped (PEFT, DDP, FSDP). Of a router that PEFT copied, the copy is meant.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for decoder in model.modules():
        if isinstance(decoder, KimiLinearModel):
            for i, layer in enumerate(decoder.layers):
                routers = [m for m in layer.modules() if isinstance(m, KimiLinearTopkRouter)]
                if routers:
                    found[i] = routers[-1]
    if not found:
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(
            f"model is a {kind}, want one of kimi_linear with experts: import kimi_linear before "
            "AutoModelForCausalLM.from_pretrained"
        )
    return found


def freeze_router(model: nn.Module, frozen: bool = True) -> None:
    """Stop training the routers: `gate.weight` gets no gradient, the bias no update.

    A router is frozen when its weight takes no gradient, so those under a LoRA adapter, which would
    not be saved with it, are frozen too. `frozen=False` lets both be trained again.

    Raises:
        ValueError: the model has no experts.
    """
    for router in expert_routers(model).values():
        router.weight.requires_grad_(not frozen)
        router.weight.grad = None


def count_tokens(model: nn.Module, enabled: bool = True) -> None:
    """Let every router count the tokens of each expert from 0 on, or stop counting.

    Counted are forwards in training mode, also without gradients. Padding never reaches a router,
    and what gradient checkpointing runs twice counts once.

    Raises:
        ValueError: the model has no experts.
    """
    for router in expert_routers(model).values():
        if not enabled:
            router.counts = None
        elif router.counts is None:
            router.counts = torch.zeros_like(router.e_score_correction_bias, dtype=torch.int64)
        else:
            router.counts.zero_()


def take_counts(model: nn.Module) -> Tensor:
    """Tokens per expert since `count_tokens` or the last call, `[layers, E]` int64; restarts at 0.

    Summed over the ranks if torch.distributed runs, so each of them must call it. A batch that
    several ranks run together (`kimi_linear.parallel`) counts once.

    Raises:
        ValueError: the model has no experts, or does not count.
    """
    counts = [router.counts for router in expert_routers(model).values()]
    own = [c for c in counts if c is not None]
    if len(own) < len(counts):
        raise ValueError("model does not count tokens: want a call of count_tokens(model) before")
    total = torch.stack([c.to(own[0].device) for c in own])
    for c in own:
        c.zero_()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total //= max(getattr(m, "_tp_size", None) or 1 for m in model.modules())
    return total


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio = (max_i c_i - m) / m of `counts` `[..., E]`: fp64 `[...]`, and 0 without tokens."""
    c = counts.double()
    mean = c.mean(-1)
    return (c.amax(-1) - mean) / mean.clamp_min(1e-300)


def bias_step(counts: Tensor, rate: float, mode: str = "sign") -> Tensor:
    """What `counts` `[..., E]` add to the bias: fp32 of the same shape, 0 without tokens.

    The equations are at the top of this file. c_i is compared with m as E c_i with sum_j c_j, in
    integers: an expert exactly at the mean does not move.

    Raises:
        ValueError: a wrong rate or mode.
    """
    _check_rule(rate, mode)
    total = counts.sum(-1, keepdim=True)
    gap = total - counts.shape[-1] * counts  # E (m - c)
    if mode == "sign":
        return rate * gap.sign().float()
    return (rate * (gap.double() / total.clamp_min(1))).float()


@torch.no_grad()
def update_biases(model: nn.Module, counts: Tensor, rate: float, mode: str = "sign") -> None:
    """Add `bias_step` of `counts` `[layers, E]` to the biases of the routers not frozen.

    Raises:
        ValueError: a wrong rate, mode or shape, or a bias in less than fp32.
    """
    routers = expert_routers(model)
    shape = [len(routers), next(iter(routers.values())).num_experts]
    if list(counts.shape) != shape:
        raise ValueError(f"counts has shape {list(counts.shape)}, want {shape}")
    for step, (i, router) in zip(bias_step(counts, rate, mode), routers.items(), strict=True):
        bias = router.e_score_correction_bias
        if router.weight.requires_grad:
            _check_dtype(i, bias)
            bias.add_(step.to(bias.device))


class LoadBalancingCallback(TrainerCallback):
    """Balances the experts by their correction biases while a Trainer trains, and logs their loads.

        trainer = Trainer(model, args, callbacks=[LoadBalancingCallback(rate=1e-3)])

    Once per optimizer step the tokens of its accumulated batches are counted over all ranks, and
    each bias takes one step (module docstring). Evaluation does not count, nor does anything else
    outside the steps. Biases of frozen routers stay (`freeze_router`).

    Each log of the Trainer with a `loss` gets, over the optimizer steps since the log before:

        moe/max_vio          MaxVio, mean over layers and steps
        moe/max_vio_worst    MaxVio, mean over steps, of the layer where it is largest
        moe/min_load         tokens of the least loaded expert of any layer, relative to the mean
        moe/idle_experts     share of the experts that got no token
        moe/bias_range       largest - smallest bias, of the layer where that is largest
        moe/max_vio/layer_3  MaxVio of layer 3, mean over steps; with `per_layer`
        moe/aux_loss         the auxiliary loss before its coefficient, mean over batches; if in use

    The loads that a log is made of are then in `tokens_per_expert`. Only then does the host wait
    for the device. A Trainer calls the callbacks of `report_to` before those it is given, so they
    do not see these values, but console and `state.log_history` do; `attach(trainer)` instead of
    `callbacks=` puts this one in front of all.

    Args:
        rate: of the update; 0 only measures.
        mode: `"sign"` or `"proportional"`.
        per_layer: also log MaxVio of each layer.

    Raises:
        ValueError: a wrong argument; at the start of training, a model without experts or with a
            bias in less than fp32.
    """

    def __init__(self, rate: float = 1e-3, mode: str = "sign", *, per_layer: bool = False) -> None:
        _check_rule(rate, mode)
        if type(per_layer) is not bool:
            raise ValueError(f"per_layer is {per_layer!r}, want True or False")
        self.rate, self.mode, self.per_layer = rate, mode, per_layer
        self.tokens_per_expert: dict[int, Tensor] = {}  # layer -> [E] int64, on the CPU
        self._hooks: list[Any] = []
        self._forget()

    def attach(self, trainer: "Trainer") -> "LoadBalancingCallback":
        """Add this callback in front of those that `trainer` has; returns itself."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def _forget(self) -> None:
        self._steps = 0
        self._loads: Tensor | None = None  # [layers, E] tokens since the last log
        self._vio: Tensor | None = None  # [layers] sum of MaxVio over steps
        self._aux: Tensor | None = None  # sum of the auxiliary loss and number of batches, [2]

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs) -> None:
        routers = expert_routers(model)
        for i, router in routers.items():
            _check_dtype(i, router.e_score_correction_bias)
        if self.rate > 0 and not any(r.weight.requires_grad for r in routers.values()):
            logger.warning(
                f"LoadBalancingCallback(rate={self.rate}) only measures: every router is frozen"
            )
        self._forget()
        self._close()
        count_tokens(model)
        self._hooks = [
            m.register_forward_hook(self._note_aux_loss)
            for m in model.modules()
            if isinstance(m, KimiLinearModel)
        ]

    def _close(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _note_aux_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        if (aux := getattr(output, "aux_loss", None)) is not None:
            pair = torch.stack((aux.detach(), torch.ones_like(aux)))
            self._aux = pair if self._aux is None else self._aux + pair

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs) -> None:
        count_tokens(model)  # from 0: what ran between the steps is no training

    def on_optimizer_step(self, args, state, control, model: Any = None, **kwargs) -> None:
        counts = take_counts(model)
        vio = max_violation(counts)
        self._loads = counts if self._loads is None else self._loads + counts
        self._vio = vio if self._vio is None else self._vio + vio
        self._steps += 1
        if self.rate > 0:
            update_biases(model, counts, self.rate, self.mode)

    def on_log(self, args, state, control, model: Any = None, logs: Any = None, **kwargs) -> None:
        if logs is None or "loss" not in logs or self._loads is None or self._vio is None:
            return
        routers = expert_routers(model)
        metrics = self._metrics(routers, self._loads, self._vio)
        logs.update(metrics)
        if state.log_history and "loss" in state.log_history[-1]:  # made from `logs` just before
            state.log_history[-1].update(metrics)
        self._forget()

    def _metrics(
        self, routers: dict[int, KimiLinearTopkRouter], loads: Tensor, vio: Tensor
    ) -> dict[str, float]:
        """The values to log, with one copy to the host for the scalars and one for the loads."""
        device, vio, aux = loads.device, vio / self._steps, self._aux
        if aux is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(aux)
        biases = torch.stack([r.e_score_correction_bias.to(device) for r in routers.values()])
        relative = loads.double() / loads.double().mean(-1, keepdim=True).clamp_min(1e-300)
        values = {
            "moe/max_vio": vio.mean(),
            "moe/max_vio_worst": vio.max(),
            "moe/min_load": relative.min(),
            "moe/idle_experts": (loads == 0).double().mean(),
            "moe/bias_range": (biases.amax(-1) - biases.amin(-1)).max(),
        }
        if self.per_layer:
            values |= {f"moe/max_vio/layer_{i}": x for i, x in zip(routers, vio, strict=True)}
        if aux is not None:
            values["moe/aux_loss"] = aux[0] / aux[1]
        numbers = torch.stack([x.to(device).double() for x in values.values()]).tolist()
        self.tokens_per_expert = dict(zip(routers, loads.cpu(), strict=True))
        return dict(zip(values, numbers, strict=True))

    def on_train_end(self, args, state, control, model: Any = None, **kwargs) -> None:
        count_tokens(model, enabled=False)
        self._close()


def _check_rule(rate: float, mode: str) -> None:
    if type(rate) not in (int, float) or not 0 <= rate < math.inf:
        raise ValueError(f"rate is {rate!r}, want a finite number not below 0")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, want 'sign' or 'proportional'")


def _check_dtype(layer: int, bias: Tensor) -> None:
    if bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"e_score_correction_bias of layer {layer} is {bias.dtype}, want float32: steps of the "
            "size of rate are lost in less. from_pretrained keeps it in float32 under any dtype"
        )
