"""The two training losses (report, section 2), and gathering embeddings over processes.

B pairs of the whole batch, D embedding values, M teachers. Embeddings have unit norm, so their
products are cosines. All is computed in float32.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def similarities(audio: Tensor, text: Tensor, tau: Tensor | float) -> Tensor:
    """(N, D), (Q, D) -> (N, Q) float32 cosines / tau."""
    # Dividing before the product rounds less than dividing the logits, which reach 1 / tau.
    return (audio.float() / tau) @ text.float().T


def contrastive_loss(audio: Tensor, text: Tensor, clip_ids: Tensor, tau: Tensor | float) -> Tensor:
    """L_contrastive = H(p, q) of section 2, as the baseline fills it in.

    The mean of -log softmax over all pairs of the batch that belong to the same clip, averaged over
    the two directions: over the captions of each clip and over the clips of each caption.

    Args:
        audio, text: (B, D), row i of each is pair i.
        clip_ids: (B,) integers; equal where two pairs show the same clip.
    """
    logits = similarities(audio, text, tau)
    same_clip = (clip_ids[:, None] == clip_ids[None, :]).float()
    # Both directions at once; a product, since to select entries would be to wait for a GPU.
    log_q = logits.log_softmax(dim=1) + logits.log_softmax(dim=0)
    return -(log_q * same_clip).sum() / same_clip.sum() / 2


def distillation_loss(
    audio: Tensor, text: Tensor, teacher_audio: Tensor | Sequence[Tensor],
    teacher_text: Tensor | Sequence[Tensor], tau: Tensor | float,
) -> Tensor:
    """L_distill of section 2: H(p^, q), with p^ from the teachers' mean cosines.

    The report prints H(p^, p^), a constant for the student; Primus et al. (DCASE 2024 workshop)
    give H(p^, q), q being the student's softmax; averaged over the two directions.

    Args:
        audio, text: (B, D), the student's.
        teacher_audio, teacher_text: (M, B, D), or M tensors (B, D_m): widths may differ.
    """
    student = similarities(audio, text, tau)
    each = [similarities(a, t, tau) for a, t in zip(teacher_audio, teacher_text, strict=True)]
    teacher = torch.stack(each).mean(dim=0).detach()

    def cross_entropy(dim: int) -> Tensor:
        return -(teacher.softmax(dim) * student.log_softmax(dim)).sum(dim).mean()

    return (cross_entropy(0) + cross_entropy(1)) / 2


def gather(own: Tensor) -> Tensor:
    """(B_r, D) of this process -> (B, D) of all, in rank order; every B_r is the same.

    Every process computes the loss of the whole batch, and its gradient flows into its own rows
    only: summed over processes, that is the gradient of one process with all of them.
    """
    if not dist.is_initialized():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)
