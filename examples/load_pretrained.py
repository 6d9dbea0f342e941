"""Complete a text with an NVFP4 checkpoint: ``python examples/load_pretrained.py [DIRECTORY]``.

ModelOpt's and llm-compressor's checkpoints load alike; without one, the model beside this file.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import nvfp4_ops


def main(directory: str | Path = Path(__file__).parent / "checkpoint") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nvfp4_ops.load_pretrained(directory, device=device, activation_scale="per_token")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("import os\n\n\ndef read_lines(path", return_tensors="pt").to(device)
    torch.manual_seed(1)
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.7)
    print(tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
