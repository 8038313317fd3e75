"""Decoding and resampling against second routes and lengths known beforehand."""

import collections
import hashlib
import io
import os
import tempfile
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio
from conftest import noise, touch, write_wav

from dualenc import audio, decoding
from dualenc.errors import InputError

RATE = decoding.SAMPLE_RATE
FULL_SCALE = 32_768
BARE = {"write_xing": "0", "id3v2_version": "0"}  # an mp3 without Xing frame, as sox writes it
ID3 = b"ID3\3\0\0\0\0\0\x12TIT2\0\0\0\x08\0\0\3\xe9Info\xe9\xe9"  # a title in no valid encoding


@pytest.fixture(autouse=True)
def nothing_on_the_terminal(capfd):
    yield
    assert capfd.readouterr() == ("", "")


# --- Sounds whose content is known, as the bytes of files ---

def tone(seconds: float, rate: int = RATE, hz: float = 440) -> np.ndarray:
    """Return a sine of amplitude 0.5, (n,)."""
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def level(waveform: np.ndarray, hz: float = 440) -> float:
    """Measure a tone's amplitude, without 0.1 s at both ends, where codecs fade (mp3: by 5 %)."""
    middle = np.arange(3200, len(waveform) - 3200)
    return 2 * abs((waveform[middle] * np.exp(-2j * np.pi * hz * middle / RATE)).mean())


def encoded(form: str, codec: str, *tracks, rate: int = RATE, container=None, **options) -> bytes:
    """Encode waveforms (n,) or (n, channels), each a stream of its own, as a sound file's bytes."""
    with tempfile.NamedTemporaryFile() as target:
        with av.open(target.name, "w", format=form, options=container or {}) as file:
            frames = []
            for track in tracks:
                planes = np.ascontiguousarray(np.atleast_2d(track.T), np.float32)
                layout = "mono" if len(planes) == 1 else "stereo"
                frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
                frame.sample_rate = rate
                stream = file.add_stream(codec, rate=rate, layout=layout, options=options)
                frames.append((stream, frame))
            for stream, frame in frames:
                file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
        return Path(target.name).read_bytes()


FORMS = {  # name: container, codec, rate
    "wav": ("wav", "pcm_s16le", RATE), "aiff": ("aiff", "pcm_s16be", 22_050),
    "w64": ("w64", "pcm_s16le", 8_000), "float": ("wav", "pcm_f32le", 96_000),
    "odd": ("caf", "pcm_s24le", 44_101), "flac": ("flac", "flac", 44_100),
    "mp3": ("mp3", "libmp3lame", 44_100), "mpeg2": ("mp3", "libmp3lame", 16_000),
    "opus": ("ogg", "libopus", 48_000), "webm": ("webm", "libopus", 48_000),
    "aac": ("adts", "aac", 44_100), "m4a": ("ipod", "aac", RATE), "mka": ("matroska", "aac", RATE),
    "wv": ("wv", "wavpack", 44_100), "tta": ("tta", "tta", 44_100), "au": ("au", "pcm_alaw", 8_000),
    "ac3": ("ac3", "ac3", 44_100), "mp2": ("mp2", "mp2", 44_100), "flv": ("flv", "aac", 44_100),
}


def sound_file(name: str, *tracks, **options) -> bytes:
    form, codec, rate = FORMS[name]
    return encoded(form, codec, *tracks, rate=rate, **options)


def whole(name: str, channels: int = 1, **container) -> bytes:
    """Encode 5 s of a tone; of two channels the second is an octave higher."""
    rate = FORMS[name][2]
    tones = [tone(5, rate, hz) for hz in (440, 880)[:channels]]
    return sound_file(name, np.stack(tones, axis=1), container=container)


def wav_of_sizes(riff: int, data: int, after: bytes = b"") -> bytes:
    """Make a wav file of 5 s with other sizes in its header, and other bytes behind the sound."""
    plain = whole("wav", fflags="+bitexact")
    riff_size = riff.to_bytes(4, "little")
    data_size = data.to_bytes(4, "little")
    return plain[:4] + riff_size + plain[8:40] + data_size + plain[44:] + after


def chunk(name: bytes, size: int) -> bytes:
    return name + size.to_bytes(4, "little") + bytes(size)


def with_unknown_codec(content: bytes, streams: int) -> bytes:
    """Name a codec that FFmpeg lacks in an mp4 file's first streams, such as an iPhone's apac."""
    return content.replace(b"mp4a", b"apac", streams).replace(b"esds", b"dapa", streams)


