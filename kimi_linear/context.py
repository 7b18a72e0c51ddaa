"""Context parallelism: each process holds a span of a row of documents, and the whole model.

The ranks of a group cut one packed row of T tokens into spans of equal length (to one token), in
order. Only what one token takes from those before it crosses a border, and only where a document
does. With h the part of a rank's span that continues a document of the ranks before:

    convolution   the last W-1 inputs of the document before the border
    KDA           what a span makes of the state is S -> P S + R (per head, [K, K] and [K, V]).
                  All ranks compute P and R at once, gather them, and apply those before them in
                  order to S = 0. One run of the op gives P, R and the outputs of h: its columns of
                  S do not mix, so it runs on K + V value channels, from S = [1 | 0] with values
                  [0 | v], and returns [P | R] and outputs [o_P | o_R]:
                      o_t = o_P,t S + o_R,t        for the S before the span
    MLA           the latents of the document before the border. If the row is one document: those
                  of all ranks, and the queries of the second half of each span, which rank i
                  leaves to rank n-1-i, for all to have as much of the causal work
    loss          sums over all tokens, and the number of labels

Each gather is differentiable: its gradient goes to the rank that sent, which sums what it gets. So
every rank gets the gradients of the parameters that its own tokens cause, from the loss of the
whole, times the number of ranks: as in data parallelism, their mean over the ranks is the gradient.
"""

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_kernels import fused_kda, latent_attention
from kimi_kernels.checks import accumulation_dtype
from kimi_linear.layout import PACKING_KEYS, TokenLayout, packing_arguments, plan_tokens
from kimi_linear.loss import keeps_all

Group = dist.ProcessGroup | None
IGNORED = -100  # the label of a token that nothing predicts


