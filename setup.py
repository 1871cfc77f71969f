"""Builds mmdcn: the Python package and its compiled operators.

The operators use LibTorch's stable ABI and no Python symbol, so one wheel serves every Python from
3.10 and every torch from 2.10. Only torch's headers are needed, never its import: they are found in
the environment that mmdcn is installed into, also from inside pip's isolated build environment.

Environment variables:
    MMDCN_WITH_CUDA       0 leaves the CUDA library out, 1 insists on it; by default it is built
                          where nvcc is found, with or without a GPU
    TORCH_CUDA_ARCH_LIST  as for torch's own extensions, such as "8.0;9.0+PTX"; by default all of
                          CUDA_ARCHITECTURES that nvcc knows, and PTX for the newest of them
    CUDA_HOME, CXX        the CUDA toolkit and the C++ compiler to use
    MAX_JOBS              compilers that run side by side; default: the number of cores
    MMDCN_WERROR          1 makes compiler warnings errors
    MMDCN_SANITIZE        address or thread: builds the CPU library alone with AddressSanitizer and
                          UndefinedBehaviorSanitizer, or with ThreadSanitizer, into
                          build/sanitized/ADDRESS_OR_THREAD; `make sanitize` tests these
"""

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CSRC = Path("mmdcn/csrc")
# What mmengine and mim look for in a package of the toolbox, and where.
MIM = Path("mmdcn/.mim")
FOR_MIM = (
    *("model-index.yml", "configs/*/*.py", "configs/*/metafile.yml"),
    *("tools/*.py", "tools/*.sh"),
)
OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = (77, 0, 3)  # the first that reads the licence in pyproject.toml, as there
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
]
# Where in a cache line the multiplication begins its loops decides about a tenth of its time.
ALIGNED_LOOPS = "-falign-loops=64"
# GPUs that people train on: T4 and RTX 20, A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50. None of
# them is good for 11.0 (Jetson Thor), which would take a seventh more time to build.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Kernels do without what the compiler does not know: GCC 9 and 10 know none, or not the last two.
NEW_FLAGS = ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
CPU_CAPABILITIES = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, NEW_FLAGS[0]],
    "avx512_amx": [*AVX512, *NEW_FLAGS],
}

# As fast as what is shipped is neither the code under sanitizers nor its compilation; but the
# vectors and the loops are the same.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-DMMDCN_SANITIZED"]


def find_torch() -> Path:
    """The installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent.parent] if spec is not None and spec.origin else []
    # Inside pip's isolated build environment sys.path is narrowed; these still name the real one,
    # and what an environment may see beyond its own packages.
    places += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    places += [sysconfig.get_path("platlib", vars=base)]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    for place in places:
        if (Path(place) / "torch" / "version.py").is_file():
            return Path(place) / "torch"
    raise SystemExit(
        f"mmdcn needs PyTorch to be installed first: none was found for {sys.executable}. "
        "Install torch >= 2.10 into this environment, then install mmdcn again."
    )


def check_torch(torch: Path) -> None:
    version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text()).group(1)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(
            f"mmdcn needs torch >= {'.'.join(map(str, OLDEST_TORCH))}; {torch} is {version}. "
            "Upgrade torch, then install mmdcn again."
        )


def check_setuptools() -> None:
    version = setuptools.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"mmdcn needs setuptools >= {'.'.join(map(str, OLDEST_SETUPTOOLS))} to be built; "
            f"{sys.prefix} has {version}. pip install 'setuptools>=77.0.3,<81', of which mmcv and "
            "mmengine take none above 80, then install mmdcn again."
        )


def find_cxx() -> list[str]:
    named = os.environ.get("CXX", "").split()
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise SystemExit(
        "mmdcn needs a C++17 compiler and found none: install one (Debian or Ubuntu: "
        "apt-get install g++), or name it in CXX, then install mmdcn again."
    )


def find_nvcc() -> str | None:
    """nvcc, or None where the CUDA library is not to be built."""
    wanted = os.environ.get("MMDCN_WITH_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MMDCN_WITH_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "MMDCN_WITH_CUDA=1 asks for the CUDA library, but nvcc was not found: install the CUDA "
            "toolkit, or name its folder in CUDA_HOME."
        )
    return nvcc


def wanted_sanitizer() -> str | None:
    wanted = os.environ.get("MMDCN_SANITIZE") or None
    if wanted is not None and wanted not in SANITIZERS:
        raise SystemExit(f"MMDCN_SANITIZE: expected {' or '.join(SANITIZERS)}, got {wanted!r}")
    return wanted


def cuda_home(nvcc: str) -> Path:
    """The toolkit that nvcc belongs to. nvcc may be a script or a link elsewhere: it is asked."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    if top is None:
        raise SystemExit(f"{nvcc} does not work: {said.stderr.strip() or said.stdout.strip()}")
    return Path(top.group(1)).resolve()


