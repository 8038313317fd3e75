"""Decoding and resampling against second routes and lengths known beforehand."""

import os
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio
from conftest import noise, write_wav

from dualenc import audio, decoding
from dualenc.errors import InputError

RATE = decoding.SAMPLE_RATE
BARE = {"write_xing": "0", "id3v2_version": "0"}  # an mp3 without Xing frame, as sox writes it
ID3 = b"ID3\3\0\0\0\0\0\x12TIT2\0\0\0\x08\0\0\3\xe9Info\xe9\xe9"  # a title in no valid encoding


@pytest.fixture(autouse=True)
def nothing_on_the_terminal(capfd):
    yield
    assert capfd.readouterr() == ("", "")


def tone(seconds: float, rate: int = RATE, hz: float = 440) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def level(waveform: np.ndarray, hz: float = 440) -> float:
    """A tone's amplitude, but for 0.1 s at both ends, where codecs fade (mp3: 5 % softer)."""
    middle = np.arange(3200, len(waveform) - 3200)
    return 2 * abs((waveform[middle] * np.exp(-2j * np.pi * hz * middle / RATE)).mean())


def encoded(form: str, codec: str, waveform, rate: int = RATE, container=None, **options) -> bytes:
    """(n,) or (n, channels) -> the bytes of a sound file."""
    planes = np.ascontiguousarray(np.atleast_2d(waveform.T), np.float32)
    layout = ["mono", "stereo"][len(planes) - 1]
    with tempfile.NamedTemporaryFile() as target:
        with av.open(target.name, "w", format=form, options=container or {}) as file:
            stream = file.add_stream(codec, rate=rate, layout=layout, options=options)
            frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
            frame.sample_rate = rate
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        return Path(target.name).read_bytes()


FORMS = {
    "wav": ("wav", "pcm_s16le", RATE), "aiff": ("aiff", "pcm_s16be", 22_050),
    "w64": ("w64", "pcm_s16le", 8_000), "float": ("wav", "pcm_f32le", 96_000),
    "odd": ("caf", "pcm_s24le", 44_101), "flac": ("flac", "flac", 44_100),
    "mp3": ("mp3", "libmp3lame", 44_100), "mpeg2": ("mp3", "libmp3lame", 16_000),
    "opus": ("ogg", "libopus", 48_000), "webm": ("webm", "libopus", 48_000),
    "aac": ("adts", "aac", 44_100), "m4a": ("ipod", "aac", RATE),
}


def whole(name: str, channels: int = 1, **container) -> bytes:
    """5 s of a tone; of two channels the second is an octave higher."""
    form, codec, rate = FORMS[name]
    tones = np.stack([tone(5, rate, hz) for hz in (440, 880)[:channels]], axis=1)
    return encoded(form, codec, tones, rate, container)


def wav_of_sizes(riff: int, data: int) -> bytes:
    plain = whole("wav", fflags="+bitexact")
    riff, data = (size.to_bytes(4, "little") for size in (riff, data))
    return plain[:4] + riff + plain[8:40] + data + plain[44:]


def load(path: Path, content: bytes) -> tuple[np.ndarray, list[str]]:
    path.write_bytes(content)
    return decoding.load_audio(path, faults=(faults := [])), faults


# --- Sound file -> waveform ---

@pytest.mark.parametrize("name", FORMS)
def test_any_form_gives_the_mean_over_channels_whatever_the_suffix(name, tmp_path):
    waveform, faults = load(tmp_path / "a.mp3", whole(name, channels=2))
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and not faults
    assert len(waveform) == pytest.approx(5 * RATE, abs=RATE / 10)
    assert (level(waveform), level(waveform, 880)) == pytest.approx((0.25, 0.25), rel=0.06)


