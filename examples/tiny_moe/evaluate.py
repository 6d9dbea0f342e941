"""How well a model predicts text: loss per token, and per byte, which no tokenizer can flatter."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_moe.model import TinyMoe


class Quality(NamedTuple):
    """Mean loss of a model on some text."""

    nats_per_token: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


def token_batches(stream: Tensor, batch: int, context: int) -> list[Tensor]:
    """Cut a stream into batches of whole windows; neighbours share the one token predicted from.

    Args:
        stream: (tokens,) int64.
        batch: windows per batch; the last batch may have fewer.
        context: tokens predicted per window.

    Returns:
        Tensors (<= batch, context + 1); a remainder shorter than a window is dropped.
    """
    return list(stream.unfold(0, context + 1, context).split(batch))


@torch.inference_mode()
def evaluate(model: TinyMoe, batches: Iterable[Tensor], token_bytes: Tensor) -> Quality:
    """Mean loss over all tokens of all batches.

    Args:
        model: in eval mode.
        batches: (B, S + 1) int64 each: inputs [:, :-1], targets [:, 1:].
        token_bytes: (V,) int64, bytes that each token stands for.
    """
    nats = tokens = num_bytes = 0.0
    for window in batches:
        target = window[:, 1:]
        logits_BSV = model(window[:, :-1]).float()
        nats += F.cross_entropy(logits_BSV.flatten(0, 1), target.flatten(), reduction="sum").item()
        tokens += target.numel()
        num_bytes += token_bytes[target].sum().item()
    return Quality(nats / tokens, nats / math.log(2) / num_bytes)