def known_architectures(nvcc: str) -> str:
    """The default for TORCH_CUDA_ARCH_LIST."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    listed = said.stdout.split()
    known = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in listed]
    if not known:
        raise SystemExit(
            f"{nvcc} compiles for none of {', '.join(CUDA_ARCHITECTURES)}; it lists "
            f"{said.stdout.strip() or said.stderr.strip()!r}. Name architectures in "
            "TORCH_CUDA_ARCH_LIST, or install another CUDA toolkit."
        )
    return ";".join(known) + "+PTX"


def cuda_architectures(nvcc: str) -> list[str]:
    """nvcc's -gencode arguments for TORCH_CUDA_ARCH_LIST."""
    arguments = []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures(nvcc)
    for entry in re.split(r"[;, ]+", listed.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                "TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX', got "
                f"{entry!r} in {listed!r}"
            )
        number = "".join(match.group(1, 2, 3))
        arguments.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            arguments.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return arguments


def is_newest(target: Path, included: Path) -> bool:
    """Whether no file that the compiler read for the target, by the list it left, has changed."""
    if not included.is_file():
        return False
    listed = included.read_text().replace("\\\n", " ").partition(":")[2]
    made = target.stat().st_mtime
    # A name with a space in it is escaped; what does not exist under the name found here is taken
    # for changed.
    paths = [Path(name) for name in listed.split()]
    return all(path.is_file() and path.stat().st_mtime <= made for path in paths)


