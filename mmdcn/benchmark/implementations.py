"""Our operator, and the peers that it is measured against, behind one interface.

An implementation binds a case's tensors, and gives back a function that computes the output from
them, without arguments. Peers are imported when they are asked for, and those that are missing say
so in words.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcn.errors import named_first_line
from mmdcn.machine import onnxruntime_problem, onnxruntime_session
from mmdcn.ops import deform_conv2d, reference

from .cases import DTYPES, LAYOUTS, Case

if TYPE_CHECKING:
    import onnx

# ONNX defines DeformConv since this version of its operators, which these files may hold.
ONNX_OPSET = 19
ONNX_FILE_VERSION = 9


@dataclass(frozen=True)
class Bound:
    """An implementation with its tensors.

    Attributes:
        forward: computes the output; differentiable, unless `leaves` is empty.
        leaves: the tensors that get a gradient, by name.
        grad_output: the gradient of the output, as `forward` gives it.
        function: computes the output of tensors like the leaves, in their order, where there is
            such a function.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    grad_output: Tensor | None = None
    function: Callable[..., Tensor] | None = None

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def train(self) -> Tensor:
        """One forward and backward pass, as in training: gradients start at None."""
        self.drop_gradients()
        output = self.forward()
        output.backward(self.grad_output)
        return output

    def drop_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}


class Implementation:
    """Something that computes cases.

    Attributes:
        name: its column in tables.
        deformable: whether its results are those of ours.
        backward: whether it has a backward pass.
        threads: the number of threads that it runs on; None: what torch is set to.
    """

    name: str
    deformable = True
    backward = True
    threads: int | None = None

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be used at all, or None."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Why it cannot compute a case, or None."""
        return None

    def bind(self, case: Case, tensors: dict[str, Tensor]) -> Bound:
        """Bind copies of a case's tensors, in the case's dtype and layout."""
        raise NotImplementedError


def _leaves(
    case: Case, tensors: dict[str, Tensor], names: tuple[str, ...], wide: bool
) -> dict[str, Tensor]:
    """Copies of tensors, in a case's dtype and layout; offset and mask in float32 where `wide`."""
    leaves = {}
    for name in names:
        if name not in tensors:
            continue
        dtype = getattr(torch, case.dtype)
        if wide and name in ("offset", "mask") and dtype.itemsize < 4:
            dtype = torch.float32
        copied = tensors[name].detach().to(dtype, copy=True)
        copied = copied.contiguous(memory_format=getattr(torch, LAYOUTS[case.layout]))
        leaves[name] = copied.requires_grad_(name != "grad_output")
    return leaves


