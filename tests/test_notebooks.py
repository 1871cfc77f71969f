"""The notebooks of the documentation, which run from top to bottom."""

import ast
import json
import re

import pytest

pytest.importorskip("mmdet")

from tests.programs import REPOSITORY, Program
from tests.tools.project import environment

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
#: What each names in its first cell, and what it is set to here.
SMALLER = {"ITERATIONS": "1", "TRAIN_IMAGES, VAL_IMAGES": "8, 1"}


@pytest.mark.skipif(not NOTEBOOKS, reason="the tests are alone here, without the documentation")
def test_a_notebook_is_stored_without_what_it_showed():
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if "outputs" in cell]
        assert cells and not any(cell["outputs"] for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for name, value in SMALLER.items():
        code[0], count = re.subn(rf"^{name} = .*$", f"{name} = {value}", code[0], flags=re.M)
        assert count == 1
    # As a notebook does, each cell shows the value of its last line.
    shown = []
    for index, cell in enumerate(code):
        tree = ast.parse(cell)
        if isinstance(tree.body[-1], ast.Expr):
            shown.append(index)
            last = ast.unparse(tree.body.pop())
            code[index] = f"{ast.unparse(tree)}\nprint('SHOWN {index}', type({last}).__name__)"
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(code))
    done = Program([program], tmp_path, environment(tmp_path)).finish()
    assert done.returncode == 0, done.stdout
    said = dict(re.findall(r"^SHOWN (\d+) (\w+)$", done.stdout, re.MULTILINE))
    assert len(said) == len(shown)
    assert {"PngImageFile", "Image", "float"} <= set(said.values())
