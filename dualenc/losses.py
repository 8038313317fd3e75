"""The two training losses (report, section 2), and gathering embeddings over processes.

Shapes: B pairs of the whole batch, D embedding values, M teachers. Embeddings have unit norm, so
their products are cosines. All is computed in float32.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def similarities(audio: Tensor, text: Tensor, tau: Tensor | float = 1.0) -> Tensor:
    """(N, D), (Q, D) -> (N, Q) float32 cosines / tau."""
    # Dividing before the product rounds less than dividing the logits, which reach 1 / tau.
    return (audio.float() / tau) @ text.float().T


def contrastive_loss(audio: Tensor, text: Tensor, clip_ids: Tensor, tau: Tensor | float) -> Tensor:
    """L = H(p, q) of section 2, as the baseline fills it in.

    The mean of -log softmax over all pairs of the batch that belong to the same clip, averaged over
    the two directions: over the captions of each clip and over the clips of each caption.

    Args:
        audio, text: (B, D), row i of each is pair i.
        clip_ids: (B,) integers; equal where two pairs show the same clip.
        tau: temperature.
    """
    logits = similarities(audio, text, tau)
    same_clip = (clip_ids[:, None] == clip_ids[None, :]).float()
    # Both directions at once; a product, since to select entries would be to wait for a GPU.
    log_q = logits.log_softmax(dim=1) + logits.log_softmax(dim=0)
    return -(log_q * same_clip).sum() / same_clip.sum() / 2


def distillation_loss(
    audio: Tensor,
    text: Tensor,
    teacher_audio: Tensor | Sequence[Tensor],
    teacher_text: Tensor | Sequence[Tensor],
    tau: Tensor | float,
) -> Tensor:
    """L_distill of section 2: H(p^, q), with p^ from the teachers' mean cosines.

    The report prints H(p^, p^), a constant for the student; Primus et al. (DCASE 2024 workshop)
    give H(p^, q), q being the student's softmax; averaged over the two directions.

    Args:
        audio, text: (B, D), the student's.
        teacher_audio, teacher_text: (M, B, D), or M tensors (B, D_m): widths may differ.
        tau: temperature, of the student and of the teachers.
    """
    student = similarities(audio, text, tau)
    each = [similarities(a, t, tau) for a, t in zip(teacher_audio, teacher_text, strict=True)]
    teacher = torch.stack(each).mean(dim=0).detach()

    def cross_entropy(dim: int) -> Tensor:
        return -(teacher.softmax(dim) * student.log_softmax(dim)).sum(dim).mean()

    return (cross_entropy(0) + cross_entropy(1)) / 2


class _Gather(torch.autograd.Function):
    """All processes' rows, in rank order. The gradient is summed over the processes' losses."""

    @staticmethod
    def forward(ctx, local: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = local.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()], None


def gather(local: Tensor, sizes: list[int]) -> Tensor:
    """Embeddings of this process -> those of all processes, with their gradients.

    Args:
        local: (B_r, ..., D), this process's rows; B_r may be 0.
        sizes: B_r of every process; they sum to B.

    Returns:
        (B, ..., D). With one process, local itself.
    """
    return local if len(sizes) == 1 else _Gather.apply(local, sizes)
