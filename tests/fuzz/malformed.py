"""Malformed calls of the public functions, and of the compiled operators directly.

Each is refused with an error that names the argument; one that happens to be valid, or that torch
makes valid, computes what the reference computes. None ends the process, and none takes memory
without an end.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmdcn.ops import _registration
from mmdcn.ops._checks import FEATURE_DTYPES
from tests.fuzz.limits import limit_memory
from tests.fuzz.memory import VIEWS
from tests.fuzz.trials import ALONE, BY_THREADS, Source
from tests.ops.calls import CALLS
from tests.ops.contract import BAD_NUMBERS, assert_named, compiled_calls
from tests.ops.problems import TOLERANCE, largest_error

DTYPES = (*FEATURE_DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64)
DTYPES += (torch.float8_e4m3fn, torch.int32)
OTHERS = (None, 3, 1.5, "tensor", [], [1.0], (), {}, object)
#: Beside which the numbers of a call are tried one by one: they are near limits, or beyond.
INTEGERS = (-(2**63), -(2**62), -(2**31), -1, 0, 1, 2, 3, 7, 64, 2**29, 2**30 - 1, 2**30)
INTEGERS += (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
FLOATS = (0.0, -1.0, 1e-300, 1e30, -1e30, 1e300, float("inf"), -float("inf"), float("nan"))
VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**63), -1.0, 0.5)
MEMORY = 2 * 2**30


# ------------------------------------------------------------------------------- changes of tensors


def _resized(tensor: Tensor, d: int, size: int) -> Tensor:
    d %= max(tensor.dim(), 1)
    if tensor.dim() == 0 or tensor.shape[d] == 0:
        return tensor
    return tensor.index_select(d, torch.arange(size) % tensor.shape[d])


def _seen_large(tensor: Tensor, d: int, size: int) -> Tensor:
    """One row of the tensor, as many times as no memory could hold."""
    d %= max(tensor.dim(), 1)
    if tensor.dim() == 0 or tensor.shape[d] == 0:
        return tensor
    others = max(tensor.numel() // tensor.shape[d], 1)
    shape = [*tensor.shape]
    shape[d] = min(size, 2**62 // others)
    return tensor.narrow(d, 0, 1).expand(shape)


def _filled(tensor: Tensor, place: int, value: int) -> Tensor:
    """With one value, or a tensor of it, that hardly anybody has."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    tensor = tensor.clone()
    flat = tensor.view(-1)
    flat[place % len(flat) if place >= 0 else slice(None)] = VALUES[value]
    return tensor


CHANGES = {
    "size": _resized,
    "seen large": _seen_large,
    "values": _filled,
    "dimensions": lambda t, k: [
        t.unsqueeze(0),
        t.flatten(),
        t.sum(),
        t.unsqueeze(-1),
        t[None, None],
    ][k],
    "transposed": lambda t, k: t.movedim(k % max(t.dim(), 1), 0) if t.dim() else t,
    "dtype": lambda t, k: t.to(DTYPES[k]),
    "view": lambda t, k: list(VIEWS.values())[k](t),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "conjugate": lambda t: torch.complex(t, t).conj(),
    "empty": lambda t: t.new_empty(0),
    "other": lambda t, k: OTHERS[k],
}


#: What takes no time for tensors of more elements than LARGE.
UNCOPIED = ("seen large", "transposed", "meta", "empty", "other")
LARGE = 10**6


def _draw_change(random: Random) -> tuple:
    kind = random.choice([*CHANGES, "size", "size", "size", "dtype", "seen large", "values"])
    if kind == "size":
        return kind, random.randrange(5), random.choice([0, 1, 2, 3, 5, 7, 17, 18, 36, 40])
    if kind == "seen large":
        return kind, random.randrange(5), random.choice([2**12, 2**30, 2**31, 2**40, 2**62])
    if kind == "values":
        return kind, random.choice([-1, random.randrange(1000)]), random.randrange(len(VALUES))
    many = {"dimensions": 5, "transposed": 5, "dtype": len(DTYPES), "view": len(VIEWS)}
    many["other"] = len(OTHERS)
    return (kind, random.randrange(many[kind])) if kind in many else (kind,)


