"""Arguments and configs of the tools, without running them."""

import argparse
import errno
import os
import re
import signal
import sys
import threading

import pytest
from mmengine.config import Config

from mmdcn import startup
from mmdcn.engine import config_keys, environment, launch
from mmdcn.engine.checkpoint import UnsafeCheckpointError
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import InputError
from mmdcn.ops import _library


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Parse the shared options for a config with the given text."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # restored afterwards; load_config sets it where absent

    def parse(*options, text="optim_wrapper = dict(optimizer=dict(lr=1.0))\nhooks = [dict(a=1)]\n"):
        config = tmp_path / "some_config.py"
        config.write_text(text)
        parser = argparse.ArgumentParser()
        parser.add_argument("config")
        parser.add_argument("--work-dir")
        launch.add_arguments(parser)
        return parser.parse_args([str(config), *options])

    return parse


def test_options_override_the_config(arguments):
    options = ["optim_wrapper.optimizer.lr=0.5", "hooks.0.a=2", "new.key=[1,2]"]
    cfg = launch.load_config(arguments("--cfg-options", *options))
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert cfg.hooks[0].a == 2
    assert cfg.new.key == [1, 2]
    assert cfg.launcher == "none"


def test_the_work_folder_is_the_option_or_the_config_or_its_name(arguments):
    assert launch.load_config(arguments()).work_dir == os.path.join("work_dirs", "some_config")
    text = "work_dir = 'here'"
    assert launch.load_config(arguments(text=text)).work_dir == "here"
    assert launch.load_config(arguments("--work-dir", "there", text=text)).work_dir == "there"


@pytest.mark.parametrize("spelling", ["--local_rank", "--local-rank"])
def test_the_local_rank_is_taken_from_the_launcher(arguments, monkeypatch, spelling):
    monkeypatch.delenv("LOCAL_RANK")
    launch.load_config(arguments(f"{spelling}=3"))
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_base_ = './missing.py'", "missing.py"),
        ("_base_ = 'mmdet::faster_rcnn/missing.py'", "missing.py"),
        ("model = dict(", "was never closed"),
        ("custom_imports = dict(imports=['no_such_module'])", "no_such_module"),
    ],
)
def test_a_config_that_cannot_be_read(arguments, text, expected):
    with pytest.raises(ConfigError, match=r"cannot read the config .*some_config\.py: ") as error:
        launch.load_config(arguments(text=text))
    assert expected in str(error.value)


def test_a_config_that_is_not_there():
    with pytest.raises(ConfigError, match=r"no config file 'missing\.py'"):
        launch.load_config(argparse.Namespace(config="missing.py", cfg_options=None, local_rank=0))


@pytest.mark.parametrize("option", ["hooks.5.a=1", "hooks.name.a=1"])
def test_options_that_do_not_fit(arguments, option):
    with pytest.raises(ConfigError, match="--cfg-options do not fit"):
        launch.load_config(arguments("--cfg-options", option))


@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_launchers_that_need_a_gpu_say_so(launcher, monkeypatch):
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    with pytest.raises(ConfigError, match=f"--launcher {launcher} needs a GPU"):
        launch.build_runner(Config(dict(launcher=launcher)))


@pytest.mark.parametrize("setting", ["a=[1,2", "a=[1,(2]"])
def test_settings_that_cannot_be_read(arguments, setting):
    args = arguments("--cfg-options", "new=1", setting)
    expected = re.escape(f"--cfg-options: cannot read {setting!r}: ")
    with pytest.raises(ConfigError, match=expected):
        launch.load_config(args)


@pytest.mark.parametrize(
    "value", ["dict(x=1,y=2)", "[dict(x=1),dict(y=2)]", "{'x':1}", "({'x':1,'y':2},3)"]
)
def test_dictionaries_are_no_settings(arguments, value):
    """mmengine takes some for words, and of others finds no end."""
    args = arguments("--cfg-options", f"hooks={value}", "b=1")
    with pytest.raises(
        ConfigError, match=r"no dictionaries; set their entries \(hooks\.NAME=VALUE"
    ):
        launch.load_config(args)


@pytest.mark.parametrize(
    "options",
    [
        ["hooks=[dict(a=1),", "dict(b=2)]", "c=3"],
        ["hooks=[dict(a=1,", "b=2),", "dict(c=3)]"],
        ["hooks=[", "dict(a=1)]"],
        ["hooks=[dict(", "a=1)]"],
        ["hooks=[{'b':1},", "{'c':2}]"],
        ["hooks=[1,", "2]"],
        ["hooks=(1,", "2,"],
    ],
)
def test_a_list_that_the_shell_has_split(arguments, capsys, options):
    """Parts of it that have a `=` are no settings, such as of the key `dict(b`."""
    try:
        args = arguments("--cfg-options", *options)
    except SystemExit:
        said = capsys.readouterr().err
        assert "expected KEY=VALUE, got" in said
        assert "; a value is one argument, without spaces" in said
    else:
        with pytest.raises(ConfigError, match=r"^--cfg-options: cannot read .*hooks=\["):
            launch.load_config(args)


