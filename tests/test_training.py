"""Training: a step by a second route, resuming, stopping, what chooses the best epoch, stage 2."""

import dataclasses
import datetime
import fcntl
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_csv, write_wav
from torch import nn

import distill
import train
from dualenc import DualEncoder, checkpoints, training
from dualenc.data import PairBatches, decode_splits, read_split
from dualenc.errors import InputError, reason_of
from dualenc.losses import contrastive_loss
from dualenc.model import PRESETS
from dualenc.page import write_curves
from dualenc.training import learning_rate

TRAINING_CLIPS = range(0, 6)  # the numbers of Clotho's development clips
VALIDATION_CLIPS = range(6, 18)
AUDIOCAPS_CLIPS = {"train": range(18, 21), "val": range(21, 22), "test": range(22, 23)}
STEPS_PER_EPOCH = 3  # six clips with two captions each, in batches of four pairs
LOUDNESS_STEPS = 64


# --- Small data: every sound and every caption says which clip it belongs to ---


def write_tone(path: Path, clip: int) -> None:
    """Write 0.2 s of a tone: pitch and loudness depend on the clip, so clips embed differently."""
    seconds = np.arange(6_400) / 32_000
    frequency = 200 + 150 * clip  # Hz
    loudness = (clip + 1) / LOUDNESS_STEPS
    write_wav(path, loudness * np.cos(2 * np.pi * frequency * seconds))


def clip_of_sound(waveform) -> int:
    """The number of the clip whose tone this is: it starts at its peak."""
    return round(float(waveform[0]) / 32_768 * LOUDNESS_STEPS) - 1