class BuildPackage(build_py):
    """Adds configs and tools to the package, in the folder ``.mim``."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            # Links, as in a checkout: a source distribution has none.
            MIM.mkdir(exist_ok=True)
            for name in ("model-index.yml", "configs", "tools"):
                if not (MIM / name).is_symlink():
                    (MIM / name).symlink_to(Path("../..") / name)
            return
        for source, target in self.for_mim():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def for_mim(self) -> list[tuple[Path, Path]]:
        """Each file, and its place in the built package."""
        sources = sorted(path for pattern in FOR_MIM for path in Path().glob(pattern))
        return [(source, Path(self.build_lib) / MIM / source) for source in sources]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [] if self.editable_mode else [str(target) for _, target in self.for_mim()]
        return super().get_outputs(include_bytecode) + added


class BuildOperators(build_ext):
    """Compiles mmdcn/_cpu and mmdcn/_cuda with the C++ compiler and nvcc, in parallel."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # Not setuptools' temporary folder, where all would be compiled once more: here are the
            # objects of `build_ext --inplace`.
            folder = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(Path("build") / folder)
        self.sanitizer = wanted_sanitizer()
        if self.sanitizer is not None:
            # Apart from all that is meant to be used.
            self.inplace = False
            self.build_lib = str(Path("build") / "sanitized" / self.sanitizer)
            self.build_temp = str(Path(self.build_lib) / "objects")

    def build_extensions(self) -> None:
        self.torch = find_torch()
        check_torch(self.torch)
        self.cxx = find_cxx()
        self.strict = os.environ.get("MMDCN_WERROR") == "1"
        # Each command is (what it makes, what it is made from, the command line).
        compilations, links = [], []
        for extension in self.extensions:
            objects = self.cuda_objects() if extension.name.endswith("cuda") else self.cpu_objects()
            compilations += objects
            target = Path(self.get_ext_fullpath(extension.name))
            links.append((extension.name, target, [target_of for target_of, _ in objects]))
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda one: self.compile_one(*one), compilations))
        for name, target, objects in links:
            self.link(name, target, objects)

    def object_path(self, source: Path, *variant: str) -> Path:
        """An object's own name: folders have sources of the same name."""
        name = "_".join([*source.relative_to(CSRC).with_suffix("").parts, *variant])
        return Path(self.build_temp) / f"{name}.o"

    def cxx_flags(self) -> list[str]:
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
        # Nobody looks at the floating-point exception flags, and minding them stops vectorisation.
        flags += ["-fno-math-errno", "-fno-trapping-math"]
        flags += ["-Wall", "-Wextra"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags.append("-march=x86-64-v2")
        if self.sanitizer is not None:
            flags += [*SANITIZED, *SANITIZERS[self.sanitizer]]
        return [*flags, "-Werror"] if self.strict else flags

    def torch_flags(self) -> list[str]:
        target = (OLDEST_TORCH[0] << 56) | (OLDEST_TORCH[1] << 48)
        include = self.torch / "include"
        # -isystem: warnings in torch's headers are not ours to fix.
        return [
            f"-DTORCH_TARGET_VERSION={target:#018x}",
            *("-isystem", str(include)),
            *("-isystem", str(include / "torch" / "csrc" / "api" / "include")),
        ]

    def unknown_flags(self) -> set[str]:
        """Those of NEW_FLAGS that the compiler does not take."""
        command = [*self.cxx, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
        tried = {flag: subprocess.run([*command, flag], capture_output=True) for flag in NEW_FLAGS}
        return {flag for flag, done in tried.items() if done.returncode != 0}

    def cpu_objects(self) -> list[tuple[Path, list[str]]]:
        x86 = platform.machine() in ("x86_64", "AMD64")
        unknown = self.unknown_flags() if x86 else set()
        commands = []
        for source in [CSRC / "library.cpp", *sorted((CSRC / "cpu").rglob("*.cpp"))]:
            if source.stem.endswith("kernel"):
                for capability, flags in CPU_CAPABILITIES.items():
                    if capability != "portable" and not x86:
                        continue
                    define = f"-DMMDCN_CPU_CAPABILITY={capability}"
                    target = self.object_path(source, capability)
                    known = [flag for flag in flags if flag not in unknown]
                    command = [*self.cxx, *self.cxx_flags(), *known, ALIGNED_LOOPS, define]
                    commands.append((target, [*command, "-c", str(source), "-o", str(target)]))
            else:
                target = self.object_path(source)
                command = [*self.cxx, *self.cxx_flags(), *self.torch_flags()]
                commands.append((target, [*command, "-c", str(source), "-o", str(target)]))
        # The longest compilations first.
        return sorted(commands, key=lambda command: "kernel" not in command[0].name)

    def cuda_objects(self) -> list[tuple[Path, list[str]]]:
        nvcc = find_nvcc()
        cuda = cuda_home(nvcc)
        commands = []
        for source in sorted((CSRC / "cuda").rglob("*.cu")):
            target = self.object_path(source)
            command = [nvcc, "-std=c++17", "-O3", *cuda_architectures(nvcc), "-ccbin", self.cxx[0]]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xptxas", "-v"]
            if self.strict:
                command += ["-Werror", "all-warnings", "-Xcompiler", "-Werror"]
            commands.append((target, [*command, "-c", str(source), "-o", str(target)]))
        for source in sorted((CSRC / "cuda").rglob("*.cpp")):
            target = self.object_path(source)
            command = [*self.cxx, *self.cxx_flags(), "-DUSE_CUDA", *self.torch_flags()]
            command += ["-isystem", str(cuda / "include")]
            commands.append((target, [*command, "-c", str(source), "-o", str(target)]))
        return commands

    def compile_one(self, target: Path, command: list[str]) -> None:
        """Runs the command unless the object is newer than all that it was made from."""
        recipe, included = target.with_suffix(".command"), target.with_suffix(".d")
        current = target.is_file() and recipe.is_file() and recipe.read_text() == str(command)
        if current and is_newest(target, included):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        recipe.unlink(missing_ok=True)
        print(f"compiling {target.stem}", flush=True)
        said = self.run_command([*command, "-MMD", "-MF", str(included)])
        # What ptxas says of each kernel's registers and memory is kept for the tests to read.
        about_kernels = [line for line in said if re.match(r"ptxas info|\s+\d+ bytes", line)]
        if about_kernels:
            target.with_suffix(".kernels").write_text("\n".join(about_kernels))
        for line in said:
            if line not in about_kernels:
                print(line, file=sys.stderr, flush=True)
        recipe.write_text(str(command))

    def link(self, name: str, target: Path, objects: list[Path]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.cxx, "-shared", *map(str, objects)]
        if self.sanitizer is not None:
            command += SANITIZERS[self.sanitizer]
        if name.endswith("cuda"):
            # The library names libtorch_cuda.so as needed, so that the loader resolves torch's
            # CUDA symbols when it is loaded; an empty stub of that name stands in for it here,
            # where torch may be a CPU build.
            stub = Path(self.build_temp) / "stub" / "libtorch_cuda.so"
            stub.parent.mkdir(parents=True, exist_ok=True)
            soname = "-Wl,-soname,libtorch_cuda.so"
            empty = ["-x", "c++", os.devnull]
            self.run_command([*self.cxx, "-shared", "-fPIC", soname, "-o", str(stub), *empty])
            cuda = cuda_home(find_nvcc())
            command += ["-Wl,--no-as-needed", str(stub), "-Wl,--as-needed"]
            command += [f"-L{cuda / folder}" for folder in ("lib64", "lib")]
            command += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        print(f"linking {target.name}", flush=True)
        temporary = target.with_suffix(".tmp")
        command += [f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(temporary)]
        self.run_command(command)
        temporary.replace(target)

    def run_command(self, command: list[str]) -> list[str]:
        """What the command wrote to its standard error, by lines."""
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr, flush=True)
            raise SystemExit(f"mmdcn's operators did not compile; failed: {' '.join(command)}")
        return done.stderr.splitlines()


def extensions() -> list[Extension]:
    files = sorted(path for path in CSRC.rglob("*") if path.is_file())
    sources = [str(path) for path in files if path.suffix == ".cpp"]
    others = [str(path) for path in files if path.suffix != ".cpp"]  # for source distributions
    with_cuda = wanted_sanitizer() is None and find_nvcc() is not None
    names = ["mmdcn._cpu"] + (["mmdcn._cuda"] if with_cuda else [])
    return [Extension(name, sources, depends=others, py_limited_api=True) for name in names]


def version() -> str:
    text = (ROOT / "mmdcn" / "version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def long_description() -> str:
    """README as it reads by itself: without pictures and links that lead into the checkout."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


check_setuptools()
setup(
    version=version(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOperators, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