def shard_sequence(batch: Mapping[str, Any], group: Group = None) -> dict[str, Any]:
    """This rank's span of a batch that every rank of `group` has whole, for the model's forward.

        loss = model(**shard_sequence({"input_ids": ids, "labels": ids})).loss
        loss.backward()  # on every rank

    The loss is that of the whole batch, on every rank. The mean of a parameter's gradients over the
    ranks is its gradient: DDP and FSDP take it, a loop of one's own all-reduces. Logits, hidden
    states and router logits are those of the span, `[1, t, ...]`. Ids and ends of documents are
    compared between the ranks; labels and embeddings are not.

    Args:
        batch: arguments of `KimiLinearForCausalLM.forward`, without a cache. Its rows become one:
            padding is taken out, rows and packed documents follow one another. `labels` are shifted
            before the cut: the last token of a span predicts the first of the next. After padding
            that of the first token is -100, as nothing predicts it. What does not describe the row
            stays as it is.
        group: the processes that share the row; by default all. With DDP a group of its own
            (`torch.distributed.new_group`): DDP sends gradients while the layers send theirs.

    Returns:
        `batch` with `input_ids` or `inputs_embeds`, `labels` and `shift_labels` `[1, t]` of the
        span, and `context`, by which the model knows the rest.

    Raises:
        ValueError: an argument that does not fit, fewer tokens than ranks, a process that is not in
            the group, or ids or ends of documents that differ between the ranks.
    """
    batch = {k: x for k, x in batch.items() if x is not None}
    for name in ("past_key_values", "use_cache"):
        if batch.get(name):
            raise ValueError(f"{name} is given, but a span of a sequence cannot fill a cache")
    if not keeps_all(batch.get("logits_to_keep", 0)):
        raise ValueError("logits_to_keep is given, but a span has the logits of its own tokens")
    names = [name for name in ("input_ids", "inputs_embeds") if name in batch]
    if len(names) != 1:
        raise ValueError(f"input_ids or inputs_embeds: want one of them, got {names}")
    name, x = names[0], batch[names[0]]
    if x.ndim != (2 if name == "input_ids" else 3) or not x.shape[0] * x.shape[1]:
        raise ValueError(f"{name} has shape {list(x.shape)}, want [batch, tokens, ...], not empty")
    mask, ids, cu_seqlens = (
        batch.pop(k, None) for k in ("attention_mask", "position_ids", "cu_seqlens")
    )
    packing = {k: batch.pop(k) for k in PACKING_KEYS if k in batch}
    layout = plan_tokens(x, mask, ids, *packing_arguments(cu_seqlens, packing), 0, None)
    if layout.cu_seqlens is None:
        B, T = layout.shape
        layout.cu_seqlens = torch.arange(0, B * T + 1, T, device=x.device)
    row = layout.pack(x)
    context = ContextSpan(row, layout.cu_seqlens, group)
    batch |= {name: context.cut(row), "context": context}
    ignored = batch.get("ignore_index", IGNORED)
    for name in ("labels", "shift_labels"):
        if name in batch and batch[name].shape != layout.shape:
            shapes = list(batch[name].shape), list(layout.shape)
            raise ValueError(f"{name} has shape {shapes[0]}, want {shapes[1]}")
    if "labels" in batch and "shift_labels" not in batch:
        batch["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=ignored)
    for name in ("labels", "shift_labels"):
        if name in batch:
            row = layout.pack(batch[name])
            if name == "shift_labels" and row.ne(ignored).sum() < batch[name].ne(ignored).sum():
                raise ValueError(
                    f"labels: padding is to predict a token, want {ignored} for the first token "
                    "after padding"
                )
            batch[name] = context.cut(row)
    return batch


class ContextSpan:
    """Where the span of this rank lies in a row, and what its layers take from the ranks before.

    Args:
        row: `[1, T, ...]`, ids or embeddings of the whole row.
        cu_seqlens: ends of its documents, `[N+1]`.
        group: the processes that share it.

    Raises:
        ValueError: as `shard_sequence` has it.
    """

    def __init__(self, row: Tensor, cu_seqlens: Tensor, group: Group = None) -> None:
        self.cu_seqlens, self.group = cu_seqlens, group
        self.rank, n = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"group has other processes, want process {dist.get_rank()} in it")
        self._check_same(row, n)
        ends, T = cu_seqlens.tolist(), row.shape[1]
        if n > T:
            raise ValueError(f"input_ids has {T} tokens, want at least one for each of {n} ranks")
        borders = [T * i // n for i in range(n + 1)]
        self.start, self.stop = borders[self.rank : self.rank + 2]
        # of each rank the tokens of the document that goes on behind its span; 0 if none does
        self.tails = [_tail(ends, a, b) for a, b in itertools.pairwise(borders)]
        first = self.rank
        while first and self.tails[first - 1]:
            first -= 1
            if self.tails[first] < borders[first + 1] - borders[first]:
                break
        self.before = range(first, self.rank)  # ranks with a part of this one's first document
        cuts = [e for e in sorted(set(ends)) if self.start < e < self.stop]
        cuts = [c - self.start for c in (self.start, *cuts, self.stop)]
        self.head = cuts[1] if self.before else 0  # tokens that continue that document
        self.documents = _bounds(cuts, row.device)
        rest = cuts[1:] if self.head else cuts
        self.rest = _bounds([c - self.head for c in rest], row.device)  # those after the head
        self.borders, self.middles = borders, None  # middles of spans, where MLA's work is shared
        if len(set(ends)) == 2 and 2 * n <= T:
            self.middles = [(a + b) // 2 for a, b in itertools.pairwise(borders)]

    def _check_same(self, row: Tensor, n: int) -> None:
        numbers = [self.cu_seqlens] if row.is_floating_point() else [self.cu_seqlens, row[0]]
        sums = [(x.long() * torch.arange(1, len(x) + 1, device=x.device)).sum() for x in numbers]
        mine = torch.stack(sums)
        theirs = [torch.empty_like(mine) for _ in range(n)]
        dist.all_gather(theirs, mine, group=self.group)
        if any(not torch.equal(x, mine) for x in theirs):
            raise ValueError("input_ids differs between the ranks, want the whole batch on each")

    def layout(self, x: Tensor, *described: Tensor | None) -> TokenLayout:
        """Of the span `x` [1, t, ...], for the layers.

        Raises:
            ValueError: another length, or something else that says what the tokens are.
        """
        shape = 1, self.stop - self.start
        if tuple(x.shape[:2]) != shape:
            raise ValueError(f"context is of [1, {shape[1]}] tokens, input_ids {list(x.shape[:2])}")
        if any(other is not None for other in described):
            raise ValueError(
                "attention_mask, position_ids, cu_seqlens or seq_idx with context: want none, as "
                "shard_sequence has read them"
            )
        return TokenLayout(shape, self.documents, packed=True, context=self)

    def loss_arguments(
        self,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
    ) -> dict[str, Any]:
        """For the part of the loss that is this rank's: divided by the labels of all ranks.

        Raises:
            ValueError: no `shift_labels`.
        """
        if shift_labels is None:
            raise ValueError("labels with context: want shift_labels too, as of shard_sequence")
        if num_items_in_batch is None:
            num_items_in_batch = self.total(shift_labels.ne(ignore_index).sum())
        return {
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
            "ignore_index": ignore_index,
        }

    def cut(self, row: Tensor) -> Tensor:
        """`[1, T, ...]` -> `[1, t, ...]`."""
        return row[:, self.start : self.stop]

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, on each of them."""
        return _Total.apply(x, self.group)

    def conv_state(self, xs: Sequence[Tensor], W: int) -> tuple[list[Tensor], Tensor | None]:
        """xs [1, t, D_i] -> the same, and the convolution's initial state [N, W-1, D] if any."""
        if not any(self.tails):
            return list(xs), None
        n, t = W - 1, xs[0].shape[1]
        kept = [min(n, tail) for tail in self.tails]
        ends = torch.cat([x[0, t - kept[self.rank] :] for x in xs], -1)
        gathered, x = _gather(F.pad(ends, (0, 0, n - len(ends), 0)), xs[0], self.group)
        xs = [x, *xs[1:]]
        if not self.head:
            return xs, None
        halo = torch.cat([gathered[i, n - kept[i] :] for i in self.before])[-n:]
        others = 0 if self.documents is None else len(self.documents) - 2
        return xs, F.pad(halo[None], (0, 0, n - len(halo), 0, 0, others))

    def delta_rule(self, q, k, v, f, b, A_log: Tensor, dt_bias: Tensor) -> Tensor:
        """`fused_kda` of the span, after what the ranks before made of the state."""
        if not any(self.tails):
            return fused_kda(q, k, v, f, b, A_log, dt_bias, cu_seqlens=self.documents)[0]
        (_, t, H, K), a = q.shape, self.head
        outputs = []
        if a:
            eye = torch.eye(K, dtype=accumulation_dtype(q.dtype), device=q.device)
            PR = F.pad(eye, (0, v.shape[-1])).expand(1, H, -1, -1)  # [1 | 0]
            values = F.pad(v[:, :a], (K, 0))  # [0 | v]
            o, PR = fused_kda(
                q[:, :a], k[:, :a], values, f[:, :a], b[:, :a], A_log, dt_bias,
                initial_state=PR, output_final_state=True,
            )  # fmt: skip
            outputs.append(o)
        if a < t:
            o, S = fused_kda(
                q[:, a:], k[:, a:], v[:, a:], f[:, a:], b[:, a:], A_log, dt_bias,
                output_final_state=True, cu_seqlens=self.rest,
            )  # fmt: skip
            outputs.append(o)
            PR = F.pad(cast(Tensor, S)[-1:], (K, 0))  # P = 0: the document begins in this span
        gathered, outputs[-1] = _gather(cast(Tensor, PR)[0], outputs[-1], self.group)
        if a:
            with torch.autocast(q.device.type, enabled=False):
                S = self._state_before(gathered, K)
                o_P, o_R = outputs[0][0].transpose(0, 1).split((K, v.shape[-1]), -1)
                outputs[0] = torch.baddbmm(o_R, o_P, S.to(o_P.dtype)).transpose(0, 1)[None]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _state_before(self, gathered: Tensor, K: int) -> Tensor:
        """[P | R] of all ranks, [n, H, K, K+V] -> S before this span, [H, K, V]."""
        first, *others = self.before
        S = gathered[first, ..., K:]
        for i in others:
            P, R = gathered[i].split((K, S.shape[-1]), -1)
            S = torch.baddbmm(R, P, S)
        return S

    def attention(self, q: Tensor, latent: Tensor, w_kv: Tensor, scale: float) -> Tensor:
        """`latent_attention` of the span, also to the latents of the ranks before."""
        if not any(self.tails):
            return latent_attention(q, latent, w_kv, scale=scale, cu_seqlens=self.documents)
        if self.middles is not None:
            return self._balanced_attention(q, latent, w_kv, scale, self.middles)
        tail, (t, a) = self.tails[self.rank], (latent.shape[1], self.head)
        sent = F.pad(latent[0, t - tail :], (0, 0, 0, max(self.tails) - tail))
        gathered, latent = _gather(sent, latent, self.group)
        outputs = []
        if a:
            seen = [gathered[i, : self.tails[i]] for i in self.before]
            seen = torch.cat((*seen, latent[0, :a]))[None]
            outputs.append(latent_attention(q[:, :a], seen, w_kv, scale=scale))
        if a < t:
            q, latent = q[:, a:], latent[:, a:]
            outputs.append(latent_attention(q, latent, w_kv, scale=scale, cu_seqlens=self.rest))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _balanced_attention(self, q, latent, w_kv, scale: float, middles: list[int]) -> Tensor:
        """Of one document, for the first half of this span and the second half of another."""
        i, starts, stops = self.rank, self.borders[:-1], self.borders[1:]
        other, half = len(stops) - 1 - i, middles[i] - self.start
        most = max(b - a for a, b in itertools.pairwise(self.borders))
        gathered, q = _gather(F.pad(latent[0], (0, 0, 0, most - latent.shape[1])), q, self.group)
        parts = zip(gathered, starts, stops, strict=True)
        seen = torch.cat([x[: b - a] for x, a, b in parts])[None]
        theirs = _swap(q[0, half:], other, stops[other] - middles[other], self.group)
        o = latent_attention(q[:, :half], seen[:, : middles[i]], w_kv, scale=scale)
        o_theirs = latent_attention(theirs[None], seen[:, : stops[other]], w_kv, scale=scale)
        return torch.cat((o, _swap(o_theirs[0], other, stops[i] - middles[i], self.group)[None]), 1)


def _tail(ends: list[int], start: int, stop: int) -> int:
    """Tokens in start..stop of the document that goes on at stop; 0 where one ends there."""
    i = bisect_left(ends, stop)
    return 0 if ends[i] == stop else stop - max(start, ends[i - 1])


def _bounds(cuts: list[int], device: torch.device) -> Tensor | None:
    """cu_seqlens of several documents, None for one."""
    return torch.tensor(cuts, device=device) if len(cuts) > 2 else None


def _gather(x: Tensor, local: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """x [...] of every rank, [n, ...], and `local` as it is.

    The backward pass sends as well, so every rank must come to it: as the loss depends on `local`,
    it does, also on a rank that takes nothing from the others.
    """
    return _Gather.apply(x, local, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, local: Tensor, group: Group):
        ctx.group = group
        parts = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(parts), x.contiguous(), group=group)
        return parts, local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        parts = torch.empty_like(sent := grads[0].contiguous())
        dist.all_to_all_single(parts, sent, group=ctx.group)
        return parts.sum(0), grads[1], None


def _swap(x: Tensor, other: int, count: int, group: Group) -> Tensor:
    """x [..] for rank `other` of the group, for [count, ..] of its."""
    return _Swap.apply(x, other, count, group)


class _Swap(torch.autograd.Function):
    """The gradient goes back the same way. A rank may be its own partner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: int, count: int, group: Group):
        ctx.back = other, len(x), group
        sizes = [[0] * dist.get_world_size(group) for _ in range(2)]
        sizes[0][other], sizes[1][other] = count, len(x)
        theirs = x.new_empty(count, *x.shape[1:])
        dist.all_to_all_single(theirs, x.contiguous(), *sizes, group=group)
        return theirs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        return _Swap.apply(grads[0], *ctx.back), None, None, None


class _Total(torch.autograd.Function):
    """A sum over ranks, all of which go on with it alike: they send back the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group):
        ctx.ranks = dist.get_world_size(group)
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        return ctx.ranks * grads[0], None
