import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from kimi_linear import KimiLinearTokenizer
from kimi_linear.text import byte_tokenizer
from kimi_linear.tokenization_kimi_linear import SPECIAL_NAMES, read_ranks

from .tokenizer_helpers import (
    BASE,
    encoding,
    fuzz,
    ranks,
    token_bytes,
    write_ranks,
    write_released,
)

REAL = os.environ.get("KIMI_TIKTOKEN_MODEL")  # the path of the released tiktoken.model


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def tokenizer(released) -> KimiLinearTokenizer:
    return KimiLinearTokenizer.from_pretrained(released)


def compare_with_tiktoken(tokenizer: KimiLinearTokenizer, ranks: dict[bytes, int], n: int) -> None:
    texts = fuzz(n)
    ours = tokenizer(texts)["input_ids"]
    wanted = encoding(ranks).encode_ordinary_batch(texts, num_threads=2)
    different = [text for text, a, b in zip(texts, ours, wanted, strict=True) if a != b]
    assert not different, f"{len(different)} of {n}, for example {different[:3]}"
    assert tokenizer.batch_decode(ours) == texts


def test_equals_tiktoken_on_fuzzed_text(tokenizer):
    compare_with_tiktoken(tokenizer, ranks(), 120_000)


@pytest.mark.skipif(not REAL, reason="KIMI_TIKTOKEN_MODEL is not set")
def test_equals_tiktoken_with_the_released_file():
    tokenizer = KimiLinearTokenizer(REAL)
    assert len(tokenizer) == 163_840
    assert tokenizer.convert_tokens_to_ids(["[BOS]", "<|im_end|>", "[PAD]"]) == [
        163_584, 163_586, 163_839,
    ]  # fmt: skip
    compare_with_tiktoken(tokenizer, read_ranks(REAL), 120_000)


