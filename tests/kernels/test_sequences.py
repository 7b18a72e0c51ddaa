"""Where tokens and chunks lie: chunk_table and token_rows."""

import itertools
import random

import pytest
import torch

from kimi_kernels.sequences import CHUNK, chunk_table, token_rows
from tests.helpers import DEVICE
from tests.kernels.kda_cases import cumulative


def table(lengths):
    """Chunk offsets and the owner of each chunk, by counting."""
    chunks = [-(-n // CHUNK) for n in lengths]
    owner = [i for i, n in enumerate(chunks) for _ in range(n)]
    return [0, *itertools.accumulate(chunks)], owner


def check(lengths, dtype):
    T, N = sum(lengths), len(lengths)
    offsets, owner = chunk_table(cumulative(lengths, dtype).to(DEVICE), T)
    want_offsets, want_owner = table(lengths)
    assert offsets.dtype == owner.dtype == torch.int32
    assert offsets.tolist() == want_offsets
    assert owner.numel() == T // CHUNK + N >= len(want_owner)
    assert owner.tolist() == want_owner + [-1] * (owner.numel() - len(want_owner))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[0], [1], [64], [65], [0, 0, 0], [0, 64, 0, 1, 63, 128, 0], [1] * 70, [200_000], [70_000, 3]],
    ids=lambda x: str(x)[:30],
)
def test_chunk_table(lengths, dtype):
    check(lengths, dtype)


@pytest.mark.parametrize(
    "N, dtype",
    [
        (2, torch.int64),
        (17, torch.int32),
        (256, torch.int32),
        (257, torch.int64),
        (600, torch.int32),
    ],
)
def test_chunk_table_of_random_packings(N, dtype):
    """Past 256 sequences the offsets are summed in several blocks."""
    pick = random.Random(N)
    check([pick.choice([0, 0, 1, 63, 64, 65, pick.randrange(1000)]) for _ in range(N)], dtype)


@pytest.mark.parametrize("cu", [[0, 100, 50, 200], [3, 70, 1 << 40], [-9, 64, -5, 1000], [9, 9]])
def test_chunk_table_of_wrong_lengths_stays_inside(cu):
    """On a GPU their values are not checked; still every owner is a sequence."""
    T, N = 130, len(cu) - 1
    _, owner = chunk_table(torch.tensor(cu, device=DEVICE), T)
    assert owner.numel() == T // CHUNK + N
    assert all(-1 <= i < N for i in owner.tolist())


# ---- rows --------------------------------------------------------------------------------------


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def layouts():
    """Name, tensor [B, T, ...] and whether its memory can be used as it is."""
    for B, T in itertools.product((1, 2, 3), (1, 2, 5)):
        x = numbered(B, T, 4, 6)
        yield f"contiguous {B} {T}", x, True
        yield f"slice of channels {B} {T}", numbered(B, T, 50)[..., 20:44].view(B, T, 4, 6), True
        yield f"vectors {B} {T}", numbered(B, T, 9)[..., 2:5], True
        yield f"slice of tokens {B} {T}", numbered(B, T + 3, 4, 6)[:, 1 : T + 1], B == 1 or T == 1
        yield f"every second token {B} {T}", numbered(B, 2 * T, 4, 6)[:, ::2], True
        yield f"heads first {B} {T}", numbered(B, 4, T, 6).transpose(1, 2), T == 1
        yield f"tokens first {B} {T}", numbered(T, B, 4, 6).transpose(0, 1), B == 1 or T == 1
        yield f"every second channel {B} {T}", numbered(B, T, 4, 12)[..., ::2], False
        yield f"expanded {B} {T}", numbered(B, T, 4, 1).expand(B, T, 4, 6), False
        yield f"one token for all {B} {T}", numbered(1, 1, 4, 6).expand(B, T, 4, 6), None


@pytest.mark.parametrize("name, x, direct", [pytest.param(*c, id=c[0]) for c in layouts()])
def test_token_rows(name, x, direct):
    """Token t of row b begins (b * T + t) strides after the first, and its elements are dense."""
    B, T = x.shape[:2]
    rows, stride = token_rows(x)
    assert torch.equal(rows, x)
    if direct is not None:
        assert (rows.data_ptr() == x.data_ptr()) == direct
    inner = x.shape[2:].numel()
    flat = rows.as_strided((B * T, inner), (stride, 1))
    assert torch.equal(flat, x.reshape(B * T, inner))


@pytest.mark.parametrize("shape", [(1, 0, 4, 6), (2, 0, 3), (0, 5, 3)])
def test_no_tokens(shape):
    rows, stride = token_rows(torch.zeros(shape))
    assert rows.shape == shape and isinstance(stride, int)
