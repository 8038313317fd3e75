"""The learning rate of every step against the original authors' code."""

import json
from pathlib import Path

from dualenc.training import Options, learning_rate

GOLDEN = Path(__file__).parent / "golden"


def test_every_step_equals_the_original_code():
    golden = json.loads((GOLDEN / "lr_schedule.json").read_text())
    rates = [
        learning_rate(
            step, golden["steps_per_epoch"], golden["warmup_epochs"], golden["rampdown_epochs"],
            golden["max_lr"], golden["min_lr"],
        )
        for step in range(golden["epochs"] * golden["steps_per_epoch"])
    ]
    assert len(rates) == len(golden["lr"])
    assert max(abs(a - b) for a, b in zip(rates, golden["lr"], strict=True)) <= 1e-12


def test_the_golden_schedule_is_the_default_one():
    golden, defaults = json.loads((GOLDEN / "lr_schedule.json").read_text()), Options()
    names = ("epochs", "warmup_epochs", "max_lr", "min_lr")
    assert [getattr(defaults, name) for name in names] == [golden[name] for name in names]
    assert defaults.decay_epochs == golden["rampdown_epochs"]


def test_without_warmup_it_begins_at_the_top_and_ends_at_the_bottom():
    rates = [learning_rate(step, 10, 0, 2, 1e-3, 1e-5) for step in range(25)]
    assert rates[0] == 1e-3
    assert rates[10] == (1e-3 + 1e-5) / 2  # half-way down
    assert rates[20:] == [1e-5] * 5
