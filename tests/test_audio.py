"""Decoding, segments and PaSST, each against a second route."""

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hear21passt.models.passt import get_model
from hear21passt.models.preprocess import AugmentMelSTFT

from dualenc import InputError, audio, decoding


def tone(seconds, rate, hz=440.0):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


# --- Decoding ---


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_formats_rates_and_channels_give_the_same_tone(write_sound, name, rate):
    left, right = tone(1.5, rate), tone(1.5, rate, 880)
    waveform = decoding.decode(write_sound(name, np.stack([left, right], 1), rate))
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert len(waveform) == pytest.approx(48_000, abs=4000)  # mp3 pads
    wanted = (tone(1.5, 32_000) + tone(1.5, 32_000, 880)) / 2
    n, edge = 40_000, 4000
    spectrum = np.abs(np.fft.rfft(waveform[edge:n] * np.hanning(n - edge)))
    expected = np.abs(np.fft.rfft(wanted[edge:n] * np.hanning(n - edge)))
    assert np.abs(spectrum - expected).max() < 0.03 * expected.max()


def test_blocks_join_to_what_resampling_at_once_gives(write_sound):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * 71 + 1234).astype(np.float32)
    path = write_sound("long.wav", samples, 44_100, subtype="FLOAT")
    at_once = torchaudio.functional.resample(torch.from_numpy(samples), 44_100, 32_000).numpy()
    blocks = list(decoding.decode_blocks(path))
    assert len(blocks) == 3
    np.testing.assert_allclose(np.concatenate(blocks), at_once, atol=1e-6)
    np.testing.assert_array_equal(decoding.decode(path, 50_000), np.concatenate(blocks)[:50_000])


def test_int16_files_are_read_exactly(write_sound):
    samples = np.arange(-32_768, 32_768, dtype=np.int16)
    path = write_sound("steps.wav", samples)
    np.testing.assert_array_equal(decoding.to_int16(decoding.decode(path)), samples)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"", "is empty"), (b"hello, not a sound", "cannot be decoded")],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"bad.wav: {reason}"):
        decoding.decode(path)


def test_samples_must_be_finite(write_sound):
    path = write_sound("nan.wav", np.array([0, np.nan, 0], np.float32), subtype="FLOAT")
    with pytest.raises(InputError, match="nan.wav: holds NaN"):
        decoding.decode(path)


def test_any_sample_rate_needs_little_memory(write_sound):
    # 44,101 Hz shares no divisor with 32 kHz: an exact filter bank would take 5 GB.
    waveform = decoding.decode(write_sound("odd.wav", tone(1, 44_101), 44_101))
    assert len(waveform) == pytest.approx(32_000, abs=2)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("seconds", [0.01, 1, 20])
