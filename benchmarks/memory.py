"""The peak memory of a training step and of embedding, predicted without a GPU.

    python benchmarks/memory.py    # the table, in some ten minutes; on a GPU it is also measured
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py --measure fp32    # on a CPU; 10 GiB

64 pairs. On Clotho the clips last 15 to 30 s; on both sets half of them last 10 s, as AudioCaps'.
To predict, the step is taken on tensors without memory, whose storages are noted as they come and
go. (malloc is told to give back what is freed.)
"""

import contextlib
import gc
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from measure import (
    CLOTHO_CLIPS, CLOTHO_PAIRS, PAIRS, TOKENS, batch_of, machine, options, random_clips,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualenc.data import Batch
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import PRECISIONS, DualEncoder, choose_device

PIECES = (64, 32, 16, 8, 4)  # pairs encoded at a time; 64 is the whole batch
TEACHERS = 4
CARDS = (8, 11, 16, 24, 40, 80)  # GiB of the cards that people have, which are sold as so many GB
SPARE = 1  # GiB for CUDA itself, cuBLAS and fragmentation
GIB = 2**30
# One for all predictions, since the mel filters are kept between them.
WITHOUT_MEMORY = FakeTensorMode(allow_non_fake_inputs=True)


def make_batch(durations_s: np.ndarray) -> Batch:
    return batch_of(random_clips(durations_s.tolist()), torch.full((PAIRS, TOKENS), 5))


CLOTHO_SECONDS = np.random.default_rng(0).uniform(15, 30, PAIRS)
CLOTHO = make_batch(CLOTHO_SECONDS)
BOTH_SETS = make_batch(np.where(np.arange(PAIRS) % 2, 10, CLOTHO_SECONDS))


# --- The work whose memory is told ---

def make_model(precision: torch.dtype | None, device: str) -> DualEncoder:
    model = DualEncoder.create("report", "random", ["a dog"])
    model.precision = precision
    if device != "cpu":  # Tensors without memory are made on the CPU, and cannot be moved.
        model.to(device)
    return model


def training_step(
    precision: torch.dtype | None, batch: Batch, pieces: list[Batch], teachers: int,
    device: str = "cpu",
) -> None:
    """Make one step of the report's model, AdamW's state being there already."""
    model = make_model(precision, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    teacher_audio = [torch.ones(CLOTHO_CLIPS, 1024, device=device) for _ in range(teachers)]
    teacher_text = [torch.ones(CLOTHO_PAIRS, 1024, device=device) for _ in range(teachers)]

    # The batch is cut into pieces beforehand: that reads values, which not every tensor here has.
    cut_batch = SimpleNamespace(inputs=batch.inputs, pieces=lambda pairs: pieces)
    micro_batch = len(pieces[0].tokens) if len(pieces) > 1 else None
    audio, text = model.encode_pairs(cut_batch, micro_batch)
    clip_ids = batch.clip_ids.to(device)
    loss = contrastive_loss(audio, text, clip_ids, model.tau)
    if teachers:
        batch_audio = [embeddings[clip_ids] for embeddings in teacher_audio]
        batch_text = [embeddings[clip_ids] for embeddings in teacher_text]
        loss = loss + distillation_loss(audio, text, batch_audio, batch_text, model.tau)
    loss.backward()
    optimizer.step()


def embedding(precision: torch.dtype | None, device: str = "cpu") -> None:
    """Embed as many clips of 30 s and captions as are embedded together."""
    model = make_model(precision, device).eval()
    with torch.no_grad():
        segments = torch.zeros(24, 320_000, device=device)
        model.encode_audio(segments, torch.full((8,), 3, device=device))
        model.encode_text(torch.full((64, 32), 5, device=device))


# --- Predicted ---

class Peak(TorchDispatchMode):
    """A counter of the bytes of all living storages, which keeps their highest sum."""

    def __init__(self):
        super().__init__()
        self.living: dict[int, int] = {}  # bytes by storage
        self.highest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.living:
            return
        self.living[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.living.pop, storage._cdata)
        self.highest = max(self.highest, sum(self.living.values()))


def fused_attention(q, k, v, *args, **kwargs):
    """Stand in for a GPU's kernel, which is fused with dropout and a mask, too."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def dropout_with_mask(x, p, training, *args):
    """Stand in for a GPU's dropout, which keeps a byte for each value."""
    return torch.native_dropout(x, p, training)[0]


def predict(work: Callable, precision: torch.dtype | None, *arguments, as_gpu: bool = True):
    """Return the peak in GiB, of a GPU's kernels or of a CPU's."""
    if as_gpu and precision == torch.bfloat16:
        precision = torch.float16  # as large; attention in bf16 is written out on a CPU alone
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "item", lambda _: 0))
        if as_gpu:
            attention = "scaled_dot_product_attention"
            stack.enter_context(mock.patch.object(F, attention, fused_attention))
            stack.enter_context(mock.patch.object(F, "dropout", dropout_with_mask))
        stack.enter_context(WITHOUT_MEMORY)
        peak = stack.enter_context(Peak())
        work(precision, *arguments)
    highest = peak.highest
    if as_gpu and work is training_step:
        batch, *_ = arguments
        highest += batch.segments.nbytes  # a real tensor here, a copy of it on a GPU
    return highest / GIB


