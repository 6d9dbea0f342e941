"""Run a kernel's PTX on the CPU, with the checks of a sanitizer: for kernels of plain instructions.

A CTA's threads step together on numpy arrays; those furthest behind go first, so that they meet
again after a branch. It raises where a GPU would go wrong without a word:

- access outside a buffer, or misaligned; a read of shared memory that nothing has written;
- two warps that touch a shared byte between barriers, one of them writing;
- two different values for one address by one instruction;
- a barrier, shuffle, match or vote that not all threads reach;
- any access to global memory before ``griddepcontrol.wait``.

``Memory.num_writes`` counts the writes of every global byte. CTAs run one after the other. No
tensor cores, no asynchronous copies, no atomics; the instructions are those of ``_execute``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WARP = 32
GUARD_BYTES, FIRST_ADDRESS = 256, 1 << 40
SHARED_BYTES = 227 * 1024
_ALL_ONES = (1 << 64) - 1
Values = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Memory:
    """Global memory: tensors with guards between them. ``add`` copies in, ``get`` copies out."""

    def __init__(self) -> None:
        self.data = np.zeros(GUARD_BYTES, np.uint8)
        self.valid = np.zeros(GUARD_BYTES, bool)
        self.num_writes = np.zeros(GUARD_BYTES, np.int64)

    def add(self, tensor: torch.Tensor) -> int:
        """Address of a copy of a contiguous tensor, a multiple of 256."""
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        address = FIRST_ADDRESS + self.data.size
        size = -(-content.size // GUARD_BYTES) * GUARD_BYTES + GUARD_BYTES
        for name, values in (("data", content), ("valid", True), ("num_writes", 0)):
            old = getattr(self, name)
            grown = np.zeros(old.size + size, old.dtype)
            grown[: old.size] = old
            grown[old.size : old.size + content.size] = values
            setattr(self, name, grown)
        return address

    def get(self, address: int, like: torch.Tensor) -> torch.Tensor:
        start = address - FIRST_ADDRESS
        content = self.data[start : start + like.numel() * like.itemsize].copy()
        return torch.from_numpy(content).view(like.dtype).view(like.shape)

    def writes(self, address: int, like: torch.Tensor) -> Sequence[int]:
        """The different numbers of writes that the bytes of a tensor had."""
        start = address - FIRST_ADDRESS
        counts = self.num_writes[start : start + like.numel() * like.itemsize]
        return sorted(set(counts.tolist()))


@dataclass
class _Shared:
    """Shared memory of a CTA; who touched each byte since the last barrier (-1: nobody)."""

    data: Bytes = field(default_factory=lambda: np.zeros(SHARED_BYTES, np.uint8))
    written: Mask = field(default_factory=lambda: np.zeros(SHARED_BYTES, bool))
    writer: NDArray[np.int64] = field(default_factory=lambda: np.full(SHARED_BYTES, -1))
    reader: NDArray[np.int64] = field(default_factory=lambda: np.full(SHARED_BYTES, -1))

    def barrier(self) -> None:
        self.writer.fill(-1)
        self.reader.fill(-1)


@dataclass(frozen=True)
class _Instruction:
    guard: tuple[str, bool] | None
    opcode: list[str]
    operands: list[str]
    text: str


class Kernel:
    """The entry of a PTX module."""

    def __init__(self, ptx: str) -> None:
        entry = ptx[ptx.index(".visible .entry") :]
        header, body = entry.split("{", 1)
        self.params = re.findall(r"\.param .*?(\w+)(?:\[\d+\])?[,\n]", header)
        self.num_threads = int(re.search(r"\.reqntid (\d+), 1, 1", header)[1])  # type: ignore[index]
        self.code: list[_Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body.splitlines():
            text = line.split("//")[0].strip()
            if label := re.fullmatch(r"(\$\w+):", text):
                self.labels[label[1]] = len(self.code)
            elif text and not text.startswith((".", "{", "}")):
                self.code.append(_parse(text))

    def launch(self, num_ctas: Sequence[int], params: Sequence[bytes], memory: Memory) -> None:
        """Run all CTAs of a grid of two dimensions; params as the entry has them."""
        assert len(params) == len(self.params), self.params
        values = dict(zip(self.params, params, strict=True))
        for y in range(num_ctas[1]):
            for x in range(num_ctas[0]):
                _Cta(self, values, memory, (x, y)).run()


def _parse(text: str) -> _Instruction:
    match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*?);", text)
    assert match, text
    negated, predicate, opcode, operands = match.groups()
    guard = (predicate, negated == "!") if predicate else None
    split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
    return _Instruction(guard, opcode.split("."), split, text)


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def _signed(values: Values, bits: int) -> NDArray[np.int64]:
    shift = np.uint64(64 - bits)
    return (values << shift).view(np.int64) >> np.int64(64 - bits)


def _truncate(values: NDArray, bits: int) -> Values:
    mask = np.uint64((1 << bits) - 1)
    return values.astype(np.int64, copy=False).view(np.uint64) & mask


def _as_float(values: Values) -> NDArray[np.float32]:
    return values.astype(np.uint32).view(np.float32)


def _from_float(values: NDArray[np.float32]) -> Values:
    return values.astype(np.float32, copy=False).view(np.uint32).astype(np.uint64)


def _as_double(values: Values) -> NDArray[np.float64]:
    return np.ascontiguousarray(values).view(np.float64)


def _from_double(values: NDArray[np.float64]) -> Values:
    return np.ascontiguousarray(values.astype(np.float64, copy=False)).view(np.uint64)


def _fma(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> Any:
    """Rounded twice, the first time to the 64 bits of x86's widest format."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


