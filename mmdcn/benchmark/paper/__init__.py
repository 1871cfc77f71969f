"""What deformable convolution takes on a GPU, computed on paper: no GPU is needed.

=================== ===============================================================================
:mod:`~.counts`     instructions, read off machine code
:mod:`~.device`     the rates of a GPU, and how long a step takes at them
:mod:`~.problem`    a convolution's sizes, and what its products and copies take
:mod:`~.ours`       the steps of our operator
:mod:`~.peer`       those of torchvision's operator, counted in the same way
:mod:`~.page`       all that as a block of `docs/performance.md`
=================== ===============================================================================

Such a budget says which step to look at, and whether a design can be worth its code. It does not
say how fast anything is: only a measurement does.
"""