def clip_of_caption(caption: str) -> int:
    return int(re.search(r"\d+", caption).group())


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch) -> None:
    """Make the preset "tiny" smaller still, and draw nothing: no test here depends on sizes."""
    sizes = {
        "audio_width": 24, "audio_depth": 1, "audio_heads": 1, "vocab_size": 300,
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 48, "embedding": 32,
    }
    preset = dataclasses.replace(PRESETS["tiny"], **sizes)
    monkeypatch.setitem(PRESETS, "tiny", preset)
    monkeypatch.setattr(train, "write_curves", lambda folders, path: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clotho, two captions a clip, and AudioCaps, one caption a clip."""
    folder = tmp_path_factory.mktemp("data")
    for part, clips in {"development": TRAINING_CLIPS, "validation": VALIDATION_CLIPS}.items():
        rows = []
        for clip in clips:
            write_tone(folder / part / f"{clip}.wav", clip)
            rows.append([f"{clip}.wav", f"sound {clip} once", f"sound {clip} again"])
        header = ["file_name", "caption_1", "caption_2"]
        write_csv(folder / f"clotho_captions_{part}.csv", header, rows)
    for part, clips in AUDIOCAPS_CLIPS.items():
        rows = []
        for clip in clips:
            write_tone(folder / "audio_32000Hz" / part / f"y{clip}_30.wav", clip)
            rows.append([str(clip), f"y{clip}", "30", f"sound {clip} heard"])
        header = ["audiocap_id", "youtube_id", "start_time", "caption"]
        write_csv(folder / "csv_files_v1" / f"{part}.csv", header, rows)
    return folder


def options(data: Path, out: Path, *more) -> list[str]:
    """Two epochs of three steps with the tiny preset, in this process."""
    common = ["--data-dir", data, "--out", out, "--batch-size", 4, "--epochs", 2, "--workers", 0,
              "--log-every", 1, "--device", "cpu"]
    return [str(value) for value in [*common, *more]]


def run_script(monkeypatch, script, arguments: list[str]) -> int:
    if script is train:
        arguments = ["--preset", "tiny", *arguments]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    return script.main()


def run_train(monkeypatch, data: Path, out: Path, *more) -> int:
    return run_script(monkeypatch, train, options(data, out, *more))


def last(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def best(out: Path) -> dict:
    return torch.load(out / "best.pt", weights_only=True)


def log_of(out: Path) -> list[dict]:
    """The lines of a run's log after the first, without what a clock tells."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        line.pop("time", None)
        line.pop("pairs_per_second", None)
    return lines


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs left the same weights, moments, scaler and log, to the last bit."""
    one = last(a)
    two = last(b)
    for name in one["model"]:
        assert torch.equal(one["model"][name], two["model"][name]), name
    moments = two["training"]["optimizer"]["state"]
    for index, state in one["training"]["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key]), (index, key)
    assert one["training"]["scaler"] == two["training"]["scaler"]
    assert one["training"]["best"] == two["training"]["best"]
    assert log_of(a) == log_of(b)


def training_split(data: Path):
    split = read_split("clotho", "train", data)
    decode_splits([split], data / "cache")
    return split


# --- The gradient of one step ---


def gradients(model, batch, encode) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(7)
    contrastive_loss(*encode(), batch.clip_ids, model.tau).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture
def model_and_batch(data):
    """A tiny model and eight pairs of four clips: a piece of three pairs parts two of a clip."""
    split = training_split(data)
    torch.manual_seed(0)
    model = DualEncoder.create("tiny", "random", split.captions)
    return model, PairBatches([split], model.tokenizer, 8, captions_per_clip=2)[0]


def test_pieces_have_the_gradient_of_one_graph(model_and_batch):
    model, batch = model_and_batch

    def pieces_in_one_graph():
        audio = []
        text = []
        for piece in batch.pieces(3):
            segments, counts, rows, tokens = piece.inputs(model.device)
            audio.append(model.encode_audio(segments, counts)[rows])
            text.append(model.encode_text(tokens))
        return torch.cat(audio), torch.cat(text)

    model.train()  # Dropout, patchout and jitter are replayed.
    pieces = gradients(model, batch, lambda: model.encode_pairs(batch, 3))
    assert torch.equal(pieces, gradients(model, batch, pieces_in_one_graph))


def test_pieces_have_the_gradient_of_the_whole_batch(model_and_batch):
    model, batch = model_and_batch
    model.eval()
    pieces = gradients(model, batch, lambda: model.encode_pairs(batch, 3))
    whole = gradients(model, batch, lambda: model.encode_pairs(batch))
    assert whole.abs().max() > 1e-4
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6)


def test_a_clip_encoded_once_is_the_clip_encoded_for_each_caption(data, model_and_batch):
    model, batch = model_and_batch
    split = training_split(data)
    model.eval()
    assert len(batch.counts) == 4
    audio, text = model.encode_pairs(batch)
    clips = [split.clip_of_caption[pair] for pair in batch.pair_ids.tolist()]
    alone = model.embed_audio([split.clips[clip].path for clip in clips])
    torch.testing.assert_close(audio, alone, rtol=0, atol=1e-5)
    captions = model.embed_text([split.captions[pair] for pair in batch.pair_ids.tolist()])
    torch.testing.assert_close(text, captions, rtol=0, atol=1e-5)


# --- The loop by a second route ---


def without_dropout(monkeypatch) -> None:
    """Keep every model in evaluation mode: no dropout, patchout or jitter."""
    monkeypatch.setattr(DualEncoder, "train", lambda self, mode=True: nn.Module.train(self, False))


def test_training_is_adam_on_the_contrastive_loss_without_weight_decay(
    data, tmp_path, monkeypatch
):
    without_dropout(monkeypatch)
    # A larger epsilon: Adam would make a whole step of a gradient that is rounding.
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-5))
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 4, "--seed", 5)

    split = training_split(data)
    torch.manual_seed(5)
    model = DualEncoder.create("tiny", "random", split.captions).eval()
    batches = PairBatches([split], model.tokenizer, 4, seed=5)
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-5)
    for step in range(4):
        batch = batches[step]
        loss = contrastive_loss(*model.encode_pairs(batch), batch.clip_ids, model.tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, 3, 1, 15, 1e-3, 1e-6)
        optimizer.step()
    trained = last(tmp_path / "run")["model"]
    for name, weights in model.state_dict().items():
        # Adam is fused there and not here: 1.3e-7. A weight decay of 0.01 would show as 1e-5.
        torch.testing.assert_close(trained[name], weights, rtol=0, atol=1e-6)


def test_the_log_holds_the_schedule(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_curves", write_curves)
    run_train(monkeypatch, data, tmp_path / "run")
    lines = log_of(tmp_path / "run")
    rates = [line["lr"] for line in lines if "lr" in line]
    expected = [learning_rate(step, STEPS_PER_EPOCH, 1, 15, 1e-3, 1e-6) for step in range(6)]
    assert rates == expected
    assert [line["epoch"] for line in lines if "validation" in line] == [1, 2]
    assert (tmp_path / "run" / "curves.svg").exists()


def test_an_epochs_loss_in_the_log_is_the_mean_of_its_steps(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run")
    lines = log_of(tmp_path / "run")
    for epoch in (1, 2):
        steps = [line["loss"] for line in lines if line["epoch"] == epoch and "lr" in line]
        [mean] = [
            line["loss"] for line in lines if line["epoch"] == epoch and "validation" in line
        ]
        assert len(steps) == STEPS_PER_EPOCH
        assert mean == pytest.approx(np.mean(steps), abs=1e-9)


def test_dropout_is_drawn_anew_in_every_step_and_for_every_seed(data, tmp_path, monkeypatch):
    draws = []
    encode_pairs = DualEncoder.encode_pairs

    def drawing(self, *arguments):
        with torch.random.fork_rng(devices=[]):
            draws.append(torch.rand(1).item())
        return encode_pairs(self, *arguments)

    monkeypatch.setattr(DualEncoder, "encode_pairs", drawing)
    for seed in (0, 1):
        run_train(monkeypatch, data, tmp_path / str(seed), "--seed", seed)
    assert len(draws) == 12
    assert len(set(draws)) == 12


# --- Resuming ---


class Scaler(torch.amp.GradScaler):
    """A gradient scaler that works without a GPU and doubles its factor every second step."""

    def __init__(self, device: str, enabled: bool):
        super().__init__("cpu", enabled=True, init_scale=8.0, growth_interval=2)


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    run_train(monkeypatch, data, tmp_path / "whole")
    for steps in (1, 3, 5):  # within an epoch, at its end, within the next
        run_train(monkeypatch, data, tmp_path / "parts", "--max-steps", steps)
    run_train(monkeypatch, data, tmp_path / "parts", "--micro-batch", 4)
    assert last(tmp_path / "whole")["training"]["scaler"]["scale"] == 8.0 * 2**3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_cuts_the_validation_of_a_part_of_an_epoch_from_the_log(
    data, tmp_path, monkeypatch
):
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 1)
    assert "validation" in log_of(tmp_path / "run")[-1]
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH)
    steps = [line["step"] for line in log_of(tmp_path / "run") if "validation" in line]
    assert steps == [STEPS_PER_EPOCH]


def test_scaled_gradients_make_the_same_steps(data, tmp_path, monkeypatch):
    without_dropout(monkeypatch)
    run_train(monkeypatch, data, tmp_path / "plain")
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    run_train(monkeypatch, data, tmp_path / "scaled")
    plain = last(tmp_path / "plain")["model"]
    for name, weights in last(tmp_path / "scaled")["model"].items():
        torch.testing.assert_close(weights, plain[name], rtol=0, atol=1e-7)


class Killed(BaseException):
    """What ends a run in the midst of things, in this process."""


@pytest.mark.parametrize(
    ("module", "interrupted"),
    [
        (train, "retrieval_metrics"),  # in the validation
        (train, "save_atomically"),  # before best.pt is written
        (training, "save_atomically"),  # after the validation, before last.pt is written
    ],
)
def test_a_run_killed_at_an_epochs_end_repeats_the_steps_since_last_pt(
    data, tmp_path, monkeypatch, module, interrupted
):
    def kill(*arguments):
        raise Killed

    run_train(monkeypatch, data, tmp_path / "whole")
    run_train(monkeypatch, data, tmp_path / "killed", "--max-steps", 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, interrupted, kill)
        run_train(patch, data, tmp_path / "killed")
    assert last(tmp_path / "killed")["training"]["step"] == 2
    run_train(monkeypatch, data, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def signal_in_step(monkeypatch, number: int, signalled_step: int) -> None:
    """Have the process receive a signal while the run's n-th step is under way."""
    stage_1_loss = train.stage_1_loss
    steps = itertools.count(start=1)

    def loss_and_signal(*arguments):
        if next(steps) == signalled_step:
            os.kill(os.getpid(), number)
        return stage_1_loss(*arguments)

    monkeypatch.setattr(train, "stage_1_loss", loss_and_signal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step(data, tmp_path, monkeypatch, capfd, number, status):
    run_train(monkeypatch, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, 1)
        assert run_train(patch, data, tmp_path / "ended") == status
    printed = capfd.readouterr()
    assert f"{number.name}: the step, and at an epoch's end the validation, is" in printed.err
    assert "another Ctrl-C or SIGTERM ends the run now" in printed.err
    assert f"{number.name} after step 1: saved in" in printed.out
    assert last(tmp_path / "ended")["training"]["step"] == 1
    run_train(monkeypatch, data, tmp_path / "ended")
    assert "last.pt, after step 1 of 6" in capfd.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "ended")


def test_a_signal_in_the_last_step_of_an_epoch_waits_for_the_validation(
    data, tmp_path, monkeypatch
):
    signal_in_step(monkeypatch, signal.SIGTERM, STEPS_PER_EPOCH)
    assert run_train(monkeypatch, data, tmp_path / "run") == 143
    assert last(tmp_path / "run")["training"]["step"] == STEPS_PER_EPOCH
    assert "validation" in log_of(tmp_path / "run")[-1]


def look_at_the_worker(monkeypatch, data: Path, out: Path, look) -> None:
    """Train one step with one data worker, and call `look` with its process id meanwhile."""
    stage_1_loss = train.stage_1_loss

    def loss_and_look(*arguments):
        [worker] = multiprocessing.active_children()
        look(worker.pid)
        return stage_1_loss(*arguments)

    monkeypatch.setattr(train, "stage_1_loss", loss_and_look)
    run_train(monkeypatch, data, out, "--workers", 1, "--max-steps", 1)


def test_a_signal_to_the_whole_group_does_not_reach_the_data_workers(data, tmp_path, monkeypatch):
    groups = []
    look_at_the_worker(
        monkeypatch, data, tmp_path / "run", lambda pid: groups.append((pid, os.getpgid(pid)))
    )
    [(worker, group)] = groups
    assert group == worker


def test_a_data_worker_that_outlives_its_run_does_not_lock_the_folder(data, tmp_path, monkeypatch):
    open_files = []

    def list_open_files(pid: int) -> None:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            open_files.append(os.readlink(descriptor))

    look_at_the_worker(monkeypatch, data, tmp_path / "run", list_open_files)
    assert open_files
    assert str(tmp_path / "run" / "log.jsonl") not in open_files


# --- What chooses the best epoch ---


def one_hot(clips: list[int]) -> torch.Tensor:
    """A unit row for each clip number, (N, 64)."""
    return F.one_hot(torch.tensor(clips), 64).float()


def set_validation_ranks(monkeypatch, *epochs: tuple[int, int, int]) -> None:
    """Have embeddings with which a caption of the validation split ranks its clip as told.

    Each epoch has three ranks: of the clips whose number divided by three leaves 0, 1 and 2.
    Captions of any other split rank their clip first in the last epoch and last in the others, so
    that they would choose another epoch.
    """
    remaining = list(epochs)

    def embed_audio(self, sounds, rate=32_000):
        return one_hot([clip_of_sound(sound) for sound in sounds])

    def embed_text(self, captions):
        ranks = remaining.pop(0)
        rows = []
        for caption in captions:
            clip = clip_of_caption(caption)
            row = one_hot([clip])[0]
            if clip in VALIDATION_CLIPS:
                others = [other for other in VALIDATION_CLIPS if other != clip]
                row[others[: ranks[clip % 3] - 1]] = 2.0
            elif remaining:
                row = -row
            rows.append(F.normalize(row, dim=0))
        return torch.stack(rows)

    monkeypatch.setattr(DualEncoder, "embed_audio", embed_audio)
    monkeypatch.setattr(DualEncoder, "embed_text", embed_text)


def test_the_best_epoch_has_the_highest_map_at_10_on_the_validation_split(
    data, tmp_path, monkeypatch
):
    # The second epoch has the higher R@1.
    set_validation_ranks(monkeypatch, (2, 2, 2), (1, 12, 12))
    run_train(monkeypatch, data, tmp_path / "run")
    validations = [line["validation"] for line in log_of(tmp_path / "run") if "validation" in line]
    first = {"mAP@10": 1 / 2, "mAP@16": 1 / 2, "R@1": 0, "R@5": 1, "R@10": 1}
    second = dict.fromkeys(first, 1 / 3) | {"mAP@16": (1 + 2 / 12) / 3}
    assert validations == [pytest.approx(first), pytest.approx(second)]
    assert best(tmp_path / "run")["epoch"] == 1
    assert best(tmp_path / "run")["validation"] == validations[0]


def test_of_equal_epochs_the_later_is_best(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (1, 2, 2), (2, 2, 1))
    run_train(monkeypatch, data, tmp_path / "run")
    assert best(tmp_path / "run")["epoch"] == 2


def test_a_worse_epoch_after_resuming_does_not_replace_the_best(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (1, 1, 1), (2, 2, 2))
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH)
    run_train(monkeypatch, data, tmp_path / "run")
    assert best(tmp_path / "run")["epoch"] == 1


