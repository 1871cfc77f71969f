"""What holds for the command line of every tool and of every module that is run as a program."""

import ast
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .project import REPOSITORY

IS_MAIN = 'if __name__ == "__main__":'
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))
SCRIPTS = sorted((REPOSITORY / "tools").rglob("*.sh"))
MODULES = sorted(p for p in (REPOSITORY / "mmdcn").rglob("*.py") if IS_MAIN in p.read_text())
# This one is run with another version's mmdcn, whose parts it must not need.
OTHER = REPOSITORY / "mmdcn" / "benchmark" / "gpu" / "other_mmdcn.py"

TAKES_LONG = {"torch", "mmengine", "mmcv", "mmdet"}
SECONDS = 1.0


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def start(program: Path, *arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
    """The command that a user types."""
    if program.suffix == ".sh":
        return ["bash", str(program), *arguments]
    if program in TOOLS:
        return [sys.executable, *flags, str(program), *arguments]
    module = name(program).removesuffix(".py").replace("/", ".")
    return [sys.executable, *flags, "-m", module, *arguments]


def run(command: list[str], cwd: Path) -> tuple[subprocess.CompletedProcess, float]:
    """What the command says, and the seconds of processor time that it takes."""

    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    path = {"PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(command, cwd=cwd, env=path, capture_output=True, text=True, timeout=60)
    return done, seconds() - before


def test_the_programs_are_found():
    assert {"train.py", "image_demo.py", "demo.py"} <= {path.name for path in TOOLS}
    assert {"check.py", "worker.py"} <= {path.name for path in MODULES}


@pytest.mark.parametrize("program", [*TOOLS, *MODULES], ids=name)
def test_help_is_quick_and_nothing_else(program, tmp_path):
    done, seconds = run(start(program, "--help", flags=("-X", "importtime")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert imports == done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "argparse" in imported and not imported & TAKES_LONG
    assert seconds < SECONDS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [*TOOLS, *MODULES], ids=name)
def test_a_mistyped_option_is_seen_at_once(program, tmp_path):
    done, seconds = run(start(program, "--no-such-option"), tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    # Where an argument is required, it is asked for first.
    said = r": error: (unrecognized arguments: --no-such-option|the following arguments are requi)"
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    assert seconds < SECONDS


@pytest.mark.parametrize("program", SCRIPTS, ids=name)
def test_scripts_say_how_they_are_used(program, tmp_path):
    done, seconds = run(start(program, "--help"), tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert name(program) in done.stdout
    assert seconds < SECONDS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [p for p in (*TOOLS, *MODULES) if p != OTHER], ids=name)
def test_every_program_ends_as_the_launcher_ends_it(program):
    """Mistakes and interruptions: see the tests of :func:`mmdcn.engine.launch.run`."""
    (last,) = ast.parse(program.read_text()).body[-1:]
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    (call,) = last.body
    assert ast.unparse(call.value.func) == "launch.run"


@pytest.mark.parametrize("program", TOOLS, ids=name)
def test_a_tool_ends_in_one_line_from_its_first_import_on(program):
    """mmdcn's import sees to it that an interruption does not end in a traceback."""
    body = [node for node in ast.parse(program.read_text()).body if not is_first_of_all(node)]
    assert ast.unparse(body[0]) == "__arguments_first__ = True"
    assert isinstance(body[1], ast.ImportFrom)
    assert body[1].module.split(".")[0] == "mmdcn"


def is_first_of_all(node: ast.stmt) -> bool:
    """Whether Python lets nothing come before, as of a docstring."""
    return isinstance(node, ast.Expr) or getattr(node, "module", None) == "__future__"


MISTAKES = {
    "train.py": ["missing.py"],
    "test.py": ["missing.py", "missing.pth"],
    "export_onnx.py": ["missing.py", "missing.pth", "-o", "model.onnx"],
    "visualize_sampling.py": ["missing.py", "missing.pth", "missing.png"],
    "image_demo.py": ["missing.png", "missing.py", "missing.pth"],
    "dist_train.sh": ["missing.py", "2"],
    "dist_test.sh": ["missing.py", "missing.pth", "2"],
}


def test_every_tool_with_a_config_is_tried():
    with_config = {p.name for p in TOOLS if "launch.config_file" in p.read_text()}
    assert with_config | {"dist_train.sh", "dist_test.sh"} == set(MISTAKES)


@pytest.mark.parametrize("tool", MISTAKES)
def test_a_file_that_is_not_there_is_named_at_once(tool, tmp_path):
    done, seconds = run(start(REPOSITORY / "tools" / tool, *MISTAKES[tool]), tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: no config file 'missing.py'\n"
    assert seconds < SECONDS
    assert not list(tmp_path.iterdir())


CONFIG = str(REPOSITORY / "configs/demo/faster-rcnn_r50_fpn_demo.py")
PICTURE = str(REPOSITORY / "docs/evidence/receptive.png")
# What gets each program beyond its arguments; the file "checkpoint" is there.
COMPLETE = {
    "tools/train.py": [CONFIG],
    "tools/test.py": [CONFIG, "checkpoint"],
    "tools/export_onnx.py": [CONFIG, "checkpoint", "-o", "model.onnx"],
    "tools/visualize_sampling.py": [CONFIG, "checkpoint", PICTURE],
    "tools/image_demo.py": [PICTURE, CONFIG, "checkpoint"],
    "tools/dist_run.py": ["2", str(REPOSITORY / "tools/train.py"), CONFIG],
    "tools/demo.py": [],
    "tools/make_warped_shapes.py": ["shapes"],
    "tools/benchmark.py": ["ops"],
    "tools/evidence.py": [],
    "tools/fuzz.py": ["operators"],
    "tools/check_zoo.py": [],
    "tools/gpu_check.py": ["--part", "fast", "--out", "out.json"],
    "mmdcn/check.py": [],
    "mmdcn/benchmark/__main__.py": ["family"],
}


def test_every_tool_is_tried_without_torch():
    assert {name(path) for path in TOOLS} <= set(COMPLETE)


@pytest.mark.parametrize("program", COMPLETE)
def test_a_python_without_torch_is_one_sentence(program, tmp_path):
    (tmp_path / "checkpoint").touch()
    # Without site, Python does not find what is installed.
    command = start(REPOSITORY / program, *COMPLETE[program], flags=("-S",))
    done, _ = run(command, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(rf"error: this Python \({sys.executable}\) has no module (torch|cv2): ", line)
    assert "activate the environment" in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh"])
def test_a_shell_without_python_is_one_sentence(script, tmp_path):
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    command = ["/bin/bash", str(REPOSITORY / "tools" / script), "a", "b", "c"]
    done = subprocess.run(
        command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.fullmatch("error: there is no python here: activate .*\n", done.stderr)


def interruptible(command: list, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Shells ignore interrupts on behalf of what they run in the background, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc, as Linux has")
@pytest.mark.parametrize("program", ["tools/demo.py", "mmdcn/check.py", "tools/benchmark.py"])
def test_an_interruption_while_torch_is_imported(program, tmp_path):
    arguments = ["ops"] if program == "tools/benchmark.py" else []
    process = interruptible(start(REPOSITORY / program, *arguments), tmp_path)
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_a_detector_trains(project):
    command = start(REPOSITORY / "tools/train.py", str(project.config), "--work-dir", "interrupted")
    options = ["train_cfg.max_epochs=1000", "default_hooks.checkpoint.interval=1000"]
    process = interruptible([*command, "--cfg-options", *options], project.root)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Epoch(train)" in line:
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, "".join(said) + output
    assert "Traceback" not in output
    assert output.splitlines()[-1] == (
        "interrupted; with --resume, the same command goes on from the last checkpoint"
    )


SLEEPER = """
import sys, time
from pathlib import Path
if sys.argv[-1] != "--arguments-only":
    Path(sys.argv[1]).with_suffix(sys.argv[2]).touch()
    time.sleep(60)
"""


def test_an_interruption_of_several_processes(tmp_path):
    """What torch's launcher says of itself is no traceback."""
    (tmp_path / "tool.py").write_text(SLEEPER)
    started = tmp_path / "started"
    process = interruptible(
        start(REPOSITORY / "tools/dist_run.py", "1", "tool.py", str(started), ".one"), tmp_path
    )
    try:
        while not started.with_suffix(".one").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "dist_run.py" not in output and "SignalException" not in output


def test_the_exit_status_of_several_processes_is_the_tools(tmp_path):
    (tmp_path / "tool.py").write_text("import sys; sys.exit(7 * (len(sys.argv) < 4))")
    done, _ = run(start(REPOSITORY / "tools/dist_run.py", "1", "tool.py"), tmp_path)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
