"""Packed documents equal separate documents; padded rows equal rows without padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorWithFlattening

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from tests.helpers import FLOOR, rel_err
from tests.model.helpers import build, random_ids, small_config

CONFIG = small_config((2, 5), num_hidden_layers=5)  # MLA before, between and after KDA layers
LENGTHS = (65, 1, 200, 64, 2, 63)
FIELDS = {"output_router_logits": True, "output_hidden_states": True}


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return build(CONFIG)


def assert_same(got: Tensor, want: Tensor, name: str = "") -> None:
    """Equal up to the rounding of their dtype."""
    assert got.shape == want.shape and got.dtype == want.dtype, name
    assert (err := rel_err(got, want)) <= FLOOR[want.dtype], f"{name} {err}"


def documents(*lengths: int, seed: int = 1) -> list[Tensor]:
    return list(random_ids(CONFIG, sum(lengths), seed=seed).split(lengths))


def collate(docs: list[Tensor], **kwargs) -> dict[str, Tensor]:
    """What transformers' collator makes of the documents, without the labels."""
    batch = DataCollatorWithFlattening(**kwargs)([{"input_ids": d.tolist()} for d in docs])
    del batch["labels"]
    return batch


def cumulative(docs: list[Tensor], dtype=torch.int64) -> Tensor:
    return torch.tensor([0, *(len(d) for d in docs)]).cumsum(0).to(dtype)


def only(batch: dict, *names: str) -> dict:
    return {k: v for k, v in batch.items() if k in ("input_ids", *names)}


FLASH = {"return_flash_attn_kwargs": True, "return_position_ids": False}
WAYS = {  # to say that a row [1, T] is packed
    "cu_seqlens": lambda d: {"input_ids": torch.cat(d)[None], "cu_seqlens": cumulative(d)},
    "int32 cu_seqlens": lambda d: {
        "input_ids": torch.cat(d)[None],
        "cu_seqlens": cumulative(d, torch.int32),
    },
    "collator": collate,
    "collator, everything": lambda d: collate(
        d, return_flash_attn_kwargs=True, return_seq_idx=True
    ),
    "collator, flash": lambda d: collate(d, **FLASH),
    "collator, seq_idx": lambda d: collate(d, return_position_ids=False, return_seq_idx=True),
    "collator, from 2": lambda d: collate(d, position_ids_start=2),
    "cu_seq_lens_q": lambda d: only(collate(d, **FLASH), "cu_seq_lens_q"),
    "cu_seq_lens_k": lambda d: only(collate(d, **FLASH), "cu_seq_lens_k", "max_length_k"),
    "all at once": lambda d: (
        collate(d, return_flash_attn_kwargs=True, return_seq_idx=True)
        | {"cu_seqlens": cumulative(d), "attention_mask": torch.ones(1, sum(map(len, d)))}
    ),
}


def separate_loss(model, docs: list[Tensor]) -> Tensor:
    """Mean over the tokens that have a predecessor in their own document."""
    logits = torch.cat([model(d[None]).logits[0, :-1] for d in docs])
    return F.cross_entropy(logits, torch.cat([d[1:] for d in docs]))


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, weights, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


# ---- packed rows --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_packed_equals_separate(way, model):
    docs = documents(*LENGTHS)
    packed = model(**WAYS[way](docs), **FIELDS)
    alone = [model(d[None], **FIELDS) for d in docs]
    assert packed.past_key_values is None
    assert_same(packed.logits, torch.cat([a.logits for a in alone], 1))
    assert len(packed.router_logits) == 4  # the first layer is dense
    for got, *want in zip(packed.router_logits, *(a.router_logits for a in alone), strict=True):
        assert_same(got, torch.cat(want))
    for got, *want in zip(packed.hidden_states, *(a.hidden_states for a in alone), strict=True):
        assert_same(got, torch.cat(want, 1))