@pytest.mark.parametrize("value", ["nope", "gpu", "cuda:", "cuda:x", "", "CPU"])
def test_devices_are_read_without_torch(value):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected one of cpu, .*got '{value}'"):
        environment.device_name(value)
    assert environment.device_name("cuda:1") == "cuda:1"


def test_settings_add_up(arguments):
    args = arguments("--cfg-options", "a=1,2", "b.c=x", "--cfg-options", "b.d=[(1,2),(3,4)]")
    assert launch.parse_settings(args.cfg_options) == {
        "a": [1, 2],
        "b.c": "x",
        "b.d": [(1, 2), (3, 4)],
    }


@pytest.mark.parametrize("setting", ["lr", "=1", ""])
def test_what_is_no_setting_is_named(arguments, capsys, setting):
    with pytest.raises(SystemExit):
        arguments("--cfg-options", setting)
    assert f"argument --cfg-options: expected KEY=VALUE, got {setting!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("README.md", r"expected a config file \(.py, .json, .yaml, .yml\), got '.*README.md'"),
        ("folder.py", "expected a config file, got the folder"),
        ("missing.py", "no config file"),
    ],
)
def test_what_is_no_config_file(tmp_path, name, expected):
    (tmp_path / "README.md").write_text("# Configs")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(InputError, match=expected):
        launch.config_file(str(tmp_path / name))


def test_settings_that_nobody_reads(arguments, monkeypatch):
    messages = []
    monkeypatch.setattr(config_keys, "print_log", lambda text, **_: messages.append(text))
    settings = ["modl.backbone.depth=18", "model.a=2", "load_from=a.pth", "xyz=1"]
    launch.load_config(arguments("--cfg-options", *settings, text="model = dict(a=1)\n"))
    first, second = messages
    assert "'modl.backbone.depth' changes nothing" in first
    assert first.endswith("no 'modl': did you mean 'model.backbone.depth'?")
    assert second.endswith("no 'xyz'")


VARIABLES = """
data_root = 'here/'
size = (8, 8)
train_dataloader = dict(dataset=dict(datasets=[dict(data_root=data_root)] * 2))
val_dataloader = test_dataloader = dict(dataset=dict(data_root=data_root))
"""


def test_variables_of_a_config_that_are_read_before_they_are_set(arguments, monkeypatch):
    messages = []
    monkeypatch.setattr(config_keys, "print_log", lambda text, **_: messages.append(text))
    settings = ["data_root=there/", "size=(9,9)", "val_dataloader.dataset.data_root=there/"]
    cfg = launch.load_config(arguments("--cfg-options", *settings, text=VARIABLES))
    assert cfg.test_dataloader.dataset.data_root == "here/"
    first, second = messages
    assert "'data_root' changes nothing" in first
    assert first.endswith(
        "already: set train_dataloader.dataset.datasets.0.data_root, "
        "train_dataloader.dataset.datasets.1.data_root, "
        "val_dataloader.dataset.data_root and 1 more"
    )
    assert second.endswith("value of 'size' already, and what has its value is to be set")


@pytest.mark.parametrize("launcher", ["pytorch", "slurm", "mpi"])
def test_what_a_launcher_sets(launcher, monkeypatch):
    variables = environment._SET_BY[launcher]
    for name in variables:
        monkeypatch.setenv(name, "1")
    environment.check_launcher(launcher)
    environment.check_launcher("none")
    for name in variables:
        monkeypatch.delenv(name)
        with pytest.raises(InputError, match=f"^--launcher {launcher}: expected .* {name}, which"):
            environment.check_launcher(launcher)
        monkeypatch.setenv(name, "1")


def test_a_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(InputError, match=r"^--show: there is no display .*: do without"):
        environment.check_display("do without")
    monkeypatch.setenv("MPLBACKEND", "agg")
    environment.check_display("do without")


def test_warnings_before_the_run_are_in_its_log_file(tmp_path, monkeypatch):
    from mmengine.logging import MMLogger
    from mmengine.runner import Runner

    logger = MMLogger(
        "log of warnings", logger_name="log_of_warnings", log_file=str(tmp_path / "a.log")
    )
    runner = argparse.Namespace(logger=logger)
    monkeypatch.setattr(Runner, "from_cfg", lambda cfg: runner)
    assert launch.build_runner(Config(dict(launcher="none")), ["of this"]) is runner
    assert "WARNING - of this\n" in (tmp_path / "a.log").read_text()


