"""FSDP 2 (torch's `fully_shard`, by accelerate or Trainer): what stays in fp32 beside bf16 layers.

A unit of FSDP has one dtype: in mixed precision it gathers every parameter in bf16, A_log and
dt_bias too, and in a bf16 model it refuses these two, which are fp32. So they get units of their
own. Of 3 layers in 4 that is 8 K + H numbers, gathered beside a layer's tens of millions.
"""

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from kimi_linear.kda import ForgetGate


def shard_gates(model: nn.Module) -> nn.Module:
    """Give the forget gates of KDA units of FSDP 2 of their own, which no policy casts.

        args = TrainingArguments(..., bf16=True, fsdp=True, fsdp_config=...)  # starts the processes
        Trainer(shard_gates(model), args, ...).train()

    A_log and dt_bias are then gathered, reduced and updated in fp32, whatever the dtype of the
    layers around them. Call it on every rank after torch.distributed has started and before
    anything else is sharded. The router's bias needs nothing: a buffer is neither sharded nor cast.

    Args:
        model: one with KDA layers; may be wrapped by PEFT.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: torch.distributed has not started; no KDA layer; fewer heads than ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("model: torch.distributed has not started, want a call after it has")
    gates = [module for module in model.modules() if isinstance(module, ForgetGate)]
    if not gates:
        raise ValueError(f"model is a {type(model).__name__}, want one with KDA layers")
    heads, ranks = gates[0].A_log.numel(), dist.get_world_size()
    if heads < ranks:  # accelerate tells the parameters of an optimizer by their addresses
        raise ValueError(f"model has {heads} heads of KDA, want one at least for each of {ranks}")
    for gate in gates:
        fully_shard([gate.f_a_proj, gate.f_b_proj])
        # A_log is [1, 1, H, 1]
        fully_shard(gate, shard_placement_fn=lambda p: Shard(2) if p.ndim == 4 else Shard(0))
    return model
