import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.cli import main
from kimi_linear.info import cache_bytes, describe, parameter_counts
from kimi_linear.text import TokenBlocks, byte_tokenizer, unigram_entropy

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def config_of(name: str) -> KimiLinearConfig:
    return KimiLinearConfig.from_json_file(CONFIGS / f"{name}.json")


def test_released_model_in_numbers():
    config = config_of("kimi_linear_48b_a3b")
    counts = parameter_counts(config)
    assert counts["total"] == 49_122_681_728
    assert counts["routed"] == 47_110_422_528
    assert cache_bytes(config)[0] == 8_064
    assert cache_bytes(config, fp8=True)[0] == 7 * (512 + 2 * 64 + 4)
    assert cache_bytes(config.all_mla()) == (31_104, 0)


def test_counts_agree_with_a_real_model_and_cache():
    config = config_of("tiny")
    model = KimiLinearForCausalLM(config)
    counts = parameter_counts(config)
    assert counts["total"] == sum(x.numel() for x in model.state_dict().values())
    assert 1e6 < counts["total"] < 5e6
    cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    per_token, per_sequence = cache_bytes(config)
    latents, states = 0, 0
    for layer in cache.layers:
        if hasattr(layer, "states"):
            conv, S = layer.states()
            states += conv.numel() * 2 + S.numel() * 4
        else:
            latents += layer.keys[:, :9].numel() * 2 // 9
    assert (per_token, per_sequence) == (latents, states)


def test_readme_shows_what_info_prints(capsys):
    assert main(["info", str(CONFIGS / "kimi_linear_48b_a3b.json")]) == 0
    printed = capsys.readouterr().out
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- info -->\n```\n(.*?)```\n<!-- /info -->", readme, re.DOTALL)
    assert shown and shown.group(1) == printed


@pytest.mark.parametrize("name", ["tiny", "kimi_linear_128e"])
def test_info_describes_every_config(name):
    report = describe(config_of(name))
    assert f"{parameter_counts(config_of(name))['total']:,}" in report


def test_train_then_generate_in_new_processes(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "kimi_linear.cli", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    options = ["--steps", "12", "--batch-size", "2", "--length", "64", "--learning-rate", "0.003"]
    printed = run(
        "train", str(CONFIGS / "tiny.json"), "--text", str(text), "--output", str(out), *options
    )
    results = json.loads((out / "results.json").read_text())
    assert results["held_out_loss_after"] < results["unigram_entropy"] < 3.3
    assert results["held_out_loss_before"] > 5
    assert f"{results['held_out_loss_after']:.3f} after" in printed
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        256,
        257,
        258,
    )
    greedy = ["--max-new-tokens", "5", "--temperature", "0"]
    assert run("generate", str(out), "--prompt", "the q", *greedy).startswith("the q")


TEXT = ["--text", "{text}", "--output", "{dir}/o"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["info", "nowhere"], "nowhere does not exist"),
        (["info", "{dir}"], "is not a model directory or a config.json"),
        (["info", "{text}"], "is not a JSON file"),
        (["info", "{other}"], "has model_type 'llama', want 'kimi_linear'"),
        (["info", "{list}"], "has model_type None"),
        (["info", "{bad}"], "hidden_size: got 0"),
        (["generate", "{other}", "--prompt", "x"], "is not a model directory"),
        (["generate", "{bare}", "--prompt", "x"], "has no tokenizer"),
        (["train", "{tiny}", "--text", "nowhere", "--output", "{dir}/o"], "nowhere is not a file"),
        (["train", "{tiny}", "--text", "{text}", "--output", "{dir}/o"], "at least one block"),
        (["train", "{tiny}", *TEXT, "--steps", "-1"], "steps: got -1, want at least 0"),
        (["train", "{tiny}", *TEXT, "--batch-size", "0"], "batch_size: got 0, want at least 1"),
        (["train", "{tiny}", *TEXT, "--length", "1"], "length: got 1, want at least 2"),
        (["train", "{tiny}", *TEXT, "--held-out", "1.5"], "held_out: got 1.5, want a share"),
        (["train", "{small}", "--text", "{text}", "--output", "{dir}/o"], "vocab_size: got 100"),
        (["train", "{tiny}", "--text", "{latin}", "--output", "{dir}/o"], "latin.json: 'utf-8'"),
        (["train", "{tiny}", "--text", "{text}", "--output", "{text}"], "text.json: [Errno"),
        (["train", "{bare}", *TEXT], "has no tokenizer"),
        (["train", "{empty}", *TEXT], "empty: "),
        (["generate", "{empty}", "--prompt", "x"], "empty: "),
        (["generate", "{cut}", "--prompt", "x"], "cut: "),
        (["generate", "{few}", "--prompt", "x"], "a tokenizer of 259 tokens, want at most 100"),
        (["train", "{few}", *TEXT], "a tokenizer of 259 tokens, want at most 100"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, tmp_path, capsys):
    tiny = json.loads((CONFIGS / "tiny.json").read_text())
    files = {
        "text": "not json",
        "other": '{"model_type": "llama"}',
        "list": "[]",
        "bad": json.dumps({**tiny, "hidden_size": 0}),
        "small": json.dumps({**tiny, "vocab_size": 100, "pad_token_id": 0}),
    }
    paths = {"dir": tmp_path, "tiny": CONFIGS / "tiny.json"}
    for name, content in files.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(content)
    paths["latin"] = tmp_path / "latin.json"
    paths["latin"].write_bytes(b"caf\xe9")
    for name in ("bare", "empty", "cut", "few"):
        paths[name] = tmp_path / name
        paths[name].mkdir()
        (paths[name] / "config.json").write_text(
            files["small"] if name == "few" else json.dumps(tiny)
        )
        if name != "bare":
            byte_tokenizer().save_pretrained(paths[name])
    (paths["cut"] / "model.safetensors").write_bytes(b"too short")
    assert main([a.format(**paths) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kimi-linear {arguments[0]}: ") and message in error


@pytest.mark.parametrize("command", [[], ["info"], ["train"], ["generate"], ["chat"], ["serve"]])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_byte_tokenizer_is_exact():
    tokenizer = byte_tokenizer()
    text = "Zürich 東京 \t\n\r 🙂 <|x|>  two  spaces \x00"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_token_blocks_and_entropy():
    blocks = TokenBlocks(torch.arange(10), 4)
    assert len(blocks) == 2 and blocks[1]["labels"].tolist() == [4, 5, 6, 7]
    assert unigram_entropy(torch.tensor([0, 1, 5, 7])) == pytest.approx(1.3862943611)
    with pytest.raises(ValueError, match=r"^tokens: got 3"):
        TokenBlocks(torch.arange(3), 4)
