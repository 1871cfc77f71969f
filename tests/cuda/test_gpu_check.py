"""tools/gpu_check, without a GPU: its processes, its parts, and the command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdcn.benchmark.gpu import cli, parent, programs, sections, worker
from mmdcn.benchmark.gpu.sections import SECTIONS, Section
from mmdcn.benchmark.gpu.settings import Settings
from mmdcn.errors import InputError

ROOT = Path(__file__).parents[2]


def settings(folder: Path, **more) -> Settings:
    return Settings("cpu", str(folder), **more)


def ended(records: Path) -> list[dict]:
    return [line for line in parent._read(records) if "ended" in line]


# ---------------------------------------------------------------------- what processes do and fear

# A worker without torch: its cases are named after what becomes of them.
WORKER = """
import json, os, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
cases = json.loads(arguments["--settings"])["tests"].split(",")
def write(**line):
    with open(arguments["--records"], "a") as stream:
        stream.write(json.dumps(line) + chr(10))
if cases[0] == "silent":
    time.sleep(60)
write(cases=len(cases))
first, count = int(arguments["--first"]), int(arguments["--count"])
for number in range(first, len(cases) if count < 0 else first + count):
    name, status = cases[number], "passed"
    write(started=number, case=name)
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    if name == "fails":
        status = "failed"
    if name == "breaks CUDA":
        status = "device lost"
    write(ended=number, case=name, status=status, seconds=0.0)
    if status == "device lost":
        sys.exit(3)
if cases[-1] == "ends badly":
    sys.exit(7)
"""


@pytest.fixture
def run_section(tmp_path, monkeypatch):
    """``run_section(*cases)``: what the report has of a section of such cases."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = parent.Watched.command

    def scripted(*arguments):
        full = [str(part) for part in command(*arguments)]
        return [sys.executable, str(script), *full[3:]]

    monkeypatch.setattr(parent.Watched, "command", scripted)
    monkeypatch.setattr(programs, "find", lambda program: None)
    monkeypatch.setitem(SECTIONS, "simulated", Section("fast", "none.none", 60, case_seconds=1))

    def run(*cases, seconds=60):
        chosen = settings(tmp_path, tests=",".join(cases))
        log = tmp_path / "log"
        return parent.run_section("simulated", chosen, seconds, log, lambda entry: None)

    return run


def test_a_case_that_ends_its_process_is_lost_alone(run_section):
    entry = run_section("a", "dies", "b", "breaks CUDA", "c", "fails", "hangs", "d")
    assert [(case["case"], case["status"]) for case in entry["cases"]] == [
        ("a", "passed"),
        ("dies", "crashed"),
        ("b", "passed"),
        ("breaks CUDA", "device lost"),
        ("c", "passed"),
        ("fails", "failed"),
        ("hangs", "timed out"),
        ("d", "passed"),
    ]
    assert entry["status"] == "failed"
    assert entry["cases"][1]["error"] == "the process ended by SIGABRT"
    assert entry["cases"][6]["error"] == "not done after 1 s"
    for number in (1, 3):
        assert entry["cases"][number]["memcheck"] == "compute-sanitizer was not found"
    assert entry["cases"][6]["memcheck"] == "not run again, as others were before it"


def test_a_case_that_ends_its_process_is_run_again_under_memcheck(
    run_section, tmp_path, monkeypatch
):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\nshift 2\n"$@"\necho "========= ERROR SUMMARY: 1 error"\n')
    sanitizer.chmod(0o755)
    monkeypatch.setattr(programs, "find", lambda program: str(sanitizer))
    entry = run_section("a", "dies", "b")
    assert entry["cases"][1]["memcheck"] == "========= ERROR SUMMARY: 1 error"
    again = parent._read(settings(tmp_path).file("simulated 1 alone.records"))
    assert [line.get("case") for line in again] == [None, "dies"]
    assert entry["cases"][2]["status"] == "passed" and "memcheck" not in entry["cases"][2]


def test_sections_end_in_time(run_section):
    began = time.monotonic()
    entry = run_section("a", "hangs", "b", seconds=0.7)
    assert [case["status"] for case in entry["cases"]] == ["passed", "left out"]
    assert (entry["status"], entry["total"]) == ("incomplete", 3)
    assert time.monotonic() - began < 10