@pytest.mark.parametrize("way", ["collator", "cu_seqlens"])
def test_loss_and_gradients_of_packed_documents(way, model):
    docs = documents(*LENGTHS)
    labels = DataCollatorWithFlattening()([{"input_ids": d.tolist()} for d in docs])["labels"]
    want = separate_loss(model, docs)
    got = model(**WAYS[way](docs), labels=labels).loss
    assert_same(got, want)
    n = sum(LENGTHS) - len(LENGTHS)
    assert_same(model(**WAYS[way](docs), labels=labels, num_items_in_batch=2 * n).loss, want / 2)
    got, want = gradients(model, got), gradients(model, want)
    for name in want:
        assert_same(got[name], want[name], name)


@torch.no_grad()
@pytest.mark.parametrize("way", ["collator", "cu_seqlens"])
def test_documents_of_one_token_and_a_single_document(way, model):
    for docs in (documents(1, 1, 1), documents(1), documents(70)):
        want = torch.cat([model(d[None]).logits for d in docs], 1)
        assert_same(model(**WAYS[way](docs)).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("where", ["start", "middle", "end", "everywhere"])
def test_empty_documents(where, model):
    docs = documents(5, 64, 66)
    empty = docs[0][:0]
    a, b, c = docs
    row = {
        "start": [empty, a, b, c],
        "middle": [a, empty, empty, b, c],
        "end": [a, b, c, empty],
        "everywhere": [empty, a, empty, b, empty, c, empty, empty],
    }[where]
    want = torch.cat([model(d[None]).logits for d in docs], 1)
    for way in ("cu_seqlens", "collator, flash", "collator"):
        assert_same(model(**WAYS[way](row)).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("say", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("padding", [None, "counting", "zeros"])
def test_batches_of_packed_rows(say, padding, model):
    """[B, T] with documents of other lengths in every row, also with padding at the end of rows.

    Numbers go on increasing from row to row, so that only the row itself says where one ends.
    Padding may go on counting or be all zeros: the mask says what it is.
    """
    lengths = [(63, 1, 66), (2, 128), (130,)] if padding is None else [(63, 1), (2, 97, 31), (70,)]
    T, docs = 130, [documents(*n, seed=i) for i, n in enumerate(lengths)]
    ids, numbers, mask = (torch.zeros(3, T, dtype=torch.long) for _ in range(3))
    for b, row in enumerate(docs):
        n = sum(map(len, row))
        ids[b, :n], mask[b, :n] = torch.cat(row), 1
        if say == "position_ids":
            numbers[b, :n] = torch.cat([500 * b + torch.arange(len(d)) for d in row])
        else:  # the first document of a row has the number of the last one of the row before
            first = 7 if b == 0 else int(numbers.max())
            numbers[b, :n] = torch.cat(
                [torch.full((len(d),), first + i) for i, d in enumerate(row)]
            )
        if padding == "counting":
            step = int(say == "position_ids")
            numbers[b, n:] = numbers[b, n - 1] + step * torch.arange(1, T - n + 1)
    arguments = {say: numbers} | ({} if padding is None else {"attention_mask": mask})
    out = model(ids, **arguments, **FIELDS)
    for b, row in enumerate(docs):
        want = torch.cat([model(d[None]).logits for d in row], 1)[0]
        assert_same(out.logits[b, : len(want)], want)
        assert (out.logits[b, len(want) :] == 0).all()
    assert all(x.shape == (3 * T, CONFIG.num_experts) for x in out.router_logits)
    assert padding is None or all((x[mask.flatten() == 0] == 0).all() for x in out.router_logits)


@torch.no_grad()
def test_one_row_of_position_ids_serves_all_rows(model):
    docs = [documents(3, 66, seed=i) for i in range(2)]
    ids = torch.stack([torch.cat(d) for d in docs])
    positions = torch.cat((torch.arange(3), torch.arange(66)))[None]
    want = torch.stack([torch.cat([model(x[None]).logits[0] for x in d]) for d in docs])
    assert_same(model(ids, position_ids=positions).logits, want)
    assert_same(model(ids, seq_idx=(torch.arange(69) >= 3).int()[None]).logits, want)


@torch.no_grad()
def test_what_is_not_packed(model):
    """Positions that increase, or start anywhere, and equal documents: one sequence per row."""
    ids = random_ids(CONFIG, 2, 70)
    want = model(ids).logits
    left = torch.ones(2, 70)
    left[0, :5] = 0
    generated = (left.cumsum(1) - 1).clamp(min=0).long()  # zeros at the padding, as generate has it
    for arguments in (
        {"position_ids": torch.arange(70)[None]},
        {"position_ids": torch.arange(7, 77).expand(2, 70)},
        {"position_ids": 3 * torch.arange(70)[None]},
        {"seq_idx": torch.full((2, 70), 4, dtype=torch.int32)},
        {"attention_mask": torch.ones(2, 70)},
    ):
        out = model(ids, **arguments)
        assert isinstance(out.past_key_values, KimiLinearCache)
        assert torch.equal(out.logits, want)
    out = model(ids, attention_mask=left, position_ids=generated)
    assert out.past_key_values.lengths.tolist() == [65, 70]
    assert_same(out.logits[1], want[1])


@pytest.mark.parametrize("way", ["collator", "cu_seqlens"])
def test_a_document_does_not_depend_on_its_neighbours(way, model):
    docs, n = documents(65, 66, 70), slice(65, 131)
    results = []
    for others in (docs, documents(65, 66, 70, seed=2)):
        batch = WAYS[way]([others[0], docs[1], others[2]])
        embeds = model.model.embed_tokens(batch.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, **batch).logits
        loss = F.cross_entropy(logits[0, n][:-1], docs[1][1:])
        into, weights = (
            torch.autograd.grad(loss, embeds, retain_graph=True)[0],
            gradients(model, loss),
        )
        outside = torch.cat((into[:, :65], into[:, 131:]), 1)
        assert (outside == 0).all() and into.abs().max() > 0
        results.append((logits[0, n], into[0, n], weights))
    (logits, into, weights), (logits_, into_, weights_) = results
    assert_same(logits, logits_)
    assert_same(into, into_)
    for name in weights:
        assert_same(weights[name], weights_[name], name)


def test_packed_documents_and_a_cache_exclude_each_other(model):
    for way in ("cu_seqlens", "collator", "collator, flash", "collator, seq_idx"):
        batch = WAYS[way](documents(4, 5))
        cache = KimiLinearCache(CONFIG)
        for arguments in ({"use_cache": True}, {"past_key_values": cache}):
            with pytest.raises(ValueError, match="packed documents cannot fill a cache"):
                model(**batch, **arguments)
        assert cache.batch_size == -1
        assert model(**batch, use_cache=False).past_key_values is None


ids = random_ids(CONFIG, 1, 9)
bounds = torch.tensor
BAD = {  # name: (what the message says, arguments)
    "starts late": ("cu_seqlens starts at 1, want 0", {"cu_seqlens": bounds([1, 9])}),
    "decreases": ("cu_seqlens decreases from 6 to 4", {"cu_seqlens": bounds([0, 6, 4, 9])}),
    "ends early": (
        "cu_seqlens ends at 8, want the number of tokens, 9",
        {"cu_seqlens": bounds([0, 8])},
    ),
    "ends late": ("cu_seqlens ends at 12", {"cu_seqlens": bounds([0, 5, 12])}),
    "float": (
        "cu_seqlens is torch.float32, want int32 or int64",
        {"cu_seqlens": bounds([0.0, 9.0])},
    ),
    "2-D": ("cu_seqlens has shape", {"cu_seqlens": bounds([[0, 4, 9]])}),
    "one number": ("cu_seqlens has shape", {"cu_seqlens": bounds([9])}),
    "two rows": (
        "cu_seqlens needs one packed row",
        {"input_ids": random_ids(CONFIG, 2, 9), "cu_seqlens": bounds([0, 9])},
    ),
    "flash ends early": ("cu_seqlens ends at 8", {"cu_seq_lens_q": bounds([0, 8])}),
    "conflict with q": (
        "cu_seq_lens_q differs",
        {"cu_seqlens": bounds([0, 4, 9]), "cu_seq_lens_q": bounds([0, 5, 9])},
    ),
    "q and k differ": (
        "cu_seq_lens_k differs",
        {"cu_seq_lens_q": bounds([0, 4, 9]), "cu_seq_lens_k": bounds([0, 9])},
    ),
    "with padding": (
        "cu_seqlens packs documents, but attention_mask marks padding",
        {"cu_seqlens": bounds([0, 4, 9]), "attention_mask": (torch.arange(9) < 8)[None]},
    ),
    "positions": ("position_ids has shape", {"position_ids": torch.arange(8)[None]}),
    "3-D positions": ("position_ids has shape", {"position_ids": torch.arange(9)[None, None]}),
    "positions of other rows": (
        "position_ids has shape",
        {"position_ids": torch.arange(18).view(2, 9)},
    ),
    "seq_idx": ("seq_idx has shape", {"seq_idx": torch.zeros(9, dtype=torch.int32)}),
    "mask": ("attention_mask has shape", {"attention_mask": torch.ones(1, 8)}),
    "4-D mask": ("attention_mask has shape", {"attention_mask": torch.ones(1, 1, 9, 9)}),
    "unknown": ("token_type_ids is not an argument", {"token_type_ids": torch.zeros(1, 9)}),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name, model):
    message, arguments = BAD[name]
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids} | arguments))


