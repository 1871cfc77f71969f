"""The measuring behind `python -m mmdcn.benchmark` and `tools/gpu_check.py`.

======================== ==========================================================================
:mod:`~.cases`           the problems: named sets of shapes, and their tensors
:mod:`~.implementations` what computes them: ours, and the peers that happen to be installed
:mod:`~.memory`          the memory that one call takes beyond what goes in and comes out
:mod:`~.apart`           the process in which it is measured on the CPU
:mod:`~.operators`       all of that for the operator
:mod:`~.family`          the same for the other operators, beside what they replace
:mod:`~.detectors`       whole detectors, in training and at inference
:mod:`~.deployment`      their exported files, in other runtimes
:mod:`~.tables`          all that as Markdown
:mod:`~.report`          the published page, its picture, and README's table
:mod:`~.random_weights`  of the detectors
:mod:`~.arguments`       those that all measurements share
:mod:`~.cli`             the arguments of `python -m mmdcn.benchmark`, or `tools/benchmark.py`
:mod:`~.gpu`             all that `tools/gpu_check.py` adds: checks and timings on a GPU, their page
======================== ==========================================================================

Machines are noisy, so no figure stands alone: each is a median, beside those of the peers that were
measured in turns with it, in the same process (:mod:`mmdcn.timing`). Nothing but torch is needed; a
peer that is not installed is left out and named.
"""


class BenchmarkError(Exception):
    """A benchmark that cannot be run as asked, or whose results are not worth timing."""
