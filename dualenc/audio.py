"""Waveform -> 10 s segments -> log-mel -> PaSST (report, sections 4 and 5).

n samples at 32 kHz, C clips, S segments of 10 s, T = 1000 frames of a segment, W = 768, PaSST's
width.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import Tensor, nn

from dualenc.decoding import INT16_SCALE, SAMPLE_RATE
from dualenc.decoding import load_audio as load_audio  # Users call it dualenc.audio.load_audio.

SEGMENT_SECONDS = 10
SEGMENT_SAMPLES = SEGMENT_SECONDS * SAMPLE_RATE  # 320,000
MAX_SEGMENTS = 3
CLIP_SAMPLES = MAX_SEGMENTS * SEGMENT_SAMPLES  # 960,000: 30 s, as in section 4
MIN_REMAINDER = SAMPLE_RATE // 10  # 3,200: a shorter remainder, under 0.1 s, is dropped
HOP_SAMPLES = 320  # 10 ms
SEGMENT_FRAMES = SEGMENT_SAMPLES // HOP_SAMPLES  # 1000
MEL_BANDS = 128

# Segments computed at a time. A CPU's caches hold the spectra of one segment, or PaSST's
# activations of two: in PaSST a segment takes 0.15 s in chunks of two, 0.21 s in chunks of 24 (the
# report's sizes, bf16).
CPU_LOG_MEL_CHUNK = 1
CPU_PASST_CHUNK = 2
GPU_CHUNK = 64


# --- Waveform -> segments (section 4, "segment handling" and "chunking") ---

def crop(waveform: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Crop to 30 s, at random with a generator, else the first: (n,) -> (at most 960000,)."""
    excess = len(waveform) - CLIP_SAMPLES
    if excess <= 0:
        return waveform
    start = 0
    if rng is not None:
        start = int(rng.integers(excess + 1))
    return waveform[start : start + CLIP_SAMPLES]


def segment_count(samples: int) -> int:
    """Return how many 10 s segments a sound of so many samples is cut into: at least one."""
    full, remainder = divmod(samples, SEGMENT_SAMPLES)
    if full == 0 or remainder >= MIN_REMAINDER:
        return full + 1
    return full


