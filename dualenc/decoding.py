"""Sound file -> waveform, decoded once into a cache; waveform -> mp3.

FFmpeg's libraries decode, by way of PyAV.

n samples at 32 kHz.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.audio import AudioFrame, AudioStream
from av.container import InputContainer
from av.filter import Graph
from tqdm import tqdm

from dualenc.errors import InputError, replacing

AnyPath = str | os.PathLike
SAMPLE_RATE = 32_000  # Hz
BLOCK_SECONDS = 10
BLOCK_SAMPLES = BLOCK_SECONDS * SAMPLE_RATE  # 320,000
INT16_SCALE = 32_768  # 1.0, full scale, as an int16
MAX_CHANNELS = 64  # FFmpeg's resampler takes no more.

# The suffixes that a scan of a folder tries. A file is read by what is in it, whatever its suffix.
AUDIO_SUFFIXES = (
    ".3g2", ".3gp", ".8svx", ".aa3", ".aac", ".ac3", ".adts", ".aif", ".aifc", ".aiff", ".amb",
    ".amr", ".ape", ".asf", ".au", ".avi", ".awb", ".bwf", ".caf", ".dff", ".dsf", ".dss", ".dts",
    ".dtshd", ".eac3", ".ec3", ".f4v", ".flac", ".flv", ".g722", ".gsm", ".m2ts", ".m4a", ".m4b",
    ".m4r", ".m4v", ".mka", ".mkv", ".mlp", ".mov", ".mp1", ".mp2", ".mp3", ".mp4", ".mpa", ".mpc",
    ".mpeg", ".mpg", ".mpp", ".mxf", ".nist", ".oga", ".ogg", ".ogm", ".ogv", ".oma", ".opus",
    ".qoa", ".qt", ".ra", ".rf64", ".rm", ".rmvb", ".shn", ".snd", ".sph", ".spx", ".tak", ".thd",
    ".tta", ".vob", ".voc", ".w64", ".wav", ".wave", ".weba", ".webm", ".wma", ".wmv", ".wv",
    ".xwma",
)
# Folders in which systems keep deleted files, thumbnails and the like, in lower case.
SYSTEM_FOLDERS = (
    "#recycle", "$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information",
)


class SoundError(InputError):
    """A fault of one sound file, which it names, while other files can still be read."""


def usable_cores() -> int:
    """Return how many cores this process may use; the machine may have more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- Sound file -> waveform ---

def load_audio(
    path: AnyPath, max_seconds: float | None = None, faults: list[str] | None = None
) -> np.ndarray:
    """Decode a sound file: (n,) float32, mono, 32 kHz, at most 1 in size.

    Errors, faults, and the scaling of blocks above full scale are as in stream_audio.

    Args:
        max_seconds: only blocks of 10 s that begin before this are decoded; None for all.
    """
    blocks = stream_audio(path, faults)
    if max_seconds is not None:
        blocks = itertools.islice(blocks, math.ceil(max_seconds / BLOCK_SECONDS))
    return np.concatenate(list(blocks))


def stream_audio(path: AnyPath, faults: list[str] | None = None) -> Iterator[np.ndarray]:
    """Decode a file of any length in blocks of 10 s: (320000,) float32, the last one shorter.

    Each block is mono at 32 kHz, and is divided by its own peak if that is above 1.

    Args:
        faults: a list to which a phrase is added if the file is shorter or longer than its header
            says, or cannot be read to its end: "is cut off: 1.0 s of 3.0 s are there". The part
            that can be read is yielded anyway.

    Raises:
        SoundError: the file is not there, holds no sound that can be decoded, or holds samples that
            are not finite.
    """
    if faults is None:
        faults = []
    rest = np.zeros(0, np.float32)
    for block in _mono(path, all_channels(path, faults)):
        rest = np.append(rest, block)
        if len(rest) >= BLOCK_SAMPLES:
            yield within_full_scale(rest[:BLOCK_SAMPLES])
            rest = rest[BLOCK_SAMPLES:]
    if len(rest) > 0:
        yield within_full_scale(rest)


