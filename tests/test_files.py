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


def test_two_writers_of_a_file_do_not_take_each_others_place(tmp_path):
    path = tmp_path / "b.txt"
    with files.once_complete(path) as first:
        first.write_text("fir")
        with files.once_complete(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
        with first.open("a") as file:
            file.write("st")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_written_over(tmp_path):
    path = tmp_path / "b.txt"
    with files.once_complete(path) as temporary:
        temporary.write_text("new")
    temporary.write_text("what was left, and longer")
    files.write(path, "newer")
    assert path.read_text() == "newer"
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


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    assert files.unwritable(tmp_path / "a" / "b") is None
    files.check_folder(tmp_path, "--out")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(errors.InputError, match=r"^argument --out: cannot .*file' is not a folder"):
        files.check_folder(tmp_path / "file" / "more", "--out")

    # As in /proc, where permissions say yes.
    def refuse(*_args, **_kwargs):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("os.mkdir", refuse)
    said = files.unwritable(tmp_path / "new")
    assert said == f"cannot write to '{tmp_path}/new': No such file or directory in '{tmp_path}'"
