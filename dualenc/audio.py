"""Waveform -> 10 s segments -> log-mel -> PaSST (report, sections 4 and 5).

n samples at 32 kHz, S segments of 10 s, F = 1000 frames of a segment, W = 768 values.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from hear21passt.models import passt
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import Tensor, nn

from dualenc.decoding import INT16_SCALE, SAMPLE_RATE
from dualenc.decoding import load_audio as load_audio

SEGMENT_SECONDS = 10
SEGMENT_SAMPLES = SEGMENT_SECONDS * SAMPLE_RATE  # 320,000
MAX_SEGMENTS = 3  # of one clip, as in section 4: 30 s
CLIP_SAMPLES = MAX_SEGMENTS * SEGMENT_SAMPLES  # 960,000
MIN_REMAINDER = SAMPLE_RATE // 10  # 0.1 s: less than this after a full segment is dropped
HOP_SAMPLES = 320  # 10 ms
SEGMENT_FRAMES = SEGMENT_SAMPLES // HOP_SAMPLES  # 1000
MEL_BANDS = 128


# --- Waveform -> segments (section 4, "segment handling" and "chunking") ---

def crop(waveform: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """(n,) -> (at most 960,000,): a random 30 s in training, the first 30 s without a generator."""
    excess = len(waveform) - CLIP_SAMPLES
    if excess <= 0:
        return waveform
    start = 0 if rng is None else int(rng.integers(excess + 1))
    return waveform[start : start + CLIP_SAMPLES]


def to_segments(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """C waveforms (n,) -> the segments of all (S, 320000), and how many each has (C,).

    Each is zero-padded in its last segment only: silence is never computed. A remainder of less
    than 0.1 s after a full segment is dropped.
    """
    counts = [max(1, 1 + (len(w) - MIN_REMAINDER) // SEGMENT_SAMPLES) for w in waveforms]
    segments = np.zeros((sum(counts), SEGMENT_SAMPLES), waveforms[0].dtype)
    for waveform, own in zip(waveforms, np.split(segments, np.cumsum(counts)[:-1]), strict=True):
        own.reshape(-1)[: len(waveform)] = waveform[: own.size]
    return torch.from_numpy(segments), torch.tensor(counts)


# --- Segments -> log-mel (section 4, "spectrogram extraction") ---

@functools.lru_cache(8)
def _mel_filters(fmin: float, fmax: float, device: torch.device) -> Tensor:
    """(128, 513): Kaldi's triangular filters; the Nyquist bin, which it leaves out, weighs zero."""
    warp = dict(vtln_low=100.0, vtln_high=-500.0, vtln_warp_factor=1.0)  # none
    kaldi = torchaudio.compliance.kaldi
    with device:
        filters, _ = kaldi.get_mel_banks(MEL_BANDS, 1024, SAMPLE_RATE, fmin, fmax, **warp)
    return F.pad(filters, (0, 1))