_FLOAT64 = {
    "abs": np.abs, "neg": np.negative, "rcp": np.reciprocal, "div": np.divide, "fma": _fma,
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
}  # fmt: skip


def _narrow(values: Values, dtype: torch.dtype) -> Values:
    """fp32 bits to those of a 16-bit float."""
    narrow = torch.from_numpy(_as_float(values).copy()).to(dtype)
    return narrow.view(torch.int16).numpy().view(np.uint16).astype(np.uint64)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class _Cta:
    def __init__(
        self, kernel: Kernel, params: dict[str, bytes], memory: Memory, cta: tuple[int, int]
    ) -> None:
        n = kernel.num_threads
        self.kernel, self.params, self.memory = kernel, params, memory
        self.shared = _Shared()
        self.thread = np.arange(n)
        self.warp = self.thread // WARP
        lane = (self.thread % WARP).astype(np.uint64)
        self.pc = np.zeros(n, np.int64)
        self.waited = np.zeros(n, bool)
        self.registers: dict[str, Values] = {
            "%tid.x": self.thread.astype(np.uint64),
            "%ctaid.x": np.full(n, cta[0], np.uint64),
            "%ctaid.y": np.full(n, cta[1], np.uint64),
            "%laneid": lane,
            "%lanemask_lt": (np.uint64(1) << lane) - np.uint64(1),
        }

    def run(self) -> None:
        end = len(self.kernel.code)
        while (self.pc < end).any():
            pc = int(self.pc.min())
            at = self.pc == pc
            instruction = self.kernel.code[pc]
            active = at
            if instruction.guard is not None:
                register, negated = instruction.guard
                active = at & ((self.registers[register] != 0) != negated)
            self.pc[at] = pc + 1
            try:
                with np.errstate(all="ignore"):
                    self._step(instruction, active)
            except (AssertionError, KeyError) as error:
                raise AssertionError(f"{instruction.text}: {error}") from error

    def _step(self, instruction: _Instruction, active: Mask) -> None:
        name, operands = instruction.opcode[0], instruction.operands
        if name == "bra":
            self.pc[active] = self.kernel.labels[operands[0]]
        elif name == "ret":
            self.pc[active] = len(self.kernel.code)
        elif name == "griddepcontrol":
            self.waited |= active
        elif name == "bar":
            group = active if instruction.opcode[1] == "sync" else self._whole_warps(active)
            assert group.all() or instruction.opcode[1] == "warp", "not all threads are here"
            if instruction.opcode[1] == "sync":
                self.shared.barrier()
        elif name == "st":
            self._store(instruction, active)
        elif name == "ld":
            self._load(instruction, active)
        elif active.any():
            self._write(operands[0], self._execute(instruction, active), active)

    def _whole_warps(self, active: Mask) -> Mask:
        warps = active.reshape(-1, WARP)
        assert (warps.all(axis=1) | ~warps.any(axis=1)).all(), "not the whole warp is here"
        return active

    def _write(self, operand: str, values: Values | list[Values], active: Mask) -> None:
        names = re.findall(r"[%\w.]+", operand)
        parts = values if isinstance(values, list) else [values]
        for name, part in zip(names, parts, strict=True):
            if name != "_":
                old = self.registers.get(name, np.zeros_like(part))
                self.registers[name] = np.where(active, part, old)

    def _read(self, operand: str) -> Values:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith(("0f", "0d")):
            value = int(operand[2:], 16)
        elif operand == "__dynamic_shmem__0":
            value = 0
        else:
            value = int(operand, 0) & _ALL_ONES
        return np.full(self.thread.size, value, np.uint64)

    def _execute(self, instruction: _Instruction, active: Mask) -> Values | list[Values]:
        opcode, kind = instruction.opcode, instruction.opcode[-1]
        target, sources = instruction.operands[0], instruction.operands[1:]
        if opcode[0] == "mov":
            return self._move(target, sources[0], _bits(kind) // 2)
        if opcode[0] in ("shfl", "match", "vote", "redux"):
            self._whole_warps(active)
            return self._across_lanes(opcode, self._read(sources[0]), sources)
        values = [self._read(source) for source in sources]
        if opcode[0] == "cvt":
            return self._convert(opcode[1:], values)
        if opcode[0] == "selp":
            return np.where(values[2] != 0, values[0], values[1])
        if kind in ("bf16", "f16", "f32", "f64"):
            return self._execute_floats(opcode, values)
        return self._execute_words(opcode, values, active)

    def _execute_floats(self, opcode: list[str], values: list[Values]) -> Values:
        double = opcode[-1] == "f64"
        if opcode[-1] in ("bf16", "f16"):
            assert opcode[0] == "setp", "no 16-bit arithmetic"
            values = [self._convert(["f32", opcode[-1]], [value]) for value in values]
        floats: list[Any] = [(_as_double if double else _as_float)(value) for value in values]
        if opcode[:2] == ["setp", "nan"]:
            return (np.isnan(floats[0]) | np.isnan(floats[1])).astype(np.uint64)
        if opcode[0] == "setp":
            return _COMPARE[opcode[1]](*floats).astype(np.uint64)
        if double:
            return _from_double(_FLOAT64[opcode[0]](*floats))
        return _from_float(_ARITHMETIC[opcode[0]](*floats))

    def _execute_words(self, opcode: list[str], values: list[Values], active: Mask) -> Values:
        kind = opcode[-1]
        if opcode[0] == "not":
            return values[0] ^ np.uint64(1 if kind == "pred" else (1 << _bits(kind)) - 1)
        if kind == "pred":
            return _LOGIC[opcode[0]](*values)
        bits = _bits(kind)
        if opcode[0] == "neg":
            return _truncate(-_signed(values[0], bits), bits)
        if opcode[0] == "popc":
            return np.bitwise_count(_truncate(values[0], bits)).astype(np.uint64)
        if opcode[0] == "shl":
            return _truncate(values[0] << (values[1] & np.uint64(63)), bits)
        operands = (
            [_signed(value, bits) for value in values]
            if kind.startswith("s")
            else [_truncate(value, bits) for value in values]
        )
        if opcode[0] == "setp":
            return _COMPARE[opcode[1]](operands[0], operands[1]).astype(np.uint64)
        if opcode[0] == "shr":
            return _truncate(operands[0] >> values[1].astype(operands[0].dtype), bits)
        if opcode[0] == "div":
            assert (operands[1][active] > 0).all(), "division by a number that is not positive"
            return _truncate(operands[0] // np.where(operands[1] == 0, 1, operands[1]), bits)
        if opcode[:2] == ["mul", "wide"]:
            return _truncate(operands[0] * operands[1], 2 * bits)
        if opcode[:2] == ["mad", "lo"]:
            return _truncate(operands[0] * operands[1] + operands[2], bits)
        operation = _ARITHMETIC.get(opcode[0]) or _LOGIC[opcode[0]]
        return _truncate(operation(operands[0], operands[1]), bits)

    def _move(self, target: str, source: str, half_bits: int) -> Values | list[Values]:
        half = np.uint64(half_bits)
        if target.startswith("{"):
            value = self._read(source)
            return [_truncate(value, half_bits), value >> half]
        if source.startswith("{"):
            low, high = (self._read(name) for name in re.findall(r"[%\w.]+", source))
            return low | (high << half)
        return self._read(source)

    def _across_lanes(self, opcode: list[str], value: Values, sources: list[str]) -> Values:
        lanes = value.reshape(-1, WARP)
        bits = np.uint64(1) << np.arange(WARP, dtype=np.uint64)
        if opcode[0] == "match":
            same = lanes[:, :, None] == lanes[:, None, :]
            return (same * bits).sum(axis=2, dtype=np.uint64).reshape(-1)
        if opcode[0] == "vote":
            ballot = ((lanes != 0) * bits).sum(axis=1, dtype=np.uint64)
            return np.repeat(ballot, WARP)
        if opcode[0] == "redux":
            reduce = _ARITHMETIC[opcode[2]].reduce
            return np.repeat(_truncate(reduce(_truncate(lanes, 32), axis=1), 32), WARP)
        step, lane = int(sources[1]), np.arange(WARP)
        others = {"idx": np.full(WARP, step), "up": lane - step, "bfly": lane ^ step}
        other = others[opcode[2]]
        return lanes[:, np.where(other < 0, lane, other)].reshape(-1)

    def _convert(self, kinds: list[str], values: list[Values]) -> Values:
        *_, to, source = kinds
        half = np.uint64(16)
        if to == "f64":
            narrow = values[0] if source == "f32" else self._convert(["f32", source], values)
            return _from_double(_as_float(narrow).astype(np.float64))
        if source == "f64":
            return _from_float(_as_double(values[0]).astype(np.float32))
        if source == "bf16":
            return values[0] << half
        if source == "f16":
            return _from_float(values[0].astype(np.uint16).view(np.float16).astype(np.float32))
        if source == "f32":
            dtype = torch.bfloat16 if to.startswith("bf16") else torch.float16
            narrow = [_narrow(value, dtype) for value in values]
            # The first source is the high half.
            return narrow[0] if len(narrow) == 1 else (narrow[0] << half) | narrow[1]
        wide = _signed(values[0], _bits(source)) if source[0] == "s" else values[0]
        return _truncate(_truncate(wide, _bits(source)) if source[0] == "u" else wide, _bits(to))

    def _addresses(self, instruction: _Instruction, operand: str) -> tuple[int, int, Values]:
        """Elements, bytes of an element, address of each thread."""
        base, _, offset = operand.strip("[]").partition("+")
        kind = instruction.opcode[-1]
        count = next(
            (int(part[1:]) for part in instruction.opcode if re.fullmatch("v[24]", part)), 1
        )
        return count, _bits(kind) // 8, self._read(base) + np.uint64(int(offset or 0) & _ALL_ONES)

    def _bytes(
        self, instruction: _Instruction, addresses: Values, size: int, active: Mask, store: bool
    ) -> tuple[Bytes, NDArray[np.int64]]:
        """The memory and the index in it of each byte of each active thread, checked."""
        start = addresses[active].astype(np.int64)
        assert (start % size == 0).all(), "misaligned"
        if instruction.opcode[1] == "global":
            assert self.waited[active].all(), "before griddepcontrol.wait"
            start = start - FIRST_ADDRESS
            limit, valid = self.memory.data.size, self.memory.valid
        else:
            limit, valid = SHARED_BYTES, self.shared.written
        index = start[:, None] + np.arange(size)
        assert ((index >= 0) & (index < limit)).all(), "outside of memory"
        if instruction.opcode[1] == "global":
            assert valid[index].all(), "outside of every buffer"
            return self.memory.data, index
        assert store or valid[index].all(), "uninitialized shared memory"
        self._check_race(index, self.warp[active][:, None], store)
        return self.shared.data, index

    def _check_race(self, index: NDArray[np.int64], warp: NDArray[np.int64], store: bool) -> None:
        several = self.warp.size
        writer, reader = self.shared.writer[index], self.shared.reader[index]
        assert ((writer == -1) | (writer == warp)).all(), "another warp has written here"
        if store:
            assert ((reader == -1) | (reader == warp)).all(), "another warp has read here"
            self.shared.writer[index] = warp
            assert (self.shared.writer[index] == warp).all(), "another warp writes here"
        else:
            alone = (reader == -1) | (reader == warp)
            self.shared.reader[index] = np.where(alone, warp, several)
            # Of several warps that read a byte at once the last is recorded: note all of them.
            crowded = self.shared.reader[index] != warp
            self.shared.reader[index[crowded]] = several

    def _load(self, instruction: _Instruction, active: Mask) -> None:
        target, source = instruction.operands
        if instruction.opcode[1] == "param":
            name, _, offset = source.strip("[]").partition("+")
            content, at = self.params[name], int(offset or 0)
            size = _bits(instruction.opcode[-1]) // 8
            count = len(re.findall("%", target))
            words = [
                int.from_bytes(content[at + i * size : at + (i + 1) * size], "little")
                for i in range(count)
            ]
            values = [np.full(self.thread.size, word, np.uint64) for word in words]
            self._write(target, values, active)
            return
        if not active.any():
            return
        count, size, addresses = self._addresses(instruction, source)
        memory, index = self._bytes(instruction, addresses, count * size, active, store=False)
        loaded = memory[index].reshape(-1, count, size).astype(np.uint64)
        shifts = np.arange(size, dtype=np.uint64) * np.uint64(8)
        elements = np.zeros((self.thread.size, count), np.uint64)
        elements[active] = (loaded << shifts).sum(axis=2, dtype=np.uint64)
        self._write(target, [elements[:, i] for i in range(count)], active)

    def _store(self, instruction: _Instruction, active: Mask) -> None:
        target, source = instruction.operands
        if not active.any():
            return
        count, size, addresses = self._addresses(instruction, target)
        memory, index = self._bytes(instruction, addresses, count * size, active, store=True)
        names = re.findall(r"[%\w.\-]+", source)
        elements = np.stack([self._read(name)[active] for name in names], axis=1)
        shifts = np.arange(size, dtype=np.uint64) * np.uint64(8)
        content = ((elements[:, :, None] >> shifts) & np.uint64(0xFF)).astype(np.uint8)
        content = content.reshape(index.shape)
        memory[index] = content
        assert (memory[index] == content).all(), "two values for one address"
        if instruction.opcode[1] == "global":
            np.add.at(self.memory.num_writes, index, 1)
        else:
            self.shared.written[index] = True
