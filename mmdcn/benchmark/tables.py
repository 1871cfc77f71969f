"""Results of measurements, as Markdown tables."""

from collections.abc import Callable

from mmdcn.markdown import table
from mmdcn.timing import median

NOTHING = "—"
DIRECTIONS = {"forward": "Forward", "forward_backward": "Forward + backward"}


def text(run: dict) -> str:
    """Everything of one run, as Markdown."""
    lines = run_lines(run)
    if not run["complete"]:
        lines += ["Interrupted: this is not all.", ""]
    return "\n".join([*lines, environment_line(run)]) + "\n"


def run_lines(run: dict) -> list[str]:
    lines_of = {
        "operators": operator_lines,
        "family": family_lines,
        "detectors": detector_lines,
        "deployment": deployment_lines,
    }
    return lines_of[run["benchmark"]](run)


def environment_line(run: dict) -> str:
    """The machine and the versions."""
    machine = run["machine"]
    facts = f"{machine['cpu']}, {machine['cores']} cores, {run['settings']['threads']} threads"
    if "gpu" in machine:
        facts = f"{machine['gpu']} ({machine['gpu_memory_gib']:.0f} GiB), {facts}"
    installed = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"On {facts}, {machine['memory_gib']:.0f} GiB, {machine['os']}; {installed}."


# --------------------------------------------------------------------------------------- operators

# A column's header, and its cell for an entry of a run in one direction.
Column = tuple[str, Callable[[dict, str], str]]


def milliseconds(entry: dict, direction: str, name: str) -> float | None:
    samples = entry["times"].get(direction, {}).get(name)
    return median(samples) if samples else None


def ratio(entry: dict, direction: str, name: str, to: str) -> float | None:
    """How many times as long one implementation takes as another."""
    taken = [milliseconds(entry, direction, each) for each in (name, to)]
    return None if None in taken else taken[0] / taken[1]


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
        lines += _reasons(entries)
    if "memory_growth" in run:
        first = run["cases"][0]
        lines += ["### What memory grows with", ""]
        lines += [f"MB, forward / with backward; {first['version']}, {first['dtype']}.", ""]
        entries = [first, *run["memory_growth"]]
        lines += [*_columns_table(_memory_columns(run), entries, "forward"), ""]
    lines += _rate_lines(run)
    return lines + _left_out(run)


def _left_out(run: dict) -> list[str]:
    if not run["left_out"]:
        return []
    reasons = "; ".join(f"{name}: {reason}" for name, reason in run["left_out"].items())
    return [f"Left out: {reasons}.", ""]


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


def times(value: float | None) -> str:
    """A ratio in words."""
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
            return taken if name == "dense" or relative is None else f"{taken} ({times(relative)})"

        return name, cell

    def against(header: str, name: str, to: str) -> Column:
        return header, lambda entry, direction: times(ratio(entry, direction, name, to))

    def against_floor(entry: dict, direction: str) -> str:
        least, ours = floor(entry, direction), milliseconds(entry, direction, "mmdcn")
        return NOTHING if least is None else times(ours / least)

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
    said = [f"{name}: {reason}" for name, reason in dict.fromkeys(found)]
    return [f"{NOTHING} {'; '.join(said)}.", ""] if said else []


def _rate_lines(run: dict) -> list[str]:
    rates = run["rates"]
    if not rates:
        return []
    multiplied = [
        f"{rate:.0f} GFLOP/s in {dtype} ({rates['gflop_per_s_from'][dtype]})"
        for dtype, rate in rates["gflop_per_s"].items()
    ]
    moved = f"{rates['copy_gb_per_s']:.0f} GB/s copying, {rates['read_gb_per_s']:.0f} GB/s reading"
    return [
        "The floor is what multiplying, or moving the data once, takes at the best rates that this "
        f"run saw on this machine: {'; '.join([*multiplied, moved])}.",
        "",
    ]


# ----------------------------------------------------------------------------- the other operators


def family_lines(run: dict) -> list[str]:
    """Tables of a run of :mod:`mmdcn.benchmark.family`."""
    lines = []
    for direction, heading in DIRECTIONS.items():
        lines += [f"{heading}, float32, ms:", "", *_columns_table(_FAMILY, run["cases"], direction)]
        lines.append("")
    lines += _left_out(run)
    return lines


def _family_time(name: str | None) -> Callable[[dict, str], str]:
    """The cell of an implementation, or of the yardstick."""

    def cell(entry: dict, direction: str) -> str:
        taken = _number(milliseconds(entry, direction, name or entry["yardstick"]))
        return taken if name else f"{taken}, {entry['yardstick']}"

    return cell


def _family_memory(entry: dict, direction: str) -> str:
    if "extra_bytes" not in entry:
        return NOTHING
    names = ("mmdcn", entry["yardstick"])
    return " / ".join(_megabytes(megabytes(entry, direction, name)) for name in names)


