"""The benchmark's command line, and what an interruption leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdcn import timing
from mmdcn.benchmark import cli, operators
from mmdcn.engine import failures
from mmdcn.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(operators, "_MATRIX_SIZE", {"cpu": 64})
    monkeypatch.setattr(operators, "_COPY_BYTES", {"cpu": 2**20})


def test_ops_as_a_command(tmp_path):
    """The command, from its arguments to its table and its JSON."""
    path = tmp_path / "new folder" / "ops.json"
    command = ["ops", "--shapes", "2x8x12x10,1x4x8x8:6", "--versions", "v1,v2", "--scaling"]
    command += ["--peers", "dense,torchvision", "--seconds", "0.001", "--no-memory"]
    command += ["--json", str(path)]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "benchmark.py", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    # Progress is on standard error, in whole lines; the toolbox's log too.
    assert done.stdout.startswith("### float32, NCHW\n")
    assert "[2/5] 2, 8→8, 12×10, v1, nchw, float32\n" in done.stderr
    assert "\r" not in done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["ops.json"]

    result = json.loads(path.read_text())
    assert result["command"].startswith("tools/benchmark.py ops --shapes 2x8x12x10,1x4x8x8:6 ")
    assert result["complete"]
    assert {"cpu", "cores", "memory_gib", "os"} <= set(result["machine"])
    assert {"mmdcn", "torch", "python", "mmdcn CPU kernels"} <= set(result["versions"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("| 2, 8→8, 12×10 |")]
    assert len(lines) == 4  # v1 and v2, forward and with backward
    times = result["cases"][0]["times"]["forward"]
    ratio = timing.median(times["mmdcn"]) / timing.median(times["dense"])
    assert f"({ratio:.2f}×)" in lines[0]
    assert [cell.strip() for cell in lines[0].split("|")][-2] == "yes"
    if "torchvision" in result["left_out"]:
        assert "Left out: torchvision: torchvision " in done.stdout


@pytest.mark.parametrize(
    ("kind", "word", "status"),
    [(KeyboardInterrupt, "interrupted", 130), (failures.Terminated, "terminated", 143)],
)
def test_an_interruption_keeps_what_is_measured(
    kind, word, status, quick, monkeypatch, tmp_path, capsys
):
    time_case = operators._time_case
    measured = []

    def interrupted(case, *rest):
        if measured:
            raise kind
        measured.append(case)
        return time_case(case, *rest)

    monkeypatch.setattr(operators, "_time_case", interrupted)
    path = tmp_path / "ops.json"
    command = ["ops", "--shapes", "1x4x8x8,1x4x9x9", "--peers", "dense", "--seconds", "0.001"]
    assert cli.main([*command, "--json", str(path)]) == status
    said = capsys.readouterr()
    assert f"{word}; measured so far: 1 cases, in {path}" in said.err
    assert "1, 4→4, 8×8" in said.out and "Interrupted: this is not all." in said.out
    result = json.loads(path.read_text())
    assert (len(result["cases"]), result["complete"]) == (1, False)
    # Nothing can be published of it.
    assert cli.main(["report", str(path), "--out", str(tmp_path / "cpu")]) == 1
    assert "interrupted" in capsys.readouterr().err


def test_report_writes_where_it_is_told(quick, tmp_path, capsys):
    run, target = tmp_path / "run.json", tmp_path / "docs" / "mine"
    command = ["ops", "--shapes", "1x4x8x8", "--peers", "none", "--seconds", "0.001"]
    assert cli.main([*command, "--forward-only", "--no-memory", "--json", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(run), "--out", str(target)]) == 0
    # Nothing for the picture to show.
    assert capsys.readouterr().out.split() == [f"{target}.json", f"{target}.md"]
    assert "1, 4→4, 8×8" in target.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("ops --shapes r18", "--shapes: expected design, variants, r50, or batch"),
        ("ops --shapes 1x2x3", "got '1x2x3'"),
        ("ops --device tpu", "--device: expected cpu or cuda, got 'tpu'"),
        ("ops --dtype float32,int8", "--dtype: expected float32 or float16 .* got 'int8'"),
        ("ops --versions v3", "--versions: expected v1 or v2, got 'v3'"),
        ("ops --layouts nhwc", "--layouts: expected nchw or channels_last, got 'nhwc'"),
        ("ops --peers detectron", "--peers: expected dense or mmcv .* got 'detectron'"),
        ("ops --batch 0", "--batch: expected a whole number of at least 1, got '0'"),
        ("ops --threads many", "--threads: expected a whole number of at least 1, got 'many'"),
        ("ops --threads 100000", r"--threads: expected at most the \d+ cores"),
        ("ops --offset-std -1", "--offset-std: expected a number of at least 0, got '-1'"),
        ("ops --seconds nan", "--seconds: expected a number above 0, got 'nan'"),
        ("ops --seconds 0", "--seconds: expected a number above 0, got '0'"),
        ("ops --json table.md", "--json: expected a name ending in .json, got 'table.md'"),
        ("detector --configs absent.py", "--configs: expected config files, got 'absent.py'"),
        ("detector --configs setup.py --size 320", "--size: expected width and height"),
        ("detector --configs setup.py --size 16x64", "--size: .* at least 32.* got '16x64'"),
        ("detector --configs setup.py --kernels cudnn", "--kernels: expected mmdcn or mmcv"),
        ("report run.txt --out cpu", "RUN.json: expected a name ending in .json"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"argument .*{message}", error), error


@pytest.mark.parametrize("command", ["ops", "family", "report run.json"])
def test_a_place_that_cannot_be_written_to_is_named_first(command, monkeypatch):
    """Not after minutes of measurement."""
    option = "--out" if "report" in command else "--json"
    with pytest.raises(InputError, match=rf"argument {option}: .*/dev/null"):
        cli.main([*command.split(), option, "/dev/null/results/run.json"])
