"""Decode with NVFP4 experts in one CUDA graph: a step is captured once and replayed for each token.

    python examples/cuda_graph_decode.py [--batch B] [--steps N] [--mode MODE]

The decoder has random weights and, on a GPU, layers of the size of Qwen3-30B-A3B's. The captured
step chooses the next tokens and advances the position itself, so that the host does nothing but
replay. The tokens are compared with those of eager decoding: they are the same. On a CPU a small
decoder runs eagerly, twice.
"""

import argparse
import time
from collections.abc import Callable

import torch
from tiny_moe.config import TinyMoeConfig
from tiny_moe.model import StaticCache, TinyMoe
from torch import Tensor, nn

import nvfp4_ops

GPU_CONFIG = TinyMoeConfig(
    vocab_size=32768,
    hidden_size=2048,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)
CPU_CONFIG = TinyMoeConfig(num_hidden_layers=2)
WARMUP_STEPS = 3  # of what is lazy: kernels, libraries, memory


@torch.no_grad()
def build(config: TinyMoeConfig, device: str, mode: str | None) -> TinyMoe:
    """A decoder whose float experts are quantized layer by layer."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = TinyMoe(config).to(dtype).eval().requires_grad_(False)
    # Small beside what the layers add, or each token would predict itself.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        layer.mlp.experts = nvfp4_ops.NVFP4MoE.from_float(
            experts.gate_up_proj, experts.down_proj, activation_scale=mode
        )
    return model


class Decoder:
    """Greedy decoding of B sequences from one token each; its state lives in fixed memory."""

    def __init__(self, model: TinyMoe, batch: int) -> None:
        weight = model.model.embed_tokens.weight
        self.model = model
        self.cache = StaticCache(model.config, batch, dtype=weight.dtype, device=weight.device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def start(self) -> None:
        """Every sequence from another token."""
        self.tokens.copy_(torch.arange(1, self.tokens.shape[0] + 1).view(-1, 1))
        self.position.zero_()

    @torch.no_grad()
    def step(self) -> None:
        logits = self.model(self.tokens, self.cache, self.position)
        self.tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        self.position.add_(1)

    def capture(self) -> Callable[[], None]:
        """The step as a CUDA graph; returns its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # A capture may neither compile nor load.
            for _ in range(WARMUP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def run(self, step: Callable[[], None], num_steps: int) -> tuple[Tensor, float]:
        """(B, num_steps) tokens, and seconds."""
        self.start()
        for _ in range(WARMUP_STEPS):
            step()
        self.start()
        self._synchronize()
        started = time.perf_counter()
        history = []
        for _ in range(num_steps):
            step()
            history.append(self.tokens.clone())
        self._synchronize()
        return torch.cat(history, dim=1), time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.tokens.is_cuda:
            torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mode", choices=["per_token", "per_tensor"], help="default: weight-only")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    config = GPU_CONFIG if on_gpu else CPU_CONFIG
    if not 1 <= options.steps < config.max_position_embeddings - WARMUP_STEPS:
        parser.error(f"--steps: the cache has {config.max_position_embeddings} positions")
    decoder = Decoder(build(config, "cuda" if on_gpu else "cpu", options.mode), options.batch)
    eager, eager_s = decoder.run(decoder.step, options.steps)
    ways = {"eager": eager_s}
    replay = decoder.capture() if on_gpu else decoder.step
    again, again_s = decoder.run(replay, options.steps)
    ways["CUDA graph" if on_gpu else "eager, again"] = again_s
    if not torch.equal(again, eager):
        raise AssertionError("the replayed tokens differ from the eager ones")
    num_tokens = options.steps * options.batch
    for name, seconds in ways.items():
        per_step = seconds / options.steps * 1e3
        print(f"{name:>12}: {num_tokens / seconds:9.0f} tokens/s, {per_step:.2f} ms a step")
    print(f"{num_tokens} tokens, {again.unique().numel()} different ones, the same both times")


if __name__ == "__main__":
    main()
