"""One training step: its gradient, of the whole batch, in pieces and over processes; its losses.

A contrastive loss compares all pairs of a batch, so it needs all embeddings at once; but once its
gradient with respect to the embeddings is known, each piece of the batch can go through the towers
by itself. Memory is that of one piece and the negatives are those of the whole batch (GradCache,
Gao et al. 2021).

Shapes: B pairs of the whole batch, B_r of this process's part, B_i of one piece of that, D
embedding values.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dualenc import InputError
from dualenc.data import Batch
from dualenc.losses import gather
from dualenc.model import DualEncoder
from dualenc.processes import Processes

# (audio (B, D), text (B, D), clip_ids (B,), pair_ids (B,), tau) -> {"loss": what is minimised, and
# its parts by name}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]
ADVICE = "a lower --max-lr or --precision fp32 may help"
STOPPED = f"stopped, and last.pt is as it was ({ADVICE})"


def step_gradients(
    model: DualEncoder,
    batch: Batch,
    loss_of: Loss,
    processes: Processes,
    seed: tuple[int, int],
    micro_batch: int | None = None,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Add the whole batch's gradient to the parameters' and return the losses, without graph.

    With micro_batch, pieces of so many pairs are embedded twice: without graph, for the loss, and
    again with it, for the gradient. The last piece's graph is kept from the first time, so that a
    batch of one piece is embedded once.

    Args:
        batch: as it was loaded, on the CPU: to cut it on a GPU would be to wait for it.
        seed: (of the run, step): of this step's dropout, patchout and jitter.
        scale: applied to the loss before its gradient is taken (fp16).
    """
    # None where a last batch has fewer pairs than processes.
    pieces = [piece.to(model.device) for piece in batch.pieces(micro_batch)]
    last = len(pieces) - 1
    ids = [ids.to(model.device, non_blocking=True) for ids in (batch.clip_ids, batch.pair_ids)]

    def embed(i: int) -> Tensor:
        # Both times the same random numbers, so that both passes see the same network.
        torch.manual_seed(mixed_seed(*seed, processes.rank, i))
        return embed_pairs(model, pieces[i])

    embedded = [torch.zeros(0, 2, model.config.embedding, device=model.device)]
    for i in range(len(pieces)):
        with torch.set_grad_enabled(i == last):
            embedded.append(embed(i))
    own = torch.cat(embedded).detach().requires_grad_()  # (B_r, 2, D)
    audio, text = gather(own, batch.sizes).unbind(dim=1)
    losses = loss_of(audio, text, *ids, model.tau)
    # Every process computes the whole batch's loss; gradients are summed over processes.
    scale(losses["loss"] / processes.world).backward()

    gradients = own.grad.split([len(piece.tokens) for piece in pieces])
    for i in reversed(range(len(pieces))):
        again = embedded.pop() if i == last else embed(i)
        again.backward(gradients[i])
    if processes.world > 1:
        _sum_gradients(model)
    return {name: value.detach() for name, value in losses.items()}


def embed_pairs(model: DualEncoder, batch: Batch) -> Tensor:
    """(B_i, 2, D): the embedding of each pair's clip, and of its caption.

    They travel as one tensor: of two, one process might gather the other's first.
    """
    audio = model.encode_audio(batch.segments, batch.counts)[batch.clip_of_pair]
    return torch.stack([audio, model.encode_text(batch.tokens)], dim=1)


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, another where any of them differs."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _sum_gradients(model: DualEncoder) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # this process had no pairs
            parameter.grad = torch.zeros_like(parameter)
    for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
        work.wait()


class Losses:
    """The losses of the current epoch's steps, fetched from the device only when they are read."""

    def __init__(self, fetched: list[dict[str, float]]):
        self.fetched = fetched
        self.pending: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        self.pending.append((step, losses))

    def fetch(self) -> list[dict[str, float]]:
        """All of the epoch.

        Raises:
            InputError: names the first step whose loss is not finite.
        """
        for step, losses in self.pending:
            values = {name: value.item() for name, value in losses.items()}
            if not math.isfinite(values["loss"]):
                raise InputError(f"step {step}: the loss is {values['loss']}; {STOPPED}")
            self.fetched.append(values)
        self.pending = []
        return self.fetched

    def mean(self, last: int | None = None) -> dict[str, float]:
        """Over the last so many steps of the epoch, or over all."""
        chosen = self.fetch()[-last:] if last else self.fetch()
        return {name: sum(v[name] for v in chosen) / len(chosen) for name in chosen[0]}