def test_best_pt_holds_the_weights_of_its_epoch(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (1, 1, 1), (2, 2, 2), (1, 1, 1))
    run_train(monkeypatch, data, tmp_path / "run")
    run_train(monkeypatch, data, tmp_path / "one", "--max-steps", STEPS_PER_EPOCH)
    epoch_1 = last(tmp_path / "one")["model"]
    for name, weights in best(tmp_path / "run")["model"].items():
        assert torch.equal(weights, epoch_1[name]), name


def test_a_part_of_an_epoch_is_kept_only_where_there_is_no_best(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (2, 2, 2), (1, 1, 1), (1, 1, 1), (2, 2, 2))
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 3)
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 4)
    assert best(tmp_path / "run")["epoch"] == 1
    # Where it was kept, the first whole epoch replaces it, even a worse one.
    run_train(monkeypatch, data, tmp_path / "short", "--max-steps", 2)
    assert best(tmp_path / "short")["validation"]["R@1"] == 1
    run_train(monkeypatch, data, tmp_path / "short", "--max-steps", 3)
    assert best(tmp_path / "short")["validation"]["R@1"] == 0


def test_a_run_that_max_steps_ended_says_its_own_figure_again(
    data, tmp_path, monkeypatch, capsys
):
    for _ in range(2):
        run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 2)
        figure = 100 * best(tmp_path / "run")["validation"]["mAP@10"]
        assert f"Best validation mAP@10 {figure:.2f} %" in capsys.readouterr().out


