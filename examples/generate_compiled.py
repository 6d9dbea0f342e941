"""Generate with one compiled graph a token: ``python examples/generate_compiled.py [DIRECTORY]``.

A static cache keeps every shape fixed; on a GPU the graph is captured in a CUDA graph too.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import nvfp4_ops

NEW_TOKENS = 24


def main(directory: str | Path = Path(__file__).parent / "checkpoint") -> None:
    on_gpu = torch.cuda.is_available()
    # CPUs without bf16 matrix units are many times slower in bf16 than in fp32.
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = nvfp4_ops.load_pretrained(directory, device=device, dtype=dtype)
    inputs = AutoTokenizer.from_pretrained(directory)("class ", return_tensors="pt").to(device)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"cache_implementation": "static", "disable_compile": True}  # not by generate too
    compiled = torch.compile(
        model.forward, fullgraph=True, mode="reduce-overhead" if on_gpu else "default"
    )
    for name, forward in (("eager", model.forward), ("compiled", compiled)):
        model.forward = forward
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            model.generate(**inputs, **options)
            seconds = time.perf_counter() - started
        print(f"{name}: {NEW_TOKENS / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
