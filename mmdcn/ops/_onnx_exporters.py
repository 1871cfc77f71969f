"""Registration of the translations to ONNX with torch's two exporters, once they are imported.

So ``import mmdcn`` is all that ``torch.onnx.export`` needs, and imports neither of them, nor
onnxscript: that takes a second, and is not everywhere.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _for_dynamo() -> None:
    importlib.import_module("mmdcn.ops.onnx")


def _for_torchscript() -> None:
    importlib.import_module("mmdcn.ops._onnx_symbolic").register()


#: What is to be done after the import of a module.
_AFTER_IMPORT = {
    # The exporter imports this at every export, and looks for translations afterwards.
    "torch.onnx._internal.exporter._torchlib.ops": _for_dynamo,
    "torch.onnx": _for_torchscript,
}


class _AfterImport(MetaPathFinder, Loader):
    """An import of a module, in its ordinary way, and what is to be done after it."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()


def register() -> None:
    """Register with each exporter now, where it is imported, or else as soon as it is."""
    for module, action in _AFTER_IMPORT.items():
        if module in sys.modules:
            action()
        else:
            sys.meta_path.insert(0, _AfterImport(module, action))
