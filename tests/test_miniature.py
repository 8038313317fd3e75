"""The miniature data sets: laid out like the real ones, and every caption true of its sound.

What a caption tells is read here by words that were written down apart from the grammar.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dualenc import miniature
from dualenc.data import read_split
from evaluate import read_annotations

SIZES = dict(development=4, validation=2, evaluation=24, train=4, val=3, test=3)
ORDERED_SPLITS = ("clotho/train", "clotho/val", "clotho/test",
                  "audiocaps/train", "audiocaps/val", "audiocaps/test")
RATE_HZ = miniature.RATE_HZ

SUBJECTS = {
    "dog": "dog|hound",
    "bird": "bird",
    "rain": "rain",
    "bell": "bell",
    "siren": "siren",
    "engine": "engine|motor",
    "footsteps": "footsteps|someone|person",
    "clock": "clock",
}
ADVERBS = {
    "loud": "loudly|noisily",
    "faint": "faintly|softly|quietly",
    "high": "high pitch|shrilly",
    "low": "low pitch|deeply",
    "fast": "quickly|rapidly|fast pace",
    "slow": "slowly|unhurriedly|slow pace",
}
BED = " while | meanwhile | over | as | in the background"


class Told(NamedTuple):
    """What a caption tells: (source, manner or None) in order, and the bed under them or None."""

    front: list
    bed: tuple | None = None

    @property
    def sounds(self) -> list:
        return self.front if self.bed is None else [*self.front, self.bed]


def listen(caption: str) -> Told:
    """Read a caption as a person does: a manner belongs to the sound that was named before it."""
    starts = {}
    for source, subject in SUBJECTS.items():
        match = re.search(subject, caption, re.IGNORECASE)
        if match:
            starts[match.start()] = source
    sounds = []
    for start, end in itertools.pairwise([*sorted(starts), len(caption)]):
        manners = [m for m, words in ADVERBS.items() if re.search(words, caption[start:end])]
        assert len(manners) <= 1, caption
        sounds.append((starts[start], manners[0] if manners else None))
    if re.search(BED, caption):
        return Told(sounds[:-1], sounds[-1])
    return Told(sounds)


def is_true(told: Told, scene: Told) -> bool:
    """Whether all that is told is so in the scene."""
    manner_of = dict(scene.sounds)
    for source, manner in told.sounds:
        if source not in manner_of:
            return False
        if manner is not None and manner != manner_of[source]:
            return False
    order = [source for source, _ in scene.front]
    for (earlier, _), (later, _) in itertools.combinations(told.front, 2):
        if earlier not in order or later not in order or order.index(earlier) > order.index(later):
            return False
    if told.bed is not None:
        for source, _ in told.front:
            if scene.bed is None or scene.bed[0] not in (source, told.bed[0]):
                return False
    return True


def whole_scene(captions: list[str]) -> Told:
    """The scene of which captions each leave out some manners."""
    told = [listen(caption) for caption in captions]
    manner_of = {}
    for sound in itertools.chain(*(one.sounds for one in told)):
        if manner_of.get(sound[0]) is None:
            manner_of[sound[0]] = sound[1]
    front = [(source, manner_of[source]) for source, _ in told[0].front]
    bed = told[0].bed and (told[0].bed[0], manner_of[told[0].bed[0]])
    return Told(front, bed)


# --- Sounds are measured ---

def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def centroid_hz(waveform: np.ndarray) -> float:
    """The mean frequency, weighted by power; what is 30 dB below the loudest does not count."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    power *= power > 1e-3 * power.max()
    return np.fft.rfftfreq(len(waveform), 1 / RATE_HZ) @ power / power.sum()


def level_below(hz: float, waveform: np.ndarray) -> float:
    """The RMS of what lies below a frequency, in the loudest frame of 50 ms."""
    frame = RATE_HZ // 20
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    spectra = np.fft.rfft(frames)
    spectra[:, np.fft.rfftfreq(frame, 1 / RATE_HZ) > hz] = 0
    return np.fft.irfft(spectra).std(axis=1).max()


def thirds(waveform: np.ndarray) -> list[np.ndarray]:
    return np.array_split(waveform, 3)


def rises_a_second(curve: np.ndarray, curve_hz: float) -> float:
    """How often a curve rises from its lower third into its upper third."""
    third = (curve.max() - curve.min()) / 3
    lower = curve.min() + third
    upper = curve.max() - third
    rises = 0
    is_low = True
    for value in curve:
        if is_low and value > upper:
            rises += 1
            is_low = False
        elif value < lower:
            is_low = True
    return rises * curve_hz / len(curve)


def as_scene(front, bed=None) -> miniature.Scene:
    sounds = tuple(miniature.Sound(*sound) for sound in front)
    return miniature.Scene(sounds, bed and miniature.Sound(*bed))