# --- What stops a run, and what it keeps ---


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 3)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(train, "stage_1_loss", lambda a, t, *rest: {"loss": (a * np.nan).sum()})
    message = "step 4: the loss is nan.*last.pt is as it was.*another --out"
    with pytest.raises(InputError, match=message):
        run_train(monkeypatch, data, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    steps = itertools.count(start=STEPS_PER_EPOCH + 1)

    def nan_gradient_in_step_6(audio, *rest):
        loss = (0 * audio).sum()
        if next(steps) == 2 * STEPS_PER_EPOCH:
            # The gradient of a root of zero is infinite, and times zero no number.
            loss = loss + (0 * audio).abs().sqrt().sum()
        return {"loss": loss}

    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    best_before = (tmp_path / "run" / "best.pt").read_bytes()
    # Validation may not notice: all that is not finite may be rows of tokens that no caption has.
    set_validation_ranks(monkeypatch, (1, 1, 1))
    monkeypatch.setattr(train, "stage_1_loss", nan_gradient_in_step_6)
    with pytest.raises(InputError, match="step 6: .*weights are not finite.*last.pt is as it was"):
        run_train(monkeypatch, data, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert (tmp_path / "run" / "best.pt").read_bytes() == best_before


def test_a_full_disk_leaves_last_pt_as_it_was(data, tmp_path, monkeypatch):
    def full(values, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 3)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left"):
        run_train(monkeypatch, data, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_other_settings_are_refused_with_both_values(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 1)
    with pytest.raises(InputError, match="max_lr: was 0.001, now 0.5"):
        run_train(monkeypatch, data, tmp_path / "run", "--max-lr", 0.5)


def test_a_temporary_file_of_a_killed_write_is_replaced(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 1)
    (tmp_path / "run" / ".last.pt.tmp").write_bytes(b"half")
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 2)
    assert not list((tmp_path / "run").glob(".*"))
    assert last(tmp_path / "run")["training"]["step"] == 2


def test_a_run_without_a_step_may_begin_again_with_other_settings(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="is needed"):
        patch.setattr(train, "decode_splits", failing_decoder)
        run_train(patch, data, tmp_path / "run")
    # What a start with other settings has left may be of other data.
    (tmp_path / "run" / "teacher-0.pt").write_bytes(b"")
    run_train(monkeypatch, data, tmp_path / "run", "--max-lr", 0.5, "--max-steps", 1)
    assert not (tmp_path / "run" / "teacher-0.pt").exists()
    first_line = (tmp_path / "run" / "log.jsonl").read_text().partition("\n")[0]
    assert json.loads(first_line)["settings"]["max_lr"] == 0.5


def test_a_trained_model_without_last_pt_is_not_overwritten(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run")
    trained = (tmp_path / "run" / "best.pt").read_bytes()
    (tmp_path / "run" / "last.pt").unlink()
    for options in ([], ["--max-lr", 0.5]):
        with pytest.raises(InputError, match="holds a trained best.pt, but no last.pt"):
            run_train(monkeypatch, data, tmp_path / "run", *options)
    assert (tmp_path / "run" / "best.pt").read_bytes() == trained


def failing_decoder(splits, cache_dir) -> None:
    raise InputError("a sound is needed")


def test_a_second_process_in_the_folder_is_refused(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 1)
    with open(tmp_path / "run" / "log.jsonl") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="run: another process trains here"):
            run_train(monkeypatch, data, tmp_path / "run")
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 2)
    assert last(tmp_path / "run")["training"]["step"] == 2


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("--batch-size", "0"), ("--captions-per-clip", "0"), ("--micro-batch", "-1"),
        ("--workers", "-1"), ("--epochs", "0"), ("--max-steps", "0"), ("--max-lr", "-1e-5"),
        ("--max-lr", "nan"), ("--min-lr", "-1"), ("--warmup-epochs", "-1"),
        ("--decay-epochs", "inf"), ("--seed", "-1"), ("--log-every", "0"), ("--save-every", "x"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_before_anything_is_written(
    data, tmp_path, monkeypatch, option, number
):
    with pytest.raises(InputError, match=f"argument {option}: {number}: a .*number .*is needed"):
        run_train(monkeypatch, data, tmp_path / "run", f"{option}={number}")
    assert not (tmp_path / "run").exists()


def test_a_data_worker_that_dies_is_one_line(data, tmp_path, monkeypatch):
    def die(self, step):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PairBatches, "__getitem__", die)
    with pytest.raises(RuntimeError) as error:
        run_train(monkeypatch, data, tmp_path / "run", "--workers", 1)
    assert "--workers 0" in reason_of(error.value)
    assert "/dev/shm" in reason_of(error.value)


def test_a_rank_without_a_world_size_counts_for_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    spec = importlib.util.spec_from_file_location("fresh", training.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert (fresh.RANK, fresh.WORLD) == (0, 1)


# --- What a run says ---


def test_the_logs_first_line_has_settings_and_versions(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 1)
    first_line = json.loads((tmp_path / "run" / "log.jsonl").read_text().partition("\n")[0])
    assert first_line["settings"]["batch_size"] == 4
    assert first_line["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert first_line["versions"]["python"] == sys.version.split()[0]


def test_lines_of_the_log_have_time_and_speed(data, tmp_path, monkeypatch):
    began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 2)
    ended = datetime.datetime.now(datetime.UTC)
    text = (tmp_path / "run" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()[1:]]
    times = [datetime.datetime.fromisoformat(line["time"]) for line in lines]
    assert began <= times[0] <= times[-1] <= ended
    speeds = [line["pairs_per_second"] for line in lines if "lr" in line]
    assert len(speeds) == 2
    seconds = sum(4 / speed for speed in speeds)
    assert 0 < seconds < (ended - began).total_seconds()


def test_the_next_command_finds_the_data(data, tmp_path, monkeypatch, capsys):
    more = ["--cache-dir", data / "cache", "--max-steps", 1]
    run_train(monkeypatch, data, tmp_path / "run", *more)
    expected = (
        f"Next: python evaluate.py --checkpoint {tmp_path}/run/best.pt --data-dir {data} "
        f"--cache-dir {data}/cache\n"
    )
    assert capsys.readouterr().out.endswith(expected)


# --- Stage 2 ---

TAU = 0.05
BOTH = ["--datasets", "audiocaps", "clotho"]


@pytest.fixture
def teachers(data, tmp_path) -> list[Path]:
    """Two teachers with different random weights."""
    paths = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        captions = [f"sound {clip} once again heard" for clip in range(23)]
        model = DualEncoder.create("tiny", "random", captions)
        model.trained_on = ["clotho/development"]
        paths.append(tmp_path / f"teacher{seed}.pt")
        torch.save(model.checkpoint(), paths[-1])
    return paths


def stop_before_the_loop(monkeypatch) -> dict:
    """Have distill.py hand its loop's arguments to a dict that this returns."""
    given = {}

    def loop(args, run, model, batches, validation, loss_fn) -> int:
        given.update(run=run, model=model, batches=batches, loss_fn=loss_fn)
        run.close()
        return 0

    monkeypatch.setattr(distill, "train", loop)
    return given


def run_distill(monkeypatch, data: Path, out: Path, teachers: list[Path], *more) -> int:
    arguments = ["--teachers", *map(str, teachers), *options(data, out, *more)]
    return run_script(monkeypatch, distill, arguments)


def cross_entropy_by_hand(cosines: torch.Tensor, teacher_cosines: torch.Tensor) -> float:
    """H(p^, q) over rows and over columns, in plain loops over (B, B) cosines."""
    total = 0.0
    for teacher_rows, rows in ((teacher_cosines, cosines), (teacher_cosines.T, cosines.T)):
        for teacher_row, row in zip(teacher_rows, rows, strict=True):
            target = (teacher_row / TAU).softmax(dim=0)
            total -= float((target * (row / TAU).log_softmax(dim=0)).sum())
    return total / len(cosines) / 2


def test_the_student_starts_from_its_first_teacher(data, tmp_path, monkeypatch, teachers):
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)
    student = given["model"].state_dict()
    for name, weights in DualEncoder.load(teachers[0]).state_dict().items():
        assert torch.equal(student[name], weights), name
    assert given["model"].stage == "distilled"


def test_the_teachers_rows_are_those_of_the_batchs_sounds_and_captions(
    data, tmp_path, monkeypatch, teachers
):
    # Teachers with random embeddings, drawn from the teacher and the clip or the caption.
    def embedding(model: DualEncoder, item: int) -> torch.Tensor:
        teacher = round(1e6 * abs(model.audio_projection.weight[0, 0].item()))
        generator = np.random.default_rng([teacher, item])
        row = torch.from_numpy(generator.standard_normal(8)).float()
        return F.normalize(row, dim=0)

    def caption_number(caption: str) -> int:
        kind = ["once", "again", "heard"].index(caption.split()[-1])
        return 1_000 + 10 * clip_of_caption(caption) + kind

    def embed_audio(self, sounds, rate=32_000):
        return torch.stack([embedding(self, clip_of_sound(sound)) for sound in sounds])

    def embed_text(self, captions):
        return torch.stack([embedding(self, caption_number(caption)) for caption in captions])

    given = stop_before_the_loop(monkeypatch)
    monkeypatch.setattr(DualEncoder, "embed_audio", embed_audio)
    monkeypatch.setattr(DualEncoder, "embed_text", embed_text)
    weights = ["--contrastive-weight", 0.5, "--distillation-weight", 2]
    run_distill(monkeypatch, data, tmp_path / "run", teachers, *BOTH, *weights, "--batch-size", 12)

    # The batch's pairs are known here by their sounds and tokens, not by their ids.
    batch = given["batches"][0]
    segments, counts, clip_rows, tokens = batch.inputs(torch.device("cpu"))
    assert counts.tolist() == [1] * len(segments)
    sounds = [segments[row] for row in clip_rows]
    tokenizer = given["model"].tokenizer
    captions = [tokenizer.decode(row.tolist()).strip() for row in tokens]
    assert len({caption.split()[-1] for caption in captions}) == 3
    members = [DualEncoder.load(path) for path in teachers]
    teacher_cosines = torch.stack(
        [embed_audio(member, sounds) @ embed_text(member, captions).T for member in members]
    ).mean(dim=0)

    student = given["model"].eval()
    with torch.no_grad():
        audio, text = student.encode_pairs(batch)
        losses = given["loss_fn"](audio, text, batch.clip_ids, batch.pair_ids, student.tau)
    distillation = cross_entropy_by_hand(audio @ text.T, teacher_cosines)
    assert losses["distillation"].item() == pytest.approx(distillation, abs=1e-5)
    clips = torch.tensor([clip_of_sound(sound) for sound in sounds])
    contrastive = contrastive_loss(audio, text, clips, TAU).item()
    assert losses["contrastive"].item() == pytest.approx(contrastive, abs=1e-5)
    total = 0.5 * contrastive + 2 * distillation
    assert losses["loss"].item() == pytest.approx(total, abs=1e-5)


def test_the_teachers_embeddings_are_their_own(data, tmp_path, monkeypatch, teachers):
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)
    student = given["model"].eval()
    batch = given["batches"][0]
    with torch.no_grad():
        audio, text = student.encode_pairs(batch)
        losses = given["loss_fn"](audio, text, batch.clip_ids, batch.pair_ids, student.tau)
        cosines = []
        for path in teachers:
            teacher_audio, teacher_text = DualEncoder.load(path).encode_pairs(batch)
            cosines.append(teacher_audio @ teacher_text.T)
    by_hand = cross_entropy_by_hand(audio @ text.T, torch.stack(cosines).mean(dim=0))
    assert losses["distillation"].item() == pytest.approx(by_hand, abs=1e-4)


