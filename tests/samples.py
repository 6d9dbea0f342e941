"""Valid arguments of the ops: random operands, and the sample table of the contract tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import Activation, kernels

ONE_E4M3 = 0x38
NAN_E4M3 = 0x7F


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offs_of(counts: Sequence[int]) -> Tensor:
    """End rows of experts that have ``counts`` rows: [2, 0, 3] -> [2, 2, 5]."""
    return int32(*accumulate(counts))


def random_codes(*shape: int) -> Tensor:
    """Packed e2m1 codes: any byte."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_sf(*shape: int, lowest: int = 0, highest: int = 0x7E) -> Tensor:
    """e4m3 block scales; by default any that is neither negative nor NaN, subnormals and 448."""
    return torch.randint(lowest, highest + 1, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


class Operands(NamedTuple):
    """Positional arguments of ``grouped_scaled_mm``."""

    a: Tensor
    b: Tensor
    sf_a: Tensor | None
    sf_b: Tensor
    alpha: Tensor
    offs: Tensor

    def swizzled(self) -> "Operands":
        sf_a = None if self.sf_a is None else nvfp4_ops.swizzle_sf(self.sf_a, self.offs)
        return self._replace(sf_a=sf_a, sf_b=nvfp4_ops.swizzle_sf(self.sf_b))


def operands(
    counts: Sequence[int],
    n: int = 24,
    k: int = 48,
    *,
    a_dtype: torch.dtype = torch.uint8,
    rows_past_end: int = 0,
    segments: int = 1,
) -> Operands:
    """Random operands with ``counts`` rows per expert; ``a_dtype`` uint8 is W4A4.

    alpha brings the results near 1. All products and their sums are exact in float64.
    """
    num_rows, num_experts = sum(counts) + rows_past_end, len(counts)
    alpha = torch.rand(num_experts, segments) + 0.5
    if a_dtype == torch.uint8:
        a, sf_a = random_codes(num_rows, k // 2), random_sf(num_rows, k // 16)
        alpha = alpha * 2.0**-16 / k
    else:
        a, sf_a = torch.randn(num_rows, k).to(a_dtype), None
        alpha = alpha * 2.0**-7 / k
    return Operands(
        a=a,
        b=random_codes(num_experts, n, k // 2),
        sf_a=sf_a,
        sf_b=random_sf(num_experts, n, k // 16),
        alpha=alpha.squeeze(1) if segments == 1 else alpha,
        offs=offs_of(counts),
    )


@dataclass(frozen=True)
class Sample:
    """Valid arguments of an op, for any number of rows.

    op: name, of the op and of its public function.
    name: what is special about it.
    arguments: positional arguments for a number of rows.
    options: keyword arguments of the public function.
    program, inputs: a function of tensors alone, and its arguments, where a compiled program can
        not take the op's own arguments; None where it can.
    """

    op: str
    name: str
    arguments: Callable[[int], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    program: Callable[..., Any] | None = None
    inputs: Callable[[int], tuple[Any, ...]] | None = None

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def op_options(self) -> dict[str, Any]:
        """Keyword arguments of the op itself."""
        options = dict(self.options)
        act = options.get("activation")
        if isinstance(act, Activation):
            options.update(activation=act.name, limit=act.limit)
        if "num_columns" in options:
            options["layout"] = kernels.LAYOUT
        if "out_dtype" in options:
            options["out_dtype"] = str(options["out_dtype"]).removeprefix("torch.")
        return options

    def function(self) -> Callable[..., Any]:
        """The public function of tensors (and ints) to compile and export."""
        if self.program is not None:
            return self.program
        public, options = getattr(nvfp4_ops, self.op), self.options
        return lambda *args: public(*args, **options)

    def function_arguments(self, num_rows: int) -> tuple[Any, ...]:
        return (self.inputs or self.arguments)(num_rows)


def _split(num_rows: int) -> list[int]:
    """Rows of three experts, the middle one empty; up to two rows are left over."""
    first = num_rows // 3
    return [first, 0, max(num_rows - first - 2, 0)]


def _rows(dtype: torch.dtype, k: int = 32) -> Callable[[int], Tensor]:
    return lambda num_rows: torch.randn(num_rows, k).to(dtype)


def _strided_rows(num_rows: int) -> Tensor:
    return torch.randn(32, num_rows).t()


def _scale(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.01 + 0.001


def _mm(num_rows: int, *, swizzled: bool = False, **options: Any) -> tuple[Any, ...]:
    counts = _split(num_rows)
    made = operands(counts, rows_past_end=num_rows - sum(counts), **options)
    return tuple(made.swizzled() if swizzled else made)


def _quantize_samples() -> list[Sample]:
    def sample(name: str, arguments: Callable[[int], tuple[Any, ...]], **options: Any) -> Sample:
        return Sample("quantize_nvfp4", name, arguments, options)

    bf16 = _rows(torch.bfloat16)
    return [
        sample("scalar-scale", lambda r: (bf16(r), _scale())),
        sample(
            "expert-scale-swizzled",
            lambda r: (bf16(r), _scale(3), offs_of(_split(r))),
            swizzled=True,
        ),
        sample("row-scale", lambda r: (_rows(torch.float16)(r), _scale(r, 1)), swizzled=True),
        sample("strided", lambda r: (_strided_rows(r), _scale(r))),
    ]


def _activate_samples() -> list[Sample]:
    def sample(name: str, arguments: Callable[[int], tuple[Any, ...]], **options: Any) -> Sample:
        return Sample("activate_and_quantize_nvfp4", name, arguments, options)

    bf16 = _rows(torch.bfloat16, 64)
    return [
        sample("gated", lambda r: (bf16(r), _scale(), None), activation="silu_mul"),
        sample(
            "clamped-ragged",
            lambda r: (_rows(torch.float16, 96)(r), _scale(3), offs_of(_split(r))),
            activation=Activation("swiglu_oai", 2.0),
            swizzled=True,
        ),
        sample("relu2", lambda r: (bf16(r), _scale(r, 1), None), activation="relu2"),
    ]


def _per_token_samples() -> list[Sample]:
    def sample(name: str, arguments: Callable[[int], tuple[Any, ...]], **options: Any) -> Sample:
        return Sample("quantize_per_token_nvfp4", name, arguments, options)

    bf16 = _rows(torch.bfloat16)
    return [
        sample("rows", lambda r: (bf16(r),)),
        sample("ragged-swizzled", lambda r: (bf16(r), offs_of(_split(r))), swizzled=True),
        sample(
            "clamped", lambda r: (_rows(torch.float32)(r),), activation=Activation("silu_mul", 2.0)
        ),
    ]


def _round_samples() -> list[Sample]:
    def gathered(num_rows: int) -> Tensor:
        return torch.randint(-1, 7, (num_rows,), dtype=torch.int32)

    def scaled(num_rows: int) -> tuple[Any, ...]:
        offs = offs_of(_split(num_rows))
        return _rows(torch.float16)(7), _scale(3), offs, gathered(num_rows)

    def gather_scaled(x: Tensor, scale: Tensor, offs: Tensor, tokens: Tensor) -> Tensor:
        return nvfp4_ops.round_nvfp4(x, scale, offs, token_of_row=tokens)

    def per_token(num_rows: int) -> tuple[Any, ...]:
        return _rows(torch.bfloat16)(7), None, gathered(num_rows)

    def gather_per_token(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return nvfp4_ops.round_per_token_nvfp4(x, token_of_row=tokens)

    bf16 = _rows(torch.bfloat16)
    return [
        Sample("round_nvfp4", "scalar-scale", lambda r: (bf16(r), _scale())),
        Sample("round_nvfp4", "strided", lambda r: (_strided_rows(r), _scale(r, 1))),
        Sample("round_nvfp4", "gathered", scaled, program=gather_scaled),
        Sample("round_per_token_nvfp4", "rows", lambda r: (bf16(r),)),
        Sample("round_per_token_nvfp4", "ragged", lambda r: (bf16(r), offs_of(_split(r)))),
        Sample(
            "round_per_token_nvfp4",
            "gathered",
            per_token,
            program=gather_per_token,
            inputs=lambda r: per_token(r)[::2],
        ),
    ]


def _dequantize_samples() -> list[Sample]:
    def sample(name: str, arguments: Callable[[int], tuple[Any, ...]], **options: Any) -> Sample:
        return Sample("dequantize_nvfp4", name, arguments, options)

    def swizzled(num_rows: int) -> tuple[Any, ...]:
        offs = offs_of(_split(num_rows))
        sf = nvfp4_ops.swizzle_sf(random_sf(num_rows, 2), offs)
        return random_codes(num_rows, 16), sf, _scale(3), offs

    return [
        sample("rows", lambda r: (random_codes(r, 16), random_sf(r, 2), _scale(r, 1))),
        sample("swizzled", swizzled, dtype=torch.bfloat16),
        sample(
            "weights",
            lambda r: (random_codes(2, r, 16), random_sf(2, r, 2), _scale(2)),
            dtype=torch.float16,
        ),
    ]


def _swizzle_samples() -> list[Sample]:
    def ragged(num_rows: int) -> tuple[Any, ...]:
        sf, offs = random_sf(num_rows, 5), offs_of(_split(num_rows))
        return nvfp4_ops.swizzle_sf(sf, offs), (num_rows, 5), offs

    return [
        Sample("swizzle_sf", "rows", lambda r: (random_sf(r, 4),)),
        Sample("swizzle_sf", "ragged", lambda r: (random_sf(r, 5), offs_of(_split(r)))),
        Sample("swizzle_sf", "weights", lambda r: (random_sf(3, r, 2),)),
        Sample("swizzle_sf", "strided", lambda r: (random_sf(3, r).t(),)),
        Sample(
            "unswizzle_sf",
            "rows",
            lambda r: (nvfp4_ops.swizzle_sf(random_sf(r, 4)), (r, 4)),
            program=lambda sf, rows: nvfp4_ops.unswizzle_sf(sf, (rows.shape[0], 4)),
            inputs=lambda r: (nvfp4_ops.swizzle_sf(random_sf(r, 4)), torch.zeros(r)),
        ),
        Sample(
            "unswizzle_sf",
            "ragged",
            ragged,
            program=lambda sf, rows, offs: nvfp4_ops.unswizzle_sf(sf, (rows.shape[0], 5), offs),
            inputs=lambda r: (ragged(r)[0], torch.zeros(r), ragged(r)[2]),
        ),
        Sample(
            "unswizzle_sf",
            "weights",
            lambda r: (nvfp4_ops.swizzle_sf(random_sf(2, r, 4)), (2, r, 4)),
            program=lambda sf, rows: nvfp4_ops.unswizzle_sf(sf, (2, rows.shape[0], 4)),
            inputs=lambda r: (nvfp4_ops.swizzle_sf(random_sf(2, r, 4)), torch.zeros(r)),
        ),
    ]


def _mm_samples() -> list[Sample]:
    def sample(name: str, arguments: Callable[[int], tuple[Any, ...]], **options: Any) -> Sample:
        return Sample("grouped_scaled_mm", name, arguments, options)

    bias = torch.linspace(-1, 1, 3 * 24).view(3, 24)
    return [
        sample("w4a4", _mm),
        sample("swizzled-gated", lambda r: _mm(r, swizzled=True), activation="silu_mul"),
        sample(
            "two-segments-clamped",
            lambda r: _mm(r, segments=2),
            activation=Activation("silu_mul", 1.5),
            out_dtype=torch.float16,
        ),
        sample(
            "weight-only-bias",
            lambda r: _mm(r, a_dtype=torch.bfloat16),
            bias=bias,
            activation="relu2",
            out_dtype=torch.float32,
        ),
    ]


def _prepacked_mm(num_rows: int, *, gated: bool = False) -> tuple[Any, ...]:
    a, b, sf_a, sf_b, alpha, offs = operands(
        _split(num_rows), 32, 48, a_dtype=torch.bfloat16, rows_past_end=0
    )
    return a, nvfp4_ops.prepack_weight(b, sf_b, gated=gated), sf_a, None, alpha, offs


def _prepack_samples() -> list[Sample]:
    def experts(n: int, k: int) -> Callable[[int], tuple[Any, ...]]:
        return lambda r: (random_codes(r, n, k // 2), random_sf(r, n, k // 16, lowest=1))

    prepacked = {"num_columns": 32}
    return [
        Sample("prepack_weight", "padded", experts(16, 16)),
        Sample("prepack_weight", "odd", experts(48, 80)),
        Sample("prepack_weight", "whole-tiles", experts(128, 128)),
        Sample("prepack_weight", "gated", experts(96, 80), {"gated": True}),
        Sample("grouped_scaled_mm", "prepacked", _prepacked_mm, prepacked),
        Sample(
            "grouped_scaled_mm",
            "prepacked-gated",
            lambda r: _prepacked_mm(r, gated=True),
            prepacked | {"activation": "silu_mul"},
        ),
    ]


def _routing_samples() -> list[Sample]:
    def slots(num_tokens: int) -> Tensor:
        """Two rows per token, the last slot without one."""
        slots = torch.randperm(num_tokens * 2).view(num_tokens, 2).int()
        slots[-1:, -1] = -1
        return slots

    def tokens(num_rows: int) -> Tensor:
        return torch.randint(-1, 7, (num_rows,), dtype=torch.int32)

    return [
        Sample("sort_by_expert", "int64", lambda r: (torch.randint(0, 4, (r, 2)), 4)),
        Sample(
            "sort_by_expert", "int32-sentinels", lambda r: (torch.randint(0, 9, (r, 3)).int(), 4)
        ),
        Sample("sort_by_expert", "top-1", lambda r: (torch.randint(0, 2, (r, 1)), 1)),
        Sample("permute", "bf16", lambda r: (_rows(torch.bfloat16)(7), tokens(r))),
        Sample("permute", "e4m3", lambda r: (random_sf(7, 3), tokens(r))),
        Sample("permute", "vector", lambda r: (torch.randn(7), tokens(r))),
        Sample("combine", "bf16", lambda r: (_rows(torch.bfloat16)(2 * r), slots(r), _scale(r, 2))),
        Sample("combine", "fp32", lambda r: (_rows(torch.float32)(2 * r), slots(r), _scale(r, 2))),
        Sample(
            "combine",
            "strided",
            lambda r: (_strided_rows(2 * r), slots(r), _scale(2, r).t().half()),
        ),
        Sample("router_logits", "fp32", lambda r: (torch.randn(r, 8), torch.randn(4, 8))),
        Sample("router_logits", "bf16", lambda r: (_rows(torch.bfloat16)(r), torch.randn(4, 32))),
        Sample("router_logits", "strided", lambda r: (_strided_rows(r), torch.randn(32, 4).t())),
        Sample("softmax_top_k", "fp32", lambda r: (torch.randn(r, 8), 3)),
        Sample(
            "softmax_top_k", "bf16", lambda r: (_rows(torch.bfloat16)(r), 2), {"renormalize": False}
        ),
        Sample("softmax_top_k", "all-experts", lambda r: (torch.randn(r, 2), 2)),
        Sample("sigmoid_top_k", "no-bias", lambda r: (torch.randn(r, 8), None, 3)),
        Sample(
            "sigmoid_top_k",
            "groups",
            lambda r: (torch.randn(r, 8), torch.randn(8), 3),
            {"num_groups": 4, "top_groups": 2, "scaling_factor": 2.5},
        ),
        Sample(
            "sigmoid_top_k",
            "plain-weights",
            lambda r: (torch.randn(r, 8).half(), torch.randn(8).bfloat16(), 1),
            {"renormalize": False},
        ),
    ]


SAMPLES = [
    *_quantize_samples(),
    Sample("global_scale", "per-tensor", lambda r: (_rows(torch.bfloat16)(r),)),
    Sample("global_scale", "per-token", lambda r: (_rows(torch.float32)(r),), {"per_token": True}),
    Sample("global_scale", "strided", lambda r: (_strided_rows(r),), {"per_token": True}),
    *_activate_samples(),
    *_per_token_samples(),
    *_round_samples(),
    *_dequantize_samples(),
    *_swizzle_samples(),
    *_mm_samples(),
    *_prepack_samples(),
    *_routing_samples(),
]
