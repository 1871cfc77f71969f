"""A detector's network as an ONNX file of standard operators, compared with PyTorch.

The network is what learns: backbone, neck and heads, up to the heads' raw outputs. What comes
before (resizing, normalisation, padding) and after (decoding of boxes, NMS) is the toolbox's, and
not in the file.
"""

from __future__ import annotations

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
from mmdcn.engine.network import ExportError, Network, build, find_images, load_images
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import first_line

__all__ = ["ExportError", "Network", "Verified", "build", "export", "find_images", "load_images"]

# Distance of onnxruntime's outputs from PyTorch's, relative to the largest element of each output
# (or to 1, where that is smaller), up to which they are the same.
TOLERANCE = 1e-4


# ----------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Verified:
    """How the file compares with PyTorch.

    Attributes:
        largest_error: over all outputs and images, relative to the largest element of the output
            in PyTorch, or to 1 where that is smaller.
        output: the name of the output that has it.
        milliseconds: median time for one image, by the name of what computed it.
        shape: the shape of that image.
    """

    largest_error: float
    output: str
    milliseconds: dict[str, float]
    shape: tuple[int, ...]


def export(
    network: Network,
    images: Sequence[tuple[Tensor, ...]],
    path: Path,
    seconds: float = 5.0,
    report: Callable[[str], None] = lambda step: None,
    verify: bool = True,
) -> Verified | None:
    """Write the network to an ONNX file, and compare it with PyTorch on images.

    Batch, height, width and the number of boxes stay open. The file appears under its name only
    once it has been verified.

    Args:
        network: what to write.
        images: inputs of the network, for one image each.
        path: the file.
        seconds: how long to measure the speed of each.
        report: is told what begins.
        verify: whether the file is compared, for which onnxruntime is needed.

    Raises:
        ExportError: an operation has no counterpart among ONNX's standard operators, or the file
            computes something else than PyTorch.
        ConfigError: a package that the exporter needs is missing or too old, or there can be no
            such file.
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
            _write(network, images[0], temporary)
            _refuse_other_operators(onnx.load(temporary))
            if not verify:
                return None
            report("comparing onnxruntime with PyTorch")
            return _verify(network, images, str(temporary), seconds)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _write(network: Network, example: tuple[Tensor, ...], path: Path) -> None:
    # A size of 1 would be taken for one that never changes.
    example = (example[0].repeat(2, 1, 1, 1), *(_boxes_of_both(boxes) for boxes in example[1:]))
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})[: len(example)]
    with torch.no_grad():
        try:
            program = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            where = _module_of(error, network)
            raise ExportError(f"{where} cannot be exported: {_reason(error)}") from error
        network(*example)  # This call names the outputs.
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=network.input_names,
                output_names=network.output_names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"{_node_of(error)} has no counterpart among ONNX's standard operators: "
                f"{first_line(_innermost(error))}"
            ) from error
    onnx_program.save(path, external_data=False)


class _Names(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(function.name())
        return function(*args, **(kwargs or {}))


def _is_deformable(network: Network, example: tuple[Tensor, ...]) -> bool:
    """Whether the network calls the operator that becomes ``DeformConv``."""
    with torch.no_grad(), _Names() as names:
        network(*example)
    return "mmdcn::deform_conv2d" in names.called


def _boxes_of_both(boxes: Tensor) -> Tensor:
    again = boxes.clone()
    again[:, 0] = 1
    return torch.cat([boxes, again])


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


def _module_of(error: BaseException, network: Network) -> str:
    """The innermost module in whose ``forward`` the export stopped."""
    names = {module: name for name, module in network.detector.named_modules()}
    where = "the network"
    for module in _values(error, "self"):
        if isinstance(module, nn.Module) and names.get(module):
            where = f"{names[module]} ({type(module).__name__})"
    return where


# ------------------------------------------------------------------------------------ verification


def _verify(
    network: Network, images: Sequence[tuple[Tensor, ...]], path: str, seconds: float
) -> Verified:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # onnxruntime's idle threads would slow PyTorch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def in_pytorch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return network(*inputs)

    def in_onnxruntime(inputs: Sequence[Tensor]) -> list:
        return session.run(None, dict(zip(network.input_names, (t.numpy() for t in inputs))))

    first, *others = images[0]
    both = (torch.cat([first, first.flip(3)]), *map(_boxes_of_both, others))
    largest = (0.0, network.output_names[0])
    for inputs in (*images, both):
        results = zip(network.output_names, in_pytorch(inputs), in_onnxruntime(inputs))
        for name, expected, actual in results:
            actual = torch.from_numpy(actual)
            if actual.shape != expected.shape:
                raise ExportError(
                    f"{name}: expected shape {tuple(expected.shape)} as in PyTorch, got "
                    f"{tuple(actual.shape)} in onnxruntime, for images of {tuple(inputs[0].shape)}"
                )
            error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))
            # `>` would not do, as the error may be NaN.
            if not error <= TOLERANCE:
                raise ExportError(
                    f"{name}: expected onnxruntime's result within {TOLERANCE} of PyTorch's, got "
                    f"an error of {error:.2g} for images of {tuple(inputs[0].shape)}"
                )
            largest = max(largest, (error, name))
    calls = {
        "PyTorch": timing.Call(lambda: in_pytorch(images[0])),
        "onnxruntime": timing.Call(lambda: in_onnxruntime(images[0])),
    }
    samples = timing.interleave(calls, torch.device("cpu"), timing.Budget(seconds, fewest=3))
    medians = {name: timing.median(taken) for name, taken in samples.items()}
    return Verified(*largest, medians, tuple(first.shape))
