"""The wiring of operators into PyTorch: what each needs beside its kernels, from its schema.

A compiled operator NAME comes with NAME_backward, which returns ``grad_X`` for each tensor X that
its kernels can differentiate for. From the two schemas and the reference, :func:`register` makes
fake kernels, reverse mode, higher derivatives of any order, forward mode, ``torch.func`` and FLOP
formulas. Casting under autocast is here too, as operators have it in common.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _determinism, _devices, _library, _memory, _products
from ._after_import import after_import
from ._checks import HALF_DTYPES, coordinate_dtype
from ._fakes import memory_format, register_fakes
from ._flops import register_flops

_library.load()

_LIBRARY = torch.library.Library("mmdcn", "FRAGMENT")
_LIBRARY.impl("cuda_settings", _products.settings, "CompositeExplicitAutograd")
_LIBRARY.impl("cuda_product_replaced", _products.tell_replaced, "CompositeExplicitAutograd")
OPERATORS: dict[str, "Operator"] = {}  # by the compiled operator's name

PLAIN = (Tensor, nn.Parameter)  # because subclasses may stand for something else


@dataclasses.dataclass(frozen=True)
class Operator:
    """A compiled operator. Calls take its arguments by position, checked, and its options."""

    name: str
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    arguments: tuple[str, ...]  # of the forward operator, options apart
    backward_arguments: tuple[str, ...]
    backward_options: tuple[str, ...]
    gradients: tuple[str, ...]  # the tensors that the backward operator differentiates for
    reference: Callable[..., Tensor]
    public: str  # the public function or functions, as errors name them
    layouts: tuple[str, ...]  # the tensors whose layout their gradients have
    check: Callable[..., None]
    output: Callable[..., Tensor]
    multiply_adds: Callable[..., int]
    own_pass: str

    def __call__(self, *arguments, **options) -> Tensor:
        """The compiled operator, or what computes in its place.

        That is the reference for transformations that our kernels do not know, and on devices that
        they do not serve, mmcv's kernels or the reference.
        """
        if is_transformed():
            return self.by_reference(*arguments)
        input = arguments[0]
        server = _devices.server(self.name, input.device)
        if server != _devices.OURS:
            return self.elsewhere(server, *arguments)
        if self.multiplies and input.is_cuda:
            _determinism.alert_products(self.public)
        return self.forward(*arguments, **options)

    @property
    def multiplies(self) -> bool:
        """Whether a product of matrices is part of it."""
        return "weight" in self.arguments

    def elsewhere(self, server: str, *arguments) -> Tensor:
        """The operator on a device that our kernels do not serve.

        mmcv's kernels know no tensors but plain ones, and add up gradients in no fixed order.
        """
        output = None
        if server == _devices.MMCV and not torch.are_deterministic_algorithms_enabled():
            tensors = (a for a in arguments if isinstance(a, Tensor))
            if all(type(tensor) in PLAIN for tensor in tensors):
                output = _devices.substitute(self.name, *arguments)
        if output is None:
            output = self.by_reference(*arguments)
        ours = self.output(**dict(zip(self.arguments, arguments)))
        return output.contiguous(memory_format=memory_format(ours))

    def by_reference(self, *arguments) -> Tensor:
        """The reference by the compiled operator's arguments, in the precision of the kernels."""
        input = arguments[0]
        wide = coordinate_dtype(input.dtype)
        widened = (a.to(wide) if isinstance(a, Tensor) else a for a in arguments)
        return self.reference(*widened).to(input.dtype)


def _keep_compilers_out() -> None:
    """mmcv's functions break every graph; the reference's, for sizes that vary, take too long."""
    reason = "mmdcn's kernels do not compute on this device"
    Operator.elsewhere = torch.compiler.disable(Operator.elsewhere, reason=reason)


after_import("torch._dynamo", _keep_compilers_out)


