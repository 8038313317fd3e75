"""Losses against the original authors' numbers and against loops written from the definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dualenc.losses import contrastive_loss, distillation_loss

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


def seed(number):
    return torch.Generator().manual_seed(number)
