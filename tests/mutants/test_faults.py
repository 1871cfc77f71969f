"""The list of faults fits the sources."""

from collections import Counter

from tests.mutants.faults import FAULTS
from tests.programs import REPOSITORY


def test_every_fault_can_be_planted():
    for fault in FAULTS:
        text = (REPOSITORY / "mmdcn" / fault.file).read_text()
        assert text.count(fault.old) == 1, (fault.name, text.count(fault.old))
        assert fault.new != fault.old
        for path in fault.tests:
            assert (REPOSITORY / path).exists(), (fault.name, path)


def test_names_are_different():
    assert Counter(fault.name for fault in FAULTS).most_common(1)[0][1] == 1
