"""A process that measures memory, and nothing else, for :func:`~.memory.measure_apart`."""

import argparse
import importlib
import json
import sys
from pathlib import Path

from mmdcn.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mmdcn.benchmark.apart",
        description="Measure memory in a process of its own. tools/benchmark.py starts this; the "
        "order comes as JSON on standard input.",
    )
    parser.add_argument("module", help="the module of mmdcn.benchmark that measures")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Write what the module's function `measure` finds, as it finds it."""
    import torch

    order = json.load(sys.stdin)
    torch.set_num_threads(order["threads"])
    result = Path(order["result"])
    temporary = result.with_suffix(".new")
    answers = []
    for found in importlib.import_module(args.module).measure(order):
        answers.append(found)
        temporary.write_text(json.dumps(answers))
        temporary.replace(result)


if __name__ == "__main__":
    launch.run(main, parse_args)
