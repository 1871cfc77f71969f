"""Tables, the picture and the files that hold what was measured."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from .timing import median

NOTHING = "—"
DIRECTIONS = {"forward": "Forward", "forward_backward": "Forward + backward"}


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    scratch.replace(path)


def write_json(path: Path, result: dict) -> None:
    write(path, json.dumps(result, indent=1) + "\n")


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def text(run: dict) -> str:
    """Everything of one run, as Markdown."""
    lines = operator_lines(run)
    return "\n".join(lines) + "\n"


def environment_lines(run: dict) -> list[str]:
    """The machine and the versions, in one paragraph."""
    machine, settings = run["machine"], run["settings"]
    threads = settings["threads"]
    facts = f"{machine['cpu']}, {machine['cores']} cores, {threads} threads"
    if "gpu" in machine:
        facts = f"{machine['gpu']} ({machine['gpu_memory_gib']:.0f} GiB), {facts}"
    installed = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return [f"Machine: {facts}, {machine['memory_gib']:.0f} GiB, {machine['os']}.", "", installed]


# --------------------------------------------------------------------------------------- operators

# A column's header, and its cell for an entry of a run in one direction.
Column = tuple[str, Callable[[dict, str], str]]


def milliseconds(entry: dict, direction: str, name: str) -> float | None:
    samples = entry["times"].get(direction, {}).get(name)
    return median(samples) if samples else None


def ratio(entry: dict, direction: str, name: str, to: str) -> float | None:
    """How many times as long one implementation takes as another."""
    times = [milliseconds(entry, direction, each) for each in (name, to)]
    return None if None in times else times[0] / times[1]


def floor(entry: dict, direction: str) -> float | None:
    return max(entry["floor_ms"][direction].values()) if "floor_ms" in entry else None


def operator_lines(run: dict) -> list[str]:
    """Tables of a run of :mod:`mmdcn.benchmark.operators`."""
    lines = []
    groups = {}
    for entry in run["cases"]:
        groups.setdefault((entry["dtype"], entry["layout"]), []).append(entry)
    for (dtype, layout), entries in groups.items():
        named = "channels-last" if layout == "channels_last" else "NCHW"
        lines += [f"### {dtype}, {named}", ""]
        for direction, heading in DIRECTIONS.items():
            if direction in entries[0]["times"]:
                lines += [f"{heading}, ms (× dense):", ""]
                lines += _columns_table(_time_columns(run), entries, direction) + [""]
        if "extra_bytes" in entries[0]:
            lines += ["Memory beyond inputs, output and gradients, MB, forward / with backward:"]
            lines += ["", *_columns_table(_memory_columns(run), entries, "forward"), ""]
        lines += [*_reasons(entries), ""]
    if "memory_growth" in run:
        first = run["cases"][0]
        lines += ["### What memory grows with", ""]
        lines += [f"MB, forward / with backward; {first['version']}, {first['dtype']}.", ""]
        entries = [first, *run["memory_growth"]]
        lines += [*_columns_table(_memory_columns(run), entries, "forward"), ""]
    lines += _rate_lines(run)
    if run["left_out"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in run["left_out"].items())
        lines += [f"Left out: {reasons}.", ""]
    return lines


def _columns_table(columns: list[Column], entries: list[dict], direction: str) -> list[str]:
    """A table of the columns that have something to say."""
    cells = [[cell(entry, direction) for entry in entries] for _, cell in columns]
    kept = [
        (header, column)
        for (header, _), column in zip(columns, cells)
        if any(value != NOTHING for value in column)
    ]
    return table([header for header, _ in kept], map(list, zip(*(column for _, column in kept))))


def _number(value: float | None, suffix: str = "") -> str:
    if value is None:
        return NOTHING
    digits = max(0, min(3, 3 - len(str(int(value)))))
    return f"{value:.{digits}f}{suffix}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


_PROBLEM: list[Column] = [
    ("N, C→Co, H×W", lambda entry, _: entry["label"]),
    ("", lambda entry, _: entry["version"]),
]


def _time_columns(run: dict) -> list[Column]:
    def column(name: str) -> Column:
        def cell(entry: dict, direction: str) -> str:
            taken = _number(milliseconds(entry, direction, name))
            relative = ratio(entry, direction, name, "dense")
            return taken if name == "dense" or relative is None else f"{taken} ({_times(relative)})"

        return name, cell

    def against(header: str, name: str, to: str) -> Column:
        return header, lambda entry, direction: _times(ratio(entry, direction, name, to))

    def against_floor(entry: dict, direction: str) -> str:
        least, ours = floor(entry, direction), milliseconds(entry, direction, "mmdcn")
        return NOTHING if least is None else _times(ours / least)

    def same(entry: dict, _: str) -> str:
        return {True: "yes", False: "no", None: NOTHING}[entry.get("same_on_one_thread")]

    threads = run["settings"]["threads"]
    names = sorted(run["implementations"], key=lambda name: name != "dense")
    return [
        *_PROBLEM,
        ("floor", lambda entry, direction: _number(floor(entry, direction))),
        *(column(name) for name in names),
        ("mmdcn ÷ floor", against_floor),
        against("mmdcn ÷ mmdcn float32", "mmdcn", "mmdcn float32"),
        against(f"1 thread ÷ {threads}", "mmdcn, 1 thread", "mmdcn"),
        ("same bits", same),
    ]


def _memory_columns(run: dict) -> list[Column]:
    def column(name: str) -> Column:
        def cell(entry: dict, _: str) -> str:
            taken = [megabytes(entry, direction, name) for direction in DIRECTIONS]
            return NOTHING if taken == [None, None] else " / ".join(map(_megabytes, taken))

        return name, cell

    names = sorted(run["implementations"], key=lambda name: name != "dense")
    return [*_PROBLEM, *(column(name) for name in names)]


def megabytes(entry: dict, direction: str, name: str) -> float | None:
    count = entry["extra_bytes"].get(direction, {}).get(name)
    return None if count is None else count / 1e6


def _megabytes(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _reasons(entries: list[dict]) -> list[str]:
    """Why there are dashes, each reason once."""
    found = [
        (name, reason)
        for entry in entries
        for kind in ("cannot", "memory_cannot")
        for name, reason in entry.get(kind, {}).items()
        if not reason.startswith("the same as")
    ]
    return [f"{NOTHING} {name}: {reason}." for name, reason in dict.fromkeys(found)]


def _rate_lines(run: dict) -> list[str]:
    rates = run["rates"]
    if not rates:
        return []
    lines = [
        "The floor is what multiplying and moving take at the best rates that this run saw on this "
        "machine, whichever is longer: "
    ]
    multiplied = [
        f"{rate:.0f} GFLOP/s in {dtype} ({rates['gflop_per_s_from'][dtype]})"
        for dtype, rate in rates["gflop_per_s"].items()
    ]
    moved = f"{rates['copy_gb_per_s']:.0f} GB/s copying, {rates['read_gb_per_s']:.0f} GB/s reading"
    return [lines[0] + "; ".join([*multiplied, moved]) + ".", ""]