def _changed(value: Any, change: tuple) -> Any:
    kind, *numbers = change
    if kind == "number":
        return BAD_NUMBERS[numbers[0]]
    if kind == "integer":
        return INTEGERS[numbers[0]]
    if kind == "integers":
        return [INTEGERS[n] for n in numbers]
    if kind == "float":
        return FLOATS[numbers[0]]
    if kind == "booleans":
        return [n == 1 for n in numbers]
    if not isinstance(value, Tensor) or (value.numel() > LARGE and kind not in UNCOPIED):
        return value
    return CHANGES[kind](value, *numbers)


# ------------------------------------------------------------------------------------------ a trial


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A call with some arguments changed.

    Attributes:
        call: the name of the valid call, in tests/ops/calls.py.
        operator: the compiled operator that is called instead of the public function.
        dtype: an index of FEATURE_DTYPES.
        changes: the names of arguments, and what is done to them.
    """

    call: str
    operator: str = ""
    dtype: int = 0
    changes: tuple[tuple, ...] = ()

    IMPORTS: ClassVar[str] = "from tests.fuzz.malformed import *"

    @staticmethod
    def prepare() -> None:
        warnings.simplefilter("ignore")  # torch's, of kinds of tensors that it gives up
        limit_memory(MEMORY)

    def check(self) -> None:
        if self.operator:
            self._check_operator()
        else:
            self._check_function()

    def _check_function(self) -> None:
        call = CALLS[self.call]
        named = {**call.tensors(FEATURE_DTYPES[self.dtype]), **call.arguments}
        try:
            named = self._change(named)
        except (RuntimeError, NotImplementedError, MemoryError):
            return  # torch has no such tensor
        try:
            output = call.function(**named)
        except Exception as error:
            if not _is_of_memory(error):
                assert_named(error, call)
            return
        _compare(output, call.reference, list(named), list(named.values()))

    def _check_operator(self) -> None:
        overload, arguments, options = _recorded(self.call, self.operator, self.dtype)
        schema = overload._schema.arguments
        names = [a.name for a in schema if not a.kwarg_only]
        try:
            named = self._change(dict(zip(names, arguments)))
        except (RuntimeError, NotImplementedError, MemoryError):
            return
        try:
            output = overload(*named.values(), **options)
        except Exception as error:
            # On the meta device, kernels compute shapes alone, from what they need for these.
            meta = any(isinstance(v, Tensor) and v.is_meta for v in named.values())
            if not (_is_of_memory(error) or meta):
                _assert_argument(error, [a.name for a in schema])
            return
        # Numbers of other types are converted by torch, and the reference does not see that.
        converted = any(kind == "number" for _, kind, *_ in self.changes)
        if not self.operator.endswith("_backward") and not converted:
            by_reference = _registration.OPERATORS[self.operator].by_reference
            _compare(
                output, lambda **named: by_reference(*named.values()), names, list(named.values())
            )

    def _change(self, named: dict) -> dict:
        for name, *change in self.changes:
            named[name] = _changed(named.get(name), tuple(change))
        return named

    def simpler(self) -> Iterator["Malformed"]:
        for i in range(len(self.changes)):
            yield dataclasses.replace(self, changes=self.changes[:i] + self.changes[i + 1 :])
        if self.dtype:
            yield dataclasses.replace(self, dtype=0)


@functools.cache
def _recorded(call: str, operator: str, dtype: int) -> tuple:
    """The compiled operator in a valid call, its arguments and options."""
    (found,) = [c for c in compiled_calls(CALLS[call]) if c[0]._opname == operator]
    overload, arguments, options = found
    features = FEATURE_DTYPES[dtype]
    names = [a.name for a in overload._schema.arguments]
    is_feature = {"input", "weight", "bias", "grad_output"}
    coordinates = _registration.coordinate_dtype(features)
    arguments = [
        a.to(features if name in is_feature else coordinates) if isinstance(a, Tensor) else a
        for name, a in zip(names, arguments)
    ]
    return overload, arguments, options


def _is_of_memory(error: Exception) -> bool:
    message = str(error)
    too_much = ("memory" in message and "bytes" in message) or "Storage size calc" in message
    return isinstance(error, MemoryError) or too_much


def _assert_argument(error: Exception, names: list[str]) -> None:
    """The message names an argument, or says that the operator is not for such tensors."""
    message = str(error)
    assert isinstance(error, (RuntimeError, TypeError, ValueError, NotImplementedError)), repr(
        error
    )
    assert "INTERNAL ASSERT" not in message, message
    named = any(re.search(rf"\b{name}\b", message) for name in names)
    assert named or "backend" in message, f"{type(error).__name__}: {message}"


def _compare(output, reference, names: list[str], values: list) -> None:
    """A call that was not refused computes what the reference computes."""
    assert isinstance(output, Tensor), type(output)
    tensors = [v for v in values if isinstance(v, Tensor)]
    if output.is_meta or output.layout != torch.strided:
        return
    size = max(output.numel(), *(t.numel() for t in tensors))
    if size > 10**5 or output.dtype not in TOLERANCE or any(t.is_meta for t in tensors):
        return
    exact = [v.double() if isinstance(v, Tensor) else v for v in values]
    if any(isinstance(v, float) and abs(v) > 1e30 for v in values):
        return  # Beside float32 features, the kernels calculate in float32.
    # The kernels take numbers in float64, in which tensors are multiplied by longer ones too.
    exact = [float(v) if type(v) is int and abs(v) >= 2**63 else v for v in exact]
    try:
        expected = reference(**dict(zip(names, exact)))
    except (MemoryError, RuntimeError) as error:
        assert _is_of_memory(error), f"the reference: {error}"
        return
    assert output.shape == expected.shape, f"{tuple(output.shape)}, not {tuple(expected.shape)}"
    largest = expected.abs().max() if expected.numel() else 0.0
    if largest < min(1e15, torch.finfo(output.dtype).max / 10):  # What overflows may be elsewhere.
        error = largest_error(output, expected)
        assert error <= 4 * TOLERANCE[output.dtype], f"output: error {error:.2e}"


# ------------------------------------------------------------------------------------------- draws


def draw(call: str, operator: str, random: Random) -> Malformed:
    names = _arguments(call, operator)
    changes = []
    for name in random.choices(list(names), k=random.choice([1, 1, 1, 2, 3])):
        changes.append((name, *_draw_for(names[name], bool(operator), random)))
    return Malformed(call, operator, random.randrange(len(FEATURE_DTYPES)), tuple(changes))


def _draw_for(kind: str, compiled: bool, random: Random) -> tuple:
    if kind == "tensor":
        return _draw_change(random)
    if not compiled or random.random() < 0.2:
        return "number", random.randrange(len(BAD_NUMBERS))
    if kind == "float":
        return "float", random.randrange(len(FLOATS))
    if kind == "int":
        return "integer", random.randrange(len(INTEGERS))
    many = random.choice([0, 1, 2, 2, 2, 3, 3, 4, 7])
    return kind, *(random.randrange(len(INTEGERS)) for _ in range(many))


@functools.cache
def _arguments(call: str, operator: str) -> dict[str, str]:
    """The names of what is changed, and of what kind each is."""
    if not operator:
        function, tensors = CALLS[call].function, CALLS[call].tensors()
        names = [name for name in function.__annotations__ if name != "return"]
        return {n: "tensor" if n in tensors else "number" for n in names}
    kinds = {"Tensor": "tensor", "Optional[Tensor]": "tensor", "List[int]": "integers"}
    kinds |= {"int": "int", "float": "float", "bool": "booleans", "List[bool]": "booleans"}
    schema = getattr(torch.ops.mmdcn, operator).default._schema
    return {a.name: kinds[str(a.type)] for a in schema.arguments if not a.kwarg_only}


COMPILED = {
    "deform_conv2d": ("deform_conv2d-v1", "deform_conv2d-v2"),
    "deform_conv_nd": ("deform_conv3d-v1", "deform_conv3d-v2"),
    "deform_aggregate": ("dcnv3", "dcnv4"),
    "deform_roi_pool": ("deform_roi_pool", "deform_roi_pool-position_sensitive"),
}


def sources() -> list[Source]:
    """The public functions and the compiled operators; a public one in each of its calls."""
    ways = (ALONE, ALONE, BY_THREADS)
    drawn = []
    for function in dict.fromkeys(call.name for call in CALLS.values()):
        calls = [name for name, call in CALLS.items() if call.name == function]
        drawn.append(Source(function, _among(calls, ""), ways))
    for operator, calls in COMPILED.items():
        for name in (operator, f"{operator}_backward"):
            drawn.append(Source(f"mmdcn::{name}", _among(calls, name), ways))
    return drawn


def _among(calls, operator: str):
    return lambda random: draw(random.choice(calls), operator, random)
