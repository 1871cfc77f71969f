"""Files that are written whole or not at all, and the tables and errors that are written."""

import pytest

from mmdcn import errors, files, markdown


def test_a_file_appears_with_its_folders_once_it_is_complete(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with files.once_complete(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    files.write(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(KeyError), files.once_complete(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_align_numbers_to_the_right():
    assert markdown.table(["a", "b", "c"], [["x", "", 1.5]], left=2) == [
        "| a | b | c |",
        "| --- | --- | ---: |",
        "| x |  | 1.5 |",
    ]


def test_errors_are_told_on_one_line():
    error = ValueError("\n one \n two")
    assert errors.first_line(error).strip() == "one"
    assert errors.named_first_line(error).strip() == "ValueError: one"
    assert errors.first_line(KeyError()) == "KeyError"
