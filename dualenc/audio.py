"""Waveform -> one vector per 10 s segment (report, sections 4 and 5).

crop -> cut into segments -> log-mel -> PaSST with patchout. How a sound file becomes a waveform
stands in decoding.py.

Shapes: n samples, S segments, F = 1000 frames, W = 768 values (PaSST's width).
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from hear21passt.models import passt
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import Tensor, nn

from dualenc import InputError

SAMPLE_RATE = 32_000  # Hz
SEGMENT_SECONDS = 10
SEGMENT_SAMPLES = SEGMENT_SECONDS * SAMPLE_RATE  # 320,000
MAX_SEGMENTS = 3  # of one clip, as in section 4: 30 s
CLIP_SAMPLES = MAX_SEGMENTS * SEGMENT_SAMPLES  # 960,000
MIN_REMAINDER = SAMPLE_RATE // 10  # 0.1 s: less than this after a full segment is dropped
INT16_SCALE = 32_768  # int16 full scale = 1.0

HOP_SAMPLES = 320  # 10 ms
SEGMENT_FRAMES = SEGMENT_SAMPLES // HOP_SAMPLES  # 1000
MEL_BANDS = 128
MEL_CHUNK = {"cpu": 1, "cuda": 64}  # segments at a time: a CPU's caches hold the spectra of one
TOWER_CHUNK = {"cpu": 2, "cuda": 64}  # without gradients; two take 0.15 s each, 24 take 0.21 (bf16)


# --- Waveform -> segments (section 4, "segment handling" and "chunking") ---


def crop(waveform: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """(n,) -> (at most 960,000,): a random 30 s in training, the first 30 s without a generator."""
    excess = len(waveform) - CLIP_SAMPLES
    if excess <= 0:
        return waveform
    start = 0 if rng is None else int(rng.integers(excess + 1))
    return waveform[start : start + CLIP_SAMPLES]


def segment_count(n_samples: int) -> int:
    """How many segments n samples (of any length) make; a remainder under 0.1 s does not count."""
    full, remainder = divmod(n_samples, SEGMENT_SAMPLES)
    return max(1, full + (remainder >= MIN_REMAINDER))


def cut(waveform: np.ndarray) -> np.ndarray:
    """(n,) -> (S, 320000), zero-padded in the last segment only: silence is never computed."""
    count = segment_count(len(waveform))
    segments = np.zeros((count, SEGMENT_SAMPLES), waveform.dtype)
    used = waveform[: count * SEGMENT_SAMPLES]
    segments.reshape(-1)[: len(used)] = used
    return segments


# --- Segments -> log-mel (section 4, "spectrogram extraction") ---


@functools.lru_cache(maxsize=8)
def _mel_filters(fmin: float, fmax: float, device: torch.device) -> Tensor:
    """(128, 513): Kaldi's triangular filters; the Nyquist bin, which it leaves out, weighs zero."""
    filters, _ = torchaudio.compliance.kaldi.get_mel_banks(
        MEL_BANDS, 1024, SAMPLE_RATE, fmin, fmax, vtln_low=100.0, vtln_high=-500.0,
        vtln_warp_factor=1.0,
    )
    return F.pad(filters, (0, 1)).to(device)


class LogMel(AugmentMelSTFT):
    """PaSST's own log-mel with its outputs unchanged, but for the cost.

    hear21passt computes the filters anew at every call; here they are kept where nothing jitters
    them. Its frequency and time masking are off, as in the baseline; the jitter of fmin and fmax
    stays, in training only.
    """

    def __init__(self):
        super().__init__(
            n_mels=MEL_BANDS, sr=SAMPLE_RATE, win_length=800, hopsize=HOP_SAMPLES, n_fft=1024,
            freqm=0, timem=0, fmin=0.0, fmax=15_000, fmin_aug_range=10, fmax_aug_range=2000,
        )

    def forward(self, segments: Tensor) -> Tensor:
        """(S, 320000) float32 -> (S, 128, 1000) float32."""
        fmin, fmax = self.fmin, self.fmax
        if self.training:
            # Drawn as hear21passt draws, so that the same seed gives the same spectrogram.
            fmin = self.fmin + torch.randint(self.fmin_aug_range, (1,)).item()
            jitter = torch.randint(self.fmax_aug_range, (1,)).item()
            fmax = self.fmax + self.fmax_aug_range // 2 - jitter
        filters = _mel_filters(fmin, fmax, segments.device)
        chunks = segments.split(MEL_CHUNK[segments.device.type])
        return torch.cat([self._log_mel(chunk, filters) for chunk in chunks])

    def _log_mel(self, segments: Tensor, filters: Tensor) -> Tensor:
        emphasised = segments[:, 1:] - 0.97 * segments[:, :-1]
        spectrum = torch.stft(
            emphasised, self.n_fft, self.hopsize, self.win_length, self.window, return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return ((filters @ power + 1e-5).log() + 4.5) / 5


# --- Log-mel -> PaSST (section 5, "PaSST") ---


class Attention(nn.Module):
    """An attention block of hear21passt's with the same weights, by the faster way.

    In bf16 on a CPU the products written out are faster (8 segments with patchout, forward and
    backward: 20 ms a block against 48); elsewhere the kernel, in float32 by a factor of up to 9.
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
        width, depth, heads: the transformer's size.
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
            return self.passt(log_mel.unsqueeze(1))[1]
        chunks = log_mel.unsqueeze(1).split(TOWER_CHUNK[log_mel.device.type])
        return torch.cat([self.passt(chunk)[1] for chunk in chunks])


PASST_NAME = "passt_s_p16_s16_128_ap468"
CLASSIFIER_KEYS = frozenset(
    {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    | {"head_dist.weight", "head_dist.bias"}
)  # AudioSet's 527 classes


def published_passt() -> dict[str, Tensor]:
    """The published PaSST weights, downloaded once into torch's hub folder.

    Raises:
        InputError: they cannot be fetched; says the two ways out.
    """
    url = passt.default_cfgs[PASST_NAME]["url"]
    folder = f"{torch.hub.get_dir()}/checkpoints"
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError
    except OSError as error:
        raise InputError(
            f"PaSST's weights cannot be fetched from {url} ({error}): copy the file into "
            f"{folder}, or go on without with --init random"
        ) from error
    except Exception as error:  # torch.load raises whatever its parsers meet
        raise InputError(
            f"{folder}/{url.rpartition('/')[2]}: is damaged or not PaSST's weights; remove it, "
            "and it is fetched again"
        ) from error
    return {name: value for name, value in weights.items() if name not in CLASSIFIER_KEYS}
