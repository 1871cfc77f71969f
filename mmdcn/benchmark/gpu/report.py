"""The report of a run, as Markdown."""

from collections.abc import Callable, Iterable

from mmdcn.markdown import table

from ..tables import NOTHING, times

_WIDTH = 400  # of what is said of a case


def markdown(report: dict) -> str:
    """The report of one part, as far as it goes."""
    lines = [f"# mmdcn on a GPU: part {report['part']}", ""]
    if report["device"] != "cuda":
        lines += ["A rehearsal on the CPU in tiny sizes: no figure here means anything.", ""]
    facts = ((name, _cell(value)) for name, value in facts_of(report).items())
    lines += [*table(["", ""], facts, left=2), ""]
    lines += _sections(report) + findings(report) + tables(report, _TABLES)
    return "\n".join(lines).rstrip() + "\n"


def tables(report: dict, sections: Iterable[str]) -> list[str]:
    """Lines with a table for each of these sections that has results."""
    lines = []
    for name in sections:
        results = list(found_in(report, name))
        if results:
            lines += [f"## {name[0].upper()}{name[1:]}", "", *_TABLES[name](results), ""]
    return lines


def facts_of(report: dict) -> dict:
    """The machine and its versions, as far as the report has them."""
    facts = {}
    for result in found_in(report, "environment"):
        facts |= result
    return facts


def _sections(report: dict) -> list[str]:
    rows = []
    for name, entry in report["sections"].items():
        counts = {}
        for case in entry["cases"]:
            counts[case["status"]] = counts.get(case["status"], 0) + 1
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        if entry.get("total") is not None and (left := entry["total"] - len(entry["cases"])) > 0:
            said += f", {left} not reached"
        if "error" in entry:
            said += f"; {entry['error']}"
        rows.append([name, entry["status"], f"{entry['seconds']:.0f} s", _cell(said)])
    return ["## Sections", "", *table(["section", "status", "time", "cases"], rows, left=4), ""]


def findings(report: dict) -> list[str]:
    """Lines with everything that did not pass, and why."""
    rows = []
    for name, entry in report["sections"].items():
        reasons: dict[tuple, list[str]] = {}
        for case in entry["cases"]:
            if case["status"] != "passed":
                key = case["status"], case.get("error", ""), case.get("memcheck", "")
                reasons.setdefault(key, []).append(case["case"])
        for (status, error, memcheck), cases in reasons.items():
            more = f" and {len(cases) - 2} more" if len(cases) > 2 else ""
            said = f"{error}; memcheck: {memcheck}" if memcheck else error
            rows.append([name, "; ".join(cases[:2]) + more, status, _cell(said)])
    if not rows:
        return []
    header = ["section", "case", "status", "what happened"]
    return ["## What did not pass", "", *table(header, rows, left=4), ""]


def found_in(report: dict, section: str) -> Iterable[dict]:
    """The results of a section's cases, those that have any, each with the case's name."""
    for case in report["sections"].get(section, {}).get("cases", []):
        if case.get("result"):
            yield {"case": case["case"], **case["result"]}


# ----------------------------------------------------------------------------------------- values