def register(
    name: str,
    *,
    reference: Callable[..., Tensor],
    public: str,
    check: Callable[..., None],
    output: Callable[..., Tensor],
    multiply_adds: Callable[..., int],
    own_pass: str,
    layouts: tuple[str, ...] = (),
) -> Operator:
    """Wire ``mmdcn::NAME`` and ``mmdcn::NAME_backward`` into PyTorch.

    Args:
        name: the name of the compiled operator.
        reference: computes the same from the same arguments, by position, in plain PyTorch.
        public: the functions of mmdcn.ops that call it, as errors name them.
        check: raises an error for arguments by name, of the right dtypes, that do not fit together.
        output: an empty tensor as the operator returns it, from its arguments by name.
        multiply_adds: counts those of one call, from the arguments by name, with shapes in place
            of tensors, and from ``output``, the output's shape.
        own_pass: the tensor whose gradient takes as many multiply-adds as the forward pass by
            itself; those of all other tensors together take as many.
        layouts: the tensors whose gradients have their layout; others' gradients are contiguous.
    """
    forward = getattr(torch.ops.mmdcn, name).default
    backward = getattr(torch.ops.mmdcn, f"{name}_backward").default
    operator = Operator(
        name=name,
        forward=forward,
        backward=backward,
        arguments=_names(forward, False),
        backward_arguments=_names(backward, False),
        backward_options=_names(backward, True),
        gradients=tuple(r.name.removeprefix("grad_") for r in backward._schema.returns),
        reference=reference,
        public=public,
        layouts=layouts,
        check=check,
        output=output,
        multiply_adds=multiply_adds,
        own_pass=own_pass,
    )
    register_fakes(operator)
    _register_autograd(operator.forward, _first_order(operator))
    _register_autograd(operator.backward, _second_order(operator))
    register_flops(operator)
    OPERATORS[name] = operator
    return operator


def _names(overload: torch._ops.OpOverload, options: bool) -> tuple[str, ...]:
    return tuple(a.name for a in overload._schema.arguments if a.kwarg_only == options)


# ----------------------------------------------------------------------------------------- autocast


def autocast_is_enabled(device_type: str) -> bool:
    """Whether autocast is in force for a type of device, such as ``"cpu"``."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_features(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast the features of a convolution to autocast's dtype, as autocast does for torch's own.

    Coordinates are not cast: they stay in float32.
    """
    device_type = tensors[0].device.type
    if not autocast_is_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    eligible = (torch.float32, *HALF_DTYPES)
    return [t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors]


def autocast_coordinates(input: Tensor, *coordinates: Tensor | None) -> list[Tensor | None]:
    """Coordinates in float32 beside float32 or half-precision features, where autocast is on.

    An operator that keeps its features' dtype under autocast needs this: what a layer predicts
    from the features inside autocast is in half precision, whatever the dtype of the features.
    """
    if not autocast_is_enabled(input.device.type):
        return list(coordinates)
    wide = coordinate_dtype(input.dtype)
    return [t.to(wide) if t is not None and t.dtype in HALF_DTYPES else t for t in coordinates]


# --------------------------------------------------------------------------------------- transforms


def is_transformed() -> bool:
    """Whether a transformation is active that the compiled operators have no formula for.

    They have formulas for reverse mode only: in forward mode, tangents would be lost silently.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether each example of a surrounding vmap has its own values of this tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _refuse_tangents(overload: torch._ops.OpOverload, arguments: tuple) -> None:
    if forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(
                f"{overload.name()}: forward-mode differentiation is not implemented for the "
                "compiled operator itself; call its function in mmdcn.ops, which has it"
            )


# ----------------------------------------------------------------------------------------- autograd


@dataclasses.dataclass(frozen=True)
class _Derivative:
    """The backward pass of an operator, with the arguments that it needs.

    Arguments, and what is said of each, are by position: names would take time at every call.
    """

    arguments: tuple[str, ...]  # the names of the operator's arguments
    saved: tuple[bool, ...]  # which of them `backward` is given, if they are tensors
    # backward(arguments, options, which arguments' gradients are wanted, gradients of the outputs)
    # gives the gradients of the arguments
    backward: Callable[[list, dict, tuple[bool, ...], tuple], list[Tensor | None]]


def _register_autograd(overload: torch._ops.OpOverload, derivative: _Derivative) -> None:
    """Reverse mode for an operator, and an error instead of lost tangents.

    This does what torch.library.register_autograd does, which has no place for that error.
    """
    count = len(derivative.arguments)
    tensors = [i for i, a in enumerate(overload._schema.arguments[:count]) if _holds_tensor(a.type)]
    saved = [i for i in tensors if derivative.saved[i]]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, options, *arguments):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[arguments[i] for i in saved])
            others = list(arguments)
            for i in tensors:
                others[i] = None
            ctx.others, ctx.options = others, options
            return _below_autograd(overload, arguments, options, keyset)

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * (2 + count)
            arguments = list(ctx.others)
            for i, tensor in zip(saved, ctx.saved_tensors):
                arguments[i] = tensor
            wanted = ctx.needs_input_grad[2:]
            return None, None, *derivative.backward(arguments, ctx.options, wanted, grads)

    def kernel(keyset, *arguments, **options):
        _refuse_tangents(overload, arguments)
        wanted = torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        )
        if wanted:
            return Differentiable.apply(keyset, options, *arguments)
        return _below_autograd(overload, arguments, options, keyset)

    Differentiable.__name__ = Differentiable.__qualname__ = f"{overload._opname}_autograd"
    _LIBRARY.impl(overload._opname, kernel, "Autograd", with_keyset=True)


def _holds_tensor(kind: object) -> bool:
    return str(kind) in ("Tensor", "Optional[Tensor]")


def _below_autograd(overload, arguments, options: dict, keyset=None):
    """The operator without what autograd does; `keyset` is what its kernel was called with."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return overload(*arguments, **options)
            keyset = keyset & torch._C._after_autograd_keyset
            return overload.redispatch(keyset, *arguments, **options)
    except RuntimeError as error:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        as_torch_has_it = _memory.as_torch_has_it(error, device)
        if as_torch_has_it is error:
            raise
        raise as_torch_has_it from error