def test_processes_that_fail_outside_a_case(run_section, monkeypatch):
    entry = run_section("a", "ends badly")
    assert entry["status"] == "failed"
    assert entry["error"] == "its process ended by status 7 outside any case"
    monkeypatch.setattr(parent, "START_SECONDS", 0.5)
    entry = run_section("silent")
    assert (entry["status"], entry["cases"]) == ("failed", [])
    assert "no case began" in entry["error"]


def command(out: Path, *more: str) -> list[str]:
    arguments = ["--part", "fast", "--device", "cpu", "--out", str(out), "--sections", "ceilings"]
    return [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *arguments, *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def test_the_command_with_a_case_that_crashes(tmp_path):
    faults = json.dumps({"ceilings/read": "crash"})
    result = subprocess.run(
        command(tmp_path, "--faults", faults),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert result.returncode == 1, result.stderr
    assert "gpu_check: ceilings: failed or incomplete\n" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gpu_check_fast.{suffix}" for suffix in ("json", "md", "log")
    }
    found = json.loads((tmp_path / "gpu_check_fast.json").read_text())
    assert found["complete"]
    entry = found["sections"]["ceilings"]
    statuses = {case["case"]: case["status"] for case in entry["cases"]}
    assert len(statuses) == entry["total"]
    assert statuses.pop("read") == "crashed"
    assert set(statuses.values()) == {"passed"}
    assert "| ceilings | read | crashed | the process ended by SIGABRT" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the processes")
def test_processes_end_with_the_one_that_started_them(tmp_path):
    faults = json.dumps({"ceilings/copy": "hang"})
    with subprocess.Popen(
        command(tmp_path, "--faults", faults),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = []
        deadline = time.monotonic() + 60
        while not workers and time.monotonic() < deadline:
            time.sleep(0.1)
            workers = [int(number) for number in children.read_text().split()]
        assert workers
        process.send_signal(signal.SIGKILL)
        process.wait()
    while Path(f"/proc/{workers[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{workers[0]}").exists()


def test_a_process_whose_parent_has_ended_before_it_could_ask_ends(tmp_path):
    """As between fork and exec: here the one that is named is not the parent."""
    program = "from mmdcn.benchmark.gpu.processes import die_with_parent as d; d(1 << 30); print(1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path)
    assert done.returncode == 1 and b"1" not in done.stdout.splitlines()


def test_errors_leave_a_worker_as_far_as_the_device_works(tmp_path):
    faults = {"ceilings/copy": "error", "ceilings/read": "cuda"}
    records = tmp_path / "records"
    status = worker.run(settings(tmp_path, faults=faults), "ceilings", records)
    assert status == worker.DEVICE_LOST
    assert [case["status"] for case in ended(records)] == ["failed", "device lost"]
    assert "CUDA error: simulated error" in ended(records)[0]["error"]


# ------------------------------------------------------------------------------- parts and programs


def test_parts_have_their_sections_and_no_more_time_than_they_may():
    for part in sections.PARTS:
        chosen = sections.of_part(part)
        assert next(iter(chosen)) == "environment"
        assert sum(section.seconds for section in chosen.values()) <= sections.PART_SECONDS + 60
    assert list(sections.of_part("correct"))[1] == "smoke"
    assert SECTIONS["smoke"].seconds <= 60


def test_what_time_does_not_suffice_for_is_left_out(tmp_path, monkeypatch, capsys):
    ran = []

    def run_section(name, chosen, seconds, log, changed):
        ran.append(name)
        entry = {"status": "passed", "seconds": 1.0, "total": 0, "cases": []}
        changed(entry)
        return entry

    monkeypatch.setattr(parent, "run_section", run_section)
    for name in ("die_with_parent", "turn_termination_into_an_exception"):
        monkeypatch.setattr(cli, name, lambda: None)
    arguments = ["--part", "correct", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--sections", "products,smoke"]) == 0
    assert ran == ["smoke", "products"]
    assert cli.main([*arguments, "--seconds", "0"]) == 1
    assert "no time was left" in capsys.readouterr().out
    for wrong in (["--sections", "convolution"], ["--device", "cuda"]):
        if torch.cuda.is_available() and "cuda" in wrong:
            continue
        with pytest.raises(SystemExit):
            cli.main([*arguments, *wrong])
    assert "got convolution" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"argument --out: .*/dev/null"):
        cli.main([*arguments, "--out", "/dev/null/results"])
    assert ran == ["smoke", "products"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_in_one_sentence():
    result = subprocess.run(
        ["bash", ROOT / "tools" / "gpu_check.sh"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "torch sees no CUDA device" in result.stderr