def within_full_scale(waveform: np.ndarray) -> np.ndarray:
    """Divide each 10 s block by its peak if that is above 1, as float files allow: (n,) -> (n,).

    All that is embedded passes through here, so that a file has the same embedding from its path,
    its waveform, the cache and the search.
    """
    if len(waveform) == 0 or np.abs(waveform).max() <= 1:
        return waveform
    scaled = waveform.copy()
    for start in range(0, len(scaled), BLOCK_SAMPLES):
        block = scaled[start : start + BLOCK_SAMPLES]
        block /= max(1.0, np.abs(block).max())
    return scaled


def load_excerpt(path: AnyPath, start: float, seconds: float, file_seconds: float) -> np.ndarray:
    """Decode an excerpt of a file by seeking: (n,) float32, mono, 32 kHz.

    It is made for listening, and begins within 50 ms of start.

    Args:
        start: seconds from the file's first sample to the excerpt's.
        seconds: the excerpt's length.
        file_seconds: the whole file's length when it was last decoded. If its header says
            otherwise, as in joined files, its time stamps are not trusted, and it is decoded from
            its beginning.

    Raises:
        SoundError: the file is gone, is shorter than it was, or cannot be read there.
    """
    excerpt = _seek_excerpt(path, start, seconds, file_seconds)
    if excerpt is None:
        excerpt = _cut(stream_audio(path), start, seconds)
    expected_seconds = min(seconds, file_seconds - start)
    if len(excerpt) == 0:
        raise SoundError(f"{path}: ends before {start:.1f} s now; it had {file_seconds:.1f} s")
    if len(excerpt) / SAMPLE_RATE < expected_seconds - TOLERATED_SECONDS:
        end = start + len(excerpt) / SAMPLE_RATE
        raise SoundError(f"{path}: ends at {end:.1f} s now, before the {file_seconds:.1f} s it had")
    return within_full_scale(excerpt)


def all_channels(path: AnyPath, faults: list[str]) -> Iterator[np.ndarray]:
    """Decode a file with all its channels, in blocks: (n, channels) float32 at 32 kHz.

    Errors and faults are as in stream_audio, but samples that are not finite are handed out.
    """
    with _pyav_errors(path), _open(path) as file:
        stream = _sound_stream(path, file)
        samples = 0
        for block in _resampled(_frames(file, stream, faults)):
            samples += len(block)
            yield block
        if samples == 0:
            raise SoundError(f"{path}: {faults.pop() if faults else 'holds no sound'}")
        seconds = samples / SAMPLE_RATE
        promised = _promised_seconds(path, file, stream)
        if promised - seconds > max(TOLERATED_SECONDS, TOLERATED_SHARE * promised):
            faults.append(f"is cut off: {seconds:.1f} s of {promised:.1f} s are there")
        if file.format.name == "wav":
            stray_bytes = _bytes_after_chunks(path)
            if stray_bytes > os.path.getsize(path) / 2:
                faults.append(
                    f"has a wrong header: it tells of {seconds:.1f} s, and the {stray_bytes:,} "
                    "bytes behind them are not read"
                )


# --- Inside a file ---

# A file is reported as truncated if it is shorter than its header says by more than both of these.
TOLERATED_SECONDS = 0.1
TOLERATED_SHARE = 0.01
# Sizes this large are placeholders in a wav's header, written before the length was known.
UNKNOWN_RIFF_BYTES = 0x7FFF_F000
# A decoder needs a run-up before it decodes exactly.
SEEK_LEAD_SECONDS = 2


def _audio_decoders() -> str:
    """Return the names of FFmpeg's sound decoders, as its option codec_whitelist takes them."""
    names = []
    for name in sorted(av.codecs_available):
        with contextlib.suppress(av.codec.codec.UnknownCodecError):  # Some can only encode.
            if av.Codec(name, "r").type == "audio":
                names.append(name)
    return ",".join(names)


# Video streams and pictures are neither decoded nor probed: it would take time, and most of
# FFmpeg's exploitable bugs are in video decoders.
OPTIONS = {"codec_whitelist": _audio_decoders()}


