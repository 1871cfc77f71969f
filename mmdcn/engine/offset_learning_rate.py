"""The learning rate of offsets, ``paramwise_cfg=dict(dcn_offset_lr_mult=…)``, for all our layers.

mmengine's constructor of optimizers knows mmcv's two deformable convolutions of images only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmdcn.layers import DCNv3, DCNv4
from mmdcn.layers._deform_conv_base import OffsetBranch

__all__ = ["install", "installed", "uninstall"]

#: What predicts offsets in a layer of each kind.
_BRANCHES: tuple[tuple[type, str], ...] = (
    (OffsetBranch, "conv_offset"),
    (DCNv3, "offset"),
    (DCNv4, "offset_mask"),
)

_original: Callable[..., None] | None = None


def install() -> None:
    """Let the constructor reach the offset branches of all our layers."""
    global _original
    if _original is None:
        _original = DefaultOptimWrapperConstructor.add_params
        DefaultOptimWrapperConstructor.add_params = _add_params


def uninstall() -> None:
    """Give mmengine its own method back, unless somebody else has replaced it meanwhile."""
    global _original
    if installed() and DefaultOptimWrapperConstructor.add_params is _add_params:
        DefaultOptimWrapperConstructor.add_params = _original
    _original = None


def installed() -> bool:
    """Whether the constructor reaches them."""
    return _original is not None


def _add_params(
    self: DefaultOptimWrapperConstructor,
    params: list[dict[str, Any]],
    module: nn.Module,
    prefix: str = "",
    is_dcn_module: int | float | None = None,
) -> None:
    """mmengine's ``add_params``, and then the learning rate of the module's offset branch."""
    first = len(params)
    _original(self, params, module, prefix, is_dcn_module)
    multiplier = self.paramwise_cfg.get("dcn_offset_lr_mult")
    branch = next((name for kind, name in _BRANCHES if isinstance(module, kind)), None)
    if multiplier is None or branch is None:
        return
    branch = f"{prefix}.{branch}" if prefix else branch
    named = module.get_submodule(branch.rpartition(".")[2]).named_parameters(branch)
    names = {parameter: name for name, parameter in named}
    custom_keys = self.paramwise_cfg.get("custom_keys", {})
    learning_rate = self.base_lr * multiplier
    for group in params[first:]:
        name = names.get(group["params"][0])
        # Custom keys come before all other rules, as in mmengine.
        if name is None or any(key in name for key in custom_keys):
            continue
        if group.get("lr") != learning_rate:
            group["lr"] = learning_rate
            print_log(f"paramwise_options -- {name}:lr={learning_rate}", logger="current")
