"""The grid and its runs: order, what is kept, what is refused, and processes side by side."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmdcn.errors import InputError
from mmdcn.evidence import cli, detector_grid, grid, jobs, progress, runner


@dataclass(frozen=True)
class Sleep:
    """A job that leaves a note of its process."""

    name: str
    needs: tuple[str, ...] = ()
    seconds: float = 0.1
    error: str = ""

    def settings(self) -> dict:
        return {"name": self.name, "error": self.error}

    def execute(self, folder: Path, tell) -> dict:
        assert all((folder / f"{name}.json").is_file() for name in self.needs)
        tell(0.5)
        time.sleep(self.seconds)
        if self.error:
            raise ValueError(self.error)
        return {"run": self.settings(), "process": os.getpid()}


class Told:
    def __init__(self):
        self.done = []

    def progress(self, job, part):
        assert part == 0.5

    def finished(self, job):
        self.done.append(job.name)


def test_what_is_finished_is_kept(tmp_path):
    told = Told()
    first, second, failing = Sleep("first"), Sleep("second"), Sleep("failing", error="no luck")
    with pytest.raises(ValueError, match="no luck"):
        runner.run([first, failing, second], tmp_path, 1, told)
    assert told.done == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["first.json"]
    assert runner.unfinished([first, failing, second], tmp_path) == [failing, second]


def test_other_settings_and_damaged_results_are_refused(tmp_path):
    runner.run([Sleep("job")], tmp_path, 1, Told())
    with pytest.raises(InputError, match=r"job.json was made with other settings; choose another"):
        runner.unfinished([Sleep("job", error="other")], tmp_path)
    (tmp_path / "job.json").write_text('{"run": ')
    with pytest.raises(InputError, match=r"job.json cannot be read .*: delete it, and run again"):
        runner.unfinished([Sleep("job")], tmp_path)


def test_jobs_run_side_by_side_and_in_order_of_need(tmp_path):
    sleeps = [Sleep("last", needs=("one", "two")), Sleep("one", seconds=0.5), Sleep("two")]
    told = Told()
    runner.run(sleeps, tmp_path, 2, told)
    assert told.done[-1] == "last" and sorted(told.done) == ["last", "one", "two"]
    processes = {json.loads((tmp_path / f"{j.name}.json").read_text())["process"] for j in sleeps}
    assert os.getpid() not in processes and len(processes) == 2
    with pytest.raises(RuntimeError, match=r"bad failed:[\s\S]*ValueError: no luck"):
        runner.run([Sleep("bad", error="no luck"), Sleep("long", seconds=60)], tmp_path, 2, told)
    assert not (tmp_path / "bad.json").exists()


def test_the_published_grid_has_the_main_arms_first_and_each_base_before():
    found = [run for _, run in grid.runs(grid.Choice())]
    assert len(set(found)) == len(found)
    assert [run.arm for run in found[:4]] == list(grid.MAIN)
    for run in found:
        if run.base is not None:
            assert found.index(run.base) < found.index(run)
    # Of the two cores and four hours, some are left for what is not trained here.
    assert sum(map(grid.seconds, found)) < 2 * 3.5 * 3600


def test_a_choice_brings_what_it_starts_from():
    chosen = grid.runs(grid.Choice(parts=["frozen"], arms=["dcn"], seeds=2))
    assert [(part, run.training, run.seed) for part, run in chosen] == [
        *(("upright", "upright", 0), ("frozen", "frozen", 0)),
        *(("upright", "upright", 1), ("frozen", "frozen", 1)),
    ]
    assert {run.epochs for _, run in grid.runs(grid.Choice(quick=True))} == {2, 6}


def test_the_plan_counts_what_is_finished():
    chosen = jobs.digit_jobs(grid.Choice(parts=["scratch"], arms=["plain", "dcn"], seeds=1))
    detectors = jobs.detector_jobs(["detectors"], ["dcnv2"], 2)
    *table, _, _ = jobs.plan([*chosen, *detectors], [], 2)
    assert "| scratch | plain ×1, dcn ×1 | 20 epochs | 2 |" in table[2]
    text = "\n".join(table)
    assert f"| detectors | dcnv2 ×2 | {detector_grid.ITERATIONS} iterations | 2 |" in text
    assert "| detectors-upright | plain ×2 |" in text
    *_, last = jobs.plan(chosen, [chosen[1]], 2)
    assert last.startswith("1 runs are finished; the other 1 take about 53 s with 2 at a time")


def test_the_command_line_knows_every_part_and_arm():
    assert set(cli.PARTS) == {*grid.PARTS, *detector_grid.PARTS, "cost", "layers"}
    assert set(cli.ARMS) == {arm for part in grid.PARTS.values() for arm in part.arms}
    assert set(cli.ARMS) >= set(detector_grid.ARMS)


def test_what_is_left_is_estimated_from_what_is_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    sleeps = [Sleep("one", seconds=10), Sleep("two", seconds=30)]
    told = progress.Reporter(sleeps)
    assert told.left() == ""
    now[0] = 20.0
    told.progress(sleeps[0], 0.5)
    assert told.left() == "2 min"  # 20 s for 5 of 40
    now[0] = 40.0
    told.finished(sleeps[0])
    assert told.left() == "2 min"
    told.finished(sleeps[1])
    assert told.left() == ""
