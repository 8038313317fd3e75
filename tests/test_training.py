"""The loop: what it writes, resumes, refuses, and computes."""

import json
import signal

import pytest
import torch

import distill
import evaluate
import train
from dualenc import InputError
from dualenc.model import DualEncoder
from dualenc.step import Losses

TINY = ["--preset", "tiny", "--batch-size", 16, "--workers", 0]


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(path, other):
    ours, theirs = weights(path), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_train_distill_evaluate(command, tmp_path):
    status, printed = command(train, *TINY, "--epochs", 2, "--out", "a", "--log-every", 2)
    assert status == 0, printed
    for words in ("towers in fp32", "10 clips, 50 captions", "4 an epoch, 2 epochs", "a/best.pt"):
        assert words in printed
    first, *lines = log_lines(tmp_path / "a")
    assert first["batch_size"] == 16 and first["data"]["clotho/development"][:2] == [10, 50]
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 8]
    assert [line["validation"]["mAP@10"] for line in lines if "validation" in line]
    assert DualEncoder.load("a/best.pt").trained_on == ["clotho/development"]

    assert command(
        train, *TINY, "--datasets", "clotho", "audiocaps", "--epochs", 1, "--seed", 1, "--out", "b"
    )[0] == 0
    status, printed = command(
        distill, "--teachers", "a/best.pt", "b/best.pt", "--epochs", 1, "--workers", 0,
        "--batch-size", 16, "--out", "c",
    )
    assert status == 0, printed
    student = DualEncoder.load("c/best.pt")
    assert student.trained_on == [
        "audiocaps/test", "audiocaps/train", "audiocaps/val", "clotho/development",
    ]
    epoch = log_lines(tmp_path / "c")[-1]
    assert epoch["loss"] == pytest.approx(epoch["contrastive"] + epoch["distillation"])

    status, printed = command(evaluate, "--checkpoint", "c/best.pt", "--json", "r.json")
    assert status == 0, printed
    assert "6 clips, 30 captions" in printed and "new annotations" in printed
    assert "37.21" not in printed  # the report's figures belong to the real data
    results = json.loads((tmp_path / "r.json").read_text())
    assert "30" in printed and results


def test_the_same_command_goes_on_where_it_was_interrupted(command, tmp_path):
    arguments = [*TINY, "--epochs", 3, "--log-every", 3, "--learn-tau"]
    command(train, *arguments, "--out", "whole")
    for steps in (2, 4, 9):  # within an epoch, at its end, within the last
        status, printed = command(train, *arguments, "--out", "parts", "--max-steps", steps)
        assert status == 0, printed
    status, printed = command(train, *arguments, "--out", "parts")
    assert status == 0 and "going on after step 9" in printed
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert_same_weights(tmp_path / "whole/best.pt", tmp_path / "parts/best.pt")
    whole, parts = log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts")
    assert whole[1:] == parts[1:]
    status, printed = command(train, *arguments, "--out", "parts")  # nothing is left to do
    assert status == 0 and "Done" in printed
    assert log_lines(tmp_path / "parts") == parts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(command, tmp_path, monkeypatch, number):
    original = train.loss_of
    calls = []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(train, "loss_of", interrupting)
    status, printed = command(train, *TINY, "--epochs", 2, "--out", "a")
    assert status == (130 if number == signal.SIGINT else 0)
    assert f"{number.name} after step 3" in printed and "Traceback" not in printed
    assert torch.load("a/last.pt", weights_only=True)["training"]["step"] == 3
    monkeypatch.setattr(train, "loss_of", original)
    command(train, *TINY, "--epochs", 2, "--out", "a")
    command(train, *TINY, "--epochs", 2, "--out", "b")
    assert_same_weights(tmp_path / "a/last.pt", tmp_path / "b/last.pt")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    command, tmp_path, monkeypatch
):
    arguments = [*TINY, "--epochs", 2, "--out", "a"]
    command(train, *arguments, "--max-steps", 4)
    before = (tmp_path / "a/last.pt").read_bytes()
    original = train.loss_of

    def poisoned(*arguments):
        return {"loss": original(*arguments)["loss"] * float("nan")}

    monkeypatch.setattr(train, "loss_of", poisoned)
    status, printed = command(train, *arguments)
    assert status == 2 and "step 4: the loss is nan" in printed and "Traceback" not in printed
    assert (tmp_path / "a/last.pt").read_bytes() == before


def test_other_settings_are_refused_by_name(command):
    command(train, *TINY, "--epochs", 1, "--out", "a", "--max-steps", 1)
    status, printed = command(
        train, "--preset", "tiny", "--batch-size", 8, "--seed", 7, "--out", "a", "--epochs", 4
    )
    assert status == 2
    assert "--batch-size: was 16, now 8" in printed and "--seed: was 0, now 7" in printed
    assert "epochs" not in printed.split("(2)")[1]  # free to change


def test_a_folder_of_ones_own(command, miniature, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    table = ["file_name,caption"]
    for i, path in enumerate(sorted(miniature.glob("CLOTHO_v2.1/clotho_audio_files/*/*.wav"))):
        (own / f"{i}.wav").symlink_to(path)
        table.append(f"{i}.wav,sound number {i}")
    (own / "captions.csv").write_text("\n".join(table))
    status, printed = command(train, *TINY, "--datasets", own, "--epochs", 1)
    assert status == 0, printed
    assert "18 clips, 18 captions" in printed and "2 clips, 2 captions" in printed
    status, printed = command(evaluate, "--dataset", own, "--split", "val")
    assert status == 2 and "was trained on" in printed


def test_losses_name_the_step_that_went_wrong():
    losses = Losses([])
    losses.add(0, {"loss": torch.tensor(2.0), "part": torch.tensor(1.0)})
    losses.add(1, {"loss": torch.tensor(4.0), "part": torch.tensor(2.0)})
    assert losses.mean() == {"loss": 3.0, "part": 1.5} and losses.mean(1)["loss"] == 4.0
    losses.add(2, {"loss": torch.tensor(float("inf"))})
    losses.add(3, {"loss": torch.tensor(float("nan"))})
    with pytest.raises(InputError, match="step 2: the loss is inf"):
        losses.fetch()