class _TorchImplementation(Implementation):
    """An implementation that is a function of torch tensors."""

    takes = ("input", "offset", "weight", "mask")
    wide_offsets = False

    def compute(self, case: Case, **tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def bind(self, case: Case, tensors: dict[str, Tensor]) -> Bound:
        leaves = _leaves(case, tensors, (*self.takes, "grad_output"), self.wide_offsets)
        grad_output = leaves.pop("grad_output")
        return Bound(lambda: self.compute(case, **leaves), leaves, grad_output)


class Mmdcn(_TorchImplementation):
    """Our operator."""

    name = "mmdcn"
    wide_offsets = True

    def compute(self, case, input, offset, weight, mask=None):
        return deform_conv2d(input, offset, weight, None, mask=mask, **case.arguments())


class MmdcnFloat32(Mmdcn):
    """Our operator on the same problem in float32, beside those of lower precision."""

    name = "mmdcn float32"

    def refuses(self, case: Case) -> str | None:
        return None if DTYPES[case.dtype] < 4 else f"the same as mmdcn in {case.dtype}"

    def bind(self, case: Case, tensors: dict[str, Tensor]) -> Bound:
        return super().bind(replace(case, dtype="float32"), tensors)


class MmdcnOneThread(Mmdcn):
    """Our operator on one thread."""

    name = "mmdcn, 1 thread"
    threads = 1

    def missing(self, device: torch.device) -> str | None:
        return "threads are the CPU's" if device.type == "cuda" else None


class Equation(_TorchImplementation):
    """The equation in plain PyTorch."""

    name = "plain PyTorch"

    def compute(self, case, input, offset, weight, mask=None):
        return reference.deform_conv_nd(input, offset, weight, None, mask=mask, **case.arguments())


class Dense(_TorchImplementation):
    """torch's convolution of the same shape: oneDNN's on the CPU, cuDNN's on CUDA."""

    name = "dense"
    deformable = False
    takes = ("input", "weight")

    def compute(self, case, input, weight):
        return F.conv2d(input, weight, None, groups=case.groups, **case.arguments())


class Mmcv(_TorchImplementation):
    """mmcv's own kernels, whether the plugin is installed or not."""

    name = "mmcv"

    def missing(self, device: torch.device) -> str | None:
        return _import_problem("mmcv", "mmcv.ops")

    def refuses(self, case: Case) -> str | None:
        if case.layout != "nchw":
            return "reads its tensors as if they were NCHW"
        return None

    def compute(self, case, input, offset, weight, mask=None):
        numbers = (*case.arguments().values(), case.groups, case.deform_groups)
        if mask is None:
            return _apply_of("DeformConv2dFunction")(input, offset, weight, *numbers)
        apply = _apply_of("ModulatedDeformConv2dFunction")
        return apply(input, offset, mask, weight, None, *numbers)


def _apply_of(name: str) -> Callable[..., Tensor]:
    """``apply`` of one of mmcv's autograd functions, as mmcv has it.

    The plugin's stand-in is an attribute of the class itself. What the class inherits is untouched,
    and leads to mmcv's kernels.
    """
    from mmcv.ops import deform_conv, modulated_deform_conv

    function = getattr(deform_conv, name, None) or getattr(modulated_deform_conv, name)
    return super(function, function).apply


class Torchvision(_TorchImplementation):
    name = "torchvision"

    def missing(self, device: torch.device) -> str | None:
        return _import_problem("torchvision", "torchvision.ops")

    def compute(self, case, input, offset, weight, mask=None):
        from torchvision.ops import deform_conv2d

        return deform_conv2d(input, offset, weight, None, mask=mask, **case.arguments())


class OnnxRuntime(Implementation):
    """onnxruntime's ``DeformConv`` on the CPU, with the weight as a constant of the model.

    Attributes:
        keep_memory: whether its arena keeps what it took, as it does unless told otherwise.
    """

    name = "onnxruntime"
    backward = False

    def __init__(self, threads: int | None = None, keep_memory: bool = True) -> None:
        self.session_threads = threads
        self.keep_memory = keep_memory

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return "measured on the CPU only"
        return (
            _import_problem("onnxruntime", "onnxruntime")
            or _import_problem("onnx", "onnx")
            or onnxruntime_problem()
        )

    def refuses(self, case: Case) -> str | None:
        if case.layout != "nchw":
            return "takes NCHW only"
        return None if case.dtype == "float32" else f"measured in float32, not in {case.dtype}"

    def bind(self, case: Case, tensors: dict[str, Tensor]) -> Bound:
        session = onnxruntime_session(
            _onnx_model(case, tensors["weight"]).SerializeToString(),
            self.session_threads,
            enable_cpu_mem_arena=self.keep_memory,
            enable_mem_pattern=self.keep_memory,
            log_severity_level=3,
        )
        feeds = {n: tensors[n].numpy() for n in ("input", "offset", "mask") if n in tensors}
        return Bound(lambda: torch.from_numpy(session.run(None, feeds)[0]), {})


class OpenVino(Implementation):
    """OpenVINO's deformable convolution on the CPU, with the weight as a constant of the model."""

    name = "openvino"
    backward = False

    def __init__(self, threads: int | None = None) -> None:
        self.session_threads = threads

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return "measured on the CPU only"
        return _import_problem("openvino", "openvino") or _import_problem("onnx", "onnx")

    def refuses(self, case: Case) -> str | None:
        return OnnxRuntime.refuses(self, case)

    def bind(self, case: Case, tensors: dict[str, Tensor]) -> Bound:
        from mmdcn.deploy import openvino

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "case.onnx")
            path.write_bytes(_onnx_model(case, tensors["weight"]).SerializeToString())
            threads = self.session_threads or torch.get_num_threads()
            compiled = openvino.compile_model(path, INFERENCE_NUM_THREADS=threads)
        request = compiled.create_infer_request()
        feeds = {n: tensors[n].numpy() for n in ("input", "offset", "mask") if n in tensors}
        return Bound(lambda: torch.from_numpy(request.infer(feeds, share_inputs=True)[0]), {})


def _onnx_model(case: Case, weight: Tensor) -> onnx.ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    shapes = case.shapes()
    node = helper.make_node(
        "DeformConv",
        ["input", "weight", "offset", *(["", "mask"] if "mask" in shapes else [])],
        ["output"],
        kernel_shape=[case.kernel] * 2,
        strides=[case.stride] * 2,
        pads=[case.padding] * 4,
        dilations=[case.dilation] * 2,
        group=case.groups,
        offset_group=case.deform_groups,
    )
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
        if name != "weight"
    }
    output = values.pop("output")
    constants = [numpy_helper.from_array(weight.numpy(), "weight")]
    graph = helper.make_graph([node], "case", list(values.values()), [output], constants)
    opset = helper.make_opsetid("", ONNX_OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=ONNX_FILE_VERSION)


def _import_problem(package: str, module: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    # A broken installation may raise anything: mmcv asserts, torchvision raises RuntimeError.
    except Exception as error:
        return f"{module} does not load ({named_first_line(error)})"
    return None


PEERS: dict[str, type[Implementation]] = {
    peer.name: peer for peer in (Dense, Mmcv, OnnxRuntime, OpenVino, Torchvision)
}


def all_implementations() -> dict[str, type[Implementation]]:
    return {i.name: i for i in (Mmdcn, MmdcnFloat32, MmdcnOneThread)} | PEERS
