"""A detector as an ONNX file of standard operators, compared with PyTorch.

The file holds a whole detector, from images to detections
(:class:`mmdcn.deploy.detector.EndToEnd`), or its network alone, up to the heads' raw outputs
(:class:`mmdcn.engine.network.Network`).
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdcn import files, machine, timing
from mmdcn.deploy.comparison import HALF, SINGLE, LargestError, Matches
from mmdcn.engine.network import (
    Exportable,
    ExportError,
    Network,
    build,
    find_images,
    load_images,
)
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import first_line

__all__ = ["ExportError", "Network", "Verified", "build", "export", "find_images", "load_images"]

# Height and width of the images that are traced. A pyramid's level of stride 128 has 4 × 5 pixels.
_TRACED_SIZE = (416, 608)
# What a bound on a size is worth mentioning below.
_LARGEST_SIZE = 1 << 20


# ----------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Verified:
    """How the file compares with PyTorch.

    Attributes:
        comparison: of outputs, or of detections.
        milliseconds: median time for one image, by the name of what computed it.
        shape: the shape of that image.
    """

    comparison: LargestError | Matches
    milliseconds: dict[str, float]
    shape: tuple[int, ...]


def export(
    network: Exportable,
    images: Sequence[tuple[Tensor, ...]],
    path: Path,
    seconds: float = 5.0,
    report: Callable[[str], None] = lambda step: None,
    verify: bool = True,
    half: bool = False,
) -> Verified | None:
    """Write the network to an ONNX file, and compare it with PyTorch on images.

    Batch, height and width stay open, and the number of boxes that a network is given. The file
    appears under its name only once it has been verified.

    Args:
        network: what to write.
        images: inputs of the network, for one image each.
        path: the file.
        seconds: how long to measure the speed of each.
        report: is told what begins.
        verify: whether the file is compared, for which onnxruntime is needed.
        half: whether the network's layers are written in float16.

    Raises:
        ExportError: an operation has no counterpart among ONNX's standard operators, or the file
            computes something else than PyTorch.
        ConfigError: a package that the exporter needs is missing or too old, or there can be no
            such file.
        OSError: the disk takes no more.
    """
    try:
        import onnx

        import mmdcn.ops.onnx  # noqa: F401

        problem = machine.onnxruntime_problem() if verify else None
    except ImportError as error:
        raise ConfigError(
            f"the export needs onnx, onnxscript and onnxruntime: {error}; "
            "`pip install onnx onnxscript onnxruntime`"
        ) from error
    if problem is not None and _is_deformable(network, images[0]):
        raise ConfigError(f"the file cannot be compared with PyTorch here, as asked for: {problem}")
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: expected the name of a file, got a folder")
    try:
        with files.once_complete(path) as temporary:
            temporary.touch()  # Fails before anything is computed, where it cannot be written.
            report("writing the network, which may take minutes")
            _write(network, images[0], temporary, half)
            _refuse_other_operators(onnx.load(temporary))
            if not verify:
                return None
            report("comparing onnxruntime with PyTorch")
            comparison = network.comparison(HALF if half else SINGLE)
            return _verify(network, images, str(temporary), comparison, seconds)
    except OSError as error:
        if error.errno in files.DISK_ERRORS:
            raise
        raise ConfigError(f"cannot write {path}: {error}") from error


def _write(
    network: Exportable, example: tuple[Tensor, ...], path: Path, half: bool = False
) -> None:
    from mmdcn.deploy.half_precision import to_half
    from mmdcn.deploy.translations import TRANSLATIONS

    # A size of 1, of the batch or of a pyramid's last level, would be taken for one that never
    # changes, and two sizes that are equal for one.
    example = network.twice(example)
    traced = (example[0].new_zeros(2, 3, *_TRACED_SIZE), *example[1:])
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})[: len(example)]
    with torch.no_grad():
        try:
            program = torch.export.export(network, traced, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            where = _module_of(error, network)
            raise ExportError(f"{where} cannot be exported: {_reason(error)}") from error
        _check_open(program)
        network(*example)  # This call names a network's outputs.
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=network.input_names,
                output_names=network.output_names,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"{_node_of(error)} has no counterpart among ONNX's standard operators: "
                f"{first_line(_innermost(error))}"
            ) from error
    if half:
        to_half(onnx_program.model)
    precision = json.dumps("float16" if half else "float32")
    onnx_program.model.metadata_props.update({**network.metadata, "mmdcn.precision": precision})
    onnx_program.save(path, external_data=False)


def _check_open(program: torch.export.ExportedProgram) -> None:
    """Raise ExportError where the traced code holds for sizes up to some bound only."""
    for node in program.graph.find_nodes(op="placeholder"):
        shape = getattr(node.meta.get("val"), "shape", ())
        for dimension, size in enumerate(shape):
            if not isinstance(size, torch.SymInt):
                continue
            values = program.range_constraints.get(size.node.expr)
            if values is not None and values.upper < _LARGEST_SIZE:
                raise ExportError(
                    f"the network cannot be exported: its code holds up to {values.upper} for "
                    f"{node.name}.shape[{dimension}], which must stay open"
                )


class _Names(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(function.name())
        return function(*args, **(kwargs or {}))


def _is_deformable(network: Exportable, example: tuple[Tensor, ...]) -> bool:
    """Whether the network calls an operator that becomes ``DeformConv``."""
    with torch.no_grad(), _Names() as names:
        network(*example)
    return not names.called.isdisjoint(("mmdcn::deform_conv2d", "mmdcn::deform_aggregate"))


def _refuse_other_operators(model) -> None:
    """Raise ExportError for a node that is not of ONNX's own domain."""
    for node in [*model.graph.node, *(node for f in model.functions for node in f.node)]:
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"{node.name} ({node.domain}::{node.op_type}) has no counterpart among ONNX's "
                "standard operators"
            )


