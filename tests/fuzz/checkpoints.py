"""Damaged and hostile checkpoints: real files with some bytes changed, moved or repeated.

So are the texts of configs. Each is read, as plain data and nothing else, or refused with one
sentence. While it is read, no file, process, connection or module is opened, no code is compiled or
executed, and memory stays bounded.
"""

import dataclasses
import functools
import io
import resource
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch

from mmdcn.engine import checkpoint, config_text
from mmdcn.engine.checkpoint import UnsafeCheckpointError
from mmdcn.engine.config_text import ConfigTextError
from tests.fuzz.limits import limit_memory
from tests.fuzz.trials import ALONE, Source

MOST_MEMORY = 64 * 2**20  # bytes, for files of some kilobytes

# --------------------------------------------------------------------------------- what is damaged


def _content() -> dict:
    """What mmengine writes, small."""
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer
    from mmengine.optim import OneCycleLR

    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = OneCycleLR(optimizer, eta_max=1, total_steps=10)
    text = "model = dict(type='FasterRCNN', depth=[1, 2], norm=None)\n"
    return {
        "meta": {"epoch": 3, "iter": 7, "cfg": text, "dataset_meta": {"classes": ("a", "b")}},
        "state_dict": OrderedDict(layer.state_dict(), half=torch.ones(3).half()),
        "message_hub": {
            "log_scalars": OrderedDict(loss=HistoryBuffer([1.0, 2.0], [1, 1])),
            "runtime_info": OrderedDict(best=np.float32(3), cfg=ConfigDict(a=(1, 2)), text=text),
            "resumed_keys": {"loss": True},
        },
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [scheduler.state_dict()],
    }


def _zip() -> bytes:
    file = io.BytesIO()
    torch.save(_content(), file)
    return file.getvalue()


