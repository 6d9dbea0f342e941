"""Loading a checkpoint of 8 GB in NVFP4: time beside reading its files, and peak memory.

    python -m bench.load_checkpoint [--out DIR]

Makes a ModelOpt checkpoint of random weights under TMPDIR: Qwen3-30B-A3B with half of its layers.
Files are read with as many threads as loading has, into one buffer each: the floor. "cold" is after
asking the kernel to drop the files from its cache, "warm" is right after. Memory of the host: that
of the process itself (RssAnon), pages locked for the GPU (RssShmem), and mapped pages of the files
(RssFile), which the kernel takes back when it needs them.
"""

import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import nvfp4_ops
from bench.report import Report, parse_out
from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint import open_checkpoint
from nvfp4_ops.checkpoint.write import hf_quantization_config, quantization_config

READERS = 4
BUFFER_BYTES = 16 << 20
POOL_BYTES = 64 << 20
SAMPLE_S = 0.002
CHECKED_EXPERTS = 8
TARGET_PEAK = 1.1
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """Of a Qwen3-MoE model."""

    layers: int = 24
    hidden: int = 2048
    intermediate: int = 768
    num_experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 32768
    layers_per_file: int = 4

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.intermediate,
            "intermediate_size": self.intermediate,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
        }


class RandomBytes:
    """Tensors cut from one pool of random bytes, each from another place: faster than a disk."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        words = torch.empty(POOL_BYTES // 8, dtype=torch.int64).random_(generator=generator)
        # random_ leaves the sign of a word 0.
        self.codes = words.view(torch.uint8).roll(3) ^ words.view(torch.uint8)
        self.scales = (self.codes & 0x7F).clamp(0x30, nvfp4.E4M3_NAN_BYTE - 1)
        self.generator = random.Random(seed)

    def _cut(self, pool: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        repeated = pool.repeat(-(-size // pool.numel()) + 1) if size > pool.numel() // 2 else pool
        start = self.generator.randrange(0, repeated.numel() - size, 8)
        return repeated[start : start + size].view(shape)

    def linear(self, name: str, n: int, k: int) -> dict[str, Tensor]:
        """As ModelOpt stores it."""
        return {
            f"{name}.weight": self._cut(self.codes, (n, nvfp4.packed_size(k))),
            f"{name}.weight_scale": self._cut(self.scales, (n, nvfp4.num_blocks(k))).view(
                torch.float8_e4m3fn
            ),
            f"{name}.weight_scale_2": torch.tensor(self.generator.uniform(1e-6, 1e-5)),
            f"{name}.input_scale": torch.tensor(self.generator.uniform(1e-3, 1e-2)),
        }

    def matrix(self, n: int, k: int) -> Tensor:
        """bf16, none of it Inf or NaN."""
        bits = self._cut(self.codes, (n, 2 * k)).view(torch.int16) & ~0x4000
        return bits.view(torch.bfloat16)


def layer_tensors(size: Size, layer: int, source: RandomBytes) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}"
    d, attended = size.hidden, size.heads * size.head_dim
    ones = {
        f"{prefix}.{name}.weight": torch.ones(length, dtype=torch.bfloat16)
        for name, length in (
            ("input_layernorm", d),
            ("post_attention_layernorm", d),
            ("self_attn.q_norm", size.head_dim),
            ("self_attn.k_norm", size.head_dim),
        )
    }
    kv = size.kv_heads * size.head_dim
    shapes = {
        "mlp.gate": (size.num_experts, d),
        "self_attn.q_proj": (attended, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, attended),
    }
    tensors = ones | {f"{prefix}.{n}.weight": source.matrix(*shape) for n, shape in shapes.items()}
    for expert in range(size.num_experts):
        for name in PROJECTIONS:
            n, k = (d, size.intermediate) if name == "down_proj" else (size.intermediate, d)
            tensors |= source.linear(f"{prefix}.mlp.experts.{expert}.{name}", n, k)
    return tensors


def write_checkpoint(directory: Path, size: Size, seed: int = 0) -> None:
    """Config, index and shards."""
    source = RandomBytes(seed)
    quantization = quantization_config(
        ("lm_head", "model.embed_tokens", "*.self_attn*", "*.mlp.gate"), static=True
    )
    config = size.config() | {"quantization_config": hf_quantization_config(quantization)}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization})
    )
    starts = range(0, size.layers, size.layers_per_file)
    weight_map: dict[str, str] = {}
    for number, start in enumerate(starts, start=1):
        tensors: dict[str, Tensor] = {}
        if start == 0:
            matrix = source.matrix(size.vocabulary, size.hidden)
            tensors = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix.clone()}
            tensors["model.norm.weight"] = torch.ones(size.hidden, dtype=torch.bfloat16)
        for layer in range(start, min(start + size.layers_per_file, size.layers)):
            tensors |= layer_tensors(size, layer, source)
        # safetensors refuses tensors that share storage.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        file = f"model-{number:05d}-of-{len(starts):05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def checkpoint_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def drop_from_cache(files: list[Path]) -> None:
    """Ask the kernel to forget their pages, which must have been written back first."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(files: list[Path]) -> int:
    """Read every byte into buffers that are used again; returns how many."""
    of_thread = threading.local()

    def read(file: Path, offset: int) -> int:
        if not hasattr(of_thread, "buffer"):
            of_thread.buffer = bytearray(BUFFER_BYTES)
        with file.open("rb", buffering=0) as opened:
            return os.preadv(opened.fileno(), [of_thread.buffer], offset)

    pieces = [(f, start) for f in files for start in range(0, f.stat().st_size, BUFFER_BYTES)]
    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(read, *zip(*pieces, strict=True)))


