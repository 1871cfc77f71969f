"""The common parts of the tools: arguments, config, runner, and how a tool ends.

Nothing that takes long is imported before the arguments are read (:mod:`mmdcn.startup`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmdcn import startup
from mmdcn.engine import environment, failures
from mmdcn.errors import InputError, LibraryError, did_you_mean, first_line

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

__all__ = [
    "add_arguments",
    "add_config_options",
    "begin",
    "build_runner",
    "checkpoint_file",
    "config_file",
    "load_config",
    "parse_settings",
    "read_config",
    "resumed_checkpoint",
    "run",
]

_CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")


# -------------------------------------------------------------------------------------- arguments


def config_file(text: str) -> str:
    """A config's file, or its name in a package (``mmdcn::…``), as the type of an argument.

    Raises:
        InputError: there is no such file, or no such name, or it is not of a config's kind. The
            names of packages whose folder is not seen are looked up later, by
            :func:`read_config`.
    """
    if "::" in text:
        _check_name(text)
        return text
    if os.path.isdir(text):
        raise InputError(f"expected a config file, got the folder {text!r}")
    if not os.path.isfile(text):
        raise InputError(f"no config file {text!r}")
    if not text.endswith(_CONFIG_SUFFIXES):
        raise InputError(f"expected a config file ({', '.join(_CONFIG_SUFFIXES)}), got {text!r}")
    return text


def _check_name(text: str) -> None:
    package, _, name = text.partition("::")
    try:
        spec = importlib.util.find_spec(package)
    except (ValueError, ImportError):  # of an empty name, or one inside of what is not there
        spec = None
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    configs = next((c for f in folders if (c := Path(f, ".mim", "configs")).is_dir()), None)
    if configs is None or (configs / name).is_file():
        return
    if not name:
        example = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
        raise InputError(f"expected a name like `mmdet::{example}`, got {text!r}")
    known = [path.relative_to(configs).as_posix() for path in configs.glob("*/*.py")]
    hint = did_you_mean(name, known, lambda one: f"{package}::{one}")
    raise InputError(f"{package} has no config {name!r}{hint}")


def checkpoint_file(text: str) -> str:
    """A checkpoint's file or address, as the type of an argument.

    Raises:
        InputError: it is no address, and there is no such file.
    """
    if "://" not in text and not os.path.isfile(text):
        raise InputError(f"no checkpoint {text!r}")
    return text


def resumed_checkpoint(text: str) -> str:
    """The value of ``--resume``: ``auto``, or a checkpoint.

    Raises:
        InputError: see :func:`checkpoint_file`.
    """
    return text if text == "auto" else checkpoint_file(text)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of the config, named as in mmdet."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        type=_setting,
        metavar="KEY=VALUE",
        help="override settings of the config: model.backbone.depth=101, lists as key=a,b or "
        'key="[(a,b),(c,d)]" without spaces',
    )


# What no key of a config has, but a part of a list or a dictionary that the shell has split.
_PART_OF_VALUE = re.compile(r"[()\[\]{},'\"\s]")


def _setting(text: str) -> str:
    key, equals, _ = text.partition("=")
    split = _PART_OF_VALUE.search(key) is not None
    if not key.strip() or not equals or split:
        hint = "; a value is one argument, without spaces" if split else ""
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}{hint}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, named as in mmdet."""
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of a distributed run (tools/dist_*.sh pass pytorch)",
    )
    # torch.distributed.launch passes this one in either spelling.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    # With this one, tools/dist_*.sh see a mistake before they start the processes.
    parser.add_argument("--arguments-only", action="store_true", help=argparse.SUPPRESS)


# ----------------------------------------------------------------------------------------- config

# What mmengine raises of a config: RuntimeError where its own parsing of one stops, AssertionError
# and ValueError of a name in a package that it does not know.
_UNREADABLE = (
    *(OSError, SyntaxError, ImportError, KeyError),
    *(RuntimeError, AssertionError, ValueError),
)


