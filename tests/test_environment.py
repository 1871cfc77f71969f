"""Set-up of the environment: what it says is missing, and how it compiles mmcv."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tools" / "environment"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments, path, sentence",
    [
        (("python3", "nonsense"), None, "TOOLBOX=nonsense: expected openmmlab or onedl"),
        (("no-such-python", "openmmlab"), None, "no no-such-python: install Python 3.10 or newer"),
        (("python3", "openmmlab"), "only-python", "no C++ compiler: install one"),
    ],
)
def test_environment_says_what_is_missing(tmp_path, arguments, path, sentence):
    python, toolbox = arguments
    environment = {"CXX": ""}
    if path:
        folder = tmp_path / path
        folder.mkdir()
        for tool in ("bash", "dirname", "env"):
            (folder / tool).symlink_to(shutil.which(tool))
        (folder / "python3").symlink_to(sys.executable)
        environment["PATH"] = str(folder)
    done = run(SCRIPTS / "setup.sh", tmp_path / "venv", python, toolbox, **environment)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def compile_one(tmp_path):
    """Compiles a file that includes torch's header, one of our own here, by the script."""
    header = tmp_path / "include" / "torch" / "types.h"
    header.parent.mkdir(parents=True)
    header.write_text("#pragma once\ninline int one() { return 1; }\n")
    precompiled = tmp_path / "precompiled"
    precompiled.mkdir()
    (tmp_path / "one.cpp").write_text("#include <torch/types.h>\nint two() { return one() + 1; }\n")

    def compile_one(*flags: str, **environment: str) -> subprocess.CompletedProcess:
        command = [SCRIPTS / "precompiled_cxx.sh", "-MMD", "-MF", tmp_path / "one.d"]
        command += [f"-I{tmp_path / 'include'}", *flags]
        command += ["-c", tmp_path / "one.cpp", "-o", tmp_path / "one.o"]
        return run(*command, PRECOMPILED=str(precompiled), **environment)

    return compile_one


def test_headers_are_compiled_once(compile_one, tmp_path):
    assert compile_one("-O1").returncode == 0
    compiled = tmp_path / "precompiled" / "torch_types.h.gch"
    made = compiled.stat().st_mtime_ns
    (tmp_path / "one.o").unlink()
    done = compile_one("-O1", "-H")
    assert done.returncode == 0, done.stderr
    assert f"! {compiled}" in done.stderr  # as GCC says that it is used
    assert compiled.stat().st_mtime_ns == made
    assert (tmp_path / "one.o").is_file()
    assert "one.o:" in (tmp_path / "one.d").read_text()


def test_without_compiled_headers_files_are_compiled_all_the_same(compile_one, tmp_path):
    compiler = tmp_path / "refuses"
    compiler.write_text('#!/bin/sh\ncase "$*" in *c++-header*) exit 1 ;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    done = compile_one(PRECOMPILED_CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "precompiled" / "torch_types.h.gch").exists()
    assert (tmp_path / "one.o").is_file()


def test_compiled_headers_that_cannot_be_used_do_no_harm(compile_one, tmp_path):
    broken = tmp_path / "precompiled" / "torch_types.h"
    broken.write_text("#error not for this file\n")
    broken.with_suffix(".h.gch").write_bytes(b"nothing")
    done = compile_one()
    assert done.returncode == 0
    assert (tmp_path / "one.o").is_file()


def test_an_error_of_the_file_is_an_error(compile_one, tmp_path):
    (tmp_path / "one.cpp").write_text("int two() { return one() +; }\n")
    done = compile_one()
    assert done.returncode != 0
    assert "error" in done.stderr


def test_progress_of_a_compilation(tmp_path):
    """Of a hundred lines, ten are told; the log has all."""
    lines = ["Collecting mmcv==2.1.0", "  Preparing metadata"]
    lines += [f"  [{k}/100] g++ -c error.cpp -o error.o" for k in range(1, 101)]
    lines += ["error.cpp:3:1: error: expected ;", "Successfully installed mmcv"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "progress.py", "mmcv", tmp_path / "log"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    told = done.stdout.splitlines()
    assert told[0] == lines[0]
    assert told[-2:] == lines[-2:]
    assert len(told) == 3 + 11
    assert told[1] == "    mmcv: 1 of 100 files"
    assert told[5] == "    mmcv: 40 of 100 files, less than a minute left"
    assert (tmp_path / "log").read_text().splitlines() == lines
