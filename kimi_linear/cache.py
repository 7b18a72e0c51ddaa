"""What generation carries from one forward to the next: `KimiLinearCache`.

A KDA layer keeps two states of fixed size, the last W-1 inputs of its convolution and S [K, V] per
head. An MLA layer keeps one latent of `kv_lora_rank + qk_rope_head_dim` numbers per token. Padding
is never stored: row b holds its own `lengths[b]` tokens without gaps, wherever its padding was.

Latents may be kept in fp8. Then a token is seen rounded by every query, also by those that come
with it: what a model says does not depend on which tokens came in one forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from kimi_kernels import quantize_latents, store_latents
from kimi_kernels.latents import FP8, QuantizedLatents
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
    """The latents of one MLA layer, filled from the left.

    `keys` has them, `[B, capacity, R + P]`. With `fp8_rank`, which is R, they are in fp8
    (`kimi_kernels.quantize_latents`): `keys` has the bytes of c, `values` k_r, `scales` the scales.
    """

    def __init__(self, fp8_rank: int | None = None) -> None:
        super().__init__()
        self.fp8_rank = fp8_rank
        self.scales: Tensor | None = None
        self.length = 0  # columns in use; rows with padding use fewer
        self.planned = 0  # capacity to begin with
        self.shared = False  # whether a snapshot has these latents too

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states  # transformers' names
        self.device, self.is_initialized = key_states.device, True

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored, `[B, capacity, ...]` each; after the first token."""
        held = (self.keys, self.values, self.scales)
        return cast(tuple[Tensor, ...], held[:1] if self.fp8_rank is None else held)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Have these in their place."""
        tensors = tuple(tensors)
        if self.fp8_rank is None:
            self.lazy_initialization(tensors[0], tensors[0].new_empty(len(tensors[0]), 0))
        else:
            self.lazy_initialization(*tensors[:2])
            self.scales = tensors[2]
        self.dtype = tensors[min(1, len(tensors) - 1)].dtype  # of the model

    def reserve(self, batch: int, capacity: int) -> None:
        """Have room for `capacity` tokens per row. Grows by a constant factor."""
        old = self.tensors()
        room = old[0].shape[1]
        if capacity <= room and _writable(old[0]):
            return
        capacity = max(capacity, int(room * GROWTH), self.planned)
        new = [x.new_zeros(batch, capacity, *x.shape[2:]) for x in old]
        for x, y in zip(new, old, strict=True):
            x[:, : self.length] = y[:, : self.length]
        self.hold(new)
        self.shared = False

    def _to_store(self, latent: Tensor) -> tuple[Tensor, ...]:
        if self.fp8_rank is None:
            return (latent,)
        c, k_r, scale = quantize_latents(latent, self.fp8_rank)
        return c.view(torch.uint8), k_r, scale

    def _columns(self, end: int | None = None) -> Tensor | QuantizedLatents:
        """The first `end` columns, or the whole buffer."""
        held = [x[:, :end] for x in self.tensors()]
        if self.fp8_rank is None:
            return held[0]
        return QuantizedLatents(held[0].view(FP8), *held[1:])

    def seen(self, latent: Tensor) -> Tensor:
        """Latents as every query sees them, whether they have been stored or not.

        Their gradient is that of the latents before rounding.
        """
        if self.fp8_rank is None:
            return latent
        rounded = quantize_latents(latent, self.fp8_rank).dequantize()
        return rounded + (latent - latent.detach()) if torch.is_grad_enabled() else rounded

    def update(
        self, key_states: Tensor, layout: TokenLayout, norm: tuple[Tensor, float] | None = None
    ) -> Tensor | QuantizedLatents:
        """Store new latents `[b, t, R+P]`, as `layout` has them, and return all, `[B, S, R+P]`.

        Or the whole buffer, if the layout is static: then the RMSNorm of c may be left to this, by
        its weight and eps. `length` counts them when the forward is done.
        """
        B, T = layout.shape
        with torch.no_grad():
            start, end = self.length, self.length + T
            if not self.is_initialized:
                empty = self._to_store(key_states[:, :0])
                self.hold(x.new_empty(B, 0, *x.shape[2:]) for x in empty)
            elif key_states.dtype != self.dtype:
                raise ValueError(
                    f"past_key_values holds {self.dtype} latents, the new ones are "
                    f"{key_states.dtype}"
                )
            self.reserve(B, end)
            rows, columns = layout.slots or (None, layout.positions if layout.static else None)
            if columns is None:
                for x, new in zip(self.tensors(), self._to_store(key_states), strict=True):
                    x[:, start:end] = new
            else:
                tokens = key_states.flatten(0, 1)
                store_latents(tokens, self._columns(), rows, columns.flatten(), norm)
        stored = self._columns(None if layout.static else end)
        if layout.static or not torch.is_grad_enabled():
            return stored
        # gradients reach the new latents, and stop at the cached ones
        new = self.seen(key_states)
        if isinstance(stored, QuantizedLatents):
            stored = stored.dequantize()
        if layout.slots is None:
            return torch.cat((stored[:, :start], new), 1)
        return stored.index_put(layout.slots, new.flatten(0, 1))

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` columns."""
        self.length = length
        if self.shared:  # the rest is still a snapshot's
            self.hold(x[:, :length] for x in self.tensors())

    def reset(self) -> None:
        self.keys = self.values = self.scales = None
        self.is_initialized, self.length, self.shared = False, 0, False

    def snapshot(self) -> Self:
        """A copy that shares the latents, and would move on the first token after these."""
        layer = copy.copy(self)
        if layer.is_initialized:  # what follows may be another snapshot's
            layer.hold(x[:, : layer.length] for x in layer.tensors())
            layer.shared = self.shared = True
        return layer

    def select_rows(self, index: Tensor) -> None:
        """Make row i a copy of the old row `index[i]`."""
        if not self.is_initialized:
            return
        old = self.tensors()
        rows = [x[:, : self.length].index_select(0, index.to(x.device)) for x in old]
        if len(index) == len(old[0]) and not self.shared and _writable(old[0]):
            for x, y in zip(old, rows, strict=True):
                x[:, : self.length] = y
        else:
            self.hold(rows)
            self.shared = False
            self.reserve(len(index), old[0].shape[1])


