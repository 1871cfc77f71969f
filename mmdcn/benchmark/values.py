"""Values of the arguments of `tools/benchmark.py`, as argparse takes them."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from . import BenchmarkError, cases


def several(kind: Callable[[str], object]) -> Callable[[str], list]:
    """An argument that is several values with commas between them."""

    def parse(value: str) -> list:
        return [kind(part) for part in value.split(",")]

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(choices)}, got {value!r}")
        return value

    return parse


def number(kind: type, least: float, exclusive: bool = False) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is None or not (number > least or (number == least and not exclusive)):
            what = "a whole number" if kind is int else "a number"
            bound = f"above {least}" if exclusive else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"expected {what} {bound}, got {value!r}")
        return number

    return parse


def peers(value: str) -> list[str]:
    return [] if value == "none" else several(one_of(*cases.PEERS))(value)


def shape(value: str) -> str:
    try:
        cases.find_shapes(value)
    except BenchmarkError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def json_file(value: str) -> Path:
    path = Path(value)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"expected a name ending in .json, got {value!r}")
    return path


def size(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value)
    if match is None or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(
            f"expected width and height of at least 32, as in 320x240, got {value!r}"
        )
    return int(match.group(1)), int(match.group(2))


def config(value: str) -> Path:
    if "::" not in value and not Path(value).is_file():
        raise argparse.ArgumentTypeError(f"expected config files, got {value!r}, which is none")
    return Path(value)