def load(path: Path, content: bytes) -> tuple[np.ndarray, list[str]]:
    path.write_bytes(content)
    faults = []
    waveform = decoding.load_audio(path, faults=faults)
    return waveform, faults


# --- Whole files ---

@pytest.mark.parametrize("name", FORMS)
def test_any_form_gives_the_mean_over_channels_whatever_the_suffix(name, tmp_path):
    waveform, faults = load(tmp_path / "a.mp3", whole(name, channels=2))
    assert not faults
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert len(waveform) == pytest.approx(5 * RATE, abs=RATE / 10)
    assert level(waveform, 440) == pytest.approx(0.25, rel=0.06)
    assert level(waveform, 880) == pytest.approx(0.25, rel=0.06)


def flac_of_a_pipe() -> bytes:
    """Encode a flac whose header does not know its length."""
    content = whole("flac")
    return content[:22] + bytes(4) + content[26:]


def opus_without_end_mark() -> bytes:
    """Encode an opus whose last page is not marked as the last one."""
    before, after = whole("opus").rsplit(b"OggS\0\4", 1)
    return before + b"OggS\0\0" + after


def mp3_of_varying_rate() -> bytes:
    """Encode 13 s, of which the middle takes few bits, as an mp3 that does not tell its length."""
    waveform = np.concatenate([noise(6), noise(6) / 999, tone(1)])
    varying = {"flags": "+qscale", "global_quality": "472"}
    return encoded("mp3", "libmp3lame", waveform, container=BARE, **varying)


