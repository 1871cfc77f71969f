"""A tiny project, and a detector trained in it once for all tests of the tools."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from . import project as tiny


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> tiny.Project:
    return tiny.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def trained(project) -> Path:
    """The work folder of one epoch's training through `tools/train.py`."""
    command = ["train.py", project.config, "--work-dir", "trained"]
    result = tiny.run_tool(*command, cwd=project.root)
    assert result.returncode == 0, result.stdout
    return project.root / "trained"


@pytest.fixture
def run_here(project, monkeypatch) -> Callable:
    """``run_here("test.py", config, ...)``: the tool in this process, which has the toolbox.

    Where all is not well, it ends in a SystemExit.
    """
    from mmdcn.engine import launch

    monkeypatch.chdir(project.root)

    def run(name: str, *arguments: object) -> None:
        path = tiny.REPOSITORY / "tools" / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        launch.run(tool.main, tool.parse_args)

    return run