# A dictionary, which mmengine takes for a word, or splits at its commas, with no end.
_DICTIONARY = re.compile(r"\bdict\s*\(|\{[^{}]*:")


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """The values of ``--cfg-options``, as mmengine reads them.

    Raises:
        ConfigError: mmengine cannot read a value, or would take a dictionary for a word.
    """
    from mmengine.config import DictAction

    from mmdcn.engine.preflight import ConfigError

    found = argparse.Namespace(settings={})
    action = DictAction(["--cfg-options"], "settings", nargs="+")
    for setting in settings or ():
        key, _, value = setting.partition("=")
        if _DICTIONARY.search(value):
            raise ConfigError(
                f"--cfg-options: cannot read {setting!r}: mmengine reads numbers, words, lists and "
                f"tuples here, and no dictionaries; set their entries ({key}.NAME=VALUE, "
                f"{key}.0.NAME=VALUE in a list), or write them in the config"
            )
        try:
            action(None, found, [setting])
        # mmengine asserts that brackets are balanced, and its parsing may fail in other ways.
        except Exception as error:
            what = first_line(error)
            raise ConfigError(f"--cfg-options: cannot read {setting!r}: {what}") from error
    return found.settings


def read_config(path: str, settings: Sequence[str] | None = None) -> Config:
    """Read a config and override settings of it.

    Args:
        path: the file, or its name in a package: ``mmdcn::dcnv2/…``, ``mmdet::…``.
        settings: what ``--cfg-options`` was given.

    Raises:
        ConfigError: the file, or one that it inherits from, is missing or is not a config; a
            setting cannot be read, or does not fit the config.
    """
    from mmengine.config import Config

    from mmdcn.engine import config_keys
    from mmdcn.engine.preflight import ConfigError

    if "::" not in path and not os.path.isfile(path):
        raise ConfigError(f"no config file {path!r}")
    overrides = parse_settings(settings)
    try:
        cfg = Config.fromfile(path)
    except _UNREADABLE as error:
        if failures.of_disk(error):  # mmengine reads a copy of it, in the folder for what passes
            raise
        raise ConfigError(f"cannot read the config {path}: {_describe(error)}") from error
    if startup.is_first_process():
        config_keys.warn_of_unknown(cfg, overrides)
    try:
        cfg.merge_from_dict(overrides)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--cfg-options do not fit the config {path}: {_describe(error)}"
        ) from error
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply ``--cfg-options``, ``--work-dir`` and ``--launcher``.

    Raises:
        ConfigError: see :func:`read_config`.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    return cfg


def _describe(error: Exception) -> str:
    # str(KeyError) is the repr of its message.
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


# ----------------------------------------------------------------------------------------- runner


def on_cpu() -> bool:
    """Whether the toolbox will run on the CPU, because it finds no accelerator."""
    from mmengine.device import get_device

    return get_device() == "cpu"


def build_runner(cfg: Config, warned: Sequence[str] = ()) -> Runner:
    """Build the config's runner.

    A distributed run without an accelerator communicates through gloo: mmengine would set a CUDA
    device and wrap the model for one.

    Args:
        cfg: the config.
        warned: what was warned of before there was a log file, which gets it too.

    Raises:
        ConfigError: the launcher needs an accelerator and there is none.
    """
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from mmdcn.engine.preflight import ConfigError

    if cfg.launcher != "none" and on_cpu():
        if cfg.launcher != "pytorch":
            raise ConfigError(
                f"--launcher {cfg.launcher} needs a GPU; without one use --launcher pytorch, by "
                "tools/dist_train.sh or tools/dist_test.sh"
            )
        _init_gloo(cfg)
    runner = Runner.from_cfg(cfg) if "runner_type" not in cfg else RUNNERS.build(cfg)
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.FileHandler):
            for message in warned:
                record = dict(name=runner.logger.name, levelno=logging.WARNING, msg=message)
                handler.handle(logging.makeLogRecord({**record, "levelname": "WARNING"}))
    return runner


