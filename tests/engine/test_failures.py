"""What ends a tool by nobody's mistake: the sentence, and what it names."""

import errno
import io
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import urllib.error

import pytest
import torch

from mmdcn import files
from mmdcn.engine import failures
from tests.limits import limited_files

FULL = OSError(errno.ENOSPC, "No space left on device")


def caught(function):
    with pytest.raises(Exception) as info:
        function()
    return info.value


def raise_(error):
    raise error


@pytest.mark.parametrize("number", files.DISK_ERRORS)
def test_a_disk_error_names_the_file_that_was_to_be_complete(tmp_path, number):
    def write():
        with files.once_complete(tmp_path / "model.onnx") as temporary:
            temporary.touch()
            raise OSError(number, os.strerror(number))

    said = failures.sentence(caught(write))
    end = "is read-only" if number == errno.EROFS else "takes no more"
    assert said.startswith(f"the disk of {tmp_path}/model.onnx {end}")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has")
def test_a_disk_error_names_the_open_file():
    def write():
        with open("/dev/full", "w") as file:
            file.write("x")
            file.flush()

    error = caught(write)
    assert error.filename is None
    assert failures.sentence(error).startswith("the disk of /dev/full takes no more")


def limited_save(path):
    """torch's own writer, where files must not be larger than a kilobyte."""
    with limited_files(1000):
        torch.save(torch.zeros(100_000), path)


def test_what_torch_says_of_a_full_disk(tmp_path):
    error = caught(lambda: limited_save(tmp_path / "a.pt"))
    assert isinstance(error, RuntimeError)
    assert "takes no more (No space left on device)" in failures.sentence(error)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", r"\(signal: Killed\)"),
        (
            "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory.",
            "the shared memory",
        ),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "by the system, often"),
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", "shared memory"),
        ("unable to allocate shared memory(shm) for file </torch_1>: No space", "shared memory"),
    ],
)
def test_processes_that_read_the_data(message, said):
    assert re.search(said, failures.sentence(RuntimeError(message)))


def test_what_ended_such_a_process_is_named():
    def ends():
        try:
            raise RuntimeError(
                "DataLoader worker (pid 12) exited unexpectedly with exit code 3. Details are lost"
            )
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly") from error

    assert "(exit code 3)" in failures.sentence(caught(ends))


def test_other_errors_keep_their_tracebacks():
    for error in (
        RuntimeError("shape mismatch"),
        OSError(errno.ENOENT, "No such file"),
        ValueError("inline_container.cc"),
        AssertionError(),
        KeyError("x"),
    ):
        assert failures.sentence(caught(lambda error=error: raise_(error))) is None


def test_an_operator_that_the_device_has_not():
    def masked():
        from mmcv.ops import MaskedConv2d

        layer = MaskedConv2d(1, 1, 3, padding=1)
        layer(torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4))

    said = failures.sentence(caught(masked))
    assert said.startswith(
        "mmcv's operator masked_im2col_forward, which this model calls, does not"
    )
    assert said.endswith("compute on cpu: use another device, such as a GPU")


def test_an_image_is_named(tmp_path):
    from mmcv.transforms import LoadImageFromFile

    image = tmp_path / "a.png"
    for content in (b"\x89PNG\r\n\x1a\n", b"", None):
        if content is None:
            image.unlink()
        else:
            image.write_bytes(content)
        load = LoadImageFromFile()
        error = caught(lambda load=load: load({"img_path": str(image)}))
        assert str(image) in failures.sentence(error)


def test_a_mistake_that_a_process_of_a_data_loader_found():
    message = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "a.py", line 1\nmmdcn.errors.InputError: the annotations lack x\n'
    )
    assert failures.without_worker(message) == "the annotations lack x"
    assert failures.without_worker("no config") == "no config"


def test_downloads_come_before_disks():
    error = urllib.error.URLError("refused")
    assert failures.sentence(error).startswith("a download failed: refused")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has")
def test_a_log_that_takes_no_more_is_said_once(capsys):
    logger = logging.Logger("a log")
    logger.addHandler(logging.FileHandler("/dev/full"))
    before = logging.Handler.handleError
    with failures.without_tracebacks():
        logger.warning("one")
        logger.warning("two")
    assert capsys.readouterr().err == "/dev/full is incomplete: No space left on device\n"
    assert logging.Handler.handleError is before
    # What is wrong with a record itself is told as ever.
    logger = logging.Logger("another")
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    with failures.without_tracebacks():
        logger.warning("%d", "no number")
    assert "Traceback" in capsys.readouterr().err


PROGRAM = """
import os, sys, time
from mmdcn.engine import failures
try:
    with failures.termination_raised():
        if os.fork() == 0:
            os.write(1, b"child\\n")
            time.sleep(60)
            os._exit(9)
        os.write(1, b"parent\\n")
        time.sleep(60)
except failures.Terminated:
    _, status = os.wait()
    print("tidied up,", os.waitstatus_to_exitcode(status))
"""


def test_termination_is_raised_in_the_process_alone():
    process = subprocess.Popen(
        [sys.executable, "-c", "__arguments_first__ = True\n" + PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert {process.stdout.readline(), process.stdout.readline()} == {"child\n", "parent\n"}
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == f"tidied up, {-signal.SIGTERM}\n"


def test_disk_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(FULL))
    assert failures.of_disk(error) == failures.of_disk(FULL)
