"""What this folder's build left of the CUDA sources, if it is current."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "mmdcn" / "csrc"


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [*(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def built(source: Path) -> Path | None:
    """The object that the build made of a source, beside which lie its ``.command`` and more.

    None unless warnings were errors then, and nothing that was compiled has changed since.
    """
    name = "_".join(source.relative_to(CSRC).with_suffix("").parts)
    for target in ROOT.glob(f"build/temp*/{name}.o"):
        recipe, included = (target.with_suffix(suffix) for suffix in (".command", ".d"))
        if not recipe.is_file() or "all-warnings" not in recipe.read_text():
            continue
        listed = included.read_text().replace("\\\n", " ").partition(":")[2].split()
        made = target.stat().st_mtime
        files = [ROOT / path for path in listed]
        if all(file.is_file() and file.stat().st_mtime <= made for file in files):
            return target
    return None
