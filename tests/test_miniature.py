"""The miniature data sets: laid out like the real ones, and every caption true of its sound."""

import ast
import csv
import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from dualenc import InputError, demo
from dualenc.miniature import Clip, annotations, main, write_miniature
from dualenc.scenes import (
    AUDIOCAPS,
    CLOTHO,
    KINDS,
    PEAK,
    Event,
    Scene,
    captions,
    matches,
    render,
    scene,
)

SIZES = {"clotho": (3, 2, 12), "audiocaps": (4, 3, 3)}
RATE_HZ = 16_000
# What a reader goes by, written down apart from the grammar.
WORDS = {
    "dog": r"\b(dog|hound)\b",
    "bird": r"\b(bird|songbird)\b",
    "rain": r"\brain\b",
    "bell": r"\bbell\b",
    "siren": r"\bsiren\b",
    "engine": r"\b(engine|motor)\b",
    "footsteps": r"\b(footsteps|someone walk|person walk)",
    "clock": r"\bclock\b",
    "waves": r"\b(waves|sea)\b",
    "telephone": r"\b(phone|telephone)\b",
    "saw": r"\b(saw|handsaw|carpenter)\b",
    "crickets": r"\b(crickets?|insects)\b",
}
MANNERS = {
    "loud": r"loudly|noisily",
    "faint": r"faintly|softly|quietly",
    "high": r"high pitch|shrilly",
    "low": r"low pitch|deeply",
    "fast": r"quickly|rapidly|fast pace",
    "slow": r"slowly|unhurriedly|slow pace",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    write_miniature(folder, seed=0, **SIZES)
    return folder


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def alone(kind, manner=None, seed=0, duration_s=8.0):
    heard = Scene((Event(kind, manner),), None, duration_s)
    return render(heard, np.random.default_rng(seed), RATE_HZ)


def rms(wave):
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def centroid_hz(wave):
    power = np.abs(np.fft.rfft(wave)) ** 2
    hz = np.fft.rfftfreq(len(wave), 1 / RATE_HZ)
    heard = power > 1e-3 * power.max()  # leaves out the background
    return float((hz * power)[heard].sum() / power[heard].sum())


def onsets(wave):
    """How often the level, over 20 ms, climbs past a quarter of its usual peak."""
    frames = wave[: len(wave) // 320 * 320].reshape(-1, 320)
    level = np.convolve(np.sqrt((frames**2).mean(axis=1)), np.ones(3) / 3, "same")
    above = level > 0.25 * np.quantile(level, 0.98)
    return int((above[1:] & ~above[:-1]).sum())


def with_manner(manner):
    return [kind for kind in KINDS if manner in KINDS[kind].manners]


def test_clotho_layout(folder):
    root = folder / "CLOTHO_v2.1"
    assert {p.name for p in root.iterdir()} == {"clotho_audio_files", "clotho_csv_files"}
    texts = [f"caption_{i}" for i in range(1, 6)]
    for split, count in zip(("development", "validation", "evaluation"), SIZES["clotho"],
                            strict=True):
        rows = table(root / "clotho_csv_files" / f"clotho_captions_{split}.csv")
        assert list(rows[0]) == ["file_name", *texts]
        assert all(len({row[text] for text in texts}) == 5 for row in rows)
        names = [row["file_name"] for row in rows]
        assert len(set(names)) == count
        assert {p.name for p in (root / "clotho_audio_files" / split).iterdir()} == set(names)
        facts = table(root / "clotho_csv_files" / f"clotho_metadata_{split}.csv")
        assert list(facts[0]) == [
            "file_name", "keywords", "sound_id", "sound_link", "start_end_samples",
            "manufacturer", "license"]
        assert [fact["file_name"] for fact in facts] == names
        for fact in facts:
            assert set(fact["keywords"].split(";")) <= set(KINDS)
            info = soundfile.info(root / "clotho_audio_files" / split / fact["file_name"])
            assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
            assert ast.literal_eval(fact["start_end_samples"]) == [0, info.frames]


def test_audiocaps_layout(folder):
    root = folder / "AUDIOCAPS"
    firsts = set()
    for split, count in zip(("train", "val", "test"), SIZES["audiocaps"], strict=True):
        rows = table(root / "csv_files_v1" / f"{split}.csv")
        assert list(rows[0]) == ["audiocap_id", "youtube_id", "start_time", "caption"]
        assert len({row["audiocap_id"] for row in rows}) == len(rows)
        names = [f"{row['youtube_id']}_{row['start_time']}.flac" for row in rows]
        audio = root / "audio_32000Hz" / split
        assert {p.name for p in audio.iterdir()} == set(names)
        per_clip = 1 if split == "train" else 5
        assert len(set(names)) == count and len(names) == count * per_clip
        assert all(names.count(name) == per_clip for name in names)
        assert all(a != b for a, b in zip(names, names[1:], strict=False))
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{11}", row["youtube_id"]) for row in rows)
        firsts |= {name[0] for name in names}
        for name in names:
            info = soundfile.info(audio / name)
            assert (info.samplerate, info.channels, info.format) == (32_000, 1, "FLAC")
            assert 5 <= info.duration <= 10
    assert {"-", "_"} <= firsts


def test_names_are_as_awkward_as_the_real_ones():
    titles = "".join(kind.title for kind in KINDS.values())
    assert all(letter in titles for letter in " ,'_-")


def test_annotations(folder):
    evaluation = folder / "CLOTHO_v2.1" / "clotho_csv_files" / "clotho_captions_evaluation.csv"
    owners = {}
    for row in table(evaluation):
        name = row.pop("file_name")
        for text in row.values():
            owners.setdefault(text, set()).add(name)
    names = set().union(*owners.values())
    rows = table(folder / "metadata_eval.csv")
    assert list(rows[0]) == ["query", "audio_filenames"]
    asked = [row["query"] for row in rows]
    assert len(set(asked)) == len(asked) and 0.15 * len(owners) < len(asked) < 0.25 * len(owners)
    for row in rows:
        relevant = ast.literal_eval(row["audio_filenames"])
        assert len(set(relevant)) == len(relevant)
        assert owners[row["query"]] <= set(relevant) <= names
    raw = (folder / "metadata_eval.csv").read_bytes()
    assert all(f"{text}".encode() in raw for text in asked)


def test_annotations_follow_from_the_scenes():
    both = Scene((Event("dog", "loud"), Event("bell")), None, 8.0)
    dog = Scene((Event("dog", "loud"),), None, 8.0)
    clips = [Clip("a.wav", dog, {"A dog.": dog}), Clip("b.wav", both, {"Both.": both})]
    rows = annotations(clips, np.random.default_rng(0))
    assert rows == [("A dog.", ["a.wav", "b.wav"]), ("Both.", ["b.wav"])]


def test_matches():
    dog, loud_dog, bell, rain = Event("dog"), Event("dog", "loud"), Event("bell"), Event("rain")
    heard = Scene((loud_dog, bell), rain, 8.0)
    for front, bed in [((dog,), None), ((loud_dog, bell), None), ((dog,), rain), ((rain,), dog),
                       ((loud_dog, bell), rain)]:
        assert matches(Scene(front, bed, 4.0), heard)
    for front, bed in [((bell, dog), None), ((Event("dog", "faint"),), None), ((dog,), bell),
                       ((dog, rain), None), ((Event("saw"),), None)]:
        assert not matches(Scene(front, bed, 4.0), heard)


def test_same_seed_same_bytes(folder, tmp_path):
    write_miniature(tmp_path / "again", seed=0, **SIZES)
    assert files(tmp_path / "again") == files(folder)


def test_other_seed_other_sounds_and_clips_do_not_depend_on_the_count(folder, tmp_path):
    def sounds(folder):
        return {data for path, data in files(folder).items() if path.suffix in (".wav", ".flac")}

    few = {"clotho": (1, 1, 1), "audiocaps": (1, 1, 1)}
    write_miniature(tmp_path / "other", seed=1, **few)
    assert not sounds(tmp_path / "other") & sounds(folder)
    write_miniature(tmp_path / "fewer", seed=0, **few)
    assert len(sounds(tmp_path / "fewer")) == 6
    assert sounds(tmp_path / "fewer") < sounds(folder)


@pytest.mark.parametrize("style", [CLOTHO, AUDIOCAPS])
def test_captions_name_the_sounds_in_order_and_how(style):
    for seed in range(150):
        rng = np.random.default_rng(seed)
        heard = scene(rng, style)
        texts = captions(heard, rng, 5, style)
        assert len(texts) == 5
        for text, said in texts.items():
            found = {kind: re.search(word, text, re.I) for kind, word in WORDS.items()}
            found = {kind: match.start() for kind, match in found.items() if match}
            assert sorted(found, key=found.get) == [event.kind for event in heard.events], text
            named = {m for m, word in MANNERS.items() if re.search(word, text)}
            assert named == {event.manner for event in said.events if event.manner}, text
            assert matches(said, heard)
            front, link, bed = re.fullmatch("(.*?)(?: (over|with|while|as) (.*))?", text).groups()
            assert bool(re.search(r"ing\b", front)) == (style is AUDIOCAPS), text
            if link:
                assert bool(re.search(r"ing\b", bed)) == (link in ("over", "with")), text


def test_styles_differ_and_share_their_nouns_and_verbs():
    def words(style):
        texts = []
        for seed in range(100):
            rng = np.random.default_rng(seed)
            texts += captions(scene(rng, style), rng, 5, style)
        return [text.lower().rstrip(".").replace(",", "").split() for text in texts]

    clotho, audiocaps = words(CLOTHO), words(AUDIOCAPS)
    assert np.mean([len(text) for text in clotho]) > np.mean([len(text) for text in audiocaps]) + 3
    assert np.mean([8 <= len(text) <= 20 for text in clotho]) > 0.75
    vocabulary = set().union(*clotho), set().union(*audiocaps)
    assert len(vocabulary[0] & vocabulary[1]) > 0.6 * len(vocabulary[1])


def test_scenes_hold_every_kind_evenly_and_last_one_to_three_segments():
    scenes = [scene(np.random.default_rng(seed)) for seed in range(1500)]
    kinds = [event.kind for heard in scenes for event in heard.events]
    counts = [kinds.count(kind) for kind in KINDS]
    assert min(counts) > 0.75 * max(counts)
    seconds = np.array([heard.duration_s for heard in scenes])
    assert seconds.min() >= 4 and seconds.max() <= 24
    shares = np.bincount(np.ceil(seconds / 10).astype(int), minlength=4)[1:] / len(seconds)
    assert shares == pytest.approx([0.7, 0.22, 0.08], abs=0.05)
    assert {len(heard.events) for heard in scenes} == {1, 2, 3}
    assert all(len(heard.front) * 2.4 <= heard.duration_s for heard in scenes)


@pytest.mark.parametrize("kind", KINDS)
def test_loud_is_at_least_12_db_over_faint(kind):
    loud = min(rms(alone(kind, "loud", seed)) for seed in range(3))
    plain = [rms(alone(kind, None, seed)) for seed in range(3)]
    faint = max(rms(alone(kind, "faint", seed)) for seed in range(3))
    assert faint < min(plain) and max(plain) < loud
    # Loud against faint from one seed: only the level differs between the two.
    ratio = rms(alone(kind, "loud")) / rms(alone(kind, "faint"))
    assert 20 * np.log10(ratio) > 12


@pytest.mark.parametrize("kind", with_manner("high"))
def test_high_is_higher_than_low(kind):
    high, plain, low = (
        [centroid_hz(alone(kind, manner, seed)) for seed in range(4)]
        for manner in ("high", None, "low")
    )
    assert min(high) > 1.3 * max(low)
    assert np.mean(high) > 1.2 * np.mean(plain) > 1.2 * 1.2 * np.mean(low)


@pytest.mark.parametrize("kind", [kind for kind in with_manner("fast") if kind != "siren"])
def test_fast_has_more_onsets_than_slow(kind):
    fast, slow = (
        [onsets(alone(kind, manner, seed)) for seed in range(4)] for manner in ("fast", "slow")
    )
    assert min(fast) > 1.5 * max(slow) and min(slow) >= 2


def test_fast_siren_turns_more_often():
    def turns(manner, seed):
        wave = alone("siren", manner, seed)
        frames = wave[: len(wave) // 1024 * 1024].reshape(-1, 1024) * np.hanning(1024)
        peak = np.abs(np.fft.rfft(frames)).argmax(axis=1)[3:-3]
        above = peak > peak.mean()
        return int((above[1:] != above[:-1]).sum())

    assert min(turns("fast", s) for s in range(4)) > 1.5 * max(turns("slow", s) for s in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_clips_are_alike_and_none_clips(kind):
    one, two = alone(kind, seed=1, duration_s=5), alone(kind, seed=2, duration_s=5)
    assert one.dtype == np.float32 and one.shape == (5 * RATE_HZ,)
    assert np.isfinite(one).all() and np.abs(one).max() <= PEAK
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.5
    again = alone(kind, seed=1, duration_s=5)
    assert np.array_equal(one, again)


def test_sounds_come_in_order_over_a_bed():
    heard = Scene((Event("bird"), Event("engine")), None, 10.0)
    wave = render(heard, np.random.default_rng(0), RATE_HZ)
    halves = wave[: 4 * RATE_HZ], wave[6 * RATE_HZ :]
    assert centroid_hz(halves[0]) > 2000 and centroid_hz(halves[1]) < 1000
    bed = render(Scene((Event("clock"),), Event("rain"), 10.0), np.random.default_rng(0), RATE_HZ)
    assert all(rms(second) > 0.01 for second in np.split(bed, 10))


def test_a_finished_one_is_left_alone(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert "there already" in write_miniature(folder, seed=0, **SIZES)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_an_interrupted_one_is_written_again(tmp_path):
    few = {"clotho": (1, 0, 1), "audiocaps": (1, 0, 0)}
    write_miniature(tmp_path, **few)
    whole = files(tmp_path)
    marker = tmp_path / "miniature.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"complete": False}))
    (tmp_path / "metadata_eval.csv").unlink()
    assert "clips" in write_miniature(tmp_path, **few)
    assert files(tmp_path) == whole


def test_refuses_other_settings_and_foreign_folders(folder, tmp_path):
    before = files(folder)
    with pytest.raises(InputError, match="other settings"):
        write_miniature(folder, seed=1, **SIZES)
    assert files(folder) == before
    real = tmp_path / "CLOTHO_v2.1" / "clotho_csv_files" / "clotho_captions_development.csv"
    real.parent.mkdir(parents=True)
    real.write_text("precious")
    with pytest.raises(InputError, match="CLOTHO_v2.1"):
        write_miniature(tmp_path, **SIZES)
    assert files(tmp_path) == {real.relative_to(tmp_path): b"precious"}
    with pytest.raises(InputError, match="is a file"):
        write_miniature(real, **SIZES)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/miniature.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="a miniature of other settings"):
        write_miniature(tmp_path / "deep", **SIZES)


def test_refuses_negative_numbers(tmp_path):
    for faulty in ({"seed": -1}, {"clotho": (1, -1, 1)}):
        with pytest.raises(InputError, match="from 0 up"):
            write_miniature(tmp_path / "new", **faulty)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("argv", [[], ["new", "--seed", "x"], ["new", "--clotho", "1"]])
def test_faulty_arguments_are_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="folder|--seed|--clotho"):
        main(argv)
    assert not any(tmp_path.iterdir()) and capsys.readouterr().err == ""


@pytest.mark.parametrize("most_bytes", [1_000, 200_000])  # in a sound of Clotho, of AudioCaps
def test_no_space_left_is_one_line(most_bytes, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        with pytest.raises(InputError, match="new: cannot be written .*: is there room"):
            main([str(tmp_path / "new"), "--clotho", "1", "0", "1", "--audiocaps", "4", "1", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- The demo ---


def test_the_demo_ends_the_other_jobs_where_one_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    (tmp_path / "sleeps.py").write_text(
        "import os, time\n"
        "open(os.environ['PID_FILE'], 'x').write(str(os.getpid()))\n"
        "time.sleep(100)\n"
    )
    (tmp_path / "fails.py").write_text(
        "import os, time\n"
        "while not os.path.exists(os.environ['PID_FILE']):\n"
        "    time.sleep(0.01)\n"
        "print('why')\n"
        "raise SystemExit('what to do')\n"
    )
    with pytest.raises(InputError) as error:
        demo.run_all({name: f"{tmp_path / name}.py" for name in ("sleeps", "fails")})
    assert str(error.value).splitlines() == [
        f"python {tmp_path}/fails.py failed:", "  why", "  what to do"
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_demo_ends_where_its_data_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 2))
    assert demo.main() == 2
