"""Losses against the original authors' numbers and against loops written from the definition."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import DualEncoder

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    arrays = {key: torch.tensor(value) for key, value in np.load(GOLDEN / name).items()}
    for key in ("audio", "text"):
        arrays[key].requires_grad_()
    return arrays


def assert_equals_golden(loss, golden):
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-6)
    for key in ("audio", "text"):
        torch.testing.assert_close(golden[key].grad, golden[f"grad_{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["contrastive_1.npz", "contrastive_2.npz"])
def test_contrastive_loss_equals_the_original_code(name):
    golden = load(name)
    loss = contrastive_loss(golden["audio"], golden["text"], golden["clip_ids"], golden["tau"])
    assert_equals_golden(loss, golden)


def test_distillation_loss_equals_the_original_code():
    golden = load("distill_1.npz")
    loss = distillation_loss(
        golden["audio"], golden["text"], golden["teacher_audio"], golden["teacher_text"],
        golden["tau"],
    )
    assert_equals_golden(loss, golden)


def test_contrastive_loss_by_hand():
    # Two pairs of two clips, cosines [[1, 0], [0, 1]], tau = 1: each softmax is e / (e + 1).
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1)))
    # One clip in both pairs: all four cells count, two of them with probability 1 / (e + 1).
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor([7, 7]), 1.0)
    by_hand = -(math.log(math.e / (math.e + 1)) + math.log(1 / (math.e + 1))) / 2
    assert loss.item() == pytest.approx(by_hand)


def test_distillation_from_oneself_is_the_entropy_with_no_gradient():
    audio = torch.nn.functional.normalize(torch.randn(6, 8, generator=seed(0)), dim=1)
    text = torch.nn.functional.normalize(torch.randn(6, 8, generator=seed(1)), dim=1)
    audio.requires_grad_()
    loss = distillation_loss(audio, text, audio.detach()[None], text[None], 0.1)
    loss.backward()
    logits = (audio @ text.T / 0.1).detach()
    entropies = [
        torch.distributions.Categorical(logits=x).entropy().mean() for x in (logits, logits.T)
    ]
    assert loss.item() == pytest.approx(sum(entropies).item() / 2, abs=1e-6)
    assert audio.grad.abs().max() < 1e-6


def test_teachers_may_differ_in_width():
    text, audio = torch.eye(3), torch.eye(3)
    narrow = torch.nn.functional.normalize(torch.randn(3, 5, generator=seed(2)), dim=1)
    wide = torch.nn.functional.pad(narrow, (0, 4))
    one = distillation_loss(audio, text, [narrow, audio], [narrow, text], 0.1)
    other = distillation_loss(audio, text, [wide, audio], [wide, text], 0.1)
    assert one.item() == pytest.approx(other.item(), abs=1e-6)


# --- Stage 2's final loss (distill.py) ---


def test_the_final_loss_weighs_both_and_looks_each_pairs_vectors_up():
    clip_ids, pair_ids = torch.tensor([1, 0, 1]), torch.tensor([4, 1, 3])
    audio, text = units(3, 8, 0), units(3, 8, 1)
    teachers = [(units(2, 8, 2), units(5, 8, 3)), (units(2, 6, 4), units(5, 6, 5))]
    found = distill.distillation(teachers, (0.3, 0.7))(audio, text, clip_ids, pair_ids, 0.1)

    # From the definition, pair by pair: row i shows clip clip_ids[i] and caption pair_ids[i].
    student = audio @ text.T / 0.1
    teacher = torch.zeros(3, 3)
    for i, clip in enumerate(clip_ids):
        for j, caption in enumerate(pair_ids):
            cosines = [clips[clip] @ captions[caption] for clips, captions in teachers]
            teacher[i, j] = sum(cosines) / len(cosines) / 0.1
    both = [(student, teacher), (student.T, teacher.T)]
    same = [(i, j) for i in range(3) for j in range(3) if clip_ids[i] == clip_ids[j]]
    contrastive = -sum(s.log_softmax(1)[i, j] for s, _ in both for i, j in same) / len(same) / 2
    distilled = -sum((t.softmax(1) * s.log_softmax(1)).sum() for s, t in both) / 3 / 2
    assert found["contrastive"].item() == pytest.approx(contrastive.item(), abs=1e-5)
    assert found["distillation"].item() == pytest.approx(distilled.item(), abs=1e-5)
    wanted = 0.3 * contrastive.item() + 0.7 * distilled.item()
    assert found["loss"].item() == pytest.approx(wanted, abs=1e-5)


def test_the_student_starts_from_the_first_teacher_and_both_weights_count(command, tiny):
    torch.manual_seed(1)
    other = DualEncoder.create("tiny", "random", ["a bell rings"])
    tiny.save("first.pt")
    other.save("last.pt")
    status, printed = command(
        distill, "--teachers", "first.pt", "last.pt", "--out", "run", "--batch-size", 4,
        "--workers", 0, "--max-steps", 1, "--max-lr", 1e-9, "--min-lr", 0, "--log-every", 1,
        "--contrastive-weight", 0.3, "--distillation-weight", 0.7,
    )
    assert status == 0, printed
    student = DualEncoder.load("run/best.pt").state_dict()
    for name, weights in tiny.state_dict().items():
        torch.testing.assert_close(student[name], weights, rtol=0, atol=1e-6)
    step = json.loads(Path("run/log.jsonl").read_text().splitlines()[1])
    wanted = 0.3 * step["contrastive"] + 0.7 * step["distillation"]
    assert step["loss"] == pytest.approx(wanted, abs=1e-5)


def units(n, width, number):
    return torch.nn.functional.normalize(torch.randn(n, width, generator=seed(number)), dim=1)


def seed(number):
    return torch.Generator().manual_seed(number)
