"""The loop: its gradient by a second route, resumption, interruptions, stage 2's loss by hand."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder

import distill
import train
from dualenc import DualEncoder
from dualenc.data import PairBatches, decode_splits, read_split
from dualenc.errors import InputError
from dualenc.losses import contrastive_loss
from dualenc.training import learning_rate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sounds"), clips=12)


def command(sounds, out, *more) -> list[str]:
    return ["--datasets", str(sounds), "--cache-dir", str(sounds / "cache"), "--out", str(out),
            "--preset", "tiny", "--batch-size", "4", "--epochs", "2", "--workers", "0",
            "--log-every", "1", "--device", "cpu", *map(str, more)]


def run_train(monkeypatch, arguments, main=train.main) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return main()


def state(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def same(a: Path, b: Path) -> bool:
    """Whether two runs left the same weights, moments and log, to the last bit."""
    one, two = state(a), state(b)
    weights = all(torch.equal(one["model"][n], two["model"][n]) for n in one["model"])
    moments = zip(*(s["training"]["optimizer"]["state"].values() for s in (one, two)), strict=True)
    equal = all(torch.equal(x[k], y[k]) for x, y in moments for k in x)
    logs = [(run / "log.jsonl").read_text().splitlines()[1:] for run in (a, b)]
    return weights and equal and logs[0] == logs[1]


# --- The gradient of one step ---


def gradients(model, batch, encode) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(7)
    contrastive_loss(*encode(), batch.clip_ids, model.tau).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_pieces_have_the_gradient_of_one_graph_and_of_the_whole_batch(sounds, tmp_path):
    split = read_split(str(sounds), "all", tmp_path)
    decode_splits([split], sounds / "cache")
    model = DualEncoder.create("tiny", "random", split.captions)
    batch = PairBatches([split], model.tokenizer, 8, captions_per_clip=2)[0]

    def pieces_in_one_graph():
        parts = []
        for segments, counts, rows, tokens in (p.inputs(model.device) for p in batch.pieces(3)):
            parts.append((model.encode_audio(segments, counts)[rows], model.encode_text(tokens)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    model.train()  # dropout, patchout and jitter are replayed
    pieces = gradients(model, batch, lambda: model.encode_pairs(batch, 3))
    assert torch.equal(pieces, gradients(model, batch, pieces_in_one_graph))
    model.eval()
    pieces = gradients(model, batch, lambda: model.encode_pairs(batch, 3))
    whole = gradients(model, batch, lambda: model.encode_pairs(batch))
    assert (pieces - whole).abs().max() < 1e-6 < 1e-4 < whole.abs().max()


def test_a_clip_encoded_once_is_the_clip_encoded_for_each_caption(sounds, tmp_path):
    split = read_split(str(sounds), "all", tmp_path)
    decode_splits([split], sounds / "cache")
    model = DualEncoder.create("tiny", "random", split.captions).eval()
    batch = PairBatches([split], model.tokenizer, 8, captions_per_clip=2)[0]
    assert len(batch.counts) == 4
    audio, text = model.encode_pairs(batch)
    names = [split.clip_of_caption[pair] for pair in batch.pair_ids.tolist()]
    alone = model.embed_audio([split.clips[clip].path for clip in names])
    torch.testing.assert_close(audio, alone, rtol=0, atol=1e-5)
    words = model.embed_text([split.captions[pair] for pair in batch.pair_ids.tolist()])
    torch.testing.assert_close(text, words, rtol=0, atol=1e-5)


# --- Resuming ---


def test_a_resumed_run_is_the_uninterrupted_one(sounds, tmp_path, monkeypatch):
    run_train(monkeypatch, command(sounds, tmp_path / "whole"))
    for steps in (1, 3, 6):  # within an epoch, at its end (3 steps), within the next
        run_train(monkeypatch, command(sounds, tmp_path / "parts", "--max-steps", steps))
    run_train(monkeypatch, command(sounds, tmp_path / "parts", "--micro-batch", 4))
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_goes_on_as_if_nothing_had_been(sounds, tmp_path):
    def start(name: str) -> subprocess.Popen:
        arguments = command(sounds, tmp_path / name, "--save-every", 1)
        return subprocess.Popen([sys.executable, ROOT / "train.py", *arguments],
                                env=os.environ | {"OMP_NUM_THREADS": "1"},
                                stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    whole, log = start("whole"), tmp_path / "killed" / "log.jsonl"
    for lines in (2, 4):  # it is killed once its log has so many, wherever it then is
        process = start("killed")
        while process.poll() is None and not (log.exists() and len(log.open().readlines()) > lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0 == whole.wait()
    assert same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_run_after_the_step(
    sounds, tmp_path, monkeypatch, capsys, number, status
):
    def loss_of(*arguments):
        os.kill(os.getpid(), number)
        [worker] = multiprocessing.active_children()
        assert os.getpgid(worker.pid) == worker.pid  # out of reach of a signal to the whole group
        return original(*arguments)

    original = train.contrastive
    run_train(monkeypatch, command(sounds, tmp_path / "whole"))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "contrastive", loss_of)
    try:
        ended = command(sounds, tmp_path / "ended", "--workers", 1)
        assert run_train(monkeypatch, ended) == status
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert f"{number.name} after step 1: saved in" in capsys.readouterr().out
    assert state(tmp_path / "ended")["training"]["step"] == 1
    monkeypatch.setattr(train, "contrastive", original)
    run_train(monkeypatch, command(sounds, tmp_path / "ended"))
    assert same(tmp_path / "whole", tmp_path / "ended")


# --- What stops a run, and what it keeps ---


def test_a_loss_that_is_not_finite_stops_the_run(sounds, tmp_path, monkeypatch):
    run_train(monkeypatch, command(sounds, tmp_path / "run", "--max-steps", 3))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(train, "contrastive", lambda a, t, *rest: {"loss": (a * np.nan).sum()})
    with pytest.raises(InputError, match="step 4: the loss is nan.*last.pt is as it was"):
        run_train(monkeypatch, command(sounds, tmp_path / "run"))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_full_disk_leaves_last_pt_as_it_was(sounds, tmp_path, monkeypatch):
    def full(values, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    run_train(monkeypatch, command(sounds, tmp_path / "run", "--max-steps", 3))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(torch, "save", full)
        run_train(patch, command(sounds, tmp_path / "run"))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp")) + list((tmp_path / "run").glob(".*.tmp"))


def test_other_settings_are_refused_with_both_values(sounds, tmp_path, monkeypatch):
    run_train(monkeypatch, command(sounds, tmp_path / "run", "--max-steps", 1))
    with pytest.raises(InputError, match="max_lr: was 0.001, now 0.5"):
        run_train(monkeypatch, command(sounds, tmp_path / "run", "--max-lr", 0.5))


def test_of_equal_epochs_the_later_is_best(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "retrieval_metrics", lambda *arguments: {"mAP@10": 0.5})
    run_train(monkeypatch, command(sounds, tmp_path / "run"))
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"] == 2


def test_the_log_holds_the_schedule(sounds, tmp_path, monkeypatch):
    run_train(monkeypatch, command(sounds, tmp_path / "run"))
    lines = list(map(json.loads, (tmp_path / "run" / "log.jsonl").open()))
    rates = [line["lr"] for line in lines[1:] if "lr" in line]
    # 6 of 12 clips are trained on, two captions each: 3 steps an epoch
    assert rates == [learning_rate(step, 3, 1, 15, 1e-3, 1e-6) for step in range(6)]
    assert [line["epoch"] for line in lines if "validation" in line] == [1, 2]
    assert (tmp_path / "run" / "curves.svg").exists()


# --- Stage 2 ---


def test_the_student_starts_from_its_first_teacher_and_learns_from_both_losses(
    sounds, tmp_path, monkeypatch
):
    for seed in (0, 1):
        run_train(monkeypatch, command(sounds, tmp_path / str(seed), "--seed", seed))
    teachers = [DualEncoder.load(tmp_path / str(seed)) for seed in (0, 1)]
    arguments = command(sounds, tmp_path / "student", "--distillation-weight", 0.5)
    at = arguments.index("--preset")
    del arguments[at : at + 2]
    given = ["--teachers", str(tmp_path / "0"), str(tmp_path / "1"), "--min-lr", "0"]
    seen = {}

    def loop(args, this, model, batches, held_out, loss_of) -> int:
        seen.update(model=model, batch=batches[0], loss_of=loss_of, folder=this.folder)
        return 0

    monkeypatch.setattr(distill, "train", loop)
    run_train(monkeypatch, given + arguments, distill.main)
    student, batch = seen["model"].eval(), seen["batch"]
    assert all(torch.equal(a, b) for a, b in
               zip(student.parameters(), teachers[0].parameters(), strict=True))
    assert student.stage == "distilled" and len(list(seen["folder"].glob("teacher-*.pt"))) == 2

    with torch.no_grad():
        audio, text = student.encode_pairs(batch)
        losses = seen["loss_of"](audio, text, batch.clip_ids, batch.pair_ids, student.tau)
        cosines = torch.stack([torch.mm(a, t.T) for a, t in
                               (teacher.encode_pairs(batch) for teacher in teachers)]).mean(0)
    p, q = cosines / 0.05, audio @ text.T / 0.05
    by_hand = -sum((p.softmax(d) * q.log_softmax(d)).sum(d).mean() for d in (0, 1)) / 2
    assert losses["distillation"].item() == pytest.approx(by_hand.item(), abs=1e-4)
    contrastive = contrastive_loss(audio, text, batch.clip_ids, 0.05).item()
    total = contrastive + 0.5 * losses["distillation"].item()
    assert losses["loss"].item() == pytest.approx(total, abs=1e-5)


def test_stage_2_trains_on_clotho_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teachers", "a.pt"])
    assert distill.parse_arguments().datasets == ["clotho"]
