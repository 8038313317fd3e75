"""The peak memory of a training step and of embedding, predicted without a GPU.

    python benchmarks/memory.py     # the table, in some ten minutes
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py --measure fp32    # on a CPU; 10 GiB

64 pairs, half of the clips of 10 s and half of 15 to 30 s. The step is taken on tensors without
memory, whose storages are noted as they come and go; malloc is told to give back what is freed.
"""

import contextlib
import resource
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from measure import batch_of, options, random_clips
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.model import PRECISIONS, DualEncoder

PAIRS, TOKENS, FAKE = 64, 24, FakeTensorMode(allow_non_fake_inputs=True)
CLIPS, CAPTIONS = 3839, 19_195  # of Clotho's training split, which the teachers have embedded
CARDS, SPARE = (8, 11, 16, 24, 40, 80), 1  # GiB; for CUDA itself, cuBLAS and fragmentation
DURATIONS = np.where(np.arange(PAIRS) % 2, 10, np.random.default_rng(0).uniform(15, 30, PAIRS))
BATCH = batch_of(random_clips(DURATIONS), torch.full((PAIRS, TOKENS), 5))
KERNELS = {  # as a GPU's: attention is fused, with dropout and a mask, too; dropout keeps bytes
    "scaled_dot_product_attention": lambda q, k, v, *_, **__:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "dropout": lambda x, p, training, *_: torch.native_dropout(x, p, training)[0],
}


class Peak(TorchDispatchMode):
    """The bytes of all storages that live, and their highest sum."""

    def __init__(self):
        super().__init__()
        self.living, self.highest = {}, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)]:
            if storage._cdata not in self.living:
                self.living[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.living.pop, storage._cdata)
                self.highest = max(self.highest, sum(self.living.values()))
        return out


def training_step(precision: torch.dtype | None, pieces: list, teachers: int = 0) -> None:
    """One step, AdamW's state being in place."""
    model = DualEncoder.create("report", "random", ["a dog"]).train()
    model.precision = precision
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    embedded = [(torch.ones(CLIPS, 1024), torch.ones(CAPTIONS, 1024)) for _ in range(teachers)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch = SimpleNamespace(inputs=BATCH.inputs, pieces=lambda _: pieces)  # it reads values
    audio, text = model.encode_pairs(batch, len(pieces) if len(pieces) > 1 else None)
    loss = contrastive_loss(audio, text, BATCH.clip_ids, model.tau)
    if teachers:
        theirs = [[side[BATCH.clip_ids] for side in sides] for sides in zip(*embedded, strict=True)]
        loss = loss + distillation_loss(audio, text, *theirs, model.tau)
    loss.backward()
    optimizer.step()


def embedding(precision: torch.dtype | None) -> None:
    """Of as many clips of 30 s and captions as are embedded together."""
    model = DualEncoder.create("report", "random", ["a dog"]).eval()
    model.precision = precision
    with torch.no_grad():
        model.encode_audio(torch.zeros(24, 320_000), torch.full((8,), 3))
        model.encode_text(torch.full((64, 32), 5))


def predicted(work, precision: torch.dtype | None, *arguments, as_gpu: bool = True) -> float:
    """In GiB."""
    if as_gpu and precision == torch.bfloat16:
        precision = torch.float16  # as large; in bf16 on a CPU our attention is written out
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "item", lambda _: 0))
        for name, kernel in KERNELS.items() if as_gpu else ():
            stack.enter_context(mock.patch.object(F, name, kernel))
        stack.enter_context(FAKE)
        peak = stack.enter_context(Peak())
        work(precision, *arguments)
    moved = BATCH.segments.nbytes * (work is training_step and as_gpu)  # not a pretended tensor
    return (peak.highest + moved) / 2**30


def main():
    if name := options(__doc__, measure="").measure:
        step = training_step, PRECISIONS[name], list(BATCH.pieces(8))
        before = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
        training_step(*step[1:])
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        return print(f"{name} on a CPU, pieces of 8: {peak:.2f} GiB more than before the step, "
                     f"{predicted(*step, as_gpu=False):.2f} were predicted")
    print(f"{PAIRS} pairs ({len(BATCH.segments)} segments, {TOKENS} tokens), predicted, in GiB")
    rows = [(f"stage {stage}, pieces of {n}", training_step, list(BATCH.pieces(n)), teachers)
            for stage, teachers in ((1, 0), (2, 4)) for n in (64, 32, 16, 8, 4)]
    for name in ("bf16", "fp32"):
        for label, work, *arguments in [*rows, ("embedding", embedding)]:
            peak = predicted(work, PRECISIONS[name], *arguments)
            card = next(size for size in CARDS if size >= peak + SPARE)
            print(f"{name}  {label:24}{peak:7.1f}   a card of {card} GB", flush=True)


if __name__ == "__main__":
    main()
