"""The loop: what it writes, resumes, refuses, and computes."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import distill
import evaluate
import train
from dualenc import InputError, training
from dualenc.model import DualEncoder
from dualenc.step import Losses
from dualenc.training import learning_rate

TINY = ["--preset", "tiny", "--batch-size", 16, "--workers", 0]


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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


# --- What a step and an epoch do ---


def test_steps_see_dropout_and_patchout_and_validation_does_not(command, monkeypatch):
    original, seen = training.step_gradients, []

    def watched(model, *arguments):
        if not seen:
            model.audio.passt.blocks[0].register_forward_hook(
                lambda block, inputs, output: seen.append((block.training, output.shape[1]))
            )
        return original(model, *arguments)

    monkeypatch.setattr(training, "step_gradients", watched)
    command(train, *TINY, "--epochs", 2, "--out", "a")
    # Two tokens, and of 125 patches all but the 30 that are left out in training.
    assert [state for state, _ in itertools.groupby(seen)] == [(True, 97), (False, 127)] * 2


def test_weights_move_by_the_sum_of_the_learning_rates(command, monkeypatch):
    """Of a constant gradient, AdamW's every step is the learning rate."""

    def loss_of(audio, text, clip_ids, pair_ids, tau):
        return {"loss": tau + 0 * audio.sum()}

    monkeypatch.setattr(train, "loss_of", loss_of)
    schedule = ["--epochs", 3, "--decay-epochs", 1.5]
    command(train, *TINY, *schedule, "--learn-tau", "--tau", 0.5, "--out", "a")
    tau = torch.load("a/last.pt", weights_only=True)["model"]["tau"].item()
    rates = [learning_rate(step, 4, 1, 1.5, 1e-3, 1e-6) for step in range(12)]
    assert 0.5 - tau == pytest.approx(sum(rates), abs=1e-6)


def test_the_best_epoch_is_kept(command, monkeypatch):
    found = iter((0.5, 0.9, 0.3))
    monkeypatch.setattr(train, "validation", lambda *_: lambda model: {"mAP@10": next(found)})
    status, printed = command(train, *TINY, "--epochs", 3, "--out", "a")
    assert printed.count("best so far") == 2 and "Best validation mAP@10 90.00 %" in printed
    best = torch.load("a/best.pt", weights_only=True)
    assert best["epoch"] == 2 and best["validation"] == {"mAP@10": 0.9}
    assert torch.load("a/last.pt", weights_only=True)["training"]["best"] == 0.9


def test_the_bar_shows_the_first_steps_loss_and_the_epoch(command):
    status, printed = command(train, *TINY, "--max-steps", 1, "--out", "a")
    assert "loss=" in printed and "lr=1.0e-06" in printed
    assert "epoch 1/20" in printed and "epoch 2/20" not in printed


# --- Where training starts ---


@pytest.mark.parametrize(("option", "words"), [
    (["--init", ""], "--init : is neither pretrained"),
    (["--validation", ""], "not a data set"),
    (["--text-model", ""], "--text-model : "),
    (["--preset", "report", "--init", "{checkpoint}"], "best.pt has the preset tiny"),
])
def test_nothing_is_ignored(command, option, words):
    command(train, *TINY, "--max-steps", 1, "--out", "a")
    option = [text.replace("{checkpoint}", "a/best.pt") for text in option]
    status, printed = command(train, *TINY, *option, "--max-steps", 1, "--out", "b")
    assert status == 2 and words in printed.splitlines()[-1] and not Path("b").exists()
    status, printed = command(train, "--init", "a/best.pt", "--max-steps", 1, "--out", "c")
    assert status == 0 and "model       tiny" in printed