# A tool, begun and ended


@pytest.mark.parametrize("error", [ConfigError("a mistake"), UnsafeCheckpointError("a mistake")])
def test_mistakes_end_the_tool_with_one_message(error, monkeypatch):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        launch.run(main, argparse.Namespace)
    assert stop.value.code == "error: a mistake"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        launch.run(main, argparse.Namespace)
    assert stop.value.code == 1


def test_missing_operators_end_the_tool_with_one_message(monkeypatch, tmp_path):
    """And not a traceback: it is the first thing that a build which went wrong shows."""
    monkeypatch.setattr(_library, "CPU_LIBRARY", tmp_path / "_cpu.abi3.so")
    monkeypatch.setattr(startup, "load", _library.load)
    with pytest.raises(SystemExit) as ended:
        launch.run(lambda args: 0, argparse.Namespace)
    assert re.match("error: mmdcn's operators are not compiled: .*pip install", ended.value.code)


@pytest.mark.parametrize(
    "code,said",
    [
        (
            errno.ENOSPC,
            "error: the disk of /there/epoch_1.pth takes no more (No space left",
        ),
        (errno.EDQUOT, "error: the disk of /there/epoch_1.pth takes no more ("),
        (errno.EROFS, "error: the disk of /there/epoch_1.pth is read-only: choose another folder"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_sentence(code, said):
    def main(args):
        raise OSError(code, os.strerror(code), "/there/epoch_1.pth")

    with pytest.raises(SystemExit) as ended:
        launch.run(main, lambda: argparse.Namespace(), needs_toolbox=False)
    assert str(ended.value).startswith(said)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        launch.run(lambda args: 1 / 0, argparse.Namespace)


@pytest.mark.parametrize("toolbox", ["mmdcn", "mmdet"])
def test_a_mistyped_name_of_a_config(toolbox):
    right = f"{toolbox}::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
    assert launch.config_file(right) == right
    with pytest.raises(InputError, match=f"^{toolbox} has no config .* did you mean {right}"):
        launch.config_file(right.replace("coco", "coc"))
    # What is elsewhere is for mmengine to find.
    for name in ("no_such_package::a.py", "json::a.py", "::a.py", "no.such::a.py"):
        assert launch.config_file(name) == name


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/weights.pth", "http://"])
def test_a_download_that_fails_is_one_line(address, tmp_path):
    def main(_):
        from torch.hub import load_state_dict_from_url

        load_state_dict_from_url(address, model_dir=tmp_path, file_name="weights.pth")

    with pytest.raises(SystemExit) as stop:
        launch.run(main, argparse.Namespace)
    assert stop.value.code.startswith(f"error: a download failed of {address}: ")
    assert "name the file in place of the address" in stop.value.code


def test_main_is_given_the_arguments_and_gives_the_status():
    given = argparse.Namespace(name="value")
    got = []
    launch.run(got.append, lambda: given)
    assert got == [given]
    with pytest.raises(SystemExit) as stop:
        launch.run(lambda args: 3, argparse.Namespace)
    assert stop.value.code == 3


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible():
    """As a program in a terminal is; one in the background has interruptions ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("when", ["arguments", "imports", "main"])
def test_an_interruption_is_one_line_and_status_130(when, monkeypatch, capsys):
    does = {"arguments": argparse.Namespace, "imports": lambda: None, "main": lambda args: None}
    does[when] = interrupt
    monkeypatch.setattr(launch.startup, "load", does["imports"])
    monkeypatch.setattr(launch.startup.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        launch.run(does["main"], does["arguments"], when_interrupted="call again")
    assert stop.value.code == 130
    assert capsys.readouterr().err == (
        "interrupted; call again\n" if when == "main" else "interrupted\n"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
def test_a_signal_while_a_lock_is_waited_for_is_that_signal(number, status, said, capsys):
    """The lock's own error comes of it."""

    def main(_):
        condition = threading.Condition()
        with condition:
            condition.release()
            signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            launch.run(main, argparse.Namespace)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == status
    assert capsys.readouterr().err == said


def test_interruptions_stay_ignored(monkeypatch):
    """As those of a terminal are by what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        launch.run(interrupt, argparse.Namespace)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_only_the_first_process_tells_of_an_interruption(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        launch.run(interrupt, argparse.Namespace)
    assert capsys.readouterr().err == ""
