"""Sound file -> waveform; each decoded once into a cache; waveform -> mp3.

n samples at 32 kHz.
"""

import contextlib
import hashlib
import io
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from tqdm import tqdm

from dualenc.errors import InputError, replacing

AnyPath = str | os.PathLike
SAMPLE_RATE = 32_000  # Hz
BLOCK_SECONDS = 10
BLOCK_SAMPLES = BLOCK_SECONDS * SAMPLE_RATE  # 320,000
INT16_SCALE = 32_768  # int16 full scale = 1.0
# What a scan of a folder tries; a file is read by what is in it, whatever its suffix.
AUDIO_SUFFIXES = tuple(".wav .flac .ogg .oga .opus .mp3 .m4a .aac .webm .aiff .aif .caf .w64 "
                       ".mp4 .mov".split())


# --- Sound file -> waveform ---

# A Kaiser window of this length resamples as well as librosa does (soxr, high quality), with which
# the baseline was trained; a worse filter cost up to 3 points of mAP@10 on files of 22.05 kHz.
FILTER = "filter_size=128:phase_shift=10:cutoff=0.96:filter_type=kaiser:kaiser_beta=12"
CUT_SECONDS, CUT_SHARE = 0.1, 0.01  # shorter than promised by more than both: cut off
UNKNOWN_BYTES = 0x7FFF_F000  # from here on a wav's size was written before its sound


def load_audio(path: AnyPath, max_seconds: int | None = None, faults: list | None = None):
    """Decode a sound file, or its first blocks up to max_seconds: (n,) float32, mono, 32 kHz.

    A waveform that peaks above full scale, as float files may, is divided by its peak. Errors and
    faults are those of stream_audio.
    """
    max_blocks = None if max_seconds is None else -(-max_seconds // BLOCK_SECONDS)
    waveform = np.concatenate([*itertools.islice(stream_audio(path, faults), max_blocks)])
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
            if len(rest) >= BLOCK_SAMPLES:  # a joined file's blocks may have any length
                yield rest[:BLOCK_SAMPLES]
                rest = rest[BLOCK_SAMPLES:]
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
        graph.add("asetnsamples", f"n={BLOCK_SAMPLES}:p=0"),
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


# --- Clips -> waveforms, decoded once ---

DECODER = "PyAV 2"  # raise the number when a file's waveform would come out otherwise


class Waveforms(list):
    """Of the files of decoded sounds: item i is clip i, (n,) int16, memory-mapped at each access"""

    def __getitem__(self, i: int) -> np.ndarray:
        return np.load(super().__getitem__(i), mmap_mode="r")

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))


def decode_once(paths: Sequence[Path], cache_dir: Path) -> dict[Path, Path]:
    """Decode into cache_dir what is new or has changed: {sound: its cache file}."""
    cache_files = {path: cache_file(path, cache_dir) for path in paths}
    todo = {file: path for path, file in cache_files.items() if not file.exists()}
    todo = [(path, file) for file, path in todo.items()]
    random.Random(0).shuffle(todo)  # so that the first ones tell what all will take
    faults, written = [], 0
    pool = ThreadPoolExecutor(os.cpu_count())  # FFmpeg works outside Python's lock
    bar = tqdm(todo, "decoding sounds, once", leave=False, disable=len(todo) < 50, mininterval=1)
    try:
        results = zip(bar, pool.map(_decode_one, todo), strict=True)
        for done, (_, (fault, size)) in enumerate(results, start=1):
            if fault:
                faults.append(fault)
            written += size
            gigabytes = written / done * len(todo) / 1e9
            bar.set_postfix_str(f"about {gigabytes:.1f} GB in {cache_dir}", refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, what has not begun does not begin
    if faults:
        what = "`python -m dualenc.data check FOLDER` lists all sound files that cannot be used"
        raise InputError.of(what, sorted(faults))
    return cache_files


def cache_file(path: Path, cache_dir: Path) -> Path:
    """Where a sound's waveform is kept: another place when the file changes."""
    stat, place = path.stat(), os.fsencode(os.path.realpath(path))
    digest = hashlib.sha256(place + f"{stat.st_size} {stat.st_mtime_ns} {DECODER}".encode())
    return cache_dir / f"{digest.hexdigest()[:32]}.npy"


def _decode_one(item: tuple[Path, Path]) -> tuple[str, int]:  # why not, bytes written
    (path, target), faults = item, []
    try:
        waveform = to_int16(load_audio(path, faults=faults))
    except InputError as error:
        return str(error), 0
    if faults:
        return f"{path}: {faults[0]}", 0
    with replacing(target) as temporary, open(temporary, "wb") as file:
        np.save(file, waveform)
    return "", waveform.nbytes


# --- Waveform -> mp3 ---

def encode_mp3(waveform: np.ndarray) -> bytes:
    """(n,) float in -1..1 at 32 kHz -> an mp3 file, which every browser plays."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp3") as file:
        stream = file.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(to_int16(waveform)[None], "s16", "mono")
        frame.sample_rate = SAMPLE_RATE
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()
