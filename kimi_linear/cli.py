"""The `kimi-linear` command."""

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

EPILOG = """examples:
  kimi-linear info configs/kimi_linear_48b_a3b.json
  kimi-linear train configs/tiny.json --text book.txt --output my-model
  kimi-linear generate my-model --prompt "Once upon a time"
  kimi-linear chat path/to/Kimi-Linear-48B-A3B-Instruct --system "Be brief."
  kimi-linear serve path/to/Kimi-Linear-48B-A3B-Instruct --port 8000
"""

Limits = dict[str, tuple[Callable[[float], bool], str]]  # by option: what is good, in words too

# What generates text takes these numbers only.
LIMITS: Limits = {
    "temperature": (lambda x: x >= 0, "at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
    "top_k": (lambda x: x >= 0, "at least 0"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: x > 0, "more than 0"),
    "max_new_tokens": (lambda x: x > 0, "at least 1"),
}


class UsageError(ValueError):
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
        learning_rate=getattr(args, "learning_rate", None), held_out=args.held_out, seed=args.seed,
    )  # fmt: skip
    before, after = results["held_out_loss_before"], results["held_out_loss_after"]
    print(f"held-out loss   {before:.3f} before, {after:.3f} after (nats per token)")
    print(f"unigram entropy {results['unigram_entropy']:.3f} (the best without context)")
    print(f"saved to        {args.output}")


def check_limits(options: Mapping[str, Any], limits: Limits, prefix: str = "") -> None:
    """Raise a ValueError if one of `options` is outside of its limits; None is not."""
    for name, (good, wanted) in limits.items():
        value = options[name]
        if value is not None and not (isinstance(value, int | float) and good(value)):
            shown = prefix + name.replace("_", "-") if prefix else name
            raise ValueError(f"{shown}: got {value}, want {wanted}")


