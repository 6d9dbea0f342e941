"""Text generation, one token at a time, with a static key/value cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tiny_moe.model import StaticCache, TinyMoe

Step = Callable[[Tensor, StaticCache, Tensor], Tensor]


def sample(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Choose a token, () int64: at temperature 0 the likeliest."""
    if temperature == 0:
        return logits_V.argmax()
    probability_V = (logits_V.float() / temperature).softmax(dim=-1)
    return torch.multinomial(probability_V, 1, generator=generator)[0]


@torch.inference_mode()
def generate(
    model: TinyMoe,
    prompt: list[int],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    seed: int = 0,
    step: Step | None = None,
    cache: StaticCache | None = None,
) -> Iterator[int]:
    """Yield the tokens after `prompt`: to the end of text, `max_new_tokens` or a full cache.

    Args:
        model: reads the prompt in one pass.
        prompt: token ids, at least one.
        temperature: 0 is greedy.
        step: one decoding step, `step(input_ids (1, 1), cache, position (1,)) -> logits (1, 1, V)`;
            default `model`. Pass `torch.compile(model, fullgraph=True)`, or a function that replays
            a CUDA graph.
        cache: reused as it is, so that a captured step keeps its addresses; default a new one.
    """
    weight = model.model.embed_tokens.weight
    if cache is None:
        cache = StaticCache(model.config, dtype=weight.dtype, device=weight.device)
    length = cache.keys[0].shape[2]
    if not 0 < len(prompt) <= length:
        raise ValueError(f"prompt: must have 1 to {length} tokens, got {len(prompt)}")
    step = model if step is None else step
    generator = torch.Generator(weight.device).manual_seed(seed)
    input_ids = torch.tensor([prompt], device=weight.device)
    position = torch.arange(len(prompt), device=weight.device)
    logits = model(input_ids, cache, position)
    position = position[-1:]
    # The token after the last cached position needs no slot: it is never read back.
    for _ in range(min(max_new_tokens, length - len(prompt) + 1)):
        token = sample(logits[0, -1], temperature, generator)
        index = int(token)
        if index == model.config.eos_token_id:
            return
        yield index
        position = position + 1
        if int(position) < length:
            logits = step(token.view(1, 1), cache, position)


def compiled_step(model: TinyMoe, cache: StaticCache) -> Step:
    """A decoding step compiled as one graph; on a GPU also captured as a CUDA graph.

    The returned step works on this ``cache`` only.
    """
    compiled: Step = torch.compile(model, fullgraph=True)
    if model.model.embed_tokens.weight.is_cuda:
        return CudaGraphStep(compiled, cache)
    return compiled


class CudaGraphStep:
    """Replays a captured decoding step: inputs are copied in, logits are read where they lie."""

    @torch.inference_mode()
    def __init__(self, step: Step, cache: StaticCache) -> None:
        device = cache.keys[0].device
        self.input_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        # Compiling and lazy initialisation must be over before the capture begins.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(self.input_ids, cache, self.position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.input_ids, cache, self.position)

    def __call__(self, input_ids: Tensor, cache: StaticCache, position: Tensor) -> Tensor:
        self.input_ids.copy_(input_ids)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits
