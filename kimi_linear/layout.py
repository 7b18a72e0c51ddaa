"""Which tokens of a batch are real, which belong together, and what each may see.

Padded batches and packed documents become the same thing before the first layer: one row of real
tokens, `[1, n, D]`, cut into sequences by `cu_seqlens`. No layer then ever sees a padding token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kimi_kernels.checks import count_sequences, sequence_bounds

if TYPE_CHECKING:
    from kimi_linear.context import ContextSpan

# what transformers' flattening collators add to say that a row is packed
PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
DECODE_TOKENS = 8  # new tokens up to which a forward after others is a decode step


@dataclass
class TokenLayout:
    """How a batch of B rows and T columns is laid out for the layers."""

    shape: tuple[int, int]  # B, T of the input
    cu_seqlens: Tensor | None = None  # [N+1]; None: B full rows
    index: Tensor | None = None  # [n] flat positions of the real tokens; None: all are real
    packed: bool = False  # several documents per row
    # row and column of each token in the latent cache; None: the next columns, or `positions`
    slots: tuple[Tensor, Tensor] | None = None
    positions: Tensor | None = (
        None  # [B, T] last latent each query sees; None: the usual causal order
    )
    lengths: Tensor | None = None  # [B] tokens per row after this forward; None: the same for all
    # MLA stores at `positions`, and attends to the whole latent buffer, whatever it is filled to
    static: bool = False
    context: ContextSpan | None = None  # these tokens are a span of a row over several processes

    @cached_property
    def host_seqlens(self) -> Tensor | None:
        """cu_seqlens for who needs its values on the host, which waits for a GPU only once."""
        return None if self.cu_seqlens is None else self.cu_seqlens.cpu()

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> what the layers work on: itself, or one row `[1, n, ...]`."""
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.index is None else x[self.index])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros where the padding was."""
        if self.cu_seqlens is None:
            return x
        B, T = self.shape
        if self.index is not None:
            x = x.new_zeros(B * T, *x.shape[2:]).index_copy(0, self.index, x[0])
        return x.view(B, T, *x.shape[2:] if self.index is None else x.shape[1:])


def plan_tokens(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    past: int,
    past_lengths: Tensor | None,
    static: bool = False,
) -> TokenLayout:
    """Check everything that says what the tokens of `x` [B, T, ...] are, and lay them out.

    Args:
        attention_mask: `[B, past + T]`, 1 for real tokens; its past part must say what the cache
        holds.
        position_ids: `[B, T]` (or `[1, T]`); a document starts wherever they do not increase.
        cu_seqlens: `[N+1]`, ends of the documents of one row; goes before `position_ids`.
        seq_idx: `[B, T]` (or `[1, T]`), number of the document of each token; likewise.
        past: columns in the cache; past_lengths: tokens per row, None if no row had padding.
        static: lay out a few tokens after others by `decode_layout`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    (B, T), device = x.shape[:2], x.device
    real, index, ragged = None, None, past_lengths is not None
    if attention_mask is not None:
        real = _real_tokens(attention_mask, B, T, past, past_lengths)
    for name, ids in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if ids is not None and (ids.ndim != 2 or ids.shape[0] not in (1, B) or ids.shape[1] != T):
            raise ValueError(f"{name} has shape {list(ids.shape)}, want [{B}, {T}]")

    layout = TokenLayout((B, T))
    if real is not None:
        index = layout.index = real.flatten().nonzero().squeeze(1)
        layout.cu_seqlens = _ends(real.sum(1))
    if cu_seqlens is not None:
        if real is not None:
            raise ValueError(
                "cu_seqlens packs documents, but attention_mask marks padding: want one"
            )
        count_sequences(cu_seqlens, x)
        layout.cu_seqlens, layout.packed = cu_seqlens, True
        sequence_bounds(cast(Tensor, layout.host_seqlens), x)  # ops do not look at values on a GPU
    elif T > 1 and (ids := position_ids if seq_idx is None else seq_idx) is not None:
        ids = ids.expand(B, T).flatten()
        rows = torch.arange(B, device=device).repeat_interleave(T)
        if index is not None:
            ids, rows = ids[index], rows[index]
        same_row = rows[1:] == rows[:-1]
        cut = ids[1:] != ids[:-1] if seq_idx is not None else ids[1:] <= ids[:-1]
        if (cut & same_row).any():
            starts = (cut | ~same_row).nonzero().squeeze(1) + 1
            ends = starts.new_tensor([0]), starts, starts.new_tensor([len(ids)])
            layout.cu_seqlens, layout.packed = torch.cat(ends), True
    if layout.packed:
        return layout

    if real is None and static and past and T <= DECODE_TOKENS:
        start = torch.full((B,), past, device=device) if past_lengths is None else past_lengths
        return decode_layout(B, T, start, ragged)
    if real is None and not ragged:
        return layout
    real = torch.ones(B, T, dtype=torch.bool, device=device) if real is None else real
    start = torch.full((B,), past, device=device) if past_lengths is None else past_lengths
    order = start[:, None] + real.cumsum(1) - 1  # [B, T] column of each real token in its row
    rows = torch.arange(B, device=device)[:, None].expand(B, T)
    layout.slots = rows[real], order[real]
    layout.positions = order.clamp(min=0) if past else None
    layout.lengths = start + real.sum(1)
    return layout


def packing_arguments(cu_seqlens: Tensor | None, kwargs: dict[str, Any]):
    """cu_seqlens and seq_idx out of a forward's arguments; nothing else may be in them."""
    given = [k for k, x in kwargs.items() if x is not None and x is not False]
    unknown = [k for k in given if k not in PACKING_KEYS]
    if unknown:
        raise ValueError(f"{unknown[0]} is not an argument of a Kimi Linear forward")
    q, k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    for name, other in (("cu_seq_lens_q", q), ("cu_seq_lens_k", k)):
        if other is None:
            continue
        if cu_seqlens is not None and not torch.equal(other.flatten(), cu_seqlens):
            raise ValueError(f"{name} differs from the other cumulative sequence lengths given")
        cu_seqlens = other.flatten()
    return cu_seqlens, kwargs.get("seq_idx")


def decode_layout(B: int, T: int, start: Tensor, ragged: bool) -> TokenLayout:
    """Of T tokens, none of them padding, after `start` [B] in each row.

    Everything is a function of `start` on its device, so that a CUDA graph can hold it.
    """
    positions = start[:, None]  # of one token without a launch
    if T > 1:
        positions = positions + torch.arange(T, device=start.device)
    lengths = start + T if ragged else None
    return TokenLayout((B, T), positions=positions, lengths=lengths, static=True)


def _ends(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _real_tokens(mask: Tensor, B: int, T: int, past: int, past_lengths: Tensor | None):
    """The new columns of the mask as bool `[B, T]`, or None if every new token is real."""
    if mask.ndim != 2 or tuple(mask.shape) != (B, past + T):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, want [batch, past + new tokens], "
            f"[{B}, {past + T}], with 1 for tokens and 0 for padding"
        )
    real = mask.bool()
    known = (real[:, :past].sum(1) == (past if past_lengths is None else past_lengths)).all()
    checks = known, real[:, past:].all(), (real == mask).all()
    known, full, binary = torch.stack(checks).tolist()
    if not binary:
        raise ValueError(
            "attention_mask has other values than 1 for tokens and 0 for padding; the numbers of "
            "packed documents go into seq_idx"
        )
    if not known:
        raise ValueError(
            "attention_mask marks other past tokens as padding than those in past_key_values: "
            "what a KDA state has seen cannot be masked out later"
        )
    return None if full else real[:, past:]
