"""The operators' tests and random calls with the sanitized CPU library: `make sanitize`.

Environment variables:
    SANITIZERS            address, thread, or both, which is the default
    MMDCN_CPU_CAPABILITY  one instruction set; by default all of the machine's
    MMDCN_EXAMPLES        random problems of each property of the tests
    TRIALS                random calls of each function (tools/fuzz.py)
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests import instruction_sets
from tests.copies import REPOSITORY, copy_source

HERE = Path(__file__).parent
OPERATORS = [
    f"tests/ops/test_{name}.py"
    for name in (
        *("compiled_calls", "deform_aggregate", "deform_conv", "deform_conv_bad_calls"),
        *("deform_conv_every_rank", "deform_conv_nd", "deform_roi_pool"),
        "deform_roi_pool_bad_calls",
    )
]
OPTIONS = {
    # Python and torch keep what they have allocated when they end: leaks are not looked for. What
    # the malformed calls ask for is more than there is, which torch reports as an error.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={HERE / 'thread_suppressions.txt'}",
}
REPORTS = ("SUMMARY: AddressSanitizer", "SUMMARY: ThreadSanitizer", "runtime error: ")
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
THREADS = {"address": (2,), "thread": (2, 4)}


def main() -> int:
    sanitizers = os.environ.get("SANITIZERS", "address thread").replace(",", " ").split()
    for name in sanitizers:
        if name not in RUNTIMES:
            sys.exit(f"error: SANITIZERS: expected address, thread, or both, got {name!r}")
    failed = []
    for sanitizer in sanitizers:
        folder = build(sanitizer)
        for capability in capabilities():
            for threads in THREADS[sanitizer]:
                environment = environment_of(sanitizer, capability, threads, folder)
                for name, command in programs(sanitizer):
                    title = f"{sanitizer}, {capability}, {threads} threads, {name}"
                    if not run(title, command, folder, environment):
                        failed.append(title)
    for title in failed:
        print(f"failed: {title}")
    print("sanitizers: " + (f"{len(failed)} runs failed" if failed else "clean"))
    return bool(failed)


def build(sanitizer: str) -> Path:
    """The folder of the tree with the library under this sanitizer."""
    print(f"==> compiling mmdcn for the {sanitizer} sanitizer", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    environment = os.environ | {"MMDCN_SANITIZE": sanitizer}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    folder = REPOSITORY / "build" / "sanitized" / sanitizer
    copy_source(folder)
    return folder


def capabilities() -> tuple[str, ...]:
    wanted = os.environ.get("MMDCN_CPU_CAPABILITY")
    if wanted:
        return (wanted,)
    ask = "import torch, mmdcn.ops; print(torch.ops.mmdcn.cpu_capability())"
    command = [sys.executable, "-c", ask]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    best = said.stdout.split()[-1]
    return instruction_sets.up_to(best)


def environment_of(sanitizer: str, capability: str, threads: int, folder: Path) -> dict[str, str]:
    preloaded = [runtime(RUNTIMES[sanitizer]), runtime("libstdc++.so.6")]
    options = dict(OPTIONS)
    # The frames that this needs lie at multiples of 32 bytes, and GCC stores vectors of 64 to them
    # by instructions that fault there.
    used_after_return = 0 if capability.startswith("avx512") else 1
    options["ASAN_OPTIONS"] += f":detect_stack_use_after_return={used_after_return}"
    return {
        "MMDCN_EXAMPLES": "10",
        **os.environ,
        **options,
        "LD_PRELOAD": " ".join(preloaded),
        "MMDCN_CPU_CAPABILITY": capability,
        "MMDCN_TEST_THREADS": str(threads),
        # Torch's own threads, which ThreadSanitizer does not see waiting for one another.
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
    }


def runtime(library: str) -> str:
    """The path of a library of the compiler's."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    command = [compiler, f"-print-file-name={library}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        sys.exit(f"error: {compiler} has no {library}: install the compiler's sanitizers")
    return os.path.realpath(found)


def programs(sanitizer: str) -> Iterator[tuple[str, list[str]]]:
    """What is run, by name."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0"]
    trials = os.environ.get("TRIALS", "60")
    fuzz = [sys.executable, "tools/fuzz.py"]
    few = ["--seed", "1", "--seconds", "3600", "--trials", trials, "--together", trials]
    yield "tests", [*pytest, *OPERATORS]
    yield "random calls", [*fuzz, "operators", *few]
    if sanitizer == "address":
        yield "malformed calls", [*fuzz, "malformed", *few]


def run(title: str, command: list[str], folder: Path, environment: dict[str, str]) -> bool:
    """Whether the program ends well; what it says is kept, and shown if it does not."""
    began = time.monotonic()
    log = folder / "logs" / f"{title.replace(', ', '-').replace(' ', '-')}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=file, stderr=file, check=False
        )
    said = log.read_text(errors="replace")
    seconds = time.monotonic() - began
    last = said.strip().splitlines()[-1] if said.strip() else ""
    # A process that is forked may end with a report after it has told its results.
    clean = done.returncode == 0 and not any(report in said for report in REPORTS)
    print(f"{title}: {last if clean else f'FAILED, see {log}'} ({seconds:.0f} s)", flush=True)
    if not clean:
        print("\n".join(said.splitlines()[-60:]), flush=True)
    return clean


if __name__ == "__main__":
    sys.exit(main())
