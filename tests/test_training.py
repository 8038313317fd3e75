"""Training: a step by a second route, resuming, stopping, what chooses the best epoch, stage 2."""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_comparable, note_draws, write_csv, write_folder, write_wav

import distill
import train
from dualenc import DualEncoder, checkpoints, training
from dualenc.data import PairBatches, decode_splits, read_split
from dualenc.errors import InputError, reason_of
from dualenc.losses import contrastive_loss
from dualenc.model import PRESETS
from dualenc.page import write_curves
from dualenc.text import train_bpe
from dualenc.training import learning_rate

TRAINING_CLIPS = range(0, 6)  # the numbers of Clotho's development clips
VALIDATION_CLIPS = range(6, 18)
CLIPS_OF_ONE_CAPTION = (6, 7, 8)  # the others have two
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
    """Return the number of the clip whose tone this is: it starts at its peak."""
    return round(float(waveform[0]) / 32_768 * LOUDNESS_STEPS) - 1


def clip_of_caption(caption: str) -> int:
    return int(re.search(r"\d+", caption).group())


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """Make the preset "tiny" smaller still, and draw nothing: no test here depends on sizes."""
    sizes = {
        "audio_width": 24, "audio_depth": 1, "audio_heads": 1, "vocab_size": 300,
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 48, "embedding": 32,
    }
    preset = dataclasses.replace(PRESETS["tiny"], **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", preset)
        patch.setattr(train, "write_curves", lambda folders, path: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write Clotho, two captions for most clips, and AudioCaps, one caption for each."""
    folder = tmp_path_factory.mktemp("data")
    for part, clips in {"development": TRAINING_CLIPS, "validation": VALIDATION_CLIPS}.items():
        rows = []
        for clip in clips:
            write_tone(folder / part / f"{clip}.wav", clip)
            again = "" if clip in CLIPS_OF_ONE_CAPTION else f"sound {clip} again"
            rows.append([f"{clip}.wav", f"sound {clip} once", again])
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
    """Return options for two epochs of three steps in this process."""
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


def whole_log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def log_of(out: Path) -> list[dict]:
    """Return the lines of a run's log after the first, without what a clock tells."""
    lines = whole_log_of(out)[1:]
    for line in lines:
        line.pop("time", None)
        line.pop("pairs_per_second", None)
    return lines


def assert_same_weights(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_same_run(a: Path, b: Path) -> None:
    """Hold two runs' weights, moments, scaler and log against each other, to the last bit."""
    one = last(a)
    two = last(b)
    assert_same_weights(one["model"], two["model"])
    moments = two["training"]["optimizer"]["state"]
    for index, state in one["training"]["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments[index][key]), (index, key)
    assert one["training"]["scaler"] == two["training"]["scaler"]
    assert one["training"]["best"] == two["training"]["best"]
    assert log_of(a) == log_of(b)


class WholeRun(NamedTuple):
    """An uninterrupted run of two epochs, and what is known of it from outside."""

    folder: Path
    printed: str
    began: datetime.datetime
    ended: datetime.datetime


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> WholeRun:
    """Train two epochs, with curves, and with the cache folder named."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    printed = io.StringIO()
    began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, "write_curves", write_curves)
        run_train(patch, data, folder, "--cache-dir", folder.with_name("sounds"))
    ended = datetime.datetime.now(datetime.UTC)
    return WholeRun(folder, printed.getvalue(), began, ended)


@pytest.fixture(scope="module")
def run_of_one_epoch(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_epoch") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, data, folder, "--max-steps", STEPS_PER_EPOCH)
    return folder


@pytest.fixture
def run(run_of_one_epoch, tmp_path) -> Path:
    """Copy a run that --max-steps ended after its first epoch, to go on with."""
    return shutil.copytree(run_of_one_epoch, tmp_path / "run")


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
    """Make a tiny model, and eight pairs of four clips: a piece of three parts two of a clip."""
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


def test_micro_batch_is_how_many_pairs_are_encoded_at_a_time(data, tmp_path, monkeypatch):
    sizes = []
    encode_text = DualEncoder.encode_text

    def encode_and_note(self, tokens):
        if torch.is_grad_enabled():
            sizes.append(len(tokens))
        return encode_text(self, tokens)

    monkeypatch.setattr(DualEncoder, "encode_text", encode_and_note)
    run_train(monkeypatch, data, tmp_path / "run", "--micro-batch", 3, "--max-steps", 1)
    in_forward = [3, 1]
    in_backward = [1, 3]
    assert sizes == in_forward + in_backward


def test_captions_per_clip_stand_together_in_a_batch(data, tmp_path, monkeypatch):
    batches = []
    stage_1_loss = train.stage_1_loss

    def loss_and_note(audio, text, clip_ids, *rest):
        batches.append(clip_ids.tolist())
        return stage_1_loss(audio, text, clip_ids, *rest)

    monkeypatch.setattr(train, "stage_1_loss", loss_and_note)
    run_train(monkeypatch, data, tmp_path / "run", "--captions-per-clip", 2)
    assert len(batches) == 2 * STEPS_PER_EPOCH
    for first, second, third, fourth in batches:
        assert first == second
        assert third == fourth


# --- The start ---


def test_a_run_may_start_from_a_student_and_is_then_no_student(
    data, tmp_path, monkeypatch, teachers
):
    saved = torch.load(teachers[0], weights_only=True)
    start = tmp_path / "start.pt"
    torch.save(saved | {"stage": "distilled", "trained_on": ["audiocaps/train"]}, start)
    run_train(monkeypatch, data, tmp_path / "run", "--init", start, "--max-steps", 1)
    model = DualEncoder.load(tmp_path / "run")
    assert model.stage == "contrastive"
    assert model.trained_on == ["audiocaps/train", "clotho/development"]
    for name, weights in model.state_dict().items():
        # The one step, at a learning rate of 1e-6, moves a weight by 1e-6.
        torch.testing.assert_close(weights, saved["model"][name], rtol=0, atol=2e-6)


def test_a_new_tokenizer_is_trained_on_the_captions_of_all_splits(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", *BOTH, "--max-steps", 1)
    captions = []
    for part in AUDIOCAPS_CLIPS:
        captions += read_split("audiocaps", part, data).captions
    captions += read_split("clotho", "train", data).captions
    assert best(tmp_path / "run")["tokenizer"] == train_bpe(captions, 300).to_str()


# --- The loop by a second route ---


def test_training_is_adam_on_the_contrastive_loss_without_weight_decay(
    data, tmp_path, monkeypatch
):
    make_comparable(monkeypatch.setattr)
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


def test_dropout_is_drawn_anew_in_every_step_and_for_every_seed(data, tmp_path, monkeypatch):
    draws = note_draws(monkeypatch.setattr)
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


def test_resuming_is_reported(data, run, monkeypatch, capsys):
    run_train(monkeypatch, data, run, "--max-steps", 4)
    assert "last.pt, after step 3 of 4\n" in capsys.readouterr().out


def test_resuming_cuts_the_validation_of_a_part_of_an_epoch_from_the_log(data, run, monkeypatch):
    run_train(monkeypatch, data, run, "--max-steps", 4)
    assert "validation" in log_of(run)[-1]
    run_train(monkeypatch, data, run)
    steps = [line["step"] for line in log_of(run) if "validation" in line]
    assert steps == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]


def test_scaled_gradients_make_the_same_steps(data, tmp_path, monkeypatch):
    make_comparable(monkeypatch.setattr)
    run_train(monkeypatch, data, tmp_path / "plain")
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    run_train(monkeypatch, data, tmp_path / "scaled")
    plain = last(tmp_path / "plain")["model"]
    for name, weights in last(tmp_path / "scaled")["model"].items():
        torch.testing.assert_close(weights, plain[name], rtol=0, atol=1e-7)


class Killed(BaseException):
    """The end of a run in the midst of things, in this process."""


@pytest.mark.parametrize(
    ("module", "interrupted"),
    [
        (train, "retrieval_metrics"),  # in the validation
        (train, "save_atomically"),  # before best.pt is written
        (training, "save_atomically"),  # after the validation, before last.pt is written
    ],
)
def test_a_run_killed_at_an_epochs_end_repeats_the_steps_since_last_pt(
    data, whole, tmp_path, monkeypatch, module, interrupted
):
    def kill(*arguments):
        raise Killed

    run_train(monkeypatch, data, tmp_path / "killed", "--max-steps", 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, interrupted, kill)
        run_train(patch, data, tmp_path / "killed")
    assert last(tmp_path / "killed")["training"]["step"] == 2
    run_train(monkeypatch, data, tmp_path / "killed")
    assert_same_run(whole.folder, tmp_path / "killed")


def test_last_pt_is_written_within_an_epoch_where_that_is_asked_for(data, tmp_path, monkeypatch):
    stage_1_loss = train.stage_1_loss
    steps = itertools.count(start=1)

    def kill_in_step_3(*arguments):
        if next(steps) == 3:
            raise Killed
        return stage_1_loss(*arguments)

    monkeypatch.setattr(train, "stage_1_loss", kill_in_step_3)
    with pytest.raises(Killed):
        run_train(monkeypatch, data, tmp_path / "run", "--save-every", 2)
    assert last(tmp_path / "run")["training"]["step"] == 2


def test_a_run_killed_in_its_first_save_begins_again(data, whole, tmp_path, monkeypatch):
    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "save_atomically", kill)
        run_train(patch, data, tmp_path / "run")
    assert best(tmp_path / "run")["epoch"] == 1
    run_train(monkeypatch, data, tmp_path / "run")
    assert_same_run(whole.folder, tmp_path / "run")


def signal_in_step(monkeypatch, number: int, signalled_step: int) -> None:
    """Have this process receive a signal while its n-th step from now is under way."""
    stage_1_loss = train.stage_1_loss
    steps = itertools.count(start=1)

    def loss_and_signal(*arguments):
        if next(steps) == signalled_step:
            os.kill(os.getpid(), number)
        return stage_1_loss(*arguments)

    monkeypatch.setattr(train, "stage_1_loss", loss_and_signal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_its_status(
    data, tmp_path, monkeypatch, number, status
):
    signal_in_step(monkeypatch, number, 2)
    assert run_train(monkeypatch, data, tmp_path / "run") == status
    assert last(tmp_path / "run")["training"]["step"] == 2


def test_a_signal_within_an_epoch_ends_the_run_without_a_validation(data, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, signal.SIGTERM, 2)
    run_train(monkeypatch, data, tmp_path / "run")
    assert not [line for line in log_of(tmp_path / "run") if "validation" in line]


def test_a_signal_is_answered_at_once_and_again_when_the_run_is_saved(
    data, run, monkeypatch, capfd
):
    signal_in_step(monkeypatch, signal.SIGINT, 1)
    run_train(monkeypatch, data, run)
    printed = capfd.readouterr()
    assert "SIGINT: the step, and at an epoch's end the validation, is finished" in printed.err
    assert "another Ctrl-C or SIGTERM ends the run now" in printed.err
    assert "SIGINT after step 4: saved in" in printed.out


def test_a_run_that_a_signal_ended_is_resumed_to_the_uninterrupted_one(
    data, whole, run, monkeypatch
):
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 1)
        run_train(patch, data, run)
    run_train(monkeypatch, data, run)
    assert_same_run(whole.folder, run)


def test_after_a_signal_a_second_one_ends_the_process(data, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, signal.SIGTERM, 1)
    run_train(monkeypatch, data, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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
    leads_its_group = []

    def compare_with_its_group(pid: int) -> None:
        leads_its_group.append(os.getpgid(pid) == pid)

    look_at_the_worker(monkeypatch, data, tmp_path / "run", compare_with_its_group)
    assert leads_its_group == [True]


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
    """Make a unit row for each clip number, (N, 64)."""
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


FIRST_EPOCH_OF_RANKED_RUN = {
    "mAP@10": 13 / 36, "mAP@16": 13 / 36, "R@1": 0, "R@5": 1, "R@10": 1
}


@pytest.fixture(scope="module")
def ranked_run(data, tmp_path_factory) -> Path:
    """Train two epochs: the first has the higher mAP@10, the second the higher mAP@16 and R@1."""
    folder = tmp_path_factory.mktemp("ranked") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_validation_ranks(patch, (2, 3, 4), (1, 12, 12))
        run_train(patch, data, folder)
    return folder


def test_the_log_holds_the_metrics_of_the_validation_split(ranked_run):
    first, second = [line["validation"] for line in log_of(ranked_run) if "validation" in line]
    assert first == pytest.approx(FIRST_EPOCH_OF_RANKED_RUN)
    thirds = dict.fromkeys(first, 1 / 3)
    assert second == pytest.approx(thirds | {"mAP@16": (1 + 2 / 12) / 3})


def test_the_best_epoch_has_the_highest_map_at_10_on_the_validation_split(ranked_run):
    assert best(ranked_run)["epoch"] == 1
    assert best(ranked_run)["validation"] == pytest.approx(FIRST_EPOCH_OF_RANKED_RUN)


def test_of_equal_epochs_the_later_is_best(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (1, 2, 2), (2, 2, 1))
    run_train(monkeypatch, data, tmp_path / "run")
    assert best(tmp_path / "run")["epoch"] == 2


def test_a_worse_epoch_after_resuming_does_not_replace_the_best(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (1, 1, 1), (2, 2, 2))
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH)
    run_train(monkeypatch, data, tmp_path / "run")
    assert best(tmp_path / "run")["epoch"] == 1


def test_best_pt_holds_the_weights_of_its_epoch(ranked_run, run_of_one_epoch):
    assert_same_weights(best(ranked_run)["model"], last(run_of_one_epoch)["model"])


def test_a_part_of_an_epoch_does_not_replace_the_best(data, tmp_path, monkeypatch):
    set_validation_ranks(monkeypatch, (2, 2, 2), (1, 1, 1))
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH)
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH + 1)
    assert best(tmp_path / "run")["epoch"] == 1


def test_a_part_of_an_epoch_is_best_until_a_whole_one_replaces_it_even_a_worse(
    data, tmp_path, monkeypatch
):
    set_validation_ranks(monkeypatch, (1, 1, 1), (2, 2, 2))
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 2)
    assert best(tmp_path / "run")["validation"]["R@1"] == 1
    run_train(monkeypatch, data, tmp_path / "run", "--max-steps", STEPS_PER_EPOCH)
    assert best(tmp_path / "run")["validation"]["R@1"] == 0


def test_a_run_that_max_steps_ended_says_its_own_figure_again(
    data, tmp_path, monkeypatch, capsys
):
    for _ in range(2):
        run_train(monkeypatch, data, tmp_path / "run", "--max-steps", 2)
        figure = 100 * best(tmp_path / "run")["validation"]["mAP@10"]
        assert f"Best validation mAP@10 {figure:.2f} %" in capsys.readouterr().out


# --- What stops a run, and what it keeps ---


def files_of(run: Path) -> dict[str, bytes]:
    """Read the names and the contents of a run's checkpoints, and of what else begins so."""
    return {path.name: path.read_bytes() for path in run.glob("*.pt*")}


def test_a_loss_that_is_not_finite_stops_the_run(data, run, monkeypatch):
    def loss_of_nan(audio, *rest):
        return {"loss": (audio * np.nan).sum()}

    before = files_of(run)
    monkeypatch.setattr(train, "stage_1_loss", loss_of_nan)
    message = "step 4: the loss is nan.*last.pt is as it was.*another --out"
    with pytest.raises(InputError, match=message):
        run_train(monkeypatch, data, run)
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("step", "options"),
    [(2 * STEPS_PER_EPOCH, []), (STEPS_PER_EPOCH + 1, ["--max-steps", STEPS_PER_EPOCH + 1])],
    ids=["at an epoch's end", "within an epoch"],
)
def test_weights_that_are_not_finite_are_not_saved(data, run, monkeypatch, step, options):
    steps = itertools.count(start=STEPS_PER_EPOCH + 1)

    def nan_gradient_in_one_step(audio, *rest):
        loss = (0 * audio).sum()
        if next(steps) == step:
            # The gradient of a root of zero is infinite, and times zero no number.
            loss = loss + (0 * audio).abs().sqrt().sum()
        return {"loss": loss}

    before = files_of(run)
    # Validation may not notice: all that is not finite may be rows of tokens that no caption has.
    set_validation_ranks(monkeypatch, (1, 1, 1))
    monkeypatch.setattr(train, "stage_1_loss", nan_gradient_in_one_step)
    message = f"step {step}: .*weights are not finite.*last.pt is as it was"
    with pytest.raises(InputError, match=message):
        run_train(monkeypatch, data, run, *options)
    assert files_of(run) == before


def test_a_full_disk_leaves_the_checkpoints_as_they_were(data, run, monkeypatch):
    def full(values, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    before = files_of(run)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left"):
        run_train(monkeypatch, data, run)
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-lr", 0.5, "max_lr: was 0.001, now 0.5"),
        ("--seed", 1, "seed: was 0, now 1"),
        ("--precision", "bf16", "precision: was fp32, now bf16"),
        ("--datasets", "audiocaps", "data: was .*clotho/development.*, now .*audiocaps/train"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    data, run, monkeypatch, option, value, message
):
    with pytest.raises(InputError, match=message):
        run_train(monkeypatch, data, run, option, value)


def test_a_setting_that_the_log_does_not_have_is_another_one(data, run, monkeypatch):
    log = run / "log.jsonl"
    log.write_text(log.read_text().replace('"seed": 0, ', "", 1))
    with pytest.raises(InputError, match="seed: was None, now 0"):
        run_train(monkeypatch, data, run)


def test_a_run_that_has_ended_goes_on_with_more_epochs(data, tmp_path, monkeypatch):
    run_train(monkeypatch, data, tmp_path / "run", "--epochs", 1)
    run_train(monkeypatch, data, tmp_path / "run", "--epochs", 2)
    assert last(tmp_path / "run")["training"]["step"] == 2 * STEPS_PER_EPOCH


def test_a_damaged_last_pt_is_one_line(data, run, monkeypatch):
    (run / "last.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="last.pt: is damaged, or an earlier version's; name"):
        run_train(monkeypatch, data, run)


def test_a_temporary_file_of_a_killed_write_is_replaced(data, run, monkeypatch):
    (run / ".last.pt.tmp").write_bytes(b"half")
    run_train(monkeypatch, data, run, "--max-steps", 4)
    assert not list(run.glob(".*"))
    assert last(run)["training"]["step"] == 4


def start_without_a_step(monkeypatch, data: Path, out: Path, *more) -> None:
    """Start a run that ends before its first step, since its sounds cannot be decoded."""

    def failing_decoder(splits, cache_dir) -> None:
        raise InputError("a sound is needed")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="a sound is needed"):
        patch.setattr(train, "decode_splits", failing_decoder)
        run_train(patch, data, out, *more)


def test_a_run_without_a_step_may_begin_again_with_other_settings(data, tmp_path, monkeypatch):
    start_without_a_step(monkeypatch, data, tmp_path / "run")
    start_without_a_step(monkeypatch, data, tmp_path / "run", "--max-lr", 0.5)
    (first_line,) = whole_log_of(tmp_path / "run")
    assert first_line["settings"]["max_lr"] == 0.5


def test_beginning_again_with_other_settings_removes_the_teachers_embeddings(
    data, tmp_path, monkeypatch
):
    start_without_a_step(monkeypatch, data, tmp_path / "run")
    embeddings = tmp_path / "run" / "teacher-0.pt"  # They may be of other data.
    embeddings.write_bytes(b"")
    start_without_a_step(monkeypatch, data, tmp_path / "run")
    assert embeddings.exists()
    start_without_a_step(monkeypatch, data, tmp_path / "run", "--max-lr", 0.5)
    assert not embeddings.exists()


@pytest.mark.parametrize("options", [[], ["--max-lr", 0.5]])
def test_a_trained_model_without_last_pt_is_not_overwritten(
    data, whole, tmp_path, monkeypatch, options
):
    run = shutil.copytree(whole.folder, tmp_path / "run")
    (run / "last.pt").unlink()
    before = files_of(run)
    with pytest.raises(InputError, match="holds a trained best.pt, but no last.pt"):
        run_train(monkeypatch, data, run, *options)
    assert files_of(run) == before


def test_a_second_process_in_the_folder_is_refused(data, run, monkeypatch):
    with open(run / "log.jsonl") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="run: another process trains here"):
            run_train(monkeypatch, data, run)


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("--batch-size", "0"), ("--captions-per-clip", "0"), ("--micro-batch", "-1"),
        ("--workers", "-1"), ("--epochs", "0"), ("--max-steps", "0"), ("--max-lr", "-1e-5"),
        ("--max-lr", "nan"), ("--max-lr", "inf"), ("--min-lr", "-1"), ("--warmup-epochs", "-1"),
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
    assert fresh.RANK == 0
    assert fresh.WORLD == 1


# --- What a run writes and says ---


def test_the_logs_first_line_has_the_settings(whole):
    settings = whole_log_of(whole.folder)[0]["settings"]
    assert settings["batch_size"] == 4
    assert settings["datasets"] == ["clotho"]


def test_the_logs_first_line_has_the_versions(whole):
    versions = whole_log_of(whole.folder)[0]["versions"]
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["python"] == sys.version.split()[0]


def test_the_log_has_the_learning_rate_of_each_step(whole):
    rates = [line["lr"] for line in log_of(whole.folder) if "lr" in line]
    expected = [learning_rate(step, STEPS_PER_EPOCH, 1, 15, 1e-3, 1e-6) for step in range(6)]
    assert rates == expected


def test_the_log_has_a_validation_of_each_epoch(whole):
    epochs = [line["epoch"] for line in log_of(whole.folder) if "validation" in line]
    assert epochs == [1, 2]


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epochs_loss_in_the_log_is_the_mean_of_its_steps(whole, epoch):
    lines = [line for line in log_of(whole.folder) if line["epoch"] == epoch]
    steps = [line["loss"] for line in lines if "lr" in line]
    (mean,) = [line["loss"] for line in lines if "validation" in line]
    assert len(steps) == STEPS_PER_EPOCH
    assert mean == pytest.approx(np.mean(steps), abs=1e-9)


def test_an_intervals_loss_in_the_log_is_the_mean_of_its_last_steps(
    data, whole, tmp_path, monkeypatch
):
    losses = {line["step"]: line["loss"] for line in log_of(whole.folder) if "lr" in line}
    run_train(monkeypatch, data, tmp_path / "run", "--log-every", 2)
    means = {line["step"]: line["loss"] for line in log_of(tmp_path / "run") if "lr" in line}
    # Intervals begin anew with each epoch, and the last one ends with it.
    assert list(means) == [2, 3, 5, 6]
    for step, mean in means.items():
        assert mean == pytest.approx((losses[step - 1] + losses[step]) / 2, abs=1e-9)


def test_lines_of_the_log_have_the_time(whole):
    lines = whole_log_of(whole.folder)[1:]
    times = [datetime.datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    assert times[0] >= whole.began
    assert times[-1] <= whole.ended


def test_the_log_has_the_pairs_per_second(data, run, monkeypatch):
    # Each look at this clock is a second after the one before, so a step of four pairs takes one.
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(training, "time", clock)
    run_train(monkeypatch, data, run)
    lines = whole_log_of(run)[1:]
    speeds = [line["pairs_per_second"] for line in lines if "lr" in line]
    assert speeds[STEPS_PER_EPOCH:] == [4.0, 4.0, 4.0]


def test_losses_are_not_read_before_they_are_logged(data, tmp_path, monkeypatch):
    # To read them in each step would make a GPU wait.
    stage_1_loss = train.stage_1_loss
    item = torch.Tensor.item
    steps = []
    steps_of_reads = set()

    def loss_and_note(*arguments):
        steps.append(len(steps) + 1)
        return stage_1_loss(*arguments)

    def item_and_note(tensor):
        if tensor.is_floating_point():
            steps_of_reads.add(len(steps))
        return item(tensor)

    monkeypatch.setattr(train, "stage_1_loss", loss_and_note)
    monkeypatch.setattr(torch.Tensor, "item", item_and_note)
    run_train(monkeypatch, data, tmp_path / "run", "--log-every", 2)
    before_the_first_step = 0
    assert steps_of_reads - {before_the_first_step} == {2, 3, 5, 6}


def test_a_run_draws_its_curves(whole):
    assert (whole.folder / "curves.svg").exists()


def test_decoded_sounds_are_kept_in_the_folder_given(whole):
    decoded = list(whole.folder.with_name("sounds").glob("*.npy"))
    assert len(decoded) == len(TRAINING_CLIPS) + len(VALIDATION_CLIPS)


def test_the_next_command_finds_the_data(data, whole):
    expected = (
        f"Next: python evaluate.py --checkpoint {whole.folder}/best.pt --data-dir {data} "
        f"--cache-dir {whole.folder.with_name('sounds')}\n"
    )
    assert whole.printed.endswith(expected)


def test_the_next_command_evaluates_what_was_held_out_of_a_folder(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "mine", clips=6)
    more = ["--datasets", folder, "--max-steps", 1]
    run_train(monkeypatch, tmp_path, tmp_path / "run", *more)
    assert capsys.readouterr().out.endswith(f" --dataset {folder} --split val\n")


# --- Stage 2 ---

TAU = 0.05
BOTH = ["--datasets", "audiocaps", "clotho"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[Path]:
    """Write two teachers with different random weights."""
    folder = tmp_path_factory.mktemp("teachers")
    captions = [f"sound {clip} once again heard" for clip in range(23)]
    paths = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        model = DualEncoder.create("tiny", "random", captions)
        model.trained_on = ["clotho/development"]
        path = folder / f"teacher{seed}.pt"
        torch.save(model.checkpoint(), path)
        paths.append(path)
    return paths


def copy_trained_on(teacher: Path, folder: Path, *trained_on: str) -> Path:
    """Copy a teacher as if it had been trained on other splits."""
    saved = torch.load(teacher, weights_only=True)
    torch.save(saved | {"trained_on": list(trained_on)}, folder / teacher.name)
    return folder / teacher.name


def stop_before_the_loop(monkeypatch) -> SimpleNamespace:
    """Have distill.py hand its loop's arguments to what this returns, and end."""
    given = SimpleNamespace()

    def loop(args, run, model, batches, validation, loss_fn) -> int:
        given.run = run
        given.model = model
        given.batches = batches
        given.validation = validation
        given.loss_fn = loss_fn
        run.close()
        return 0

    monkeypatch.setattr(distill, "train", loop)
    return given


def run_distill(monkeypatch, data: Path, out: Path, teachers: list[Path], *more) -> int:
    arguments = ["--teachers", *map(str, teachers), *options(data, out, *more)]
    return run_script(monkeypatch, distill, arguments)


def cross_entropy_by_hand(cosines: torch.Tensor, teacher_cosines: torch.Tensor) -> float:
    """Compute H(p^, q) over rows and over columns, in plain loops over (B, B) cosines."""
    total = 0.0
    for teacher_rows, rows in ((teacher_cosines, cosines), (teacher_cosines.T, cosines.T)):
        for teacher_row, row in zip(teacher_rows, rows, strict=True):
            target = (teacher_row / TAU).softmax(dim=0)
            total -= float((target * (row / TAU).log_softmax(dim=0)).sum())
    return total / len(cosines) / 2


@pytest.fixture(scope="module")
def given(data, teachers, tmp_path_factory) -> SimpleNamespace:
    """Return what distill.py hands to its loop, after the teachers have embedded Clotho."""
    with pytest.MonkeyPatch.context() as patch:
        given = stop_before_the_loop(patch)
        run_distill(patch, data, tmp_path_factory.mktemp("stage_2") / "run", teachers)
    return given


def test_the_student_starts_from_its_first_teacher(given, teachers):
    assert_same_weights(given.model.state_dict(), DualEncoder.load(teachers[0]).state_dict())


def test_the_student_is_of_stage_2(given):
    assert given.model.stage == "distilled"


def test_the_teachers_embeddings_are_their_own(given, teachers):
    student = given.model.eval()
    batch = given.batches[0]
    with torch.no_grad():
        audio, text = student.encode_pairs(batch)
        losses = given.loss_fn(audio, text, batch.clip_ids, batch.pair_ids, student.tau)
        cosines = []
        for path in teachers:
            teacher_audio, teacher_text = DualEncoder.load(path).encode_pairs(batch)
            cosines.append(teacher_audio @ teacher_text.T)
    by_hand = cross_entropy_by_hand(audio @ text.T, torch.stack(cosines).mean(dim=0))
    assert losses["distillation"].item() == pytest.approx(by_hand, abs=1e-4)


# --- The final loss, with teachers whose embeddings are known ---


def drawn_embedding(model: DualEncoder, item: int) -> torch.Tensor:
    """Draw a unit row (8,) that follows from the teacher and the number of a clip or caption."""
    teacher = round(1e6 * abs(model.audio_projection.weight[0, 0].item()))
    generator = np.random.default_rng([teacher, item])
    row = torch.from_numpy(generator.standard_normal(8)).float()
    return F.normalize(row, dim=0)


def number_of_caption(caption: str) -> int:
    word = ["once", "again", "heard"].index(caption.split()[-1])
    return 1_000 + 10 * clip_of_caption(caption) + word


def drawn_embed_audio(model: DualEncoder, sounds, rate=32_000) -> torch.Tensor:
    return torch.stack([drawn_embedding(model, clip_of_sound(sound)) for sound in sounds])


def drawn_embed_text(model: DualEncoder, captions) -> torch.Tensor:
    rows = [drawn_embedding(model, number_of_caption(caption)) for caption in captions]
    return torch.stack(rows)


class FinalLoss(NamedTuple):
    """The losses of a batch of both data sets: distill.py's, and those by a second route."""

    losses: dict[str, float]
    contrastive: float
    distillation: float


@pytest.fixture(scope="module")
def final_loss(data, teachers, tmp_path_factory) -> FinalLoss:
    weights = ["--contrastive-weight", 0.5, "--distillation-weight", 2]
    with pytest.MonkeyPatch.context() as patch:
        given = stop_before_the_loop(patch)
        patch.setattr(DualEncoder, "embed_audio", drawn_embed_audio)
        patch.setattr(DualEncoder, "embed_text", drawn_embed_text)
        folder = tmp_path_factory.mktemp("final_loss") / "run"
        run_distill(patch, data, folder, teachers, *BOTH, *weights, "--batch-size", 12)
    batch = given.batches[0]
    student = given.model.eval()
    with torch.no_grad():
        audio, text = student.encode_pairs(batch)
        losses = given.loss_fn(audio, text, batch.clip_ids, batch.pair_ids, student.tau)

    # In the second route, pairs are known by their sounds and tokens, not by their ids.
    segments, _, clip_rows, tokens = batch.inputs(torch.device("cpu"))
    sounds = [segments[row] for row in clip_rows]
    captions = [student.tokenizer.decode(row.tolist()).strip() for row in tokens]
    assert {caption.split()[-1] for caption in captions} == {"once", "again", "heard"}
    cosines = []
    for path in teachers:
        teacher = DualEncoder.load(path)
        cosines.append(drawn_embed_audio(teacher, sounds) @ drawn_embed_text(teacher, captions).T)
    clips = torch.tensor([clip_of_sound(sound) for sound in sounds])
    return FinalLoss(
        losses={name: loss.item() for name, loss in losses.items()},
        contrastive=contrastive_loss(audio, text, clips, TAU).item(),
        distillation=cross_entropy_by_hand(audio @ text.T, torch.stack(cosines).mean(dim=0)),
    )


def test_the_teachers_rows_are_those_of_the_batchs_sounds_and_captions(final_loss):
    assert final_loss.losses["distillation"] == pytest.approx(final_loss.distillation, abs=1e-5)


def test_pairs_of_one_sound_are_positives_of_each_other_in_stage_2(final_loss):
    assert final_loss.losses["contrastive"] == pytest.approx(final_loss.contrastive, abs=1e-5)


def test_the_final_loss_is_the_weighted_sum_of_both(final_loss):
    total = 0.5 * final_loss.contrastive + 2 * final_loss.distillation
    assert final_loss.losses["loss"] == pytest.approx(total, abs=1e-5)


# --- Teachers and students ---


def test_the_student_starts_from_another_checkpoint_where_one_is_named(
    data, tmp_path, monkeypatch, teachers
):
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers, "--init", teachers[1])
    assert_same_weights(given.model.state_dict(), DualEncoder.load(teachers[1]).state_dict())


def test_clothos_validation_split_chooses_the_best_student(given):
    assert given.validation.name == "clotho/validation"


def test_students_and_teachers_compute_in_the_precision_given(
    data, tmp_path, monkeypatch, teachers
):
    precisions = []
    embed_text = DualEncoder.embed_text

    def embed_and_note(self, captions):
        precisions.append(self.precision)
        return embed_text(self, captions)

    monkeypatch.setattr(DualEncoder, "embed_text", embed_and_note)
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers, "--precision", "bf16")
    assert precisions == [torch.bfloat16, torch.bfloat16]
    assert given.model.precision == torch.bfloat16


def test_teachers_embed_the_training_set_once(data, tmp_path, monkeypatch, teachers):
    stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)

    def embed_again(self, sounds, rate=32_000):
        raise AssertionError("a teacher embeds the training set again")

    monkeypatch.setattr(DualEncoder, "embed_audio", embed_again)
    run_distill(monkeypatch, data, tmp_path / "run", teachers)


def test_the_student_has_seen_what_its_start_and_its_teachers_have(
    data, tmp_path, monkeypatch, teachers
):
    copies = []
    for i, split in enumerate(["mine@1/all", "audiocaps/train", "wavcaps/train"]):
        folder = tmp_path / str(i)
        folder.mkdir()
        copies.append(copy_trained_on(teachers[0], folder, split))
    start, *others = copies
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", others, "--init", start)
    assert given.model.trained_on == [
        "audiocaps/train", "clotho/development", "mine@1/all", "wavcaps/train"
    ]


def test_other_teachers_are_refused_by_name(data, tmp_path, monkeypatch, teachers):
    run_distill(monkeypatch, data, tmp_path / "run", teachers, "--max-steps", 1)
    with pytest.raises(InputError, match="teachers: was .*teacher3.pt.*, now .*teacher4.pt"):
        run_distill(monkeypatch, data, tmp_path / "run", teachers[::-1])


def test_teachers_may_move(data, tmp_path, monkeypatch, teachers):
    run_distill(monkeypatch, data, tmp_path / "run", teachers, "--max-steps", 1)
    moved = shutil.copy(teachers[0], tmp_path / "moved.pt")
    run_distill(monkeypatch, data, tmp_path / "run", [moved, teachers[1]], "--max-steps", 2)
    assert last(tmp_path / "run")["training"]["step"] == 2


@pytest.mark.parametrize(
    ("trained_on", "folder"),
    [
        (["clotho/development"], "distilled-clotho-from-clotho-tiny-seed0"),
        (
            ["audiocaps/val", "clotho/development"],
            "distilled-clotho-from-audiocaps-clotho-tiny-seed0",
        ),
    ],
)
def test_a_students_folder_is_named_by_what_its_teachers_have_seen(
    data, tmp_path, monkeypatch, teachers, trained_on, folder
):
    monkeypatch.chdir(tmp_path)
    given = stop_before_the_loop(monkeypatch)
    other = copy_trained_on(teachers[1], tmp_path, *trained_on)
    arguments = ["--teachers", str(teachers[0]), str(other), "--data-dir", str(data)]
    run_script(monkeypatch, distill, [*arguments, "--batch-size", "4", "--device", "cpu"])
    assert given.run.folder == Path("runs", folder)


def test_published_checkpoints_can_teach(data, tmp_path, monkeypatch, teachers):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fetched = checkpoints.PUBLISHED["salsa"].path()
    fetched.parent.mkdir(parents=True)
    shutil.copy(teachers[0], fetched)
    given = stop_before_the_loop(monkeypatch)
    run_distill(monkeypatch, data, tmp_path / "run", ["salsa"])
    assert_same_weights(given.model.state_dict(), DualEncoder.load(fetched).state_dict())


def test_stage_2_trains_on_clotho_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teachers", "a.pt"])
    assert distill.parse_arguments().datasets == ["clotho"]


def test_both_losses_have_the_same_weight_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teachers", "a.pt"])
    args = distill.parse_arguments()
    assert args.contrastive_weight == 1
    assert args.distillation_weight == 1
