"""`tools/evidence.py`: from its arguments to the page, again without training, and its mistakes."""

import re

import pytest

from mmdcn.errors import InputError
from mmdcn.evidence import cli, digits, jobs, training

from . import examples


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the tool with some digits that are made up, in one process."""
    monkeypatch.setattr(training, "BATCH", 50)
    monkeypatch.setattr(digits, "load", lambda cache: examples.digits(250))
    monkeypatch.setattr(jobs, "_digits", lambda cache: examples.digits(250))
    places = ["--work-dir", tmp_path / "work", "--out", tmp_path / "out" / "page"]

    def run(*arguments):
        cli.run(cli.parse_args([str(part) for part in (*arguments, "--workers", 1, *places)]))

    return run


def test_from_arguments_to_the_page_and_again(run, tmp_path, capsys, monkeypatch):
    chosen = ("--quick", "--parts", "frozen", "--arms", "norm")
    run(*chosen, "--dry-run")
    assert "0 runs are finished; the other 2 take about" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

    run(*chosen)
    said = capsys.readouterr()
    assert "[1/2] upright_plain_2-epochs_seed-0" in said.err
    assert "[2/2] frozen_norm_2-epochs_seed-0" in said.err
    page = tmp_path / "out" / "page.md"
    assert str(page) == said.out.splitlines()[-1]
    assert "| norm statistics only | 157,330 | 1 |" in page.read_text()

    page.unlink()
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("it is trained already"))
    run(*chosen)
    assert page.is_file()


def test_what_is_in_no_part_is_said(run, tmp_path):
    with pytest.raises(InputError, match="--arms: none of branch is in scratch, long"):
        run("--parts", "scratch,long", "--arms", "branch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "all"], "argument --parts: expected scratch or .* got 'all'"),
        (["--arms", "dcnv9"], "argument --arms: expected plain or .* got 'dcnv9'"),
        (["--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
        (["--dry-run", "--report-only"], "not allowed with argument"),
    ],
)
def test_mistakes_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.parse_args(arguments)
    assert re.search(said, capsys.readouterr().err)