def _first_order(operator: Operator) -> _Derivative:
    """The first derivative: the backward operator's kernels."""
    first, *kept, last = operator.backward_arguments
    assert (first, last) == ("grad_output", "output_mask")
    kept = [operator.arguments.index(name) for name in kept]
    differentiated = [operator.arguments.index(name) for name in operator.gradients]
    bias = operator.arguments.index("bias") if "bias" in operator.arguments else None

    def backward(arguments, options, wanted, grads):
        (grad_output,) = grads
        options = {name: value for name, value in options.items() if value}
        if arguments[0].is_cuda:
            _order_of_addition(operator, options, wanted[0])
        gradients = [None] * len(arguments)
        output_mask = [wanted[i] for i in differentiated]
        if any(output_mask):
            passed = [grad_output, *[arguments[i] for i in kept], output_mask]
            if torch.is_grad_enabled() or is_transformed():
                computed = operator.backward(*passed, **options)
            else:
                computed = _below_autograd(operator.backward, passed, options)
            for i, gradient in zip(differentiated, computed):
                if wanted[i]:
                    gradients[i] = gradient
        if bias is not None and wanted[bias]:
            gradients[bias] = grad_output.sum((0, *range(2, grad_output.dim())))
        return gradients

    return _Derivative(
        operator.arguments,
        tuple(n in operator.backward_arguments for n in operator.arguments),
        backward,
    )


def _order_of_addition(operator: Operator, options: dict, to_input: bool) -> None:
    """On CUDA, request a fixed order of additions if torch wants one, or report its absence."""
    if operator.multiplies:
        _determinism.alert_products(operator.public)
    if "deterministic" in operator.backward_options:
        if torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
    elif to_input:
        _determinism.alert_gradient(operator.public)


def _second_order(operator: Operator) -> _Derivative:
    """The second derivative, by differentiating the reference twice: it is exact, but slow.

    The result is differentiable again, for derivatives of any order.
    """
    differentiable = ("grad_output", *operator.gradients)
    names = operator.backward_arguments

    def backward(arguments, options, wanted, grads):
        named = dict(zip(names, arguments))
        gradients = by_name(named, grads)
        return [gradients.get(name) for name in names]

    def by_name(named: dict[str, Any], grads: tuple) -> dict[str, Tensor | None]:
        create_graph = torch.is_grad_enabled()
        present = [name for name in differentiable if named[name] is not None]
        asked = {
            name: grad
            for name, want, grad in zip(operator.gradients, named["output_mask"], grads)
            if want and grad is not None and named[name] is not None
        }
        if not asked:
            return {}
        if named["grad_output"].numel() == 0 or named["input"].numel() == 0:
            return {name: torch.zeros_like(named[name]) for name in present}
        with torch.enable_grad():
            # The views end the differentiation here, and leave later differentiation possible.
            variables = {
                name: t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
                for name, t in ((name, named[name]) for name in present)
            }
            arguments = {name: None for name in operator.arguments} | named | variables
            output = operator.by_reference(*(arguments[name] for name in operator.arguments))
            first = torch.autograd.grad(
                output,
                [variables[name] for name in asked],
                variables["grad_output"],
                create_graph=True,
            )
            second = torch.autograd.grad(
                first,
                list(variables.values()),
                list(asked.values()),
                allow_unused=True,
                create_graph=create_graph,
            )
        return dict(zip(variables, second))

    return _Derivative(names, (True,) * len(names), backward)
