"""Released checkpoint names and shapes <-> the modules in memory.

transformers' own conversion for model type `kimi_linear` does the renaming and stacking, since our
modules carry the names of its native model. Two things it lacks are here: saving the dense first
layer under the name that the release uses, and an error that names every tensor that is missing or
has the wrong shape.
"""

import os
import re
from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.distributed.fsdp import is_fsdp_enabled

SHOWN = 8  # tensor names per kind of error
MOE_PARTS = ("gate", "experts", "shared_experts")
NATIVE_DENSE = re.compile(r"\.block_sparse_moe\.((?:gate|up|down)_proj)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.w([123])\.")


def released_conversions() -> list[WeightConverter | WeightRenaming]:
    """The conversions of transformers' native model, made reversible.

    It renames `block_sparse_moe` to `mlp`; the reverse of that would also catch the dense layers,
    whose released name is `mlp`. Naming the parts of an MoE layer leaves them alone.
    """
    conversions = get_checkpoint_conversion_mapping("kimi_linear") or []
    names = [c.source_patterns for c in conversions]
    at = names.index([r"\.block_sparse_moe\."])
    conversions[at : at + 1] = [
        WeightRenaming(rf"\.block_sparse_moe\.{part}\.", rf"\.mlp\.{part}\.") for part in MOE_PARTS
    ]
    return conversions


def released_sources(model: PreTrainedModel) -> dict[str, dict[str, torch.Size]]:
    """For every tensor in memory, the names and shapes of the released tensors it is made of."""
    state = {name: x.to("meta") for name, x in model.state_dict().items()}
    return {
        name: {n: t.shape for n, t in revert_weight_conversion(model, {name: x}).items()}
        for name, x in state.items()
    }


def _part(x: Tensor, name: str) -> Tensor:
    """The part of the stacked tensor `x` that the released tensor `name` is."""
    if match := EXPERT.search(name):
        expert, which = x[int(match[1])], match[2]
        return expert if which == "2" else expert.chunk(2)["13".index(which)]
    return x.chunk(3)["qkv".index(name.split(".")[-2][0])]


def in_memory(
    model: PreTrainedModel, state: Mapping[str, Tensor], strict: bool
) -> Mapping[str, Tensor]:
    """`state` with released tensors renamed and stacked as the modules have them.

    One shard of a checkpoint may hold a part of a stacked tensor; the rest is then the model's own,
    unless `strict`.

    Raises:
        ValueError: a part of a stacked tensor has a wrong shape, or is missing where `strict`.
    """
    own, new = model.state_dict(), dict(state)
    if new.keys() <= own.keys():
        return state
    for name in state:
        if (plain := NATIVE_DENSE.sub(r".mlp.\1.", name)) in own:
            new[plain] = new.pop(name)
    for param, sources in released_sources(model).items():
        parts = {name: new.pop(name) for name in sources if name != param and name in new}
        if len(sources) == 1:
            new.update((param, x) for x in parts.values())
        elif parts:
            missing = [name for name in sources if name not in parts]
            if missing and strict:
                raise ValueError(f"the state dict lacks {_some(missing)}")
            first = next(iter(parts.values()))
            stack = own[param].clone() if missing else first.new_empty(own[param].shape)
            for name, x in parts.items():
                if x.shape != sources[name]:
                    shapes = f"{list(x.shape)}, want {list(sources[name])}"
                    raise ValueError(f"{name} has shape {shapes}")
                _part(stack, name).copy_(x)
            new[param] = stack
    return new


def _some(tensors: list[str]) -> str:
    return "; ".join(tensors[:SHOWN] + ["..."][: len(tensors) > SHOWN])


def _shapes(files: Iterable[str]) -> dict[str, torch.Size]:
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as f:
            names = f.keys()
            shapes.update((name, torch.Size(f.get_slice(name).get_shape())) for name in names)
    return shapes


def check_placement(model: PreTrainedModel) -> None:
    """Refuse what transformers (5.17 to 5.23) loads wrongly, its native model included.

    Raises:
        ValueError: layers are split between processes, the merged convolutions are sharded, or
            accelerate's FSDP 2 wants to send the weights of rank 0 to the others.
    """
    if is_fsdp_enabled() and os.environ.get("FSDP_VERSION") == "2":
        raise ValueError(
            "FSDP_CPU_RAM_EFFICIENT_LOADING is true: accelerate (1.15) sends no buffers from rank "
            "0 to the others, and routers have one each. Want fsdp_cpu_ram_efficient_loading: false"
        )
    if hasattr(model, "_pp_stage"):
        raise ValueError("distributed_config.pp_size: pipeline parallelism is not supported")
    for name, x in model.named_parameters():
        if name.endswith("conv1d.weight") and hasattr(x, "placements"):
            raise ValueError(
                "distributed_config.fsdp_size: transformers would shard q_conv1d, k_conv1d and "
                f"v_conv1d before it merges them, and mix up their channels in {name}. "
                "Load without it and shard afterwards, as Trainer does with accelerate's FSDP"
            )


def check_checkpoint(
    model: PreTrainedModel,
    files: list[str] | None,
    state_dict: dict[str, Tensor] | None,
    any_shape: bool,
) -> None:
    """Compare a checkpoint with what `model` needs, before anything is loaded.

    Reads safetensors headers only. Tensors may carry released names, the names in memory, or what
    transformers' native model calls the dense layers when it saves them.

    Raises:
        ValueError: names the tensors that are missing, have a wrong shape (unless `any_shape`), or
            belong to experts that the config does not have.
    """
    if state_dict is not None:
        found = {k: x.shape for k, x in state_dict.items()}
    elif files and all(f.endswith(".safetensors") for f in files):
        found = _shapes(files)
    else:
        return
    prefix = f"{model.base_model_prefix}."
    is_base = not hasattr(model, model.base_model_prefix)
    names = {}  # as released -> as found
    for name in found:
        plain = NATIVE_DENSE.sub(r".mlp.\1.", name)
        if is_base:
            plain = plain.removeprefix(prefix)
        elif not plain.startswith((prefix, "lm_head.")):
            plain = prefix + plain
        names[plain] = name

    missing, wrong, used = [], [], set()
    tied = getattr(model, "all_tied_weights_keys", {})
    for param, sources in released_sources(model).items():
        if param in names:
            sources = {param: model.state_dict()[param].shape}
        used.update(sources)
        for name, shape in sources.items():
            if name not in names:
                missing += [] if param in tied else [name]
            elif found[names[name]] != shape and not any_shape:
                wrong.append(f"{names[name]} {list(found[names[name]])}, want {list(shape)}")
    extra = [names[n] for n in names if n not in used and EXPERT.search(n)]
    problems = [
        f"{what} {len(tensors)} tensor(s): {_some(tensors)}"
        for what, tensors in (
            ("it lacks", missing),
            ("wrong shape in", wrong),
            ("its config has no place for", extra),
        )
        if tensors
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the config: " + ". ".join(problems))
