"""What every tool that writes files leaves where the disk takes no more, and that it goes on after.

The system's limit on the size of a file stands for the full disk: each write beyond it fails. Disks
that are read-only are mounted.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

from mmengine.config import ConfigDict

from tests.limits import limited_files

from .project import REPOSITORY, Project

TOOLS = {path.name for path in (REPOSITORY / "tools").glob("*.py")}
# They write no file of their own, or measure a GPU.
WRITE_NOTHING = {"dist_run.py", "fuzz.py", "gpu_check.py"}
# Files that grow line by line, and what may be cut off.
LOGS = re.compile(r"\.log$|/vis_data/|/\.lock$")


@dataclass(frozen=True)
class Case:
    """A tool that writes.

    Args:
        tool: its name.
        arguments: with CONFIG, CHECKPOINT, IMAGE and OUT in them.
        writes: the files below OUT that are there once it has ended well.
        limit: bytes that a file may have.
        goes_on: whether it is run again, where no other test does so.
    """

    tool: str
    arguments: str
    writes: tuple[str, ...]
    limit: int = 6000  # a config has less
    goes_on: bool = True


CASES = [
    Case("train.py", "CONFIG --work-dir OUT", ("epoch_1.pth", "last_checkpoint"), 100),
    # The log and the config fit, and the checkpoint does not.
    Case("train.py", "CONFIG --work-dir OUT", ("epoch_1.pth", "last_checkpoint"), 300_000),
    Case("test.py", "CONFIG CHECKPOINT --work-dir OUT/work --out OUT/found.pkl", ("found.pkl",)),
    Case(
        "export_onnx.py",
        "CONFIG CHECKPOINT -o OUT/model.onnx --no-verify",
        ("model.onnx",),
        goes_on=False,
    ),
    Case(
        "image_demo.py",
        "IMAGE CONFIG CHECKPOINT --out-dir OUT",
        ("vis/val1.png", "preds/val1.json"),
    ),
    Case(
        "visualize_sampling.py",
        "CONFIG CHECKPOINT IMAGE --points 20,30 --out OUT/points.png",
        ("points.png", "points.html"),
    ),
    Case(
        "make_warped_shapes.py",
        "OUT/shapes --train-images 1 --val-images 1 --strengths",
        ("shapes/annotations/train.json", "shapes/annotations/val.json"),
    ),
    Case(
        "benchmark.py",
        "ops --shapes 1x8x8x8 --versions v1 --peers none --forward-only --seconds 0.001 "
        "--json OUT/ops.json",
        ("ops.json",),
        100,
        goes_on=False,
    ),
    Case(
        "evidence.py",
        "--report-only --reuse RUNS --work-dir OUT/work --out OUT/evidence",
        ("evidence.md", "evidence/runs.json"),
        20_000,
    ),
    Case(
        "check_zoo.py",
        "--results OUT/zoo.json --out OUT/zoo.md",
        ("zoo.json", "zoo.md"),
        100,
    ),
    Case("demo.py", "--work-dir OUT --train-images 1 --val-images 1", (), goes_on=False),
]


@pytest.fixture
def call(project: Project, trained: Path, tmp_path: Path, monkeypatch) -> Callable:
    """``call(case)``: the tool in this process, as a program; gives its last words."""
    words = {
        "CONFIG": str(project.config),
        "CHECKPOINT": str(trained / "epoch_1.pth"),
        "IMAGE": str(project.data / "images" / "val1.png"),
        "RUNS": str(REPOSITORY / "docs" / "evidence" / "runs.json"),
        "OUT": str(tmp_path / "out"),
    }
    monkeypatch.chdir(tmp_path)

    def run(case: Case) -> str:
        arguments = re.sub(r"\b[A-Z]{3,}\b", lambda word: words[word[0]], case.arguments).split()
        monkeypatch.setattr(sys, "argv", [case.tool, *arguments])
        # pytest's own file, into which both would go, has the limit too.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_path(str(REPOSITORY / "tools" / case.tool), run_name="__main__")
            except SystemExit as end:
                return str(end.code)
        return ""

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not LOGS.search(path.as_posix())
    }


def test_every_tool_that_writes_is_tried():
    assert {case.tool for case in CASES} == TOOLS - WRITE_NOTHING


def marked(case: Case):
    """Exporting takes long, and a smaller limit would end it no earlier."""
    marks = [pytest.mark.slow] if case.tool == "export_onnx.py" else []
    return pytest.param(case, marks=marks, id=f"{case.tool}-{case.limit}")


@pytest.mark.parametrize("case", map(marked, CASES))
def test_a_disk_that_takes_no_more(case: Case, call, tmp_path, monkeypatch):
    checked_as(monkeypatch)
    out = tmp_path / "out"
    with limited_files(case.limit):
        said = call(case)
    assert said.startswith("error: the disk of ") and " takes no more (" in said, said
    left = contents(out)
    assert not [name for name in left if name.endswith(".new")]
    assert not [name for name, content in left.items() if len(content) >= case.limit]

    if not case.goes_on:
        assert not set(case.writes) & set(left)
        return
    assert call(case) == ""
    assert set(case.writes) <= set(contents(out))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """OUT is on a disk that takes nothing."""
    out = tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", out]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes rights that this process has not")
    yield out
    subprocess.run(["umount", out], check=True)


@pytest.mark.parametrize("case", {case.tool: marked(case) for case in CASES}.values())
def test_a_disk_that_is_read_only(case: Case, call, read_only, monkeypatch):
    checked_as(monkeypatch)
    said = call(case)
    assert said.startswith("error: ") and str(read_only) in said and "read-only" in said.lower()
    assert len(said.splitlines()) == 1
    assert not contents(read_only)


def checked_as(monkeypatch) -> None:
    """One config of mmdet's is found, and found right, at once, which else takes seconds."""
    from mmdcn import zoo
    from mmdcn.zoo import checking

    found = zoo.Found("a.py", ConfigDict(type="A"), {"DCN": 1})
    monkeypatch.setattr(zoo, "find", lambda *_: [found])
    monkeypatch.setattr(checking, "check", lambda _: zoo.Checked(3, 3, 0.0))
