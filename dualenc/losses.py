"""The two training losses (report, section 2), and gathering embeddings over processes.

Shapes: B pairs (clip, caption) of the whole batch, B_r of them in this process; N clips;
Q captions; D embedding values; M teachers. Embeddings have unit norm, so their products are
cosines. Everything is computed in float32. "The baseline" is the official one of the DCASE 2025
challenge, task 6.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def similarities(audio: Tensor, text: Tensor, tau: Tensor | float) -> Tensor:
    """Compare all sounds with all captions: (N, D), (Q, D) -> (N, Q) float32 cosines / tau."""
    return (audio.float() / tau) @ text.float().T


def contrastive_loss(audio: Tensor, text: Tensor, clip_ids: Tensor, tau: Tensor | float) -> Tensor:
    """Compute L_contrastive = H(p, q) of section 2.

    The report leaves p open. Here, as in the baseline, entry (i, j) of the (B, B) logits is a match
    if clip i and caption j belong together. Each match gives two values: its -log softmax within
    row i, over all captions, and its -log softmax within column j, over all clips. The loss is the
    mean of these values over all matches, so a row with several matches weighs more than a row
    with one.

    Args:
        audio, text: (B, D), row i of each is pair i.
        clip_ids: (B,) integers; equal where two pairs show the same clip.
    """
    logits = similarities(audio, text, tau)
    # The clip alone decides. Captions that several clips share are kept (section 4), so the same
    # words under another clip count as a negative.
    is_match = (clip_ids[:, None] == clip_ids[None, :]).float()
    log_q_of_captions = logits.log_softmax(dim=1)
    log_q_of_clips = logits.log_softmax(dim=0)
    log_q = (log_q_of_captions + log_q_of_clips) / 2
    # Multiply by the mask: boolean indexing would force a GPU sync.
    return -(log_q * is_match).sum() / is_match.sum()


def distillation_loss(
    audio: Tensor, text: Tensor, teacher_audio: Tensor | Sequence[Tensor],
    teacher_text: Tensor | Sequence[Tensor], tau: Tensor | float,
) -> Tensor:
    """Compute L_distill of section 2: H(p^, q), with p^ from the teachers' mean cosines.

    The report prints H(p^, p^), which does not depend on the student. Primus et al. (DCASE 2024
    workshop) give H(p^, q): q is the softmax of the student's logits, p^ that of the teachers' mean
    logits, with the student's tau in both. The loss is the mean of two directions: for each clip
    the softmax over all captions of the batch, and for each caption the softmax over all clips.

    Args:
        audio, text: (B, D), the student's.
        teacher_audio, teacher_text: (M, B, D), or M tensors (B, D_m): widths may differ.
    """
    student_logits = similarities(audio, text, tau)
    logits_of_teachers = [
        similarities(one_audio, one_text, tau)
        for one_audio, one_text in zip(teacher_audio, teacher_text, strict=True)
    ]
    teacher_logits = torch.stack(logits_of_teachers).mean(dim=0).detach()

    def cross_entropy(dim: int) -> Tensor:
        p_hat = teacher_logits.softmax(dim)
        log_q = student_logits.log_softmax(dim)
        return -(p_hat * log_q).sum(dim).mean()

    return (cross_entropy(0) + cross_entropy(1)) / 2


def gather(share: Tensor) -> Tensor:
    """Gather the embeddings of all processes in rank order: (B_r, D) -> (B, D).

    All processes have equally many pairs. Each computes the loss of the whole batch, but gradients
    reach only the rows that it has embedded itself. Summed over the processes, they are the
    gradients that one process with all B pairs would get.
    """
    if not dist.is_initialized():
        return share
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share.detach().contiguous())
    parts[dist.get_rank()] = share
    return torch.cat(parts)
