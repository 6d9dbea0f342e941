"""Weights decoded in registers and multiplied by rows in shared memory: acc += W x^T.

Up to 80 tokens a tile, decoding takes about as many cycles as the tensor cores do, and the two do
not overlap fully. So every instruction of the loop counts, and what looks odd here saves some.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.nvgpu import warpgroup

from nvfp4_ops.kernels.grouped_mm_config import GroupedMmConfig
from nvfp4_ops.kernels.grouped_mm_epilogue_sm90 import WARPGROUP, load_16_bytes
from nvfp4_ops.kernels.grouped_mm_stage_sm90 import BOXES_OF_BLOCK, StageRecord, barrier
from nvfp4_ops.kernels.launch.tensors import WARP
from nvfp4_ops.kernels.memory import ptx
from nvfp4_ops.kernels.prepack_sm90 import BLOCK_BYTES, CODE_BYTES

_PRODUCTS_OF_BOX = 4
_CODE_MASK = 0x81C081C0
_REST_MASK, _REST_FACTOR = 0x001B001B, 0x4108
_SCALE_MASK, _SCALE_EXPONENT = 0x0FF00FF0, 0x70007000
# Matrix descriptor of wgmma, in units of 16 bytes: groups of eight rows are 1024 bytes apart and
# swizzled by 128 (upper word); the lower word is the address and a field without meaning here.
_DESCRIPTOR_HIGH, _DESCRIPTOR_LOW = 1 << 30 | 64, 1 << 16
_PRODUCT_STEP = 2


def _rotate(word: Uint32, left: int) -> Uint32:
    return ptx(f"shf.l.wrap.b32 {{$w0}}, {{$r0}}, {{$r0}}, {left};", Uint32, word)


def _multiply_by_half(a, scales, half: int):
    """bf16x2 a times one half of ``scales``, splatted; ptxas folds the splat into HMUL2."""
    part = "lh"[half]
    return ptx(
        "{.reg .b16 l,h; .reg .b32 t; mov.b32 {l,h}, {$r1}; "
        f"mov.b32 t, {{{part},{part}}}; "
        "mul.rn.bf16x2 {$w0}, {$r0}, t;}",
        Uint32,
        a,
        scales,
    )


def _decode_word(word, scales, out, base: int):
    """Eight codes (four of row g, four of row g + 8) to four bf16x2 operand registers."""
    mask = Uint32(_CODE_MASK)
    # Each of the four bits lands once on the mask, and no two bits anywhere on one another.
    rest = (word & Uint32(_REST_MASK)) * Uint32(_REST_FACTOR)
    out[base + 0] = _multiply_by_half(_rotate(word, 26) & mask, scales, 0)
    out[base + 1] = _multiply_by_half(rest & mask, scales, 1)
    out[base + 2] = _multiply_by_half(word & mask, scales, 0)
    out[base + 3] = _multiply_by_half(_rotate(word, 29) & mask, scales, 1)


class _Weights(NamedTuple):
    """A thread's part of the weights of a stage: where, and what is loaded ahead of the loop."""

    code_offset: Int32
    scale_offset: Int32
    words: list[cute.Tensor]
    scale_words: cute.Tensor


