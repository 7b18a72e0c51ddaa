"""What generation carries from one forward to the next: `KimiLinearCache`.

A KDA layer keeps two states of fixed size, the last W-1 inputs of its convolution and S [K, V] per
head. An
MLA layer keeps one latent of `kv_lora_rank + qk_rope_head_dim` numbers per token. Padding is never
stored: row b holds its own `lengths[b]` tokens without gaps, wherever its padding was.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.decode import DecodeGraphs
from kimi_linear.layout import TokenLayout
from kimi_linear.rollback import Rollback

GROWTH = 1.5  # of a full latent buffer; every token is then copied O(1) times


def _writable(x: Tensor) -> bool:
    """Whether x may be changed in place here."""
    return torch.is_inference_mode_enabled() or not x.is_inference()


def _stored(old: Tensor | None, new: Tensor) -> Tensor:
    """`new`, in the memory of `old` where that can be: a CUDA graph holds its address."""
    if old is None or torch.is_grad_enabled() or not _writable(old):
        return new.detach()
    same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return old.copy_(new) if same and old.is_contiguous() else new.detach()


class KDALayerCache(LinearAttentionCacheLayerMixin):
    """Conv state `[B, W-1, 3 H K]` and recurrent state S `[B, H, K, V]` of one KDA layer."""

    is_compileable = False

    def lazy_initialization(self, conv_states=None, recurrent_states=None, state_idx=0) -> None:
        """Replace one or both states."""
        if conv_states is not None:
            self.update_conv_state(conv_states, state_idx)
        if recurrent_states is not None:
            self.update_recurrent_state(recurrent_states, state_idx)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        self.conv_states[state_idx] = _stored(self.conv_states[state_idx], conv_states)
        self.is_conv_states_initialized[state_idx] = True
        self.device, self.dtype = conv_states.device, conv_states.dtype
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:
        old = self.recurrent_states[state_idx]
        self.recurrent_states[state_idx] = _stored(old, recurrent_states)
        self.is_recurrent_states_initialized[state_idx] = True
        self.has_previous_state[state_idx] = True
        return recurrent_states

    def snapshot(self) -> Self:
        """A copy with its own states: a decode step advances them in place."""
        layer = copy.copy(self)
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                own = {k: x.clone() if isinstance(x, Tensor) else x for k, x in value.items()}
                setattr(layer, name, own)
        return layer

    def states(self) -> tuple[Tensor | None, Tensor | None]:
        """The conv state and S, or None and None before the first token."""
        if not self.has_previous_state[0]:
            return None, None
        return self.conv_states[0], self.recurrent_states[0]

    def writable_states(self) -> tuple[Tensor, Tensor]:
        """The same, after the first token, to be advanced in place."""
        for states in (self.conv_states, self.recurrent_states):
            x = cast(Tensor, states[0])
            if not x.is_contiguous() or not _writable(x):
                states[0] = x.clone(memory_format=torch.contiguous_format)
        return cast(Tensor, self.conv_states[0]), cast(Tensor, self.recurrent_states[0])

    def select_rows(self, index: Tensor) -> None:
        """Make row i a copy of the old row `index[i]`."""
        for states in (self.conv_states, self.recurrent_states):
            if (x := states[0]) is not None:
                states[0] = _stored(x, x.index_select(0, index.to(x.device)))

    def reset(self) -> None:
        super().__init__()  # dropped, not zeroed: a snapshot may hold the tensors


class LatentLayerCache(CacheLayerMixin):
    """The latents of one MLA layer, `[B, capacity, R + P]`, filled from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0  # columns in use; rows with padding use fewer
        self.planned = 0  # capacity to begin with
        self.shared = False  # whether a snapshot has these latents too

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states  # transformers' names; values stays empty
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reserve(self, like: Tensor, batch: int, capacity: int) -> Tensor:
        """The buffer, with room for `capacity` tokens per row. Grows by a constant factor."""
        old = self.keys
        if old is not None:
            if like.dtype != old.dtype:
                raise ValueError(
                    f"past_key_values holds {old.dtype} latents, the new ones are {like.dtype}"
                )
            if capacity <= old.shape[1] and _writable(old):
                return old
            capacity = max(capacity, int(old.shape[1] * GROWTH))
        new = like.new_zeros(batch, max(capacity, self.planned), like.shape[-1])
        if old is not None:
            new[:, : self.length] = old[:, : self.length]
        self.lazy_initialization(new, new.new_empty(batch, 0))
        self.shared = False
        return new

    def update(self, key_states: Tensor, layout: TokenLayout) -> Tensor:
        """Store new latents `[b, t, R+P]`, as `layout` has them, and return all, `[B, S, R+P]`.

        Or the whole buffer, if the layout is static. `length` counts them when the forward is done.
        """
        B, T = layout.shape
        with torch.no_grad():
            start, end = self.length, self.length + T
            buffer = self.reserve(key_states, B, end)
            if layout.slots is None:
                buffer[:, start:end] = key_states
            else:
                buffer[layout.slots] = key_states.flatten(0, 1)
        if layout.static:
            return buffer
        if not torch.is_grad_enabled():
            return buffer[:, :end]
        # gradients reach the new latents, and stop at the cached ones
        if layout.slots is None:
            return torch.cat((buffer[:, :start], key_states), 1)
        return buffer[:, :end].index_put(layout.slots, key_states.flatten(0, 1))

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` columns."""
        self.length = length
        if self.shared:
            self.keys = cast(Tensor, self.keys)[:, :length]  # the rest is still a snapshot's

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.length, self.shared = False, 0, False

    def snapshot(self) -> Self:
        """A copy that shares the latents, and would move on the first token after these."""
        layer = copy.copy(self)
        if layer.keys is not None:
            layer.keys = layer.keys[:, : layer.length]  # what follows may be another snapshot's
            layer.shared = self.shared = True
        return layer

    def select_rows(self, index: Tensor) -> None:
        """Make row i a copy of the old row `index[i]`."""
        if self.keys is None:
            return
        rows = self.keys[:, : self.length].index_select(0, index.to(self.keys.device))
        if len(index) == len(self.keys) and not self.shared and _writable(self.keys):
            self.keys[:, : self.length] = rows
        else:
            capacity, self.keys = self.keys.shape[1], None
            self.reserve(rows, len(index), capacity)[:, : self.length] = rows


class Snapshot(NamedTuple):
    """A point in a cache's life, from `KimiLinearCache.snapshot`."""

    layers: list[KDALayerCache | LatentLayerCache]
    seen: int
    lengths: Tensor | None


class KimiLinearCache(Cache):
    """The cache of a Kimi Linear model, a transformers `Cache`.

    Args:
        config: of the model that will use it.

    `model(..., past_key_values=cache)` and `model.generate(..., past_key_values=cache)` extend it
    in place. `get_seq_length()` counts the columns seen, with padding; `lengths` the real tokens of
    each row.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        kinds = {"linear_attention": KDALayerCache, "full_attention": LatentLayerCache}
        self.layers: list[KDALayerCache | LatentLayerCache]
        super().__init__(layers=[kinds[kind]() for kind in config.layer_types])
        self.signature = self._signature(config)
        self.seen = 0
        self.lengths: Tensor | None = None  # [B] int64 once a row had padding; None: all are `seen`
        self.graphs: DecodeGraphs | None = None  # `generate` captures its steps in them
        mixers = [i for i, layer in enumerate(self.layers) if isinstance(layer, KDALayerCache)]
        self.rollback = Rollback(mixers)

    @staticmethod
    def _signature(config: KimiLinearConfig) -> dict:
        names = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        names += ("layer_types", "kv_lora_rank", "qk_rope_head_dim")
        return {name: getattr(config, name) for name in names}

    def check(self, config: KimiLinearConfig, batch: int) -> None:
        """Raise a `ValueError` unless this cache serves a model of `config` with `batch` rows."""
        for name, value in self._signature(config).items():
            if value != self.signature[name]:
                raise ValueError(
                    f"past_key_values was made for another config: its {name} is "
                    f"{self.signature[name]}, the model's is {value}"
                )
        if self.seen and batch != self.batch_size:
            raise ValueError(
                f"past_key_values holds {self.batch_size} sequences, but the input has {batch} rows"
            )

    @property
    def batch_size(self) -> int:
        """Rows in the cache, or -1 before the first token."""
        for layer in self.layers:
            x = layer.keys if isinstance(layer, LatentLayerCache) else layer.states()[1]
            if x is not None:
                return x.shape[0]
        return -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.seen

    def begin(self, T: int, whole: bool = True) -> None:
        """Before a forward of T columns: record for `crop`, unless some are padding (`whole`)."""
        self.rollback.begin(T, whole, self._mixers())

    def _mixers(self) -> list[KDALayerCache]:
        return [layer for layer in self.layers if isinstance(layer, KDALayerCache)]

    def _latents(self) -> list[LatentLayerCache]:
        return [layer for layer in self.layers if isinstance(layer, LatentLayerCache)]

    def advance(self, T: int, lengths: Tensor | None) -> None:
        """Count the T columns of a finished forward, after which rows have `lengths` tokens."""
        self.seen, self.lengths = self.seen + T, lengths
        if self.rollback.open:
            self.rollback.count += T
        for layer in self._latents():
            layer.length = self.seen

    def plan(self, capacity: int) -> None:
        """Make room for so many tokens per row with the first ones, so that nothing moves later."""
        for layer in self._latents():
            layer.planned = capacity

    def reserve(self, T: int) -> None:
        """Make room for T more columns now."""
        for layer in self._latents():
            if layer.keys is not None:
                layer.reserve(layer.keys, len(layer.keys), self.seen + T)

    def tensors(self) -> list[Tensor]:
        """What a decode step reads and writes, by layer; after the first token."""
        found: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, LatentLayerCache):
                found.append(cast(Tensor, layer.keys))
            else:
                found.extend(layer.writable_states())
        return found + self.rollback.tensors()

    def __getstate__(self) -> dict:
        """A copy has tensors of its own, and graphs of its own."""
        return self.__dict__ | {"graphs": None}

    def reset(self) -> None:
        super().reset()
        self.rollback.drop()
        self.seen, self.lengths = 0, None

    def _select_rows(self, index: Tensor) -> None:
        self.rollback.drop()
        for layer in self.layers:
            layer.select_rows(index)
        if self.lengths is not None:
            self.lengths = self.lengths[index.to(self.lengths.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the old row `beam_idx[i]` (beam search)."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times: one prefix, many continuations."""
        self._select_rows(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def snapshot(self) -> Snapshot:
        """Remember this point. Copies the states of the KDA layers, not the latents."""
        return Snapshot([layer.snapshot() for layer in self.layers], self.seen, self.lengths)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, exactly; it can be restored again later."""
        self.rollback.drop()
        self.layers = [layer.snapshot() for layer in snapshot.layers]
        self.seen, self.lengths = snapshot.seen, snapshot.lengths

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs; `generate` does so while it checks drafted tokens.

        That is a copy of the KDA states, and of the released model 0.66 MB per token since the last
        crop. What comes in more than `RECORDED` tokens at once, as a prompt, is not recorded.
        """
        self.rollback.on = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last n tokens of every row; `tokens_to_remove` is -n, as transformers has it.

        They must have come since `activate_past_recording` and since the last crop, also one of 0.

        Raises:
            ValueError: they have not, or what came since then had padding or was too much.
        """
        n, record = -tokens_to_remove, self.rollback
        if n and not 0 < n <= record.count:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, but a KDA state cannot forget tokens, "
                f"and {record.count} are recorded: take cache.snapshot() before them and restore() "
                "it, or call cache.activate_past_recording() and crop by a negative number"
            )
        if n and n == self.seen:
            self.reset()
        elif n:
            record.replay(record.count - n, self._mixers())
            self.advance(-n, None if self.lengths is None else self.lengths - n)
            for layer in self._latents():
                layer.truncate(self.seen)
        record.drop()

    def fork(self) -> KimiLinearCache:
        """An independent copy: both can go on, in different directions."""
        return copy.deepcopy(self)