def _open(path: AnyPath) -> InputContainer:
    if not Path(path).exists():
        raise SoundError(f"{path}: no such file")
    if not Path(path).is_file():  # Opening a pipe would wait for its writer.
        raise SoundError(f"{path}: is not a file")
    name = f"file:{os.fspath(path)}"  # A colon in a bare name would stand for a protocol.
    return av.open(name, container_options=OPTIONS, metadata_errors="ignore")


@contextlib.contextmanager
def _pyav_errors(path: AnyPath) -> Iterator[None]:
    """Turn any error within the block into a SoundError that names the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Damaged files raise more than PyAV's own FFmpegError.
        reason = getattr(error, "strerror", None) or error
        raise SoundError(f"{path}: cannot be read as a sound ({reason})") from error


def _sound_stream(path: AnyPath, file: InputContainer) -> AudioStream:
    """Return the first stream of sound that can be decoded."""
    if not file.streams.audio:
        raise SoundError(f"{path}: holds no sound")
    for stream in file.streams.audio:
        if stream.codec_context is not None:
            return stream
    raise SoundError(f"{path}: its sound is in a format that FFmpeg cannot decode")


def _frames(file: InputContainer, stream: AudioStream, faults: list[str]) -> Iterator[AudioFrame]:
    """Decode a stream's frames up to an error, which is added to faults."""
    try:
        for packet in file.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue  # Such a packet may be where one of two joined mp3 files ends.
            yield from frames
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise  # The disk or the network failed: this says nothing of the sound.
        faults.append(f"cannot be read to its end ({error.strerror})")


