"""The configs of installed packages by name, as in ``mmdcn::dcnv2/mask-rcnn_r50-…_coco.py``.

Ours lie in the package's folder ``.mim`` with the tools, as those of mmdet do. In a checkout, that
folder links to ``configs/`` and ``tools/``.
"""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

__all__ = ["install", "installed", "uninstall"]

_SCOPE = "mmdcn"
# mmengine asks where the distribution of this name lies, and takes the package for a folder beside
# it, which that of an editable installation is not. A module inside the package is no
# distribution's name: mmengine then asks Python, and takes the folder that the module is in.
_WHERE = "mmdcn.plugin"

_from_file = Config.fromfile
_get_path = Config._get_cfg_path


def install() -> None:
    """Let mmengine find our configs by name, in ``_base_`` and in ``Config.fromfile``."""
    MODULE2PACKAGE.setdefault(_SCOPE, _WHERE)
    Config.fromfile = staticmethod(_from_file_or_name)
    Config._get_cfg_path = staticmethod(_get_path_and_scope)


def uninstall() -> None:
    """Give mmengine its own functions back, unless somebody else has replaced them meanwhile."""
    if MODULE2PACKAGE.get(_SCOPE) == _WHERE:
        del MODULE2PACKAGE[_SCOPE]
    if Config.fromfile is _from_file_or_name:
        Config.fromfile = staticmethod(_from_file)
    if Config._get_cfg_path is _get_path_and_scope:
        Config._get_cfg_path = staticmethod(_get_path)


def installed() -> bool:
    """Whether our configs are found by name."""
    return MODULE2PACKAGE.get(_SCOPE) == _WHERE and Config.fromfile is _from_file_or_name


def _from_file_or_name(filename: str | Path, *args: Any, **kwargs: Any) -> Config:
    """mmengine's ``Config.fromfile``, which also reads configs by their names in packages.

    mmengine itself knows such names in ``_base_`` only.
    """
    if "::" in str(filename):
        filename, _ = _get_path(str(filename), "")
    return _from_file(filename, *args, **kwargs)


def _get_path_and_scope(name: str, filename: str) -> tuple[str, str | None]:
    """The file of a base config, and the scope in which mmengine looks up what it names."""
    path, scope = _get_path(name, filename)
    return path, "mmdet" if scope == _SCOPE else scope  # whose names ours are
