"""A limit of the system's on the size of files, which stands for a full disk."""

import contextlib
import resource
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file of this process can be written beyond so many bytes: OSError, EFBIG."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
