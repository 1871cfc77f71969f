"""The convolutions that a conversion is to turn, chosen by `select` and checked one by one."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack

# mmcv's own class of plain convolutions, which models of others do without.
try:
    from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
except ImportError:
    MMCVConv2d = nn.Conv2d

__all__ = ["Select", "chosen"]

#: Names of modules, as glob patterns, or a function that says yes or no to a name and its module.
Select = str | Sequence[str] | Callable[[str, nn.Module], bool]

# These compute nothing but a convolution; other subclasses of nn.Conv2d compute something else.
_PLAIN = (nn.Conv2d, MMCVConv2d)


def chosen(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    """What `select` chooses, checked to be plain convolutions, each once.

    The name of a model that has no parts, such as a convolution, is ``''``.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    if model._modules:
        del named[""]
    if isinstance(select, type | nn.Module):
        raise TypeError(
            "select: expected a pattern, a sequence of patterns or a function, got "
            f"{'the class ' + select.__name__ if isinstance(select, type) else 'a module'}: "
            "choose by lambda name, module: type(module) is nn.Conv2d"
        )
    if callable(select):
        _check_function(select)
        names = [name for name, module in named.items() if select(name, module)]
        if not names:
            raise ValueError(f"select: expected a choice among {_convolutions(named)}, got none")
    else:
        patterns = [select] if isinstance(select, str) else select
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(
                f"select: expected a pattern, a sequence of patterns or a function, got {select!r}"
            )
        names = list(_matching(named, patterns))
    for name in names:
        _check_convertible(name, named[name], named)
    first_names = {named[name]: name for name in reversed(names)}
    return {name: module for module, name in first_names.items()}


def _check_function(select: Callable[[str, nn.Module], bool]) -> None:
    try:
        signature = inspect.signature(select)
    except ValueError:
        return  # written in C
    try:
        signature.bind("name", "module")
    except TypeError:
        raise TypeError(
            "select: expected a function of a name and its module, such as lambda name, module: "
            f"type(module) is nn.Conv2d, got one of {signature}"
        ) from None


def _matching(named: dict[str, nn.Module], patterns: Sequence[str]) -> Iterator[str]:
    if not patterns:
        raise ValueError("select: expected at least one pattern, got none")
    for pattern in patterns:
        matches = [name for name in named if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(
                f"select: expected the name of a convolution, such as "
                f"{_convolutions(named, pattern)}, got {pattern!r}, which matches nothing"
            )
        yield from matches


def _convolutions(named: dict[str, nn.Module], pattern: str = "") -> str:
    """Some names of plain convolutions, those like `pattern` first, for messages."""
    names = [name for name, module in named.items() if type(module) in _PLAIN]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if names == [""]:
        return "'*', as the model is one itself"
    return ", ".join((close or names)[:3]) or "(the model has none)"


def _check_convertible(name: str, module: nn.Module, named: dict[str, nn.Module]) -> None:
    def refuse(expected: str, got: str) -> None:
        which = repr(name) if name else "the model itself"
        raise ValueError(f"select: expected {expected}, got {which}, {got}")

    kind = type(module).__name__
    if isinstance(module, DeformConv2dPack | ModulatedDeformConv2dPack):
        refuse("plain convolutions", f"which is deformable already ({kind})")
    if isinstance(module, LazyModuleMixin):
        refuse(
            "plain 2-D convolutions",
            f"a {kind}, whose channels are not known yet: run the model once, then convert it",
        )
    if getattr(module, "transposed", False):
        refuse("no transposed convolution", f"a {kind}, which has no deformable form")
    if isinstance(module, nn.Conv2d) and not {"weight", "bias"} <= module._parameters.keys():
        refuse(
            "plain 2-D convolutions",
            f"a {kind} whose weight or bias is computed (spectral or weight normalisation, or "
            "another parametrization): convert first, parametrize after",
        )
    if type(module) not in _PLAIN:
        inside = {n: m for n, m in named.items() if n.startswith(f"{name}.")}
        hint = f"; inside it are {_convolutions(inside)}" if inside else ""
        refuse("plain 2-D convolutions", f"a {kind}{hint}")
    if module.padding_mode != "zeros":
        refuse("padding_mode='zeros'", f"with padding_mode={module.padding_mode!r}")
    if module.weight.is_complex():
        refuse("real weights", f"whose are {module.weight.dtype}")
    if "forward" in vars(module):
        refuse(
            "convolutions with the forward of their class",
            "whose own forward was set on it: a new layer would lose it",
        )
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    if any(getattr(module, kind_of_hook) for kind_of_hook in hooks):
        refuse("convolutions without hooks", "which has some: a new layer would lose them")
