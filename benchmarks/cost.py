"""What training costs: the floating-point operations of a step and of a run, counted, not timed.

    python benchmarks/cost.py --tflops 25      # and the hours at so many TFLOP a second

The matrix products of the report's model are counted on tensors without memory.
"""

from unittest import mock

import torch
from measure import CLOTHO_PAIRS, PAIRS, TOKENS, options
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualenc.losses import contrastive_loss
from dualenc.model import DualEncoder

EPOCHS = 20
PADDED_TOKENS = 32
PADDED_SEGMENTS = 3  # segments of a padded clip
# Clotho's clips last 15 to 30 s, evenly spread: a third has two segments, the others have three.
CLOTHO_SEGMENTS = 8 / 3  # segments of a pair, on average
AUDIOCAPS_PAIRS = 57_188
BOTH_SEGMENTS = (CLOTHO_PAIRS * CLOTHO_SEGMENTS + AUDIOCAPS_PAIRS) / (
    CLOTHO_PAIRS + AUDIOCAPS_PAIRS
)
DATA = {  # steps of an epoch, segments of a pair, hours of the official baseline on an A40
    "Clotho": (299, CLOTHO_SEGMENTS, 2 + 16 / 60),
    "Clotho + AudioCaps": (1193, BOTH_SEGMENTS, 7 + 16 / 60),
}

WITHOUT_MEMORY = FakeTensorMode()  # one for all steps, since the mel filters are kept between them


def flop_of_a_step(segments: int, tokens: int, pairs: int = PAIRS) -> dict[str, int]:
    """Count the operations of forward and backward: {part of the model: FLOP}.

    Args:
        segments: how many the whole batch has.
        tokens: how many its longest caption has.
    """
    with (
        WITHOUT_MEMORY,
        sdpa_kernel(SDPBackend.MATH),  # a fused kernel counts as nothing on a CPU
        mock.patch.object(Tensor, "item", lambda _: 0),  # tensors without memory have no values
    ):
        model = DualEncoder.create("report", "random", ["a dog"]).train()
        audio_features = torch.empty(pairs, model.config.audio_width, requires_grad=True)
        text_features = torch.empty(pairs, model.config.hidden_size, requires_grad=True)

        def log_mel() -> Tensor:
            return model.audio.mel(torch.empty(segments, 320_000))

        def passt() -> Tensor:
            _, features = model.audio.passt(torch.empty(segments, 1, 128, 1000))
            return features

        def roberta() -> Tensor:
            return model.text(torch.zeros(pairs, tokens, dtype=torch.int64))

        def heads_and_loss() -> Tensor:
            audio = model.audio_projection(audio_features)
            text = model.text_projection(text_features)
            return contrastive_loss(audio, text, torch.arange(pairs), model.tau)

        return {
            "log-mel": flop_of(log_mel),
            "PaSST": flop_of(passt),
            "RoBERTa": flop_of(roberta),
            "heads and loss": flop_of(heads_and_loss),
        }


def flop_of(forward) -> int:
    """Count the operations of a forward pass and, where something is learnt, of its backward."""
    with FlopCounterMode(display=False) as counter:
        total = forward().sum()
        if total.requires_grad:
            total.backward()
    return counter.get_total_flops()


def print_cost(data: str, recipe: str, segments: int, tokens: int, tflops: float) -> float:
    """Print what a step and a run cost, and return the PFLOP of the run."""
    steps_per_epoch, _, _ = DATA[data]
    tflop = {part: flop / 1e12 for part, flop in flop_of_a_step(segments, tokens).items()}
    step = sum(tflop.values())
    run = steps_per_epoch * EPOCHS * step / 1e3
    parts = ", ".join(f"{part} {value:.3f}" for part, value in tflop.items())
    print(f"{data}, {recipe}: {segments} segments a step, {step:.1f} TFLOP ({parts})")
    hours = f", {run / tflops / 3.6:.1f} h at {tflops:g} TFLOP/s" if tflops else ""
    print(f"  {EPOCHS} epochs: {run:.0f} PFLOP{hours}", flush=True)
    return run


def main() -> None:
    args = options(__doc__, tflops=0.0)
    for data, (_, segments_per_pair, baseline_hours) in DATA.items():
        print_cost(data, "dualenc", round(PAIRS * segments_per_pair), TOKENS, args.tflops)
        padded = print_cost(data, "padded", PADDED_SEGMENTS * PAIRS, PADDED_TOKENS, args.tflops)
        print(f"  the official baseline on an A40, as published: {baseline_hours:.2f} h, or "
              f"{padded / baseline_hours / 3.6:.0f} TFLOP/s of the padded recipe's")


if __name__ == "__main__":
    main()