class LogMel(AugmentMelSTFT):
    """PaSST's own log-mel with its outputs unchanged; its filters are not computed at every call.

    Frequency and time masking are off, as in the baseline; fmin and fmax jitter in training.
    """

    def __init__(self):
        super().__init__(
            n_mels=MEL_BANDS, sr=SAMPLE_RATE, win_length=800, hopsize=HOP_SAMPLES, n_fft=1024,
            freqm=0, timem=0, fmin=0.0, fmax=15_000, fmin_aug_range=10, fmax_aug_range=2000,
        )

    def forward(self, segments: Tensor) -> Tensor:
        """(S, 320000) float32 -> (S, 128, F) float32."""
        fmin, fmax = self.fmin, self.fmax
        if self.training:  # as hear21passt draws: the same seed gives the same spectrogram
            fmin += torch.randint(self.fmin_aug_range, (1,)).item()
            fmax += self.fmax_aug_range // 2 - torch.randint(self.fmax_aug_range, (1,)).item()
        filters = _mel_filters(fmin, fmax, segments.device)
        # A CPU's caches hold the spectra of one segment.
        chunks = segments.split(1 if segments.device.type == "cpu" else 64)
        return torch.cat([self._log_mel(chunk, filters) for chunk in chunks])

    def _log_mel(self, segments: Tensor, filters: Tensor) -> Tensor:
        emphasised = segments[:, 1:] - 0.97 * segments[:, :-1]
        sizes = self.n_fft, self.hopsize, self.win_length
        spectrum = torch.stft(emphasised, *sizes, self.window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return ((filters @ power + 1e-5).log() + 4.5) / 5


# --- Log-mel -> PaSST with patchout (section 5, "PaSST") ---

class PatchProjection(nn.Module):
    """PaSST's patch embedding as the matrix product that it is: kernel and stride are equal.

    Its weights have a convolution's names and shapes, so that published ones load unchanged. It is
    faster than the convolution, which moreover asks for 266 GB where a CPU with AMX is to compute
    patches of 128 bands in bf16.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight = convolution.weight  # (W, 1, bands, frames)
        self.bias = convolution.bias  # (W,)

    def forward(self, log_mel: Tensor) -> Tensor:
        """(S, 1, 128, F) -> (S, W, rows, columns); frames that fill no patch are left out."""
        bands, frames = self.weight.shape[2:]
        patches = log_mel.squeeze(1).unfold(1, bands, bands).unfold(2, frames, frames)
        patches = patches.flatten(3)  # (S, rows, columns, bands * frames)
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)  # (S, rows, columns, W)
        return embedded.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """An attention block of hear21passt's with the same weights, by the faster way.

    That is the fused kernel (up to 9 times), but for bf16 on a CPU (20 ms a block against 48).
    """

    def __init__(self, plain: passt.Attention):
        super().__init__()
        self.heads, self.qkv, self.proj = plain.num_heads, plain.qkv, plain.proj

    def forward(self, x: Tensor) -> Tensor:
        """(S, patches, W) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            attention = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            attended = attention.softmax(dim=-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class AudioTower(nn.Module):
    """PaSST (Koutini et al., Interspeech 2022) from hear21passt, without its classifiers.

    Args:
        patch: (mel bands, frames) of one patch; neighbouring patches do not overlap.
        patchout: (rows, columns) of the patch grid left out in training, drawn per batch.
    """

    def __init__(
        self, width: int, depth: int, heads: int, patch: tuple[int, int], patchout: tuple[int, int]
    ):
        super().__init__()
        passt.first_RUN = False  # else hear21passt prints every shape of its first forward
        self.mel = LogMel()
        self.passt = passt.PaSST(
            img_size=(MEL_BANDS, SEGMENT_FRAMES), patch_size=patch, stride=patch, embed_dim=width,
            depth=depth, num_heads=heads, s_patchout_f=patchout[0], s_patchout_t=patchout[1],
            num_classes=1, distilled=True,
        )
        self.passt.patch_embed.proj = PatchProjection(self.passt.patch_embed.proj)
        for block in self.passt.blocks:
            block.attn = Attention(block.attn)
        self.passt.head = nn.Identity()
        self.passt.head_dist = nn.Identity()  # not None: the distillation token stays in use

    def forward(self, segments: Tensor) -> Tensor:
        """(S, 320000) int16, or float in -1..1 -> (S, W): class and distillation token averaged."""
        if segments.dtype == torch.int16:
            segments = segments.float() / INT16_SCALE
        with torch.autocast(segments.device.type, enabled=False):
            log_mel = self.mel(segments)
        if self.training:  # together: patchout is drawn once for all
            with log_mel.device:  # where it is to draw, or a GPU would be waited for
                return self.passt(log_mel.unsqueeze(1))[1]
        # Without gradients, two segments at a time take 0.15 s each on a CPU, 24 take 0.21 (bf16).
        chunks = log_mel.unsqueeze(1).split(2 if log_mel.device.type == "cpu" else 64)
        return torch.cat([self.passt(chunk)[1] for chunk in chunks])
