"""Losses, metrics and learning rate: the original authors' numbers, cases by hand, definitions."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from dualenc import metrics
from dualenc.errors import InputError
from dualenc.losses import contrastive_loss, distillation_loss, similarities
from dualenc.metrics import bootstrap, interval, query_metrics, ranks, retrieval_metrics
from dualenc.training import learning_rate

GOLDEN = Path(__file__).parent / "golden"  # inputs and outputs of the original authors' own code


def unit_rows(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator), dim=1)


def golden_tensors(name: str) -> dict[str, Tensor]:
    arrays = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.tensor(array) for key, array in arrays.items()}


# --- Losses ---


def assert_equals_golden(loss: Tensor, audio: Tensor, text: Tensor, golden: dict) -> None:
    """Hold a loss and its gradients against the original code's."""
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(audio.grad, golden["grad_audio"].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(text.grad, golden["grad_text"].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["contrastive_1", "contrastive_2"])
def test_the_contrastive_loss_and_its_gradients_equal_the_original_code(name):
    golden = golden_tensors(name)
    audio = golden["audio"].requires_grad_()
    text = golden["text"].requires_grad_()
    loss = contrastive_loss(audio, text, golden["clip_ids"], golden["tau"])
    assert_equals_golden(loss, audio, text, golden)


def test_the_distillation_loss_and_its_gradients_equal_the_original_code():
    golden = golden_tensors("distill_1")
    audio = golden["audio"].requires_grad_()
    text = golden["text"].requires_grad_()
    loss = distillation_loss(
        audio, text, golden["teacher_audio"], golden["teacher_text"], golden["tau"]
    )
    assert_equals_golden(loss, audio, text, golden)


# Two pairs with the cosines [[1, 0], [0, 1]], at the temperature 1: the softmax of each row and
# column is e / (e + 1) and 1 / (e + 1).
LOG_OF_MATCH = math.log(math.e / (math.e + 1))
LOG_OF_OTHER = math.log(1 / (math.e + 1))


def test_the_contrastive_loss_counts_all_pairs_of_one_clip():
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor([7, 7]), 1.0)
    assert loss.item() == pytest.approx(-(LOG_OF_MATCH + LOG_OF_OTHER) / 2)


def test_distillation_from_oneself_is_the_entropy():
    audio = unit_rows(6, 8, seed=0)
    text = unit_rows(6, 8, seed=1)
    loss = distillation_loss(audio, text, audio[None], text[None], 0.1)
    logits = audio @ text.T / 0.1
    of_rows = torch.distributions.Categorical(logits=logits).entropy().mean()
    of_columns = torch.distributions.Categorical(logits=logits.T).entropy().mean()
    assert loss.item() == pytest.approx((of_rows + of_columns).item() / 2, abs=1e-6)


def test_distillation_from_oneself_has_no_gradient():
    audio = unit_rows(6, 8, seed=0).requires_grad_()
    text = unit_rows(6, 8, seed=1).requires_grad_()
    distillation_loss(audio, text, audio[None], text[None], 0.1).backward()
    assert audio.grad.abs().max() < 1e-6
    assert text.grad.abs().max() < 1e-6


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_similarities_are_computed_in_float32(precision):
    audio = unit_rows(3, 8, seed=0).to(precision)
    text = unit_rows(4, 8, seed=1).to(precision)
    assert similarities(audio, text, 0.05).equal(similarities(audio.float(), text.float(), 0.05))


def test_teachers_may_differ_in_width():
    audio = unit_rows(3, 8, seed=0)
    text = unit_rows(3, 8, seed=1)
    teacher_audio = [unit_rows(3, 3, seed=2), unit_rows(3, 5, seed=3)]
    teacher_text = [unit_rows(3, 3, seed=4), unit_rows(3, 5, seed=5)]
    loss = distillation_loss(audio, text, teacher_audio, teacher_text, 0.1)
    # Padded with zeros, which change no cosine, both teachers are of one width.
    padded_audio = torch.stack([pad(teacher_audio[0], (0, 2)), teacher_audio[1]])
    padded_text = torch.stack([pad(teacher_text[0], (0, 2)), teacher_text[1]])
    padded_loss = distillation_loss(audio, text, padded_audio, padded_text, 0.1)
    assert loss.item() == pytest.approx(padded_loss.item(), abs=1e-6)


