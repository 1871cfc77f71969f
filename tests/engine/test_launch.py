"""Arguments and configs of the tools, without running them."""

import argparse
import os

import pytest
from mmengine.config import Config

from mmdcn.engine import launch
from mmdcn.engine.checkpoint import UnsafeCheckpointError
from mmdcn.engine.preflight import ConfigError


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


@pytest.mark.parametrize("error", [ConfigError("a mistake"), UnsafeCheckpointError("a mistake")])
def test_mistakes_end_the_tool_with_one_message(error, monkeypatch):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        launch.run(main)
    assert stop.value.code == "error: a mistake"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        launch.run(main)
    assert stop.value.code == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        launch.run(lambda: 1 / 0)
