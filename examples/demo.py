"""The whole way in one command: train configs/tiny.json on English text, save, reload, generate.

The text is Python's own language reference as `pydoc_data.topics` ships it, about 0.5 MB, read byte
by byte. Training and generation are separate processes, so the sample comes from the saved files.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "demo"
WELL_BELOW = 0.7  # of the unigram entropy


def kimi_linear(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "kimi_linear.cli", *arguments], check=True)


def main() -> int:
    start = time.perf_counter()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    text, model = OUTPUT / "text.txt", OUTPUT / "model"
    text.write_text("\n\n".join(topics.values()), encoding="utf-8")
    config = ROOT / "configs" / "tiny.json"
    kimi_linear("info", str(config))
    kimi_linear("train", str(config), "--text", str(text), "--output", str(model))
    print("\nA sample from the reloaded model:\n")
    kimi_linear(
        "generate", str(model), "--prompt", 'The "for" statement', "--max-new-tokens", "300"
    )
    results = json.loads((model / "results.json").read_text())
    after, entropy = results["held_out_loss_after"], results["unigram_entropy"]
    print(f"\ndemo finished in {time.perf_counter() - start:.0f} s, the model is in {model}")
    if after > WELL_BELOW * entropy:
        print(f"held-out loss {after:.3f} is not well below the unigram entropy {entropy:.3f}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
