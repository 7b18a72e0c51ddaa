"""Launches of latent attention's decoding kernels: tiles, programs, and which kernel it is."""

import pytest
import torch

from kimi_kernels import mla_decode_gluon
from kimi_kernels import mla_decode_triton as decode


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(itemsize, shared):
    """Latents of the released widths, on any GPU."""
    for queries in (1, 16, 17, 32, 33, 256):
        size = decode.pick_tiles(queries, 512, 64, itemsize, shared * 1024)
        stored = size["BN"] * (size["num_stages"] - 1) + size["BM"]
        assert itemsize * 576 * stored <= shared * 1024


def test_no_tiles_fit():
    with pytest.raises(ValueError, match=r"^latent has 4096 \+ 64 channels, too many for"):
        decode.pick_tiles(32, 4096, 64, 2, 227 * 1024)


def test_gluon_tiles_fit():
    for queries in (1, 16, 17, 32, 33, 256):
        for R, P in [(64, 16), (64, 128), (256, 128), (512, 16), (512, 64), (512, 128)]:
            BM, BN, _ = mla_decode_gluon.pick_tiles(queries, R, P)[0].values()
            assert 2 * ((R + P) * (2 * BN + BM) + BN * BM) + 2048 <= 227 * 1024


def test_what_gluon_takes(monkeypatch):
    def takes(latent, R=512, found=(9, 0)):
        monkeypatch.setattr(mla_decode_gluon, "capability", lambda device: found)
        return mla_decode_gluon.takes(*decode.latent_rows(latent, R)[:2])

    x = torch.zeros(2, 70, 576, dtype=torch.float16)
    for latent in (x, x.bfloat16(), x[:1], x[:, :33], x[:, ::2]):
        assert takes(latent)
    unaligned = x[..., 1:545], x.new_zeros(2, 70, 577)[..., :576]
    for latent in (x.float(), x[..., :520], *unaligned, x[:1].expand(2, -1, -1)):
        assert not takes(latent)
    assert not takes(x, 560) and not takes(x, 576)
    assert not any(takes(x, found=found) for found in [(8, 0), (8, 9), (10, 0), (12, 0), (0, 0)])


def test_programs():
    """One wave where that is possible, never more runs than tiles."""
    for blocks, tiles, want in [(1, 10**4, 132), (1, 7, 7), (4, 10**4, 33), (5, 10**4, 26)]:
        assert decode.count_programs(blocks, tiles, 132) == want
    assert decode.count_programs(85, 10**4, 132) == 3  # 255 programs in two waves
    assert decode.count_programs(1000, 10**4, 132) >= 1
