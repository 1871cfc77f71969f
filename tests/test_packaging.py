"""Building, installing and loading: the wheel, and the errors where something is missing."""

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mmdcn.errors import LibraryError
from tests.programs import Program

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build needs, so that the checkout's own libraries stay as they are.

    Objects that the checkout's build has left come along: those that are current are linked, and
    not compiled again.
    """
    folder = tmp_path_factory.mktemp("source")
    for name in ("mmdcn", "configs", "tools"):
        unwanted = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
    for objects in ROOT.glob("build/temp*"):
        shutil.copytree(objects, folder / "build" / objects.name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "model-index.yml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", "dist", "."),
        cwd=source,
        MMDCN_WITH_CUDA="0",
        MMDCN_WERROR="1",  # as `make` compiles
    )
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_is_abi3_and_complete(wheel):
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "mmdcn/_cpu.abi3.so" in names
    assert "mmdcn/_cuda.abi3.so" not in names  # MMDCN_WITH_CUDA=0
    assert {"mmdcn/__init__.py", "mmdcn/ops/reference.py", "mmdcn/check.py"} <= set(names)
    assert "mmdcn/visualization/sampling_page.html" in names
    assert not [name for name in names if name.startswith(("tests/", "mmdcn/csrc/"))]


def test_wheel_has_configs_and_tools_for_those_without_a_checkout(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("configs", "*/*"), ("tools", "*")):
        files = [path for path in (ROOT / folder).glob(pattern) if path.is_file()]
        wanted = {f"mmdcn/.mim/{path.relative_to(ROOT)}" for path in files}
        assert len(wanted) > 10 and wanted <= names
    assert "mmdcn/.mim/model-index.yml" in names


def test_metadata_read_by_themselves(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "The mmdcn developers"
    assert metadata.get_all("Project-URL") is None
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert description.startswith("# mmdcn\n")
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert [link for link in links if not link.startswith("https://")] == []


#: The distributions behind imports of other names.
DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "pillow"}
#: What an environment with torch and the toolbox has of its own.
TOOLBOX = {"torch", "mmengine", "mmcv", "mmdet"}
#: What is measured beside ours where it is installed, and said to be missing where it is not.
PEERS = {"torchvision"}


def test_extras_name_what_the_package_and_its_tools_import():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11 and newer")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = settings["optional-dependencies"]
    # Names without what narrows them down.
    offered = {re.split(r"[^\w.-]", each)[0] for extra in extras.values() for each in extra}
    imported = set()
    for path in [*(ROOT / "mmdcn").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    ours = {"mmdcn", "tests"}  # Fuzzing belongs to a checkout, as its trials do.
    wanted = imported - set(sys.stdlib_module_names) - {*ours, *TOOLBOX, *PEERS}
    assert {DISTRIBUTIONS.get(name, name) for name in wanted} <= offered


def test_library_has_no_python_symbol(wheel, tmp_path):
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    zipfile.ZipFile(wheel).extract("mmdcn/_cpu.abi3.so", tmp_path)
    listed = run("nm", "--dynamic", "--undefined-only", str(tmp_path / "mmdcn/_cpu.abi3.so"))
    wanted = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert not [name for name in wanted if name.startswith(("Py", "_Py"))]
    # Nothing of torch's C++ interface, which changes with every release.
    assert not [name for name in wanted if "c10" in name or "2at" in name]


def test_installing_changes_no_other_package(wheel, tmp_path):
    report = tmp_path / "report.json"
    done = run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--force-reinstall", "--no-index"),
        *("--no-deps", "--report", str(report), str(wheel)),
    )
    assert done.returncode == 0, done.stderr
    assert [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]] == [
        "mmdcn"
    ]
    # With dependencies resolved, and no index to get any from: what is here must satisfy them.
    done = run(sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr


def test_wheel_works_installed(wheel, tmp_path):
    """From another folder, with its own libraries, and without the toolbox in sight."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('mmengine', 'mmcv', 'mmdet')));"
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name in ('mmengine', 'mmcv') else find(name, *a);"
        "import runpy; runpy.run_module('mmdcn.check', run_name='__main__')"
    )
    done = Program(["-c", code], tmp_path, {"PYTHONPATH": str(tmp_path / "site")}).finish()
    assert done.returncode == 0, done.stdout
    assert str(tmp_path / "site") in done.stdout
    assert done.stdout.count(" ok (") == 6 * 4  # operators, and dtypes
    assert "mmdcn's kernels compute on cpu." in done.stdout
    assert "CUDA library       not built" in done.stdout
    assert "toolbox (mmengine and mmcv) is not installed" in done.stdout


def test_check_reports_versions_libraries_and_takeover():
    done = run(sys.executable, "-m", "mmdcn.check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch              {torch.__version__}" in done.stdout
    assert "CPU library        loaded" in done.stdout
    assert "DCNv2" in done.stdout


def test_the_benchmark_is_used_by_itself_the_evidence_and_tools_only():
    imports = re.compile(
        r"^\s*(from|import) mmdcn\.benchmark|^\s*from mmdcn import .*\bbenchmark", re.M
    )
    package = ROOT / "mmdcn"
    assert imports.search((ROOT / "tools" / "benchmark.py").read_text())
    users = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if imports.search(path.read_text())
        and not {package / "benchmark", package / "evidence"} & set(path.parents)
    ]
    assert users == []


def test_import_without_compiled_library_names_the_fix(source, tmp_path):
    shutil.copytree(source / "mmdcn", tmp_path / "mmdcn")
    done = Program(["-c", "import mmdcn"], tmp_path, {"PYTHONPATH": str(tmp_path)}).finish()
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert issubclass(LibraryError, ImportError)
    assert last.startswith("mmdcn.errors.LibraryError: mmdcn's operators are not compiled")
    assert "pip install ." in last


def test_library_that_does_not_load_names_the_fix(source, tmp_path):
    shutil.copytree(source / "mmdcn", tmp_path / "mmdcn")
    (tmp_path / "mmdcn" / "_cpu.abi3.so").write_bytes(b"not a library")
    done = Program(["-c", "import mmdcn"], tmp_path, {"PYTHONPATH": str(tmp_path)}).finish()
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert (
        last.startswith("mmdcn.errors.LibraryError:") and f"under torch {torch.__version__}" in last
    )
    assert "pip install ." in last


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"CXX": "no-such-compiler"}, "needs a C++17 compiler"),
        ({"MMDCN_WITH_CUDA": "yes"}, "MMDCN_WITH_CUDA: expected 0 or 1, got 'yes'"),
        (
            {"MMDCN_WITH_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"},
            "TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX', got 'Hopper'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_build_says_what_is_missing(source, environment, sentence):
    if "TORCH_CUDA_ARCH_LIST" in environment and shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, **environment)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("version", "is_old"), [("65.5.0", True), ("77.0.1", True), ("80.9", False)]
)
def test_build_asks_for_a_setuptools_that_reads_the_metadata(source, version, is_old):
    """Python 3.10 and 3.11 give new environments an older one."""
    assert 'requires = ["setuptools>=77.0.3"]' in (ROOT / "pyproject.toml").read_text()
    program = f"""
import runpy, setuptools, sys
setuptools.__version__ = {version!r}
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = run(sys.executable, "-c", program, cwd=source)
    assert done.returncode == int(is_old), done.stderr
    assert ("mmdcn needs setuptools >= 77.0.3 to be built" in done.stderr) == is_old
    assert "Traceback" not in done.stderr
