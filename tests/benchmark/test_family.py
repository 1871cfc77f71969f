"""The benchmark of the other operators."""

import json

import pytest

pytest.importorskip("mmcv")

from mmdcn import timing
from mmdcn.benchmark import BenchmarkError, cli, family

QUICK = timing.Budget(seconds=0.001, fewest=2, most=3)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(family, "PROBLEMS", family.small_problems())


def test_command_and_report(small, tmp_path, capsys):
    run, target = tmp_path / "family.json", tmp_path / "mine"
    command = ["family", "--seconds", "0.001", "--no-memory", "--json", str(run)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    result = json.loads(run.read_text())
    assert result["complete"]
    assert [entry["operator"] for entry in result["cases"]] == family.OPERATORS
    for entry in result["cases"]:
        for direction, calls in entry["times"].items():
            assert len(calls) == (2 if entry["operator"].startswith("dcn") else 3), direction
            assert {"mmdcn", entry["yardstick"]} <= set(calls)
            ratio = timing.median(calls["mmdcn"]) / timing.median(calls[entry["yardstick"]])
            assert f"| {ratio:.2f}× |" in said or ratio >= 10
    assert cli.main(["report", str(run), "--out", str(target)]) == 0
    page = target.with_suffix(".md").read_text()
    assert "## The other operators" in page
    assert page.count("| deform_roi_pool | small |") == 2


def test_one_operator(small, capsys):
    result = {}
    family.run(family.Settings(["dcnv4"], measure_memory=False, budget=QUICK), result)
    assert [entry["operator"] for entry in result["cases"]] == ["dcnv4"]


def test_wrong_results_are_not_timed(small, monkeypatch):
    right = family.dcnv3
    monkeypatch.setattr(family, "dcnv3", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    with pytest.raises(BenchmarkError, match="dcnv3 computes another result than plain PyTorch"):
        family.run(family.Settings(["dcnv3"], measure_memory=False, budget=QUICK), {})


def test_memory_is_that_of_one_call():
    """In a process of its own; the aggregation takes none, its equation each sample's channels."""
    smallest = next(p for p in family.PROBLEMS if p.operator == "dcnv3")
    settings = family.Settings(measure_memory=True)
    names = ["mmdcn", "plain PyTorch"]
    ours, equation = family._extra_bytes([smallest] * 2, names, settings)
    assert equation["forward"] > 9 * 56 * 56 * 64 * 4 > 10 * ours["forward"]


def test_unknown_operators_are_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["family", "--operators", "dcnv5"])
    assert "--operators: expected deform_conv1d or" in capsys.readouterr().err
