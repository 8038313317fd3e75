"""When things go wrong: exit statuses, one line and no traceback, files whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualenc import errors
from dualenc.errors import InputError, replacing, run_command


def raising(error: BaseException):
    """Return a command that raises the error."""

    def main():
        raise error

    return main


def status_of(main, rank: int = 0) -> int | None:
    """Run a command, and return its exit status."""
    with pytest.raises(SystemExit) as ended:
        run_command(main, rank)
    return ended.value.code


# --- Commands ---


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("sounds/a.wav: holds no sound"), "sounds/a.wav: holds no sound"),
        (OSError(28, "No space left on device", "x"), "No space left on device: 'x'"),
        (torch.OutOfMemoryError("2 GiB"), "out of memory (training: --micro-batch 8): 2 GiB"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(error, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    assert status_of(raising(error)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: ")
    assert printed.endswith(f"{line}\n")
    assert printed.count("\n") == 1


def test_of_several_processes_the_first_one_prints_the_line(capsys):
    assert status_of(raising(InputError("no sound")), rank=1) == 2
    assert capsys.readouterr().err == ""


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_ctrl_c_ends_a_command_with_status_130(capsys):
    assert status_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_a_name_that_is_not_utf_8_is_printed_as_an_escape(capsys):
    assert status_of(lambda: print("\udcff.wav")) is None
    assert capsys.readouterr().out == "\\udcff.wav\n"


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    program = "import errors; errors.run_command(lambda: print('line\\n' * 100_000))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(errors.__file__).parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 0


def test_an_option_may_not_be_abbreviated():
    parser = errors.Parser("")
    parser.add_argument("--data-dir")
    with pytest.raises(InputError, match="unrecognized arguments: --data x .--help lists"):
        parser.parse_args(["--data", "x"])


@pytest.mark.parametrize("read", [errors.not_negative_int, errors.not_negative_float])
def test_zero_is_taken_where_a_number_may_be_zero(read):
    assert read("0") == 0


# --- Files ---


def test_a_file_that_is_not_finished_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_of_a_file_is_made(tmp_path):
    with replacing(tmp_path / "new" / "figures.json") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "new" / "figures.json").read_text() == "whole"
