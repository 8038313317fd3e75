"""However a run ends, the same command goes on to what an undisturbed one ends with."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dualenc
import train
from dualenc import training
from dualenc.data import PairBatches
from dualenc.runs import Run
from tests.test_kill import equal

TINY = ["--preset", "tiny", "--batch-size", 16, "--workers", 0]


def assert_same_files(folder, other):
    """But for the settings in the first line: --max-steps may differ."""
    logs = [(where / "log.jsonl").read_text().split("\n")[1:] for where in (folder, other)]
    assert logs[0] == logs[1]
    for name in ("best.pt", "last.pt"):
        ours, theirs = (torch.load(where / name, weights_only=True) for where in (folder, other))
        assert equal(ours | {"log_bytes": 0}, theirs | {"log_bytes": 0}), name


def validations(monkeypatch, *values):
    """Let validation find these in turn."""
    found = iter(values)
    monkeypatch.setattr(train, "validation", lambda *_: lambda model: {"mAP@10": next(found)})


def test_the_same_command_goes_on_where_it_was_interrupted(command, tmp_path):
    arguments = [*TINY, "--epochs", 3, "--log-every", 3, "--learn-tau"]
    command(train, *arguments, "--out", "whole")
    for steps in (2, 4, 9):  # within an epoch, at its end, within the last
        status, printed = command(train, *arguments, "--out", "parts", "--max-steps", steps)
        assert status == 0, printed
    status, printed = command(train, *arguments, "--out", "parts")
    assert status == 0 and "going on after step 9" in printed
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    status, printed = command(train, *arguments, "--out", "parts")  # nothing is left to do
    assert status == 0 and "Done" in printed
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("steps", [3, 4])  # within an epoch, and at its end: not validated
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(command, tmp_path, monkeypatch, number, steps):
    original = train.loss_of
    calls = []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(train, "loss_of", interrupting)
    status, printed = command(train, *TINY, "--epochs", 2, "--out", "a")
    assert status == (130 if number == signal.SIGINT else 0)
    assert f"{number.name} after step {steps}" in printed and "Traceback" not in printed
    assert torch.load("a/last.pt", weights_only=True)["training"]["step"] == steps
    assert not Path("a/best.pt").exists()
    monkeypatch.setattr(train, "loss_of", original)
    command(train, *TINY, "--epochs", 2, "--out", "a")
    command(train, *TINY, "--epochs", 2, "--out", "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_a_second_signal_gets_through_unless_it_was_passed_on(command, monkeypatch):
    original = train.loss_of

    def interrupting(*arguments):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train, "loss_of", interrupting)
    status, printed = command(train, *TINY, "--epochs", 2, "--out", "a")
    assert status == 0 and "SIGTERM after step 1" in printed
    monkeypatch.setattr(dualenc, "PASSED_ON_SECONDS", -1)
    monkeypatch.setattr(os, "_exit", sys.exit)
    status, printed = command(train, *TINY, "--epochs", 2, "--out", "a")
    assert status == 143 and "\ntrain.py: ended by SIGTERM. The same command goes on" in printed


def test_sigterm_before_the_loop_is_one_line(command, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(train, "open_caches", lambda *_: signal.raise_signal(signal.SIGTERM))
    status, printed = command(train, *TINY, "--out", "a")
    assert status == 143 and printed.startswith("\ntrain.py: ended by SIGTERM. ")
    assert printed.count("\n") == 2


def test_forked_workers_end_of_sigterm_as_ever(command):
    command(train, "--help")
    worker = multiprocessing.get_context("fork").Process(
        target=signal.raise_signal, args=(signal.SIGTERM,)
    )
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGTERM


def test_output_that_cannot_be_written_is_one_line():
    program = "from dualenc import run; run(lambda: print('short'))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1],
        )
    assert (ended.returncode, ended.stderr) == (2, "-c: No space left on device\n")


ENDS = ["validation", "save_best", "log", "save_state", "write_curves"]


@pytest.mark.parametrize("end", ENDS)
def test_an_end_among_an_epochs_last_acts_changes_nothing(command, tmp_path, monkeypatch, end):
    """The process ends right after the act, or for validation within it."""

    def ending(original, last):
        calls = itertools.count(1)

        def act(*arguments, **values):
            if end != "validation":
                original(*arguments, **values)
            if next(calls) == last:
                raise KeyboardInterrupt

        return act

    arguments = [*TINY, "--epochs", 2, "--log-every", 4, "--learn-tau"]
    with monkeypatch.context() as patch:
        if end == "validation":
            patch.setattr(train, "validation", lambda *_: ending(None, 1))
        elif end == "write_curves":
            patch.setattr(training, end, ending(training.write_curves, 1))
        else:  # the first log line is of the steps, the first last.pt before the validation
            last = 1 if end == "save_best" else 2
            patch.setattr(Run, end, ending(getattr(Run, end), last))
        status, printed = command(train, *arguments, "--out", "parts")
    assert status == 130, printed
    status, printed = command(train, *arguments, "--out", "parts")
    assert status == 0 and "going on after step 4" in printed
    command(train, *arguments, "--out", "whole")
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_a_part_of_an_epoch_is_best_only_until_one_is_whole(command, tmp_path, monkeypatch):
    arguments = [*TINY, "--epochs", 3]
    validations(monkeypatch, 0.5, 0.4, 0.3)
    command(train, *arguments, "--out", "whole")
    for metric, steps, best in ((0.7, 1, 0.7), (0.6, 2, 0.6), (0.5, 4, 0.5), (0.8, 6, 0.5)):
        validations(monkeypatch, metric)
        status, printed = command(train, *arguments, "--out", "parts", "--max-steps", steps)
        assert f"Best validation mAP@10 {100 * best:.2f} %" in printed
        found = torch.load("parts/best.pt", weights_only=True)
        assert found["validation"] == {"mAP@10": best}
    validations(monkeypatch, 0.4, 0.3)
    command(train, *arguments, "--out", "parts")
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


# --- Workers ---


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")


@pytest.mark.parametrize(("owner", "name", "fault", "words"), [
    (PairBatches, "__getitem__", kill_itself, "(DataLoader worker"),
    (torch.Tensor, "share_memory_", no_room, "(unable to allocate shared memory"),
])
def test_workers_that_fail_are_one_line(command, monkeypatch, owner, name, fault, words):
    monkeypatch.setattr(owner, name, fault)
    status, printed = command(train, *TINY, "--workers", 1, "--out", "a")
    line = printed.splitlines()[-1]
    assert status == 2 and words in line and "--workers" in line and "/dev/shm" in line
    assert "Traceback" not in printed
