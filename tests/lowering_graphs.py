"""Graphs as passes of Inductor see them, rewritten and then run without its code generation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from nvfp4_ops.lowering import inductor

PATTERNS = inductor.Options(patterns=True, decompose=False)
DECOMPOSE = inductor.Options(patterns=False, decompose=True)


class Rewritten(NamedTuple):
    """counts: how often each rewrite fired, zeros left out. ops: the package's ops that stay."""

    result: Any
    counts: dict[str, int]
    ops: list[str]


def run_rewritten(
    function: Callable[..., Any],
    *inputs: Any,
    options: inductor.Options = PATTERNS,
    dynamic: bool | None = None,
) -> Rewritten:
    """Call a function compiled to its rewritten graph."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    counts: dict[str, int] = {}
    ops: list[str] = []

    def compile_graph(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        for name, count in inductor.rewrite(module.graph, options).items():
            if count:
                counts[name] = counts.get(name, 0) + count
        ops.extend(
            node.target.name().removeprefix("nvfp4_ops::")
            for node in module.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "nvfp4_ops"
        )
        module.recompile()
        return module

    backend = aot_autograd(fw_compiler=compile_graph, decompositions=select_decomp_table())
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
        return Rewritten(compiled(*inputs), counts, ops)
