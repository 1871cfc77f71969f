"""The registries of the scope ``mmdcn``, where mmengine looks for those of a scope."""

from mmengine import registry

__all__ = ["HOOKS", "MODELS"]

# What is registered here stands in the plugin.
_LOCATIONS = ["mmdcn.plugin"]

MODELS = registry.Registry("model", parent=registry.MODELS, scope="mmdcn", locations=_LOCATIONS)
HOOKS = registry.Registry("hook", parent=registry.HOOKS, scope="mmdcn", locations=_LOCATIONS)