def _mono(path: AnyPath, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Take the mean over channels: (n, channels) -> (n,)."""
    for block in blocks:
        if not np.isfinite(block).all():
            raise SoundError(f"{path}: holds samples that are not finite numbers")
        # FFmpeg's own downmix would add the channels of stereo at 0.71 each.
        yield block.mean(axis=1, dtype=np.float32)


def _cut(blocks: Iterable[np.ndarray], start: float, seconds: float) -> np.ndarray:
    """Cut some seconds out of blocks (n,), from start on; fewer if the blocks end before."""
    first = round(start * SAMPLE_RATE)
    end = first + round(seconds * SAMPLE_RATE)
    parts = [np.zeros(0, np.float32)]
    position = 0
    for block in blocks:
        parts.append(block[max(0, first - position) : max(0, end - position)])
        position += len(block)
        if position >= end:
            break
    return np.concatenate(parts)


def _seek_excerpt(
    path: AnyPath, start: float, seconds: float, file_seconds: float
) -> np.ndarray | None:
    """Return an excerpt (n,) found by its time stamps, or None if they cannot be trusted."""
    with _pyav_errors(path), _open(path) as file:
        stream = _sound_stream(path, file)
        duration = _duration(file, stream)
        if duration is None or abs(duration - file_seconds) > TOLERATED_SECONDS:
            return None
        first_frame = next(_frames(file, stream, []), None)
        if first_frame is None or first_frame.time is None:
            return None
        target_time = first_frame.time + start  # Time stamps need not begin at 0.
        before = max(first_frame.time, target_time - SEEK_LEAD_SECONDS)
        try:
            file.seek(int(before / stream.time_base), stream=stream)
        except av.error.FFmpegError:  # Some formats do not allow seeking.
            return None
        frames = _frames(file, stream, [])
        frame = next(frames, None)
        if frame is None or frame.time is None or frame.time > target_time:
            return None
        lead = target_time - frame.time
        blocks = _resampled(itertools.chain([frame], frames))
        return _cut(_mono(path, blocks), lead, seconds)


def _duration(file: InputContainer, stream: AudioStream) -> float | None:
    """Return how many seconds of sound a file's header tells of, or None."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if file.duration is not None:
        return file.duration / av.time_base
    return None


def _promised_seconds(path: AnyPath, file: InputContainer, stream: AudioStream) -> float:
    """Return how many seconds of sound a file's header promises; 0 if it promises none."""
    file_bytes = os.path.getsize(path)
    bytes_per_second = (stream.codec_context.bit_rate or 0) / 8
    if file.format.name == "wav":
        # FFmpeg's duration of a wav is what the file holds, so its header is read here.
        riff_bytes = _riff_bytes(path)
        if bytes_per_second > 0 and file_bytes < riff_bytes < UNKNOWN_RIFF_BYTES:
            return riff_bytes / bytes_per_second
        return 0.0
    seconds = _duration(file, stream)
    if seconds is None or (stream.duration is None and len(file.streams) > 1):
        return 0.0  # The duration may be that of a video beside the sound.
    if file.format.name in ("mp3", "aac") and 1.01 * file_bytes > seconds * bytes_per_second:
        # The file is as large as this duration needs. So either nothing is cut off, or the duration
        # is FFmpeg's own estimate, size / bit rate: it promises no more than is there.
        return 0.0
    return seconds


def _riff_bytes(path: AnyPath) -> int:
    """Return a wav file's size according to its header; 0 if it begins with no RIFF header."""
    with open(path, "rb") as file:
        header = file.read(8)
    if header[:4] != b"RIFF":
        return 0
    return 8 + int.from_bytes(header[4:], "little")


def _bytes_after_chunks(path: AnyPath) -> int:
    """Return how many bytes of a wav file follow its last chunk.

    There are none if the sound's chunk has no fixed size, or reaches to the file's end. There are
    many if that chunk's size is too small: it wrapped around at 4 GB, or is from before the sound
    was recorded. Other chunks, such as pictures and metadata, may stand before and after it.
    """
    file_bytes = os.path.getsize(path)
    if _riff_bytes(path) == 0:
        return 0
    position = 12  # after "RIFF", the size, and "WAVE"
    sound_seen = False
    with open(path, "rb") as file:
        while position + 8 <= file_bytes:
            file.seek(position)
            name = file.read(4)
            size = int.from_bytes(file.read(4), "little")
            end = position + 8 + size + size % 2  # Chunks begin at even bytes.
            if name == b"data":
                sound_seen = True
                if size in (0, 0xFFFF_FFFF) or end >= file_bytes:
                    return 0  # FFmpeg reads to the file's end.
            elif not (name.isascii() and name.decode().isprintable()):
                break  # No chunk begins here.
            elif end > file_bytes + 1:  # The last byte, which pads an odd size, may be missing.
                break  # No chunk begins here either: it would not fit into the file.
            position = end
    if not sound_seen:
        return 0
    return max(0, file_bytes - position)


# --- Resampling ---

# A Kaiser window of this length resamples as well as librosa does (soxr, high quality), with which
# the official DCASE 2025 baseline was trained. A worse filter cost up to 3 points of mAP@10 on
# files of 22.05 kHz.
FILTER = "filter_size=128:phase_shift=10:cutoff=0.96:filter_type=kaiser:kaiser_beta=12"


class Resampler:
    """A resampler of frames of one format, layout and rate to 32 kHz; it keeps all channels."""

    def __init__(self, format: str, layout: str, rate: int):
        """Set up FFmpeg's filters.

        Args:
            format, layout: FFmpeg's names, such as "fltp" and "stereo".
            rate: the frames' sample rate in Hz.
        """
        rates = [SAMPLE_RATE]
        if 4000 <= rate < SAMPLE_RATE:
            # FFmpeg ignores the cutoff when it resamples upwards. So the sound is first resampled
            # to 98.75 % of its rate, where the cutoff holds.
            rates.insert(0, round(0.9875 * rate / 100) * 100)
        self.form = (format, layout, rate)
        self.graph = Graph()
        self.graph.link_nodes(
            self.graph.add_abuffer(format=format, layout=layout, sample_rate=rate, time_base=None),
            *[self.graph.add("aresample", f"{to}:{FILTER}") for to in rates],
            self.graph.add("aformat", "sample_fmts=flt"),  # interleaved
            self.graph.add("asetnsamples", f"n={BLOCK_SAMPLES}:p=0"),
            self.graph.add("abuffersink"),
        ).configure()

    def push(self, frame: AudioFrame) -> list[np.ndarray]:
        """Resample a frame; return the blocks (n, channels) that are ready."""
        frame.pts = None  # Only the samples count, whatever their time stamps say.
        self.graph.push(frame)
        return self._ready_blocks()

    def flush(self) -> list[np.ndarray]:
        """Return the blocks that are left after the last frame."""
        self.graph.push(None)
        return self._ready_blocks()

    def _ready_blocks(self) -> list[np.ndarray]:
        blocks = []
        while True:
            try:
                block = self.graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):  # It waits, or is done.
                return blocks
            blocks.append(block.to_ndarray().reshape(-1, block.layout.nb_channels))


