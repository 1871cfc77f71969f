"""A traced network in half precision: what multiplies is in float16, what has places in float32.

A file is mostly weights, which take half the place in float16, and processors with units for it
multiply faster. Coordinates would suffer: beyond 1024 pixels float16 has no halves of them. So the
layers of the network go into float16, and these stay in float32, with casts where they meet:

- ``DeformConv``, and the layers that its offsets come from;
- everything that is no layer: norms, decoding, suppression, pooling of boxes;
- the file's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxscript import ir

__all__ = ["to_half"]

#: Operators that go into float16, and how many of their inputs do, where not all.
_LAYERS = {
    "Conv": None,
    "ConvTranspose": None,
    "Gemm": None,
    "MatMul": None,
    "Relu": None,
    "MaxPool": None,
    "AveragePool": None,
    "GlobalAveragePool": None,
    "Resize": 1,
}
#: Those that do where all that they are given is in float16 already.
_BETWEEN_LAYERS = ("Add", "Concat")
#: Those whose weights make an offset: what lies between them and `DeformConv` follows them.
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def to_half(model: ir.Model) -> None:
    """Put the layers of a network into float16, in place.

    Args:
        model: a graph in float32 without subgraphs, whose values' types are known.
    """
    graph = model.graph
    half = _half_nodes(graph)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in half:
        # Before any input is replaced, as a cast's type is that of what it is given.
        for output in node.outputs:
            output.dtype = _HALF
    for node in list(graph):
        count = _LAYERS.get(node.op_type) if node in half else None
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_HALF, _SINGLE):
                continue
            wanted = _HALF if node in half and (count is None or index < count) else _SINGLE
            if value.dtype != wanted:
                node.replace_input_with(index, _as(graph, value, wanted, casts))
    for index, value in enumerate(graph.outputs):
        if value.dtype == _HALF:
            name = value.name
            value.name = f"{name}_half"
            graph.outputs[index] = _as(graph, value, _SINGLE, casts)
            graph.outputs[index].name = name
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _half_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that go into float16."""
    single = set(_makers_of_offsets(graph))
    half: set[ir.Node] = set()
    for node in graph:
        if node in single or any(value.dtype != _SINGLE for value in node.outputs):
            continue
        given = [value.producer() for value in node.inputs if value is not None]
        if node.op_type in _LAYERS or (
            node.op_type in _BETWEEN_LAYERS and all(producer in half for producer in given)
        ):
            half.add(node)
    return half


def _makers_of_offsets(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes from the layers that give offsets and masks to the convolutions that take them."""
    left = [value for node in graph if node.op_type == "DeformConv" for value in node.inputs[2:]]
    seen: set[ir.Node] = set()
    while left:
        value = left.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.op_type not in _WITH_WEIGHTS:
            left.extend(node.inputs)


def _as(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    """A value in another precision, made once: a weight itself, else by a cast behind its maker."""
    if (value, dtype) in casts:
        return casts[value, dtype]
    name = f"{value.name}_{dtype.name.lower()}"
    if value.const_value is not None and value.producer() is None:
        rounded = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), name=name)
        made = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=rounded
        )
        graph.register_initializer(made)
    else:
        cast = ir.node("Cast", [value], {"to": dtype.value}, name=f"{name}_cast")
        made = cast.outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(producer, cast)
    casts[value, dtype] = made
    return made
