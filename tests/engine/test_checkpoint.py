"""Checkpoints are plain data: what mmengine writes loads, and nothing in a file is executed."""

import os
import pickle
import subprocess
import zipfile

import mmengine.runner.checkpoint as toolbox
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.fileio import dump
from mmengine.logging import HistoryBuffer
from mmengine.optim import MultiStepLR, OneCycleLR
from mmengine.runner import CheckpointLoader

from mmdcn.engine import checkpoint
from mmdcn.engine.checkpoint import UnsafeCheckpointError

pytestmark = pytest.mark.usefixtures("safe_checkpoints")


# ------------------------------------------------------------------------------ hostile files


class Call:
    """An object that, unpickled, is whatever `function(*args)` returns."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Pickle wants callables where a function goes."""


def open_through_getattr():
    """``open``, reached by attributes of a class that mmengine's checkpoints name."""
    function = Call(getattr, HistoryBuffer, "update")
    names = Call(getattr, function, "__globals__")
    builtins = Call(Call(getattr, names, "get"), "__builtins__")
    return Call(Call(getattr, builtins, "get"), "open")


def hostile(kind, target):
    """An object whose unpickling would create the file `target`."""
    return {
        "os.system": Call(os.system, f"touch {target}"),
        "open": Call(open, str(target), "w"),
        "exec": Call(exec, f"open({str(target)!r}, 'w')"),
        "subprocess": Call(subprocess.check_call, ["touch", str(target)]),
        "getattr": Call(open_through_getattr(), str(target), "w"),
        "print to file": Call(np.savetxt, str(target), [0.0]),
    }[kind]


KINDS = ["os.system", "open", "exec", "subprocess", "getattr", "print to file"]


def write(container, payload, path):
    if container == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": payload}, protocol=2))
    elif container == "zip":
        torch.save({"state_dict": {}, "meta": payload}, path)
    elif container == "legacy":
        torch.save({"meta": payload}, path, _use_new_zipfile_serialization=False)
    elif container == "message_hub":
        hub = {"log_scalars": {"loss": history(1.0)}, "runtime_info": {"best_ckpt": payload}}
        torch.save({"state_dict": {"weight": torch.ones(2)}, "message_hub": hub}, path)


def history(*values):
    return HistoryBuffer(list(values), [1] * len(values))