def to_segments(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Cut C waveforms (n,) into segments (S, 320000), and count those of each clip: (C,).

    The counts sum to S. The report pads short clips to 30 s; here only a clip's last segment is
    padded, so that no segment of zeros alone enters the mean over the clip.
    """
    counts = [segment_count(len(waveform)) for waveform in waveforms]
    segments = np.zeros((sum(counts), SEGMENT_SAMPLES), waveforms[0].dtype)
    first = 0
    for waveform, count in zip(waveforms, counts, strict=True):
        padded = segments[first : first + count].reshape(-1)  # a view, (count * 320000,)
        waveform = waveform[: len(padded)]  # without a remainder under MIN_REMAINDER
        padded[: len(waveform)] = waveform
        first += count
    return torch.from_numpy(segments), torch.tensor(counts)


# --- Segments -> log-mel (section 4, "spectrogram extraction") ---

@functools.lru_cache(8)
def _mel_filters(fmin: float, fmax: float, device: torch.device) -> Tensor:
    """Make Kaldi's triangular filters (128, 513), with zeros for the Nyquist bin that they lack."""
    kaldi = torchaudio.compliance.kaldi
    # get_mel_banks asks for a warping of frequencies, but a factor of 1 warps nothing.
    warp = dict(vtln_low=100.0, vtln_high=-500.0, vtln_warp_factor=1.0)
    with device:  # get_mel_banks makes its tensors there
        filters, _ = kaldi.get_mel_banks(MEL_BANDS, 1024, SAMPLE_RATE, fmin, fmax, **warp)
    return F.pad(filters, (0, 1))


class LogMel(AugmentMelSTFT):
    """hear21passt's log-mel, in chunks; outside training its filters are kept.

    In training the lowest and the highest frequency of the filters are drawn anew at each call,
    from 0 to 9 Hz and from 14 to 16 kHz. Masking of frequencies and times (SpecAugment) is off, as
    in the official DCASE 2025 baseline.
    """

    def __init__(self):
        super().__init__(
            n_mels=MEL_BANDS, sr=SAMPLE_RATE, win_length=800, hopsize=HOP_SAMPLES, n_fft=1024,
            freqm=0, timem=0, fmin=0.0, fmax=15_000, fmin_aug_range=10, fmax_aug_range=2000,
        )

    def forward(self, segments: Tensor) -> Tensor:
        """Compute the log-mel spectrograms of segments: (S, 320000) -> (S, 128, T), float32."""
        fmin, fmax = self.fmin, self.fmax
        if self.training:
            # Both are drawn in hear21passt's order, so that a seed gives the same spectrogram.
            fmin += torch.randint(self.fmin_aug_range, (1,)).item()
            fmax += self.fmax_aug_range // 2 - torch.randint(self.fmax_aug_range, (1,)).item()
        filters = _mel_filters(fmin, fmax, segments.device)
        chunk_size = CPU_LOG_MEL_CHUNK if segments.device.type == "cpu" else GPU_CHUNK
        chunks = segments.split(chunk_size)
        return torch.cat([self._log_mel(chunk, filters) for chunk in chunks])

    def _log_mel(self, segments: Tensor, filters: Tensor) -> Tensor:
        emphasised = segments[:, 1:] - 0.97 * segments[:, :-1]
        sizes = self.n_fft, self.hopsize, self.win_length
        spectrum = torch.stft(emphasised, *sizes, self.window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return ((filters @ power + 1e-5).log() + 4.5) / 5


# --- Log-mel -> PaSST with patchout (section 5, "PaSST") ---

class PatchProjection(nn.Module):
    """PaSST's patch embedding, written as a matrix product since patches do not overlap.

    Its weights have a convolution's names and shapes, so that published ones load unchanged. It is
    faster than the convolution, which on a CPU with AMX even asks for 266 GB of memory for the tiny
    preset's patches of 128 bands in bf16.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight = convolution.weight  # (W, 1, bands, frames)
        self.bias = convolution.bias  # (W,)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Embed patches: (S, 1, 128, T) -> (S, W, rows, columns).

        The last frames, which fill no patch, are left out: 8 of 1000 with patches of 16.
        """
        bands, frames = self.weight.shape[2:]
        patches = log_mel.squeeze(1).unfold(1, bands, bands).unfold(2, frames, frames)
        patches = patches.flatten(3)  # (S, rows, columns, bands * frames)
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)  # (S, rows, columns, W)
        return embedded.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """hear21passt's attention with the same weights and a fused kernel, up to 9 times as fast.

    In bf16 on a CPU the fused kernel is slower (48 ms a block against 20 ms), so attention is
    written out there.
    """

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.heads = plain.num_heads
        self.qkv = plain.qkv
        self.proj = plain.proj

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every patch to all patches of its segment: (S, patches, W) -> the same."""
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
        patchout: (rows, columns) of the patch grid left out in training, drawn anew in each
            forward pass.
    """

    def __init__(
        self, width: int, depth: int, heads: int, patch: tuple[int, int], patchout: tuple[int, int]
    ):
        super().__init__()
        # This part of hear21passt is imported here, since it loads timm and torchvision, for which
        # --help and the refusal of bad input need not wait.
        from hear21passt.models import passt

        passt.first_RUN = False  # Otherwise hear21passt prints every shape of its first forward.
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
        # With head_dist None, hear21passt would take this for a PaSST without distillation token.
        self.passt.head_dist = nn.Identity()

    def forward(self, segments: Tensor) -> Tensor:
        """Encode segments: (S, 320000) int16, or float in -1..1 -> (S, W).

        PaSST's features are the mean of its class token and its distillation token, the second
        class token of DeiT (Touvron et al., 2021), which has nothing to do with the report's stage
        of distillation.
        """
        if segments.dtype == torch.int16:
            segments = segments.float() / INT16_SCALE
        with torch.autocast(segments.device.type, enabled=False):
            log_mel = self.mel(segments)
        log_mel = log_mel.unsqueeze(1)  # (S, 1, 128, T): PaSST takes images of one channel
        if self.training:
            # All segments go at once, since patchout is drawn once for all of them. It is drawn on
            # their device, since drawing on the CPU would force a GPU sync.
            with log_mel.device:
                _, features = self.passt(log_mel)
            return features
        # Without patchout a segment's features do not depend on its neighbours.
        chunk_features = []
        chunk_size = CPU_PASST_CHUNK if log_mel.device.type == "cpu" else GPU_CHUNK
        for chunk in log_mel.split(chunk_size):
            _, features = self.passt(chunk)
            chunk_features.append(features)
        return torch.cat(chunk_features)
