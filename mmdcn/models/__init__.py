"""Extensions of the toolbox's own models: deformable layers where it offers none."""

from mmdcn.models.convert import build_deformable, convert_to_deformable

__all__ = ["build_deformable", "convert_to_deformable"]