# {what is odd about a whole file: (a function that makes it, its seconds)}
ODD_FILES = {
    "wav of a recorder that crashed": (lambda: wav_of_sizes(riff=0, data=0), 5),
    "wav whose sizes count the header": (lambda: wav_of_sizes(riff=320_080, data=320_044), 5),
    "wav of a pipe": (lambda: wav_of_sizes(riff=0xFFFF_FFFF, data=0xFFFF_FFFF), 5),
    "wav with a picture behind the sound": (
        lambda: wav_of_sizes(riff=720_036, data=320_000, after=chunk(b"id3 ", 400_000)), 5,
    ),
    "flac of a pipe": (flac_of_a_pipe, 5),
    "opus without an end mark": (opus_without_end_mark, 5),
    "mp3 behind a title": (lambda: ID3 + whole("mp3", **BARE), 5.04),
    "mp3 of varying rate": (mp3_of_varying_rate, 13.04),
    "joined mp3s with Info in the title": (lambda: ID3 + whole("mp3") + whole("mp3"), 10.05),
    "joined mp3s of two rates": (lambda: whole("mpeg2") + whole("mp3"), 10.1),
    "joined mp3s, the first bare": (lambda: whole("mpeg2", **BARE) + whole("mp3"), 10.1),
    "chained ogg": (lambda: whole("opus") + whole("opus"), 10),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_whole_files_with_odd_headers_are_read_whole(name, tmp_path):
    make, seconds = ODD_FILES[name]
    waveform, faults = load(tmp_path / "a.wav", make())
    assert not faults
    assert len(waveform) / RATE == pytest.approx(seconds, abs=0.1)
    assert level(waveform[-RATE:]) > 0.2


def test_int16_samples_are_read_to_the_last_bit(tmp_path):
    samples = np.random.default_rng(0).integers(-32_768, 32_768, 9_999, np.int16)
    waveform = decoding.load_audio(write_wav(tmp_path / "a.wav", samples / FULL_SCALE))
    np.testing.assert_array_equal(waveform, samples.astype(np.float32) / FULL_SCALE)
    np.testing.assert_array_equal(decoding.to_int16(waveform), samples)


def test_to_int16_rounds_and_clips():
    waveform = np.array([-9.0, -1.0, 0.6 / FULL_SCALE, 1.4 / FULL_SCALE, 1.0, 9.0])
    assert decoding.to_int16(waveform).tolist() == [-32_768, -32_768, 1, 1, 32_767, 32_767]


def test_a_streams_blocks_join_to_the_whole_and_its_first_blocks_to_the_first_seconds(tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(31))
    blocks = list(decoding.stream_audio(path))
    assert [len(block) for block in blocks] == [10 * RATE, 10 * RATE, 10 * RATE, RATE]
    waveform = decoding.load_audio(path)
    np.testing.assert_array_equal(np.concatenate(blocks), waveform)
    np.testing.assert_array_equal(decoding.load_audio(path, 20), waveform[: 20 * RATE])
    np.testing.assert_array_equal(decoding.load_audio(path, 21), waveform[: 30 * RATE])


@pytest.mark.parametrize("seconds", [5, 10])
def test_blocks_last_10_s_where_files_of_other_channels_were_joined(seconds, tmp_path):
    stereo = encoded("mp3", "libmp3lame", np.stack([tone(seconds)] * 2, axis=1))
    path = tmp_path / "a.mp3"
    path.write_bytes(stereo + encoded("mp3", "libmp3lame", tone(10)))
    *blocks, last = decoding.stream_audio(path)
    assert {len(block) for block in blocks} == {10 * RATE}
    assert len(last) < 10 * RATE
    assert 10 * len(blocks) + len(last) / RATE == pytest.approx(seconds + 10, abs=0.1)


# --- Files that hold less or more than they say ---

@pytest.mark.parametrize("name", ["wav", "mp3", "flac", "m4a"])
def test_a_file_that_is_cut_off_gives_what_is_there_and_says_so(name, tmp_path):
    container = {"movflags": "faststart"} if name == "m4a" else {}
    content = whole(name, **container)
    waveform, faults = load(tmp_path / "a", content[: len(content) // 3])
    seconds = len(waveform) / RATE
    assert seconds == pytest.approx(1.5, abs=0.5)
    assert level(waveform) == pytest.approx(0.5, rel=0.06)
    assert faults == [f"is cut off: {seconds:.1f} s of 5.0 s are there"]


def test_a_file_that_cannot_be_read_to_its_end_gives_what_is_there_and_says_so(tmp_path):
    waveform, faults = load(tmp_path / "a.ogg", whole("opus") + whole("opus", channels=2))
    assert len(waveform) >= 5 * RATE
    assert len(faults) == 1
    assert faults[0].startswith("cannot be read to its end (")


def test_a_disk_that_fails_in_the_middle_is_no_fault_of_the_sound():
    class FileOnAFailingDisk:
        def demux(self, stream):
            raise av.error.OSError(5, "Input/output error")

    faults = []
    with pytest.raises(OSError, match="Input/output error"):
        list(decoding._frames(FileOnAFailingDisk(), None, faults))
    assert faults == []


@pytest.mark.parametrize("before", [b"", chunk(b"LIST", 30), chunk(b"LIST", 31) + b"\0"])
def test_a_wav_whose_header_tells_of_less_than_half_of_its_sound_says_so(before, tmp_path):
    plain = wav_of_sizes(riff=64_036, data=64_000)  # 1 s of 5
    waveform, faults = load(tmp_path / "a.wav", plain[:36] + before + plain[36:])
    assert len(waveform) == RATE
    assert faults == [
        "has a wrong header: it tells of 1.0 s, and the 256,000 bytes behind them are not read"
    ]


NO_SOUND_FILES = {
    "empty": lambda: b"",
    "text": lambda: b"not a sound " * 50,
    "m4a without the table at its end": lambda: whole("m4a")[:-2000],
    "wav without a header": lambda: b"RIFF\0\0\0\0WAVE",
}


@pytest.mark.parametrize("make", NO_SOUND_FILES.values(), ids=NO_SOUND_FILES)
def test_what_cannot_be_opened_is_refused_in_one_line_with_its_name(make, tmp_path):
    with pytest.raises(InputError, match="^[^\n]*bad.mp3: cannot be read as a sound [^\n]*$"):
        load(tmp_path / "bad.mp3", make())


FILES_WITHOUT_SOUND = {
    "wav of no samples": lambda: wav_of_sizes(riff=36, data=0)[:44],
    "picture": lambda: b"GIF89a\1\0\1\0\0\0\0," + bytes(9),
}


@pytest.mark.parametrize("make", FILES_WITHOUT_SOUND.values(), ids=FILES_WITHOUT_SOUND)
def test_what_holds_no_sound_is_refused(make, tmp_path):
    with pytest.raises(InputError, match="bad.mp3: holds no sound$"):
        load(tmp_path / "bad.mp3", make())


@pytest.mark.parametrize("sample", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(sample, tmp_path):
    with pytest.raises(InputError, match="bad.wav: holds samples that are not finite numbers"):
        load(tmp_path / "bad.wav", encoded("wav", "pcm_f32le", np.array([0, sample] * 99)))


def test_a_sound_in_an_unknown_codec_is_refused(tmp_path):
    content = with_unknown_codec(whole("m4a"), streams=1)
    with pytest.raises(InputError, match="bad.m4a: its sound is in a format that FFmpeg cannot"):
        load(tmp_path / "bad.m4a", content)


def test_beside_a_sound_in_an_unknown_codec_one_that_can_be_decoded_is_read(tmp_path):
    two = sound_file("m4a", tone(5, hz=440), tone(5, hz=880))
    waveform, faults = load(tmp_path / "a.m4a", with_unknown_codec(two, streams=1))
    assert not faults
    assert level(waveform, 880) == pytest.approx(0.5, rel=0.06)
    assert level(waveform, 440) < 0.01


def test_whatever_pyav_raises_is_a_fault_of_that_file(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "strange.wav", noise(1))

    def strange(*form):
        raise NotImplementedError("strange layout")

    monkeypatch.setattr(decoding, "Resampler", strange)
    with pytest.raises(InputError, match=r"strange.wav: cannot be read .*\(strange layout\)$"):
        decoding.load_audio(path)


@pytest.mark.parametrize("name", FORMS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    content = np.frombuffer(whole(name), np.uint8)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        damaged = content.copy()
        reach = len(content)
        if seed % 2 == 1:  # Half of the damages are in the header.
            reach = min(len(content), 200)
        damaged[rng.integers(0, reach, 20)] = rng.integers(0, 256, 20)
        try:
            waveform, _ = load(tmp_path / "a", damaged.tobytes())
            assert len(waveform) > 0
        except InputError as error:
            assert str(error).startswith(f"{tmp_path / 'a'}: ")


def write_video(path: Path, form: str, pictures: int, seconds: float) -> None:
    """Write a video of black pictures, 25 a second, and a tone."""
    with av.open(str(path), "w", format=form) as file:
        video = file.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        for _ in range(pictures):
            file.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
        frame = av.AudioFrame.from_ndarray(tone(seconds)[None], "fltp", "mono")
        frame.sample_rate = RATE
        file.mux(sound.encode(frame))
        file.mux([*video.encode(None), *sound.encode(None)])


def test_video_is_not_even_probed(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, "mp4", pictures=5, seconds=2)
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"  # known by probing
    with decoding._open(path) as file:
        assert file.streams.video[0].codec_context.pix_fmt is None
    assert level(decoding.load_audio(path)) == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_sound_that_ends_before_its_video_is_whole(form, tmp_path):
    path = tmp_path / "a"
    write_video(path, form, pictures=100, seconds=1)
    faults = []
    waveform = decoding.load_audio(path, faults=faults)
    assert len(waveform) / RATE == pytest.approx(1, abs=0.1)
    assert faults == []


# --- Names ---

def test_a_name_with_a_colon_is_a_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(decoding.load_audio(write_wav(Path("http:a%d.wav"), noise(1)))) == RATE


def test_a_name_need_not_be_utf_8(tmp_path):
    path = write_wav(tmp_path / os.fsdecode(b"\xff.wav"), noise(1))
    assert len(decoding.load_audio(path)) == RATE


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.wav: no such file"):
        decoding.load_audio(tmp_path / "none.wav")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(InputError, match="pipe.wav: is not a file"):
        decoding.load_audio(tmp_path / "pipe.wav")


# --- Channels and levels ---

@pytest.mark.parametrize("channels", [3, 10, 64])
def test_up_to_64_channels_are_averaged(channels, tmp_path):
    sound = np.stack([noise(0.5, seed) for seed in range(channels)], axis=1)
    waveform = decoding.load_audio(write_wav(tmp_path / "a.wav", sound))
    np.testing.assert_allclose(waveform, sound.mean(axis=1), atol=1e-4)


def test_more_than_64_channels_are_refused(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.zeros((99, 65)))
    with pytest.raises(InputError, match="a.wav: .*65 channels; at most 64 are read"):
        decoding.load_audio(path)


def test_all_channels_stay_apart_where_they_are_asked_for(tmp_path):
    opposite = np.stack([noise(1), -noise(1)], axis=1)
    path = write_wav(tmp_path / "a.wav", opposite)
    (channels,) = decoding.all_channels(path, [])
    np.testing.assert_allclose(channels, opposite, atol=1e-4)
    assert np.abs(decoding.load_audio(path)).max() < 1e-4


def test_each_10_s_block_above_full_scale_is_divided_by_its_own_peak(tmp_path):
    loud = np.concatenate([4 * tone(10), tone(10), 8 * tone(2)])
    waveform, _ = load(tmp_path / "a.wav", encoded("wav", "pcm_f32le", loud))
    expected = np.concatenate([2 * tone(10), tone(10), 2 * tone(2)])
    np.testing.assert_allclose(waveform, expected, atol=1e-4)
    np.testing.assert_array_equal(decoding.within_full_scale(loud), waveform)


def test_a_waveform_within_full_scale_stays_as_it_is():
    waveform = noise(12)
    np.testing.assert_array_equal(decoding.within_full_scale(waveform), waveform)


# --- Excerpts ---

@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """Write 25 s of noise in several forms: {name: (file, its waveform)}."""
    folder = tmp_path_factory.mktemp("recordings")
    contents = {}
    for name in ("wav", "flac", "mp3", "opus", "webm", "m4a", "aac"):
        contents[name] = sound_file(name, noise(25, rate=FORMS[name][2]))
    # Joined from two files, of which the header tells of the first one.
    contents["joined"] = sound_file("mp3", noise(12, 0, 44_100))
    contents["joined"] += sound_file("mp3", noise(13, 1, 44_100))
    # Its first time stamp is not 0.
    shifted = {"output_ts_offset": "7"}
    contents["shifted"] = encoded("mpegts", "aac", noise(25), container=shifted)
    recordings = {}
    for name, content in contents.items():
        path = folder / name
        path.write_bytes(content)
        recordings[name] = path, decoding.load_audio(path)
    return recordings


def lag_of(excerpt: np.ndarray, other: np.ndarray) -> int:
    """Return how many samples later the content stands in an excerpt than in another sound."""
    n = min(len(excerpt), len(other))
    spectrum = np.fft.rfft(excerpt[:n], 2 * n) * np.fft.rfft(other[:n], 2 * n).conj()
    peak = int(np.fft.irfft(spectrum).argmax())
    return peak if peak < n else peak - 2 * n


@pytest.mark.parametrize("start", [0, 10, 20])
@pytest.mark.parametrize("name", "wav flac mp3 opus webm m4a aac joined shifted".split())
def test_an_excerpt_is_that_part_of_the_whole_to_50_ms(name, start, recordings):
    path, waveform = recordings[name]
    expected = waveform[start * RATE : (start + 10) * RATE]
    excerpt = decoding.load_excerpt(path, start, 10, len(waveform) / RATE)
    assert abs(lag_of(excerpt, expected)) < 0.05 * RATE
    assert len(excerpt) == pytest.approx(len(expected), abs=0.05 * RATE)
    assert np.std(excerpt) == pytest.approx(np.std(expected), rel=0.02)


@pytest.mark.parametrize("name", ["wav", "m4a"])  # They are at 32 kHz: nothing is resampled.
def test_an_excerpt_is_exact_from_its_first_sample_on(name, recordings):
    path, waveform = recordings[name]
    excerpt = decoding.load_excerpt(path, 10, 1, len(waveform) / RATE)
    np.testing.assert_allclose(excerpt, waveform[10 * RATE : 11 * RATE], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["wav", "mp3", "m4a", "shifted"])
def test_an_excerpt_is_found_by_seeking(name, recordings, monkeypatch):
    path, waveform = recordings[name]
    monkeypatch.delattr(decoding, "stream_audio")
    decoded = []
    frames_of = decoding._frames

    def counted_frames(*args):
        for frame in frames_of(*args):
            decoded.append(frame.samples / frame.sample_rate)
            yield frame

    monkeypatch.setattr(decoding, "_frames", counted_frames)
    decoding.load_excerpt(path, 20, 3, len(waveform) / RATE)
    assert sum(decoded) < 8  # the first frame, and from 2 s before the place to the file's end


def test_of_a_file_of_another_length_an_excerpt_is_decoded_from_the_start(recordings, monkeypatch):
    streamed = []
    stream_audio = decoding.stream_audio

    def stream(path):
        streamed.append(path)
        return stream_audio(path)

    monkeypatch.setattr(decoding, "stream_audio", stream)
    path, _ = recordings["wav"]
    decoding.load_excerpt(path, 10, 2, file_seconds=24.8)
    assert streamed == [path]


def test_an_excerpt_above_full_scale_is_divided_by_its_peak(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded("wav", "pcm_f32le", np.concatenate([tone(10), 8 * tone(10)])))
    excerpt = decoding.load_excerpt(path, 10, 10, 20)
    np.testing.assert_allclose(excerpt, decoding.load_audio(path)[10 * RATE :], atol=1e-4)


@pytest.mark.parametrize("name", ["wav", "flac", "mp3"])
def test_an_excerpt_of_a_file_that_was_cut_short_since_is_refused(name, recordings, tmp_path):
    content = recordings[name][0].read_bytes()
    path = tmp_path / "a"
    path.write_bytes(content[: len(content) * 3 // 5])
    with pytest.raises(InputError, match=r"a: ends at 1[45]\.\d s now, before the 25\.0 s"):
        decoding.load_excerpt(path, 10, 10, 25)
    with pytest.raises(InputError, match=r"a: ends before 20\.0 s now; it had 25\.0 s"):
        decoding.load_excerpt(path, 20, 10, 25)


def test_an_excerpt_of_a_file_that_is_gone_is_refused(tmp_path):
    with pytest.raises(InputError, match="gone.wav: no such file"):
        decoding.load_excerpt(tmp_path / "gone.wav", 10, 10, 25)


# --- Resampling, and what it must not change ---

def kaiser(waveform: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resample by a second route: torchaudio with a Kaiser window, as good as librosa's soxr."""
    return torchaudio.functional.resample(
        torch.from_numpy(waveform), rate, to, lowpass_filter_width=64, rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser", beta=14.769656459379492,
    ).numpy()


def natural(rate: int) -> np.ndarray:
    """Return 3 s of noise that falls by 6 dB an octave and swells, as recorders store it."""
    spectrum = np.fft.rfft(noise(3, rate=96_000)) / np.maximum(np.arange(144_001), 150)
    swelling = 0.02 + np.abs(np.sin(np.linspace(0, 24, 288_000))) ** 8
    sound = (np.fft.irfft(spectrum) * swelling).astype(np.float32)
    return kaiser(0.5 * sound / np.abs(sound).max(), 96_000, rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_is_as_good_as_a_kaiser_windowed_one(rate, tmp_path):
    sound = natural(rate)
    waveform, _ = load(tmp_path / "a.wav", encoded("wav", "pcm_f32le", sound, rate=rate))
    expected = kaiser(sound, rate, RATE)
    both = np.stack([waveform[: 3 * RATE - 1], expected[: 3 * RATE - 1]])
    ours, other = audio.LogMel().eval()(torch.from_numpy(both))
    bound = 0.003 if rate < RATE else 0.0005
    assert (ours - other).abs().mean() < bound


@pytest.mark.parametrize("rate", [8_000, RATE, 44_100])
def test_a_waveform_is_resampled_as_the_file_that_holds_it(rate, tmp_path):
    sound = natural(rate)
    waveform, _ = load(tmp_path / "a.wav", encoded("wav", "pcm_f32le", sound, rate=rate))
    np.testing.assert_array_equal(decoding.resample(sound, rate), waveform)


def tone_of_3_s(rate: int) -> np.ndarray:
    return tone(3, rate)


@pytest.mark.parametrize("make", [tone_of_3_s, natural])
def test_copies_in_any_form_embed_alike(make, tmp_path, tiny_model):
    paths = []
    for name in ("wav", "float", "flac", "opus", "webm", "mp3"):  # These have four rates.
        _, _, rate = FORMS[name]
        path = tmp_path / name
        path.write_bytes(sound_file(name, make(rate), b="192000"))
        paths.append(path)
    embeddings = tiny_model.embed_audio(paths)
    assert (embeddings @ embeddings[0]).min() > 0.999


def test_10_ms_more_than_10_s_change_nothing(tiny_model):
    longer, exact = tiny_model.embed_audio([noise(10.01), noise(10.01)[: 10 * RATE]])
    assert longer @ exact > 0.9999


# --- A folder's sounds ---

def names_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in decoding.sounds_below(folder)]


def test_sounds_are_listed_by_suffix_in_order(tmp_path):
    touch(tmp_path / "b.WAV", tmp_path / "a/z.mp3", tmp_path / "a.flac", tmp_path / "notes.txt")
    assert names_below(tmp_path) == ["a/z.mp3", "a.flac", "b.WAV"]


def test_the_suffixes_are_sorted_and_hold_what_people_have():
    assert list(decoding.AUDIO_SUFFIXES) == sorted(set(decoding.AUDIO_SUFFIXES))
    for suffix in (".wav .flac .ogg .oga .opus .mp3 .m4a .aac .webm .aiff .aif .caf .w64 .mp4 .mov "
                   ".aifc .au .wma .wv .mka .mkv .mp2 .ac3 .3gp .m4b .tta .amr .ape .spx .mpc .ra "
                   ".avi .flv").split():
        assert suffix in decoding.AUDIO_SUFFIXES


def test_hidden_files_and_the_systems_folders_are_passed_over(tmp_path):
    touch(tmp_path / "a.wav", tmp_path / "._a.wav", tmp_path / ".cache/a.wav")
    for name in ("#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "@eaDir", "__MACOSX", "lost+found",
                 "System Volume Information"):
        touch(tmp_path / name / "a.wav", tmp_path / "below" / name / "a.wav")
    assert names_below(tmp_path) == ["a.wav"]


def test_links_to_folders_are_followed_each_folder_once(tmp_path):
    touch(tmp_path / "library/a.wav", tmp_path / "elsewhere/b.wav")
    (tmp_path / "library/circle").symlink_to(tmp_path / "library")
    (tmp_path / "library/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "library/other_link").symlink_to(tmp_path / "elsewhere")
    assert names_below(tmp_path / "library") == ["a.wav", "link/b.wav"]


def test_files_of_other_kinds_are_passed_over_and_counted(tmp_path):
    touch(tmp_path / "a.wav", tmp_path / "a.txt", tmp_path / "b/c.pdf", tmp_path / ".hidden")
    skipped = collections.Counter()
    assert decoding.sounds_below(tmp_path, skipped) == [tmp_path / "a.wav"]
    assert skipped == {"files of other kinds": 2}


def test_folders_that_may_not_be_entered_are_passed_over_and_counted(tmp_path, monkeypatch):
    touch(tmp_path / "a.wav", tmp_path / "closed/d.wav")
    scandir = os.scandir

    def scandir_but_closed(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir_but_closed)
    skipped = collections.Counter()
    assert decoding.sounds_below(tmp_path, skipped) == [tmp_path / "a.wav"]
    assert skipped == {"folders that may not be entered": 1}


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="none: no such folder of sounds"):
        decoding.sounds_below(tmp_path / "none")


# --- Decoding once ---

def test_the_cache_holds_the_files_that_numpy_would_save(tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(21))
    cache_file = decoding.decode_once([path], tmp_path / "cache")[path]
    expected = io.BytesIO()
    np.save(expected, decoding.to_int16(decoding.load_audio(path)))
    assert cache_file.read_bytes() == expected.getvalue()


def test_caches_of_earlier_versions_stay_valid(tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(1))
    os.utime(path, ns=(0, 1_234_567_890))
    key = f"{path}64044 1234567890 PyAV 2"  # the real path, bytes, nanoseconds, decoder
    name = hashlib.sha256(key.encode()).hexdigest()[:32] + ".npy"
    assert decoding.cache_file(path, Path("cache")) == Path("cache", name)


def test_a_sound_is_decoded_once_and_again_when_it_was_repaired_at_the_same_size(
    tmp_path, monkeypatch
):
    decoded = []
    stream_audio = decoding.stream_audio

    def stream(path, faults):
        decoded.append(path.name)
        return stream_audio(path, faults)

    monkeypatch.setattr(decoding, "stream_audio", stream)
    paths = [write_wav(tmp_path / f"{i}.wav", noise(1, seed=i)) for i in range(3)]
    for _ in range(2):
        decoding.decode_once([*paths, paths[0]], tmp_path / "cache")
    assert sorted(decoded) == ["0.wav", "1.wav", "2.wav"]

    write_wav(paths[1], noise(1, seed=9))
    cache_files = decoding.decode_once(paths, tmp_path / "cache")
    assert sorted(decoded) == ["0.wav", "1.wav", "1.wav", "2.wav"]
    expected = decoding.to_int16(decoding.load_audio(paths[1]))
    np.testing.assert_array_equal(np.load(cache_files[paths[1]]), expected)


def test_a_sound_and_a_link_to_it_are_decoded_once(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav", noise(1))
    link = tmp_path / "link.wav"
    link.symlink_to(path)
    stream_audio = decoding.stream_audio
    decoded = []

    def stream(path, faults):
        decoded.append(path)
        return stream_audio(path, faults)

    monkeypatch.setattr(decoding, "stream_audio", stream)
    cache_files = decoding.decode_once([path, link], tmp_path / "cache")
    assert len(decoded) == 1
    assert cache_files[link] == cache_files[path]


def test_waveforms_are_memory_mapped(tmp_path):
    paths = [write_wav(tmp_path / f"{i}.wav", noise(1, seed=i)) for i in range(2)]
    cache_files = decoding.decode_once(paths, tmp_path / "cache")
    waveforms = decoding.Waveforms(cache_files[path] for path in paths)
    assert isinstance(waveforms[1], np.memmap)
    for waveform, path in zip(waveforms, paths, strict=True):
        np.testing.assert_array_equal(waveform, decoding.to_int16(decoding.load_audio(path)))


def test_all_sounds_that_cannot_be_used_are_listed_and_the_others_kept(tmp_path):
    good = write_wav(tmp_path / "good.wav", noise(1))
    cut = write_wav(tmp_path / "cut.wav", noise(1))
    cut.write_bytes(cut.read_bytes()[:30_000])
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no sound")
    with pytest.raises(InputError) as error:
        decoding.decode_once([good, cut, bad], tmp_path / "cache")
    headline, unreadable, cut_off = str(error.value).splitlines()
    assert "cannot be used (remove or rename them to go on without them" in headline
    assert headline.endswith(" lists all) (2):")
    assert unreadable.strip().startswith(f"{bad}: cannot be read as a sound")
    assert cut_off.strip() == f"{cut}: is cut off: 0.5 s of 1.0 s are there"
    cached = [path.name for path in (tmp_path / "cache").iterdir()]
    assert cached == [decoding.cache_file(good, tmp_path).name]


def test_a_cache_that_cannot_be_written_is_refused_before_a_sound_is_decoded(
    tmp_path, monkeypatch
):
    monkeypatch.delattr(decoding, "stream_audio")
    path = write_wav(tmp_path / "a.wav", noise(1))
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(InputError, match=f"^{tmp_path}/cache: .*--cache-dir FOLDER$"):
        decoding.decode_once([path], tmp_path / "cache")


def test_a_full_disk_ends_decoding_at_once(tmp_path, monkeypatch):
    paths = [write_wav(tmp_path / f"{i}.wav", noise(1)) for i in range(2)]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding, "to_int16", full)
    # Not a list of sounds that cannot be used: it is no fault of theirs.
    with pytest.raises(InputError, match=rf"^{tmp_path}/cache/\w+.npy: cannot be written \(No sp"):
        decoding.decode_once(paths, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_recording_is_decoded_in_the_memory_of_a_block(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav", noise(41))
    sizes = []
    to_int16 = decoding.to_int16

    def measured(block):
        sizes.append(len(block))
        return to_int16(block)

    monkeypatch.setattr(decoding, "to_int16", measured)
    decoding.decode_once([path], tmp_path / "cache")
    assert sizes == [10 * RATE] * 4 + [RATE]


def test_the_progress_bar_writes_at_most_every_10_s_where_there_is_no_terminal(
    tmp_path, monkeypatch
):
    intervals = []

    class Bar(decoding.tqdm):
        def __init__(self, *args, **options):
            intervals.append(options["mininterval"])
            super().__init__(*args, **options | {"disable": True})

        def set_postfix_str(self, *args, **options):
            pass

    monkeypatch.setattr(decoding, "tqdm", Bar)
    decoding.decode_once([write_wav(tmp_path / "a.wav", noise(1))], tmp_path / "cache")
    assert intervals == [10]


def test_two_processes_may_decode_into_one_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # Threads stand for the processes.
    paths = [write_wav(tmp_path / f"{i}.wav", noise(1, seed=i)) for i in range(8)]
    faults = []

    def decode():
        try:
            decoding.decode_once(paths, tmp_path / "cache")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=decode) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_threads_are_as_many_as_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert decoding.usable_cores() == 3


def test_threads_are_as_many_as_all_cores_where_the_system_tells_no_others(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert decoding.usable_cores() == 64


# --- mp3 ---

def test_an_mp3_holds_the_waveform(tmp_path):
    waveform, faults = load(tmp_path / "a.mp3", decoding.encode_mp3(tone(5)))
    assert not faults
    assert len(waveform) == pytest.approx(5 * RATE, abs=0.1 * RATE)
    assert level(waveform) == pytest.approx(0.5, rel=0.06)