def _resampled(frames: Iterable[AudioFrame]) -> Iterator[np.ndarray]:
    """Resample frames, whose form may change within a file, as in joined ones: (n, channels)."""
    resampler = None
    for frame in frames:
        if frame.layout.nb_channels > MAX_CHANNELS:
            channels = frame.layout.nb_channels
            raise ValueError(f"it has {channels} channels; at most {MAX_CHANNELS} are read")
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None:
            resampler = Resampler(*form)
        elif form != resampler.form:
            yield from resampler.flush()
            resampler = Resampler(*form)
        yield from resampler.push(frame)
    if resampler is not None:
        yield from resampler.flush()


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Resample a waveform as files are: (n,) float32 at rate Hz -> (about n * 32000 / rate,).

    Raises:
        InputError: the rate is one that FFmpeg cannot resample, or too few samples are given.
    """
    if rate == SAMPLE_RATE:
        return waveform
    try:
        resampler = Resampler("flt", "mono", rate)
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(waveform)[None], "flt", "mono")
        frame.sample_rate = rate
        blocks = resampler.push(frame) + resampler.flush()
        return np.concatenate(blocks)[:, 0]
    except (ValueError, OverflowError, av.error.FFmpegError) as error:
        raise InputError(
            f"rate {rate}: a waveform of {len(waveform):,} samples cannot be resampled from it to "
            f"{SAMPLE_RATE}"
        ) from error


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Round a waveform to int16, clipped at full scale: (n,) float in -1..1 -> (n,)."""
    scaled = np.clip(np.rint(waveform * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
    return scaled.astype(np.int16)


# --- Folder -> sound files ---

def sounds_below(folder: AnyPath, skipped: collections.Counter | None = None) -> list[Path]:
    """List all sound files below a folder, sorted.

    Links to folders are followed, and each folder is listed once. Hidden files and folders
    (".name") and the system's own folders are passed over.

    Args:
        skipped: counts what else was passed over, under the keys "files of other kinds" (by
            suffix) and "folders that may not be entered".

    Raises:
        InputError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of sounds")
    if skipped is None:
        skipped = collections.Counter()

    def count_folder(error: OSError) -> None:
        skipped["folders that may not be entered"] += 1

    sounds = []
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=count_folder, followlinks=True):
        real_parent = os.path.realpath(parent)
        if real_parent in visited:
            folders.clear()
            continue
        visited.add(real_parent)
        folders[:] = sorted(name for name in folders if not _is_system_folder(name))
        for name in names:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            if path.suffix.lower() in AUDIO_SUFFIXES:
                sounds.append(path)
            else:
                skipped["files of other kinds"] += 1
    return sorted(sounds)


def _is_system_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


# --- Sound files -> waveforms, each decoded once ---

# Raise the number, which is no version of PyAV's, when waveforms would differ from those in caches.
DECODER = "PyAV 2"
MIN_FILES_FOR_BAR = 50


class Waveforms(list):
    """A list of cache files that yields their waveforms, (n,) int16, memory-mapped at each access.

    So only the parts of a waveform that are read are held in memory.
    """

    def __getitem__(self, i: int) -> np.ndarray:
        return np.load(super().__getitem__(i), mmap_mode="r")

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))


def decode_once(paths: Sequence[Path], cache_dir: Path) -> dict[Path, Path]:
    """Decode into cache_dir what is new or has changed, and return {sound: its cache file}.

    Several processes may do so at once.

    Raises:
        InputError: cache_dir cannot be written, which is checked first; or sounds cannot be read,
            or not whole, and are listed after all others have been decoded.
    """
    cache_files = {path: cache_file(path, cache_dir) for path in paths}
    missing = {}  # {cache file: sound}; a sound and a link to it have one cache file
    for path, file in cache_files.items():
        if not file.exists():
            missing[file] = path
    if missing:
        _check_writable(cache_dir)
        _decode_all([(path, file) for file, path in missing.items()], cache_dir)
    return cache_files


def cache_file(path: Path, cache_dir: Path) -> Path:
    """Name the file in which a sound's waveform is kept; a sound that changes gets another one."""
    stat = path.stat()
    real_path = os.fsencode(os.path.realpath(path))
    version = f"{stat.st_size} {stat.st_mtime_ns} {DECODER}"
    digest = hashlib.sha256(real_path + version.encode())
    return cache_dir / f"{digest.hexdigest()[:32]}.npy"


def _check_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise InputError(f"{cache_dir}: decoded sounds cannot be written there ({error.strerror}); "
                         "name another folder with --cache-dir FOLDER") from error


def _decode_all(missing: list[tuple[Path, Path]], cache_dir: Path) -> None:
    """Decode (sound, cache file) pairs, with a progress bar that estimates their disk space."""
    # In random order the first sounds tell how much space all of them will take.
    random.Random(0).shuffle(missing)
    pool = ThreadPoolExecutor(usable_cores())  # FFmpeg works outside Python's lock.
    bar = tqdm(
        pool.map(_decode_one, missing), "decoding sounds, once", total=len(missing), leave=False,
        disable=len(missing) < MIN_FILES_FOR_BAR, mininterval=1 if sys.stderr.isatty() else 10,
    )
    faults = []
    written_bytes = 0
    try:
        for done, (fault, file_bytes) in enumerate(bar, start=1):
            if fault:
                faults.append(fault)
            written_bytes += file_bytes
            gigabytes = written_bytes / done * len(missing) / 1e9
            bar.set_postfix_str(f"about {gigabytes:.1f} GB in {cache_dir}", refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)  # After Ctrl-C no further sound is begun.
    if faults:
        headline = (
            "sounds that cannot be used (remove or rename them to go on without them; "
            "`python -m dualenc.data check FOLDER` lists all)"
        )
        raise InputError.of(headline, sorted(faults))


def _decode_one(sound_and_target: tuple[Path, Path]) -> tuple[str, int]:
    """Decode a sound into its cache file, block by block; return (fault or "", bytes written)."""
    path, target = sound_and_target
    faults = []
    samples = 0
    try:
        with replacing(target, by_many=True) as temporary, open(temporary, "wb") as file:
            _write_npy_header(file, samples)
            for block in stream_audio(path, faults):
                file.write(to_int16(block).tobytes())
                samples += len(block)
            if faults:
                raise SoundError(f"{path}: {faults[0]}")
            file.seek(0)
            # The length is known now; the header is as long as before.
            _write_npy_header(file, samples)
    except SoundError as error:
        return str(error), 0
    return "", samples * np.dtype(np.int16).itemsize


def _write_npy_header(file: io.BufferedIOBase, samples: int) -> None:
    """Write a .npy file's header, which has 128 bytes, however many samples follow."""
    descr = np.lib.format.dtype_to_descr(np.dtype(np.int16))
    header = {"descr": descr, "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(file, header)


# --- Waveform -> mp3 ---

def encode_mp3(waveform: np.ndarray) -> bytes:
    """Encode a waveform as an mp3 file, which every browser plays: (n,) float in -1..1, 32 kHz."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp3") as file:
        stream = file.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono")
        frame = AudioFrame.from_ndarray(to_int16(waveform)[None], "s16", "mono")
        frame.sample_rate = SAMPLE_RATE
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()
