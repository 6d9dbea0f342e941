"""Quantize the experts of a float model: ``python examples/replace_experts.py [MODEL]``.

MODEL is a directory or a name on the Hugging Face hub; without one, a small random Mixtral.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import nvfp4_ops

TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def main(name: str | None = None) -> None:
    if name is None:
        config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2, **TINY)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    before = sum(parameter.nbytes for parameter in model.parameters())
    names = nvfp4_ops.replace_experts(model, activation_scale="per_token")
    after = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(f"{len(names)} layers, the last: {model.get_submodule(names[-1])}")
    print(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")
    model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=4, do_sample=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
