"""What ends a tool by nobody's mistake, in a sentence: a failed download, a full disk."""

from __future__ import annotations

import errno
import os
import traceback
import urllib.error

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def of_download(error: urllib.error.URLError) -> str:
    """What to do about a download that failed, with the address where it is known."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    urls = (frame.f_locals.get("url") for frame in frames)
    url = next((url for url in urls if isinstance(url, str)), None)
    what = f" of {url}" if url else ""
    reason = error if isinstance(error, urllib.error.HTTPError) else error.reason
    return (
        f"a download failed{what}: {reason}. Download it elsewhere, and name the file in place of "
        "the address"
    )


def of_disk(error: OSError) -> str | None:
    """What to do about a disk that takes no more; None where that is not what happened."""
    if error.errno not in _FULL and error.errno != errno.EROFS:
        return None
    where = f" of {os.fspath(error.filename)}" if error.filename else ""
    if error.errno == errno.EROFS:
        return f"the disk{where} is read-only: choose another folder"
    return (
        f"the disk{where} takes no more ({os.strerror(error.errno)}): free some of it, or choose "
        "another folder, and start again. Files that were there before are whole"
    )
