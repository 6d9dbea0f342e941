"""Generate with one compiled graph a token: ``python examples/generate_compiled.py [DIRECTORY]``.

A static cache keeps every shape fixed; on a GPU the graph is captured in a CUDA graph too.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, CompileConfig

import nvfp4_ops

NEW_TOKENS = 24


def main(directory: str | Path = Path(__file__).parent / "checkpoint") -> None:
    on_gpu = torch.cuda.is_available()
    # CPUs without bf16 matrix units are many times slower in bf16 than in fp32.
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = nvfp4_ops.load_pretrained(directory, device=device, dtype=dtype)
    inputs = AutoTokenizer.from_pretrained(directory)("class ", return_tensors="pt").to(device)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"cache_implementation": "static"}
    # generate compiles the decoding step by itself; on a CPU it has to be told to.
    config = CompileConfig(fullgraph=True, mode="reduce-overhead" if on_gpu else "default")
    config._compile_all_devices = True
    for name, how in (
        ("eager", {"disable_compile": True}),
        ("compiled", {"compile_config": config}),
    ):
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            model.generate(**inputs, **options, **how)
            seconds = time.perf_counter() - started
        print(f"{name}: {NEW_TOKENS / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