@pytest.mark.parametrize(
    ("make", "seconds"),
    [
        (lambda: wav_of_sizes(riff=0, data=0), 5),  # a recorder crashed
        (lambda: wav_of_sizes(riff=320_080, data=320_044), 5),  # the header counts itself
        (lambda: wav_of_sizes(riff=0xFFFF_FFFF, data=0xFFFF_FFFF), 5),  # a pipe
        (lambda: whole("flac")[:22] + bytes(4) + whole("flac")[26:], 5),  # a pipe: length not known
        (lambda: b"OggS\0\0".join(whole("opus").rsplit(b"OggS\0\4", 1)), 5),  # last page not marked
        (lambda: ID3 + whole("mp3", **BARE), 5.04),
        (lambda: encoded("mp3", "libmp3lame", np.concatenate([noise(6), noise(6) / 999, tone(1)]),
                         container=BARE, flags="+qscale", global_quality="472"), 13.04),
        (lambda: ID3 + whole("mp3") + whole("mp3"), 10.05),  # "Info" is in its title
        (lambda: whole("mpeg2") + whole("mp3"), 10.1),
        (lambda: whole("mpeg2", **BARE) + whole("mp3"), 10.1),
        (lambda: whole("opus") + whole("opus"), 10),  # a chained ogg
    ],
)
def test_whole_files_with_odd_headers_are_read_whole(make, seconds, tmp_path):
    waveform, faults = load(tmp_path / "a.wav", make())
    assert len(waveform) / RATE == pytest.approx(seconds, abs=0.1) and not faults
    assert level(waveform[-RATE:]) > 0.2


@pytest.mark.parametrize("name", ["wav", "mp3", "flac", "m4a"])
def test_a_file_that_is_cut_off_gives_what_is_there_and_says_so(name, tmp_path):
    content = whole(name, **{"movflags": "faststart"} if name == "m4a" else {})
    waveform, faults = load(tmp_path / "a", content[: len(content) // 3])
    seconds = len(waveform) / RATE
    assert 1 < seconds < 2 and level(waveform) == pytest.approx(0.5, rel=0.06)
    assert faults == [f"is cut off: {seconds:.1f} s of 5.0 s are there"]


def test_blocks_last_10_s_where_files_of_other_channels_were_joined(tmp_path):
    for seconds in (5, 10):
        stereo = encoded("mp3", "libmp3lame", np.stack([tone(seconds)] * 2, axis=1))
        path = tmp_path / f"{seconds}.mp3"
        path.write_bytes(stereo + encoded("mp3", "libmp3lame", tone(10)))
        *blocks, last = decoding.stream_audio(path)
        assert {len(block) for block in blocks} == {10 * RATE} and len(last) < 10 * RATE
        assert (10 * len(blocks) + len(last) / RATE) == pytest.approx(seconds + 10, abs=0.1)


def test_so_does_one_that_cannot_be_read_to_its_end(tmp_path):
    waveform, faults = load(tmp_path / "a.ogg", whole("opus") + whole("opus", channels=2))
    assert len(waveform) >= 5 * RATE and len(faults) == 1 and "to its end" in faults[0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "cannot be read as a sound"),
        (lambda: b"not a sound " * 50, "cannot be read as a sound"),
        (lambda: whole("m4a")[:-2000], "cannot be read as a sound"),  # its table was at the end
        (lambda: wav_of_sizes(riff=36, data=0)[:44], "holds no sound"),
        (lambda: b"GIF89a" + b"\1\0" * 2 + b"\0\0\0," + b"\0" * 9, "holds no sound"),
        (lambda: encoded("wav", "pcm_f32le", np.array([0, np.nan] * 99), 8_000), "not finite"),
    ],
)
def test_what_is_no_sound_is_refused_in_one_line_with_its_name(make, reason, tmp_path):
    with pytest.raises(InputError, match=f"^[^\n]*bad.mp3: [^\n]*{reason}[^\n]*$"):
        load(tmp_path / "bad.mp3", make())


def test_a_name_is_a_files_even_with_a_colon_and_no_pipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.wav")  # which would wait for ever
    for line in ("pipe.wav: is not a file", "none.wav: no such file"):
        with pytest.raises(InputError, match=line):
            decoding.load_audio(line.partition(":")[0])
    assert len(decoding.load_audio(write_wav(Path("http:a%d.wav"), noise(1)))) == RATE


