"""The budget as a block of a Markdown page."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmdcn.files import write
from mmdcn.markdown import table

from .. import BenchmarkError
from ..cases import SHAPES
from . import counts, ours, peer
from .device import H100, Device, Step, total
from .problem import Problem

START, END = "<!-- paper -->", "<!-- /paper -->"

ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")
BATCHES = (1, 2, 8)

# The columns of the steps: what ours and torchvision's are called there.
_FORWARD = {
    "copies": ("copies", "zeros"),
    "sampling": ("gather", "im2col"),
    "product": ("product",),
    "bias": ("bias",),
}
_BACKWARD = {
    "copies": ("copies", "zeros"),
    "sampling": ("gather", "im2col"),
    "products": ("products",),
    "scatter": ("scatter", "offsets", "col2im"),
    "gradients": ("gradients",),
}


@dataclass(frozen=True)
class Row:
    """One convolution, by our operator and by torchvision's."""

    label: str
    batch: int
    arithmetic: str
    chunks: int  # of our forward pass
    forward: tuple[list[Step], list[Step]]
    backward: tuple[list[Step], list[Step]]

    def times(self, device: Device, direction: str) -> tuple[float, float]:
        """Microseconds of ours and of torchvision's, forward or forward and backward."""
        passes = [self.forward] if direction == "forward" else [self.forward, self.backward]
        return tuple(sum(total(each[who], device) for each in passes) for who in (0, 1))

    def is_below(self, device: Device, direction: str) -> bool:
        taken, of_peer = self.times(device, direction)
        return taken < of_peer


def rows(device: Device) -> Iterator[Row]:
    """Every shape, batch and arithmetic on a device."""
    for arithmetic in ARITHMETICS:
        for case in SHAPES["r50"]:
            for batch in BATCHES:
                problem = Problem.of(replace(case, batch=batch), arithmetic)
                yield Row(
                    case.name,
                    batch,
                    arithmetic,
                    ours.forward_chunks(device, problem),
                    (ours.forward(device, problem), peer.forward(device, problem)),
                    (ours.backward(device, problem), peer.backward(device, problem)),
                )


def _taken(steps: list[Step], names: tuple[str, ...], device: Device) -> float:
    return total([step for step in steps if step.name in names], device)


def sums_table(device: Device) -> list[str]:
    """The sums of all rows, beside torchvision's."""
    header = ["arithmetic", "shape, batch"]
    for direction in ("forward", "with backward"):
        header += [direction, "torchvision", "÷ ours"]
    cells = []
    for row in rows(device):
        line = [row.arithmetic, f"{row.label}, {row.batch}"]
        for direction in ("forward", "with backward"):
            taken, of_peer = row.times(device, direction)
            line += [f"{taken:.0f}", f"{of_peer:.0f}", f"{of_peer / taken:.2f}"]
        cells.append(line)
    return table(header, cells, left=2)


def steps_table(device: Device, batch: int) -> list[str]:
    """Our steps at one batch size, forward and backward, and what bounds the kernels of ours."""
    header = ["arithmetic", "shape"]
    header += [f"forward: {name}" if i == 0 else name for i, name in enumerate(_FORWARD)]
    header += [f"backward: {name}" if i == 0 else name for i, name in enumerate(_BACKWARD)]
    cells = []
    for row in rows(device):
        if row.batch != batch:
            continue
        line = [row.arithmetic, row.label]
        for steps, names in ((row.forward[0], _FORWARD), (row.backward[0], _BACKWARD)):
            for of_column in names.values():
                line.append(
                    f"{_taken(steps, of_column, device):.0f}{_bound(steps, of_column, device)}"
                )
        cells.append(line)
    return table(header, cells, left=2)


def _bound(steps: list[Step], names: tuple[str, ...], device: Device) -> str:
    """What bounds a kernel of ours; nothing where torch computes."""
    for step in steps:
        if step.name in names and step.name in ("gather", "scatter"):
            return f" ({step.bound_by(device)})"
    return ""


def reasons(device: Device) -> list[str]:
    """For each row that is not below torchvision's, what it spends more on."""
    lines = []
    for row in rows(device):
        for direction in ("forward", "with backward"):
            if row.is_below(device, direction):
                continue
            taken, of_peer = row.times(device, direction)
            parts = []
            for name, names in _FORWARD.items():
                mine, theirs = (_taken(steps, names, device) for steps in row.forward)
                if mine > theirs:
                    parts.append(f"{name} {mine:.0f} against {theirs:.0f}")
            chunks = f"{row.chunks} chunk{'s' if row.chunks > 1 else ''}"
            lines.append(
                f"- {row.arithmetic}, {row.label}, batch {row.batch}, {direction}: {taken:.0f} "
                f"against {of_peer:.0f} µs, in {chunks}; forward, {', '.join(parts)}."
            )
    return lines