def _reason(error: BaseException) -> str:
    """The error's first line, or which sizes the network's code turns into constants."""
    fixed = re.findall(r"\['(\w+)'\]\.size\(\)\[(\d)\] as dynamic .* a constant", str(error))
    if not fixed:
        return first_line(error)
    sizes = " and ".join(f"{name}.shape[{dimension}]" for name, dimension in fixed)
    return f"its code makes a constant of {sizes}, which must stay open"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _values(error: BaseException, name: str) -> Iterator[Any]:
    """The values of a local variable of this name in the calls that the error went through.

    The exporters' messages do not always say where in the network they stopped.
    """
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if name in frame.f_locals:
                yield frame.f_locals[name]
        error = error.__cause__


def _node_of(error: BaseException) -> str:
    """The node that the exporter stopped at, and the module that it stands for."""
    where = "the network"
    for node in _values(error, "node"):
        if isinstance(node, torch.fx.Node):
            modules = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
            where = f"{node.name} ({node.target}, in {modules[-1] if modules else 'the network'})"
    return where


def _module_of(error: BaseException, network: Exportable) -> str:
    """The innermost module in whose ``forward`` the export stopped."""
    names = {module: name for name, module in network.detector.named_modules()}
    where = "the network"
    for module in _values(error, "self"):
        if isinstance(module, nn.Module) and names.get(module):
            where = f"{names[module]} ({type(module).__name__})"
    return where


# ------------------------------------------------------------------------------------ verification


def _verify(
    network: Exportable,
    images: Sequence[tuple[Tensor, ...]],
    path: str,
    comparison: LargestError | Matches,
    seconds: float,
) -> Verified:
    session = machine.onnxruntime_session(path)

    def in_pytorch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return network(*inputs)

    def in_onnxruntime(inputs: Sequence[Tensor]) -> list:
        return session.run(None, dict(zip(network.input_names, (t.numpy() for t in inputs))))

    for inputs in (*images, network.twice(images[0])):
        actual = [torch.from_numpy(output) for output in in_onnxruntime(inputs)]
        try:
            comparison.add(network.output_names, in_pytorch(inputs), actual)
        except ExportError as error:
            shape = tuple(inputs[0].shape)
            raise ExportError(f"{error}, for images of {shape}") from error
    comparison.check()
    calls = {
        "PyTorch": timing.Call(lambda: in_pytorch(images[0])),
        "onnxruntime": timing.Call(lambda: in_onnxruntime(images[0])),
    }
    samples = timing.interleave(calls, torch.device("cpu"), timing.Budget(seconds, fewest=3))
    medians = {name: timing.median(taken) for name, taken in samples.items()}
    return Verified(comparison, medians, tuple(images[0][0].shape))
