"""The `kimi-linear` command."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EPILOG = """examples:
  kimi-linear info configs/kimi_linear_48b_a3b.json
  kimi-linear train configs/tiny.json --text book.txt --output my-model
  kimi-linear generate my-model --prompt "Once upon a time"
"""


class UsageError(Exception):
    """Something the user can put right; printed without a traceback."""


def model_path(argument: str, *, directory: bool) -> Path:
    """A model directory, or where allowed a config file, that is really one of ours."""
    path = Path(argument)
    kind = "a model directory" if directory else "a model directory or a config.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist; want {kind}")
    config = path / "config.json" if path.is_dir() else path
    if (directory and not path.is_dir()) or not config.is_file():
        raise UsageError(f"{path} is not {kind}")
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{config} is not a JSON file; want {kind}") from None
    found = fields.get("model_type") if isinstance(fields, dict) else None
    if found != "kimi_linear":
        raise UsageError(f"{config} has model_type {found!r}, want 'kimi_linear'")
    return path


def run_info(args: argparse.Namespace) -> None:
    from kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from kimi_linear.info import describe

    path = model_path(args.model, directory=False)
    config = path / "config.json" if path.is_dir() else path
    print(describe(KimiLinearConfig.from_json_file(config)))


def run_train(args: argparse.Namespace) -> None:
    source = model_path(args.model, directory=False)
    texts = [Path(text) for text in args.text]
    for text in texts:
        if not text.is_file():
            raise UsageError(f"--text {text} is not a file")
    try:
        import accelerate  # noqa: F401  # the Trainer needs it
    except ImportError:
        raise UsageError("training needs accelerate: pip install 'kimi-linear[train]'") from None
    from kimi_linear.train import train

    results = train(
        source, texts, Path(args.output),
        steps=args.steps, batch_size=args.batch_size, length=args.length,
        learning_rate=args.learning_rate, held_out=args.held_out, seed=args.seed,
    )  # fmt: skip
    before, after = results["held_out_loss_before"], results["held_out_loss_after"]
    print(f"held-out loss   {before:.3f} before, {after:.3f} after (nats per token)")
    print(f"unigram entropy {results['unigram_entropy']:.3f} (the best without context)")
    print(f"saved to        {args.output}")


def run_generate(args: argparse.Namespace) -> None:
    path = model_path(args.model, directory=True)
    from transformers import AutoTokenizer, TextStreamer, set_seed

    from kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} has no tokenizer that transformers can load: {error}") from None
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = KimiLinearForCausalLM.from_pretrained(path)
    model.to(device)
    set_seed(args.seed)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    print(args.prompt, end="", flush=True)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    main = argparse.ArgumentParser(
        prog="kimi-linear",
        description="Kimi Linear: look at a configuration, train on text, generate.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    info = command("info", run_info, "Print parameters, weight memory and cache size of a model.")
    info.add_argument("model", help="a model directory or a config.json")

    train = command(
        "train",
        run_train,
        "Train on text files. A config.json starts from scratch on bytes; a model directory is "
        "fine-tuned with its own tokenizer. Saves in the released checkpoint layout.",
    )
    train.add_argument("model", help="a model directory or a config.json")
    train.add_argument("--text", nargs="+", required=True, help="UTF-8 text files")
    train.add_argument("--output", required=True, help="directory to save the model in")
    train.add_argument("--steps", type=int, default=300, help="optimizer steps")
    train.add_argument("--batch-size", type=int, default=8, help="blocks per step and device")
    train.add_argument("--length", type=int, default=256, help="tokens per block")
    train.add_argument("--learning-rate", type=float, default=3e-3, help="peak, cosine decay")
    train.add_argument("--held-out", type=float, default=0.1, help="share kept for evaluation")
    train.add_argument("--seed", type=int, default=0, help="of initialisation and data order")

    generate = command("generate", run_generate, "Continue a prompt, printing as it goes.")
    generate.add_argument("model", help="a model directory with a tokenizer")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    generate.add_argument("--top-p", type=float, default=0.95, help="sample from this much mass")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit status."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (UsageError, ValueError) as error:
        print(f"kimi-linear {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
