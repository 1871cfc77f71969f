"""The examples in the docstrings of what is deployed with."""

import doctest

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")

from mmdcn.deploy import beside, comparison, masks, operators

# An operator's own function is what it is made of.
_OPERATORS = (operators.select_top_k, operators.nms, operators.multi_level_roi_align)
_DOCUMENTED = (
    *(op._init_fn for op in _OPERATORS),
    comparison.match,
    masks.paste_masks,
    beside.lines,
)


@pytest.mark.parametrize("documented", _DOCUMENTED, ids=lambda function: function.__name__)
def test_an_example_runs(documented):
    names = {
        **vars(operators),
        **vars(comparison),
        **vars(masks),
        **vars(beside),
        "torch": torch,
        "np": np,
    }
    test = doctest.DocTestParser().get_doctest(documented.__doc__, names, "example", None, None)
    assert test.examples
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)