# --- Learning rate ---


def test_the_learning_rate_of_every_step_equals_the_original_code():
    golden = json.loads((GOLDEN / "lr_schedule.json").read_text())
    rates = []
    for step in range(golden["epochs"] * golden["steps_per_epoch"]):
        rate = learning_rate(
            step,
            golden["steps_per_epoch"],
            golden["warmup_epochs"],
            golden["rampdown_epochs"],
            golden["max_lr"],
            golden["min_lr"],
        )
        rates.append(rate)
    np.testing.assert_allclose(rates, golden["lr"], rtol=0, atol=1e-12)


def test_without_warm_up_the_learning_rate_starts_at_its_highest():
    # Ten steps an epoch, decaying for two epochs: the top, half-way, the bottom, and after it.
    rates = [learning_rate(step, 10, 0, 2, 1e-3, 1e-5) for step in (0, 10, 20, 24)]
    assert rates == [1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5]


# --- Metrics ---


@pytest.fixture(scope="module")
def golden_metrics() -> SimpleNamespace:
    """Read embeddings, relevance, and the original code's metrics ("multi" has several clips)."""
    arrays = golden_tensors("metrics_1")
    return SimpleNamespace(
        text=normalize(arrays["text"], dim=1),
        audio=normalize(arrays["audio"], dim=1),
        clip_of_caption=arrays["clip_of_caption"],
        **json.loads((GOLDEN / "metrics_1.json").read_text()),
    )


@pytest.mark.parametrize("name", ["mAP@10", "R@1", "R@5", "R@10"])
def test_metrics_equal_the_original_code_with_one_relevant_clip(name, golden_metrics):
    relevant = golden_metrics.clip_of_caption[:, None].tolist()
    computed = retrieval_metrics(golden_metrics.text, golden_metrics.audio, relevant)
    assert computed[name] == pytest.approx(golden_metrics.metrics[name], abs=1e-12)


@pytest.mark.parametrize("name", ["mAP@10", "mAP@16"])
def test_metrics_equal_the_original_code_with_several_relevant_clips(name, golden_metrics):
    text = golden_metrics.text[golden_metrics.query]
    computed = retrieval_metrics(text, golden_metrics.audio, golden_metrics.relevant)
    assert computed[name] == pytest.approx(golden_metrics.metrics[f"multi {name}"], abs=1e-12)


def test_average_precision_is_that_of_its_worked_example():
    # Three relevant clips rank 1, 3 and 12; a single one ranks 6.
    values = query_metrics([torch.tensor([1, 3, 12]), torch.tensor([6])])
    assert values["mAP@10"].tolist() == pytest.approx([(1 + 2 / 3) / 3, 1 / 6])
    assert values["mAP@16"].tolist() == pytest.approx([(1 + 2 / 3 + 3 / 12) / 3, 1 / 6])


def test_average_precision_divides_by_all_relevant_clips_also_where_they_are_more_than_k():
    values = query_metrics([torch.arange(1, 13)])
    assert values["mAP@10"].tolist() == pytest.approx([10 / 12])


def test_recall_asks_for_any_relevant_clip():
    values = query_metrics([torch.tensor([1, 3, 12]), torch.tensor([6])])
    assert values["R@1"].tolist() == [1, 0]
    assert values["R@5"].tolist() == [1, 0]
    assert values["R@10"].tolist() == [1, 1]


