"""The miniature data sets: laid out like the real ones, and every caption true of its sound."""

import re
import subprocess
import wave
from pathlib import Path

import numpy as np
import pytest

from dualenc import miniature as mini
from dualenc.data import read_split
from evaluate import read_annotations

SIZES = dict(development=3, validation=2, evaluation=12, train=4, val=3, test=3)
# What a reader goes by, written down apart from the grammar.
WORDS = {kind: kind for kind in mini.KINDS} | {
    "dog": "dog|hound", "engine": "engine|motor", "waves": "waves|sea", "saw": "saw|carpenter",
    "footsteps": "steps|(someone|person) walk", "telephone": "phone", "crickets": "cricket|insect",
}
MANNERS = {
    "loud": r"loudly|noisily", "faint": r"faintly|softly|quietly", "high": r"high pitch|shrilly",
    "low": r"low pitch|deeply", "fast": r"quickly|rapidly|fast pace", "slow": r"slow|unhurriedly",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "miniature"
    mini.write_miniature(folder, SIZES)
    return folder


def test_both_data_sets_are_read(folder):
    splits = [read_split(dataset, split, folder)
              for dataset in ("clotho", "audiocaps") for split in ("train", "val", "test")]
    assert [len(split.clips) for split in splits] == list(SIZES.values())
    for split in splits:
        assert not split.missing
        for clip in split.clips:
            assert len(set(clip.captions)) == (1 if split.name == "audiocaps/train" else 5)
            with wave.open(str(clip.path)) as file:
                assert file.getparams()[:3] == (1, 2, mini.RATE_HZ)
                assert 4 <= file.getnframes() / mini.RATE_HZ <= 24
    assert {"-", "_"} <= {clip.path.name[0] for clip in split.clips}


def test_annotations(folder):
    split = read_split("clotho", "test", folder)
    found = read_annotations(folder / "metadata_eval.csv", split)
    assert len(found) == len({split.clip_of_caption[row] for row in found}) == len(split.clips)
    assert all(split.clip_of_caption[row] in clips for row, clips in found.items())


def test_what_is_true_of_a_scene():
    dog, bell, rain = ((kind, None) for kind in ("dog", "bell", "rain"))
    heard = mini.facts([("dog", "loud"), bell], [rain])
    for said in ([dog], []), ([("dog", "loud"), bell], []), ([dog], [rain]), ([rain], [dog]):
        assert mini.facts(*said) <= heard
    for said in ([bell, dog], []), ([("dog", "faint")], []), ([dog], [bell]), ([dog, rain], []):
        assert not mini.facts(*said) <= heard


def test_a_clip_is_the_same_however_many_others_there_are(folder, tmp_path):
    mini.write_miniature(tmp_path, dict.fromkeys(SIZES, 1))
    assert "left as it is" in mini.write_miniature(tmp_path, SIZES)
    sounds = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.wav")]
    assert len(sounds) == 6
    assert all((tmp_path / s).read_bytes() == (folder / s).read_bytes() for s in sounds)
    assert [path.name for path in folder.parent.iterdir()] == ["miniature"]  # nothing unfinished


@pytest.mark.parametrize("style", [mini.CLOTHO, mini.AUDIOCAPS])
def test_captions_name_the_sounds_in_order_and_how(style):
    for seed in range(150):
        rng = np.random.default_rng(seed)
        front, beds = mini.draw_scene(rng)
        for text, said in mini.captions(front, beds, rng, style, 5).items():
            found = {k: m.start() for k, w in WORDS.items() if (m := re.search(w, text, re.I))}
            assert sorted(found, key=found.get) == [kind for kind, _ in front + beds], text
            named = {manner for manner, word in MANNERS.items() if re.search(word, text)}
            assert named == {m for m in MANNERS for kind in found if (kind, m) in said}, text
            assert said <= mini.facts(front, beds)


@pytest.mark.parametrize("kind", mini.KINDS)
def test_manners_are_heard(kind):
    def measures(manner):  # (level in dB, centre of the spectrum in Hz) of three sounds
        rngs, samples = map(np.random.default_rng, range(3)), 8 * mini.RATE_HZ
        sounds = np.array([mini.render([(kind, manner)], [], samples, rng) for rng in rngs])
        assert sounds.dtype == np.float32 and np.abs(sounds).max() <= mini.PEAK
        power = np.abs(np.fft.rfft(sounds)) ** 2
        power *= power > 1e-3 * power.max(axis=1, keepdims=True)  # leaves out the background
        hz = np.fft.rfftfreq(samples, 1 / mini.RATE_HZ)
        return 10 * np.log10(np.square(sounds).mean(axis=1)), power @ hz / power.sum(axis=1)

    assert (measures("loud")[0] - measures("faint")[0]).min() > 12
    if "high" in mini.KINDS[kind][1]:
        assert measures("high")[1].min() > 2 * measures("low")[1].max()


def test_the_demo_ends_the_other_runs_where_one_fails(tmp_path):
    (tmp_path / "demo.sh").symlink_to(Path(__file__).parents[1] / "demo.sh")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    cases = "*er0) exec sleep 99;; *er1) sleep 1; echo why >&2; exit 2;;"
    python.write_text(f"#!/bin/sh\ncase $* in {cases} esac\n")
    python.chmod(0o755)
    done = subprocess.run("./demo.sh", cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stdout.endswith("clotho-teacher1.txt <==\nwhy\n")
