"""Exported files in OpenVINO, which has deformable convolution under another name.

OpenVINO's reader of ONNX knows no ``DeformConv``. Its opset 8 has the operator itself: here is what
translates the one to the other, and what writes OpenVINO's own format, which OpenVINO then reads
without this package. It needs the packages openvino, 2025.0 or newer, and onnx.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdcn import files
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import first_line

try:
    import onnx
    import openvino
    from openvino import opset8
    from openvino.frontend.onnx import ConversionExtension
except ImportError as error:
    raise ConfigError(
        f"this needs openvino 2025.0 or newer, and onnx ({error}): "
        "`pip install 'openvino>=2025.0' onnx`, which mmdcn[openvino] brings"
    ) from error

__all__ = ["compile_model", "metadata", "read", "save"]


def read(path: str | Path) -> openvino.Model:
    """Read an ONNX file with deformable convolutions, or OpenVINO's own format.

    The file's metadata are the model's ``rt_info`` of the same names: ``mmdcn.classes`` is at
    ``["mmdcn", "classes"]``.

    Raises:
        ConfigError: it is neither, or OpenVINO does not know one of its operators.
    """
    core = openvino.Core()
    core.add_extension(ConversionExtension("DeformConv", "", _deform_conv))
    try:
        model = core.read_model(str(path))
    except RuntimeError as error:
        raise ConfigError(f"OpenVINO cannot read {path}: {_last_line(error)}") from error
    if Path(path).suffix == ".onnx":
        # OpenVINO's reader leaves them out.
        for entry in onnx.load(path, load_external_data=False).metadata_props:
            model.set_rt_info(entry.value, entry.key.split("."))
    return model


def metadata(model: openvino.Model) -> dict[str, str]:
    """What a file says of itself, as JSON by name; nothing for a file that is not of this package.

    Args:
        model: see :func:`read`.
    """
    if not model.has_rt_info(["mmdcn"]):
        return {}
    return dict(model.get_rt_info(["mmdcn"]).value)


def compile_model(
    model: str | Path | openvino.Model, device: str = "CPU", **options: Any
) -> openvino.CompiledModel:
    """Read a file and compile it.

    Args:
        model: a file, see :func:`read`, or what was read.
        device: OpenVINO's name of it.
        options: OpenVINO's, such as ``INFERENCE_NUM_THREADS``. The precision is float32 unless
            ``INFERENCE_PRECISION_HINT`` says otherwise: OpenVINO takes a lower one where a
            processor has it, and sampling points would move.

    Raises:
        ConfigError: see :func:`read`.
    """
    options = {"INFERENCE_PRECISION_HINT": "f32", **options}
    model = model if isinstance(model, openvino.Model) else read(model)
    return openvino.Core().compile_model(model, device, options)


def save(path: str | Path, target: str | Path) -> None:
    """Write an ONNX file in OpenVINO's own format: `target`, and weights beside it.

    Args:
        path: the ONNX file.
        target: the file to write, whose name ends in ``.xml``.

    Raises:
        ConfigError: see :func:`read`; or there can be no such file.
    """
    target = Path(target)
    if target.suffix != ".xml":
        raise ConfigError(f"expected a name ending in .xml, got {target}")
    model = read(path)
    weights = target.with_suffix(".bin")
    try:
        with files.once_complete(target) as description:
            # OpenVINO names the weights after the description.
            unfinished = description.with_name(f".{target.stem}.new.xml")
            try:
                openvino.save_model(model, str(unfinished), compress_to_fp16=False)
                unfinished.with_suffix(".bin").replace(weights)
                unfinished.replace(description)
            finally:
                unfinished.unlink(missing_ok=True)
                unfinished.with_suffix(".bin").unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot write {target}: {first_line(error)}") from error


def _deform_conv(node: Any) -> list:
    """ONNX's ``DeformConv`` as OpenVINO's deformable convolution.

    Both are bilinear and take offsets in the same order. Outside the image OpenVINO would take the
    pixels at the border, unless told otherwise.
    """
    data, weight, offset, bias, mask = (_input(node, index) for index in range(5))
    pads = node.get_attribute("pads", [0, 0, 0, 0])
    output = opset8.deformable_convolution(
        data,
        offset,
        weight,
        list(node.get_attribute("strides", [1, 1])),
        list(pads[:2]),
        list(pads[2:]),
        list(node.get_attribute("dilations", [1, 1])),
        mask=mask,
        group=node.get_attribute("group", 1),
        deformable_group=node.get_attribute("offset_group", 1),
        bilinear_interpolation_pad=True,
    )
    if bias is not None:
        output = opset8.add(output, opset8.unsqueeze(bias, opset8.constant([0, 2, 3])))
    return output.outputs()


def _input(node: Any, index: int) -> openvino.Output | None:
    """An input, or None where it is left out: by being empty, where others follow."""
    if index >= node.get_input_size():
        return None
    value = node.get_input(index)
    return None if value.get_node().get_type_name() == "NullNode" else value


def _last_line(error: Exception) -> str:
    """What OpenVINO says at the end, after the places in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
