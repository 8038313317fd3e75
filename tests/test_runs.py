"""A run's folder: one process at a time, nothing of the user's lost, damage told from progress."""

import multiprocessing

import pytest
import torch

import train
from dualenc import InputError
from dualenc.runs import Run

TINY = ["--preset", "tiny", "--batch-size", 16, "--workers", 0]


def hold(folder, connection):
    Run(folder, {})
    connection.send("held")
    connection.recv()


def test_two_processes_do_not_write_to_one_run(tmp_path):
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    here.recv()
    try:
        with pytest.raises(InputError, match="run: another process is writing to this run"):
            Run(tmp_path / "run", {})
        Run(tmp_path / "run", {}, writes=False)  # other processes of the same group
    finally:
        process.kill()
        process.join()
    Run(tmp_path / "run", {})


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    ours = [".last.pt.1.tmp", ".best.pt.99.tmp", ".log.jsonl.7.tmp", ".curves.svg.7.tmp"]
    others = [".notes.tmp", ".thesis.pt.1.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    Run(tmp_path, {})
    assert {path.name for path in tmp_path.glob(".*.tmp")} == set(others)


def within(key, **changes):
    """A change of the training state's values, or of those of its part with this name."""

    def change(state):
        training = state["training"]
        (training[key] if key else training).update(changes)

    return change


DAMAGES = {
    "log_bytes: text": lambda state: state.update(log_bytes="x"),
    "log_bytes: negative": lambda state: state.update(log_bytes=-1),
    "log_bytes: within the settings": lambda state: state.update(log_bytes=3),
    "log_bytes: beyond the log": lambda state: state.update(log_bytes=10**9),
    "training: a number": lambda state: state.update(training=5),
    "losses: a number": within(None, losses=5),
    "losses: of numbers": within(None, losses=[5]),
    "losses: empty": within(None, losses=[{}]),
    "losses: of texts": within(None, losses=[{"loss": "x"}]),
    "losses: of other parts": within(None, losses=[{"loss": 1.0}, {"part": 1.0}]),
    "step: negative": within(None, step=-5),
    "step: beyond all": within(None, step=10**20),
    "best: text": within(None, best="x"),
    "scaler: a number": within(None, scaler=5),
    "optimizer: a list": within(None, optimizer=[1]),
    "optimizer: without moments": within("optimizer", state={}),
    "optimizer: a number's moments": within("optimizer", state={0: 5}),
    "optimizer: without groups": within("optimizer", param_groups=[]),
}


def test_a_state_that_is_damaged_is_not_resumed(command, tmp_path):
    run = tmp_path / "run"
    command(train, *TINY, "--max-steps", 3, "--out", run, "--log-every", 1)
    good, log = (run / "last.pt").read_bytes(), (run / "log.jsonl").read_bytes()
    for name, damage in DAMAGES.items():
        (run / "last.pt").write_bytes(good)
        state = torch.load(run / "last.pt", weights_only=True)
        damage(state)
        torch.save(state, run / "last.pt")
        status, printed = command(train, *TINY, "--max-steps", 4, "--out", run)
        assert status == 2 and printed.count("\n") == 1, (name, printed)
        assert str(run) in printed and (run / "log.jsonl").read_bytes() == log, name
    (run / "last.pt").write_bytes(good)
    status, printed = command(train, *TINY, "--max-steps", 4, "--out", run)
    assert status == 0 and "going on after step 3" in printed


def test_curves_that_cannot_be_drawn_stop_nothing(command, tmp_path):
    command(train, *TINY, "--max-steps", 3, "--out", "run")
    (tmp_path / "run/curves.svg").unlink()
    (tmp_path / "run/curves.svg").mkdir()
    status, printed = command(train, *TINY, "--max-steps", 4, "--out", "run")
    assert status == 0 and "curves.svg: cannot be written (Is a directory)" in printed
    assert torch.load("run/last.pt", weights_only=True)["training"]["step"] == 4