def check_sampling(options: Any, prefix: str = "") -> None:
    """`check_limits` of the attributes that are in `LIMITS`."""
    check_limits({name: getattr(options, name) for name in LIMITS}, LIMITS, prefix)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options that `add_sampling` defined, checked, for `model.generate`."""
    check_sampling(args, "--")
    names = ["max_new_tokens", "repetition_penalty"]
    if args.temperature > 0:
        names += ["temperature", "top_p", "top_k", "min_p"]
    return {"do_sample": args.temperature > 0} | {name: getattr(args, name) for name in names}


@contextlib.contextmanager
def from_files(path: Path) -> Iterator[None]:
    """What is wrong with the files of `path` is for the user to put right."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} has no tokenizer that transformers can load: {error}") from None


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Raise a UsageError if it has more tokens than the model in `path`."""
    from kimi_linear.configuration_kimi_linear import KimiLinearConfig

    size = KimiLinearConfig.from_pretrained(path).vocab_size
    if len(tokenizer) > size:
        raise UsageError(f"{path} has a tokenizer of {len(tokenizer)} tokens, want at most {size}")


def load_model(path: Path, tokenizer: Any, device: str | None) -> Any:
    """The model, if the tokenizer fits it; `device` None is the GPU if there is one."""
    import torch

    from kimi_linear.modeling_kimi_linear import KimiLinearForCausalLM

    check_tokenizer(path, tokenizer)
    if device == "auto":
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError("--device auto needs accelerate: pip install accelerate")
        with from_files(path):
            return KimiLinearForCausalLM.from_pretrained(path, device_map="auto")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from None
    with from_files(path):
        model: Any = KimiLinearForCausalLM.from_pretrained(path)
    return model.to(device)


def run_generate(args: argparse.Namespace) -> None:
    path, options = model_path(args.model, directory=True), sampling(args)
    from transformers import TextStreamer, set_seed

    tokenizer = load_tokenizer(path)
    model = load_model(path, tokenizer, args.device)
    set_seed(args.seed)
    if stop_ids := getattr(tokenizer, "stop_ids", None):
        options["eos_token_id"] = stop_ids
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    print(args.prompt, end="", flush=True)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **options,
    )


def run_chat(args: argparse.Namespace) -> None:
    path, options = model_path(args.model, directory=True), sampling(args)
    from transformers import TextStreamer, set_seed

    from kimi_linear.chat import Chat
    from kimi_linear.tokenization_kimi_linear import KimiLinearTokenizer

    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, KimiLinearTokenizer):
        raise UsageError(
            f"{path} has a {type(tokenizer).__name__}, without the chat format; want a "
            "KimiLinearTokenizer (`kimi-linear generate` takes any)"
        )
    model = load_model(path, tokenizer, args.device)
    chat = Chat(model, tokenizer, args.system, options)
    set_seed(args.seed)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines
        print("/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        try:
            text = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            break
        if text.strip() == "/quit":
            break
        if text.strip() == "/reset":
            chat.reset()
        elif text.strip():
            try:
                chat.reply(
                    text, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                )
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n(stopped; this turn is forgotten)")


def run_serve(args: argparse.Namespace) -> None:
    path = model_path(args.model, directory=True)
    try:
        from kimi_linear.serve import build_app, listen, serve
    except ImportError as error:
        raise UsageError(f"{error}; serving needs: pip install 'kimi-linear[serve]'") from None
    with listen(args.host, args.port) as address:  # before the weights, which take minutes
        tokenizer = load_tokenizer(path)
        model, name = load_model(path, tokenizer, args.device), path.resolve().name
        app = build_app(model, tokenizer, name)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{name} at http://{host}:{address.getsockname()[1]}/v1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            serve(app, address)


def add_device(command: argparse.ArgumentParser) -> None:
    help = "such as cpu or cuda:1, auto for all GPUs; without it the GPU if there is one"
    command.add_argument("--device", help=help)


def add_sampling(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The options of everything that generates text."""
    for name, default, help in (
        ("max-new-tokens", max_new_tokens, "stop after so many"),
        ("temperature", 0.8, "0 takes the likeliest"),
        ("top-p", 0.95, "sample from this much mass"),
        ("top-k", 50, "sample from so many; 0 for all"),
        ("min-p", 0.0, "sample from those with this share of the likeliest's probability"),
        ("repetition-penalty", 1.0, "divides logits of earlier tokens; 1 for none"),
        ("seed", 0, "of the sampling"),
    ):
        command.add_argument(f"--{name}", type=type(default), default=default, help=help)


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    main = argparse.ArgumentParser(
        prog="kimi-linear",
        description="Kimi Linear: look at a configuration, train on text, generate, chat, serve.",
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
        "fine-tuned in fp32 with its own tokenizer. Saves in the released checkpoint layout.",
    )
    train.add_argument("model", help="a model directory or a config.json")
    train.add_argument("--text", nargs="+", required=True, help="UTF-8 text files")
    train.add_argument("--output", required=True, help="directory to save the model in")
    train.add_argument("--steps", type=int, default=300, help="optimizer steps")
    train.add_argument("--batch-size", type=int, default=8, help="blocks per step and device")
    train.add_argument("--length", type=int, default=256, help="tokens per block")
    train.add_argument(
        "--learning-rate", type=float, default=argparse.SUPPRESS,
        help="peak, cosine decay (default: 3e-3 from scratch, 1e-5 for a model directory)",
    )  # fmt: skip
    train.add_argument("--held-out", type=float, default=0.1, help="share kept for evaluation")
    train.add_argument("--seed", type=int, default=0, help="of initialisation and data order")

    generate = command("generate", run_generate, "Continue a prompt, printing as it goes.")
    generate.add_argument("model", help="a model directory with a tokenizer")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    add_device(generate)
    add_sampling(generate, max_new_tokens=200)

    chat = command(
        "chat",
        run_chat,
        "Chat, printing as it goes. One line is one message; /reset forgets the conversation, "
        "/quit or the end of the input ends it. Earlier turns are not computed again.",
    )
    chat.add_argument("model", help="a model directory with the tokenizer of the released model")
    chat.add_argument("--system", help="the system prompt")
    add_device(chat)
    add_sampling(chat, max_new_tokens=2000)

    serve = command(
        "serve",
        run_serve,
        "Serve chat and text completions at /v1 as OpenAI's API has them, with transformers' "
        "server. Requests are answered one after another.",
    )
    serve.add_argument("model", help="a model directory with a tokenizer; its name is the model's")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all addresses")
    serve.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    add_device(serve)
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit status."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"kimi-linear {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
