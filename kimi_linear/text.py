"""Plain text as training data: byte-level tokens, and blocks of a fixed length."""

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

BYTES = 256
SPECIAL_TOKENS = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of UTF-8, then [BOS], [EOS] and [PAD]."""
    vocab = {f"<0x{b:02X}>": b for b in range(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


class TokenBlocks(Dataset):
    """Consecutive blocks of `length` tokens; what is left over at the end is dropped.

    Args:
        tokens: `[n]` int64.
        length: tokens per block.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        n = len(tokens) // length
        if n == 0:
            raise ValueError(f"tokens: got {len(tokens)}, want at least one block of {length}")
        self.blocks = tokens[: n * length].view(n, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy of the token histogram in nats: what a model without context can reach at best."""
    p = torch.bincount(tokens).double() / len(tokens)
    return -torch.special.xlogy(p, p).sum().item()
