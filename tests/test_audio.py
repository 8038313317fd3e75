"""Segments, patches and attention against lengths and values known beforehand and second routes.

That log-mel and PaSST equal hear21passt's is tested in test_model.py.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import noise
from hear21passt.models import passt

from dualenc import audio
from dualenc.model import PRESETS

TINY = PRESETS["tiny"]


def ramp(samples: int, first: int = 1) -> np.ndarray:
    """Return whole numbers from first on, (n,) int32: every sample tells where it stood."""
    return np.arange(first, first + samples, dtype=np.int32)


@pytest.fixture(scope="module")
def tower() -> audio.AudioTower:
    torch.manual_seed(0)
    return audio.AudioTower(96, 2, 3, TINY.patch, TINY.patchout).eval()


# --- Segments ---

def test_a_crop_in_training_is_30_s_from_a_random_place():
    waveform = ramp(960_002, first=0)
    rng = np.random.default_rng(0)
    crops = [audio.crop(waveform, rng) for _ in range(20)]
    assert {len(crop) for crop in crops} == {960_000}
    assert {crop[0] for crop in crops} == {0, 1, 2}


def test_a_crop_without_a_generator_is_the_first_30_s():
    np.testing.assert_array_equal(audio.crop(ramp(960_002)), ramp(960_000))


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_a_clip_of_at_most_30_s_is_not_cropped(rng):
    np.testing.assert_array_equal(audio.crop(ramp(960_000), rng), ramp(960_000))


@pytest.mark.parametrize(
    ("samples", "count"),
    [
        (1, 1),
        (3_199, 1),  # less than 0.1 s, but there is no full segment before it
        (320_000, 1),
        (323_199, 1),  # less than 0.1 s after a full segment is dropped
        (323_200, 2),
        (960_000, 3),
        (3_520_000, 11),
    ],
)
def test_a_sound_has_a_segment_for_each_10_s_begun_but_for_less_than_a_tenth(samples, count):
    assert audio.segment_count(samples) == count


def test_a_segment_holds_10_s_and_zeros_fill_the_last_one():
    waveform = ramp(323_200)
    segments, counts = audio.to_segments([waveform])
    assert counts.tolist() == [2]
    assert segments.shape == (2, 320_000)
    assert segments.dtype == torch.int32
    np.testing.assert_array_equal(segments[0], waveform[:320_000])
    np.testing.assert_array_equal(segments[1, :3_200], waveform[320_000:])
    assert not segments[1, 3_200:].any()


def test_a_short_remainder_is_dropped():
    segments, counts = audio.to_segments([ramp(323_199)])
    assert counts.tolist() == [1]
    np.testing.assert_array_equal(segments[0], ramp(320_000))


def test_clips_of_all_lengths_are_cut_side_by_side():
    lengths = [9, 323_199, 323_200, 640_000, 9]
    clips = [ramp(length, first=1_000_000 * i) for i, length in enumerate(lengths, start=1)]
    segments, counts = audio.to_segments(clips)
    assert counts.tolist() == [1, 1, 2, 2, 1]
    assert segments[:, 0].tolist() == [
        1_000_000, 2_000_000, 3_000_000, 3_320_000, 4_000_000, 4_320_000, 5_000_000,
    ]


# --- Patches and attention ---

@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [(16, 16), (128, 16)])
def test_patches_are_those_of_a_convolution_whose_stride_is_its_kernel(patch, precision):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(1, 96, patch, stride=patch)
    log_mel = torch.randn(3, 1, 128, 1000)  # 62 patches of 16 frames; 8 frames are left
    expected = convolution(log_mel)
    projection = audio.PatchProjection(convolution)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        embedded = projection(log_mel)
    assert embedded.dtype == precision
    bound = 1e-5 if precision == torch.float32 else 0.02  # bf16 has 8 bits
    torch.testing.assert_close(embedded.float(), expected, rtol=0, atol=bound)


def test_the_patches_weights_have_a_convolutions_names_and_shapes(tower):
    theirs = passt.PatchEmbed((128, 1000), TINY.patch, TINY.patch, in_chans=1, embed_dim=96)
    ours = tower.passt.patch_embed
    for name, weights in theirs.state_dict().items():
        assert ours.state_dict()[name].shape == weights.shape
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(("precision", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_attention_is_hear21passts_in_either_way(precision, bound):
    torch.manual_seed(0)
    theirs = passt.Attention(96, num_heads=3, qkv_bias=True)
    patches = 3 * torch.randn(2, 64, 96)
    expected = theirs(patches)
    ours = audio.Attention(theirs)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        attended = ours(patches)
    torch.testing.assert_close(attended.float(), expected, rtol=0, atol=bound)


# --- The tower ---

@contextlib.contextmanager
def noted_outputs(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives what a module computes within the block."""
    outputs = []

    def note(module, inputs, output):
        outputs.append(output)

    hook = module.register_forward_hook(note)
    yield outputs
    hook.remove()


@torch.no_grad()
def test_int16_segments_have_the_features_of_floats_in_minus_1_to_1(tower):
    segments = torch.randint(-3000, 3000, (1, 320_000), dtype=torch.int16)
    torch.testing.assert_close(tower(segments), tower(segments / 32_768), rtol=0, atol=1e-6)


@torch.no_grad()
def test_segments_in_one_batch_have_the_features_that_each_has_alone(tower):
    segments = torch.from_numpy(noise(70)).view(7, 320_000)  # more than a chunk
    alone = torch.cat([tower(segment[None]) for segment in segments])
    torch.testing.assert_close(tower(segments), alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_patchout_and_jitter_are_for_training_only(tower):
    segments = torch.from_numpy(noise(10))[None]
    assert tower(segments).equal(tower(segments))
    tower.train()
    one = tower(segments)
    other = tower(segments)
    tower.eval()
    assert not one.equal(other)


@torch.no_grad()
def test_training_leaves_the_patchouts_rows_and_columns_out():
    tower = audio.AudioTower(96, 1, 3, (16, 16), patchout=(2, 15)).train()
    with noted_outputs(tower.passt.blocks[0]) as outputs:
        tower(torch.from_numpy(noise(10))[None])
    tokens = 2
    rows = 8 - 2
    columns = 62 - 15
    assert [output.shape for output in outputs] == [(1, tokens + rows * columns, 96)]


@torch.no_grad()
def test_log_mel_is_computed_in_fp32_under_autocast(tower):
    segments = torch.from_numpy(noise(10))[None]
    with noted_outputs(tower.mel) as log_mels:
        tower(segments)
        with torch.autocast("cpu", torch.bfloat16):
            tower(segments)
    without_autocast, under_autocast = log_mels
    assert under_autocast.equal(without_autocast)
