"""A training step and embedding, ours against the plain recipe.

    python benchmarks/speed.py                 # in turns with the plain recipe, in one run
    python benchmarks/speed.py --device cuda   # on a GPU also what it reaches, at batch 64

A step is forward, backward and update. Half of the clips last 10 s and half 15 to 30 s, or all
10 s; clips of 15 to 30 s are embedded, with five captions each. All is noise, weights are random.
On a GPU it also prints: TFLOP/s of a step of 64 pairs and its share of what a bf16 matrix product
reaches there, clips and captions embedded a second, and the time that loading a batch takes beside
the time that a step takes.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cost import flop_of_a_step
from measure import (
    PAIRS, TOKENS, batch_of, compare, machine, options, random_captions, random_clips, seconds_of,
    write_noise,
)
from plain import PlainRecipe
from torch import Tensor
from torch.utils.data import DataLoader

from dualenc.data import PairBatches, decode_splits, read_split
from dualenc.decoding import SAMPLE_RATE
from dualenc.losses import contrastive_loss
from dualenc.model import DualEncoder, choose_device
from dualenc.text import tokenize

CAPTIONS_PER_CLIP = 5
PLAIN_BATCH = 12  # pairs that the plain recipe embeds at a time
TAU = 0.05
MATRIX = 8192  # rows and columns of the matrix product that a step is held against


def loss_of(audio: Tensor, text: Tensor) -> Tensor:
    clip_ids = torch.arange(len(audio), device=audio.device)
    return contrastive_loss(audio, text, clip_ids, TAU)


def mixed_durations(pairs: int) -> list[float]:
    """Return durations: half last 10 s, as AudioCaps', the others 15 to 30 s, as Clotho's."""
    half = pairs // 2
    return [10.0] * half + torch.linspace(15, 30, pairs - half).tolist()


# --- In turns with the plain recipe ---

def check_agreement(plain: PlainRecipe, forward_plain: Callable, forward_ours: Callable) -> None:
    """Print how far the embeddings of both lie apart in fp32, without dropout and patchout."""
    plain.eval()  # and ours, which is a part of it
    with torch.no_grad():
        differences = []
        for theirs, ours in zip(forward_plain(None), forward_ours(None), strict=True):
            differences.append((theirs - ours).abs().max().item())
    print(f"  agreement at fp32: embeddings within {max(differences):.1e}", flush=True)
    assert max(differences) < 1e-4


def sides_of(ours: DualEncoder, forward_plain: Callable, forward_ours: Callable) -> dict:
    """Return both sides at fp32, and in bf16 where the processor has instructions for it.

    On a CPU the plain recipe is left out in bf16, which makes it slower there.
    """
    sides = {"plain, fp32": partial(forward_plain, None), "ours, fp32": partial(forward_ours, None)}
    if ours.device.type == "cuda":
        sides["plain, bf16"] = partial(forward_plain, torch.bfloat16)
        sides["ours, bf16"] = partial(forward_ours, torch.bfloat16)
    elif torch.ops.mkldnn._is_mkldnn_bf16_supported():
        sides["ours, bf16"] = partial(forward_ours, torch.bfloat16)
    return sides


def compare_steps(durations_s: list[float], ours: DualEncoder, plain: PlainRecipe, rounds: int):
    clips = random_clips(durations_s)
    captions = random_captions(len(durations_s))
    batch = batch_of(clips, tokenize(ours.tokenizer, captions))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True)  # the weights are shared

    def forward_plain(precision):
        return plain(clips, captions, precision)

    def forward_ours(precision):
        ours.precision = precision
        return ours.encode_pairs(batch)

    def step(forward: Callable) -> None:
        plain.train()
        audio, text = forward()
        loss_of(audio, text).backward()
        optimizer.step()
        plain.zero_grad(set_to_none=True)

    check_agreement(plain, forward_plain, forward_ours)
    forwards = sides_of(ours, forward_plain, forward_ours)
    compare(rounds, {name: partial(step, forward) for name, forward in forwards.items()})


@torch.no_grad()
def compare_embedding(clip_count: int, ours: DualEncoder, plain: PlainRecipe, rounds: int):
    clips = random_clips(torch.linspace(15, 30, clip_count).tolist())
    captions = random_captions(CAPTIONS_PER_CLIP * clip_count)

    def embed_ours(precision):
        ours.precision = precision
        return ours.embed_audio(clips), ours.embed_text(captions)

    def embed_plain(precision):
        """The plain recipe embeds a clip with each of its captions."""
        audio = []
        text = []
        for start in range(0, len(captions), PLAIN_BATCH):
            rows = range(start, min(start + PLAIN_BATCH, len(captions)))
            shown_clips = [clips[row // CAPTIONS_PER_CLIP] for row in rows]
            shown_captions = [captions[row] for row in rows]
            audio_part, text_part = plain(shown_clips, shown_captions, precision)
            audio.append(audio_part.cpu())
            text.append(text_part.cpu())
        return torch.cat(audio)[::CAPTIONS_PER_CLIP], torch.cat(text)

    check_agreement(plain, embed_plain, embed_ours)
    compare(rounds, sides_of(ours, embed_plain, embed_ours))


# --- What a GPU reaches ---

def measure_gpu(ours: DualEncoder, rounds: int, workers: int) -> None:
    """Print what a batch of 64 pairs, the default, reaches in bf16 on this card."""
    ours.precision = torch.bfloat16
    ours.train()
    clips = random_clips(mixed_durations(PAIRS))
    # train.py's batches lie in pinned memory, too.
    batch = batch_of(clips, torch.full((PAIRS, TOKENS), 5)).pin_memory()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> None:
        audio, text = ours.encode_pairs(batch)
        loss_of(audio, text).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds_of(step, rounds=3)  # kernels are chosen and memory is reserved
    step_seconds = seconds_of(step, rounds)
    tflop = sum(flop_of_a_step(len(batch.segments), TOKENS, PAIRS).values()) / 1e12
    reached = tflop / step_seconds
    matrix_tflops = measure_matrix_product(ours.device)
    print(f"  a step: {step_seconds:.3f} s, {tflop:.1f} TFLOP, {reached:.0f} TFLOP/s, "
          f"{reached / matrix_tflops:.0%} of a bf16 matrix product's {matrix_tflops:.0f}")

    ours.eval()
    captions = random_captions(CAPTIONS_PER_CLIP * len(clips))
    ours.embed_audio(clips[:8])
    ours.embed_text(captions[:64])
    audio_seconds = seconds_of(partial(ours.embed_audio, clips), rounds)
    text_seconds = seconds_of(partial(ours.embed_text, captions), rounds)
    print(f"  embedding: {len(clips) / audio_seconds:.0f} clips a second (half of 10 s, half of 15 "
          f"to 30 s), {len(captions) / text_seconds:.0f} captions a second")

    loading_seconds = measure_loading(ours, workers)
    print(f"  loading a batch from the cache with {workers} workers: {loading_seconds:.3f} s, "
          f"computing it {step_seconds:.3f} s", flush=True)


def measure_matrix_product(device: torch.device) -> float:
    """Return the TFLOP/s of a large bf16 matrix product."""
    a = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    b = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    seconds_of(lambda: a @ b, rounds=5)
    return 2 * MATRIX**3 / 1e12 / seconds_of(lambda: a @ b, rounds=20)


def measure_loading(model: DualEncoder, workers: int, steps: int = 20) -> float:
    """Return the seconds between batches of 64 pairs that data workers read from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        sounds = {"rate": SAMPLE_RATE, "channels": 1}
        paths = []
        for name, (shortest_s, longest_s) in {"short": (10, 10), "long": (15, 30)}.items():
            subfolder = Path(folder, name)
            subfolder.mkdir()
            paths += write_noise(subfolder, PAIRS, shortest_s, longest_s, **sounds)
        lines = ["file_name,caption"]
        for path, caption in zip(paths, random_captions(len(paths)), strict=True):
            lines.append(f"{path.relative_to(folder)},{caption}")
        Path(folder, "captions.csv").write_text("\n".join(lines))
        split = read_split(folder, "all", Path(folder))
        decode_splits([split], Path(folder, "cache"))
        batches = PairBatches([split], model.tokenizer, PAIRS)
        # A worker prepares two batches ahead. So many are taken before those that are timed, and
        # left after them, so that all workers have started and none has ended.
        ahead = 2 * workers + 1
        loader = iter(DataLoader(
            batches, batch_size=None, sampler=range(ahead + steps + ahead), num_workers=workers,
            pin_memory=True, multiprocessing_context="fork" if workers > 0 else None,
        ))
        for _ in range(ahead):
            next(loader)
        return seconds_of(partial(next, loader), steps)


def main() -> None:
    args = options(__doc__, pairs=16, clips=12, rounds=3, device="auto", workers=2)
    ours = DualEncoder.create("report", "random", random_captions(500))
    ours.to(choose_device(args.device))
    print(machine(ours.device))
    if ours.device.type == "cuda":
        print(f"{PAIRS} pairs, half of 10 s and half of 15 to 30 s, bf16")
        measure_gpu(ours, args.rounds, args.workers)

    plain = PlainRecipe(ours)
    print(f"a step, {args.pairs} pairs, half of 10 s and half of 15 to 30 s")
    compare_steps(mixed_durations(args.pairs), ours, plain, args.rounds)
    print(f"a step, {args.pairs} pairs, all of 10 s")
    compare_steps([10.0] * args.pairs, ours, plain, args.rounds)
    print(f"embedding, {args.clips} clips and {CAPTIONS_PER_CLIP * args.clips} captions")
    compare_embedding(args.clips, ours, plain, args.rounds)


if __name__ == "__main__":
    main()