def test_levels_and_channels(tmp_path):
    mono = decoding.load_audio(write_wav(tmp_path / "mono.wav", noise(1)))
    ten = write_wav(tmp_path / "ten.wav", np.repeat(noise(1)[:, None], 10, axis=1))
    np.testing.assert_array_equal(decoding.load_audio(ten), mono)
    against = write_wav(tmp_path / "against.wav", np.stack([noise(1), -noise(1)], axis=1))
    assert np.abs(decoding.load_audio(against)).max() < 1e-4
    (channels,) = decoding.all_channels(against, [])
    np.testing.assert_allclose(channels, np.stack([noise(1), -noise(1)], axis=1), atol=1e-4)
    hot, _ = load(tmp_path / "hot.wav", encoded("wav", "pcm_f32le", 8 * tone(1)))
    np.testing.assert_allclose(hot, 2 * tone(1), atol=1e-5)  # divided by its peak, not clipped


def test_int16_is_exact_and_blocks_join_to_the_whole(tmp_path):
    samples = np.random.default_rng(0).integers(-32_768, 32_768, 61 * RATE + 9, np.int16)
    path = write_wav(tmp_path / "a.wav", samples / 32_768)
    waveform, (*blocks, last) = decoding.load_audio(path), decoding.stream_audio(path)
    np.testing.assert_array_equal(decoding.to_int16(waveform), samples)
    assert len(blocks) > 1 and all(len(block) % audio.SEGMENT_SAMPLES == 0 for block in blocks)
    np.testing.assert_array_equal(np.concatenate([*blocks, last]), waveform)
    np.testing.assert_array_equal(decoding.load_audio(path, 20), waveform[: 20 * RATE])
    assert decoding.to_int16(np.array([-9.0, 9.0])).tolist() == [-32_768, 32_767]


# --- Resampling, and what it must not change ---

def kaiser(waveform: np.ndarray, rate: int, to: int) -> np.ndarray:
    """The second route: torchaudio with a Kaiser window, as good as librosa's soxr."""
    return torchaudio.functional.resample(
        torch.from_numpy(waveform), rate, to, lowpass_filter_width=64, rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser", beta=14.769656459379492,
    ).numpy()


def natural(rate: int) -> np.ndarray:
    """3 s of noise that falls by 6 dB an octave and swells, as recorders store it."""
    spectrum = np.fft.rfft(noise(3, rate=96_000)) / np.maximum(np.arange(144_001), 150)
    swelling = 0.02 + np.abs(np.sin(np.linspace(0, 24, 288_000))) ** 8
    sound = (np.fft.irfft(spectrum) * swelling).astype(np.float32)
    return kaiser(0.5 * sound / np.abs(sound).max(), 96_000, rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_is_as_good_as_a_kaiser_windowed_one(rate, tmp_path):
    sound = natural(rate)
    waveform, _ = load(tmp_path / "a.wav", encoded("wav", "pcm_f32le", sound, rate))
    np.testing.assert_array_equal(decoding.resample(sound, rate), waveform)
    both = np.stack([each[: 3 * RATE - 1] for each in (waveform, kaiser(sound, rate, RATE))])
    ours, other = audio.LogMel().eval()(torch.from_numpy(both))
    assert (ours - other).abs().mean() < (0.003 if rate < RATE else 0.0005)


def test_copies_in_any_form_embed_alike_and_10_ms_more_change_nothing(tmp_path, tiny_model):
    for sound in (lambda rate: tone(3, rate), natural):
        paths = [tmp_path / name for name in ("wav", "float", "flac", "opus", "webm", "mp3")]
        for path in paths:  # of four rates
            form, codec, rate = FORMS[path.name]
            path.write_bytes(encoded(form, codec, sound(rate), rate, b="192000"))
        assert (tiny_model.embed_audio(paths) @ tiny_model.embed_audio(paths[0]).T).min() > 0.999
    longer, exact = tiny_model.embed_audio([noise(10.01), noise(10.01)[: 10 * RATE]])
    assert longer @ exact > 0.9999