def _init_gloo(cfg: Config) -> None:
    import torch.distributed

    dist_cfg = cfg.get("env_cfg", {}).get("dist_cfg", {})
    timeout = dist_cfg.get("timeout")
    torch.distributed.init_process_group(
        "gloo", timeout=None if timeout is None else timedelta(seconds=timeout)
    )
    if cfg.get("model_wrapper_cfg") is None:
        cfg.model_wrapper_cfg = dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )


# ------------------------------------------------------------------------- a tool, begun and ended


def begin(
    parse_args: Callable[[], argparse.Namespace],
    *,
    needs_toolbox: bool = True,
    log_to_stderr: bool = False,
) -> argparse.Namespace:
    """Read a tool's arguments, and only then import what takes seconds.

    Where the compiled operators are missing, one message ends the process. :func:`run` does this. A
    tool that imports more at its head calls it before.

    Args:
        parse_args: reads them, and ends the process where there is a mistake.
        needs_toolbox: whether anything is imported then.
        log_to_stderr: what is logged meanwhile goes to the standard error.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, startup.end_at_once)
    args = parse_args()
    if getattr(args, "arguments_only", False):
        sys.exit(0)
    environment.check_launcher(getattr(args, "launcher", "none"))
    if needs_toolbox:
        with contextlib.redirect_stdout(sys.stderr) if log_to_stderr else contextlib.nullcontext():
            try:
                startup.load()
            except LibraryError as error:
                sys.exit(f"error: {error}")
    return args


def run(
    main: Callable[[argparse.Namespace], int | None],
    parse_args: Callable[[], argparse.Namespace],
    *,
    when_interrupted: str | None = None,
    needs_toolbox: bool = True,
    log_to_stderr: bool = False,
) -> None:
    """Run a tool: its arguments, what they need, and then `main`, which may give an exit status.

    A mistake in what the tool was given ends it with one message and exit status 1, as does what
    nobody's mistake is (:mod:`mmdcn.engine.failures`); an interruption (Ctrl-C) with one line and
    exit status 130, and SIGTERM with one line and 143.

    Args:
        main: is given the arguments.
        parse_args: see :func:`begin`.
        when_interrupted: what the user can do then.
        needs_toolbox: see :func:`begin`.
        log_to_stderr: see :func:`begin`.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        args = begin(parse_args, needs_toolbox=needs_toolbox, log_to_stderr=log_to_stderr)
        if signal.getsignal(signal.SIGINT) is startup.end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with failures.without_tracebacks(), _ended_by_sigterm(args):
            status = main(args)
    except (KeyboardInterrupt, Exception) as error:
        _end_by(error, when_interrupted)
    finally:
        signal.signal(signal.SIGINT, handler)
        _leave_process_group()
    if status:
        sys.exit(status)


def _end_by(error: BaseException, when_interrupted: str | None) -> None:
    """End the program by the sentence that an error has; without one, raise it."""
    interruption = failures.interruption(error)
    if interruption is not None:
        # Of a distributed run each process is interrupted by the terminal, and by who started it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        is_terminated = isinstance(interruption, failures.Terminated)
        number = signal.SIGTERM if is_terminated else signal.SIGINT
        startup.end_interrupted(when_interrupted, number)
    if isinstance(error, InputError):
        _end(failures.without_worker(str(error)))
    if (what := failures.sentence(error)) is None:
        raise error
    _end(what)


def _ended_by_sigterm(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """What makes SIGTERM tidy up.

    A process of a distributed run may wait for others that have ended, where no code of ours runs.
    """
    is_alone = getattr(args, "launcher", "none") == "none"
    if not is_alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return contextlib.nullcontext()
    return failures.termination_raised()


def _end(message: str) -> NoReturn:
    # Every process of a distributed run comes here; one message is enough.
    sys.exit(f"error: {message}" if startup.is_first_process() else 1)


def _leave_process_group() -> None:
    # Where torch is not imported, there can be none.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