@pytest.mark.parametrize("container", ["pickle", "zip", "legacy", "message_hub"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, kind, container):
    target, path = tmp_path / "executed", tmp_path / "hostile.pth"
    write(container, hostile(kind, target), path)
    with pytest.raises(UnsafeCheckpointError, match="refused and nothing of it was executed") as e:
        CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    assert not target.exists()
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_the_hostile_files_are_hostile(tmp_path):
    # Without this the test above could pass on files that do nothing.
    for kind in KINDS:
        target, path = tmp_path / "executed", tmp_path / "hostile.pth"
        write("message_hub", hostile(kind, target), path)
        torch.load(path, weights_only=False)
        assert target.exists(), kind
        target.unlink()


def test_every_address_is_loaded_as_plain_data(tmp_path, monkeypatch):
    target = tmp_path / "executed"
    # A downloaded file is read from torch's cache, a model-zoo file from mmengine's folder.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    dump({"hostile": "hostile.pth"}, tmp_path / "open_mmlab.json")
    for path in (tmp_path / "hub" / "checkpoints" / "hostile.pth", tmp_path / "hostile.pth"):
        write("zip", hostile("open", target), path)
    for address in ("https://example.com/hostile.pth", "open-mmlab://hostile"):
        with pytest.raises(UnsafeCheckpointError, match="refused"):
            CheckpointLoader.load_checkpoint(address, map_location="cpu")
        assert not target.exists(), address


def test_getattr_reaches_only_the_members_that_mmengine_writes(tmp_path):
    path = tmp_path / "hostile.pth"
    for owner, name in [(HistoryBuffer, "__init__"), (OneCycleLR, "step"), (dict, "get")]:
        torch.save({"meta": Call(getattr, owner, name)}, path)
        with pytest.raises(UnsafeCheckpointError):
            checkpoint.load(path)


def test_users_who_allowed_getattr_are_safe_too(tmp_path):
    # The usual workaround for mmengine's checkpoints on today's torch.
    target, path = tmp_path / "executed", tmp_path / "file.pth"
    with torch.serialization.safe_globals([getattr, HistoryBuffer, np.dtype, np.ndarray]):
        torch.save({"meta": Call(getattr, HistoryBuffer, "__init__")}, path)
        with pytest.raises(UnsafeCheckpointError):
            checkpoint.load(path)
        torch.save({"log": history(1.0, 2.0)}, path)
        assert checkpoint.load(path)["log"].mean() == 1.5
    assert not target.exists()


def test_a_log_brings_no_functions_into_the_process(tmp_path):
    before = dict(HistoryBuffer._statistics_methods)
    functions = {"mean": torch.Size, "extra": torch.Size}
    state = {**history(1.0).__dict__, "statistics_methods": functions}

    class Buffer:
        def __reduce__(self):
            return HistoryBuffer, (), state

    torch.save(Buffer(), tmp_path / "log.pth")
    loaded = checkpoint.load(tmp_path / "log.pth")
    assert type(loaded) is HistoryBuffer
    assert HistoryBuffer._statistics_methods == before
    assert loaded.statistics("mean") == 1.0


@pytest.mark.parametrize("code", ["O8", "V8", "M8", "f8,O"])
def test_numpy_reads_no_pointers(tmp_path, code):
    array = np.zeros(1, "V8")

    class Array:
        def __reduce__(self):
            reconstruct, args, state = array.__reduce__()
            dtype = Call(np.dtype, code, False, True)
            return reconstruct, args, (*state[:2], dtype, False, b"\x41" * 8)

    torch.save(Array(), tmp_path / "array.pth")
    with pytest.raises(UnsafeCheckpointError, match="not plain data"):
        checkpoint.load(tmp_path / "array.pth")


def test_numpy_takes_no_records(tmp_path):
    class Dtype:
        def __reduce__(self):
            fields = {"a": (Call(np.dtype, "f8", False, True), 0)}
            state = (3, "|", None, ("a",), fields, 8, 8, 0)
            return np.dtype, ("f8", False, True), state

    torch.save(Dtype(), tmp_path / "dtype.pth")
    with pytest.raises(UnsafeCheckpointError, match="record"):
        checkpoint.load(tmp_path / "dtype.pth")


def test_text_that_resume_would_execute_is_out_of_its_reach(tmp_path):
    # Runner.resume runs meta['config'] as a Python file.
    torch.save({"meta": {"config": "x = 1", "epoch": 3}, "state_dict": {}}, tmp_path / "a.pth")
    meta = CheckpointLoader.load_checkpoint(str(tmp_path / "a.pth"))["meta"]
    assert meta == {"config_text": "x = 1", "epoch": 3}


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip", b"\x80\x02N"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(UnsafeCheckpointError, match=r"damaged\.pth .* nothing of it was executed"):
        checkpoint.load(path)


def test_a_small_file_does_not_become_a_large_one(tmp_path):
    path, small = tmp_path / "bomb.pth", tmp_path / "small.pth"
    torch.save({"x": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for name in whole.namelist():
            new.writestr(name, whole.read(name))
    assert torch.load(small, weights_only=True)["x"].numel() == 10**6
    assert small.stat().st_size < 10**5
    with small.open("rb") as file:
        for source in (small, file):
            with pytest.raises(UnsafeCheckpointError, match=r"small\.pth .* does not compress"):
                checkpoint.load(source)
    assert checkpoint.load(path)["x"].numel() == 10**6


def test_a_missing_file_is_not_called_unsafe(tmp_path):
    with pytest.raises(FileNotFoundError):
        CheckpointLoader.load_checkpoint(str(tmp_path / "missing.pth"))


# ------------------------------------------------------------------------------ honest files


def test_what_mmengine_writes_loads_as_it_was(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    schedulers = [
        OneCycleLR(optimizer, eta_max=1, total_steps=10),
        MultiStepLR(optimizer, milestones=[3, 4, 4]),
    ]
    saved = {
        "state_dict": layer.state_dict(),
        "log": history(1.0, 2.0),
        "scalars": [np.float32(3), np.int64(4), np.bool_(True), np.str_("text")],
        "big endian": np.arange(3, dtype=">i4"),
        "text": np.array(["ab", "c"]),
        "empty": np.zeros((0, 2)),
        "fortran": np.arange(6.0).reshape(2, 3, order="F"),
        "config": ConfigDict(a=1, b=dict(c=(1, 2))),
        "bytes": b"abc",
        "set": {1, 2},
        "optimizer": optimizer.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
    }
    for zipped in (True, False):
        path = tmp_path / "checkpoint.pth"
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        loaded = CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
        assert type(loaded["log"]) is HistoryBuffer
        loaded["log"].update(3.0)
        assert loaded["log"].statistics("mean", window_size=2) == 2.5
        for array in ("big endian", "text", "empty", "fortran"):
            assert isinstance(loaded[array], np.ndarray)
            np.testing.assert_array_equal(loaded[array], saved[array])
        assert loaded["scalars"] == saved["scalars"]
        assert list(map(type, loaded["scalars"])) == list(map(type, saved["scalars"]))
        assert type(loaded["config"]) is ConfigDict
        for plain in ("config", "bytes", "set", "optimizer", "schedulers"):
            assert loaded[plain] == saved[plain]
        for scheduler, state in zip(schedulers, loaded["schedulers"]):
            scheduler.load_state_dict(state)
            scheduler.step()
        torch.testing.assert_close(loaded["state_dict"], saved["state_dict"])

        # What is loaded and saved again does not depend on this package.
        torch.save(loaded, path)
        assert b"mmdcn" not in path.read_bytes()
        CheckpointLoader.load_checkpoint(str(path), map_location="cpu")


@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_files_of_numpy_1_and_2_load(tmp_path, module):
    path = tmp_path / "a.pth"
    torch.save({"x": np.float64(3), "y": np.ones(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes().replace(b"numpy._core", b"numpy.core")
    path.write_bytes(content.replace(b"numpy.core", module))
    assert module in path.read_bytes()
    loaded = checkpoint.load(path)
    assert loaded["x"] == 3 and loaded["y"].tolist() == [1, 1]


class Extra:
    """A user's class in a checkpoint."""


def test_users_allow_their_own_classes(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"extra": Extra()}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"Extra.*add_safe_globals"):
        checkpoint.load(path)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Extra]):
        assert isinstance(checkpoint.load(path)["extra"], Extra)
        assert set(torch.serialization.get_safe_globals()) == before | {Extra}


def test_install_can_be_undone(tmp_path):
    assert checkpoint.installed()
    assert toolbox.torch.load is checkpoint.load
    assert toolbox.torch.Tensor is torch.Tensor
    checkpoint.install()
    checkpoint.uninstall()
    assert not checkpoint.installed()
    assert toolbox.torch is torch
    checkpoint.install()
