"""The measuring behind `make evidence`: what deformable layers do under geometric transformation.

======================= ===========================================================================
:mod:`~.digits`         the data: 5,000 real digits, fetched at run time
:mod:`~.transforms`     rotated, scaled, sheared, tilted and bent digits, of a set strength
:mod:`~.nets`           the arms: a plain network, deformable ones, and the controls
:mod:`~.training`       one run: a network trained and tested
:mod:`~.grid`           the runs of the published grid, their order and what they cost
:mod:`~.jobs`           these runs as jobs
:mod:`~.runner`         jobs side by side, each result in a file of its own
:mod:`~.progress`       how far they are, and how long it takes
:mod:`~.results`        what is known, by part, arm and seed
:mod:`~.cost`           parameters, operations and times of the arms
:mod:`~.layers`         what the layers do: features that move with the digit, points that spread
:mod:`~.coco`           what others published on COCO
:mod:`~.spread`         means, intervals and paired differences over seeds
:mod:`~.conclusions`    sentences, each with the condition on the figures under which it stands
:mod:`~.plots`          its plots
:mod:`~.report`         the page, and the JSON of every run
:mod:`~.cli`            the arguments of `tools/evidence.py`
======================= ===========================================================================

Nothing here is imported with :mod:`mmdcn`.
"""