def test_equals_tiktoken_on_every_character(tokenizer):
    """Characters next to their neighbours, alone, and after a letter; no class may differ."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    blocks = ["".join(characters[i : i + 97]) for i in range(0, len(characters), 97)]
    texts = blocks + [" a".join(block) for block in blocks] + [" 'S".join(b) for b in blocks]
    reference = encoding(ranks())
    assert tokenizer(texts)["input_ids"] == reference.encode_ordinary_batch(texts, num_threads=2)


@pytest.mark.parametrize("alphabet, length", [("ab", 9), ("abc", 6)])
def test_merges_are_exact_for_any_ranks(tmp_path, alphabet, length):
    """Also for ranks that no training gives: a token before its parts, many splits of one."""
    rng = random.Random(0)
    texts = [
        "".join(text)
        for n in range(1, length + 1)
        for text in itertools.product(alphabet, repeat=n)
    ]
    for _ in range(8):
        table = {bytes([i]): i for i in range(256)}
        pool = [letter.encode() for letter in alphabet]
        while len(pool) < 30:
            token = rng.choice(pool) + rng.choice(pool)
            if len(token) < 8 and token not in pool:
                pool.append(token)
        tokens = pool[len(alphabet) :]
        rng.shuffle(tokens)
        table |= {token: 256 + i for i, token in enumerate(tokens)}
        tokenizer = KimiLinearTokenizer(write_ranks(tmp_path / "tiktoken.model", table))
        reference = encoding(table).encode_ordinary_batch(texts, num_threads=2)
        assert tokenizer(texts)["input_ids"] == reference


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("helloWorld", ["hello", "World"]),
        ("parseHTTPResponse", ["parse", "HTTPResponse"]),
        ("it's DON'T I'd", ["it's", " DON'T", " I'd"]),
        ("hello你好world", ["hello", "你好", "world"]),
        ("a,你好", ["a", ",", "你好"]),
        ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("1234567", ["123", "456", "7"]),
        ("a  b \n\n c", ["a", " ", " b", " \n\n", " c"]),
        ("x != y;\r\n", ["x", " !=", " y", ";\r\n"]),
        ("日本語のテスト", ["日本語", "のテスト"]),
    ],
)
def test_pre_tokeniser(tokenizer, text, pieces):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


def test_special_ids(tokenizer):
    assert len(tokenizer) == BASE + 256 and tokenizer.vocab_size == BASE
    names = {BASE + i: name for i, name in SPECIAL_NAMES.items()}
    added = tokenizer.added_tokens_decoder
    assert sorted(added) == list(range(BASE, BASE + 256))
    for i, token in added.items():
        assert token.content == names.get(i, f"<|reserved_token_{i}|>")
        assert token.special is (not token.content.startswith("<|tool_call"))
        parts = [*tokenizer.encode("a"), i, *tokenizer.encode("b")]
        assert tokenizer.encode(f"a{token.content}b") == parts
    ids = {name: i - BASE for i, name in names.items()}
    assert (ids["[BOS]"], ids["[EOS]"], ids["<|im_end|>"], ids["[UNK]"], ids["[PAD]"]) == (
        0, 1, 2, 254, 255,
    )  # fmt: skip
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BASE, BASE + 1)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (BASE + 255, BASE + 254)
    assert tokenizer.stop_ids == [BASE + 2, BASE + 1]


def test_released_ids_are_those_of_the_config():
    config = json.loads(Path("configs/kimi_linear_48b_a3b.json").read_text())
    name = {163_584 + i: name for i, name in SPECIAL_NAMES.items()}
    assert name[config["bos_token_id"]] == "[BOS]"
    assert name[config["eos_token_id"]] == "<|im_end|>"
    assert name[config["pad_token_id"]] == "[PAD]"
    assert max(name) + 1 == config["vocab_size"]


def test_names_without_a_tokenizer_config(released, tokenizer):
    alone = KimiLinearTokenizer(released / "tiktoken.model")
    assert alone.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert alone.special_tokens_map == tokenizer.special_tokens_map


def test_names_of_a_tokenizer_config_win(released):
    named = {BASE: "[BOS]", BASE + 1: "[EOS]", BASE + 2: "<|end_of_msg|>"}
    other = KimiLinearTokenizer(released / "tiktoken.model", added_tokens_decoder=named)
    assert other.convert_ids_to_tokens([BASE + 2, BASE + 3]) == [
        "<|end_of_msg|>", f"<|reserved_token_{BASE + 3}|>",
    ]  # fmt: skip
    assert len(other) == BASE + 256 and other.pad_token is None
    assert other.stop_ids == [BASE + 1]


def test_every_base_id_is_its_bytes(tokenizer):
    table = {i: token for token, i in ranks().items()}
    assert token_bytes(tokenizer, list(range(BASE))) == [table[i] for i in range(BASE)]
    assert tokenizer.decode([ranks()[b"\xff"]]) == "\ufffd"  # a lone byte is no character


def test_offsets_cover_the_text(tokenizer):
    for text in fuzz(2_000, seed=2):
        encoded = tokenizer(text, return_offsets_mapping=True)
        covered = 0
        tokens = token_bytes(tokenizer, encoded["input_ids"])
        for (start, end), token in zip(encoded["offset_mapping"], tokens, strict=True):
            assert start <= covered <= end  # tokens of one character share its place
            assert token in text[start:end].encode()
            covered = end
        assert covered == len(text)


def test_nothing_is_added_and_skipping_keeps_tool_tokens(tokenizer):
    ids = tokenizer.encode("hi")
    assert ids == tokenizer.encode("hi", add_special_tokens=False)
    text = "[BOS]hi<|tool_call_begin|>x<|tool_call_end|><|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert kept == "hi<|tool_call_begin|>x<|tool_call_end|>"


def test_split_special_tokens_splits_all(tokenizer):
    text = "a[EOS]<|im_end|> <|tool_call_begin|><|reserved_token_2053|>"
    encoded = tokenizer(text, split_special_tokens=True, return_offsets_mapping=True)
    assert encoded["input_ids"] == encoding(ranks()).encode_ordinary(text)
    assert encoded["offset_mapping"][-1][1] == len(text)
    assert tokenizer.encode(text)[-1] == BASE + 5


def test_batch_is_padded_left(tokenizer):
    batch = tokenizer(["a", "b c d"], padding=True)
    short, long = batch["input_ids"]
    assert len(short) == len(long) and short[0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0] == [0] * (len(long) - 1) + [1]


@pytest.mark.parametrize("ids", [[BASE + 256], [0, -1], [163_840], [[0], [BASE + 300]]])
def test_ids_beyond_the_vocabulary(tokenizer, ids):
    with pytest.raises(ValueError, match=rf"token_ids: got -?\d+, want ids from 0 to {BASE + 255}"):
        tokenizer.decode(ids)
    flat = ids[-1] if isinstance(ids[-1], list) else ids
    with pytest.raises(ValueError, match="token_ids: got"):
        tokenizer.convert_ids_to_tokens(flat)


def test_half_a_character(tokenizer):
    with pytest.raises(ValueError, match=r"got half a character, '\\ud83d', at position 2"):
        tokenizer(["fine", "no\ud83d"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2 + 3]


LINE = b"IQ== 33\n"  # "!"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "got no token for the byte 0"),
        (lambda data: data[:-3], r"truncated|want a base64 token"),
        (lambda data: data[: data.rindex(b" ")], "want a base64 token and its rank"),
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "is the file truncated"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"".join(data.splitlines(True)[200:]), "none of rank 0"),
        (lambda data: data.replace(LINE, b""), "none of rank 33"),
        (lambda data: data.replace(LINE, b"!!!! 33\n"), "line 34: got b'!!!! 33'"),
        (lambda data: data.replace(LINE, b"IQ== x\n"), "line 34"),
        (lambda data: data.replace(LINE, b"IA== 33\n"), "twice"),
        (lambda data: data.replace(LINE, b"enp6eno= 33\n"), "got no token for the byte 33"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (lambda data: bytes(range(256)) * 40, "want a base64 token"),
    ],
)
def test_damaged_ranks(tmp_path, released, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(released, folder)
    table = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    table |= {token: 258 + i for i, token in enumerate(t for t in ranks() if len(t) > 3)}
    write_ranks(folder / "tiktoken.model", table)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    shift = len(table) - BASE
    config["added_tokens_decoder"] = {
        str(int(i) + shift): token for i, token in config["added_tokens_decoder"].items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = (folder / "tiktoken.model").read_bytes()
    assert len(AutoTokenizer.from_pretrained(folder)) == len(table) + 256
    (folder / "tiktoken.model").write_bytes(damage(data))
    before = files(folder)
    for load in (KimiLinearTokenizer.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            load(folder)
        assert "tiktoken.model" in str(error.value)
    assert files(folder) == before


def test_special_tokens_that_do_not_fit(released):
    path = released / "tiktoken.model"
    with pytest.raises(ValueError, match="special token twice"):
        KimiLinearTokenizer(path, added_tokens_decoder={BASE: "[BOS]", BASE + 1: "[BOS]"})
    with pytest.raises(ValueError, match=f"names {BASE - 1} to {BASE}"):
        KimiLinearTokenizer(path, added_tokens_decoder={BASE - 1: "[BOS]", BASE: "[EOS]"})
    with pytest.raises(ValueError, match=r"want a tiktoken\.model"):
        KimiLinearTokenizer()


@pytest.mark.parametrize("damage", [cut, lambda data: b"{}", lambda data: b""])
def test_damaged_tokenizer_json(tmp_path, tokenizer, damage):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        KimiLinearTokenizer(tokenizer_file=path)


def test_tokenizer_json_of_another_model(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="want a BPE with 256"):
        KimiLinearTokenizer(tokenizer_file=tmp_path / "tokenizer.json")


def test_tokenizer_json_gets_kimis_split(tmp_path, tokenizer):
    """As transformers' own conversion of the released file writes it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.model.ignore_merges = False
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "helloWorld it's 1234567"
    assert backend.encode(text).ids != tokenizer.encode(text)
    repaired = KimiLinearTokenizer(tokenizer_file=tmp_path / "tokenizer.json")
    assert repaired.encode(text) == tokenizer.encode(text)
    assert repaired.backend_tokenizer.model.ignore_merges


