"""A tiny project, and a detector trained in it once for all tests of the tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import project as tiny


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> tiny.Project:
    return tiny.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def trained(project) -> Path:
    """The work folder of one epoch's training through `tools/train.py`."""
    result = tiny.run_tool("train.py", project.config, "--work-dir", "trained", cwd=project.root)
    assert result.returncode == 0, result.stdout
    return project.root / "trained"
