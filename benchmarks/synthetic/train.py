"""Training one mixer on one task at one length, on batches that never come twice."""

import functools
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.synthetic.models import build
from benchmarks.synthetic.tasks import IGNORED, TASKS

ENOUGH, PATIENCE = 0.999, 3  # accuracy, and evaluations in a row that reach it: then training ends
WARM_UP = 3  # steps before a CUDA graph is captured: kernels compile, the optimizer makes its state
VALIDATION_SEED, VALIDATION_BATCHES = 10**9, 8
FULL_PRECISION = ("A_log", "dt_bias")  # whatever the dtype of the model


@dataclass(frozen=True)
class Setting:
    """What is trained, and how. Tokens per step, not sequences, are the same at every length.

    Raises:
        ValueError: the task has no such length, or a batch would be empty.
    """

    task: str
    mixer: str
    length: int
    lr: float = 1e-3
    seed: int = 0
    steps: int = 20_000
    tokens: int = 32_768
    every: int = 250
    heads: int = 2
    head_dim: int = 128

    def __post_init__(self) -> None:
        TASKS[self.task].check(self.length)
        if self.tokens < self.length:
            raise ValueError(f"tokens is {self.tokens}, want at least the length, {self.length}")

    @property
    def batch(self) -> tuple[int, int]:
        return self.tokens // self.length, self.length

    def lr_at(self, step: int) -> float:
        """Linear warm-up over 2 % of the steps, then a cosine to a tenth."""
        warm = max(1, self.steps // 50)
        done = (step - warm) / max(1, self.steps - warm)
        return self.lr * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(done, 0)))


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        steps: taken; seconds: for them, with the evaluations.
        accuracy: of the answers; exact: of sequences with every answer right. Both on fresh data.
        curve: [step, accuracy] of every evaluation.
        stop: what ended it: `solved`, `steps`, `budget` or `diverged`.
    """

    steps: int
    seconds: float
    accuracy: float
    exact: float
    curve: list[list[float]]
    stop: str


def logits_of(model: Any, ids: Tensor, asked: slice) -> Tensor:
    """ids [B, T] -> fp32 logits [B, n, vocab] at the positions `asked`."""
    return model.lm_head(model.model(ids).last_hidden_state[:, asked]).float()


class Step:
    """One step of AdamW on fp32 copies of the weights; on a GPU a CUDA graph after `WARM_UP` steps.

    AdamW as language models are trained: betas .9 and .95, decay .1 for matrices alone, gradients
    clipped to norm 1.
    """

    def __init__(self, model: Any, asked: slice, dtype: torch.dtype, eager: bool) -> None:
        self.model, self.asked, self.calls = model, asked, 0
        self.params = list(model.parameters())
        self.weights = [p.detach().float().clone() for p in self.params]
        for name, p in model.named_parameters():
            if not set(FULL_PRECISION) & set(name.split(".")):
                p.data = p.data.to(dtype)
        device = self.params[0].device
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda and not eager else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.lr = torch.zeros((), device=device)
        matrices = [w for w in self.weights if w.ndim == 2]
        others = [w for w in self.weights if w.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr, betas=(0.9, 0.95), capturable=cuda, fused=cuda,  # a launch for each group
        )  # fmt: skip
        self.batch: tuple[Tensor, Tensor] | None = None
        self.loss = self.lr

    def __call__(self, ids: Tensor, labels: Tensor, lr: float) -> None:
        """Waits for nothing on the host."""
        if self.batch is None:
            self.batch = ids.clone(), labels.clone()
        for static, new in zip(self.batch, (ids, labels), strict=True):
            static.copy_(new)
        self.lr.fill_(lr)
        self.calls += 1
        if self.stream is None:
            self._run()
        elif self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._run()
            self.graph.replay()

    def _run(self) -> None:
        assert self.batch is not None
        ids, labels = self.batch
        logits = logits_of(self.model, ids, self.asked).flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, self.asked].flatten(), ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, self.params)
        for w, gradient in zip(self.weights, gradients, strict=True):
            w.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for p, w in zip(self.params, self.weights, strict=True):
                p.copy_(w)
        self.loss = loss.detach()


@torch.no_grad()
def evaluate(model: Any, setting: Setting, device: torch.device) -> tuple[float, float]:
    """Accuracy of the answers, and of whole sequences, on batches that are not trained on."""
    task = TASKS[setting.task]
    asked = task.asked(setting.length)
    generator = Generator(device).manual_seed(VALIDATION_SEED + setting.seed)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(VALIDATION_BATCHES):
        ids, labels = task.sample(*setting.batch, generator)
        labels = labels[:, asked]
        wanted = labels != IGNORED
        right = (logits_of(model, ids, asked).argmax(-1) == labels) & wanted
        whole, some = (right == wanted).all(1), wanted.any(1)
        parts = right.sum(), wanted.sum(), (whole & some).sum(), some.sum()
        counts += torch.stack(parts)
    right, answers, whole, sequences = counts.tolist()
    return right / max(answers, 1), whole / max(sequences, 1)


def train(
    setting: Setting,
    device: torch.device,
    *,
    deadline: float = math.inf,
    eager: bool = False,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Train a fresh model until it answers `ENOUGH`, at most `setting.steps`.

    Args:
        deadline: by `time.monotonic`; looked at whenever the model is evaluated.
        eager: no CUDA graph.
        report: gets a line per evaluation.
    """
    task = TASKS[setting.task]
    torch.manual_seed(setting.seed)
    model = build(setting.mixer, task.vocab, setting.heads, setting.head_dim).to(device).train()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step = Step(model, task.asked(setting.length), dtype, eager)
    draw, generator = task.practice or task.sample, Generator(device).manual_seed(setting.seed)
    start = last = time.monotonic()
    curve: list[list[float]] = []
    for i in range(1, setting.steps + 1):
        step(*draw(*setting.batch, generator), setting.lr_at(i - 1))
        if i % setting.every and i < setting.steps:
            continue
        loss = step.loss.item()
        now = time.monotonic()
        ms = 1e3 * (now - last) / (i - (curve[-1][0] if curve else 0))
        accuracy, exact = evaluate(model, setting, device)
        curve.append([i, round(accuracy, 5)])
        report(
            f"{setting.task} {setting.mixer} {setting.length}: step {i}, loss {loss:.4f}, "
            f"accuracy {accuracy:.2%}, sequences {exact:.2%}, {ms:.3g} ms per step"
        )
        last = time.monotonic()
        solved = len(curve) >= PATIENCE and all(a >= ENOUGH for _, a in curve[-PATIENCE:])
        reasons = {
            "solved": solved,
            "diverged": not math.isfinite(loss),
            "steps": i == setting.steps,
            "budget": last > deadline,
        }
        if stop := next((name for name, holds in reasons.items() if holds), None):
            return Outcome(i, round(last - start, 1), accuracy, exact, curve, stop)
    raise ValueError(f"steps is {setting.steps}, want at least 1")


def attempt(setting: Setting, device: torch.device, deadline: float, eager: bool) -> Outcome | str:
    """The outcome of a run, or what it raised. (Other processes do not find it in `__main__`.)"""
    try:
        report = functools.partial(print, flush=True)
        return train(setting, device, deadline=deadline, eager=eager, report=report)
    except Exception:  # the other runs go on
        return traceback.format_exc()
