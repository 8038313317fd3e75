"""Metrics against the original authors' numbers, small cases by hand, and the definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dualenc import metrics
from dualenc.metrics import bootstrap, interval, query_metrics, ranks, retrieval_metrics

GOLDEN = Path(__file__).parent / "golden"


def by_definition(text, audio, relevant):
    """The metrics one query at a time, from a sorted list, as the definition reads."""
    totals = dict.fromkeys(metrics.METRICS, 0.0)
    for query, wanted in zip(text, relevant, strict=True):
        scores = [float(torch.dot(query, clip)) for clip in audio]
        order = sorted(range(len(audio)), key=lambda n: (-scores[n], n))
        for k in metrics.MAP_CUTOFFS:
            hits, total = 0, 0.0
            for rank, clip in enumerate(order[:k], start=1):
                if clip in wanted:
                    hits += 1
                    total += hits / rank
            totals[f"mAP@{k}"] += total / len(wanted) / len(text)
        for k in metrics.RECALL_CUTOFFS:
            totals[f"R@{k}"] += bool(set(order[:k]) & set(wanted)) / len(text)
    return totals


def test_equals_the_original_code():
    arrays = np.load(GOLDEN / "metrics_1.npz")
    golden = json.loads((GOLDEN / "metrics_1.json").read_text())
    text, audio = torch.tensor(arrays["text"]), torch.tensor(arrays["audio"])
    text = torch.nn.functional.normalize(text, dim=1)
    audio = torch.nn.functional.normalize(audio, dim=1)
    single = retrieval_metrics(text, audio, [[int(c)] for c in arrays["clip_of_caption"]])
    multiple = retrieval_metrics(text[golden["query"]], audio, golden["relevant"])
    found = single | {f"multi {name}": value for name, value in multiple.items()}
    for name, value in golden["metrics"].items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_several_relevant_clips_by_hand():
    # Ranks 1, 3 and 12 of three relevant clips:
    # AP@10 = (1/1 + 2/3) / 3, divided by all three; AP@16 adds 3/12.
    values = query_metrics([torch.tensor([1, 3, 12])])
    assert values["mAP@10"].item() == pytest.approx((1 + 2 / 3) / 3)
    assert values["mAP@16"].item() == pytest.approx((1 + 2 / 3 + 3 / 12) / 3)
    assert [values[f"R@{k}"].item() for k in (1, 5, 10)] == [1, 1, 1]


def test_ties_rank_the_lower_index_first():
    text = torch.tensor([[1.0, 0.0]])
    audio = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.6, 0.8]])
    assert ranks(text, audio, [[0, 2, 3]])[0].tolist() == [2, 3, 4]
    assert ranks(text, audio, [[3, 1]])[0].tolist() == [1, 4]


def test_all_candidates_equal():
    same = torch.nn.functional.normalize(torch.ones(37, 24), dim=1)
    found = ranks(same[:5], same, [[0], [9], [10], [36], [17, 3]])
    assert [r.tolist() for r in found] == [[1], [10], [11], [37], [4, 18]]


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_definition(seed, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 4 * 64)  # several blocks, the last one short
    rng = np.random.default_rng(seed)
    # Few distinct whole numbers: many ties, and sums that float32 holds exactly.
    text = torch.tensor(rng.integers(-2, 3, (23, 4)), dtype=torch.float32)
    audio = torch.tensor(rng.integers(-2, 3, (31, 4)), dtype=torch.float32)
    relevant = [rng.choice(31, rng.integers(1, 9), replace=False).tolist() for _ in text]
    assert retrieval_metrics(text, audio, relevant) == pytest.approx(
        by_definition(text, audio, relevant), abs=1e-12
    )


@pytest.mark.parametrize("relevant", [[[0], []], [[0], [1, 1]]])
def test_refuses_queries_without_relevant_or_with_repeated_ones(relevant):
    with pytest.raises(ValueError, match="at least one relevant"):
        retrieval_metrics(torch.eye(2), torch.eye(2), relevant)


def test_bootstrap_of_one_clip_and_of_equal_clips_is_certain():
    values = {"R@1": torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64)}
    # Both clips' captions average 0.5: whichever are drawn, the mean is 0.5.
    assert bootstrap(values, [7, 7, 9, 9])["R@1"] == pytest.approx(np.full(1000, 0.5))
    # Drawn one by one, without their clip, the same captions do vary.
    assert bootstrap(values, [0, 1, 2, 3])["R@1"].std() > 0.1


def test_bootstrap_equals_drawing_clips_one_after_the_other():
    rng = np.random.default_rng(0)
    clip_of_query = [0, 0, 0, 1, 1, 2, 4, 4]  # clip 3 has no query
    values = {"mAP@10": torch.tensor(rng.random(8))}
    means = bootstrap(values, clip_of_query, draws=50, seed=3)["mAP@10"]
    groups = [[0, 1, 2], [3, 4], [5], [6, 7]]
    drawn = np.random.default_rng(3).integers(4, size=(50, 4))
    one_by_one = [
        values["mAP@10"][[q for clip in clips for q in groups[clip]]].mean() for clips in drawn
    ]
    assert means == pytest.approx(np.array(one_by_one), abs=1e-12)


def test_interval_has_the_width_that_theory_gives():
    # The mean of n independent values has the standard error s / sqrt(n).
    values = torch.tensor(np.random.default_rng(0).normal(3.0, 2.0, 400))
    low, high = interval(bootstrap({"x": values}, range(400), draws=4000)["x"])
    error = values.std(correction=0).item() / 20
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.1 * error)


def test_paired_differences_are_surer_than_each():
    rng = np.random.default_rng(0)
    hard = rng.random(200)  # some clips are hard for every model
    a, b = ({"R@1": torch.tensor(hard + shift)} for shift in (0.01, 0.0))
    difference = bootstrap(a, range(200))["R@1"] - bootstrap(b, range(200))["R@1"]
    assert difference == pytest.approx(np.full(1000, 0.01))
    other_draws = bootstrap(a, range(200))["R@1"] - bootstrap(b, range(200), seed=1)["R@1"]
    assert other_draws.std() > 0.01
