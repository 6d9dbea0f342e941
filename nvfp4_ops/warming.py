"""warmup: load every kernel that a layer can ask for, before a CUDA graph or a user waits for it.

Which kernels those are depends on the number of tokens, in a way that only the ops know. So the
layers themselves are run, on dummy tokens, and what they ask the compile cache for is watched.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch
from torch import nn

from nvfp4_ops import kernels
from nvfp4_ops.kernels import compile_cache
from nvfp4_ops.moe import NVFP4MoE

Requests = frozenset[Hashable]


@torch.no_grad()
def warmup(
    module: nn.Module,
    max_tokens: int,
    *,
    top_k: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    index_dtype: torch.dtype = torch.int64,
    weights_dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> int:
    """Compile, or load from disk, every kernel that 1 .. max_tokens tokens can need.

    Capturing a CUDA graph can load no kernel, so run this first; it also takes the compile time
    out of the first requests. Each kind of NVFP4MoE layer in ``module`` runs on dummy tokens on
    the current stream, for as many token counts as it takes to see every kernel: layers of the
    same sizes and options run once. Weights, hooks and random state are left alone. Compilation
    with ``torch.compile`` is another matter: this warms up what its graphs call.

    On devices without kernels, the CPU among them, it does nothing.

    Args:
        module: a model, or an NVFP4MoE.
        max_tokens: the most tokens that a call will have: batch size times sequence length.
        top_k: experts of a token; needed for layers without a router, which know it otherwise.
        dtype: of the hidden states.
        index_dtype, weights_dtype: of ``top_k_index`` and ``top_k_weights``, where they are passed.
        progress: show a bar (tqdm) when it takes more than a second.

    Returns:
        Number of kernels that were not in memory before.

    Raises:
        ValueError: max_tokens is less than 1, top_k is missing, or a layer is being calibrated or
            has no weights yet. RuntimeError: a CUDA graph is being captured.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: must be positive, got {max_tokens}")
    layers: dict[Hashable, NVFP4MoE] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, NVFP4MoE):
            _check_layer(name, layer, top_k)
            layers.setdefault(_kind(layer), layer)
    served = [layer for layer in layers.values() if _has_kernels(_device(layer))]
    if served and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: a CUDA graph is being captured; warm up before the capture")
    num_before = compile_cache.num_in_memory()
    with _progress_bar(progress) as advance:
        for layer in served:

            @cache
            def requests(num_tokens: int, layer: NVFP4MoE = layer) -> Requests:
                with compile_cache.watch() as seen:
                    _run(layer, num_tokens, top_k, dtype, (index_dtype, weights_dtype))
                advance()
                return frozenset(seen)

            visit_changes(requests, max_tokens)
            for slots in (top_k, getattr(layer.router, "top_k", None)):
                if slots is not None:
                    for num_tokens in _tokens_of_every_grouped_mm(layer, max_tokens, slots):
                        requests(num_tokens)
    return compile_cache.num_in_memory() - num_before


def visit_changes(requests: Callable[[int], Requests], max_tokens: int) -> None:
    """Call ``requests`` on both sides of each number of tokens where its result changes.

    Between powers of two a result that returns to what it was is not looked for: most choices of
    kernels are ladders, and ``kernels.tokens_of_every_config`` knows the one that is not.
    """
    powers = [1 << i for i in range(max_tokens.bit_length())]
    for span in pairwise([*powers, max_tokens]):
        spans = [span]
        while spans:
            low, high = spans.pop()
            if requests(low) != requests(high) and high - low > 1:
                middle = (low + high) // 2
                spans += [(low, middle), (middle, high)]
    requests(max_tokens)


def _tokens_of_every_grouped_mm(layer: NVFP4MoE, max_tokens: int, top_k: int) -> list[int]:
    sizes = [
        kernels.num_weight_blocks(
            projection.num_rows, projection.num_columns, gated=projection.gated
        )
        for projection in layer.projections().values()
    ]
    return kernels.tokens_of_every_config(max_tokens, top_k, layer.num_experts, sizes)


def _run(
    layer: NVFP4MoE,
    num_tokens: int,
    top_k: int | None,
    dtype: torch.dtype,
    routing_dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """One pass over tokens spread evenly over the experts, as the choice of kernels expects."""
    device = _device(layer)
    x_TD = torch.ones(num_tokens, layer.hidden_size, dtype=dtype, device=device)
    # Not layer(...): hooks are the user's.
    if layer.router is not None:
        layer.forward(x_TD)
    if top_k is not None:
        index_dtype, weights_dtype = routing_dtypes
        slots = torch.arange(num_tokens * top_k, device=device) % layer.num_experts
        index_TK = slots.view(num_tokens, top_k).to(index_dtype)
        weights_TK = torch.full_like(index_TK, 1, dtype=weights_dtype)
        layer.forward(x_TD, index_TK, weights_TK)


def _check_layer(name: str, layer: NVFP4MoE, top_k: int | None) -> None:
    where = name or "module"
    if layer.router is None and top_k is None:
        raise ValueError(f"top_k: must be given, {where} has no router")
    if top_k is not None and not 1 <= top_k <= layer.num_experts:
        raise ValueError(f"top_k: must be between 1 and {layer.num_experts}, got {top_k}")
    if _device(layer).type == "meta":
        raise ValueError(f"{where}: is on the meta device; load its weights first")
    if layer.is_calibrating:
        raise ValueError(f"{where}: is being calibrated, and dummy tokens would count")


def _device(layer: NVFP4MoE) -> torch.device:
    return layer.down_proj.weight.device


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and kernels.why_no_kernels(device) is None


def _kind(layer: NVFP4MoE) -> Hashable:
    """Layers of one kind ask for the same kernels."""
    tensors = tuple(
        (name, tuple(buffer.shape), buffer.dtype)
        for name, buffer in layer.named_buffers()
        if name.startswith(tuple(layer.projections()))
    )
    # Prepacked weights are padded: of these, layers of several sizes have tensors of one shape.
    sizes = (layer.hidden_size, layer.intermediate_size)
    activation = (layer.activation, layer._fused, layer.activation_scale)
    return (tensors, sizes, _device(layer), *activation, _router_kind(layer.router))


def _router_kind(router: nn.Module | None) -> Hashable:
    if router is None:
        return None
    numbers = tuple((k, v) for k, v in vars(router).items() if isinstance(v, int | float))
    dtypes = tuple((name, tensor.dtype) for name, tensor in router.state_dict().items())
    return (type(router), getattr(router, "top_k", router), numbers, dtypes)


@contextmanager
def _progress_bar(show: bool) -> Iterator[Callable[[], None]]:
    """What to call after each step: it counts the kernels in memory."""
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(desc="warmup", unit=" kernels", delay=1.0) as bar:
        before = compile_cache.num_in_memory()

        def advance() -> None:
            bar.update(compile_cache.num_in_memory() - before - bar.n)

        yield advance
