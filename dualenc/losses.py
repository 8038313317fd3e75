"""The two training losses (report, section 2), and gathering embeddings over processes.

B pairs of the whole batch, D embedding values, M teachers. Embeddings have unit norm, so their
products are cosines. All is computed in float32.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def similarities(audio: Tensor, text: Tensor, tau: Tensor | float) -> Tensor:
    """Compare all sounds with all captions: (N, D), (Q, D) -> (N, Q) float32 cosines / tau."""
    # Dividing before the product rounds less than dividing the logits, which reach 1 / tau.
    return (audio.float() / tau) @ text.float().T


def contrastive_loss(audio: Tensor, text: Tensor, clip_ids: Tensor, tau: Tensor | float) -> Tensor:
    """Compute L_contrastive = H(p, q) of section 2, as the baseline fills it in.

    It is the mean of -log softmax over all pairs of the batch that belong to the same clip,
    averaged over the two directions: over the captions of each clip and over the clips of each
    caption.

    Args:
        audio, text: (B, D), row i of each is pair i.
        clip_ids: (B,) integers; equal where two pairs show the same clip.
    """
    logits = similarities(audio, text, tau)
    same_clip = (clip_ids[:, None] == clip_ids[None, :]).float()
    # Multiply by the mask: boolean indexing would force a GPU sync.
    log_q = logits.log_softmax(dim=1) + logits.log_softmax(dim=0)
    return -(log_q * same_clip).sum() / same_clip.sum() / 2


def distillation_loss(
    audio: Tensor, text: Tensor, teacher_audio: Tensor | Sequence[Tensor],
    teacher_text: Tensor | Sequence[Tensor], tau: Tensor | float,
) -> Tensor:
    """Compute L_distill of section 2: H(p^, q), with p^ from the teachers' mean cosines.

    The report prints H(p^, p^), a constant for the student; Primus et al. (DCASE 2024 workshop)
    give H(p^, q), q being the student's softmax; averaged over the two directions.

    Args:
        audio, text: (B, D), the student's.
        teacher_audio, teacher_text: (M, B, D), or M tensors (B, D_m): widths may differ.
    """
    student = similarities(audio, text, tau)
    teacher_logits = [
        similarities(one_audio, one_text, tau)
        for one_audio, one_text in zip(teacher_audio, teacher_text, strict=True)
    ]
    teacher = torch.stack(teacher_logits).mean(dim=0).detach()

    def cross_entropy(dim: int) -> Tensor:
        return -(teacher.softmax(dim) * student.log_softmax(dim)).sum(dim).mean()

    return (cross_entropy(0) + cross_entropy(1)) / 2


def gather(share: Tensor) -> Tensor:
    """Gather the embeddings of all processes in rank order: (B_r, D) -> (B, D).

    Every process computes the loss of the whole batch, and its gradient flows into its own rows
    only: summed over processes, that is the gradient of one process with all of them. Every B_r is
    the same.
    """
    if not dist.is_initialized():
        return share
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share.detach().contiguous())
    parts[dist.get_rank()] = share
    return torch.cat(parts)