class Snapshot(NamedTuple):
    """A point in a cache's life, from `KimiLinearCache.snapshot`."""

    layers: list[KDALayerCache | LatentLayerCache]
    seen: int
    lengths: Tensor | None
    kind: tuple[dict, torch.dtype | None]  # of the cache that it is of


class KimiLinearCache(Cache):
    """The cache of a Kimi Linear model, a transformers `Cache`.

    Args:
        config: of the model that will use it.
        latent_dtype: `torch.float8_e4m3fn`, or its name, to keep the latents in fp8 with a scale
            per token; None, the default: in the dtype of the model.

    `model(..., past_key_values=cache)` and `model.generate(..., past_key_values=cache)` extend it
    in place. `get_seq_length()` counts the columns seen, with padding; `lengths` the real tokens of
    each row, or it is None while no row had padding. What came into it in `torch.inference_mode` is
    continued without a gradient only; what came with `torch.no_grad`, also with one.

    Raises:
        ValueError: another `latent_dtype`.
    """

    def __init__(
        self, config: KimiLinearConfig, latent_dtype: torch.dtype | str | None = None
    ) -> None:
        if latent_dtype not in (None, FP8, "float8_e4m3fn"):
            raise ValueError(f"latent_dtype is {latent_dtype!r}, want None or {FP8}")
        self.latent_dtype = None if latent_dtype is None else FP8
        rank = None if latent_dtype is None else config.kv_lora_rank
        self.layers: list[KDALayerCache | LatentLayerCache]
        super().__init__(
            layers=[
                KDALayerCache() if kind == "linear_attention" else LatentLayerCache(rank)
                for kind in config.layer_types
            ]
        )
        self.signature = self._signature(config)
        self.seen = 0
        self.lengths: Tensor | None = None  # [B] int64 once a row had padding; None: all are `seen`
        self.graphs: DecodeGraphs | None = None  # `generate` captures its steps in them
        mixers = [i for i, layer in enumerate(self.layers) if isinstance(layer, KDALayerCache)]
        self.rollback = Rollback(mixers)

    @classmethod
    def configured(cls, config: KimiLinearConfig, generation_config: GenerationConfig) -> Self:
        """An empty one with the options in `generation_config.cache_config`."""
        options = generation_config.cache_config or {}
        if unknown := options.keys() - {"latent_dtype"}:
            raise ValueError(f"cache_config has {sorted(unknown)}, want latent_dtype alone")
        return cls(config, **options)

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
            if layer.is_initialized:
                layer.reserve(self.batch_size, self.seen + T)

    def tensors(self) -> list[Tensor]:
        """What a decode step reads and writes, by layer; after the first token."""
        found: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, LatentLayerCache):
                found.extend(layer.tensors())
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
        layers = [layer.snapshot() for layer in self.layers]
        return Snapshot(layers, self.seen, self.lengths, (self.signature, self.latent_dtype))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, exactly; it can be restored again later.

        Raises:
            ValueError: it is of a cache for another config, or with another `latent_dtype`.
        """
        if snapshot.kind != (self.signature, self.latent_dtype):
            raise ValueError(f"snapshot is of another kind of cache: {snapshot.kind}")
        self.rollback.drop()
        self.layers = [layer.snapshot() for layer in snapshot.layers]
        self.seen, self.lengths = snapshot.seen, snapshot.lengths

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs; `generate` does so while it checks drafted tokens.

        That is a copy of the KDA states, and of the released model 0.66 MB per token since the last
        crop. What comes in more than `RECORDED` tokens at once, as a prompt, is not recorded.
        """
        self.rollback.on = True

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last n tokens of every row; `tokens_to_remove` is -n, as transformers has it.

        They must have come since `activate_past_recording` and since the last crop, also one of 0.

        Raises:
            ValueError: they have not, or what came since then had padding or was too much.
        """
        n, record = -int(tokens_to_remove), self.rollback
        if n and not 0 < n <= record.count:
            raise ValueError(
                f"tokens_to_remove is {-n}, but a KDA state cannot forget tokens, "
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
