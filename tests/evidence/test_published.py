"""Runs of a published grid are taken over, and what they need is not forgotten."""

import json

import pytest

from mmdcn.errors import InputError
from mmdcn.evidence import grid, layers, published, report, runner
from mmdcn.evidence.jobs import digit_jobs

from . import examples

JOBS = digit_jobs(grid.Choice(parts=["frozen"], arms=["dcn", "norm"], seeds=1))

COST = {"run": {"version": 1}, "arms": {}, "machine": {"cpu": "a processor"}}


@pytest.fixture
def runs_json(tmp_path, monkeypatch):
    """Of a grid in which the last run is not finished."""
    folder = tmp_path / "made"
    folder.mkdir()
    for job in JOBS[:-1]:
        runner.result_file(job, folder).write_text(json.dumps(examples.result(job.run, 90)))
    monkeypatch.setattr(layers, "section", lambda *_: [])
    entry = {"arm": "dcn", "seed": 0, "receptive": {}}
    report.write(JOBS, folder, tmp_path / "page", cost=COST, looked={"layers": [entry]}, quick=True)
    return tmp_path / "page" / "runs.json"


def test_what_was_published_is_not_run_again(runs_json, tmp_path):
    folder = tmp_path / "here"
    assert [job.run.training for job in JOBS] == ["upright", "frozen", "frozen"]
    # The last run starts from the weights of the first, which are not published.
    assert published.take_over(runs_json, JOBS, folder) == 1
    assert runner.unfinished(JOBS, folder) == [JOBS[0], JOBS[2]]
    assert runner.read_result(JOBS[1], folder) == examples.result(JOBS[1].run, 90)
    assert json.loads((folder / "cost.json").read_text()) == COST
    assert layers.remembered(folder) == [{"arm": "dcn", "seed": 0, "receptive": {}}]
    # Without a run that needs it, the first is as good as made; and what is there stays.
    runner.result_file(JOBS[1], folder).write_text("{}")
    assert published.take_over(runs_json, JOBS[:2], folder) == 1
    assert runner.result_file(JOBS[1], folder).read_text() == "{}"


@pytest.mark.parametrize("text", [None, "", "[]", '{"runs": [{"run": 1}], "environments": []}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "runs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"--reuse .*runs.json: expected a runs.json that"):
        published.take_over(path, JOBS, tmp_path)
    assert not layers.remembered(tmp_path)
