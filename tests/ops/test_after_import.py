"""Actions after the import of modules, which nobody else notices."""

import importlib
import inspect
import sys
from importlib.machinery import SourceFileLoader

from mmdcn.ops._after_import import after_import, constant_to_the_compiler
from tests.programs import run_python


def test_actions_come_at_once_or_after_the_import(tmp_path, monkeypatch):
    (tmp_path / "an_exporter.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    before = list(sys.meta_path)
    after_import("json", lambda: told.append("json"))
    assert told == ["json"]  # which is imported already
    assert sys.meta_path == before
    after_import("an_exporter", lambda: told.append(sys.modules["an_exporter"].value))
    after_import("an_exporter", lambda: told.append("again"))
    module = importlib.import_module("an_exporter")
    assert told == ["json", 3, "again"]
    # As if nobody had looked on.
    assert sys.meta_path == before
    assert type(module.__spec__.loader) is type(module.__loader__) is SourceFileLoader
    assert "value = 3" in inspect.getsource(module)


def test_constants_are_as_torch_marks_them():
    import torch._dynamo

    def ours():
        return 1

    def theirs():
        return 1

    assert constant_to_the_compiler(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


BEFORE_THE_COMPILER = """
import sys
import torch
import mmdcn
from mmdcn.ops import _devices, deform_conv2d
from mmdcn.ops._registration import Operator
assert "torch._dynamo" not in sys.modules
arguments = torch.randn(1, 2, 5, 5), torch.zeros(1, 18, 3, 3), torch.randn(2, 2, 3, 3)
expected = deform_conv2d(*arguments)
assert "torch._dynamo" not in sys.modules
computed = torch.compile(deform_conv2d, fullgraph=True, backend="eager")(*arguments)
assert torch.equal(computed, expected)
assert Operator.elsewhere._torchdynamo_disable
print("compiled")
"""


def test_the_compiler_is_imported_by_those_who_use_it():
    """Its import takes more than a second; what it is told of the operators comes with it."""
    assert run_python("-c", BEFORE_THE_COMPILER).splitlines()[-1] == "compiled"
