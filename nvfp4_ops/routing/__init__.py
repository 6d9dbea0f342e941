"""Routing: choose experts, sort rows by expert, combine them again. Knows no NVFP4."""

from nvfp4_ops.routing.permute import combine, permute, sort_by_expert
from nvfp4_ops.routing.router import SigmoidRouter, SoftmaxRouter
from nvfp4_ops.routing.topk import router_logits, sigmoid_top_k, softmax_top_k

__all__ = [
    "SigmoidRouter",
    "SoftmaxRouter",
    "combine",
    "permute",
    "router_logits",
    "sigmoid_top_k",
    "softmax_top_k",
    "sort_by_expert",
]
