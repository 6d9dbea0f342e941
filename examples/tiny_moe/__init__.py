"""A small Mixture-of-Experts language model that writes Python: the float side of the examples.

Read `model` (what it computes), then `generate` and `evaluate` (use), then `data`, `tokenizer` and
`../train_tiny_moe.py` (training). Nothing here knows NVFP4; a quantized module goes in place of
`layer.mlp.experts`.
"""
