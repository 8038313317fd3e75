"""Sound file -> waveform -> 10 s segments -> log-mel -> PaSST (report, sections 4 and 5).

n samples at 32 kHz, S segments of 10 s, F = 1000 frames of a segment, W = 768 values.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from av.filter import Graph
from hear21passt.models import passt
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import Tensor, nn

from dualenc.errors import InputError

AnyPath = str | os.PathLike
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
# What a scan of a folder tries; a file is read by what is in it, whatever its suffix.
AUDIO_SUFFIXES = tuple(".wav .flac .ogg .oga .opus .mp3 .m4a .aac .webm .aiff .aif .caf .w64 "
                       ".mp4 .mov".split())


# --- Sound file -> waveform (section 4, "sample rate") ---

# A Kaiser window of this length resamples as well as librosa does (soxr, high quality), with which
# the baseline was trained; a worse filter cost up to 3 points of mAP@10 on files of 22.05 kHz.
FILTER = "filter_size=128:phase_shift=10:cutoff=0.96:filter_type=kaiser:kaiser_beta=12"
CUT_SECONDS, CUT_SHARE = 0.1, 0.01  # shorter than promised by more than both: cut off
UNKNOWN_BYTES = 0x7FFF_F000  # from here on a wav's size was written before its sound


def load_audio(path: AnyPath, max_segments: int | None = None, faults: list | None = None):
    """Decode a sound file, or its first max_segments * 10 s: (n,) float32, mono, 32 kHz, n >= 1.

    A waveform that peaks above full scale, as float files may, is divided by its peak. Errors and
    faults are those of stream_audio.
    """
    waveform = np.concatenate([*itertools.islice(stream_audio(path, faults), max_segments)])
    return waveform / max(1.0, np.abs(waveform).max())


def stream_audio(path: AnyPath, faults: list | None = None) -> Iterator[np.ndarray]:
    """Decode a file of any length in blocks of 10 s: (320000,) float32, the last one shorter.

    Where it is shorter than it says, or cannot be read to its end, what there is is yielded, and a
    sentence added to faults. No file, no sound, and samples not finite are an InputError.
    """
    if not Path(path).is_file():  # to open a pipe would be to wait for it
        raise InputError(f"{path}: {'is not a file' if Path(path).exists() else 'no such file'}")
    block, rest = None, np.zeros(0, np.float32)
    try:
        for block in all_channels(path, [] if faults is None else faults):
            if not np.isfinite(block).all():
                raise InputError(f"{path}: holds samples that are not finite numbers")
            # Not by FFmpeg, which would add the channels of stereo at 0.71 each.
            rest = np.append(rest, block.mean(axis=1, dtype=np.float32))
            if len(rest) >= SEGMENT_SAMPLES:  # a joined file's blocks may have any length
                yield rest[:SEGMENT_SAMPLES]
                rest = rest[SEGMENT_SAMPLES:]
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read as a sound ({reason})") from error
    if block is None:
        raise InputError(f"{path}: holds no sound")
    if len(rest):
        yield rest


def all_channels(path: AnyPath, faults: list[str]) -> Iterator[np.ndarray]:
    """Decode a file in blocks with all channels, (n, channels) float32; errors are FFmpeg's own."""
    # "file:", or a colon in a name would stand for a protocol; metadata may be in any encoding.
    with av.open(f"file:{os.fspath(path)}", metadata_errors="ignore") as file:
        stream = next(iter(file.streams.audio), None)
        graph, form, seconds = None, None, 0.0
        promised = _promised_seconds(path, file, stream) if stream else 0.0
        for frame in _frames(file, stream, faults) if stream else ():
            seconds += frame.samples / frame.sample_rate
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                yield from _resampled(graph, None)  # files of several rates may be joined
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                graph = _resampler(*form)
            frame.pts = None  # else a gap in the time stamps would be filled
            yield from _resampled(graph, frame)
        yield from _resampled(graph, None)
        if promised - seconds > max(CUT_SECONDS, CUT_SHARE * promised):
            faults.append(f"is cut off: {seconds:.1f} s of {promised:.1f} s are there")


def _frames(file, stream, faults: list[str]) -> Iterator[av.AudioFrame]:
    try:
        for packet in file.demux(stream):
            # A packet may be damaged, such as one where two mp3 files were joined.
            with contextlib.suppress(av.error.InvalidDataError):
                yield from packet.decode()
    except av.error.FFmpegError as error:
        faults.append(f"cannot be read to its end ({error.strerror})")