def _cell(value: object) -> str:
    text = " ".join(str(value).split()).replace("|", "/")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _ms(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _over(value: float | None, other: float | None) -> str:
    return times(value / other) if value and other else NOTHING


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


def _top(kernels: dict[str, float], most: int = 6) -> str:
    taken = [f"{name} {microseconds:.0f} µs" for name, microseconds in kernels.items()]
    return _cell("; ".join(taken[:most])) if taken else "the profiler saw none"


# ----------------------------------------------------------------------------------------- tables


def _errors(results: list[dict]) -> list[str]:
    rows = [
        [r["case"], _error(max(r["errors"].values(), default=None)), _error(r["bound"])]
        for r in results
        if "errors" in r
    ]
    lines = table(["case", "largest error", "bound"], rows)
    seen: dict[str, int] = {}
    for result in results:
        for kernel in result.get("kernels", {}):
            seen[kernel] = seen.get(kernel, 0) + 1
    if seen:
        lines += ["", "Kernels of ours that the profiler saw, and in how many cases:", ""]
        lines += table(["kernel", "cases"], sorted((_cell(k), n) for k, n in seen.items()))
    return lines


def _candidates(results: list[dict]) -> list[str]:
    lines = []
    for result in results:
        if "calls" in result:
            chosen = "; ".join(f"{key}: {call}" for key, call in result["calls"].items())
            lines += [f"In force: {chosen or NOTHING}.", ""]
    rows = [
        [r["case"], "yes" if r["right"] else "no", _error(r["error"]), _cell(r["problem"] or "")]
        for r in results
        if "right" in r
    ]
    return lines + table(["product, arithmetic, call", "right", "largest error", ""], rows, left=1)


def _accumulation(results: list[dict]) -> list[str]:
    rows = [
        [r["case"], f"{r['outside_one_rounding']:.2%}", "yes" if r["in_force"] else "no"]
        for r in results
    ]
    header = ["product", "further than one rounding from the exact sum", "in force"]
    return table(header, rows)


def _tests(results: list[dict]) -> list[str]:
    rows = [
        [r["case"], r["tests"], r["skipped"], _cell("; ".join(r["failures"][:5]))]
        for r in results
        if "tests" in r
    ]
    return table(["file", "tests", "skipped", "failures"], rows)


def _rates(results: list[dict]) -> list[str]:
    rows = [[r["case"], _ms(r["milliseconds"]), f"{r['rate']:.1f}", r["unit"]] for r in results]
    return table(["", "ms", "rate", ""], rows)


def _rows(results: list[dict]) -> list[str]:
    header = ["stage", "batch", "arithmetic", "layout", "mmdcn", "dense", "torchvision"]
    header += ["mmdcn ÷ dense", "torchvision ÷ mmdcn", "no offsets", "deterministic", "extra MB"]
    lines = [
        "3×3, stride 1, padding 1, modulated, R-50 at 800×1333, offsets ~ N(0, 2²). Medians in "
        "milliseconds of calls in turns, caches warm. Dense is cuDNN's convolution, its algorithm "
        "chosen by timing; TF32 is set alike for all. Results were compared with another "
        "implementation's in float32 on the same, rounded tensors before they were timed.",
    ]
    for direction, heading in (("forward", "Forward"), ("forward_backward", "Forward + backward")):
        rows = []
        for result in results:
            if direction not in result.get("milliseconds", {}):
                continue
            taken = result["milliseconds"][direction]
            ours, dense, peer = (taken.get(n) for n in ("mmdcn", "dense", "torchvision"))
            extra = result["extra_mb"][direction]
            rows.append(
                [result[key] for key in header[:4]]
                + [_ms(ours), _ms(dense), _ms(peer), _over(ours, dense), _over(peer, ours)]
                + [_ms(taken.get("mmdcn, no offsets")), _ms(taken.get("mmdcn, deterministic"))]
                + [" / ".join(f"{extra[n]:.0f}" for n in header[4:7] if n in extra) or NOTHING]
            )
        lines += ["", f"{heading}:", "", *table(header, rows, left=4)]
    reasons = {f"{n}: {why}" for r in results for n, why in r.get("left_out", {}).items()}
    if reasons:
        lines += ["", f"Left out: {_cell('; '.join(sorted(reasons)))}."]
    return lines


def _passes(results: list[dict]) -> list[str]:
    results = [r for r in results if "milliseconds" in r]
    names = list(dict.fromkeys(name for r in results for name in r["milliseconds"]))
    header = ["stage", "arithmetic", *names]
    rows = [
        [r["stage"], r["arithmetic"], *(_ms(r["milliseconds"].get(n)) for n in names)]
        for r in results
    ]
    lines = ["Batch 2, NCHW, milliseconds:", "", *table(header, rows, left=2), ""]
    lines += ["Kernels, by torch.profiler:", ""]
    rows = [
        [r["stage"], r["arithmetic"], name, _top(kernels)]
        for r in results
        for name, kernels in r["kernels"].items()
        if name in ("forward", "backward to input, offset and mask", "backward to weight")
    ]
    return lines + table(["stage", "arithmetic", "pass", "kernels"], rows, left=4)


def _product_calls(results: list[dict]) -> list[str]:
    rows = []
    for result in results:
        taken = "; ".join(f"{call} {_ms(ms)}" for call, ms in result["milliseconds"].items())
        wrong = "; ".join(f"{call}: {why}" for call, why in result["wrong"].items())
        names = [result[key] for key in ("product", "arithmetic", "stage")]
        rows.append([*names, result["chosen"] or NOTHING, taken, _cell(wrong)])
    header = ["product", "arithmetic", "stage", "in force", "ms of the pass, by call", "wrong"]
    return table(header, rows, left=6)


def _offsets(results: list[dict]) -> list[str]:
    rows = [
        [r["stage"], r["arithmetic"], f"{r['offset_std']:g}"]
        + [_ms(r["milliseconds"][name]) for name in ("forward", "forward_backward")]
        for r in results
        if "milliseconds" in r
    ]
    return table(["stage", "arithmetic", "σ", "forward, ms", "forward + backward, ms"], rows, 2)


def _chunks(results: list[dict]) -> list[str]:
    results = [r for r in results if "milliseconds" in r]
    sizes = list(dict.fromkeys(s for r in results for s in r["milliseconds"]["forward"]))
    rows = [
        [r["stage"], r["arithmetic"], direction.replace("_", " + "), *map(_ms, taken.values())]
        for r in results
        for direction, taken in r["milliseconds"].items()
    ]
    header = ["stage", "arithmetic", "", *("default" if s == "0" else f"{s} MiB" for s in sizes)]
    lines = ["Batch 8, NCHW, milliseconds, by the columns that are in memory at a time:", ""]
    return lines + table(header, rows, left=3)


def _others(results: list[dict]) -> list[str]:
    rows = []
    for result in results:
        if "milliseconds" not in result:
            continue
        for direction, taken in result["milliseconds"].items():
            yardstick = taken.get(result["yardstick"])
            rows.append(
                [result["operator"], result["problem"], direction.replace("_", " + ")]
                + [_ms(taken["mmdcn"]), _ms(taken["mmdcn, float16"])]
                + [f"{_ms(yardstick)}, {result['yardstick']}", _over(taken["mmdcn"], yardstick)]
            )
    header = ["operator", "problem", "", "float32, ms", "float16, ms", "yardstick, ms"]
    return table([*header, "float32 ÷ yardstick"], rows, left=3)


def _detectors(results: list[dict]) -> list[str]:
    rows = []
    for result in results:
        for phase, taken in result["images_per_second"].items():
            for name, rate in taken.items():
                memory = result["training_mb"].get(name)
                rows.append(
                    [result["batch"], phase, name, f"{rate:.1f}", _over(rate, taken["plain"])]
                    + [NOTHING if memory is None or phase != "training" else f"{memory:.0f}"]
                )
    header = ["batch", "", "detector", "images/s", "× plain", "training MB"]
    lines = ["torchvision's Faster R-CNN R-50 FPN at 800×1333, in mixed precision:", ""]
    return lines + table(header, rows, left=3)


def _counters(results: list[dict]) -> list[str]:
    kernels = [{"case": r["case"], **kernel} for r in results for kernel in r["kernels"]]
    names = list(dict.fromkeys(name for kernel in kernels for name in kernel))
    rows = [[_cell(kernel.get(name, NOTHING)) for name in names] for kernel in kernels]
    return table(names, rows, left=2)


def _beside(results: list[dict]) -> list[str]:
    names = [result["case"] for result in results]
    found = [{(r["stage"], r["dtype"]): r for r in result["rows"]} for result in results]
    rows = []
    for key in found[0]:
        both = [each.get(key) for each in found]
        for direction in ("forward", "forward_backward"):
            taken = [row and row["milliseconds"][direction] for row in both]
            means = [f"{row['mean_of_output']:.4g}" if row else NOTHING for row in both]
            ratio = _over(taken[-1], taken[0])
            rows.append([*key, direction.replace("_", " + "), *map(_ms, taken), ratio, *means])
    header = ["stage", "dtype", "", *(f"{name}, ms" for name in names), "last ÷ first"]
    lines = [f"{result['case']}: {_cell(result.get('mmdcn', NOTHING))}." for result in results]
    return [*lines, "", *table([*header, *(f"{n}, mean" for n in names)], rows, left=3)]


_TABLES: dict[str, Callable[[list[dict]], list[str]]] = {
    "smoke": _errors,
    "products": _candidates,
    "accumulation": _accumulation,
    "random problems": _errors,
    "tests": _tests,
    "ceilings": _rates,
    "convolution": _rows,
    "passes": _passes,
    "product calls": _product_calls,
    "offsets": _offsets,
    "chunks": _chunks,
    "other operators": _others,
    "detector": _detectors,
    "counters": _counters,
    "beside": _beside,
}
