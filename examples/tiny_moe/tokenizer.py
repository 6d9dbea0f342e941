"""Byte-level BPE for Python source.

Text is first cut so that a line break and the indentation after it stay one piece: `\\n        `
becomes one token, and the model spends no step on counting spaces.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
PIECES = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line breaks and the next line's indentation
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with the character before it: ` x`, `.join`, `_name`
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+",  # operators and brackets
        r"[ \t]+",
        r"\s",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE; `END_OF_TEXT` is token 0 and every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json`, and what makes transformers use it as it is.

    Without the second file it would split text as the tokenizer of Qwen does, by the model's type.
    """
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    (directory / "tokenizer_config.json").write_text(f"{config}\n", encoding="utf-8")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read `tokenizer.json`; `encode(text).ids` and `decode(ids)` of the result are inverse."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """Encode texts into one stream (tokens,) int64, each text after an `END_OF_TEXT`."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = []
    for encoding in tokenizer.encode_batch_fast(list(texts)):
        stream.append(end)
        stream += encoding.ids
    return torch.tensor(stream)


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """UTF-8 bytes that each token stands for, (V,) int64; 0 for `END_OF_TEXT`.

    The byte-level alphabet writes each byte as one character.
    """
    lengths = [0] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return torch.tensor(lengths)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens as they come; a character that spans tokens is yielded with its last byte."""
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            pending.clear()
