"""Going back by a few tokens: what `KimiLinearCache.crop` needs of the KDA layers.

S after a token does not tell S before it. A cache that records keeps the states before the first
token since the last crop, and what every token since then has brought to each KDA layer: q, k and v
before the convolution, f and b. `crop` starts from those states again with the tokens that stay.
Only the recurrence runs, of all layers in one `kda_step`: the heads of a layer are as independent
of each other as those of different layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from kimi_kernels import kda_step

if TYPE_CHECKING:
    from kimi_linear.cache import KDALayerCache

RECORDED = 256  # tokens at most; of the released model each takes 0.66 MB in all layers


def _stacked(layers: Sequence[KDALayerCache]) -> tuple[Tensor, Tensor]:
    """Copies of the states, conv states `[B, W-1, 3, L, H K]` and S `[B, L, H, K, V]`."""
    convs, states = zip(*(layer.writable_states() for layer in layers), strict=True)
    device = convs[0].device  # the first layer's: a model may lie on several
    conv = torch.stack([x.to(device).unflatten(-1, (3, -1)) for x in convs], 3)
    return conv, torch.stack([x.to(device) for x in states], 1)


class Rollback:
    """The record of a cache since its last crop. B rows, L KDA layers, C = 4 H K + H."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.index = {layer: i for i, layer in enumerate(layers)}
        self.weights: list[tuple[Tensor, ...]] = [()] * len(self.index)
        self.log: Tensor | None = None  # [L, B, capacity, C], what the tokens have brought
        self.slots: Tensor | None = None  # [RECORDED], where in it those of a forward go
        self.on = False
        self.drafts = False  # whether `generate` checks drafted tokens with it
        self.drop()

    def drop(self) -> None:
        """Forget what was recorded; its memory is used again."""
        self.states: tuple[Tensor, Tensor] | None = None  # None: there was no token before
        self.open, self.count, self.end = False, 0, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """For another cache of the same model: all but its weights."""
        new = object.__new__(type(self))
        for name, x in vars(self).items():
            if isinstance(x, Tensor | tuple):
                x = x.clone() if isinstance(x, Tensor) else tuple(y.clone() for y in x)
            setattr(new, name, list(x) if isinstance(x, list) else x)
        if not self.count:
            new.drop()
            new.log = None
        return new

    def begin(self, T: int, whole: bool, layers: Sequence[KDALayerCache]) -> None:
        """Before a forward of T tokens in every row; not `whole`: some of them are padding."""
        if self.count + T > RECORDED or not whole:
            self.drop()
        if not self.on or T > RECORDED or not whole:
            return
        with torch.inference_mode(False), torch.no_grad():
            if not self.open:
                seen = bool(layers) and layers[0].states()[1] is not None
                self.states, self.open = _stacked(layers) if seen else None, True
            self.end = self.count + T
            if self.slots is not None:
                torch.arange(self.count, self.count + RECORDED, out=self.slots)

    def fits(self, batch: int) -> bool:
        """Whether the forward that has begun needs no memory."""
        log = self.log
        room = log is not None and log.shape[1] == batch and self.end <= log.shape[2]
        return not self.index or (room and self.slots is not None)

    def tensors(self) -> list[Tensor]:
        """What a forward that records writes, and where it looks where to."""
        return [x for x in (self.log, self.slots) if self.on and x is not None]

    def write(
        self, layer: int, xs: Sequence[Tensor], f: Tensor, b: Tensor, weights: tuple[Tensor, ...]
    ) -> None:
        """What `kda_step` takes of new tokens, its arguments `xs`, `f` and `b`.

        `weights` are its `conv_weight`, `A_log` and `dt_bias`.
        """
        if not self.open:
            return
        if weights[0].is_meta:
            raise ValueError("a convolution is offloaded: its layer cannot record for cache.crop")
        i = self.index[layer]
        with torch.inference_mode(False), torch.no_grad():
            row = torch.cat((*xs, f.flatten(-2), b), -1)
            if i == 0:
                self._make_room(row)
            log, slots = cast(Tensor, self.log), cast(Tensor, self.slots)
            log[i].index_copy_(1, slots[: row.shape[1]], row.to(log.device))
            self.weights[i] = tuple(x.detach() for x in weights)

    def _make_room(self, row: Tensor) -> None:
        """For the forward to which `row` [B, T, C] of the first layer belongs."""
        log, (B, _, C) = self.log, row.shape
        if log is None or (log.shape[1], log.dtype) != (B, row.dtype) or self.end > log.shape[2]:
            new = row.new_empty(len(self.index), B, max(32, 1 << (self.end - 1).bit_length()), C)
            if log is not None and self.count:
                new[:, :, : self.count] = log[:, :, : self.count]
            self.log = new
        if self.slots is None:
            self.slots = torch.arange(self.count, self.count + RECORDED, device=row.device)

    def replay(self, kept: int, layers: Sequence[KDALayerCache]) -> None:
        """Put the layers into the states after `kept` of the tokens."""
        if not layers:
            return
        with torch.inference_mode(False), torch.no_grad():
            conv, S = self.states or [x.zero_() for x in _stacked(layers)]
            if kept:
                self._advance(conv, S, kept)
            for i, layer in enumerate(layers):
                device = layer.writable_states()[0].device
                layer.update_conv_state(conv[:, :, :, i].flatten(2).to(device))
                layer.update_recurrent_state(S[:, i].to(device))

    def _advance(self, conv: Tensor, S: Tensor, kept: int) -> None:
        """Stacked states by `kept` tokens, in place."""
        B, L, H, K, _ = S.shape
        rows = cast(Tensor, self.log)[:, :, :kept].permute(1, 2, 0, 3)  # [B, T, L, C]
        *xs, f, b = rows.split([H * K] * 4 + [H], -1)
        f = f.reshape(B, kept, L * H, K)
        weight, A_log, dt_bias = (
            [x.to(S.device) for x in group] for group in zip(*self.weights, strict=True)
        )
        weight = torch.stack([x.unflatten(0, (3, -1)) for x in weight], 1).flatten(0, 2)
        kda_step(
            [x.flatten(2) for x in xs], weight, conv.flatten(2), f, b.flatten(2),
            torch.cat(A_log), torch.cat(dt_bias), S.flatten(1, 2),
            f, f.new_ones(K),  # a gate and a norm, for an output that nobody reads
        )  # fmt: skip