def test_teachers_embed_the_training_set_once(data, tmp_path, monkeypatch, teachers):
    stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)

    def embed_again(self, sounds, rate=32_000):
        raise AssertionError("a teacher embeds the training set again")

    monkeypatch.setattr(DualEncoder, "embed_audio", embed_again)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)


def test_the_student_has_seen_what_its_teachers_have(data, tmp_path, monkeypatch, teachers):
    saved = torch.load(teachers[1], weights_only=True)
    torch.save(saved | {"trained_on": ["audiocaps/train", "wavcaps/train"]}, teachers[1])
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)
    assert given["model"].trained_on == ["audiocaps/train", "clotho/development", "wavcaps/train"]


def test_other_teachers_are_refused_by_name(data, tmp_path, monkeypatch, teachers):
    run_distill(monkeypatch, data, tmp_path / "run", teachers, "--max-steps", 1)
    with pytest.raises(InputError, match="teachers: was .*teacher3.pt.*, now .*teacher4.pt"):
        run_distill(monkeypatch, data, tmp_path / "run", teachers[::-1])


def test_teachers_may_move(data, tmp_path, monkeypatch, teachers):
    run_distill(monkeypatch, data, tmp_path / "run", teachers, "--max-steps", 1)
    moved = teachers[0].rename(tmp_path / "moved.pt")
    run_distill(monkeypatch, data, tmp_path / "run", [moved, teachers[1]], "--max-steps", 2)
    assert last(tmp_path / "run")["training"]["step"] == 2


