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
    """The content of a caption: (source, manner or None) in order, and the bed under them."""

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
    """Tell whether all that is told is so in the scene."""
    return (
        are_sounds_true(told, scene) and is_order_true(told, scene) and is_bed_true(told, scene)
    )


def are_sounds_true(told: Told, scene: Told) -> bool:
    """Tell whether all sounds are in the scene, in the manner that is told, if one is."""
    manner_of = dict(scene.sounds)
    for source, manner in told.sounds:
        if source not in manner_of:
            return False
        if manner is not None and manner != manner_of[source]:
            return False
    return True


def is_order_true(told: Told, scene: Told) -> bool:
    """Tell whether the sounds of the front follow one another in the scene as they are told."""
    sources = [source for source, _ in told.front]
    if len(sources) < 2:
        return True
    order = [source for source, _ in scene.front if source in sources]
    return order == sources


def is_bed_true(told: Told, scene: Told) -> bool:
    """Tell whether of each two sounds that are told as together, one is the scene's bed."""
    if told.bed is None:
        return True
    if scene.bed is None:
        return False
    bed, _ = scene.bed
    return all(bed in (source, told.bed[0]) for source, _ in told.front)


def whole_scene(captions: list[str]) -> Told:
    """Put together the scene of which captions each leave out some manners."""
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
    """Compute the mean frequency, weighted by power, of what is within 30 dB of the loudest."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    power *= power > 1e-3 * power.max()
    return np.fft.rfftfreq(len(waveform), 1 / RATE_HZ) @ power / power.sum()


def level_below(hz: float, waveform: np.ndarray) -> float:
    """Compute the RMS of what lies below a frequency, in the loudest frame of 50 ms."""
    frame = RATE_HZ // 20
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    spectra = np.fft.rfft(frames)
    spectra[:, np.fft.rfftfreq(frame, 1 / RATE_HZ) > hz] = 0
    return np.fft.irfft(spectra).std(axis=1).max()


def thirds(waveform: np.ndarray) -> list[np.ndarray]:
    return np.array_split(waveform, 3)


def rises_a_second(curve: np.ndarray, curve_hz: float) -> float:
    """Count how often a second a curve rises from its lower third into its upper third."""
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


def test_every_split_has_all_of_its_clips(splits):
    assert [len(split.clips) for split in splits] == list(SIZES.values())
    assert [split.missing for split in splits] == [[]] * 6


def test_clips_have_as_many_captions_as_the_real_ones(splits):
    for split in splits:
        captions = 1 if split.name == "audiocaps/train" else 5
        for clip in split.clips:
            assert len(set(clip.captions)) == captions


def test_both_data_sets_have_one_sample_rate(folder):
    for path in folder.rglob("*.wav"):
        with wave.open(str(path)) as file:
            assert file.getframerate() == RATE_HZ


def test_sounds_are_as_long_as_the_real_ones(splits):
    for split in splits:
        longest = 10 if split.name.startswith("audiocaps") else 24
        for clip in split.clips:
            seconds = len(read_wav(clip.path)) / RATE_HZ
            assert seconds >= 4
            assert seconds <= longest


def test_names_hold_and_begin_with_the_awkward_characters_of_the_real_ones(folder):
    names = [path.name for path in folder.rglob("*.wav")]
    characters = set("".join(names))
    first_characters = {name[0] for name in names}
    assert characters >= {"'", ",", " ", "-", "_"}
    assert first_characters >= {"-", "_"}


def test_no_clip_is_in_two_splits(folder):
    sounds = [path.read_bytes() for path in folder.rglob("*.wav")]
    assert len(sounds) == sum(SIZES.values())
    assert len(set(sounds)) == len(sounds)


def test_a_clip_follows_from_its_key_however_many_others_there_are(folder, tmp_path):
    miniature.write_miniature(tmp_path, dict.fromkeys(SIZES, 1))
    sounds = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.wav")]
    assert len(sounds) == len(SIZES)
    for sound in sounds:
        assert (tmp_path / sound).read_bytes() == (folder / sound).read_bytes()


def test_an_empty_folder_may_be_named_by_a_dot(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    miniature.write_miniature(Path("."), dict.fromkeys(SIZES, 1))
    assert len(list(here.rglob("*.wav"))) == len(SIZES)


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


def test_captions_tell_the_manner_of_about_half_of_the_sounds(splits):
    has_manner = []
    for split in splits:
        for caption in split.captions:
            has_manner += [manner is not None for _, manner in listen(caption).sounds]
    assert np.mean(has_manner) == pytest.approx(0.55, abs=0.15)


def test_a_clips_captions_tell_of_one_scene(splits):
    for split in splits:
        for clip in split.clips:
            scene = whole_scene(clip.captions)
            for caption in clip.captions:
                assert is_true(listen(caption), scene), clip


DOG = ("dog", None)
LOUD_DOG = ("dog", "loud")
FAINT_DOG = ("dog", "faint")
BELL = ("bell", None)
RAIN = ("rain", None)


def is_true_of_a_loud_dog_and_a_bell_over_rain(front, bed=None) -> bool:
    scene = as_scene([LOUD_DOG, BELL], bed=RAIN)
    return miniature.facts(as_scene(front, bed)) <= miniature.facts(scene)


@pytest.mark.parametrize(
    ("front", "bed"),
    [([DOG], None), ([LOUD_DOG, BELL], None), ([DOG], RAIN), ([RAIN], DOG)],
)
def test_what_leaves_something_out_is_true_of_a_scene(front, bed):
    assert is_true_of_a_loud_dog_and_a_bell_over_rain(front, bed)


@pytest.mark.parametrize(
    ("front", "bed"),
    [
        ([BELL, DOG], None),  # the other order
        ([FAINT_DOG], None),  # another manner
        ([DOG], BELL),  # one after the other, not together
        ([DOG, RAIN], None),  # together, not one after the other
    ],
)
def test_what_tells_something_else_is_not_true_of_a_scene(front, bed):
    assert not is_true_of_a_loud_dog_and_a_bell_over_rain(front, bed)


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
    # Power below 300 Hz tells engines and footsteps from birds, rain and clocks.
    for split in splits:
        for clip in split.clips:
            sources = {source for source, _ in listen(clip.captions[0]).sounds}
            level = level_below(300, read_wav(clip.path))
            if sources & {"engine", "footsteps"}:
                assert level > 0.008, clip
            elif sources <= {"bird", "rain", "clock"}:
                assert level < 0.006, clip


@pytest.mark.parametrize("split", SIZES)
def test_the_scene_of_a_clips_captions_is_the_one_that_is_rendered(split, tmp_path, monkeypatch):
    render_scene = miniature.render
    rendered = []

    def note_and_render(scene, *arguments):
        rendered.append(scene)
        return render_scene(scene, *arguments)

    monkeypatch.setattr(miniature, "render", note_and_render)
    (tmp_path / miniature.SPLITS[split].sounds.format(split)).mkdir(parents=True)
    clips = [miniature.write_clip(tmp_path, split, index) for index in range(3)]
    assert [clip.scene for clip in clips] == rendered


@pytest.mark.parametrize(
    "sources", [("engine", "bell", "bird"), ("bird", "bell", "engine"), ("bell", "bird", "engine")]
)
def test_sounds_follow_one_another_in_the_order_of_the_scene(sources):
    waveform = render([(source, None) for source in sources])
    centroids = [centroid_hz(third) for third in thirds(waveform)]
    hz = dict(zip(sources, centroids, strict=True))
    assert hz["bell"] > 2 * hz["engine"]
    assert hz["bird"] > 2 * hz["bell"]


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
        faint = render([(source, "faint")], seed=seed).std()
        plain = render([(source, None)], seed=seed).std()
        loud = render([(source, "loud")], seed=seed).std()
        assert loud > 1.6 * plain
        assert plain > 1.6 * faint


@pytest.mark.parametrize("source", sources_with("high"))
def test_high_is_higher_than_plain_and_low_is_lower(source):
    for seed in range(2):
        low = centroid_hz(render([(source, "low")], seed=seed))
        plain = centroid_hz(render([(source, None)], seed=seed))
        high = centroid_hz(render([(source, "high")], seed=seed))
        assert high > 1.2 * plain
        assert plain > 1.2 * low


def strokes_a_second(source: str, manner: str | None) -> float:
    """Measure how often a second a sound swells, or a siren's pitch rises: it has no strokes."""
    rates = []
    for seed in range(3):
        frames = render([(source, manner)], seed=seed).reshape(-1, RATE_HZ // 20)
        if source == "siren":
            curve = np.array([centroid_hz(frame) for frame in frames])
        else:
            curve = frames.std(axis=1)
        rates.append(rises_a_second(curve, 20))
    return np.mean(rates)


@pytest.mark.parametrize("source", sources_with("fast"))
def test_fast_has_more_strokes_a_second_than_plain_and_slow_has_fewer(source):
    plain = strokes_a_second(source, None)
    assert strokes_a_second(source, "fast") > 1.3 * plain
    assert plain > 1.3 * strokes_a_second(source, "slow")


def test_sounds_stay_within_full_scale():
    # Drops of loud rain and a clock's ticks would be above it.
    for seed in range(3):
        waveform = render([("rain", "loud")], bed=("clock", None), seed=seed)
        assert np.abs(waveform).max() == pytest.approx(0.9, abs=0.01)


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


@pytest.fixture(scope="module")
def commands_of_seeds_0_and_3(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    stand_in(folder, 'echo "$*" >> commands.txt')
    assert run_demo(folder, SEEDS="0 3").returncode == 0
    return (folder / "commands.txt").read_text()


@pytest.mark.parametrize("seed", [0, 1, 6, 7])
def test_the_demo_trains_two_teachers_of_each_row_for_a_seed(commands_of_seeds_0_and_3, seed):
    row_1 = f"train.py --datasets clotho --seed {seed} .*/clotho-teacher{seed}\n"
    row_3 = f"train.py --datasets clotho audiocaps --seed {seed} .*caps-teacher{seed}\n"
    assert re.search(row_1, commands_of_seeds_0_and_3)
    assert re.search(row_3, commands_of_seeds_0_and_3)


@pytest.mark.parametrize("row", ["clotho", "clotho-audiocaps"])
@pytest.mark.parametrize(("seed", "first", "second"), [(0, 0, 1), (3, 6, 7)])
def test_the_demo_distils_each_student_from_two_teachers_of_its_row(
    commands_of_seeds_0_and_3, row, seed, first, second
):
    teachers = f"runs/demo/{row}-teacher{first}/best.pt runs/demo/{row}-teacher{second}/best.pt"
    options = f"--seed {seed} --epochs .*--out runs/demo/{row}-student{seed}"
    command = f"distill.py --teachers {teachers} {options}\n"
    assert re.search(command, commands_of_seeds_0_and_3)


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
    stand_in(tmp_path, 'printf "%s|" "$@"')
    done = run_demo(tmp_path, PRESET="report", DATA="my data")
    assert "train.py|--datasets|clotho|--seed|0|--preset|report|--data-dir|my data|" in done.stdout
    assert "miniature" not in done.stdout


def listen_to_ctrl_c():
    """Undo what a shell that started the tests in the background may have done."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_lets_both_runs_of_the_demo_save_first(tmp_path):
    program = Path(__file__).with_name("saving_run.py")
    stand_in(tmp_path, f"case $* in train*) exec {sys.executable} '{program}';; esac")
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
