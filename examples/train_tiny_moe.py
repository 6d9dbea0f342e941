"""Train the small Mixture-of-Experts language model on the Python standard library.

    python examples/train_tiny_moe.py --out build/tiny_moe --minutes 8

Writes to the output directory an NVFP4 checkpoint in ModelOpt's layout (`model.safetensors`,
`config.json`, `hf_quant_config.json`, `tokenizer.json`; the model is a Hugging Face Qwen3-MoE), the
experts it was quantized from (`experts_bf16.safetensors`), and `training_log.json` with the loss
curve and the quality on held-out modules of every way to run the experts.

`examples/checkpoint` was trained on one H200 that three such runs shared, on the library of Python
3.11.7 with its tests; its weights were then quantized and measured on a CPU by `export`:

    python examples/train_tiny_moe.py --out DIR --text LIBRARY --minutes 7 --dropout 0.1
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from tiny_moe.config import TinyMoeConfig
from tiny_moe.data import held_out_files, stdlib_directory, train_files
from tiny_moe.evaluate import evaluate, token_batches
from tiny_moe.generate import generate
from tiny_moe.model import TinyMoe
from tiny_moe.quantized import MODES, bf16_experts, quantize, save_quantized, use_mode
from tiny_moe.tokenizer import (
    encode_stream,
    save_tokenizer,
    stream_text,
    token_bytes,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

PROMPTS = (
    "def read_lines(path, encoding='utf-8'):\n    ",
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):",
    "import unittest\n\nclass TestQueue(unittest.TestCase):\n    def test_empty(self):",
)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    The learning rate warms up by steps, so that compiling costs no warm-up, then follows time:
    constant until `decay_start` of the budget, then linear to zero.
    """

    minutes: float
    batch: int
    context: int
    peak_learning_rate: float
    dropout: float
    seed: int
    warmup_steps: int = 200
    decay_start: float = 0.3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    balance_weight: float = 0.01
    router_z_weight: float = 1e-4
    num_evaluations: int = 30

    def learning_rate(self, step: int, progress: float) -> float:
        """Learning rate at `step`, with `progress` in [0, 1) of the time budget spent."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak_learning_rate * warmup * min(1.0, (1 - progress) / (1 - self.decay_start))


@dataclass(frozen=True)
class Corpus:
    """The tokenized library."""

    tokenizer: Tokenizer
    train_T: Tensor
    held_out_T: Tensor
    facts: dict[str, int]


def read_corpus(root: Path, vocab_size: int) -> Corpus:
    """Read the library below `root`, learn a tokenizer on the train split, encode both splits."""
    train_texts = [text for _, text in train_files(root)]
    held_out_texts = [text for _, text in held_out_files(root)]
    if not train_texts or not held_out_texts:
        raise ValueError(f"--text: must hold Python source of a standard library, got {root}")
    tokenizer = train_tokenizer(train_texts, vocab_size)
    train_T = encode_stream(tokenizer, train_texts)
    held_out_T = encode_stream(tokenizer, held_out_texts)
    facts = {
        "train_files": len(train_texts),
        "train_bytes": sum(len(text.encode()) for text in train_texts),
        "train_tokens": len(train_T),
        "held_out_files": len(held_out_texts),
        "held_out_bytes": sum(len(text.encode()) for text in held_out_texts),
        "held_out_tokens": len(held_out_T),
    }
    return Corpus(tokenizer, train_T, held_out_T, facts)


@torch.no_grad()
def initialize(model: TinyMoe) -> None:
    """Keep the variance of activations; projections into the residual stream share it by depth."""
    depth = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif "embed_tokens" in name:
            parameter.normal_(std=0.02)
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            fan_in = parameter.shape[-1] * (depth if into_residual else 1)
            parameter.normal_(std=fan_in**-0.5)


def router_losses(router_logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Switch Transformer's balance loss and the router's z loss, mean(logsumexp^2).

    Balance is E * sum_e f_e * P_e, 1 at best:
    f_e is the share of routed rows that expert e gets, P_e its mean probability.
    """
    logits_TE = router_logits_TE.float()
    probability_TE = logits_TE.softmax(dim=-1)
    index_TK = logits_TE.topk(top_k, dim=-1).indices
    chosen_TE = torch.zeros_like(probability_TE).scatter(1, index_TK, 1.0 / top_k)
    balance = logits_TE.shape[1] * (chosen_TE.mean(dim=0) * probability_TE.mean(dim=0)).sum()
    return balance, logits_TE.logsumexp(dim=-1).square().mean()