KINDS = ("RssAnon", "RssShmem", "RssFile")


def resident_bytes() -> dict[str, int]:
    """Of this process, by kind; zeros where there is no /proc."""
    found = dict.fromkeys(KINDS, 0)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found


@contextmanager
def peak_resident_bytes() -> Iterator[dict[str, int]]:
    """How far each kind grew inside, sampled."""
    before, peak = resident_bytes(), dict.fromkeys(KINDS, 0)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            now = resident_bytes()
            peak.update({kind: max(peak[kind], now[kind] - before[kind]) for kind in KINDS})

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Timing:
    """One pass over the files."""

    what: str
    cache: str
    seconds: float
    gb_per_s: float


@dataclass(frozen=True)
class Memory:
    """GB. final, peak: allocated on the device, beyond what was before; zeros on the CPU."""

    final_gb: float
    peak_gb: float
    host_own_gb: float
    host_locked_gb: float
    host_mapped_gb: float


def timed(what: str, cache: str, num_bytes: int, work: Callable[[], Any]) -> tuple[Timing, Any]:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return Timing(what, cache, round(seconds, 2), round(num_bytes / seconds / 1e9, 2)), result


def load(directory: Path, device: str) -> nn.Module:
    model = nvfp4_ops.load_pretrained(directory, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    return model


def load_in_measured_memory(
    directory: Path, device: str, cache: str, num_bytes: int
) -> tuple[Timing, Memory, nn.Module]:
    on_gpu = device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with peak_resident_bytes() as resident:
        timing, model = timed("load", cache, num_bytes, lambda: load(directory, device))
    final, peak = 0, 0
    if on_gpu:
        final = torch.cuda.memory_allocated() - before
        peak = torch.cuda.max_memory_allocated() - before
    sizes = (final, peak, *(resident[kind] for kind in KINDS))
    return timing, Memory(*(round(size / 1e9, 3) for size in sizes)), model


def check_bytes(directory: Path, model: nn.Module, size: Size) -> None:
    """Raises AssertionError unless some experts have the very bytes of the files."""
    checkpoint = open_checkpoint(directory)
    generator = random.Random(1)
    for _ in range(CHECKED_EXPERTS):
        layer = generator.randrange(size.layers)
        expert = generator.randrange(size.num_experts)
        prefix = f"model.layers.{layer}.mlp.experts"
        moe = model.get_submodule(prefix)
        targets = ((moe.first_proj, 0), (moe.first_proj, 1), (moe.down_proj, 0))
        for name, (projection, segment) in zip(PROJECTIONS, targets, strict=True):
            rows = projection.segment_rows(segment)
            codes, sf = (tensor[expert, rows].cpu() for tensor in projection.canonical())
            scales = (
                projection.segment(projection.weight_scale_2),
                projection.segment(projection.input_scale),
            )
            loaded = (codes, sf, *(scale[expert, segment].cpu() for scale in scales))
            parts = ("weight", "weight_scale", "weight_scale_2", "input_scale")
            for part, tensor in zip(parts, loaded, strict=True):
                stored = checkpoint.tensor(f"{prefix}.{expert}.{name}.{part}")
                same = (x.reshape(-1).view(torch.uint8) for x in (tensor, stored))
                if not torch.equal(*same):
                    raise AssertionError(f"{prefix}.{expert}.{name}.{part}: other bytes")


def run(directory: Path, size: Size, device: str, report: Report) -> None:
    """Write the checkpoint into ``directory``, read and load it, cold and warm."""
    write_checkpoint(directory, size)
    files = checkpoint_files(directory)
    num_bytes = sum(file.stat().st_size for file in files)

    def line(timing: Timing) -> str:
        fields = (timing.what, timing.cache, timing.seconds, timing.gb_per_s)
        return " | ".join(map(str, fields))

    for cache in ("cold", "warm"):
        if cache == "cold":
            drop_from_cache(files)
        timing, read = timed("read", cache, num_bytes, lambda: read_files(files))
        if read != num_bytes:
            raise AssertionError(f"read {read} of {num_bytes} bytes")
        report.add(timing, line(timing))
    for cache in ("cold", "warm"):
        if cache == "cold":
            drop_from_cache(files)
        timing, memory, model = load_in_measured_memory(directory, device, cache, num_bytes)
        check_bytes(directory, model, size)
        del model
        report.add(timing, line(timing))
    report.add(memory, f"memory in GB | {json.dumps(asdict(memory))}")
    if memory.peak_gb > TARGET_PEAK * memory.final_gb:
        raise AssertionError(f"device memory: peak more than {TARGET_PEAK} x final: {memory}")


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        sys.exit("load_checkpoint: needs a CUDA GPU to load to")
    size = Size()
    weights = 3 * size.layers * size.num_experts * size.hidden * size.intermediate
    with tempfile.TemporaryDirectory() as directory:
        # Imports, context and kernels are loaded once, whatever the size of the checkpoint.
        tiny = Path(directory) / "tiny"
        tiny.mkdir()
        write_checkpoint(tiny, Size(layers=1, num_experts=16, vocabulary=256))
        load(tiny, "cuda")
        report = Report(
            "load_checkpoint",
            {
                "python": sys.version.split()[0],
                "cpus": os.cpu_count(),
                "readers": READERS,
                "nvfp4_gb": round(weights * 4.5 / 8 / 1e9, 2),
                "size": asdict(size),
            },
            "what | page cache | s | GB/s of the files",
        )
        model = Path(directory) / "model"
        model.mkdir()
        run(model, size, "cuda", report)
    report.write(out)


if __name__ == "__main__":
    main()
