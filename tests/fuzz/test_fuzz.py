"""A small part of `make fuzz`, with the same seed every time; and that it finds what is wrong."""

import io
import os
import pickle
from random import Random

import pytest
import torch

from mmdcn import ops
from mmdcn.ops import _registration
from tests.fuzz import checkpoints, malformed, operators, trials
from tests.fuzz.trials import complaint
from tests.programs import REPOSITORY, Program

SMALL = {
    # Each function once in each way in which calls are made.
    "operators": ("--trials", 8, "--together", 2),
    "malformed": ("--trials", 60, "--together", 60),
    "checkpoints": ("--trials", 300, "--together", 300),
}


@pytest.mark.parametrize("kind", SMALL)
def test_nothing_fails(kind):
    command = [REPOSITORY / "tools/fuzz.py", kind, *SMALL[kind], "--seed", 1, "--seconds", 120]
    done = Program(command, REPOSITORY).finish()
    assert done.returncode == 0, done.stdout
    assert "no failure in" in done.stdout


def test_it_takes_names_of_sources():
    command = [REPOSITORY / "tools/fuzz.py", "operators", "--only", "dcnv3", "--trials", 2]
    done = Program([*command, "--together", 2], REPOSITORY).finish()
    assert "no failure in 2 trials" in done.stdout
    done = Program([*command[:-3], "dcnv5"], REPOSITORY).finish()
    assert done.returncode == 1
    assert "error: --only: expected one of deform_conv2d, " in done.stdout


def test_every_function_is_tried():
    assert set(operators.DRAWS) == set(ops.__all__)
    assert set(malformed.COMPILED) == set(_registration.OPERATORS)


def faulty(function, fault):
    """A function whose output is wrong in one element, where `fault` says so."""

    def computed(*arguments, **named):
        output = function(*arguments, **named)
        if fault(named) and output.numel():
            output = output.clone()
            output.view(-1)[-1] += 1
        return output

    return computed


@pytest.mark.parametrize("name", operators.DRAWS)
def test_a_wrong_element_is_found(name, monkeypatch):
    drawn = (operators.draw(name, Random(n)) for n in range(100))
    trial = next(t for t in drawn if torch.Size(t.problem.out_shape).numel() and not t.nowhere)
    assert complaint(trial) is None
    wrong = faulty(getattr(ops, name), lambda named: True)
    monkeypatch.setattr(type(trial.problem), "function", property(lambda self: wrong))
    assert complaint(trial).startswith("AssertionError: output: error")


def test_a_gradient_that_is_wrong_in_one_layout_is_found():
    trial = operators.Trial(
        operators.Problem(batch=1, size=(4, 4)), views={"offset": "reversed"}, wanted=("offset",)
    )
    trial.check()
    again = eval(repr(trial), vars(operators))
    assert again == trial
    assert {t.views.get("offset") for t in trial.simpler()} == {"reversed", None}


def test_a_crash_of_a_malformed_call_or_an_error_without_a_name_is_found(monkeypatch):
    call = malformed.Malformed("deform_conv2d-v2", changes=(("offset", "size", 1, 17),))
    call.check()

    def careless(**named):
        raise ValueError("sizes do not match")

    monkeypatch.setattr(ops, "deform_conv2d", careless)
    assert "sizes do not match" in complaint(call)
    monkeypatch.setattr(ops, "deform_conv2d", lambda input, **named: input)
    assert complaint(call) is not None


class Opens:
    def __reduce__(self):
        return open, (os.devnull, "w")


class Hostile(checkpoints.Damaged):
    """A checkpoint that opens a file."""

    def content(self) -> bytes:
        file = io.BytesIO()
        torch.save({"meta": Opens()}, file)
        return file.getvalue()


def test_a_checkpoint_that_is_executed_is_found(monkeypatch):
    assert trials.alone(Hostile("zip")) is None
    monkeypatch.setattr(
        checkpoints.checkpoint, "load", lambda f, map_location: torch.load(f, weights_only=False)
    )
    found = trials.alone(Hostile("zip"))
    assert found.startswith("AssertionError: while it was read: open ('/dev/null'"), found
    with pytest.raises(AssertionError):
        checkpoints._assert_plain({"a": [pickle.Unpickler]})