def test_an_ogg_file_is_whole_only_with_its_last_page(write_sound, subtype, seconds):
    options = {"format": "OGG", "subtype": subtype}
    path = write_sound("a.ogg", tone(seconds, 48_000), 48_000, **options)
    whole = path.read_bytes()
    assert len(decoding.decode(path)) == pytest.approx(32_000 * seconds, abs=1000)
    path.write_bytes(whole + bytes(200))  # such as tags
    decoding.decode(path)
    for part in (whole[:-1], whole[: len(whole) * 2 // 3]):
        path.write_bytes(part)
        with pytest.raises(InputError, match="is cut off|cannot be decoded"):
            decoding.decode(path)


# --- Segments ---


@pytest.mark.parametrize(
    ("samples", "count"),
    [
        (1, 1), (3_199, 1), (320_000, 1), (323_199, 1), (323_200, 2), (640_000, 2),
        (736_000, 3), (960_000, 3), (32_000 * 3600, 360),
    ],
)
def test_segment_count(samples, count):
    assert audio.segment_count(samples) == count


def test_cut_pads_the_last_segment_only():
    waveform = np.arange(1, 640_000 + 32_001, dtype=np.float32)
    segments = audio.cut(waveform)
    assert segments.shape == (3, 320_000)
    np.testing.assert_array_equal(segments.reshape(-1)[: len(waveform)], waveform)
    assert not segments.reshape(-1)[len(waveform) :].any()


def test_a_short_remainder_is_dropped():
    waveform = np.ones(320_000 + 3_199, np.int16)
    np.testing.assert_array_equal(audio.cut(waveform), np.ones((1, 320_000), np.int16))


def test_crop_takes_30_s_at_random_only_with_a_generator():
    waveform = np.arange(1_000_000)
    assert audio.crop(waveform)[[0, -1]].tolist() == [0, 959_999]
    starts = {int(audio.crop(waveform, np.random.default_rng(s))[0]) for s in range(20)}
    assert len(starts) > 15 and max(starts) <= 40_000
    assert len(audio.crop(waveform, np.random.default_rng(0))) == 960_000
    short = np.arange(960_000)
    assert audio.crop(short, np.random.default_rng(0)) is short


# --- Log-mel and PaSST ---


@pytest.mark.parametrize("training", [False, True])
def test_log_mel_equals_hear21passts(training, capsys):
    theirs = AugmentMelSTFT(
        n_mels=128, sr=32_000, win_length=800, hopsize=320, n_fft=1024, freqm=0, timem=0,
        htk=False, fmin=0.0, fmax=None, norm=1, fmin_aug_range=10, fmax_aug_range=2000,
    ).train(training)
    ours = audio.LogMel().train(training)
    segments = 0.1 * torch.randn(3, 320_000, generator=torch.Generator().manual_seed(0))
    segments[1, 100_000:] = 0
    for seed in (0, 1):
        torch.manual_seed(seed)
        with pytest.warns(FutureWarning):
            wanted = theirs(segments)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(segments), wanted, rtol=0, atol=1e-4)
    assert ours(segments).shape == (3, 128, 1000)


@pytest.fixture(scope="module")
def report_tower():
    torch.manual_seed(0)
    tower = audio.AudioTower(768, 2, 12, (16, 16), (2, 15))
    return tower.eval()


def test_passt_equals_hear21passts_and_prints_nothing(report_tower, capsys):
    capsys.readouterr()
    segments = 0.1 * torch.randn(2, 320_000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = report_tower(segments)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""

    theirs = get_model(
        "passt_s_p16_s16_128_ap468", pretrained=False, fstride=16, tstride=16, input_tdim=1000,
        s_patchout_t=15, s_patchout_f=2,
    ).eval()
    theirs.blocks = theirs.blocks[:2]  # two of the twelve will do
    own = {k: v for k, v in theirs.state_dict().items() if k not in audio.CLASSIFIER_KEYS}
    assert own.keys() == report_tower.passt.state_dict().keys()
    theirs.load_state_dict(report_tower.passt.state_dict() | theirs_heads(theirs))
    with torch.inference_mode():
        wanted = theirs(report_tower.mel(segments).unsqueeze(1))[1]
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)


def theirs_heads(model):
    return {k: v for k, v in model.state_dict().items() if k in audio.CLASSIFIER_KEYS}


def test_patchout_leaves_47_by_6_patches_in_training_only(report_tower):
    lengths = []
    hook = report_tower.passt.blocks[0].register_forward_hook(
        lambda module, inputs, output: lengths.append(output.shape[1])
    )
    with torch.inference_mode():
        report_tower(torch.zeros(1, 320_000))
        report_tower.train()(torch.zeros(1, 320_000))
    report_tower.eval()
    hook.remove()
    assert lengths == [2 + 8 * 62, 2 + 6 * 47]


def test_int16_segments_are_scaled_to_one(report_tower):
    segments = torch.randint(-3000, 3000, (1, 320_000), dtype=torch.int16)
    with torch.inference_mode():
        torch.testing.assert_close(report_tower(segments), report_tower(segments.float() / 32_768))


def test_soundfile_reads_every_suffix_that_is_looked_for():
    readable = {f".{name.lower()}" for name in soundfile.available_formats()}
    readable |= {".oga", ".opus", ".aif"}  # other names for ogg and aiff
    assert readable >= decoding.AUDIO_SUFFIXES
