"""Registration of the translations to ONNX with torch's two exporters, once they are imported."""

from __future__ import annotations

import importlib

from ._after_import import after_import


def _for_dynamo() -> None:
    importlib.import_module("mmdcn.ops.onnx")


def _for_torchscript() -> None:
    importlib.import_module("mmdcn.ops._onnx_symbolic").register()


def register() -> None:
    """Register with each exporter now, where it is imported, or else as soon as it is."""
    # The exporter imports this at every export, and looks for translations afterwards.
    after_import("torch.onnx._internal.exporter._torchlib.ops", _for_dynamo)
    after_import("torch.onnx", _for_torchscript)
