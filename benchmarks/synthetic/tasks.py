"""Random batches of the three tasks, drawn on the device of the generator.

A sampler gives ids [B, T] and labels [B, T]: where `labels[b, t]` is not -100 it is the answer
expected after the tokens up to t (no shift by one is left to do). Answers are inputs too, as in
language modelling, except the last.

What the paper says of the data is reproduced: the reversed copy after <sep>; pairs, <sep>, queries;
64 stacks by id. It does not give vocabularies and counts. MQAR has those of Zoology's hardest
setting (arXiv 2312.04927): 8192 tokens, half of them keys and half values, T / 4 pairs, keys and
values without repeats, each key asked once; Zoology asks after power-law gaps, with random tokens
between the queries, here they come in random order, each with its answer behind it. Palindrome and
stack have 64 symbols, and all the length that there is.

MQAR is trained on fewer pairs as well, as Zoology does, but all in one length: a number that is
even on a logarithmic scale, up to T / 4, which are asked again and again. With T / 4 alone, at
length 1024, KDA and the gated delta rule are at chance after 13,000 steps; KDA also with a
vocabulary of 1024 or 2048 (6250 steps), 64 values (5750) or 128 sequences (1750). Probably because
half of what KDA's state holds is gone after 9 tokens when training begins (the median of its
channels), and few answers are that near.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

IGNORED = -100
SYMBOLS = 64  # of palindrome and stack
STACKS = 64
MQAR_VOCAB = 8192
Batch = tuple[Tensor, Tensor]


def _integers(high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def _subsets(n: int, size: int, B: int, generator: Generator) -> Tensor:
    """`size` of the numbers below n, each row another choice in another order [B, size]."""
    return torch.rand(B, n, generator=generator, device=generator.device).argsort(1)[:, :size]


def palindrome(B: int, T: int, generator: Generator) -> Batch:
    """x_1 ... x_n <sep> x_n ... x_2; from <sep> on the answers are x_n ... x_1; n = T / 2."""
    x = _integers(SYMBOLS, (B, T // 2), generator)
    back = x.flip(1)
    ids = torch.cat((x, torch.full_like(x[:, :1], SYMBOLS), back[:, :-1]), 1)
    return ids, torch.cat((torch.full_like(x, IGNORED), back), 1)


def _recall(B: int, T: int, n: Tensor, generator: Generator) -> Batch:
    """n [B, 1] pairs, <sep>, and the keys of all, time and again in another order, to the end."""
    most, half = T // 4, MQAR_VOCAB // 2
    keys = _subsets(half - 1, most, B, generator) + 1  # 0 is <sep>
    pairs = torch.stack((keys, _subsets(half, most, B, generator) + half), -1)
    turn = torch.arange(T // 2, device=keys.device)
    rounds = turn // n + torch.rand(B, T // 2, generator=generator, device=keys.device)
    asked = pairs.gather(1, (rounds.argsort(1) % n)[..., None].expand(-1, -1, 2)).flatten(1)
    t = torch.arange(T, device=keys.device)[None]
    since = t - 2 * n - 1  # <sep>
    queries = torch.where(since < 0, 0, asked.gather(1, since.clamp(min=0)))
    ids = torch.where(t < 2 * n, F.pad(pairs.flatten(1), (0, T - 2 * most)), queries)
    answers = asked.gather(1, (since + 1).clamp(0, T - 1))
    return ids, torch.where((since >= 0) & (since % 2 == 0), answers, IGNORED)


def mqar(B: int, T: int, generator: Generator) -> Batch:
    """k_1 v_1 ... k_n v_n <sep> k_a v_a k_b v_b ... k_z; the answers at k_i are v_i; n = T / 4."""
    n = torch.full((B, 1), T // 4, device=generator.device)
    return _recall(B, T, n, generator)


def mqar_practice(B: int, T: int, generator: Generator) -> Batch:
    """1 to T / 4 pairs, log-uniform for each sequence."""
    u = torch.rand(B, 1, generator=generator, device=generator.device)
    n = ((T // 4 + 1) ** u).long().clamp(max=T // 4)
    return _recall(B, T, n, generator)


def stack(B: int, T: int, generator: Generator) -> Batch:
    """T / 3 times `<push> id x` or `<pop> id x`; at the id after <pop> the answer is x.

    An empty stack is pushed to, another pushed or popped with even odds. No loop over time: the
    depth of such a stack behaves as |W| of a random walk W with steps of +-1, and what a pop from
    depth h finds is what the last push to depth h has left.
    """
    n = -(-T // 3)
    i = _integers(STACKS, (B, n), generator)
    walks = F.one_hot(i, STACKS) * (2 * _integers(2, (B, n, 1), generator) - 1)
    after = walks.cumsum(1)  # [B, n, STACKS]
    before = (after - walks).gather(2, i[..., None]).squeeze(2).abs()
    after = after.gather(2, i[..., None]).squeeze(2).abs()
    pops = after < before  # [B, n]

    # pushes to a level of a stack and pops from it take turns: sort them by stack, level and time
    level = torch.maximum(before, after)
    time = torch.arange(n, device=i.device)
    turns = ((i * (n + 1) + level) * n + time).argsort(1)
    pushed = torch.empty_like(turns).scatter_(1, turns, turns.roll(1, 1))  # [B, n] the turn before

    x = _integers(SYMBOLS, (B, n), generator)
    x = torch.where(pops, x.gather(1, pushed), x) + 2 + STACKS
    ids = torch.stack((pops.long(), i + 2, x), -1).flatten(1)  # 0 <push>, 1 <pop>
    labels = torch.full_like(ids, IGNORED)
    labels[:, 1::3] = x.where(pops, IGNORED)
    return ids[:, :T], labels[:, :T]


@dataclass(frozen=True)
class Task:
    """A sampler and what it takes.

    Attributes:
        practice: what training draws from; default: `sample`, what is measured.
        asked: of T, the positions where there may be an answer; all others have none.
        multiple: T is one of it, and at most `longest`.
    """

    sample: Callable[[int, int, Generator], Batch]
    vocab: int
    asked: Callable[[int], slice]
    multiple: int = 1
    longest: int = 2**20
    practice: Callable[[int, int, Generator], Batch] | None = None

    def check(self, T: int) -> None:
        """Raises `ValueError` for a length that the task does not have."""
        if not 4 <= T <= self.longest or T % self.multiple:
            several = f", a multiple of {self.multiple}" if self.multiple > 1 else ""
            raise ValueError(f"length is {T}, want 4 to {self.longest}{several}")


TASKS = {
    "palindrome": Task(palindrome, SYMBOLS + 1, lambda T: slice(T // 2, None), 2),
    "mqar": Task(
        mqar, MQAR_VOCAB, lambda T: slice(3, None, 2), 4, 2 * MQAR_VOCAB - 4, mqar_practice
    ),
    "stack": Task(stack, 2 + STACKS + SYMBOLS, lambda T: slice(1, None, 3)),
}
