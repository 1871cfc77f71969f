"""From a checkpoint to a file that detects without PyTorch.

:mod:`~.detector`       a whole detector that can be traced: what `tools/export_onnx.py` writes
:mod:`~.dense_heads`    decoders of dense heads, and :mod:`~.roi_heads` of RoI heads
:mod:`~.decoding`       what they have in common
:mod:`~.operators`      their operators, whose output shapes do not depend on values
:mod:`~.translations`   these as ONNX's standard operators
:mod:`~.preprocessing`  normalisation and padding
:mod:`~.comparison`     how results in another runtime compare with PyTorch's
:mod:`~.evaluation`     a file in the place of a detector: what `tools/test.py` runs
:mod:`~.beside`         a file beside its checkpoint: metrics and speeds of both
:mod:`~.half_precision` a network's layers in float16
:mod:`~.openvino`       reads the file in OpenVINO, and writes OpenVINO's own format
:mod:`~.masks`          masks of whole images from those that a file gives
"""
