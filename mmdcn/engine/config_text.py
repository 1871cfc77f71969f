"""The config text inside a checkpoint, read as data: nothing of it is executed.

mmengine's inferencers, given weights and no config, take the config from the checkpoint, and run
its text as Python. What mmengine writes there consists of literals and calls of ``dict``:
:func:`read` takes that, and refuses everything else.
"""

from __future__ import annotations

import ast
import logging
import sys
from typing import Any

import mmengine.infer.infer as toolbox
from mmengine.config import Config
from mmengine.logging import print_log

from mmdcn.errors import InputError, named_first_line

__all__ = ["ConfigTextError", "install", "read", "uninstall"]

LONGEST = 2**20  # characters, because the parser takes some hundred bytes for each


class ConfigTextError(InputError, ValueError):
    """The text holds something other than plain data; nothing of it has been executed."""


def read(text: str) -> Config:
    """The config in a text that mmengine has written into a checkpoint.

    Modules that it names in ``custom_imports`` are not imported: the log names those that are not
    there yet.

    Args:
        text: assignments of literals, and of ``dict(...)`` of such.

    Returns:
        What the text assigns.

    Raises:
        ConfigTextError: it holds anything else.

    Example:
        >>> read("model = dict(type='FasterRCNN', sizes=(1, -2))").model.sizes
        (1, -2)
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        what = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise ConfigTextError(f"config text: expected a text of at most {LONGEST}, got {what}")
    try:
        assigned = dict(_assignment(statement) for statement in ast.parse(text).body)
        config = Config(assigned)
    except ConfigTextError:
        raise
    # The parser's own limits are of memory, of recursion, and of null characters.
    except Exception as error:
        raise ConfigTextError(
            "the config text in the checkpoint was refused and nothing of it was executed: "
            f"{named_first_line(error)}; give the config's file instead"
        ) from None
    _tell_of_imports(config)
    return config


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if len(targets) != 1 or not isinstance(targets[0], ast.Name):
        raise _refusal(statement, "no assignment to one name")
    if targets[0].id == "_base_":
        raise _refusal(statement, "no part of a whole config")
    return targets[0].id, _value(statement.value)


def _value(node: ast.expr) -> Any:
    """The value of a literal, or of a call of dict with such."""
    if isinstance(node, ast.List):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(element) for element in node.elts)
    if isinstance(node, ast.Set):
        return {_value(element) for element in node.elts}
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return _dict(node)
    try:
        return ast.literal_eval(node)  # numbers, signed and complex, text, True, False and None
    except ValueError:
        raise _refusal(node, "neither a literal nor dict(...)") from None


def _dict(call: ast.Call) -> dict:
    if len(call.args) > 1 or not all(isinstance(argument, ast.Dict) for argument in call.args):
        raise _refusal(call, "not dict(...) of literals")
    result = _value(call.args[0]) if call.args else {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _refusal(call, "not dict(...) of literals")
        result[keyword.arg] = _value(keyword.value)
    return result


def _refusal(node: ast.AST, what: str) -> ConfigTextError:
    source = " ".join(ast.unparse(node).split())
    shown = source if len(source) <= 60 else f"{source[:60]}…"
    return ConfigTextError(
        "the config text in the checkpoint was refused and nothing of it was executed: line "
        f"{node.lineno} has {shown!r}, which is {what}, as mmengine would write it; give the "
        "config's file instead"
    )


def _tell_of_imports(config: Config) -> None:
    imports = config.get("custom_imports", {})
    named = imports.get("imports", []) if isinstance(imports, dict) else []
    named = [named] if isinstance(named, str) else named
    missing = [n for n in named if isinstance(n, str) and n not in sys.modules]
    if missing:
        print_log(
            f"The checkpoint's config needs {', '.join(missing)}, which a file that was loaded may "
            "not import: import it before, if it is yours.",
            logger="current",
            level=logging.WARNING,
        )


# ------------------------------------------------------------------------------------ installation


class _AnyConfig(type):
    """Every Config counts as one of the class below."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Config)


class _PlainConfig(Config, metaclass=_AnyConfig):
    """The name ``Config`` as mmengine's inferencers see it: all of it, but that it reads as we do.

    They give it the texts of checkpoints alone.
    """

    @staticmethod
    def fromstring(cfg_str: str, file_format: str) -> Config:
        return read(cfg_str)


def install() -> None:
    """Have mmengine's inferencers read the config in a checkpoint by :func:`read`."""
    toolbox.Config = _PlainConfig


def uninstall() -> None:
    """Give them mmengine's own reader back."""
    toolbox.Config = Config
