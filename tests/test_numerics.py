"""Degenerate sounds and batches give finite vectors, losses and gradients."""

import itertools

import numpy as np
import pytest
import torch

import train
from dualenc import InputError
from dualenc.config import TAU_BOUNDS
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.metrics import ranks, retrieval_metrics

SECOND = 32_000


def click():
    waveform = np.zeros(SECOND, np.float32)
    waveform[SECOND // 2] = 1
    return waveform


SOUNDS = {
    "silence": np.zeros(SECOND, np.float32),
    "a constant": np.full(SECOND, 0.5, np.float32),
    "full-scale clipping": np.sign(np.sin(np.arange(SECOND, dtype=np.float32))),
    "a click": click(),
    "one sample": np.ones(1, np.float32),
    "the smallest number": np.full(SECOND, 1e-45, np.float32),
    "far beyond full scale": np.full(SECOND, 999.0, np.float32),
    "int16 at its lower end": np.full(SECOND, -32_768, np.int16),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_embed_to_finite_unit_vectors(tiny, name):
    embedding = tiny.embed_audio([SOUNDS[name]])
    assert embedding.isfinite().all() and abs(embedding.norm() - 1) < 1e-5


@pytest.mark.parametrize("caption", ["", "...", "🐕", "\0", "a" * 100_000, "word " * 10_000])
def test_sentences_embed_to_finite_unit_vectors(tiny, caption):
    embedding = tiny.embed_text([caption])
    assert embedding.isfinite().all() and abs(embedding.norm() - 1) < 1e-5


def unit_rows(n, seed):
    rows = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


BATCHES = {
    "one pair": (unit_rows(1, 0), unit_rows(1, 1), torch.zeros(1, dtype=torch.int64)),
    "one clip's five captions": (
        unit_rows(1, 0).expand(5, 8), unit_rows(5, 1), torch.zeros(5, dtype=torch.int64)
    ),
    "all clips equal": (unit_rows(1, 0).expand(6, 8), unit_rows(6, 1), torch.arange(6)),
    "all embeddings equal": (unit_rows(1, 0).expand(6, 8),) * 2 + (torch.arange(6),),
    "all pairs opposite": (unit_rows(6, 0), -unit_rows(6, 0), torch.arange(6)),
}


@pytest.mark.parametrize(("name", "tau"), list(itertools.product(BATCHES, TAU_BOUNDS)))
def test_batches_give_finite_losses_and_gradients(name, tau):
    audio, text, clip_ids = BATCHES[name]
    audio, text = (side.clone().requires_grad_() for side in (audio, text))
    tau = torch.tensor(tau, requires_grad=True)
    teachers = [unit_rows(len(audio), 2)], [unit_rows(len(audio), 3)]
    for loss in (
        contrastive_loss(audio, text, clip_ids, tau),
        distillation_loss(audio, text, *teachers, tau),
    ):
        gradients = torch.autograd.grad(loss, (audio, text, tau))
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_a_sound_embeds_the_same_whatever_it_is_batched_with(tiny, noise):
    alone = torch.cat([tiny.embed_audio([waveform]) for waveform in noise])
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, len(noise)):
        order = rng.permutation(len(noise))[:size]
        together = tiny.embed_audio([noise[i] for i in order])
        assert (together - alone[order]).abs().max() < 1e-5


def test_a_sentence_embeds_the_same_whatever_it_is_batched_with(tiny):
    captions = ["a dog " * n for n in (1, 2, 5, 11, 40)] + ["", "Rain.", "🐕"] * 30
    alone = torch.cat([tiny.embed_text([caption]) for caption in captions])
    rng = np.random.default_rng(0)
    for size in (2, 3, 17, len(captions)):
        order = rng.permutation(len(captions))[:size]
        together = tiny.embed_text([captions[i] for i in order])
        assert (together - alone[order]).abs().max() < 1e-5


def test_embeddings_that_are_not_finite_are_not_ranked():
    good, bad = unit_rows(4, 0), unit_rows(4, 1)
    bad[2, 3] = torch.nan
    for text, audio in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match="diverged"):
            ranks(text, audio, [[i] for i in range(4)])
        with pytest.raises(InputError, match="diverged"):
            retrieval_metrics(text, audio, [[i] for i in range(4)])


TINY = ["--preset", "tiny", "--batch-size", 16, "--workers", 0]


@pytest.mark.parametrize("bound", TAU_BOUNDS)
def test_a_learnt_temperature_is_held_at_its_bounds_and_says_so_once(
    command, tmp_path, monkeypatch, bound
):
    def pulling(audio, text, clip_ids, pair_ids, tau):  # to one side, without end
        return {"loss": tau * (1 if bound == min(TAU_BOUNDS) else -1) + 0 * audio.sum()}

    monkeypatch.setattr(train, "loss_of", pulling)
    options = ["--learn-tau", "--tau", bound, "--epochs", 2, "--log-every", 1, "--out", "run"]
    status, printed = command(train, *TINY, *options)
    assert status == 0 and printed.count(f"tau has reached its bound {bound:g}") == 1
    state = torch.load("run/last.pt", weights_only=True)
    assert state["model"]["tau"].item() == pytest.approx(bound)


def test_weights_that_diverge_replace_no_checkpoint(command, monkeypatch):
    """The loss of the last step is finite; the weights that it leaves are not."""
    command(train, *TINY, "--epochs", 1, "--out", "run")
    before = [open(f"run/{name}", "rb").read() for name in ("best.pt", "last.pt")]
    original = train.loss_of

    def exploding(*arguments):
        loss = original(*arguments)["loss"]
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return {"loss": loss}

    monkeypatch.setattr(train, "loss_of", exploding)
    status, printed = command(
        train, *TINY, "--epochs", 2, "--out", "run", "--checkpoint-every", 1
    )
    assert status == 2 and "Traceback" not in printed
    assert "step 4: it left weights that are not finite numbers" in printed
    assert [open(f"run/{name}", "rb").read() for name in ("best.pt", "last.pt")] == before


def test_a_divergence_that_validation_finds_names_the_step_and_what_may_help(command, monkeypatch):
    def diverged(model):
        raise InputError("embeddings are not finite numbers")

    monkeypatch.setattr(train, "validation", lambda *_: diverged)
    status, printed = command(train, *TINY, "--epochs", 1, "--out", "run")
    assert status == 2 and printed.splitlines()[-1] == (
        "train.py: epoch 1, after step 4: embeddings are not finite numbers; a lower --max-lr or "
        "--precision fp32 may help"
    )