def _resampler(form: str, layout: str, rate: int) -> Graph:
    # Upwards FFmpeg ignores the cutoff; a step down by 1 % first makes up for it.
    lower = [round(0.9875 * rate / 100) * 100] if 4000 <= rate < SAMPLE_RATE else []
    graph = Graph()
    graph.link_nodes(
        graph.add_abuffer(format=form, layout=layout, sample_rate=rate, time_base=None),
        *(graph.add("aresample", f"{to}:{FILTER}") for to in [*lower, SAMPLE_RATE]),
        graph.add("aformat", "sample_fmts=flt"),
        graph.add("asetnsamples", f"n={SEGMENT_SAMPLES}:p=0"),
        graph.add("abuffersink"),
    ).configure()
    return graph


def _resampled(graph: Graph | None, frame: av.AudioFrame | None) -> Iterator[np.ndarray]:
    """Push a frame through, or None for what is left; yield what comes out, (n, channels)."""
    with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
        if graph is not None:
            graph.push(frame)
        while graph is not None:
            out = graph.pull()
            yield out.to_ndarray().reshape(-1, out.layout.nb_channels)


def _promised_seconds(path: AnyPath, file, stream) -> float:
    """How long the file's header says its sound is; 0 where it does not say."""
    size, bytes_a_second = os.path.getsize(path), (stream.codec_context.bit_rate or 8) / 8
    if file.format.name == "wav":  # FFmpeg goes by what is there
        with open(path, "rb") as raw:
            says = int.from_bytes(raw.read(8)[4:], "little") + 8
        return says / bytes_a_second if size < says < UNKNOWN_BYTES else 0.0
    alone = len(file.streams) == 1 and file.duration is not None
    seconds = file.duration / av.time_base if alone else 0.0
    if stream.duration is not None:
        seconds = float(stream.duration * stream.time_base)
    # Where an mp3 says nothing, FFmpeg divides its size by its first bit rate.
    guessed = file.format.name in ("mp3", "aac") and 1.01 * size > seconds * bytes_a_second
    return 0.0 if guessed else seconds


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """(n,) float32 at rate Hz -> (about n * 32000 / rate,), by the same filter as files."""
    if rate == SAMPLE_RATE:
        return waveform
    graph = _resampler("flt", "mono", rate)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform)[None], "flt", "mono")
    frame.sample_rate = rate
    return np.concatenate([*_resampled(graph, frame), *_resampled(graph, None)])[:, 0]


def sounds_below(folder: AnyPath) -> list[Path]:
    """All sound files below a folder, sorted, but for hidden ones (".name").

    Links to folders are followed, each folder once. No folder is an InputError.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of sounds")
    found: dict[str, list[Path]] = {}  # by real folder
    for place, folders, names in os.walk(folder, followlinks=True):
        paths = (Path(place, name) for name in names if not name.startswith("."))
        sounds = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
        is_new = found.setdefault(os.path.realpath(place), sounds) is sounds
        folders[:] = [n for n in sorted(folders) if is_new and not n.startswith(".")]
    return sorted(path for sounds in found.values() for path in sounds)


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """(n,) float in -1..1 -> (n,) int16, clipped."""
    scaled = np.clip(np.rint(waveform * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
    return scaled.astype(np.int16)


# --- Waveform -> segments (section 4, "segment handling" and "chunking") ---

def crop(waveform: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """(n,) -> (at most 960,000,): a random 30 s in training, the first 30 s without a generator."""
    excess = len(waveform) - CLIP_SAMPLES
    if excess <= 0:
        return waveform
    start = 0 if rng is None else int(rng.integers(excess + 1))
    return waveform[start : start + CLIP_SAMPLES]


def cut(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
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


def published_passt() -> dict[str, Tensor]:
    """The published PaSST weights, downloaded once into torch's hub folder."""
    url = passt.default_cfgs["passt_s_p16_s16_128_ap468"]["url"]
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"PaSST's weights cannot be fetched ({error}): copy {url} into "
                         f"{torch.hub.get_dir()}/checkpoints, or give --init random") from error
    # head.*, head_dist.*: AudioSet's 527 classes
    return {name: value for name, value in weights.items() if not name.startswith("head")}
