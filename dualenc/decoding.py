"""Sound file -> waveform (report, section 4, "sample rate"): decode, mix to mono, resample.

Shapes: n samples. What a waveform becomes then stands in audio.py.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from dualenc import InputError
from dualenc.audio import INT16_SCALE, SAMPLE_RATE

READ_SECONDS = 30  # decoded at a time, so that an hour-long file needs no more memory
CONTEXT_SECONDS = 1  # on both sides of what is resampled; the filter reaches a few milliseconds
RATE_STEP = 25  # Hz: the resampler's filter bank grows as the rates' common divisor shrinks
RATES = (1_000, 768_000)  # Hz: beyond them a header is wrong, and would ask for endless memory
MAX_LEVEL = 1_000  # times full scale: beyond it a float file was never scaled
UNKNOWN_BYTES = 0x7FFFF000  # from here on a header that was written before its sound: no promise
OGG_PAGE_BYTES = 2**16  # at most; it begins with OggS and a zero

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif"})


def decode(path: str | Path, max_samples: int | None = None) -> np.ndarray:
    """Decode a sound file: mean over channels, resampled to 32 kHz.

    Args:
        path: wav, flac, ogg or mp3 of any sample rate and channel count.
        max_samples: decode only so much from the start; None decodes the whole file.

    Returns:
        (n,) float32, n >= 1.

    Raises:
        InputError: the file is missing, unreadable, empty, shorter than its header says, or holds
            values that are not finite.
    """
    parts, total = [], 0
    for block in decode_blocks(path):
        parts.append(block)
        total += len(block)
        if max_samples is not None and total >= max_samples:
            break
    return np.concatenate(parts)[:max_samples]


def decode_blocks(path: str | Path) -> Iterator[np.ndarray]:
    """Decode a file of any length in blocks of 30 s: (n,) float32 at 32 kHz, one after the other.

    The blocks joined are what resampling the whole file at once would give.
    """
    try:
        if not Path(path).is_file():  # to open a pipe would be to wait for it
            raise FileNotFoundError
        # As bytes: a name that is not valid UTF-8 is a file's name, too.
        with soundfile.SoundFile(os.fsencode(path)) as file:
            check_header(file)
            for block in _resampled_blocks(file):
                if not np.abs(block).max() <= MAX_LEVEL:  # NaN is not, either
                    raise ValueError("holds NaN, infinite or unscaled samples")
                yield block
            if file.tell() < file.frames:
                raise ValueError(f"ends after {file.tell()} of {file.frames} samples")
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: {unreadable(path, error)}; replace or remove it") from error


def check_header(file: soundfile.SoundFile) -> None:
    """What the header says is held against the file before memory is taken for it.

    Raises:
        ValueError: says what is wrong.
    """
    # libsndfile notes, and passes over, that a wav or aiff promises more bytes than it has.
    sizes = r"(?:data|SSND) *: (\d+) \(should be (\d+)\)"
    for promised, there in re.findall(sizes, file.extra_info):
        if int(there) < int(promised) < UNKNOWN_BYTES:
            raise ValueError(f"is cut off: it says {promised} bytes and has {there}")
    if file.format == "OGG" and not _has_last_page(file.name):
        raise ValueError("is cut off: its last page is not the end of its sound")
    if file.frames == 0:
        raise ValueError("holds no samples")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise ValueError(f"has {file.samplerate} samples a second, not {RATES[0]} to {RATES[1]}")


def _has_last_page(path: bytes) -> bool:
    """Whether an ogg file ends with a whole page that says it is the last: no header tells more."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - OGG_PAGE_BYTES))
        tail = file.read()
    page = tail[tail.rfind(b"OggS\0") :]
    table = page[27 : 27 + page[26]] if len(page) > 26 else b""  # of the lengths of its parts
    return bool(table) and bool(page[5] & 4) and len(page) >= 27 + len(table) + sum(table)


def unreadable(path: str | Path, error: Exception) -> str:
    """Why a sound file cannot be read, what is plain to see before what the decoder says."""
    path = Path(path)
    try:
        if path.is_dir():
            return "is a folder, not a sound file"
        if path.exists() and not path.is_file():
            return "is a device or pipe, not a sound file"
        with open(path, "rb") as file:
            if not file.read(1):
                return "is empty"
    except OSError as os_error:
        return os_error.strerror
    if type(error) is ValueError:
        return str(error)
    return f"cannot be decoded ({getattr(error, 'error_string', error)})"


def _resampled_blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    rate = RATE_STEP * max(1, round(file.samplerate / RATE_STEP))
    before = np.zeros(0, np.float32)  # context already given out
    ahead = _read_mono(file, (READ_SECONDS + CONTEXT_SECONDS) * rate)
    while len(ahead):
        here = ahead[: READ_SECONDS * rate]
        resampled = resample(np.concatenate([before, ahead]), rate)
        start = round(len(before) * SAMPLE_RATE / rate)  # exact: whole seconds
        yield resampled[start : start + math.ceil(len(here) * SAMPLE_RATE / rate)]
        before = here[-CONTEXT_SECONDS * rate :]
        ahead = ahead[len(here) :]
        ahead = np.concatenate([ahead, _read_mono(file, len(here))])


def _read_mono(file: soundfile.SoundFile, frames: int) -> np.ndarray:
    return file.read(frames, dtype="float32", always_2d=True).mean(axis=1)


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """(n,) float32 at rate Hz -> (ceil(n * 32000 / rate),) at 32 kHz."""
    if rate == SAMPLE_RATE:
        return waveform
    return torchaudio.functional.resample(torch.from_numpy(waveform), rate, SAMPLE_RATE).numpy()


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """(n,) float in -1..1 -> (n,) int16, clipped; int16 is returned as it is."""
    if waveform.dtype == np.int16:
        return waveform
    scaled = np.clip(np.rint(waveform * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
    return scaled.astype(np.int16)
