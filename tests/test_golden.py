"""Losses, metrics and learning rate: the original authors' numbers, cases by hand, definitions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, pad

from dualenc import metrics
from dualenc.errors import InputError
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.metrics import bootstrap, interval, query_metrics, ranks, retrieval_metrics
from dualenc.training import learning_rate

GOLDEN = Path(__file__).parent / "golden"


def unit_rows(n: int, width: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- Losses ---


@pytest.mark.parametrize("name", ["contrastive_1", "contrastive_2", "distill_1"])
def test_losses_and_gradients_equal_the_original_code(name):
    golden = {key: torch.tensor(v) for key, v in np.load(GOLDEN / f"{name}.npz").items()}
    audio, text = golden["audio"].requires_grad_(), golden["text"].requires_grad_()
    if name == "distill_1":
        teachers = golden["teacher_audio"], golden["teacher_text"]
        loss = distillation_loss(audio, text, *teachers, golden["tau"])
    else:
        loss = contrastive_loss(audio, text, golden["clip_ids"], golden["tau"])
    loss.backward()
    for found, key in ((loss, "loss"), (audio.grad, "grad_audio"), (text.grad, "grad_text")):
        torch.testing.assert_close(found, golden[key].float(), rtol=0, atol=1e-6)


def test_contrastive_loss_by_hand():
    # Two pairs of two clips, cosines [[1, 0], [0, 1]], tau = 1: each softmax is e / (e + 1).
    own, other = math.log(math.e / (math.e + 1)), math.log(1 / (math.e + 1))
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 1.0)
    assert loss.item() == pytest.approx(-own)
    # One clip in both pairs: all four cells count.
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor([7, 7]), 1.0)
    assert loss.item() == pytest.approx(-(own + other) / 2)


def test_distillation_from_oneself_is_the_entropy_with_no_gradient():
    audio, text = unit_rows(6, 8, 0).requires_grad_(), unit_rows(6, 8, 1)
    loss = distillation_loss(audio, text, audio.detach()[None], text[None], 0.1)
    loss.backward()
    logits = (audio @ text.T / 0.1).detach()
    both = (torch.distributions.Categorical(logits=each).entropy() for each in (logits, logits.T))
    assert loss.item() == pytest.approx(sum(e.mean().item() for e in both) / 2, abs=1e-6)
    assert audio.grad.abs().max() < 1e-6


def test_teachers_may_differ_in_width():
    audio, text = unit_rows(3, 8, 0), unit_rows(3, 8, 1)
    teachers = [torch.eye(3), unit_rows(3, 5, 2)], [unit_rows(3, 3, 3), unit_rows(3, 5, 4)]
    padded = (torch.stack([pad(each, (0, 9 - each.shape[1])) for each in s]) for s in teachers)
    one, other = (distillation_loss(audio, text, *t, 0.1) for t in (teachers, padded))
    assert one.item() == pytest.approx(other.item(), abs=1e-6)


# --- Learning rate ---


def test_the_learning_rate_of_every_step_equals_the_original_code():
    golden = json.loads((GOLDEN / "lr_schedule.json").read_text())
    names = ("steps_per_epoch", "warmup_epochs", "rampdown_epochs", "max_lr", "min_lr")
    steps = range(golden["epochs"] * golden["steps_per_epoch"])
    rates = [learning_rate(step, *(golden[name] for name in names)) for step in steps]
    np.testing.assert_allclose(rates, golden["lr"], rtol=0, atol=1e-12)
    without_warmup = [learning_rate(step, 10, 0, 2, 1e-3, 1e-5) for step in (0, 10, 20, 24)]
    assert without_warmup == [1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5]


# --- Metrics ---


def test_metrics_equal_the_original_code_with_one_and_several_relevant_clips():
    arrays = np.load(GOLDEN / "metrics_1.npz")
    golden = json.loads((GOLDEN / "metrics_1.json").read_text())
    text, audio = (normalize(torch.tensor(arrays[name]), dim=1) for name in ("text", "audio"))
    found = retrieval_metrics(text, audio, arrays["clip_of_caption"][:, None].tolist())
    multiple = retrieval_metrics(text[golden["query"]], audio, golden["relevant"])
    found |= {f"multi {name}": value for name, value in multiple.items()}
    for name, value in golden["metrics"].items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_several_relevant_clips_by_hand():
    # Ranks 1, 3 and 12 of three relevant clips: divided by all three, not by those within k,
    # and not by k where there are more.
    values = query_metrics([torch.tensor([1, 3, 12]), torch.tensor([6])])
    assert values["mAP@10"].tolist() == pytest.approx([(1 + 2 / 3) / 3, 1 / 6])
    assert values["mAP@16"].tolist() == pytest.approx([(1 + 2 / 3 + 3 / 12) / 3, 1 / 6])
    assert [values[f"R@{k}"].tolist() for k in (1, 5, 10)] == [[1, 0], [1, 0], [1, 1]]
    assert query_metrics([torch.arange(1, 13)])["mAP@10"].tolist() == pytest.approx([10 / 12])


def test_ties_rank_the_lower_index_first():
    text = torch.tensor([[1.0, 0.0]])
    audio = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.6, 0.8]])
    assert ranks(text, audio, [[0, 2, 3]])[0].tolist() == [2, 3, 4]
    assert ranks(text, audio, [[3, 1]])[0].tolist() == [1, 4]
    same = torch.full((37, 16), 0.25)  # of unit norm, and its products are exact
    assert [r.tolist() for r in ranks(same[:2], same, [[36], [17, 3]])] == [[37], [4, 18]]


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_the_definition(seed, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 4 * 64)  # several blocks, the last one short
    rng = np.random.default_rng(seed)
    # Few distinct whole numbers: many ties, and sums that float32 holds exactly.
    text, audio = (torch.tensor(rng.integers(-2, 3, (n, 4))).float() for n in (23, 31))
    relevant = [rng.choice(31, rng.integers(1, 9), replace=False).tolist() for _ in text]
    totals = dict.fromkeys(metrics.METRICS, 0.0)
    for query, wanted in zip(text, relevant, strict=True):
        order = sorted(range(31), key=lambda n: (-float(query @ audio[n]), n))
        hit = [clip in wanted for clip in order]
        for k in metrics.MAP_CUTOFFS:
            found = sum(sum(hit[: i + 1]) / (i + 1) for i in range(k) if hit[i])
            totals[f"mAP@{k}"] += found / len(wanted) / 23
        for k in metrics.RECALL_CUTOFFS:
            totals[f"R@{k}"] += any(hit[:k]) / 23
    assert retrieval_metrics(text, audio, relevant) == pytest.approx(totals, abs=1e-12)


def test_embeddings_that_are_not_finite_are_not_ranked():
    bad = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    for text, audio in ((bad, torch.eye(2)), (torch.eye(2), bad)):
        with pytest.raises(InputError, match="diverged"):
            ranks(text, audio, [[0], [1]])
    for relevant in ([[0], []], [[0], [1, 1]]):
        with pytest.raises(InputError, match="one candidate or more, and none twice"):
            ranks(torch.eye(2), torch.eye(2), relevant)


# --- How sure ---


def test_bootstrap_equals_drawing_clips_one_after_the_other():
    values = {"R@1": torch.tensor(np.random.default_rng(0).random(8))}
    means = bootstrap(values, [0, 0, 0, 1, 1, 2, 4, 4], draws=50, seed=3)["R@1"]  # none of clip 3
    groups = [[0, 1, 2], [3, 4], [5], [6, 7]]
    drawn = np.random.default_rng(3).integers(4, size=(50, 4))
    singly = [values["R@1"][[q for clip in row for q in groups[clip]]].mean() for row in drawn]
    assert means == pytest.approx(np.array(singly), abs=1e-12)


def test_interval_has_the_width_that_theory_gives():
    # The mean of n independent values has the standard error s / sqrt(n).
    values = torch.tensor(np.random.default_rng(0).normal(3.0, 2.0, 400))
    error = values.std(correction=0).item() / 20
    low, high = interval(bootstrap({"x": values}, range(400), 4000)["x"])
    for bound, sign in ((low, -1), (high, 1)):
        assert bound == pytest.approx(values.mean().item() + sign * 1.96 * error, abs=0.1 * error)
