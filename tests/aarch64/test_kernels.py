"""The CPU kernels on 64-bit ARM: cross-compiled, run under qemu-user, and held to this machine's.

``make test-slow ARGS=tests/aarch64`` runs them; Debian's packages are g++-aarch64-linux-gnu and
qemu-user. Nothing is timed: what is emulated says nothing of speed.
"""

import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mmdcn.ops  # noqa: F401

from . import problems

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "mmdcn" / "csrc"
COMPILER, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
KERNELS = sorted(CSRC.glob("cpu/*/*kernel.cpp"))
# Those of setup.py, for a machine that is not x86.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    """The kernels and the program, compiled; its object comes last."""
    folder = tmp_path_factory.mktemp("aarch64")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        more = ["-DMMDCN_CPU_CAPABILITY=portable", f"-I{CSRC}", "-c", source, "-o", target]
        done = subprocess.run([COMPILER, *FLAGS, *map(str, more)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, [*KERNELS, HERE / "run_kernels.cpp"]))


@pytest.fixture(scope="module")
def program(objects) -> list[str]:
    """The command that runs it here."""
    if EMULATOR is None:
        pytest.skip("needs qemu-aarch64, of qemu-user")
    target = objects[0].with_name("run_kernels")
    command = [COMPILER, "-static", *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [EMULATOR, str(target)]


def test_flags_are_those_of_the_build():
    text = (ROOT / "setup.py").read_text()
    for flag in FLAGS:
        assert f'"{flag}"' in text


# What separates two correct results, relative to the largest element. ARM's multiply-adds round
# once where x86-64-v2's round twice, and vectors of other widths add in another order: a few units
# in the last place of float32 or float64, times the root of the at most 600 terms of a sum. Halves
# are computed in float32 and rounded at the end, at worst to neighbouring numbers.
TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 5e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_results_are_those_of_this_machine(program, tmp_path, dtype):
    drawn = problems.draw(dtype)
    (tmp_path / "problems").write_bytes(b"".join(one.packed() for one in drawn))
    done = subprocess.run(
        [*program, tmp_path / "problems", tmp_path / "results"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = memoryview((tmp_path / "results").read_bytes())
    for one in drawn:
        for name, expected in one.results().items():
            (size,) = struct.unpack("<q", content[:8])
            assert size == expected.numel() * expected.element_size(), f"{one.name}: {name}"
            if size == 0:  # of a mask that is not there
                content = content[8:]
                continue
            got = torch.frombuffer(bytearray(content[8 : 8 + size]), dtype=expected.dtype)
            content = content[8 + size :]
            error = (got.double() - expected.flatten().double()).abs().max()
            largest = expected.double().abs().max()
            assert largest > 0
            assert error <= TOLERANCES[dtype] * largest, f"{one.name}: {name}"
    assert not content


# ---------------------------------------------------------------------------------- machine code


def innermost_loops(disassembly: str) -> list[list[str]]:
    """The instructions of all loops that contain no other: from a jump's target back to the jump.

    They are told by `b` jumps to an earlier address, as objdump writes them.
    """
    line = re.compile(r"^\s*([0-9a-f]+):\t[0-9a-f]+ \t(\S+)\t?(.*)$", re.MULTILINE)
    code = [(int(at, 16), name, rest) for at, name, rest in line.findall(disassembly)]
    index = {at: number for number, (at, _, _) in enumerate(code)}
    spans = []
    for number, (at, name, rest) in enumerate(code):
        target = re.search(r"([0-9a-f]+) <", rest)
        if name.startswith(("b", "cb", "tb")) and not name.startswith(("bl", "br")) and target:
            first = index.get(int(target[1], 16))
            if first is not None and code[first][0] <= at:
                spans.append((first, number))
    inner = [
        span
        for span in spans
        if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    ]
    return [[f"{name} {rest}" for _, name, rest in code[first : last + 1]] for first, last in inner]


MULTIPLY_ADD = re.compile(r"^fml[as]\s+v\d+\.(4s|2d)")
SCALAR = re.compile(r"^(fmadd|fmsub|fnmadd|fnmsub)\s")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_inner_loops_multiply_and_add_vectors(objects, kernel):
    """In float32 and in float64; the sums over channels are no loops of single numbers."""
    (found,) = [one for one in objects if one.stem == f"{kernel.parent.name}_{kernel.stem}"]
    text = subprocess.run([OBJDUMP, "-d", found], capture_output=True, text=True, check=True).stdout
    vectors = {"4s": 0, "2d": 0}
    scalars = 0
    # Each instance of a template is in a section of its own, with addresses from 0.
    sections = text.split("Disassembly of section")
    for loop in [loop for section in sections for loop in innermost_loops(section)]:
        counts = [match[1] for match in map(MULTIPLY_ADD.match, loop) if match]
        for kind in set(counts):
            vectors[kind] += 1
        scalars += not counts and any(map(SCALAR.match, loop))
    print(kernel.parent.name, kernel.stem, vectors, "of single numbers:", scalars, file=sys.stderr)
    assert vectors["4s"] > 0 and vectors["2d"] > 0
    assert scalars < vectors["4s"] + vectors["2d"]
