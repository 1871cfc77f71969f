"""The examples in the docstrings of the public interface: each name has one, and it runs."""

import ast
import doctest
import importlib
import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

#: Modules, and what they need beside torch.
_MODULES = {
    "mmdcn.ops": (),
    "mmdcn.layers": (),
    "mmdcn.plugin": ("mmdet", "mmcv.ops"),
    "mmdcn.models": ("mmdet", "mmcv.ops"),
    "mmdcn.datasets": ("cv2", "shapely", "rich"),
    "mmdcn.visualization": ("mmdet", "mmcv.ops"),
}


def _public_names(module):
    """A module's ``__all__`` or, where it has none, its functions; read without an import.

    A module that needs the toolbox does not import without it, and its cases exist all the same.
    """
    body = ast.parse(Path(importlib.util.find_spec(module).origin).read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    # Stand-ins for mmcv's functions have the arguments and the documentation of mmcv.
    stand_ins = ("deform_conv2d", "modulated_deform_conv2d", "deform_roi_pool")
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if not name.startswith("_") and name not in stand_ins]


def _environment(module):
    """What an example may name: torch, nn, what the module offers, and what goes into it."""
    names = {"torch": torch, "nn": nn, **vars(module)}
    if module.__name__ == "mmdcn.visualization":
        import numpy as np
        from matplotlib.figure import Figure
        from mmengine.structures import InstanceData

        from mmdcn import layers

        names |= {"Figure": Figure, "InstanceData": InstanceData, "np": np}
        names |= {name: getattr(layers, name) for name in layers.__all__}
    if module.__name__ == "mmdcn.datasets":
        import numpy as np
        import shapely

        names |= {"Path": Path, "np": np, "shapely": shapely, "tempfile": tempfile}
    return names


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in _MODULES for name in _public_names(module)]
)
def test_every_public_name_has_an_example_that_runs(module, name):
    for package in _MODULES[module]:
        pytest.importorskip(package, exc_type=ImportError)
    module = importlib.import_module(module)
    documented = getattr(module, name)
    assert documented.__doc__ and "    Example:\n" in documented.__doc__, f"{name} has no example"
    test = doctest.DocTestParser().get_doctest(
        documented.__doc__, _environment(module), name, None, None
    )
    assert test.examples, f"{name}'s example has no >>> lines"
    report = []
    # Not verbose, which it would else be wherever pytest is.
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)