def test_auto_tokenizer(tmp_path, released, tokenizer):
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        found = AutoTokenizer.from_pretrained(released, **options)
        assert type(found) is KimiLinearTokenizer
        assert found.added_tokens_decoder == tokenizer.added_tokens_decoder
    found.save_pretrained(tmp_path)
    shutil.copy(released / "config.json", tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is KimiLinearTokenizer
    assert again.encode("helloWorld<|im_end|>") == found.encode("helloWorld<|im_end|>")
    assert again.model_max_length == 1_048_576
    (tmp_path / "config.json").unlink()
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is KimiLinearTokenizer


def test_auto_tokenizer_leaves_others_alone(tmp_path, released):
    byte_tokenizer().save_pretrained(tmp_path)  # what `kimi-linear train` gives a new model
    shutil.copy(released / "config.json", tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TokenizersBackend
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TokenizersBackend
    assert type(TokenizersBackend.from_pretrained(released)) is TokenizersBackend
    # The same class name in another family is not ours.
    other = tmp_path / "other"
    shutil.copytree(released, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(other, trust_remote_code=False)


PLAIN = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("kimi_")]
texts = json.load(open(sys.argv[2]))
chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
added = {i: [t.content, t.special] for i, t in tokenizer.added_tokens_decoder.items()}
named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
print(json.dumps([tokenizer(texts)["input_ids"], chat, added, named]))
"""


def test_saved_files_load_without_this_package(tmp_path, released, tokenizer):
    folder, texts = tmp_path / "saved", fuzz(300, seed=3)
    texts += ["<|im_end|>a[EOS] <|tool_call_end|><|reserved_token_2060|>"]
    tokenizer.save_pretrained(folder)
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(files(folder)) == names
    assert b"auto_map" not in files(folder)["tokenizer_config.json"]
    shutil.copy(released / "config.json", folder)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [sys.executable, "-P", "-c", PLAIN, folder, tmp_path / "texts.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ids, chat, added, named = json.loads(done.stdout.splitlines()[-1])
    assert ids == tokenizer(texts)["input_ids"]
    assert chat == tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], return_dict=False
    )
    ours = tokenizer.added_tokens_decoder.items()
    assert added == {str(i): [token.content, token.special] for i, token in ours}
    assert named == [BASE, BASE + 1, BASE + 255]


def test_copies_and_added_tokens(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode("helloWorld<|im_end|>") == tokenizer.encode("helloWorld<|im_end|>")
    chat = [{"role": "user", "content": "<mine>[EOS]"}]
    before = copied.apply_chat_template(chat, return_dict=False)
    assert copied.add_tokens(["<mine>"]) == 1
    after = copied.apply_chat_template(chat, return_dict=False)
    assert BASE + 256 in after and copied.decode(after) == copied.decode(before)
    assert {i for i in after if i >= BASE} - {i for i in before if i >= BASE} == {BASE + 256}
    assert copied.decode(copied.encode("a<mine>b")) == "a<mine>b"
    assert copied.encode("<mine>") == [BASE + 256]
    assert copied.encode("<mine>[EOS]", split_special_tokens=True) != copied.encode("<mine>[EOS]")


def test_threads(tokenizer):
    """Chats with special tokens in them are encoded while others encode."""
    chat = [{"role": "user", "content": "a<|im_end|>b"}]
    wanted = tokenizer.apply_chat_template(chat, return_dict=False), tokenizer.encode("c<|im_end|>")
    wrong: list[object] = []

    def work() -> None:
        for _ in range(50):
            got = (
                tokenizer.apply_chat_template(chat, return_dict=False),
                tokenizer.encode("c<|im_end|>"),
            )
            if got != wanted:
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_generic_tokenizer_of_another_kind_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a WordLevel"):
        KimiLinearTokenizer(tokenizer_file=tmp_path / "tokenizer.json")
