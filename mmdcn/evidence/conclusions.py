"""The page's conclusions: sentences whose figures, and whose direction, come from the results.

A difference is called one only where its 95 % interval over at least three seeds leaves zero out;
otherwise the sentence says that it could not be told. What has no result yet has no sentence.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmdcn.timing import scatters

from .nets import ARMS
from .results import COLUMNS, Results, Test
from .spread import Estimate

FEWEST_SEEDS = 3

ALL_1, ALL_15, UPRIGHT = COLUMNS["all"], COLUMNS["all 1½"], COLUMNS["upright"]


def conclusions(results: Results, cost: dict | None) -> list[str]:
    """Paragraphs, as far as there are results."""
    found: list[str] = []
    for sentence in (_scratch, _where, _beyond, _longer, _controls, _frozen, _upright):
        found += sentence(results)
    return found + list(_cost(cost) if cost is not None else [])


def is_told(difference: Estimate | None) -> bool:
    """Whether a difference may be called one."""
    return difference is not None and difference.count >= FEWEST_SEEDS and difference.sign != 0


def compared(difference: Estimate) -> str:
    """A difference in words: the points, with their interval, and whether it is one."""
    seeds = f"{difference.count} seed{'s' * (difference.count > 1)}"
    points = f"{difference.text(signed=True)} points"
    if difference.count < FEWEST_SEEDS:
        return f"{points} ({seeds}: too few to tell)"
    if difference.sign == 0:
        return f"{points} ({seeds}: no difference that could be told)"
    return f"{points} ({seeds})"


def _scratch(results: Results) -> Iterator[str]:
    yield from _against_widened(
        results, "scratch", ALL_1, "**Trained on transformed digits, tested on digits with all "
        "transformations at once**"
    )  # fmt: skip


def _longer(results: Results) -> Iterator[str]:
    yield from _against_widened(
        results, "long", ALL_1, "**Three times as long a training**, the same test"
    )


def _beyond(results: Results) -> Iterator[str]:
    yield from _against_widened(
        results, "scratch", ALL_15, "**Beyond what was trained on**, at one and a half times the "
        "strength"
    )  # fmt: skip


def _against_widened(results: Results, part: str, test: Test, what: str) -> Iterator[str]:
    for arm in ("dcn", "dcnv2"):
        difference = results.difference((part, arm), (part, "plain-size"), test)
        if difference is None:
            continue
        accuracy = results.means((part, arm), [(part, "plain-size")], test)
        baseline = results.means((part, "plain-size"), [(part, arm)], test)
        text = (
            f"{what}, {ARMS[arm].title} has {accuracy:.1f} %, and a plain network of as many "
            f"parameters as DCNv2 {baseline:.1f} %: {compared(difference)}"
        )
        if is_told(difference):
            share = abs(difference.mean) / (100 - baseline)
            text += f", which is {share:.0%} {'fewer' if difference.sign > 0 else 'more'} errors"
        yield f"{text}."


def _where(results: Results) -> Iterator[str]:
    """For which transformations by themselves."""
    for arm in ("dcn", "dcnv2"):
        kinds: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for name, test in COLUMNS.items():
            if name.startswith("all"):
                continue
            difference = results.difference(("scratch", arm), ("scratch", "plain-size"), test)
            if difference is None or difference.count < FEWEST_SEEDS:
                return
            kinds[difference.sign].append(f"{name} ({difference.text(signed=True)})")
        parts = [
            f"{words} {', '.join(kinds[sign])}"
            for sign, words in ((1, "better on"), (-1, "worse on"), (0, "not told apart on"))
            if kinds[sign]
        ]
        yield (
            f"**One transformation at a time**, {ARMS[arm].title} is, against the same plain "
            f"network and in points of accuracy, {'; '.join(parts)}."
        )


def _controls(results: Results) -> Iterator[str]:
    """What else could be the reason: time, reach, a modulation without offsets, one map for all."""
    for control, question in (
        ("plain-time", "more of plain convolutions, for the time that DCNv2 takes"),
        ("dilated", "a wider reach alone"),
        ("modulation", "modulation alone, with points that stay"),
        ("transformer", "one affine map for the whole image (a spatial transformer)"),
    ):
        difference = results.difference(("scratch", "dcnv2"), ("scratch", control), ALL_1)
        if difference is not None:
            title, pair = ARMS[control].title, [("scratch", "dcnv2")]
            accuracy = results.means(("scratch", control), pair, ALL_1)
            yield (
                f"**Is it {question}?** {title[0].upper()}{title[1:]} has "
                f"{accuracy:.1f} %; DCNv2 against it, seed by seed: {compared(difference)}."
            )


def _frozen(results: Results) -> Iterator[str]:
    """The article's sentence: kernels stay, sampling points move."""
    plain = ("upright", "plain")
    for arm in ("dcn", "dcnv2"):
        back = results.difference(("frozen", arm), plain, ALL_1)
        if back is None:
            continue
        intact, lost = (results.means(plain, [("frozen", arm)], test) for test in (UPRIGHT, ALL_1))
        moved = results.means(("frozen", arm), [plain], ALL_1)
        text = (
            f"**Kernels frozen as they learned upright digits** ({intact:.1f} % of these, "
            f"{lost:.1f} % with all transformations), offset branches of {ARMS[arm].title} "
            f"trained alone reach {moved:.1f} %: {compared(back)}"
        )
        if is_told(back) and intact > lost:
            text += f", {back.mean / (intact - lost):.0%} of what was lost"
        for control in ("branch", "norm", "transformer"):
            difference = results.difference(("frozen", arm), ("frozen", control), ALL_1)
            if difference is not None:
                reached = results.means(("frozen", control), [("frozen", arm)], ALL_1)
                text += f"; against {ARMS[control].title} ({reached:.1f} %), {compared(difference)}"
        yield f"{text}."


def _upright(results: Results) -> Iterator[str]:
    for arm in ("dcn", "dcnv2"):
        difference = results.difference(("upright", arm), ("upright", "plain"), ALL_1)
        same = results.difference(("upright", arm), ("upright", "plain"), UPRIGHT)
        if difference is not None:
            yield (
                f"**Trained on upright digits alone**, {ARMS[arm].title} against plain: "
                f"{compared(difference)} on digits with all transformations, and "
                f"{compared(same)} on upright ones."
            )


def _cost(cost: dict) -> Iterator[str]:
    arms, plain = cost["arms"], cost["arms"]["plain"]

    def times(arm: str, what: str) -> str:
        if scatters(*arms[arm][what]) or scatters(*plain[what]):
            return ""
        ratio = arms[arm][what][1] / plain[what][1]
        return f", {ratio:.2f}× the time of {what.removesuffix('_ms')}"

    said = [
        f"{ARMS[arm].title} {arms[arm]['parameters'] / plain['parameters']:.2f}× the parameters, "
        f"{arms[arm]['multiply_adds'] / plain['multiply_adds']:.2f}× the multiply-adds"
        + times(arm, "training_ms")
        + times(arm, "inference_ms")
        for arm in ("dcn", "dcnv2")
    ]
    yield (
        f"**What it costs here**, of the plain network's: {'; '.join(said)}. These networks are "
        "narrow: a branch of 18 or 27 channels weighs more beside convolutions of 48 or 96 than "
        "beside those of a detector."
    )
