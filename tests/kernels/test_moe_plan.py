"""Slots sorted by expert, and the tiles of each expert's rows, against torch's stable argsort."""

import pytest
import torch

from kimi_kernels.moe import plan_triton
from kimi_kernels.moe.plan_triton import max_tiles, plan_slots
from tests.helpers import DEVICE


def check(index, E, BM):
    plan = plan_slots(index.to(DEVICE), E, BM)
    key = index.flatten().clone()
    key[(key < 0) | (key >= E)] = E
    order = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=E + 1)[:E]
    offsets = torch.cat((torch.zeros(1), counts.cumsum(0))).long().tolist()
    assert plan.order.tolist() == order.tolist()
    assert plan.position.tolist() == order.argsort().tolist()
    assert plan.offsets.tolist() == offsets
    want = [
        (e, i, min(i + BM, offsets[e + 1]))
        for e in range(E)
        for i in range(offsets[e], offsets[e + 1], BM)
    ]
    n, tiles = len(want), plan.tiles.mT.tolist()
    assert list(map(tuple, tiles[:n])) == want
    assert [t[0] for t in tiles[n:]] == [-1] * (max_tiles(index.numel(), E, BM) - n)
    return n


def draw(T, k, first, last):
    return torch.randint(first, last, (T, k))


CASES = {
    "one token": (draw(1, 8, 0, 256), 256),
    "one slot": (draw(1, 1, 0, 1), 1),
    "few": (draw(20, 4, 0, 16), 16),
    "one chunk": (draw(64, 4, 0, 64), 64),
    "a chunk and a slot": (draw(257, 1, 0, 7), 7),
    "many": (draw(700, 8, 0, 256), 256),
    "skewed": (draw(300, 8, 0, 3), 128),
    "all to one": (torch.full((300, 1), 5), 6),
    "elsewhere": (draw(200, 3, -2, 20), 13),
    "all elsewhere": (torch.full((3, 2), 13), 13),
    "far": (torch.tensor([[2**40, -(2**40), 3]]), 4),
    "1000 experts": (draw(40, 3, 0, 1003), 1000),
}


@pytest.mark.parametrize("BM", [16, 128])
@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_plan(name, launches, BM, monkeypatch):
    monkeypatch.setattr(plan_triton, "FEW", 0 if launches == 3 else 8192)
    check(*CASES[name], BM)


@pytest.mark.parametrize("S", [plan_triton.FEW, plan_triton.FEW + 1])
def test_the_last_of_one_launch(S):
    check(draw(S, 1, 0, 10), 9, 16)


@pytest.mark.parametrize("counts", [[1] * 5, [17, 1, 1], [16, 32], [33, 0, 0, 15]])
def test_worst_case_of_tiles(counts):
    """The bound is never passed; with one row over in every expert it is reached."""
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = check(index[torch.randperm(len(index))][:, None], len(counts), 16)
    assert n <= max_tiles(len(index), len(counts), 16)


def test_worst_case_is_reached():
    index = torch.arange(5).repeat(17)[:, None]
    assert check(index, 5, 16) == max_tiles(85, 5, 16) == 10


def test_chunks_do_not_change_it(monkeypatch):
    monkeypatch.setattr(plan_triton, "FEW", 0)
    index = draw(100, 8, 0, 20)
    want = plan_slots(index.to(DEVICE), 18, 16)
    monkeypatch.setattr(plan_triton, "CHUNK", 1024)
    for a, b in zip(plan_slots(index.to(DEVICE), 18, 16)[:3], want[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("E, last", [(256, 256), (256, 300), (256, 8), (1000, 1000)])
def test_plan_of_many(E, last):
    check(draw(8192, 8, 0, last), E, 128)


@pytest.mark.gpu
def test_plan_of_millions():
    """Past one block of the scan over chunks, 2^18 slots."""
    check(draw(2**20, 8, 0, 260), 256, 128)
