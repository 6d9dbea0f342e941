"""Write Python with a small NVFP4 Mixture-of-Experts model, and measure what 4 bits cost.

    python examples/demo.py [--out DIR]

Loads the trained checkpoint beside this file through the public API, streams a completion from the
compiled model (CUDA-graph decoding on a GPU), then compares bf16 experts with every NVFP4 mode on
standard-library modules the model has never seen: table on the terminal, plot in DIR.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from tiny_moe.data import held_out_files, stdlib_directory
from tiny_moe.evaluate import Quality, evaluate, token_batches
from tiny_moe.generate import Step, compiled_step, generate
from tiny_moe.model import StaticCache, TinyMoe
from tiny_moe.quantized import load_bf16, load_quantized, use_mode
from tiny_moe.tokenizer import encode_stream, load_tokenizer, stream_text, token_bytes
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import nvfp4_ops

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROMPT = '''class FileCache:
    """Keep the contents of files that were read."""

    def __init__(self, path, encoding=None):
        self.path = path'''
BASELINE = "bf16 experts"
NAMES = {
    None: "NVFP4 weight-only",
    "static": "NVFP4 W4A4 static",
    "per_token": "NVFP4 W4A4 per token",
    "per_tensor": "NVFP4 W4A4 per tensor",
}
CONTEXT, BATCH, CPU_BATCHES = 512, 8, 4
COMPLETION_TOKENS, TIMED_TOKENS = 160, 32


@dataclass
class Row:
    """What is measured of one way to run the experts."""

    quality: Quality
    expert_bytes: int
    eager_tokens_per_s: float
    compiled_tokens_per_s: float


def held_out_batches(tokenizer: Tokenizer, device: torch.device) -> list[Tensor]:
    """Windows of held-out modules of this machine's standard library."""
    stream = encode_stream(tokenizer, [text for _, text in held_out_files(stdlib_directory())])
    batches = token_batches(stream.to(device), BATCH, CONTEXT)
    if device.type == "cuda":
        return batches
    # A CPU has time for a few: from all over the text, not its first modules alone.
    return batches[:: len(batches) // CPU_BATCHES][:CPU_BATCHES]


def expert_bytes(model: TinyMoe) -> int:
    """Bytes of the experts' weights and scales, the float ones counted as bf16."""
    total = 0
    for layer in model.model.layers:
        for tensor in layer.mlp.experts.state_dict().values():
            quantized = isinstance(layer.mlp.experts, nvfp4_ops.NVFP4MoE)
            total += tensor.numel() * (tensor.element_size() if quantized else 2)
    return total


@torch.inference_mode()
def tokens_per_second(cache: StaticCache, step: Step) -> float:
    """Decoding speed of one sequence, sampling excluded; first steps, which compile, not timed."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=cache.keys[0].device)
    warm_up = 3
    started = 0.0
    for index in range(warm_up + TIMED_TOKENS):
        if index == warm_up:
            token.cpu()  # waits for a GPU
            started = time.perf_counter()
        position = torch.full((1,), index, device=token.device)
        token = step(token, cache, position)[:, -1:].argmax(dim=-1)
    token.cpu()
    return TIMED_TOKENS / (time.perf_counter() - started)


def write_completion(model: TinyMoe, tokenizer: Tokenizer, cache: StaticCache, step: Step) -> None:
    print(PROMPT, end="", flush=True)
    tokens = generate(
        model,
        tokenizer.encode(PROMPT).ids,
        max_new_tokens=COMPLETION_TOKENS,
        temperature=0.8,
        seed=1,
        step=step,
        cache=cache,
    )
    started, count = time.perf_counter(), 0
    for text in stream_text(tokenizer, tokens):
        print(text, end="", flush=True)
        count += 1
    print(f"\n[{count / (time.perf_counter() - started):.0f} tokens/s]")


def measure(
    name: str,
    model: TinyMoe,
    tokenizer: Tokenizer,
    batches: list[Tensor],
    cache: StaticCache,
    step: Step | None = None,
) -> Row:
    """Quality and speed; ``step`` is a decoding step that is compiled already."""
    device = batches[0].device
    bar = tqdm(batches, desc=f"{name}: perplexity", leave=False)
    quality = evaluate(model, bar, token_bytes(tokenizer).to(device))
    eager = tokens_per_second(cache, model)
    if step is None:
        print(f"{name}: compiling", flush=True)
        step = compiled_step(model, cache)
    compiled = tokens_per_second(cache, step)
    return Row(quality, expert_bytes(model), eager, compiled)


def print_table(rows: dict[str, Row], title: str) -> None:
    table = Table(title=title)
    table.add_column("experts", no_wrap=True)
    for heading in ("perplexity", "vs bf16", "expert MB", "eager tok/s", "compiled"):
        table.add_column(heading, justify="right")
    baseline = rows[BASELINE].quality.perplexity
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.quality.perplexity:.3f}",
            f"{row.quality.perplexity / baseline - 1:+.2%}",
            f"{row.expert_bytes / 1e6:.2f}",
            f"{row.eager_tokens_per_s:.0f}",
            f"{row.compiled_tokens_per_s:.0f}",
        )
    Console(width=max(90, Console().width)).print(table)


def plot(rows: dict[str, Row], title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [name.removeprefix("NVFP4 ") for name in rows]
    colors = ["tab:gray"] + ["tab:green"] * (len(rows) - 1)
    perplexity = [row.quality.perplexity for row in rows.values()]
    bars = left.barh(names, perplexity, color=colors)
    left.bar_label(bars, [f" {value:.2f}" for value in perplexity])
    left.set(xlabel="perplexity on held-out modules (less is better)")
    left.set_xlim(0, max(perplexity) * 1.15)
    megabytes = [row.expert_bytes / 1e6 for row in rows.values()]
    bars = right.barh(names, megabytes, color=colors)
    right.bar_label(bars, [f" {value:.2f}" for value in megabytes])
    right.set(xlabel="experts, MB", yticklabels=[])
    right.set_xlim(0, max(megabytes) * 1.15)
    for axes in (left, right):
        axes.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the plot goes")
    out = parser.parse_args().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # CPUs without bf16 matrix units are many times slower in bf16 than in fp32.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"nvfp4_ops {nvfp4_ops.__version__}, torch {torch.__version__} on {name}")

    tokenizer = load_tokenizer(CHECKPOINT)
    model = load_quantized(CHECKPOINT, dtype=dtype, device=device)
    cache = StaticCache(model.config, dtype=dtype, device=device)
    graphs = ", captured in a CUDA graph" if device.type == "cuda" else ""
    print(f"compiling a decoding step: torch.compile(fullgraph=True){graphs} ...\n", flush=True)
    step = compiled_step(model, cache)
    tokens_per_second(cache, step)  # so that the text does not stop to compile
    write_completion(model, tokenizer, cache, step)

    batches = held_out_batches(tokenizer, device)
    num_tokens = sum(window[:, 1:].numel() for window in batches)
    print(f"\nmeasuring on {num_tokens:,} tokens of modules held out from training")
    baseline = load_bf16(CHECKPOINT, dtype=dtype, device=device)
    rows = {BASELINE: measure(BASELINE, baseline, tokenizer, batches, cache)}
    for mode, mode_name in NAMES.items():
        use_mode(model, mode)
        ready = step if mode is None else None
        rows[mode_name] = measure(mode_name, model, tokenizer, batches, cache, ready)
    title = f"Tiny MoE, {num_tokens:,} held-out tokens, {name}"
    print_table(rows, title)
    out.mkdir(parents=True, exist_ok=True)
    plot(rows, title, out / "demo.png")
    print(f"plot: {out / 'demo.png'}")


if __name__ == "__main__":
    main()