def render(front, bed=None, seed=0, seconds=8) -> np.ndarray:
    scene = as_scene(front, bed)
    return miniature.render(scene, seconds * RATE_HZ, np.random.default_rng(seed))


def scene_and_captions(seed, data_set) -> tuple[Told, list[str]]:
    rng = np.random.default_rng(seed)
    scene = miniature.draw_scene(rng)
    captions = miniature.captions(scene, data_set, 5, rng)
    return Told(list(scene.front), scene.bed), list(captions)


# --- Tests ---

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "miniature"
    miniature.write_miniature(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return [read_split(*name.split("/"), folder) for name in ORDERED_SPLITS]


def test_both_data_sets_are_read(splits):
    assert [len(split.clips) for split in splits] == list(SIZES.values())
    for split in splits:
        assert not split.missing
        for clip in split.clips:
            assert len(set(clip.captions)) == (1 if split.name == "audiocaps/train" else 5)


def test_all_sounds_are_band_limited_alike_and_as_long_as_the_real_ones(splits):
    for split in splits:
        for clip in split.clips:
            with wave.open(str(clip.path)) as file:
                assert file.getparams()[:3] == (1, 2, RATE_HZ)
                seconds = file.getnframes() / RATE_HZ
            assert 4 <= seconds <= (10 if split.name.startswith("audiocaps") else 24)


def test_names_are_as_awkward_as_the_real_ones(splits):
    names = []
    for split in splits:
        names += [clip.path.name for clip in split.clips]
    for character in "', -_":
        assert any(character in name for name in names)
    assert {"-", "_"} <= {name[0] for name in names}


def test_no_clip_is_in_two_splits(folder):
    sounds = [path.read_bytes() for path in folder.rglob("*.wav")]
    assert len(set(sounds)) == len(sounds) == sum(SIZES.values())


def test_a_clip_follows_from_its_key_however_many_others_there_are(folder, tmp_path):
    miniature.write_miniature(tmp_path, dict.fromkeys(SIZES, 1))
    sounds = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.wav")]
    assert len(sounds) == len(SIZES)
    for sound in sounds:
        assert (tmp_path / sound).read_bytes() == (folder / sound).read_bytes()


def test_an_interrupted_folder_is_completed(folder, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    target = tmp_path / "miniature"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(miniature, "write_csv", interrupted)
        miniature.write_miniature(target, dict.fromkeys(SIZES, 1))
    assert not target.exists()
    miniature.write_miniature(target, dict.fromkeys(SIZES, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["miniature"]
    assert len(list(target.rglob("*.wav"))) == len(SIZES)


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "left as it is" in miniature.write_miniature(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("data_set", [miniature.CLOTHO, miniature.AUDIOCAPS])
def test_captions_name_the_sounds_in_order_and_only_their_manners(data_set):
    for seed in range(150):
        scene, captions = scene_and_captions(seed, data_set)
        assert len(set(captions)) == 5
        for caption in captions:
            told = listen(caption)
            names = [source for source, _ in told.sounds]
            assert names == [source for source, _ in scene.sounds], caption
            assert is_true(told, scene), caption


def test_no_bed_is_so_loud_that_it_drowns_the_front():
    rng = np.random.default_rng(0)
    beds = [miniature.draw_scene(rng).bed for _ in range(300)]
    manners = {bed.manner for bed in beds if bed is not None}
    assert manners == {None, "faint", "high", "low", "fast", "slow"}


def test_most_captions_tell_a_manner(splits):
    has_manner = []
    for split in splits:
        for caption in split.captions:
            has_manner += [manner is not None for _, manner in listen(caption).sounds]
    assert 0.4 < np.mean(has_manner) < 0.7


def test_a_clips_captions_tell_of_one_scene(splits):
    for split in splits:
        for clip in split.clips:
            scene = whole_scene(clip.captions)
            for caption in clip.captions:
                assert is_true(listen(caption), scene), clip


def test_what_is_true_of_a_scene():
    dog, bell, rain = ("dog", None), ("bell", None), ("rain", None)
    loud, faint = ("dog", "loud"), ("dog", "faint")
    true = miniature.facts(as_scene([loud, bell], bed=rain))
    for told in ([dog], None), ([loud, bell], None), ([dog], rain), ([rain], dog):
        assert miniature.facts(as_scene(*told)) <= true
    for told in ([bell, dog], None), ([faint], None), ([dog], bell), ([dog, rain], None):
        assert not miniature.facts(as_scene(*told)) <= true


def test_annotations_are_all_clips_of_which_the_query_is_true(folder, splits):
    evaluation = splits[2]
    annotations = read_annotations(folder / "metadata_eval.csv", evaluation)
    scenes = [whole_scene(clip.captions) for clip in evaluation.clips]
    for row, relevant in annotations.items():
        told = listen(evaluation.captions[row])
        assert sorted(relevant) == [i for i, scene in enumerate(scenes) if is_true(told, scene)]
    assert max(len(relevant) for relevant in annotations.values()) > 1


def test_a_query_that_leaves_out_a_manner_is_true_of_clips_with_another():
    told = as_scene([("dog", None), ("bell", None)])
    loud = as_scene([("dog", "loud"), ("bell", None)])
    faint = as_scene([("dog", "faint"), ("bell", "high")])
    reversed_order = as_scene([("bell", None), ("dog", "loud")])
    clips = [
        miniature.Clip("loud.wav", loud, {"A dog barks before a bell rings.": told}),
        miniature.Clip("faint.wav", faint, {"A dog barks faintly, then a bell shrilly.": faint}),
        miniature.Clip("reversed.wav", reversed_order, {"A bell, then a dog.": reversed_order}),
    ]
    annotations = miniature.annotate(clips, np.random.default_rng(0))
    assert annotations == {
        "A dog barks before a bell rings.": ["loud.wav", "faint.wav"],
        "A dog barks faintly, then a bell shrilly.": ["faint.wav"],
        "A bell, then a dog.": ["reversed.wav"],
    }


def test_every_evaluation_clip_is_asked_for_once(folder, splits):
    evaluation = splits[2]
    annotations = read_annotations(folder / "metadata_eval.csv", evaluation)
    asked = [evaluation.clip_of_caption[row] for row in annotations]
    assert sorted(asked) == list(range(len(evaluation.clips)))


def test_a_sound_is_of_the_scene_that_its_captions_tell(splits):
    """Power below 300 Hz tells engines and footsteps from birds, rain and clocks."""
    for split in splits:
        for clip in split.clips:
            sources = {source for source, _ in listen(clip.captions[0]).sounds}
            level = level_below(300, read_wav(clip.path))
            if sources & {"engine", "footsteps"}:
                assert level > 0.008, clip
            elif sources <= {"bird", "rain", "clock"}:
                assert level < 0.006, clip


def test_sounds_follow_one_another_in_the_order_of_the_scene():
    rising = [centroid_hz(third) for third in thirds(render(
        [("engine", None), ("bell", None), ("bird", None)]))]
    falling = [centroid_hz(third) for third in thirds(render(
        [("bird", None), ("bell", None), ("engine", None)]))]
    assert 2 * rising[0] < rising[1] < rising[2] / 2
    assert 2 * falling[2] < falling[1] < falling[0] / 2


def test_a_bed_is_heard_under_all_sounds_of_the_front():
    front = [("bird", None), ("clock", None)]
    alone = render(front)
    over_engine = render(front, bed=("engine", None))
    for without_bed, with_bed in zip(thirds(alone), thirds(over_engine), strict=True):
        assert level_below(500, with_bed) > 10 * level_below(500, without_bed)


def sources_with(manner):
    return [name for name, source in miniature.SOURCES.items() if manner in source.manners]


@pytest.mark.parametrize("source", sources_with("loud"))
def test_loud_is_louder_than_plain_and_faint_is_fainter(source):
    for seed in range(2):
        faint, plain, loud = (render([(source, manner)], seed=seed).std()
                              for manner in ("faint", None, "loud"))
        assert loud > 1.6 * plain
        assert plain > 1.6 * faint


@pytest.mark.parametrize("source", sources_with("high"))
def test_high_is_higher_than_plain_and_low_is_lower(source):
    for seed in range(2):
        low, plain, high = (centroid_hz(render([(source, manner)], seed=seed))
                            for manner in ("low", None, "high"))
        assert high > 1.2 * plain
        assert plain > 1.2 * low


@pytest.mark.parametrize("source", sources_with("fast"))
def test_fast_has_more_strokes_a_second_than_plain_and_slow_has_fewer(source):
    def strokes(manner):
        rates = []
        for seed in range(3):
            frames = render([(source, manner)], seed=seed).reshape(-1, RATE_HZ // 20)
            if source == "siren":  # It has no strokes: its pitch goes up and down.
                curve = np.array([centroid_hz(frame) for frame in frames])
            else:
                curve = frames.std(axis=1)
            rates.append(rises_a_second(curve, 20))
        return np.mean(rates)

    assert strokes("fast") > 1.3 * strokes(None)
    assert strokes(None) > 1.3 * strokes("slow")


def test_sounds_stay_within_full_scale():
    """Drops of loud rain and a clock's ticks would be above it."""
    for seed in range(3):
        waveform = render([("rain", "loud")], bed=("clock", None), seed=seed)
        assert waveform.dtype == np.float32
        assert 0.89 < np.abs(waveform).max() <= 0.9


# --- demo.sh, with a stand-in for Python ---

def stand_in(folder: Path, script: str) -> None:
    """Put demo.sh into a folder whose Python is a shell script that is given the arguments."""
    (folder / "demo.sh").symlink_to(Path(__file__).parents[1] / "demo.sh")
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def run_demo(folder: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        "./demo.sh", cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        timeout=30,
    )


def test_the_demo_ends_the_other_run_where_one_fails_and_shows_why(tmp_path):
    cases = "*er0) exec sleep 99;; *er1) sleep 1; echo why >&2; exit 2;;"
    stand_in(tmp_path, f"case $* in {cases} esac")
    done = run_demo(tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("clotho-teacher1.txt <==\nwhy\n")


def test_the_demo_distils_each_student_from_two_teachers_of_its_row(tmp_path):
    stand_in(tmp_path, 'echo "$*" >> commands.txt')
    assert run_demo(tmp_path, SEEDS="0 3").returncode == 0
    commands = (tmp_path / "commands.txt").read_text()
    for student, teachers in (
        ("clotho-student0", ("clotho-teacher0", "clotho-teacher1")),
        ("clotho-student3", ("clotho-teacher6", "clotho-teacher7")),
        ("clotho-audiocaps-student3", ("clotho-audiocaps-teacher6", "clotho-audiocaps-teacher7")),
    ):
        paths = " ".join(f"runs/demo/{teacher}/best.pt" for teacher in teachers)
        assert re.search(f"distill.py --teachers {paths} .*--out runs/demo/{student}\n", commands)
    for teacher in (0, 1, 6, 7):
        alone = f"train.py --datasets clotho --seed {teacher} .*/clotho-teacher{teacher}\n"
        both = f"train.py --datasets clotho audiocaps --seed {teacher} .*caps-teacher{teacher}\n"
        assert re.search(alone, commands)
        assert re.search(both, commands)


def test_the_demo_evaluates_a_teacher_and_the_student_of_each_row_and_seed(tmp_path):
    stand_in(tmp_path, 'echo "$*" > last_command.txt')
    assert run_demo(tmp_path, SEEDS="0 1", DATA="my miniature").returncode == 0
    command = (tmp_path / "last_command.txt").read_text()
    assert command.startswith("evaluate.py --split test --data-dir my miniature --checkpoint ")
    assert sorted(re.findall(r"runs/demo/(\S+)/best.pt", command)) == [
        "clotho-audiocaps-student0", "clotho-audiocaps-student1",
        "clotho-audiocaps-teacher0", "clotho-audiocaps-teacher2",
        "clotho-student0", "clotho-student1", "clotho-teacher0", "clotho-teacher2",
    ]


def test_the_demo_shows_how_each_run_ended(tmp_path):
    stand_in(tmp_path, 'echo progress; echo "Done: ${*##*/}"; echo Next')
    done = run_demo(tmp_path)
    for run in ("clotho-teacher0", "clotho-audiocaps-teacher1", "clotho-student0"):
        assert f"\nDone: {run}\nNext\n" in done.stdout


def test_a_run_that_fails_at_once_is_noticed(tmp_path):
    stand_in(tmp_path, "case $* in *-teacher0) exit 2;; esac")
    assert run_demo(tmp_path).returncode == 1


def test_with_the_reports_settings_the_demo_trains_in_the_foreground(tmp_path):
    stand_in(tmp_path, 'echo "$*"')
    done = run_demo(tmp_path, PRESET="report", DATA="data")
    assert "train.py --datasets clotho --seed 0 --preset report --data-dir data" in done.stdout
    assert "miniature" not in done.stdout


# Like a training run: the first signal lets it save, a second one ends it.
SAVING_RUN = """
import signal, sys, time

def save(number, frame):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5)
    with open("saved.txt", "a") as file:
        file.write("saved\\n")
    sys.exit(143)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
with open("started.txt", "a") as file:
    file.write("started\\n")
time.sleep(99)
"""


def listen_to_ctrl_c():
    """Undo what a shell that started the tests in the background may have done."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_lets_both_runs_of_the_demo_save_first(tmp_path):
    (tmp_path / "saving_run.py").write_text(SAVING_RUN)
    stand_in(tmp_path, f"case $* in train*) exec {sys.executable} saving_run.py;; esac")
    demo = subprocess.Popen(
        "./demo.sh", cwd=tmp_path, start_new_session=True, preexec_fn=listen_to_ctrl_c
    )
    started = tmp_path / "started.txt"
    deadline = time.monotonic() + 30
    while not started.exists() or started.read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(timeout=30) == 130
    assert (tmp_path / "saved.txt").read_text() == "saved\n" * 2
