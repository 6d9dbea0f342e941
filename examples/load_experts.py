"""Run one layer's experts of an NVFP4 checkpoint: ``python examples/load_experts.py [DIRECTORY]``.

ModelOpt's, llm-compressor's and gpt-oss' checkpoints are read alike.
"""

import sys
from pathlib import Path

import torch

import nvfp4_ops


def main(directory: str | Path = Path(__file__).parent / "checkpoint") -> None:
    checkpoint = nvfp4_ops.open_checkpoint(directory)
    prefix = checkpoint.expert_prefixes()[0]
    experts = checkpoint.load_experts(prefix, activation_scale="per_token")
    print(f"{prefix} ({checkpoint.scheme(prefix)}): {experts}")
    x = torch.randn(4, experts.hidden_size, dtype=torch.bfloat16)
    index, weights = nvfp4_ops.softmax_top_k(torch.randn(4, experts.num_experts), top_k=2)
    print(f"{tuple(x.shape)} -> {tuple(experts(x, index, weights).shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