def training_loss(model: TinyMoe, window_BS: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise and its language part, nats per token."""
    # A CPU without bf16 matrix units is many times slower in bf16.
    on_gpu = window_BS.is_cuda
    with torch.autocast(window_BS.device.type, torch.bfloat16, enabled=on_gpu):
        hidden_BSD, router_logits = model.model(window_BS[:, :-1])
        logits_BSV = model.project(hidden_BSD)
    nats = F.cross_entropy(logits_BSV.float().flatten(0, 1), window_BS[:, 1:].flatten())
    losses = [router_losses(x_TE, model.config.num_experts_per_tok) for x_TE in router_logits]
    balance = sum(balance for balance, _ in losses) / len(losses)
    router_z = sum(router_z for _, router_z in losses) / len(losses)
    loss = nats + recipe.balance_weight * balance + recipe.router_z_weight * router_z
    return loss, nats.detach()


def build_optimizer(model: TinyMoe, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms and the embedding do not decay."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.dim() < 2 or "embed_tokens" in name]
    matrices = [p for name, p in named if p.dim() >= 2 and "embed_tokens" not in name]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


class HeldOutWatch:
    """Measures a model on held-out text; remembers the curve and the best weights."""

    def __init__(self, batches: list[Tensor], num_bytes_V: Tensor) -> None:
        self.batches = batches
        self.num_bytes_V = num_bytes_V
        self.curve: list[dict[str, float]] = []
        self.best_nats = math.inf
        self.best_state: dict[str, Tensor] = {}

    def measure(self, model: TinyMoe, recent_nats: list[Tensor], **point: float) -> None:
        """Append `point` with the quality of `model`; leaves it in training mode."""
        quality = evaluate(model.eval(), self.batches, self.num_bytes_V)
        model.train()
        point["train_nats_per_token"] = torch.stack(recent_nats).mean().item()
        self.curve.append(point | quality._asdict())
        if quality.nats_per_token < self.best_nats:
            self.best_nats = quality.nats_per_token
            self.best_state = {name: x.clone() for name, x in model.state_dict().items()}


def train(
    config: TinyMoeConfig, corpus: Corpus, recipe: Recipe, device: torch.device
) -> tuple[TinyMoe, list[dict[str, float]]]:
    """Train for `recipe.minutes`.

    Returns:
        The model, fp32, eval mode, with the weights that were best on held-out text; the curve.
    """
    torch.manual_seed(recipe.seed)
    model = TinyMoe(config).to(device)
    initialize(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = recipe.dropout
    optimizer = build_optimizer(model, recipe)
    loss_function = torch.compile(training_loss) if device.type == "cuda" else training_loss

    stream_T = corpus.train_T.to(device)
    offset_S = torch.arange(recipe.context + 1, device=device)
    held_out = token_batches(corpus.held_out_T.to(device), recipe.batch, recipe.context)
    if device.type == "cpu":
        held_out = held_out[:2]  # enough for the trend; the final figure is taken on all of it
    watch = HeldOutWatch(held_out, token_bytes(corpus.tokenizer).to(device))

    budget = recipe.minutes * 60
    bar = tqdm(total=round(budget), bar_format="{l_bar}{bar}| {n:.0f}/{total} s {postfix}")
    started = time.monotonic()
    step, elapsed, recent_nats = 0, 0.0, []
    while elapsed < budget:
        learning_rate = recipe.learning_rate(step, elapsed / budget)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        start_B1 = torch.randint(len(stream_T) - recipe.context, (recipe.batch, 1), device=device)
        loss, nats = loss_function(model, stream_T[start_B1 + offset_S], recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent_nats.append(nats)
        step += 1
        if step % 10 == 0:
            nats.item()  # wait for the device: the schedule follows its time, not the launches'
        elapsed = time.monotonic() - started
        if elapsed >= min(1, (len(watch.curve) + 1) / recipe.num_evaluations) * budget:
            tokens = step * recipe.batch * recipe.context
            watch.measure(model, recent_nats, step=step, tokens=tokens, seconds=round(elapsed, 1))
            recent_nats = []
            last = watch.curve[-1]
            bar.set_postfix(
                step=step,
                train=round(last["train_nats_per_token"], 3),
                held_out=round(last["nats_per_token"], 3),
                bits_per_byte=round(last["bits_per_byte"], 3),
                refresh=False,
            )
        bar.update(min(budget, elapsed) - bar.n)
    bar.close()
    model.load_state_dict(watch.best_state)
    return model.eval(), watch.curve


def export(model: TinyMoe, corpus: Corpus, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Quantize the experts of `model`, save everything, and measure each mode on held-out text.

    Returns:
        {way to run the experts: its quality}; the float one has bf16 weights, as saved.
    """
    device = model.model.embed_tokens.weight.device
    # A CPU computes in fp32, with the weights that bf16 can hold.
    model = model.bfloat16().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = model.eval().requires_grad_(False)
    batches = token_batches(corpus.held_out_T.to(device), recipe.batch, recipe.context)
    num_bytes = token_bytes(corpus.tokenizer).to(device)
    quality = {"bf16": evaluate(model, batches, num_bytes)}

    float_experts = bf16_experts(model)
    windows = token_batches(corpus.train_T.to(device), recipe.batch, recipe.context)
    quantize(model, [window[:, :-1] for window in windows[:: -(-len(windows) // 8)]])
    save_quantized(model, out, float_experts)
    for mode in tqdm(MODES, desc="measuring", unit="mode"):
        use_mode(model, mode)
        quality[mode or "weight_only"] = evaluate(model, batches, num_bytes)
    return {k: q._asdict() | {"perplexity": q.perplexity} for k, q in quality.items()}


def show_samples(model: TinyMoe, tokenizer: Tokenizer) -> None:
    """Print what the model writes after each of `PROMPTS`, greedy and sampled."""
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            print(f"\n--- temperature {temperature} ---\n{prompt}", end="")
            tokens = generate(
                model,
                tokenizer.encode(prompt).ids,
                max_new_tokens=120,
                temperature=temperature,
            )
            for text in stream_text(tokenizer, tokens):
                print(text, end="", flush=True)
            print()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget of the training")
    parser.add_argument(
        "--text", type=Path, default=stdlib_directory(), help="a standard library's source"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="sequences per step; default 64, on a CPU 4")
    parser.add_argument("--context", type=int, help="tokens per sequence; default 1024, CPU 512")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest")
    parser.add_argument("--dropout", type=float, help="default 0.1, on a CPU 0")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    # A CPU sees the corpus about once: small steps, and nothing to regularise.
    batch, context, dropout = (64, 1024, 0.1) if device.type == "cuda" else (4, 512, 0.0)
    recipe = Recipe(
        minutes=arguments.minutes,
        batch=arguments.batch or batch,
        context=arguments.context or context,
        peak_learning_rate=arguments.learning_rate,
        dropout=dropout if arguments.dropout is None else arguments.dropout,
        seed=arguments.seed,
    )
    config = TinyMoeConfig()
    arguments.out.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus(arguments.text, config.vocab_size)
    save_tokenizer(corpus.tokenizer, arguments.out)
    print("corpus:", ", ".join(f"{name} {count:,}" for name, count in corpus.facts.items()))

    model, curve = train(config, corpus, recipe, device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    show_samples(model, corpus.tokenizer)
    held_out = export(model, corpus, recipe, arguments.out)
    log = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": num_parameters,
        "corpus": corpus.facts,
        "recipe": asdict(recipe),
        "seconds": curve[-1]["seconds"],
        "tokens_seen": curve[-1]["tokens"],
        "held_out": held_out,
        "held_out_device": device.type.upper(),
        "curve": curve,
    }
    text = json.dumps(log, indent=1) + "\n"
    (arguments.out / "training_log.json").write_text(text, encoding="utf-8")
    for name, quality in held_out.items():
        print(f"{name:12} perplexity {quality['perplexity']:.3f} per token on held-out modules")


if __name__ == "__main__":
    main()
