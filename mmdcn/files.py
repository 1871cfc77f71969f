"""Files: images that are found, and what is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmdcn.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

#: The endings of the files that are taken for images, in lower case: those that mmdet takes.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


#: What the system says where a disk takes no more, or takes nothing.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def images_in(folder: Path) -> Iterator[Path]:
    """The images of a folder, by name."""
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The images that files, folders and patterns such as ``photos/*.jpg`` name, each once.

    Raises:
        InputError: one of them names no image.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            images = list(images_in(path))
            expected = f"a folder with images ({', '.join(IMAGE_SUFFIXES)})"
        elif path.is_file():
            images, expected = [path], ""
        else:
            matches = map(Path, sorted(glob.glob(text, recursive=True)))
            images = [match for match in matches if match.is_file()]
            expected = "an image, a folder, or a pattern that fits some"
        if not images:
            raise InputError(f"no image {text!r}: expected {expected}")
        found += images
    return list(dict.fromkeys(found))


def read_image(path: str | Path) -> np.ndarray | None:
    """The pixels of an image file, (H, W, 3) uint8 in BGR; None where the toolbox reads none.

    OpenCV's own reading of a file gives what there is of one that was cut off; the toolbox decodes
    what it has read, and fails.
    """
    import cv2
    import numpy as np

    try:
        return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # of an empty file, or one that is too large
        return None


def check_readable(images: Sequence[Path]) -> None:
    """Check that at least one of some files is an image.

    Raises:
        InputError: none is.
    """
    if not any(read_image(path) is not None for path in images):
        more = f", nor any of {len(images) - 1} others" if len(images) > 1 else ""
        raise InputError(f"cannot read the image {images[0]}{more}")


def check_names_differ(images: Sequence[Path]) -> None:
    """Check that results which are named after their images do not take each other's place.

    Raises:
        InputError: two images of other folders, or of other formats, have the same name.
    """
    named: dict[str, Path] = {}
    for path in images:
        other = named.setdefault(path.stem, path)
        if other != path:
            raise InputError(
                f"{other} and {path} would give results of the same name: call once for each, "
                "with another --out-dir"
            )


def unwritable(path: str | Path) -> str | None:
    """Why a folder cannot be made or written, None where it can.

    Example:
        >>> unwritable("/dev/null/results")
        "cannot write to '/dev/null/results', as '/dev/null' is not a folder"
    """
    place = Path(path).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return f"cannot write to {str(path)!r}, as {str(place)!r} is not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        why = (
            f"the disk of {str(place)!r} is read-only"
            if read_only
            else f"no permission in {str(place)!r}"
        )
        return f"cannot write to {str(path)!r}: {why}"
    # Some file systems refuse what permissions allow: /proc, or those that are mounted to be read.
    try:
        with tempfile.TemporaryDirectory(prefix=".mmdcn_", dir=place):
            return None
    except OSError as error:
        return f"cannot write to {str(path)!r}: {error.strerror} in {str(place)!r}"


def check_folder(folder: Path, argument: str) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Raises:
        InputError: it is a file, or is in a place that cannot be written to.
    """
    if problem := unwritable(folder):
        raise InputError(f"argument {argument}: {problem}")


@contextlib.contextmanager
def once_complete(path: Path) -> Iterator[Path]:
    """Give a temporary name beside a file, whose place it takes when the block ends without error.

    The folders that the file is in are made. What a process that was killed has left of the
    temporary file is written over; two processes that write the same file at once have a temporary
    file each. Where the disk takes no more, the error has the file's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer_in(path.parent) as is_only:
            temporary = path.with_name(f".{path.name}.{'' if is_only else f'{os.getpid()}.'}new")
            try:
                yield temporary
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def _only_writer_in(folder: Path) -> Iterator[bool]:
    """Whether nobody else is in this block with the same folder, however their process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_only = not isinstance(error, BlockingIOError)  # else a file system without locks
        else:
            is_only = True
        yield is_only
    finally:
        os.close(descriptor)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, and the folders that it is in, under a temporary name until it is complete."""
    with once_complete(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_figure(path: Path, figure: Figure, dpi: int = 100) -> None:
    """Write a figure as PNG, the same for the same figure whatever matplotlib's version says."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    write(path, buffer.getvalue())