@pytest.mark.parametrize(("relevant", "expected"), [([0, 2, 3], [2, 3, 4]), ([3, 1], [1, 4])])
def test_ties_rank_the_lower_index_first(relevant, expected):
    text = torch.tensor([[1.0, 0.0]])
    audio = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.6, 0.8]])
    (computed,) = ranks(text, audio, [relevant])
    assert computed.tolist() == expected


def test_where_all_embeddings_are_equal_clips_rank_in_their_order():
    embeddings = torch.full((37, 16), 0.25)  # Their norm is one, and their products are exact.
    first, second = ranks(embeddings[:2], embeddings, [[36], [17, 3]])
    assert first.tolist() == [37]
    assert second.tolist() == [4, 18]


def average_precision(hits: list[bool], relevant_clips: int) -> float:
    """Sum the precision at the rank of each hit, and divide by the number of relevant clips."""
    total = 0.0
    for rank, is_hit in enumerate(hits, start=1):
        if is_hit:
            total += sum(hits[:rank]) / rank
    return total / relevant_clips


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_the_definition(seed, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 4 * 64)  # several blocks, the last one short
    rng = np.random.default_rng(seed)
    # Few distinct whole numbers: many ties, and sums that float32 holds exactly.
    text = torch.tensor(rng.integers(-2, 3, (23, 4))).float()
    audio = torch.tensor(rng.integers(-2, 3, (31, 4))).float()
    relevant = [rng.choice(31, rng.integers(1, 9), replace=False).tolist() for _ in text]
    values = {name: [] for name in metrics.METRICS}
    for query, relevant_clips in zip(text, relevant, strict=True):
        scores = (audio @ query).tolist()
        # The sort is stable: ties keep their order.
        ranking = sorted(range(31), key=lambda clip: -scores[clip])
        hits = [clip in relevant_clips for clip in ranking]
        for k in (10, 16):
            values[f"mAP@{k}"].append(average_precision(hits[:k], len(relevant_clips)))
        for k in (1, 5, 10):
            values[f"R@{k}"].append(any(hits[:k]))
    expected = {name: np.mean(of_queries) for name, of_queries in values.items()}
    assert retrieval_metrics(text, audio, relevant) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("damaged", ["text", "audio"])
def test_embeddings_that_are_not_finite_are_not_ranked(damaged):
    embeddings = {"text": torch.eye(2), "audio": torch.eye(2)}
    embeddings[damaged][1, 0] = torch.nan
    with pytest.raises(InputError, match="diverged"):
        ranks(embeddings["text"], embeddings["audio"], [[0], [1]])


@pytest.mark.parametrize("relevant", [[[0], []], [[0], [1, 1]]])
def test_each_query_needs_relevant_candidates_and_none_twice(relevant):
    with pytest.raises(InputError, match="one candidate or more, and none twice"):
        ranks(torch.eye(2), torch.eye(2), relevant)


# --- Confidence ---


def test_the_bootstrap_equals_drawing_clips_one_after_the_other():
    values = torch.tensor(np.random.default_rng(0).random(8))
    clip_of_query = [0, 0, 0, 1, 1, 2, 4, 4]  # Clip 3 has no query, so it is not drawn.
    queries_of_clip = [[0, 1, 2], [3, 4], [5], [6, 7]]
    expected = []
    for drawn_clips in np.random.default_rng(3).integers(4, size=(50, 4)):
        queries = np.concatenate([queries_of_clip[clip] for clip in drawn_clips])
        expected.append(values[queries].mean().item())
    means = bootstrap({"R@1": values}, clip_of_query, draws=50, seed=3)["R@1"]
    assert means == pytest.approx(np.array(expected), abs=1e-12)


def test_an_interval_has_the_width_that_theory_gives():
    # The mean of n independent values has the standard error s / sqrt(n).
    values = torch.tensor(np.random.default_rng(0).normal(3.0, 2.0, 400))
    error = values.std(correction=0).item() / 20
    mean = values.mean().item()
    low, high = interval(bootstrap({"x": values}, range(400), 4000)["x"])
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
