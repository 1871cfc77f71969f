"""Reads the machine code of compiled CUDA kernels, as nvdisasm prints it."""

import itertools
import re
import shutil
import struct
import subprocess
import sysconfig
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

from .built import built, find_nvcc

Code = dict[str, tuple[list["Kernel"], str]]


def find_nvdisasm() -> str | None:
    """NVIDIA's disassembler: PyPI's nvidia-cuda-nvdisasm, or else a CUDA toolkit's."""
    installed = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    candidates = [*map(str, installed), "nvdisasm", "/usr/local/cuda/bin/nvdisasm"]
    return next(filter(None, map(shutil.which, candidates)), None)


def cubins(path: Path) -> dict[str, bytes]:
    """The machine code for each architecture, as in ``"90"``, in an object that nvcc made.

    nvcc puts a "fat binary" into it: a header of 16 bytes, then entries, each with a header that
    says what it is, how long the header and the entry are, and for which architecture.
    """
    content = path.read_bytes()
    start = content.find(struct.pack("<IH", 0xBA55ED50, 1))
    assert start >= 0, f"{path} has no machine code"
    _, _, at, size = struct.unpack_from("<IHHQ", content, start)
    at += start
    end = at + size
    found = {}
    while at < end:
        kind, _, header, length = struct.unpack_from("<HHIQ", content, at)
        (architecture,) = struct.unpack_from("<I", content, at + 28)
        entry = content[at + header : at + header + length]
        if kind == 2 and entry.startswith(b"\x7fELF"):  # 1 is PTX, which may be compressed
            found[str(architecture)] = entry
        at += header + length
    return found


def compiler_release(cubin: bytes) -> str:
    """The release of nvcc that made the code, as in ``"13.0"``."""
    found = re.search(rb"Cuda compilation tools, release (\d+\.\d+)", cubin)
    return found[1].decode() if found else "unknown"


@dataclass
class Instruction:
    """One instruction: its place in the kernel's code, and what it does."""

    number: int
    text: str
    predicate: str  # the condition under which it is executed, as in "@!P0", or ""
    name: str  # with its modifiers, as in "LDG.E.128.CONSTANT"
    target: str  # the label that it may go on at, or ""

    @property
    def goes_elsewhere(self) -> bool:
        """Whether the next instruction is never the one after this one."""
        if self.predicate:
            return False
        # "BRA P2, `(label)" has its condition among the operands; BRA.DIV only leaves where the
        # lanes of a warp have parted.
        always = self.name in ("BRA", "BRA.U") and re.match(r"\S+\s+`\(", self.text)
        return bool(always) or self.name in ("EXIT", "RET", "BRX") or self.is_call

    @property
    def is_call(self) -> bool:
        return self.name.startswith(("CALL", "RET"))


@dataclass
class Kernel:
    """The machine code of one kernel."""

    name: str  # mangled
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def named(self, pattern: str, within: Iterable[int] | None = None) -> list[Instruction]:
        """The instructions whose whole names match, of all or of those with these numbers."""
        those = self.instructions if within is None else [self.instructions[i] for i in within]
        return [one for one in those if re.fullmatch(pattern, one.name)]

    @cached_property
    def loops(self) -> list[range]:
        """Runs of instructions that end with a branch back to their first one, shortest first."""
        ranges = []
        for one in self.instructions:
            first = self.labels.get(one.target)
            if first is not None and first <= one.number:
                ranges.append(range(first, one.number + 1))
        return sorted(ranges, key=len)

    def loops_around(self, instruction: Instruction) -> list[range]:
        """The loops that the instruction is in, the innermost one first."""
        return [loop for loop in self.loops if instruction.number in loop]

    def path(self, loop: range, through: Iterable[Instruction]) -> int:
        """The least number of instructions that one round of a loop executes.

        The round passes through all of the given ones, in their order, and calls nothing: what is
        called are divisions of numbers above 2^32, which no tensor of a detector has.
        """
        stops = [loop[0], *sorted(one.number for one in through), loop[-1]]
        return sum(self.steps(a, b, loop) for a, b in itertools.pairwise(stops)) + 1

    def longest_path(self, loop: range) -> int:
        """The largest number that a round can execute that calls nothing and goes only forwards."""
        executed = {loop[0]: 1}
        for at in loop[:-1]:
            if at not in executed:
                continue
            for following in self._followers(at):
                if at < following <= loop[-1]:
                    executed[following] = max(executed.get(following, 0), executed[at] + 1)
        return executed[loop[-1]]

    def steps(self, start: int, end: int, within: range) -> int:
        """The least number of instructions from one to another, without the last one."""
        distance, waiting = {start: 0}, deque([start])
        while waiting:
            at = waiting.popleft()
            if at == end:
                return distance[at]
            for following in self._followers(at):
                if following in within[1:] and following not in distance:
                    distance[following] = distance[at] + 1
                    waiting.append(following)
        raise AssertionError(f"{self.name}: nothing leads from {start} to {end}")

    def _followers(self, number: int) -> list[int]:
        one = self.instructions[number]
        followers = [] if one.goes_elsewhere else [number + 1]
        if one.target in self.labels and not one.is_call and one.name not in _NOT_A_JUMP:
            followers.append(self.labels[one.target])
        return followers