# ---- padding ------------------------------------------------------------------------------------

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0]],
    "holes": [[0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 1]],
    "an empty row": [[0, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
}


def padded_batch(kind: str, width: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask, each column of MASKS repeated."""
    mask = torch.tensor(MASKS[kind]).repeat_interleave(width, 1)
    return random_ids(CONFIG, *mask.shape), mask


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("kind", MASKS)
def test_padded_rows_equal_rows_alone(kind, dtype, model):
    for width in (1, 17):
        ids, mask = padded_batch(kind, width)
        other = torch.where(mask.bool(), ids, random_ids(CONFIG, *ids.shape, seed=2))
        out = model(ids, attention_mask=mask.to(dtype), **FIELDS)
        assert torch.equal(out.logits, model(other, attention_mask=mask.to(dtype)).logits)
        real = mask.bool()
        for x in (out.logits, *out.hidden_states, *out.router_logits):
            x = x.view(*mask.shape, -1)
            assert (x[~real] == 0).all() and x.isfinite().all()
        for b in (b for b in range(3) if real[b].any()):
            alone = model(ids[b, real[b]][None], **FIELDS)
            assert_same(out.logits[b, real[b]], alone.logits[0])
            for got, want in zip(out.hidden_states, alone.hidden_states, strict=True):
                assert_same(got[b, real[b]], want[0])
            for got, want in zip(out.router_logits, alone.router_logits, strict=True):
                assert_same(got.view(3, mask.shape[1], -1)[b, real[b]], want)


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_of_padded_rows_sum_up(kind, model):
    ids, mask = padded_batch(kind, 9)
    real = mask.bool()
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, attention_mask=mask).logits.square().sum().backward(inputs=[embeds])
    assert (embeds.grad[~real] == 0).all()
    got = gradients(model, model(ids, attention_mask=mask).logits.square().sum())
    rows = [ids[b, real[b]][None] for b in range(3) if real[b].any()]
    want = gradients(model, sum(model(x).logits.square().sum() for x in rows))
    for name in want:
        assert_same(got[name], want[name], name)


def test_loss_of_right_padded_rows(model):
    ids, mask = padded_batch("right", 9)
    labels = ids.masked_fill(mask == 0, -100)
    rows = [ids[b, mask[b].bool()] for b in range(3)]
    assert_same(model(ids, attention_mask=mask, labels=labels).loss, separate_loss(model, rows))


def test_a_batch_of_nothing_but_padding(model):
    out = model(random_ids(CONFIG, 2, 5), attention_mask=torch.zeros(2, 5), **FIELDS)
    for x in (out.logits, *out.hidden_states, *out.router_logits):
        assert (x == 0).all()
    assert all((g == 0).all() for g in gradients(model, out.logits.sum()).values())
