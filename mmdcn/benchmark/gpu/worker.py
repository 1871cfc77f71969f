"""A process that runs the cases of a section, one after the other.

It writes a line before and a line after each case, the latter only once the device has ended its
work, so that whoever reads them knows which case it was that ended the process.
"""

import argparse
import json
import os
import time
import traceback
from pathlib import Path

from mmdcn.engine import launch
from mmdcn.errors import named_first_line

from .processes import die_with_parent
from .sections import SECTIONS, Case, NotRun, Wrong
from .settings import Settings, synchronise

#: The status of a process that a case has left without a usable device.
DEVICE_LOST = 3


def run(settings: Settings, name: str, records: Path, first: int = 0, count: int = -1) -> int:
    """Run cases of a section, from number `first` on; all that follow if `count` is -1.

    Returns:
        0, or :data:`DEVICE_LOST`, after which no CUDA call of this process works.
    """
    cases = SECTIONS[name].list_cases(settings)
    last = len(cases) if count < 0 else min(len(cases), first + count)
    _append(records, {"cases": len(cases)})
    for number in range(first, last):
        case = cases[number]
        _append(records, {"started": number, "case": case.name})
        began = time.monotonic()
        record = _record(case, settings, settings.faults.get(f"{name}/{case.name}"))
        record["seconds"] = round(time.monotonic() - began, 3)
        _append(records, {"ended": number, "case": case.name, **record})
        if record["status"] == "device lost":
            return DEVICE_LOST
    return 0


def _record(case: Case, settings: Settings, fault: str | None) -> dict:
    try:
        _go_wrong(fault)
        result = case.run()
        synchronise(settings.target)
        return {"status": "passed", "result": result}
    except NotRun as reason:
        return {"status": "not run", "error": str(reason)}
    except Wrong as wrong:
        return {"status": "failed", "error": str(wrong), "result": wrong.result}
    # Whatever a case raises is its result.
    except Exception as error:
        traceback.print_exc()
        lost = fault == "cuda" or not _device_works(settings)
        status = "device lost" if lost else "failed"
        return {"status": status, "error": named_first_line(error)}


def _device_works(settings: Settings) -> bool:
    """Whether the device still computes after an error; some errors end a context for good."""
    import torch

    try:
        works = bool(torch.ones(1, device=settings.target).add(1).item() == 2)
        synchronise(settings.target)
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        return works
    except RuntimeError:
        return False


def _go_wrong(fault: str | None) -> None:
    """What tests ask for: see :class:`Settings`."""
    if fault == "crash":
        os.abort()
    if fault == "hang":
        time.sleep(3600)
    if fault is not None:
        raise RuntimeError(f"CUDA error: simulated {fault}")


def _append(records: Path, line: dict) -> None:
    with records.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.worker",
        description="Run the cases of a section. tools/gpu_check.py starts this.",
    )
    parser.add_argument("--settings", type=Settings.from_json, required=True)
    parser.add_argument("--section", required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=-1)
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    die_with_parent()
    # What cuBLAS asks of those who want the same in every run; some cases do.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return run(args.settings, args.section, args.records, args.first, args.count)


if __name__ == "__main__":
    launch.run(main, parse_args)
