"""A training step and embedding, ours against the plain recipe; and what a run costs.

    python benchmarks/speed.py [--pairs 16] [--clips 12] [--rounds 3] [--device auto]
    python benchmarks/speed.py --tflops 25      # counts; hours at so many TFLOP a second

A step is forward, backward and update, half of the clips lasting 10 s and half 15 to 30 s, or all
10 s; clips of 15 to 30 s are embedded, with five captions each. All is noise, weights are random.
"""

from functools import partial
from unittest import mock

import torch
from measure import batch_of, compare, machine, options, random_captions, random_clips
from plain import PlainRecipe
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualenc.losses import contrastive_loss
from dualenc.model import DualEncoder, choose_device
from dualenc.text import tokenize

PER_CLIP, BATCH = 5, 12  # captions; pairs that the plain recipe takes at a time


def loss_of(audio: Tensor, text: Tensor) -> Tensor:
    return contrastive_loss(audio, text, torch.arange(len(audio), device=audio.device), 0.05)


def sides_of(recipe: PlainRecipe, **functions) -> dict:
    """At fp32, where both are seen to agree, and in bf16 where there are instructions for it."""
    recipe.eval()  # and ours, which is a part of it: no dropout, patchout and jitter
    on_gpu = recipe.ours.device.type == "cuda"  # where bf16 makes the plain side faster, too
    has_bf16 = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.no_grad():
        both = zip(*(function(None) for function in functions.values()), strict=True)
        worst = max((a - b).abs().max().item() for a, b in both)
    print(f"  agreement at fp32: embeddings within {worst:.1e}", flush=True)
    assert worst < 1e-4
    kinds = [("fp32", None), ("bf16", torch.bfloat16)][: 1 + has_bf16]
    return {f"{name}, {kind}": partial(f, precision) for kind, precision in kinds
            for name, f in functions.items() if f"{name}, {kind}" != "plain, bf16" or on_gpu}


def step_of(durations_s, ours, plain) -> dict:
    clips, captions = random_clips(durations_s), random_captions(len(durations_s))
    batch = batch_of(clips, tokenize(ours.tokenizer, captions))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True)  # of shared weights

    def forward_ours(precision):
        ours.precision = precision
        return ours.encode_pairs(batch)

    def step(forward):
        plain.train()
        loss_of(*forward()).backward()
        optimizer.step()
        plain.zero_grad(set_to_none=True)

    sides = sides_of(plain, plain=partial(plain, clips, captions), ours=forward_ours)
    return {name: partial(step, forward) for name, forward in sides.items()}


@torch.inference_mode()
def compare_embedding(clip_count, ours, plain, rounds) -> None:
    clips = random_clips(torch.linspace(15, 30, clip_count).tolist())
    captions = random_captions(PER_CLIP * clip_count)

    def embed_ours(precision):
        ours.precision = precision
        return ours.embed_audio(clips), ours.embed_text(captions)

    def embed_plain(precision):
        pairs = [(clips[i // PER_CLIP], caption) for i, caption in enumerate(captions)]
        batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
        parts = [plain(*zip(*batch, strict=True), precision) for batch in batches]
        audio, text = (torch.cat(side).cpu() for side in zip(*parts, strict=True))
        return audio[::PER_CLIP], text

    compare(rounds, sides_of(plain, plain=embed_plain, ours=embed_ours))


PAIRS, EPOCHS, FAKE = 64, 20, FakeTensorMode()
DATA = {  # steps an epoch, segments a pair, hours on an A40 that the official baseline published
    # Clotho's clips last 15 to 30 s, evenly spread: a third has two segments, the others three.
    "Clotho": (299, 8 / 3, 2 + 16 / 60),
    "Clotho + AudioCaps": (1193, (19_195 * 8 / 3 + 57_188) / 76_383, 7 + 16 / 60),
}


def flop_of_a_step(segments: int, tokens: int) -> dict[str, int]:
    """Of the matrix products of forward and backward, by part; tokens: of the longest caption."""
    found = {}
    # Attention is written out, since a fused one counts as nothing here.
    with FAKE, sdpa_kernel(SDPBackend.MATH), mock.patch.object(Tensor, "item", lambda _: 0):
        model = DualEncoder.create("report", "random", ["a dog"]).train()
        means, words = (torch.empty(PAIRS, n, requires_grad=True) for n in (768, 1024))
        parts = {
            "log-mel": lambda: model.audio.mel(torch.empty(segments, 320_000)),
            "PaSST": lambda: model.audio.passt(torch.empty(segments, 1, 128, 1000))[1],
            "RoBERTa": lambda: model.text(torch.zeros(PAIRS, tokens, dtype=torch.int64)),
            "rest": lambda: loss_of(model.audio_projection(means), model.text_projection(words)),
        }
        for name, part in parts.items():
            with FlopCounterMode(display=False) as counter:
                out = part().sum()
                if out.requires_grad:  # nothing in log-mel is learnt
                    out.backward()
            found[name] = counter.get_total_flops()
    return found


def print_cost(tflops: float) -> None:
    for data, (steps, per_pair, hours) in DATA.items():
        for name, *sizes in ("ours", round(PAIRS * per_pair), 24), ("padded", 3 * PAIRS, 32):
            flop = {part: found / 1e12 for part, found in flop_of_a_step(*sizes).items()}
            run = steps * EPOCHS * sum(flop.values()) / 1e3
            parts = ", ".join(f"{part} {value:.3f}" for part, value in flop.items())
            print(f"{data}, {name}: {sizes[0]} segments a step, {sum(flop.values()):.1f} TFLOP "
                  f"({parts}); all {run:.0f} PFLOP, {run / tflops / 3.6:.1f} h", flush=True)
        print(f"{data}, the official baseline on an A40, as published: {hours:.2f} h, or "
              f"{run / hours / 3.6:.0f} TFLOP/s of the padded recipe's")


def main():
    args = options(__doc__, pairs=16, clips=12, rounds=3, device="auto", tflops=0.0)
    if args.tflops:
        return print_cost(args.tflops)
    ours = DualEncoder.create("report", "random", random_captions(500))
    plain, half = PlainRecipe(ours.to(choose_device(args.device))), args.pairs // 2
    print(machine(ours.device))
    mixed = [10.0] * half + torch.linspace(15, 30, args.pairs - half).tolist()
    for label, durations_s in ("mixed", mixed), ("all 10 s", [10.0] * args.pairs):
        print(f"a step, {args.pairs} pairs, {label}")
        compare(args.rounds, step_of(durations_s, ours, plain))
    print(f"embedding, {args.clips} clips")
    compare_embedding(args.clips, ours, plain, args.rounds)


if __name__ == "__main__":
    main()