# These name a place where lanes that have parted meet again, or a path for such lanes.
_NOT_A_JUMP = ("BSSY", "BSSY.RECONVERGENT", "BRA.DIV", "WARPSYNC.COLLECTIVE")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+)?\s*([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L_x?_?\w+|\.text\.\S+|\$\S+):")
_TARGET = re.compile(r"`\(([^)]+)\)")


def disassemble(cubin: bytes, folder: Path) -> list[Kernel]:
    """The kernels in machine code for one architecture; `folder` takes a temporary file."""
    file = folder / "code.cubin"
    file.write_bytes(cubin)
    command = [find_nvdisasm(), "--print-code", "--no-dataflow", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return parse(result.stdout)


def parse(listing: str) -> list[Kernel]:
    """The kernels in what nvdisasm printed."""
    kernels: list[Kernel] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if label[1].startswith(".text."):
                kernels.append(Kernel(label[1].removeprefix(".text.")))
            elif kernels:
                kernels[-1].labels[label[1]] = len(kernels[-1].instructions)
        elif kernels and (found := _LINE.match(line)):
            predicate, name, rest = found.group(2, 3, 4)
            target = _TARGET.search(rest)
            kernel = kernels[-1]
            kernel.instructions.append(
                Instruction(
                    len(kernel.instructions),
                    name + rest,
                    "" if predicate in (None, "@PT") else predicate,
                    name,
                    target[1] if target else "",
                )
            )
    return kernels


# --------------------------------------------------------------------------------- for the tests

needs_tools = pytest.mark.skipif(find_nvdisasm() is None, reason="nvdisasm was not found")


def of_source(source: Path, folder: Path) -> Code:
    """The kernels for each architecture that there is code for, and the release of their nvcc.

    Args:
        source: a file of kernels; the build's object of it is read, or else nvcc is run.
        folder: for temporary files.
    """
    target = built(source)
    if target is not None:
        found = cubins(target)
    elif find_nvcc() is not None:
        file = folder / "kernels.cubin"
        command = [find_nvcc(), "-std=c++17", "-O3", "-gencode=arch=compute_90,code=sm_90"]
        subprocess.run([*command, "-cubin", "-o", str(file), str(source)], check=True)
        found = {"90": file.read_bytes()}
    else:
        pytest.skip("no current object of the kernels and no nvcc were found")
    return {
        architecture: (
            disassemble(found[architecture], folder),
            compiler_release(found[architecture]),
        )
        for architecture in ("80", "90")
        if architecture in found
    }


def kernels_of(code: Code, architecture: str) -> list[Kernel]:
    if architecture not in code:
        pytest.skip(f"nothing is built for sm_{architecture}")
    return code[architecture][0]


def only(kernels: list[Kernel], pattern: str) -> Kernel:
    found = [kernel for kernel in kernels if re.search(pattern, kernel.name)]
    assert len(found) == 1, f"{pattern}: {[kernel.name for kernel in found]}"
    return found[0]


def reductions_in(kernel: Kernel) -> list[Instruction]:
    return kernel.named(r"(REDG?|ATOMG?|ATOM)\..*")
