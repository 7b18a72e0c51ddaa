"""Where the rows of each expert lie: slots (token, j) sorted by expert, and the tiles of its rows.

A counting sort in three launches, or in one where a program may well read all slots. It is stable
and needs neither atomics nor a host sync: every size that the host has to know is a worst case.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.overlap import overlap, wait_for_inputs

CHUNK = 256  # slots per program
FEW = 2048  # slots that one launch places: every expert's program reads them all
PART = tl.constexpr(32)  # slots compared with a chunk at a time: 64 registers for 4 warps


class Plan(NamedTuple):
    """Slots are t top_k + j, rows are slots in order of their experts. All int32.

    An index of E or more, or below 0, is expert E, whose rows come last and in no tile.
    """

    order: Tensor  # [S] slot of every row
    position: Tensor  # [S] row of every slot
    offsets: Tensor  # [E+1] first row of every expert; the last is the number of rows that count
    tiles: Tensor  # [3, MT] expert, first and last+1 row of every tile; expert -1 past the last


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def slot_expert(index, o, S, E):
    """Expert of slots `o`, int32; E for those past the last, too."""
    e = tl.load(index + o, mask=o < S, other=E)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit(do_not_specialize=["S", "NC"])
def slot_count_kernel(index, counts, S, NC, E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr):
    """counts[e, c]: slots of expert e in chunk c."""
    i_c, o_e = tl.program_id(0), tl.arange(0, BE)
    e = slot_expert(index, i_c.to(tl.int64) * C + tl.arange(0, C), S, E)
    tl.store(counts + o_e.to(tl.int64) * NC + i_c, tl.histogram(e, BE), mask=o_e <= E)


@triton.jit(do_not_specialize=["NC"])
def slot_scan_kernel(counts, totals, NC, BC: tl.constexpr):
    """counts[e, c]: from now on the slots of expert e before chunk c; totals[e]: all of them."""
    i_e = tl.program_id(0)
    counts += i_e.to(tl.int64) * NC
    before = 0
    for c in range(0, NC, BC):
        o_c = c + tl.arange(0, BC)
        n = tl.load(counts + o_c, mask=o_c < NC, other=0)
        tl.store(counts + o_c, before + tl.cumsum(n, 0) - n, mask=o_c < NC)
        before += tl.sum(n, 0)
    tl.store(totals + i_e, before)


@triton.jit
def write_tiles(n, i_e, offsets, tiles, MT, E: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr):
    """First row of expert i_e, which is written like its tiles; E has what is left of those.

    n [BE]: rows per expert, then zeros.
    """
    o_e = tl.arange(0, n.shape[0])
    before = o_e < i_e
    first = tl.sum(tl.where(before, n, 0), 0)
    t = tl.sum(tl.where(before, (n + BM - 1) // BM, 0), 0)
    last = first + tl.sum(tl.where(o_e == i_e, n, 0), 0)
    end, value = MT, -1
    if i_e < E:
        end = t + (last - first + BM - 1) // BM
        value = i_e
    for i in range(t, end, BT):
        o_t = i + tl.arange(0, BT)
        tl.store(tiles + o_t, tl.full([BT], value, tl.int32), mask=o_t < end)
        row = first + (o_t - t) * BM
        tl.store(tiles + MT + o_t, row, mask=o_t < end)
        tl.store(tiles + 2 * MT + o_t, tl.minimum(row + BM, last), mask=o_t < end)
    tl.store(offsets + i_e, first)
    return first


@triton.jit(do_not_specialize=["S", "NC", "MT"])
def slot_place_kernel(
    index, counts, totals, order, position, offsets, tiles,
    S, NC, MT,
    E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program c < NC places a chunk, NC + e writes expert e's tiles, NC + E what is left."""
    i_p, o_e = tl.program_id(0), tl.arange(0, BE)
    n = tl.load(totals + o_e, mask=o_e < E, other=0)
    if i_p < NC:
        o = i_p.to(tl.int64) * C + tl.arange(0, C)
        e = slot_expert(index, o, S, E)
        rank = tl.zeros([C], tl.int32)  # slots of the same expert before this one, in the chunk
        for j in range(0, C, PART):
            o_j = i_p.to(tl.int64) * C + j + tl.arange(0, PART)
            same = e[:, None] == slot_expert(index, o_j, S, E)[None, :]
            rank += tl.sum((same & (o_j[None, :] < o[:, None])).to(tl.int32), 1)
        m = o < S
        place = tl.gather(tl.cumsum(n, 0) - n, e, 0) + rank
        place += tl.load(counts + e.to(tl.int64) * NC + i_p, mask=m, other=0)
        tl.store(position + o, place, mask=m)
        tl.store(order + place, o.to(tl.int32), mask=m)
    else:
        write_tiles(n, i_p - NC, offsets, tiles, MT, E, BM, BT)


@triton.jit(do_not_specialize=["S", "MT"])
def slot_plan_kernel(
    index, order, position, offsets, tiles, S, MT,
    E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program e finds expert e's among C slots, places them and writes its tiles; E as above."""
    wait_for_inputs(OVERLAP)
    i_e, o, o_e = tl.program_id(0), tl.arange(0, C), tl.arange(0, BE)
    e = slot_expert(index, o, S, E)
    n = tl.where(o_e < E, tl.histogram(e, BE), 0)
    own = (e == i_e) & (o < S)
    row = write_tiles(n, i_e, offsets, tiles, MT, E, BM, BT) + tl.cumsum(own.to(tl.int32), 0) - 1
    tl.store(position + o, row, mask=own)
    tl.store(order + row, o, mask=own)


# ---- launcher ----------------------------------------------------------------------------------


def max_tiles(S: int, E: int, BM: int) -> int:
    """Tiles of BM rows that S slots can need: each of min(E, S) experts may have one partial."""
    return (S + min(E, S) * (BM - 1)) // BM


def plan_slots(index: Tensor, E: int, BM: int) -> Plan:
    """The plan of `index` [T, top_k] for E experts and tiles of BM rows; S = T top_k > 0."""
    S, MT = index.numel(), max_tiles(index.numel(), E, BM)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=index.device)

    plan = Plan(ints(S), ints(S), ints(E + 1), ints(3, MT))
    index, sizes = index.contiguous(), {"E": E, "BE": triton.next_power_of_2(E + 1)}
    if S <= FEW:
        C = max(CHUNK, triton.next_power_of_2(S))
        slot_plan_kernel[(E + 1,)](
            index, *plan, S, MT, **sizes, C=C, BM=BM, BT=128, **overlap(index.device)
        )
        return plan
    NC, sizes["C"] = triton.cdiv(S, CHUNK), CHUNK
    counts, totals = ints(E + 1, NC), ints(E + 1)
    slot_count_kernel[(NC,)](index, counts, S, NC, **sizes)
    slot_scan_kernel[(E + 1,)](counts, totals, NC, BC=min(1024, triton.next_power_of_2(NC)))
    slot_place_kernel[(NC + E + 1,)](
        index, counts, totals, *plan, S, NC, MT, **sizes, BM=BM, BT=128
    )
    return plan