#: Other assumptions, to see what hangs on those that were made.
CHANGED = {
    "as assumed": {},
    "no corner comes from the first-level cache": {"l1_hits": 0.0},
    "all corners come from it": {"l1_hits": 1.0},
    "products never split their sums": {"split": 0.0},
    "torch's permuting copies at half the rate": {"permuted": H100.permuted / 2},
    "at twice the rate": {"permuted": H100.permuted * 2},
    "atomic additions at twice the rate": {"sectors": H100.sectors * 2},
    "every instruction slot used": {"issue": 1.0},
}


def sensitivity_table(device: Device) -> list[str]:
    """How many rows are below torchvision's if one assumption is another."""
    cells = []
    for what, change in CHANGED.items():
        changed = replace(device, **change)
        line = [what]
        for direction in ("forward", "with backward"):
            below = [row.is_below(changed, direction) for row in rows(changed)]
            least = min(
                of_peer / taken
                for taken, of_peer in (row.times(changed, direction) for row in rows(changed))
            )
            line += [f"{sum(below)} of {len(below)}", f"{least:.2f}"]
        cells.append(line)
    header = ["if", "rows below, forward", "least ratio", "with backward", "least ratio"]
    return table(header, cells)


def rates_table(device: Device) -> list[str]:
    """The device's rates, and where they come from."""

    def flops(name: str) -> str:
        return f"{device.flops[name] / 1e6:.0f} TFLOP/s, of which {device.product[name]:.0%}"

    read = "data sheet"
    clock = device.instructions / device.multiprocessors / 4 / 1e3
    cells = [
        ["multiprocessors, instructions", f"{device.multiprocessors}, 4 a clock", read],
        ["clock", f"{clock:.3f} GHz", "data sheet's boost clock, less what load takes: assumed"],
        ["share of instruction slots used", f"{device.issue:.0%}", "assumed"],
        ["first-level cache", f"{device.l1 / 1e6:.1f} TB/s", f"{read}: 128 bytes a clock"],
        ["corners of ours that it serves", f"{device.l1_hits:.0%}", "assumed"],
        ["corners of torchvision's", "100%", "assumed, in its favour"],
        ["L2", f"{device.l2 / 1e6:.1f} TB/s", "published microbenchmarks"],
        ["memory", f"{device.memory / 1e6:.2f} TB/s", read],
        ["products, float32", flops("float32"), f"{read}; the share is assumed"],
        ["TF32", flops("tf32"), "likewise"],
        ["float16 and bfloat16", flops("float16"), "likewise"],
        ["where a sum is split", f"{device.split:.0%} of that", "assumed"],
        ["copies that change a layout", f"{device.permuted / 1e6:.1f} TB/s", "assumed"],
        [
            "atomic additions",
            f"{device.sectors / 1e3:.0f} sectors of 32 bytes a nanosecond",
            "assumed: half of L2's rate",
        ],
        ["from one kernel to the next", f"{device.launch:.0f} µs", "assumed"],
    ]
    return table(["rate", device.name, "source"], cells, left=3)


def block(device: Device = H100) -> str:
    """The block between its markers."""
    why = reasons(device)
    lines = [
        START,
        "**Computed on paper, not measured.** Microseconds on one "
        f"{device.name}, from instructions counted in the machine code of nvcc {counts.COMPILER} "
        "for sm_90 and from the rates below. 3×3, modulated, with a bias, one offset group, NCHW; "
        "the shapes are those of R-50 at 800×1333: c3 is 128→128 at 100×168, c4 256→256 at 50×84, "
        "c5 512→512 at 25×42. Expect errors of 40 % and more; ratios are better than times. The "
        "time of the host is left out, and so is the bias's gradient, the same sum for both. "
        "torchvision has no kernels for bfloat16, and is counted there as if it had its float16 "
        "ones.",
        "",
        *sums_table(device),
        "",
        "Our steps at batch 2, with what bounds our own kernels. Copies are all changes of layout; "
        "gradients are what is done to sums after their last addition, and before the first.",
        "",
        *steps_table(device, batch=2),
        "",
    ]
    if why:
        lines += ["Rows that are not below torchvision's, and where they spend more:", "", *why, ""]
    lines += [
        "What hangs on the assumptions:",
        "",
        *sensitivity_table(device),
        "",
        *rates_table(device),
        "",
        "`python tools/benchmark.py paper --page docs/performance.md` makes this block.",
        END,
    ]
    return "\n".join(lines)


def publish(page: Path) -> None:
    """Make the block of a page anew.

    Raises:
        BenchmarkError: the page has no place for it.
    """
    try:
        content = page.read_text()
    except OSError as error:
        raise BenchmarkError(f"--page: cannot read {page}: {error}") from error
    before, start, rest = content.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise BenchmarkError(f"--page: expected {START} and then {END} in {page}")
    write(page, before + block() + after)
