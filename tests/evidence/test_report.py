"""The page: what it concludes and when, its tables, and that the published one is of its runs."""

import json
import re
import statistics
from pathlib import Path

import pytest

from mmdcn.evidence import conclusions, grid, report
from mmdcn.evidence.jobs import digit_jobs
from mmdcn.evidence.nets import ARMS
from mmdcn.evidence.results import COLUMNS, Results
from mmdcn.evidence.runner import result_file
from mmdcn.evidence.spread import Estimate, paired

from . import examples

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "evidence"


def test_intervals_are_students():
    found = Estimate.of([90.0, 92.0, 94.0])
    assert (found.mean, found.count) == (92.0, 3)
    assert found.half_width == pytest.approx(4.303 * 2 / 3**0.5)
    assert found.sign == 1 and Estimate.of([-1.0, 3.0]).sign == 0
    assert str(Estimate.of([-0.01, 0.0])).startswith("0.0 ±")
    assert Estimate.of([5.0]).sign == 0  # one seed says nothing


def test_differences_are_of_common_seeds():
    assert paired({0: 3.0, 2: 5.0}, {1: 1.0, 2: 1.0}) == Estimate(4.0, None, 1)
    assert paired({0: 3.0}, {1: 1.0}) is None


def results(accuracies: dict) -> Results:
    """Of the part `scratch`: accuracies for each arm, by seed."""
    found = Results()
    for _, run in grid.runs(grid.Choice()):
        values = accuracies.get(run.arm, ())
        if run.training == "scratch" and run.epochs == grid.EPOCHS and run.seed < len(values):
            by_seed = found.by_arm.setdefault(("scratch", run.arm), {})
            by_seed[run.seed] = examples.result(run, values[run.seed])
    return found


@pytest.mark.parametrize(
    ("dcn", "said"),
    [
        ((95, 95.5, 95), r"\+5.2 ± 0.7 points \(3 seeds\), which is 52% fewer errors"),
        ((85, 84.5, 85), r"-5.2 ± 0.7 points \(3 seeds\), which is 52% more errors"),
        ((95, 85, 91), r"\+0.3 ± [\d.]+ points \(3 seeds: no difference that could be told\)\."),
        ((95, 95.5), r"\+5.2 ± 3.2 points \(2 seeds: too few to tell\)\."),
        ((95,), r"\+5.0 points \(1 seed: too few to tell\)\."),
    ],
)
def test_a_difference_is_concluded_only_where_the_figures_carry_it(dcn, said):
    found = conclusions.conclusions(results({"plain-size": (90, 90, 90), "dcn": dcn}), None)
    assert re.search(said, found[0]), found[0]


def test_without_results_nothing_is_concluded():
    assert conclusions.conclusions(Results(), None) == []


def test_the_page_says_what_is_missing(tmp_path):
    jobs = digit_jobs(grid.Choice(parts=["scratch"], seeds=1))
    for job in jobs[:3]:
        result_file(job, tmp_path).write_text(json.dumps(examples.result(job.run, 90.25)))
    written = report.write(jobs, tmp_path, tmp_path / "out" / "page")
    page = (tmp_path / "out/page.md").read_text()
    assert "**The grid is not finished**: the main arms have 0 of 5 seeds." in page
    assert f"**Not finished: {len(jobs) - 3} runs** (arm/seed): scratch: dcnv2/0, " in page
    assert "| plain | 1,000 | 1 | 90.2 |" in page
    for picture in re.findall(r"\]\((page/\S+)\)", page):
        assert tmp_path / "out" / picture in written
        assert (tmp_path / "out" / picture).stat().st_size > 1000
    quick = report.write(jobs, tmp_path, tmp_path / "quick", quick=True)[-1].read_text()
    assert "This is a quick run" in quick and "points" not in quick.split("## How")[0]


def test_the_published_tables_are_of_the_published_runs():
    runs = json.loads((PUBLISHED / "runs.json").read_text())["runs"]
    page = PUBLISHED.with_suffix(".md").read_text()
    assert len(runs) > 20
    for part in {run["part"] for run in runs}:
        for arm in {run["run"]["arm"] for run in runs if run["part"] == part}:
            own = [r for r in runs if (r["part"], r["run"]["arm"]) == (part, arm)]
            kind, strength = COLUMNS["all"]
            mean = statistics.mean(run["accuracy"][kind][str(strength)] for run in own)
            text = Estimate(mean, None, 1).text()
            row = rf"^\| {re.escape(ARMS[arm].title)} \| {own[0]['parameters']:,} \| {len(own)} \|"
            assert re.search(rf"{row}.*\| {text}( ±|  ?\|)", page, re.MULTILINE), (part, arm)


def test_the_published_sentences_have_their_figures_in_the_tables():
    page = PUBLISHED.with_suffix(".md").read_text()
    concluded, _, rest = page.partition("## How it was measured")
    figures = set(re.findall(r"[+-]\d+\.\d ± \d+\.\d", concluded))
    tables = set(re.findall(r"[+-]\d+\.\d ± \d+\.\d", rest))
    against_widened = set(re.findall(r"([+-]\d+\.\d ± \d+\.\d)\)", concluded))
    assert figures and against_widened <= tables
