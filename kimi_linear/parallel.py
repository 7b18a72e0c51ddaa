"""Expert parallelism: each process holds its share of every layer's experts, whole.

The plan is transformers' own. All processes run the same batch through all layers, each with the
experts it has, and one all-reduce per layer of experts sums the outputs:

    rank r of n has the experts r E/n .. (r+1) E/n - 1     E is a multiple of n
    y_r = sum of w_e expert_e(x) over those of rank r      an expert elsewhere adds nothing to y_r
    y   = sum_r y_r                                        [T, D], all-reduced
    dx  = sum_r dx_r,  dw = sum_r dw_r                     [T, D] and [T, top_k], all-reduced

All else is computed alike on every rank, so gradients need no other communication: those of an
expert's weights are on the rank that has it, all others are whole and equal on every rank.
"""

import os

from transformers.distributed.configuration_utils import DistributedConfig

FIELDS = DistributedConfig.__dataclass_fields__


def expert_parallel(ranks: int | None = None) -> DistributedConfig:
    """What `from_pretrained` takes as `distributed_config` to split the experts over processes.

        model = KimiLinearForCausalLM.from_pretrained(path, distributed_config=expert_parallel())

    Each process reads its own experts from the checkpoint, and all else. `save_pretrained`, called
    on every rank, writes the whole model.

    Args:
        ranks: the processes; by default all that torchrun started.

    Raises:
        ValueError: by `from_pretrained`: the number of experts is not a multiple of `ranks`.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    if "ep_size" not in FIELDS:  # transformers 5.17 and 5.18
        return DistributedConfig(tp_size=ranks, enable_expert_parallel=True)
    if "ep_implementation" not in FIELDS:
        # 5.19 to 5.22, whose default is an all-to-all. 5.19 splits feed-forwards and head as well.
        plan = {
            "model.layers.*.mlp.gate": "ep_router",
            "model.layers.*.mlp.experts": "moe_tp_experts",
        }
        return DistributedConfig(tp_size=ranks, tp_plan={}, ep_size=ranks, ep_plan=plan)
    return DistributedConfig(
        tp_size=ranks, tp_plan={}, ep_size=ranks, ep_implementation="all_reduce"
    )
