"""What bench.moe runs: real shapes, random NVFP4 layers and routings, and their float32 reference.

Weights are made expert by expert from a seed of their own, and made again where they are needed:
no second copy of a layer is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import nvfp4_ops
from nvfp4_ops import NVFP4MoE, reference
from nvfp4_ops.operand import ActivationScale
from nvfp4_ops.weight import NVFP4Weight

Mode = ActivationScale | None
NVFP4_BYTES, BF16_BYTES = 4.5 / 8, 2.0
# e4m3 bytes of 16 and just past 448.
SCALE_BYTES = (0x58, 0x7F)
# Root mean square of code * scale with both drawn uniformly: keeps activations near 1.
RMS_OF_PRODUCT = 512.0
CALIBRATION_TOKENS = 1024
CHECKED_TOKENS = 16
MAX_ERROR = {None: 0.01, "static": 0.05, "per_token": 0.05}
"""Relative error of the norm. Weight-only: bf16 between the projections. W4A4: a value near a tie
may fall the other way, by a whole step of e2m1."""


@dataclass(frozen=True)
class Shape:
    """An experts layer: D, F, E and the experts of a token."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.intermediate

    def flop(self, tokens: int) -> float:
        return 2.0 * tokens * self.top_k * self.weights_per_expert


SHAPES = (
    Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
    Shape("mixtral-8x7b", 4096, 14336, 8, 2),
    # The weights of one expert-parallel rank; its 32 experts are routed to as if there were no
    # others.
    Shape("dsv3-32of256", 7168, 2048, 32, 8),
    Shape("dsv4-flash", 4096, 2048, 256, 6),
    Shape("gpt-oss-120b", 2880, 2880, 128, 4),
)


def parse_shape(text: str) -> Shape:
    """A name of ``SHAPES``, or H,I,E,K."""
    for shape in SHAPES:
        if shape.name == text:
            return shape
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes):
        names = ", ".join(shape.name for shape in SHAPES)
        raise ValueError(f"shape: must be H,I,E,K or one of {names}, got {text}")
    hidden, intermediate, num_experts, top_k = map(int, sizes)
    return Shape(text.replace(",", "x"), hidden, intermediate, num_experts, top_k)


class Routing(NamedTuple):
    """One batch: x (T, D) bf16, index (T, top_k) int64, weights (T, top_k) fp32."""

    x: Tensor
    index: Tensor
    weights: Tensor

    def experts_touched(self) -> int:
        return int(self.index.unique().numel())


def random_routing(shape: Shape, tokens: int, seed: int, device: str) -> Routing:
    """Distinct experts for each token, all equally likely."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(tokens, shape.num_experts, device=device, generator=generator)
    top = scores.topk(shape.top_k, dim=1)
    return Routing(x, top.indices.contiguous(), top.values.softmax(dim=1).contiguous())


def random_expert(shape: Shape, expert: int, device: str) -> list[NVFP4Weight]:
    """Gate (F, D), up (F, D) and down (D, F), each with a global scale of its own."""
    generator = torch.Generator(device).manual_seed(1 + expert)
    weights = []
    sizes = [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]
    for n, k in sizes:
        codes = torch.randint(
            0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator
        )
        sf = torch.randint(
            *SCALE_BYTES, (n, k // 16), dtype=torch.uint8, device=device, generator=generator
        )
        scale = torch.rand((), device=device, generator=generator) + 0.5
        scale = scale / (RMS_OF_PRODUCT * k**0.5)
        weights.append(NVFP4Weight(codes, sf.view(torch.float8_e4m3fn), scale))
    return weights


def float_expert(shape: Shape, expert: int, device: str) -> list[Tensor]:
    """The same in fp32."""
    return [reference.dequantize_nvfp4(*weight) for weight in random_expert(shape, expert, device)]


@torch.no_grad()
def build_moe(shape: Shape, device: str) -> NVFP4MoE:
    """The layer with its input scales calibrated, so that every mode can be assigned."""
    moe = NVFP4MoE(shape.hidden, shape.intermediate, shape.num_experts, device=device)
    for expert in range(shape.num_experts):
        gate, up, down = random_expert(shape, expert, device)
        moe.first_proj.copy_segment(expert, 0, gate)
        moe.first_proj.copy_segment(expert, 1, up)
        moe.down_proj.copy_segment(expert, 0, down)
    for projection in moe.projections().values():
        projection.prepack()
    with nvfp4_ops.calibrate(moe):
        moe(*random_routing(shape, CALIBRATION_TOKENS, 0, device))
    return moe


def _fake_quantize(rows: Tensor, mode: Mode, static_scale: Tensor) -> Tensor:
    """fp32 rows of what the layer multiplies in a mode."""
    if mode is None:
        return rows.float()
    scale = static_scale
    if mode == "per_token":
        scale = reference.global_scale(rows, per_token=True)
    return reference.dequantize_nvfp4(*reference.quantize_nvfp4(rows, scale), scale)


def expected_rows(
    shape: Shape, moe: NVFP4MoE, routing: Routing, tokens: Tensor, modes: Sequence[Mode]
) -> dict[Mode, Tensor]:
    """(len(tokens), D) fp32 of some tokens in every mode, expert by expert."""
    device = str(routing.x.device)
    x, index, weights = (tensor[tokens] for tensor in routing)
    out = {mode: torch.zeros(x.shape, device=device) for mode in modes}
    first_scale, down_scale = moe.first_proj.input_scale, moe.down_proj.input_scale
    assert first_scale is not None
    assert down_scale is not None
    for expert in index.unique().tolist():
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up, down = float_expert(shape, expert, device)
        for mode in modes:
            rows = _fake_quantize(x[token], mode, first_scale.amax())
            hidden = (F.silu(rows @ gate.T) * (rows @ up.T)).to(x.dtype)
            rows = _fake_quantize(hidden, mode, down_scale[expert])
            out[mode].index_add_(0, token, weights[token, slot, None] * (rows @ down.T))
    return out


def checked_tokens(tokens: int, device: str) -> Tensor:
    """All of a small batch, evenly spread ones of a large one, first and last among them."""
    count = min(tokens, CHECKED_TOKENS)
    return torch.linspace(0, tokens - 1, count, device=device).round().long()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())
