"""A decode step of the whole model as one CUDA graph.

Launching the kernels of a step takes the host longer than running them takes the GPU. `generate`
attaches `DecodeGraphs` to its cache. Of some number of tokens the first step is launched kernel by
kernel, which compiles them; the second is captured; those after it are one launch. A graph holds
addresses, so it is captured again when a tensor of the cache has moved: after growth or a restore.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kimi_kernels.dispatch import may_overlap, overlapping, use_triton
from kimi_linear.layout import DECODE_TOKENS, decode_layout
from kimi_linear.linear import hooks_of, is_bare, project

if TYPE_CHECKING:
    from kimi_linear.cache import KimiLinearCache
    from kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM

# hooks that transformers and PEFT leave on the embedding; they do nothing without a gradient
CHECKPOINTING = {"make_inputs_require_grads", "make_inputs_require_grad"}


def why_not_captured(model: KimiLinearForCausalLM) -> str | None:
    """What keeps a decode step of the model out of a CUDA graph, or None."""
    if not use_triton(model.model.embed_tokens.weight):
        return "its kernels do not run: they are in PyTorch"
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            return f"{name or 'the model'} has a hook of accelerate (several devices, offloading)"
        if name and not is_bare(module):  # what the whole model has runs around a graph
            hooks = {getattr(hook, "__name__", "") for hook in hooks_of(module)}
            if "forward" in vars(module) or not hooks <= CHECKPOINTING:
                return f"{name} has a hook, or a forward of its own"
    for name, p in model.named_parameters():
        if type(p) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(p).__name__}, want a plain tensor"
    return None


@functools.cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for each thread: two may capture at once, and one always takes the same memory."""
    return torch.cuda.Stream(device)


def beside(work: Callable[[], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A function that gives what `work` makes of x: it runs then, but in a graph beside the rest.

    While a step is captured `work` becomes a branch of the graph, which begins now and ends where
    the result is asked for. Memory of the branch is only used again in later ones.
    """
    if not (x.is_cuda and may_overlap() and torch.cuda.is_current_stream_capturing()):
        return work
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device, threading.get_ident())
    side.wait_stream(main)
    with torch.cuda.stream(side):
        y = work()

    def join() -> Tensor:
        main.wait_stream(side)
        return y

    return join


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    ids: Tensor  # [B, T], read by the graph
    start: Tensor  # [B] tokens of each row in the cache, read and advanced by it
    logits: Tensor  # [B, T, V], written by it
    fixed: list[Tensor]  # tensors of the cache that it reads and writes
    seen: int = -1  # by the cache after its last replay
    lengths: Tensor | None = None  # of its rows then


class DecodeGraphs:
    """The graphs of one model on one cache, by the shape of the new tokens."""

    def __init__(self, model: KimiLinearForCausalLM) -> None:
        self.model = model
        self.parameters = self._addresses(model)
        self.graphs: dict[torch.Size, _Graph | None] = {}  # None: has run, is captured next
        self.failed = False
        self.active = True  # until `generate` ends: then weights may be moved

    @staticmethod
    def _addresses(model: KimiLinearForCausalLM) -> list[int]:
        return [p.data_ptr() for p in model.parameters()]

    def fit(self, model: KimiLinearForCausalLM) -> bool:
        """Whether they are of this model, and its parameters are where they were."""
        return model is self.model and self._addresses(model) == self.parameters

    def step(self, ids: Tensor, cache: KimiLinearCache) -> Tensor | None:
        """Logits [B, T, V] after ids [B, T], the cache advanced; None where there is no graph."""
        T = ids.shape[1]
        if self.failed:
            return None
        cache.begin(T)
        if cache.rollback.on and not cache.rollback.fits(len(ids)):
            return None
        cache.reserve(T)
        lengths = None if cache.lengths is None else cache.lengths + T
        if ids.shape not in self.graphs:
            self.graphs[ids.shape] = None
            start = cache.lengths
            start = ids.new_full((len(ids),), cache.seen) if start is None else start.clone()
            logits = self._run(ids, start, cache)
            cache.advance(T, lengths)
            return logits
        fixed, found = cache.tensors(), self.graphs[ids.shape]
        if found is None or list(map(id, fixed)) != list(map(id, found.fixed)):
            try:
                found = self.graphs[ids.shape] = self._capture(ids, cache, fixed)
            except RuntimeError as error:
                warnings.warn(f"decoding without a CUDA graph: {error}", stacklevel=2)
                self.failed = True
                return None
        if found.seen != cache.seen or found.lengths is not cache.lengths:  # not by a replay
            start = cache.lengths
            found.start.fill_(cache.seen) if start is None else found.start.copy_(start)
        found.ids.copy_(ids)
        found.graph.replay()
        cache.advance(T, lengths)
        found.seen, found.lengths = cache.seen, cache.lengths
        return found.logits.clone()

    def _run(self, ids: Tensor, start: Tensor, cache: KimiLinearCache) -> Tensor:
        """What a graph holds: logits [B, T, V] after ids [B, T], and `start` [B] advanced by T."""
        decoder, (B, T) = self.model.model, ids.shape
        x, layout = decoder.embed_tokens(ids), decode_layout(B, T, start, ragged=False)
        with overlapping():
            for layer in decoder.layers:
                x, _ = layer(x, layout, past_key_values=cache)
            logits = project(x, self.model.lm_head, norm=decoder.norm)[0]
        start.add_(T)
        return logits

    def _capture(self, ids: Tensor, cache: KimiLinearCache, fixed: list[Tensor]) -> _Graph:
        ids, graph = ids.clone(), torch.cuda.CUDAGraph()
        start = torch.empty(ids.shape[0], dtype=torch.int64, device=ids.device)
        # `torch.cuda.graph` would give all cached memory back to the driver before
        stream = torch.cuda.Stream(ids.device)
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits = self._run(ids, start, cache)
            except BaseException:
                with suppress(RuntimeError):  # it fails too, and says less
                    graph.capture_end()
                raise
            graph.capture_end()
        return _Graph(graph, ids, start, logits, fixed)


def captured_step(
    model: KimiLinearForCausalLM, ids: Tensor | None, cache: KimiLinearCache | None
) -> Tensor | None:
    """Logits [B, T, V] by a CUDA graph, where `generate` decodes with one."""
    graphs = getattr(cache, "graphs", None)
    if ids is None or cache is None or graphs is None or not graphs.active:
        return None
    few = ids.ndim == 2 and 0 < ids.shape[1] <= DECODE_TOKENS and cache.seen > 0
    asked = model.config.output_hidden_states or model.config.output_router_logits
    if not few or asked or model.training or torch.is_grad_enabled():
        return None
    cache.check(model.config, ids.shape[0])
    return graphs.step(ids, cache)


def decode_graphs(model: KimiLinearForCausalLM, graphs: DecodeGraphs | None) -> DecodeGraphs | None:
    """`graphs` if they still fit the model, or new ones, or None with a warning that says why."""
    reason = why_not_captured(model)
    if reason is not None:
        warnings.warn(f"decoding without a CUDA graph: {reason}", stacklevel=2)
        return None
    if graphs is None or not graphs.fit(model):
        return DecodeGraphs(model)
    graphs.active = True
    return graphs
