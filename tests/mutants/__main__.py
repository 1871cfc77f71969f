"""Plants the faults of faults.py one at a time, and has the tests look for each: `make mutants`."""

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.copies import REPOSITORY, copy_source
from tests.mutants.faults import FAULTS, Fault

FOLDER = REPOSITORY / "build" / "mutants"
RESULTS = FOLDER / "results.json"
PATIENCE = 900  # seconds; tests that do not end have noticed something
CAPABILITY = "avx2"  # the instruction set that a kernel with a fault is compiled for


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__ + f" Results are kept in {RESULTS.relative_to(REPOSITORY)}, and what "
        "is there is not tried again."
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults, or parts of their names")
    parser.add_argument("--again", action="store_true", help="try what has a result, too")
    parser.add_argument("--own", action="store_true", help="run each fault's own tests alone")
    args = parser.parse_args()
    chosen = [f for f in FAULTS if not args.only or any(part in f.name for part in args.only)]
    if not chosen:
        sys.exit(f"error: --only: expected a fault's name, got {' '.join(args.only)!r}")
    copy_source(FOLDER / "tree")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for number, fault in enumerate(chosen, 1):
        known = results.get(fault.name)
        if known is None or args.again or outdated(known, fault):
            began = time.monotonic()
            outcome = try_fault(fault, args.own)
            known = {"fault": said_of(fault), "outcome": outcome}
            known["seconds"] = round(time.monotonic() - began)
            results[fault.name] = known
            write(results)
        print(f"{number}/{len(chosen)} {fault.name}: {known['outcome']}", flush=True)
    outcomes = [results[fault.name]["outcome"] for fault in chosen]
    killed = sum(outcome.startswith("killed") for outcome in outcomes)
    print(f"{killed} of {len(chosen)} faults were noticed")
    return killed < len(chosen)


def outdated(known: dict, fault: Fault) -> bool:
    """Whether the fault has changed, or was not noticed."""
    return known["fault"] != said_of(fault) or not known["outcome"].startswith("killed")


def said_of(fault: Fault) -> list:
    return [fault.file, fault.old, fault.new]


def write(results: dict) -> None:
    """The results as JSON, and as a table."""
    about = {fault.name: fault for fault in FAULTS}
    lines = ["| fault | file | what it breaks | outcome |", "|---|---|---|---|"]
    for name, result in results.items():
        if name in about:
            fault = about[name]
            lines.append(f"| {name} | `{fault.file}` | {fault.breaks} | {result['outcome']} |")
    for path, text in (
        (RESULTS, json.dumps(results, indent=1)),
        (FOLDER / "results.md", "\n".join(lines) + "\n"),
    ):
        temporary = path.with_suffix(".unfinished")
        temporary.write_text(text)
        temporary.rename(path)


def try_fault(fault: Fault, own: bool) -> str:
    """Who noticed the fault, if anybody did; of its own tests alone if so wanted."""
    tree = FOLDER / "tree"
    path = tree / "mmdcn" / fault.file
    text = (REPOSITORY / "mmdcn" / fault.file).read_text()
    if text.count(fault.old) != 1:
        sys.exit(f"error: {fault.name}: expected its text once in mmdcn/{fault.file}")
    try:
        path.write_text(text.replace(fault.old, fault.new))
        if not compiled(fault, tree):
            return "does not compile"
        on_cuda = fault.file.startswith("csrc/cuda/")
        folder = ("tests/cuda" if on_cuda else "tests/ops",)
        for tests in (fault.tests,) if own else (fault.tests, folder):
            noticed = failing_test(tests, tree)
            if noticed is not None:
                return f"killed by {noticed}"
        return "survived its own tests" if own else "SURVIVED"
    finally:
        path.write_text(text)


# ------------------------------------------------------------------------------------- compilation


def compiled(fault: Fault, tree: Path) -> bool:
    """Build the CPU library with what includes the changed file compiled anew."""
    objects = {path.name: path for path in base_objects()}
    changed = []
    for path in objects.values():
        name = path.stem
        if "kernel" in name and not name.endswith(f"kernel_{CAPABILITY}"):
            continue
        if fault.objects in name and f"mmdcn/{fault.file}" in listed_in(path.with_suffix(".d")):
            changed.append(path)
    folder = FOLDER / "objects"
    folder.mkdir(exist_ok=True)

    def compile_one(path: Path) -> bool:
        command = ast.literal_eval(path.with_suffix(".command").read_text())
        # Half the time, and tests are quick enough.
        command = ["-O1" if part == "-O3" else part for part in command if part != "-Werror"]
        command[command.index("-o") + 1] = str(folder / path.name)
        return subprocess.run(command, cwd=tree, capture_output=True, check=False).returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if not all(list(pool.map(compile_one, changed))):
            return False
    names = [folder / path.name if path in changed else path for path in objects.values()]
    torch = Path(importlib.util.find_spec("torch").origin).parent
    compiler = ast.literal_eval(path_of_command(objects))[0]
    library = tree / "mmdcn" / "_cpu.abi3.so"
    library.unlink(missing_ok=True)
    command = [compiler, "-shared", *map(str, names), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True)
    return True


def base_objects() -> Iterator[Path]:
    """The objects of the CPU library, as the build left them."""
    found = sorted(REPOSITORY.glob("build/temp.*/library.o"))
    if not found:
        sys.exit("error: nothing is compiled: `make`, or setup.py build_ext --inplace, first")
    folder = max(found, key=lambda path: path.stat().st_mtime).parent
    yield folder / "library.o"
    yield from sorted(folder.glob("cpu_*.o"))


def path_of_command(objects: dict[str, Path]) -> str:
    return next(iter(objects.values())).with_suffix(".command").read_text()


def listed_in(included: Path) -> set[str]:
    """The files that an object was made from."""
    words = included.read_text().replace("\\\n", " ").partition(":")[2].split()
    return {os.path.normpath(word) for word in words}


# ------------------------------------------------------------------------------------------- tests


def failing_test(tests: tuple[str, ...], tree: Path) -> str | None:
    """The first test that fails, or None."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "MMDCN_CPU_CAPABILITY": CAPABILITY,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [*pytest, "-m", "not slow and not cuda", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    if done.returncode == 0:
        return None
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ")[1]
    if done.returncode < 0 or "Fatal Python error" in done.stderr:
        return "a crash"
    raise SystemExit(f"error: the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
