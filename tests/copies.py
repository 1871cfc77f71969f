"""Copies of the source tree, in which something is built or changed without touching the tree."""

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_COPIED = ("mmdcn", "tests", "tools", "configs", "setup.py", "pyproject.toml", "README.md")
_LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", ".mim", ".*_cache")


def copy_source(target: Path) -> None:
    """Copy the tree's sources into a folder, with their times; what is compiled there stays."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_LEFT_OUT, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target / name)