_FAMILY: list[Column] = [
    ("operator", lambda entry, _: entry["operator"]),
    ("problem", lambda entry, _: entry["label"]),
    ("yardstick", _family_time(None)),
    ("plain PyTorch", _family_time("plain PyTorch")),
    ("mmdcn, no offsets", _family_time("mmdcn, no offsets")),
    ("mmdcn", _family_time("mmdcn")),
    ("mmdcn ÷ yardstick", lambda e, direction: times(ratio(e, direction, "mmdcn", e["yardstick"]))),
    ("memory, MB, mmdcn / yardstick", _family_memory),
]


# --------------------------------------------------------------------------------------- detectors


def detector_lines(run: dict) -> list[str]:
    """The tables of a run of :mod:`mmdcn.benchmark.detectors`, one for each batch size."""
    settings = run["settings"]
    width, height = settings["size"]
    precision = "mixed precision" if settings["amp"] else "float32"
    lines = []
    for batch in settings["batches"]:
        entries = [e for e in run["cases"] if e["times"] and e["batch"] == batch]
        if not entries:  # of a run that was interrupted
            continue
        lines += [f"{width}×{height}, batch {batch}, {precision}:", ""]
        lines += [*_detector_table(entries), "", *_speedups(entries)]
    return [
        *lines,
        "Random weights and images, offsets of all deformable layers "
        f"~ N(0, {settings['offset_std']:g}²). Memory is what an iteration takes beside weights, "
        "buffers and the optimizer's state.",
        "",
    ]


def _detector_table(entries: list[dict]) -> list[str]:
    header = ["detector", "kernels"]
    for phase in ("training", "inference"):
        header += [f"{phase}, images/s", f"{phase} time × first"]
    header += ["parameters, M", "GFLOP / image"]
    with_memory = any("extra_bytes" in entry for entry in entries)
    header += ["memory, MB, training / inference"] if with_memory else []
    rows = []
    for entry in entries:
        row = [entry["config"], entry["kernels"] or NOTHING]
        for phase in ("training", "inference"):
            taken = detector_milliseconds(entry, phase)
            if taken is None:
                row += [NOTHING] * 2
                continue
            first = detector_milliseconds(entries[0], phase)
            row += [_number(1000 * entry["batch"] / taken), times(taken / first)]
        row += [f"{entry['parameters'] / 1e6:.2f}", _number(entry["flops"] / 1e9)]
        if with_memory:
            sizes = [entry.get("extra_bytes", {}).get(phase) for phase in ("training", "inference")]
            row.append(" / ".join(NOTHING if n is None else f"{n / 1e6:.0f}" for n in sizes))
        rows.append(row)
    return table(header, rows)


def detector_milliseconds(entry: dict, phase: str) -> float | None:
    samples = entry["times"].get(phase)
    return median(samples) if samples else None


def _speedups(entries: list[dict]) -> list[str]:
    """How many times faster a detector is on ours than on mmcv's kernels."""
    by_kernels = {(entry["config"], entry["kernels"]): entry for entry in entries}
    lines = []
    for (config, kernels), ours in by_kernels.items():
        theirs = by_kernels.get((config, "mmcv"))
        if kernels != "mmdcn" or theirs is None:
            continue
        ratios = []
        for phase in ("training", "inference"):
            taken = [detector_milliseconds(entry, phase) for entry in (theirs, ours)]
            if None not in taken:
                ratios.append(f"{phase} {times(taken[0] / taken[1])}")
        lines += [f"mmcv ÷ mmdcn, {config}: {', '.join(ratios)}.", ""]
    return lines


# ------------------------------------------------------------------------------ exported detectors


def deployment_lines(run: dict) -> list[str]:
    """The tables of a run of :mod:`mmdcn.benchmark.deployment`, one for each batch size."""
    settings = run["settings"]
    width, height = settings["size"]
    lines = []
    for batch in settings["batches"]:
        entries = [entry for entry in run["cases"] if entry["batch"] == batch]
        if not entries:  # of a run that was interrupted
            continue
        names = list(dict.fromkeys(name for entry in entries for name in entry["times"]))
        first = names[0]
        rows = []
        for entry in entries:
            taken = {name: median(samples) for name, samples in entry["times"].items()}
            row = [entry["config"]]
            for name in names:
                rate = _number(1000 * batch / taken[name]) if name in taken else NOTHING
                relative = name != first and name in taken
                row.append(f"{rate} ({times(taken[first] / taken[name])})" if relative else rate)
            rows.append(row)
        lines += [
            f"{width}×{height}, batch {batch}, images/s (× {first}):",
            "",
            *table(["detector", *names], rows),
            "",
        ]
    return [
        *lines,
        f"Files in {settings['precision']}; PyTorch in float32, mmdet's own prediction on our "
        "kernels; tuned is the same with norms folded into convolutions, channels-last, and RoIs "
        "pooled by our operator; compiled is tuned, with the decoding of the files. Random weights "
        "and images, so that there are few detections; offsets of all "
        f"deformable layers ~ N(0, {settings['offset_std']:g}²).",
        "",
        *_left_out(run),
    ]
