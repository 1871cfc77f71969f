"""Actions after the import of modules that take long to import and are not used by everybody.

So ``import mmdcn`` tells torch's compiler and its exporters what they need to know, and imports
none of them: the compiler takes more than a second, the exporters another, and not all are
everywhere.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def after_import(module: str, action: Callable[[], object]) -> None:
    """Act now, where the module is imported, or else as soon as it is."""
    if module in sys.modules:
        action()
        return
    for finder in sys.meta_path:
        if isinstance(finder, _AfterImport) and finder.module == module:
            finder.actions.append(action)
            return
    sys.meta_path.insert(0, _AfterImport(module, action))


def constant_to_the_compiler(function: Function) -> Function:
    """``torch.compiler.assume_constant_result(function)``, which would import the compiler."""
    after_import("torch._dynamo", lambda: torch.compiler.assume_constant_result(function))
    return function


class _AfterImport(MetaPathFinder, Loader):
    """An import of a module, in its ordinary way, and what is to be done after it."""

    def __init__(self, module: str, action: Callable[[], object]) -> None:
        self.module, self.actions = module, [action]

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
        for action in self.actions:
            action()