def _legacy() -> bytes:
    file = io.BytesIO()
    torch.save(_content(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


CONFIG = b"""auto_scale_lr = dict(base_batch_size=16, enable=False)
model = dict(
    bbox_head=dict(loss=dict(type='L1Loss', weight=-1.5), strides=[4, 8], 'a'),
    type='FasterRCNN', norm=None, sizes=(1, 2), flags={1, 2})
param = [dict({'a.b': 1e-05}, begin=0), dict(T_max=1.0)]
"""


@functools.cache
def original(kind: str) -> bytes:
    """A whole file of a kind; "record" has the bytes of a zip file's pickle alone."""
    if kind == "config":
        return CONFIG.replace(b", 'a'", b"")
    if kind == "record":
        return _record(_zip())
    return {"zip": _zip, "legacy": _legacy}[kind]()


def _record(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        return archive.read(name)


def _with_record(record: bytes, compressed: bool = False) -> bytes:
    """The zip file with another pickle, and the right checksum for it."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    old = zipfile.ZipFile(io.BytesIO(original("zip")))
    with old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, record if name.endswith("/data.pkl") else old.read(name))
    return file.getvalue()


# ------------------------------------------------------------------------------------ the damages

#: Parts of Python.
TEXT = [b"__import__('os').system('true')", b"eval('1')", b"open('x', 'w')", b"lambda: 0", b"dict("]
TEXT += [
    b"**",
    b"*",
    b"(",
    b")",
    b"[",
    b"{",
    b"=",
    b":",
    b"-",
    b"~",
    b"1 + 2j",
    b"'",
    b"f'{print()}'",
]
TEXT += [
    b"import os\n",
    b"_base_ = 'x'\n",
    b"del model\n",
    b"\n",
    b"\\N{dash}",
    b"\x00",
    b"9**9**9",
]
TEXT += [
    b"[" * 150,
    b"-" * 5000,
    b"(" * 300,
    b"1+" * 3000,
    b"if 1:\n ",
    b"[x for x in y]",
    b".__class__",
]
#: Opcodes of pickle, whole or with what follows them, and numbers that sizes may become.
PIECES = [
    *(bytes([code]) for code in b"()0.1245789abdelpqrstu}]~\x80\x81\x85\x86\x87\x88\x89\x93\x94Q"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nexec\n", b"cbuiltins\ngetattr\n"),
    *(b"c__builtin__\ngetattr\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"ctorch\nSize\n"),
    *(b"cbuiltins\nopen\n", b"csubprocess\nPopen\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n"),
    *(b"ctorch._utils\n_rebuild_qtensor\n", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n"),
    *(b"ctorch._utils\n_rebuild_nested_tensor\n", b"ctorch._utils\n_rebuild_parameter\n"),
    *(b"ctorch\ndevice\n", b"ctorch\nFloatStorage\n", b"ccollections\nCounter\n"),
    *(
        b"cmmengine.logging.history_buffer\nHistoryBuffer\n",
        b"ctorch\nTensor\n",
        b"ctorch\nbfloat16\n",
    ),
    *(b"(\x8c\x02osi", b"\x8c\x06system", b"\x8c\x08builtins", b"X\x04\x00\x00\x00eval", b"V\n"),
    *(struct.pack("<BI", 0x58, n) for n in (0, 2**20, 2**31 - 1, 2**32 - 1)),
    *(struct.pack("<BQ", code, 2**40) for code in b"\x8d\x8e\x96"),
    *(struct.pack("<Bi", 0x8B, n) + b"\x7f" * 8 for n in (8, -1, 2**31 - 1)),
    *(struct.pack("<Bi", 0x4A, n) for n in (-1, 0, 2**20, 2**30, -(2**31))),
    *(b"\x8a\x08" + struct.pack("<q", n) for n in (-1, 2**33, 2**40, 2**62, -(2**63))),
    *(struct.pack("<I", n) for n in (0, 1, 2**16, 2**31, 2**32 - 1)),
    *(b"\xff" * 8, b"\x00" * 8, b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x03\x04"),
]


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A checkpoint with damages, one after the other: what is done, where, and with what.

    Attributes:
        kind: "zip" and "legacy" are torch's formats; "record" is the pickle in a zip file, of
            which the checksum is right; "config" is the text of one.
        damages: each a name, a place and a number.
    """

    kind: str
    damages: tuple[tuple[str, int, int], ...] = ()

    IMPORTS: ClassVar[str] = "from tests.fuzz.checkpoints import *"

    @staticmethod
    def prepare() -> None:
        for kind in KINDS:
            _hold()
            Damaged(kind).check()
        warnings.simplefilter("ignore")
        sys.addaudithook(_audit)
        limit_memory(2**34)  # Whatever happens, other programs go on.
        _hold()

    def content(self) -> bytes:
        content, compressed = bytearray(original(self.kind)), False
        pieces = TEXT if self.kind == "config" else PIECES
        for name, place, number in self.damages:
            place %= len(content) + 1
            if name == "flip":
                if place < len(content):
                    content[place] ^= 1 << number % 8
            elif name == "byte":
                content[place : place + 1] = bytes([number % 256])
            elif name == "cut":
                del content[place:]
            elif name == "delete":
                del content[place : place + number % 40]
            elif name == "repeat":
                content[place:place] = content[place : place + number % 200] * (1 + number % 3)
            elif name == "move":
                taken = content[place : place + number % 60]
                del content[place : place + number % 60]
                content[number % (len(content) + 1) : 0] = taken
            elif name == "insert":
                content[place:place] = pieces[number % len(pieces)]
            elif name == "replace":
                piece = pieces[number % len(pieces)]
                content[place : place + len(piece)] = piece
            elif name == "splice":
                other = original(KINDS[number % len(KINDS)])
                content[place:] = other[min(place, len(other)) :]
            elif name == "compress":
                compressed = True
        content = bytes(content)
        return _with_record(content, compressed) if self.kind == "record" else content

    def check(self) -> None:
        content, loaded = self.content(), None
        SEEN.clear()
        _watch(*FORBIDDEN, *(() if self.kind == "config" else ("compile",)))
        try:
            if self.kind == "config":  # which is parsed, and that is called compiling
                loaded = config_text.read(content.decode("latin-1")).to_dict()
            else:
                loaded = checkpoint.load(io.BytesIO(content), map_location="cpu")
        except (UnsafeCheckpointError, ConfigTextError) as error:
            message = str(error)
            assert "nothing of it was executed" in message, message
            assert "\n" not in message and len(message) < 2000, f"{len(message)} characters"
        finally:
            _watch()
        taken = _held() - _HELD[0]
        assert taken < MOST_MEMORY, f"{taken} bytes were taken for {len(content)}"
        assert not SEEN, f"while it was read: {SEEN[0]}"
        _assert_plain(loaded)

    def simpler(self) -> Iterator["Damaged"]:
        for i in range(len(self.damages)):
            yield dataclasses.replace(self, damages=self.damages[:i] + self.damages[i + 1 :])


KINDS = ("zip", "record", "legacy", "config")
NAMES = ("flip", "byte", "cut", "delete", "repeat", "move", "insert", "replace", "splice")
NAMES += ("flip", "byte", "insert", "insert", "replace", "replace", "compress")


# ------------------------------------------------------------------------------ what is looked at

PLAIN = (int, float, complex, str, bytes, bytearray, bool, type(None), torch.Tensor, torch.Size)
PLAIN += (torch.dtype, torch.device, torch.layout, torch.storage.UntypedStorage)
PLAIN += (torch.storage.TypedStorage, np.generic, np.ndarray, torch.Generator)


def _assert_plain(value: Any) -> None:
    """It consists of numbers, text, tensors, and what torch and mmengine put them in."""
    seen, waiting = set(), [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*dict.keys(value), *dict.values(value)]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += list(value)
        elif type(value).__name__ == "HistoryBuffer":
            waiting += [value._log_history, value._count_history, value.max_length]
        else:
            harmless = isinstance(value, type) or callable(value)
            assert harmless and _is_named(value), f"{type(value)} {value!r}"


def _is_named(value: Any) -> bool:
    """Whether it is one of the classes and functions that a checkpoint may name."""
    module = getattr(value, "__module__", "") or ""
    return module.split(".")[0] in (
        "torch",
        "mmengine",
        "mmdcn",
        "collections",
        "numpy",
        "builtins",
    )


def _held() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_HELD = [0]


def _hold() -> None:
    """Count from here."""
    _HELD[0] = _held()


#: What happened while a checkpoint was read that must not.
SEEN: list[str] = []
FORBIDDEN = ("os.", "subprocess.", "socket.", "open", "exec", "import", "ctypes.", "shutil.")
FORBIDDEN += ("tempfile.", "pty.", "urllib.", "mmap.", "marshal.", "code.")
_watched: tuple[str, ...] = ()


def _watch(*events: str) -> None:
    """Take down the events that begin so, which Python reports to `_audit`."""
    global _watched
    _watched = events


def _audit(event: str, arguments: tuple) -> None:
    # Python's parser looks for the source of a syntax error in a file of this name.
    if event.startswith(_watched) and arguments[:1] != ("<unknown>",):
        SEEN.append(f"{event} {arguments!r:.200}")


# ------------------------------------------------------------------------------------------- draws


def draw(kind: str, random: Random) -> Damaged:
    number = random.choice([1, 1, 1, 2, 3, 6])
    damages = [
        (random.choice(NAMES), random.randrange(10**6), random.randrange(10**6))
        for _ in range(number)
    ]
    return Damaged(kind, tuple(damages))


def sources() -> list[Source]:
    # The list of what torch allows in a checkpoint is its process's, so one thread reads.
    return [Source(kind, functools.partial(draw, kind), (ALONE,)) for kind in KINDS]
