"""Facts of the machine, and versions."""

import platform

import torch

import mmdcn
from mmdcn import machine


def test_versions_are_of_what_is_installed_or_of_what_is_named():
    found = machine.versions()
    assert found["mmdcn"] == mmdcn.__version__
    assert found["torch"] == torch.__version__
    named = machine.versions("torch", "no such package", "python")
    assert list(named.items()) == [
        ("torch", torch.__version__),
        ("python", platform.python_version()),
    ]


def test_packages_that_are_missing_have_no_version():
    assert machine.installed(["no-such-package", "torch"]) == {"torch": torch.__version__}


def test_facts_of_the_machine():
    facts = machine.machine(torch.device("cpu"))
    assert facts["cores"] >= 1 and facts["memory_gib"] > 0
    assert facts["cpu"] and facts["os"]
    assert "gpu" not in facts