class MainLoop:
    """A consumer warpgroup's products with a tile's rows, from stage to stage.

    One product of 64 columns is under way while the next operand is decoded. ptxas must be able
    to see that: with more of them across the loop's end it waits after every instruction. The
    barrier, first codes and scales of a stage are read while the products of the stage before are
    under way, that of a tile's first stage included: the state goes on from tile to tile, and the
    producer has one stage arrive after the last.
    """

    def __init__(self, config: GroupedMmConfig, stage: StageRecord) -> None:
        self.config = config
        self.stage = stage

    def _open(self) -> _Weights:
        """Registers and offsets of this thread."""
        tid, _, _ = cute.arch.thread_idx()
        thread, lane = tid % WARPGROUP, cute.arch.lane_idx()
        block = self.stage.weights + tid // WARPGROUP * BLOCK_BYTES
        scales = CODE_BYTES + ((thread // WARP) * 8 + lane // 4) * 16
        words = [cute.make_rmem_tensor(cute.make_layout(4), Uint32) for _ in range(2)]
        # Through a shuffle, or ptxas computes both from the thread's index anew in every stage.
        return _Weights(
            Int32(cute.arch.shuffle_sync(block + thread * 16, lane)),
            Int32(cute.arch.shuffle_sync(block + scales, lane)),
            words,
            cute.make_rmem_tensor(cute.make_layout(4), Uint32),
        )

    def enter(self, record, phase):
        """Wait for a stage."""
        cute.arch.mbarrier_wait(barrier(record + self.stage.full), phase)

    def _load_first(self, weights, record):
        """The scales of a stage and the codes of its first half."""
        load_16_bytes(record + weights.code_offset, weights.words[0])
        load_16_bytes(record + weights.scale_offset, weights.scale_words)

    @cute.jit
    def _next(self, first, record, phase):
        """The stage after ``record``, and its phase; ``first`` is the first stage."""
        record = record + self.stage.num_bytes
        if record == first + self.stage.end:
            record = first
            phase = phase ^ 1
        return record, phase

    @cute.jit
    def _release(self, record):
        """This warp is done with a stage; tell the producer of every CTA that fills it."""
        lane, empty = cute.arch.lane_idx(), barrier(record + self.stage.empty)
        if cutlass.const_expr(self.config.cluster == 1):
            if lane == 0:
                cute.arch.mbarrier_arrive(empty)
        else:
            if lane < self.config.cluster:
                cute.arch.mbarrier_arrive(empty, lane)

    @cute.jit
    def multiply(self, acc, first, record, phase, column_blocks):
        """acc (width / 2 registers) += W x^T over all columns.

        first: of all stages. record, phase: the stage to start with, which has been entered.
        Returns those that follow.
        """
        stage, weights = self.stage, self._open()
        group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARPGROUP)
        width = cute.size(acc) * 2
        operands = [cute.make_rmem_tensor(cute.make_layout(16), Uint32) for _ in range(2)]
        exponent = ptx(f"mov.b32 {{$w0}}, {_SCALE_EXPONENT};", Uint32)
        first_column, own_boxes = Int32(0), Int32(0)
        if cutlass.const_expr(self.config.split_k):
            first_column = group
            own_boxes = group * (BOXES_OF_BLOCK * stage.box_bytes)
        # No stage before the first is left to be released: the ``empty`` of this one is ``nobody``.
        # Without a branch ptxas can do more.
        previous = first + (stage.end - stage.empty)
        # The tile before has loaded them too, but its epilogue needed the registers.
        self._load_first(weights, record)
        for _ in cutlass.range(first_column, column_blocks, stage.column_blocks, unroll=1):
            load_16_bytes(record + weights.code_offset + CODE_BYTES // 2, weights.words[1])
            next_record, next_phase = self._next(first, record, phase)
            arrived = cutlass.Boolean(False)
            for half in cutlass.range_constexpr(2):
                self._decode(weights, half, exponent, operands[half])
                warpgroup.fence()
                box = (record + own_boxes + half * stage.box_bytes) >> 4
                for j in cutlass.range_constexpr(_PRODUCTS_OF_BOX):
                    low = Uint32(box + (_DESCRIPTOR_LOW + j * _PRODUCT_STEP))
                    self._product(width, acc, operands[half], 4 * j, low)
                warpgroup.commit_group()
                if cutlass.const_expr(half == 0):
                    arrived = cute.arch.mbarrier_try_wait(
                        barrier(next_record + stage.full), next_phase
                    )
                else:
                    if not arrived:
                        self.enter(next_record, next_phase)
                    self._load_first(weights, next_record)
                # All but this half are done: its predecessor's registers are free, and after
                # the first half so is the stage before.
                warpgroup.wait_group(1)
                if cutlass.const_expr(half == 0):
                    self._release(previous)
            previous = record
            record, phase = next_record, next_phase
        warpgroup.wait_group(0)
        self._release(previous)
        if cutlass.const_expr(self.config.split_k):
            # The last stage may have no column for this warpgroup, and is used up all the same.
            last_columns = (column_blocks - 1) % stage.column_blocks
            if last_columns < first_column:
                self._release(record)
                record, phase = self._next(first, record, phase)
                self.enter(record, phase)
        return record, phase

    def _decode(self, weights, half: int, exponent, operand):
        """64 columns of the thread's two rows."""
        for j in range(4):
            word = weights.scale_words[2 * half + j // 2]
            if j % 2:
                word = _rotate(word, 8)
            table = 0xEA  # (word & mask) | exponent
            code = f"lop3.b32 {{$w0}}, {{$r0}}, {_SCALE_MASK}, {{$r1}}, {table};"
            scales = ptx(code, Uint32, word, exponent)
            _decode_word(weights.words[half][j], scales, operand, 4 * j)

    def _product(self, width: int, acc, operand, first: int, low):
        """acc += 64 rows x 16 columns, in registers, times ``width`` rows of x."""
        sums = [acc[i] for i in range(width // 2)]
        others = [*(operand[first + i] for i in range(4)), low]
        names = [f"{{$rw{i}}}" for i in range(len(sums) + len(others))]
        d, (*a, x) = names[: len(sums)], names[len(sums) :]
        # In 4.8.1, operands that are only read are mistaken for others beside some that are not.
        cute.arch.inline_ptx(
            f"{{.reg .b64 x; mov.b64 x, {{{x}, {_DESCRIPTOR_HIGH}}}; "
            f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 "
            f"{{{', '.join(d)}}}, {{{', '.join(a)}}}, x, 1, 1, 1, 0;}}",
            read_write_args=sums + others,
        )
        # They have been redefined: these are the new sums.
        for i, value in enumerate(sums):
            acc[i] = value
