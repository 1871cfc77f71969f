"""What `tools/gpu_check.py` checks and times on a machine with a GPU.

==================== ==============================================================================
:mod:`~.cli`         the command's arguments
:mod:`~.parent`      runs sections in processes of their own, and survives whatever these do
:mod:`~.worker`      such a process: the cases of a section, one after the other
:mod:`~.sections`    the sections of both parts, in order, with their limits
:mod:`~.settings`    what a section is told: device, sizes, what else is at hand
:mod:`~.calls`       one call of an operator, and what it should give
:mod:`~.smoke`       every kernel variant once, and drawn problems: are they right?
:mod:`~.accuracy`    torch's products, each candidate of each: right, and added up in float32?
:mod:`~.timed`       the convolution beside its peers, compared before it is timed
:mod:`~.sweeps`      what the time depends on, and the other operators
:mod:`~.ceilings`    what the device could do at best
:mod:`~.detector`    whole detectors of torchvision
:mod:`~.profiling`   which kernels ran, and for how long
:mod:`~.programs`    other programs: pytest, compute-sanitizer, ncu, another wheel of mmdcn
:mod:`~.report`      all that as Markdown
:mod:`~.processes`   processes that end with those that started them
==================== ==============================================================================

A *section* is a list of *cases*: names, and functions that return what is to be in the report, or
raise. With ``device='cpu'`` every case runs on the CPU in a tiny size: figures that mean nothing,
through the same code.
"""