def test_a_students_folder_is_named_by_what_its_teachers_have_seen(
    data, tmp_path, monkeypatch, teachers
):
    monkeypatch.chdir(tmp_path)
    given = stop_before_the_loop(monkeypatch)
    arguments = options(data, tmp_path / "run")
    position = arguments.index("--out")
    del arguments[position : position + 2]
    run_script(monkeypatch, distill, ["--teachers", str(teachers[0]), *arguments])
    assert given["run"].folder == Path("runs/distilled-clotho-from-clotho-tiny-seed0")
    saved = torch.load(teachers[1], weights_only=True)
    torch.save(saved | {"trained_on": ["audiocaps/val", "clotho/development"]}, teachers[1])
    run_script(monkeypatch, distill, ["--teachers", *map(str, teachers), *arguments])
    folder = Path("runs/distilled-clotho-from-audiocaps-clotho-tiny-seed0")
    assert given["run"].folder == folder


def test_published_checkpoints_can_teach(data, tmp_path, monkeypatch, teachers):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fetched = checkpoints.PUBLISHED["salsa"].path()
    fetched.parent.mkdir(parents=True)
    teachers[0].rename(fetched)
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", ["salsa"])
    student = given["model"].state_dict()
    for name, weights in DualEncoder.load(fetched).state_dict().items():
        assert torch.equal(student[name], weights), name


def test_stage_2_trains_on_clotho_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teachers", "a.pt"])
    assert distill.parse_arguments().datasets == ["clotho"]