# --- Measured ---

def measure_cuda(work: Callable, precision: torch.dtype | None, *arguments) -> float:
    """Return the peak in GiB of what torch allocates on the GPU."""
    gc.collect()  # The step before may still hold its model.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        work(precision, *arguments, device="cuda")
    except torch.OutOfMemoryError:
        return float("inf")
    return torch.cuda.max_memory_allocated() / GIB


def measure_cpu(precision: torch.dtype | None) -> float:
    """Return the peak in GiB by which this process grows in a step in pieces of 8 pairs."""
    status = Path("/proc/self/status").read_text()
    before_kib = int(status.split("VmRSS:")[1].split()[0])
    training_step(precision, BOTH_SETS, list(BOTH_SETS.pieces(8)), 0)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak_kib - before_kib) * 1024 / GIB


def main() -> None:
    args = options(__doc__, measure="", device="auto")
    if args.measure:
        precision = PRECISIONS[args.measure]
        measured = measure_cpu(precision)
        pieces = list(BOTH_SETS.pieces(8))
        predicted = predict(training_step, precision, BOTH_SETS, pieces, 0, as_gpu=False)
        print(f"{args.measure} on a CPU, pieces of 8: {measured:.2f} GiB more than before the step,"
              f" {predicted:.2f} were predicted")
        return

    device = choose_device(args.device)
    print(f"{PAIRS} pairs of {TOKENS} tokens; {len(CLOTHO.segments)} segments of Clotho, "
          f"{len(BOTH_SETS.segments)} of both sets; GiB, predicted")
    pieces_of = PIECES
    precisions = ["bf16", "fp32"]
    if device.type == "cuda":
        print(f"and measured on {machine(device)}")
        # A prediction takes half a minute of the CPU, for which a rented GPU would wait.
        pieces_of = (64, 8)
        precisions = ["bf16"]
    works = []
    for data, batch, teachers in (
        ("stage 1, both sets", BOTH_SETS, 0), ("stage 1, Clotho", CLOTHO, 0),
        ("stage 2, Clotho", CLOTHO, TEACHERS),
    ):
        for pairs in pieces_of:
            label = f"{data}, pieces of {pairs}"
            works.append((label, training_step, batch, list(batch.pieces(pairs)), teachers))
    works.append(("embedding", embedding))
    for name in precisions:
        for label, work, *arguments in works:
            predicted = predict(work, PRECISIONS[name], *arguments)
            line = f"{name}  {label:34}{predicted:7.1f}"
            if device.type == "cuda":
                line += f"{measure_cuda(work, PRECISIONS[name], *arguments):7.1f}"
            card = next(size for size in CARDS if size >= predicted + SPARE)
            print(f"{line}   a card of {card} GB", flush=True)


if __name__ == "__main__":
    main()
