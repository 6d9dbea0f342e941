"""LinearTensors, what every producer's linear layer is read into, and the checks of its values."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.index import FLOAT_DTYPES, CheckpointError, TensorIndex
from nvfp4_ops.checkpoint.scheme import Scheme
from nvfp4_ops.weight import NVFP4Weight

INPUT_SCALE_SUFFIXES = ("input_scale", "input_global_scale")


class LinearTensors(NamedTuple):
    """One linear layer in the canonical (ModelOpt) layout; every scale is a decode scale.

    codes: (N, K / 2) uint8, even k in the low nibble.
    block_scale: (N, K / 16) float8_e4m3fn, linear.
    global_scale: () fp32. input_scale: () fp32, or None where the checkpoint has none.
    bias: (N,) float, or None.
    """

    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor
    input_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def weight(self) -> NVFP4Weight:
        return NVFP4Weight(self.codes, self.block_scale, self.global_scale)

    def to(self, device: torch.device | str) -> "LinearTensors":
        codes, block_scale, global_scale = (tensor.to(device) for tensor in self.weight)
        input_scale = None if self.input_scale is None else self.input_scale.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return LinearTensors(codes, block_scale, global_scale, input_scale, bias)

    def rows(self, rows: slice) -> "LinearTensors":
        """Some of the output rows."""
        bias = None if self.bias is None else self.bias[rows]
        return self._replace(codes=self.codes[rows], block_scale=self.block_scale[rows], bias=bias)


class Producer(Protocol):
    """How one producer names, stores and describes quantized linear layers."""

    @property
    def packed_name(self) -> str:
        """Name of the tensor of codes."""

    @property
    def tensor_names(self) -> frozenset[str]:
        """All tensors that a linear layer may have: others would change its meaning."""

    def scheme(self, module: str) -> Scheme | None:
        """What the quantization config says of a linear module, by its checkpoint name.

        Raises:
            CheckpointError: a format that can not be loaded.
        """

    def read_linear(self, index: TensorIndex, module: str) -> LinearTensors:
        """Read and check one linear module.

        Raises:
            CheckpointError: names the tensor that is missing or wrong.
        """


def check_packed(index: TensorIndex, name: str) -> tuple[int, int]:
    """(N, K) of the codes ``name``, uint8 (N, K / 2)."""
    info = index.info(name)
    if info.dtype != torch.uint8 or len(info.shape) != 2:
        raise CheckpointError(
            f"{index.where(name)} must be packed NVFP4, torch.uint8 (N, K/2), "
            f"got {info.dtype} {info.shape}"
        )
    rows, columns = info.shape[0], info.shape[1] * nvfp4.CODES_PER_BYTE
    if columns % nvfp4.BLOCK_SIZE or not columns or not rows:
        raise CheckpointError(
            f"{index.where(name)}: K must be a positive multiple of {nvfp4.BLOCK_SIZE}, "
            f"got {columns} ({rows} rows)"
        )
    return rows, columns


def check_block_scale(where: str, block_scale: Tensor) -> Tensor:
    """The e4m3 block scales, none of them NaN or negative."""
    sf_bytes = block_scale.view(torch.uint8)
    # Sign is the highest bit and NaN all others.
    if sf_bytes.numel() and int(sf_bytes.max()) >= nvfp4.E4M3_NAN_BYTE:
        raise CheckpointError(
            f"{where} holds NaN or negative block scales; the checkpoint is broken here: "
            "export it again"
        )
    return block_scale


def read_global_scale(index: TensorIndex, name: str, expert: int | None = None) -> Tensor:
    """A positive, finite fp32 scalar; one-element vectors are taken too.

    expert: take this element of a tensor that has one for each expert, or the only one.
    """
    stored = index.tensor(name)
    scale = stored.reshape(()) if stored.numel() == 1 else stored
    if expert is not None and scale.ndim and expert < stored.numel() == stored.shape[0]:
        scale = stored.flatten()[expert]
    # As a Python number: a checkpoint has thousands, and a tensor's operation costs microseconds.
    if scale.dtype != torch.float32 or scale.ndim or not 0 < scale.item() < torch.inf:
        some = stored.flatten()[:4].tolist() if scale.ndim else scale.item()
        advice = ""
        if name.endswith(INPUT_SCALE_SUFFIXES):
            advice = ", or pass ignore_input_scale=True and quantize activations dynamically"
        raise CheckpointError(
            f"{index.where(name)} must be one positive, finite float32, got {stored.dtype} "
            f"{tuple(stored.shape)} {some}; the checkpoint is broken here: export it again{advice}"
        )
    return scale


def check_bias(index: TensorIndex, name: str, shape: tuple[int, ...]) -> torch.dtype | None:
    """The dtype of a bias, bf16, fp16 or fp32, or None where there is none."""
    if name not in index:
        return None
    index.check(name, FLOAT_DTYPES, shape)
    dtype = index.info(name).dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_bias(index: TensorIndex, name: str, rows: int) -> Tensor | None:
    """A bias (N,), or None where there is none."""
    return None if check_bias(index, name, (rows,)) is None else index.tensor(name)
