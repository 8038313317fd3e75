"""Bad input ends with one line that names the culprit and exit status 2, before long work begins.

The tables hold one row per case. What can be read is read: the last table of each kind.
"""

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import distill
import evaluate
import train
from dualenc import InputError
from dualenc.cache import open_cache
from dualenc.decoding import decode
from dualenc.layouts import read_split
from dualenc.model import DualEncoder

RATE_HZ = 8_000
TINY = ["--preset", "tiny", "--batch-size", 4, "--workers", 0, "--epochs", 1]
NOBODY = 65534


@pytest.fixture
def refused(command):
    """A function that runs a command which must be refused, and returns the lines it prints."""

    def call(script, *arguments):
        status, printed = command(script, *arguments)
        # The mp3 decoder speaks for itself of a file that is cut off.
        lines = [line for line in printed.splitlines() if not line.startswith("Warning: Xing")]
        assert status == 2 and "Traceback" not in printed, printed
        assert lines[0].startswith(f"{script.__name__}.py: "), printed
        return lines

    return call


@pytest.fixture
def no_model(monkeypatch):
    """Building a model, which may take long, fails the test from here on."""

    def build(*arguments):
        raise AssertionError("a model was built before the input was looked at")

    monkeypatch.setattr(DualEncoder, "__init__", build)


@pytest.fixture
def sounds(tmp_path):
    """A folder of four short sounds and their captions."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", noise(seed=i), RATE_HZ)
    (folder / "captions.csv").write_text(
        "file_name,caption\n" + "".join(f"{i}.wav,sound number {i}\n" for i in range(4))
    )
    return folder


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.save(tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def noise(seconds=1.0, rate=RATE_HZ, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((int(seconds * rate), channels))


@contextlib.contextmanager
def ordinary_user():
    """For root, too, permissions hold."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


# --- Sounds ---


def wav(samples=None, rate=RATE_HZ, subtype="PCM_16"):
    path = Path("made.wav")
    soundfile.write(path, noise() if samples is None else samples, rate, subtype)
    return path.read_bytes()


def cut_off(name, **options):
    soundfile.write(name, noise(8), RATE_HZ, **options)
    content = Path(name).read_bytes()
    return content[: len(content) * 2 // 3]


def claiming(content, place, value):
    """A wav whose header says another number at a place."""
    return content[:place] + struct.pack("<I", value) + content[place + 4 :]


def spoilt(value):
    samples = noise()
    samples[500] = value
    return wav(samples, subtype="FLOAT")


BAD_SOUNDS = {
    "empty.wav": (lambda: b"", "is empty"),
    "text.wav": (lambda: b"not a sound", "cannot be decoded"),
    "raw.raw": (lambda: bytes(1000), "cannot be decoded"),
    "cut in the header.wav": (lambda: wav()[:30], "cannot be decoded"),
    "cut in the data.wav": (lambda: wav()[:9000], "is cut off: it says 16000 bytes and has 8956"),
    "cut.aiff": (lambda: cut_off("made.aiff"), "is cut off"),
    "cut.flac": (lambda: cut_off("made.flac"), "cannot be decoded"),
    "cut.mp3": (lambda: cut_off("made.mp3"), "ends after"),
    "cut.ogg": (lambda: cut_off("made.ogg"), "is cut off: its last page is not the end"),
    "cut.opus": (lambda: cut_off("made.oga", format="OGG", subtype="OPUS"), "is cut off: its last"),
    "no samples.wav": (lambda: wav(np.zeros(0)), "holds no samples"),
    "nan.wav": (lambda: spoilt(np.nan), "holds NaN, infinite or unscaled samples"),
    "infinite.wav": (lambda: spoilt(-np.inf), "holds NaN, infinite or unscaled samples"),
    "unscaled.wav": (lambda: spoilt(20_000), "holds NaN, infinite or unscaled samples"),
    "rate of 2 GHz.wav": (lambda: claiming(wav(), 24, 2**31 - 1), "has 2147483647 samples"),
    "rate of 1 Hz.wav": (lambda: claiming(wav(), 24, 1), "has 1 samples a second"),
}


@pytest.fixture
def bad_sounds(tmp_path, monkeypatch):
    """A folder with all bad sounds: name -> reason."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, (content, _) in BAD_SOUNDS.items():
        (folder / name).write_bytes(content())
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    reasons = {name: reason for name, (_, reason) in BAD_SOUNDS.items()}
    return folder, reasons | {"folder.wav": "is a folder", "pipe.wav": "is a device or pipe"}


def test_each_bad_sound_is_named_with_the_reason(bad_sounds, tiny):
    folder, reasons = bad_sounds
    for name, reason in (reasons | {"missing.wav": "No such file"}).items():
        with pytest.raises(InputError) as error:
            tiny.embed_audio([folder / name])
        assert str(error.value).startswith(f"{folder / name}: {reason}"), error.value
        assert "\n" not in str(error.value)


def test_training_lists_all_bad_sounds_at_once(refused, bad_sounds, sounds):
    folder, reasons = bad_sounds
    rows = "".join(f"{name},a sound\n" for name in reasons)
    (folder / "captions.csv").write_text("file_name,caption\n" + rows)
    lines = refused(train, "--datasets", sounds, "--validation", folder, *TINY)
    assert f"sound files that cannot be used ({len(reasons)})" in lines[0]
    assert len(lines) == 1 + len(reasons) <= 21
    for line, (name, reason) in zip(lines[1:], reasons.items(), strict=True):
        assert f"{name}: {reason}" in line


def test_many_faults_are_the_first_twenty_and_how_many_more(refused, sounds):
    rows = "".join(f"{i}.wav,a sound\n" for i in range(50))
    (sounds / "captions.csv").write_text("file_name,caption\n" + rows)
    for i in range(50):
        (sounds / f"{i}.wav").write_bytes(b"")
    for _ in range(2):  # the second time with a cache that holds no sound
        lines = refused(train, "--datasets", sounds, *TINY)
        assert "(45)" in lines[0] and lines[21].strip().startswith("and 25 more; ")
        assert "`python -m dualenc.data check FOLDER` lists all" in lines[21]
        assert "#held-out" in lines[22] and "(5)" in lines[22] and len(lines) == 22 + 1 + 5


def test_a_sound_that_may_not_be_read(checkpoint):
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile_folder()))
        soundfile.write(folder / "secret.wav", noise(), RATE_HZ)
        (folder / "secret.wav").chmod(0)
        stack.enter_context(ordinary_user())
        with pytest.raises(InputError, match="secret.wav: Permission denied"):
            decode(folder / "secret.wav")


@contextlib.contextmanager
def tempfile_folder():
    """A folder that an ordinary user reaches, too: pytest's own are root's alone."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield folder


GOOD_SOUNDS = {
    "8 kHz.wav": dict(rate=8_000),
    "192 kHz.wav": dict(rate=192_000),
    "odd rate.wav": dict(rate=22_257),
    "8 channels.wav": dict(channels=8),
    "24 bit.wav": dict(subtype="PCM_24"),
    "float.wav": dict(subtype="FLOAT"),
    "mu-law.wav": dict(subtype="ULAW"),
    "music.mp3": dict(rate=32_000),
    "music.ogg": dict(),
    "music.flac": dict(),
    "1 sample.wav": dict(seconds=1 / RATE_HZ),
    "with 'quotes' and \"quotes\".wav": dict(),
    "with a\nnewline.wav": dict(),
    "with an emoji 🐕.wav": dict(),
    b"not UTF-8 \xff.wav": dict(),
}


@pytest.mark.parametrize("name", GOOD_SOUNDS)
def test_sounds_that_can_be_read_are_read(tmp_path, monkeypatch, tiny, name):
    monkeypatch.chdir(tmp_path)
    options = {"rate": RATE_HZ, "seconds": 1.0, "channels": 1, "subtype": None} | GOOD_SOUNDS[name]
    path = tmp_path / os.fsdecode(name)
    made = f"made{path.suffix}"
    samples = noise(options["seconds"], options["rate"], options["channels"])
    soundfile.write(made, samples, options["rate"], options["subtype"])
    os.rename(made, path)
    waveform = decode(path)
    assert abs(len(waveform) - 32_000 * options["seconds"]) <= 36  # ogg: whole packets; 22.257 kHz
    loudness = np.sqrt(np.square(waveform).mean() * options["channels"])
    assert options["seconds"] < 1 or 0.03 < loudness < 0.12  # of the band that is kept
    embedding = tiny.embed_audio([path])
    assert embedding.isfinite().all() and abs(embedding.norm() - 1) < 1e-5


def test_a_wav_that_was_streamed_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = claiming(claiming(wav(), 4, 2**32 - 1), 40, 2**32 - 1)
    Path("streamed.wav").write_bytes(content)
    assert len(decode("streamed.wav")) == 32_000


# --- Captions ---

HEADER = "file_name,caption\n"
BAD_CAPTIONS = {
    "no rows": (HEADER, "captions.csv: holds no rows"),
    "an empty file": ("", "needs the column 'file_name' once"),
    "a missing column": ("file_name,text\n0.wav,a dog\n", "needs the column 'caption' once"),
    "a misspelt column": ("filename,caption\n0.wav,a dog\n", "needs the column 'file_name' once"),
    "a repeated column": ("file_name,caption,caption\n0.wav,a,b\n", "needs the column 'caption'"),
    "an empty caption": (
        HEADER + "0.wav,a dog\n1.wav,\n",
        "rows to be mended or removed: line 3 has no word in caption",
    ),
    "spaces only": (HEADER + "0.wav,   \n", "line 2 has no word in caption"),
    "punctuation only": (HEADER + "0.wav,?!...\n", "line 2 has no word in caption"),
    "no file name": (HEADER + ",a dog\n", "line 2 has no word in file_name"),
    "an absolute file name": (HEADER + "/etc/passwd,a dog\n", "'/etc/passwd' leaves its folder"),
    "a climbing file name": (HEADER + "../../x.wav,a dog\n", "'../../x.wav' leaves its folder"),
    "too few fields": (HEADER + "0.wav,a dog\n1.wav\n", "line 3 has 1 fields instead of 2"),
    "too many fields": (HEADER + "0.wav,a dog, barking\n", "line 2 has 3 fields instead of 2"),
    "not UTF-8": (HEADER.encode() + b"0.wav,caf\xe9\n", "line 2 is not UTF-8; save the file as"),
    "a bad byte far down": (
        HEADER.encode() + b"0.wav,a dog\n" * 10_000 + b"1.wav,caf\xe9\n", "line 10002 is not UTF-8"
    ),
    "a header that is not UTF-8": (b"file_name,caf\xe9\n0.wav,a\n", "line 1 is not UTF-8"),
    "a null byte": (b"file_name,caption\n\0,a\n", "none of the 1 sound files"),
    "an open quote": (
        HEADER + '0.wav,a\n1.wav,"a dog\n2.wav,a cat\n',
        "line 3 cannot be read as csv (unexpected end of data); a quote that opens must close",
    ),
    "a field without end": (HEADER + f"0.wav,{'a' * 200_000}\n", "line 2 cannot be read as csv"),
    "no file on disk": (HEADER + "x.wav,a dog\n", "none of the 1 sound files in its csv"),
    "a name too long": (HEADER + f"{'x' * 300}.wav,a dog\n", "none of the 1 sound files"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_bad_captions(refused, no_model, sounds, case):
    content, words = BAD_CAPTIONS[case]
    content = content if isinstance(content, bytes) else content.encode()
    (sounds / "captions.csv").write_bytes(content)
    (line,) = refused(train, "--datasets", sounds, *TINY)
    assert words in line and str(sounds) in line


def test_no_csv_and_no_folder(refused, no_model, sounds):
    (sounds / "captions.csv").unlink()
    (line,) = refused(train, "--datasets", sounds, *TINY)
    assert "holds sounds and a captions.csv" in line
    (line,) = refused(train, "--datasets", "clothho", *TINY)
    assert "clothho: not a data set" in line


def test_bad_rows_are_listed_together(refused, no_model, sounds):
    (sounds / "captions.csv").write_text(HEADER + "0.wav,a dog\n" + "1.wav,\n2.wav\n" * 15)
    lines = refused(train, "--datasets", sounds, *TINY)
    assert len(lines) == 22 and "(30)" in lines[0] and lines[-1].strip() == "and 10 more"


LONG = " ".join(f"word{i}" for i in range(10_000))
GOOD_CAPTIONS = {
    "a byte-order mark": ("\ufefffile_name,caption\n0.wav,a dog\n", ["a dog"]),
    "CRLF": ("file_name,caption\r\n0.wav,a dog\r\n1.wav,a cat\r\n", ["a dog", "a cat"]),
    "quotes and commas": (HEADER + '0.wav,"a dog, ""barking"""\n', ['a dog, "barking"']),
    "a line break": (HEADER + '0.wav,"a dog\nbarks"\n', ["a dog\nbarks"]),
    "10,000 words": (HEADER + f"0.wav,{LONG}\n", [LONG]),
    "emoji": (HEADER + "0.wav,🐕\n", ["🐕"]),
    "twice the same file": (HEADER + "0.wav,a dog\n0.wav,a bark\n", ["a dog", "a bark"]),
    "spaces around": (HEADER + "0.wav, a dog \n", [" a dog "]),
    "more columns": ("id,caption,file_name\n7,a dog,0.wav\n", ["a dog"]),
}


@pytest.mark.parametrize("case", GOOD_CAPTIONS)
def test_captions_that_can_be_read_are_read(sounds, tiny, case):
    content, captions = GOOD_CAPTIONS[case]
    (sounds / "captions.csv").write_bytes(content.encode())
    split = read_split(str(sounds), "train", sounds)
    assert split.captions == captions
    embeddings = tiny.embed_text(captions)
    assert embeddings.isfinite().all() and (embeddings.norm(dim=1) - 1).abs().max() < 1e-5


def test_names_with_quotes_newlines_and_emoji_stand_in_a_csv(sounds):
    names = ['a "b".wav', "a\nb.wav", "🐕.wav", "a, b.wav"]
    for name in names:
        shutil.copy(sounds / "0.wav", sounds / name)
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    (sounds / "captions.csv").write_text(HEADER + "".join(f"{name},a dog\n" for name in quoted))
    split = read_split(str(sounds), "train", sounds)
    assert [clip.name for clip in split.clips] == names and not split.missing
    assert len(open_cache(split, sounds / "cache")) == 4


def test_a_folder_whose_name_is_not_utf8(command, refused, sounds):
    folder = sounds.rename(os.fsdecode(os.fsencode(sounds) + b"\xff[1]\n"))
    status, printed = command(train, "--datasets", folder, *TINY, "--out", "run")
    assert status == 0, printed
    (folder / "0.wav").write_bytes(b"")
    (line,) = refused(train, "--datasets", folder, *TINY, "--out", "other")
    assert "sounds\\udcff[1]\\n/0.wav: is empty" in line


# --- Annotations ---

ANNOTATED = "query,audio_filenames\n"
BAD_ANNOTATIONS = {
    "an unknown query": ("never said,\"['{0}']\"\n", "'never said'"),
    "an unknown clip": ("{1},\"['x.wav']\"\n", "'x.wav'"),
    "no list": ("{1},a.wav\n", "is not a list"),
    "a tuple": ("{1},\"('{0}',)\"\n", "is not a list"),
    "a list of numbers": ('{1},"[1, 2]"\n', "is not a list"),
    "an empty list": ("{1},[]\n", "is not a list"),
    "an expression": ("{1},\"[open('ran', 'w')]\"\n", "is not a list"),
    "a comprehension": ("{1},\"[x for x in open('ran', 'w')]\"\n", "is not a list"),
    "a deep list": ("{1}," + "[" * 50_000 + "1" + "]" * 50_000 + "\n", "is not a list"),
    "a long sum": ("{1}," + "-" * 50_000 + "1\n", "is not a list"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotations(refused, miniature, checkpoint, tmp_path, case):
    row, words = BAD_ANNOTATIONS[case]
    clip = read_split("clotho", "test", miniature).clips[0]
    row = row.replace("{0}", clip.name.replace("'", "\\'"))
    row = row.replace("{1}", '"' + clip.captions[0].replace('"', '""') + '"')
    (tmp_path / "new.csv").write_text(ANNOTATED + row)
    arguments = ["--checkpoint", checkpoint, "--annotations", tmp_path / "new.csv"]
    (line,) = refused(evaluate, *arguments)
    assert "new.csv" in line and words in line
    assert not Path("ran").exists() and not (tmp_path / "cache").exists()


# --- Options ---

TEACHER = ["--teachers", "{checkpoint}"]
BAD_OPTIONS = [
    *[(train, [f"--{name}", value], f"--{name}") for name, value in [
        ("batch-size", "1"), ("batch-size", "x"), ("batch-size", "1.5"), ("batch-size", "1e400"),
        ("captions-per-clip", "0"), ("micro-batch", "0"), ("epochs", "0"), ("epochs", "-1"),
        ("epochs", str(10**30)), ("max-steps", "0"), ("max-lr", "0"), ("max-lr", "nan"),
        ("max-lr", "inf"), ("min-lr", "-1"), ("warmup-epochs", "-1"), ("warmup-epochs", "inf"),
        ("decay-epochs", "-1"), ("weight-decay", "-1"), ("seed", "-1"), ("seed", str(2**40)),
        ("log-every", "0"), ("checkpoint-every", "0"), ("workers", "-1"), ("workers", "1000000"),
        ("tau", "0"), ("tau", "nan"), ("tau", "5"), ("preset", "huge"), ("precision", "fp8"),
        ("device", "gpu"), ("device", "cuda:99"), ("init", "nowhere.pt"),
        ("out", "{file}"), ("text-dropout", "0.95"), ("text-dropout", "nan"), ("tokenizer", "a"),
    ]],
    (train, ["--patchout", "-1", "0"], "argument --patchout"),
    (train, ["--patchout", "1", "0"], "--patchout: patchout (1, 0) leaves none of 1 x 125"),
    (train, ["--patchout", "0", "125"], "--patchout: patchout (0, 125) leaves none of 1 x 125"),
    (train, ["--text-model", "nowhere"], "--text-model nowhere: cannot be fetched"),
    (train, ["--text-model", ""], "--text-model : "),
    (train, ["--init", "{checkpoint}", "--text-dropout", "0.1"], "--text-dropout go with --init"),
    (train, ["--datasets", "clothho"], "clothho: not a data set"),
    (train, ["--validation", "clothho"], "clothho: not a data set"),
    (train, ["--min-lr", "1"], "--min-lr 1 is above --max-lr"),
    (train, ["--micro-batch", "9"], "--micro-batch 9 is more than --batch-size 4"),
    (train, ["--captions-per-clip", "9"], "--captions-per-clip 9 is more than --batch-size 4"),
    (train, ["--datasets", "clotho", "clotho"], "names the same data twice"),
    (train, ["--datasets", "audiocaps", "--validation", "audiocaps"], "is trained on"),
    (train, ["--unknown", "1"], "--unknown"),
    (train, ["--epoch", "1"], "--epoch"),
    (train, ["--data-dir", "nowhere"], "nowhere: no clotho here"),
    (distill, [], "--teachers"),
    (distill, ["--teachers"], "--teachers"),
    (distill, ["--teachers", "a.pt", "b.pt"], "no such file (2)"),
    (distill, [*TEACHER, "{checkpoint}"], "the same file is named twice"),
    (distill, [*TEACHER, "--init", "nowhere.pt"], "--init nowhere.pt"),
    (distill, [*TEACHER, "--init", ""], "--init : is neither"),
    (distill, [*TEACHER, "--contrastive-weight", "-1"], "--contrastive-weight"),
    (distill, [*TEACHER, "--contrastive-weight", "0", "--distillation-weight", "0"], "nothing"),
    (evaluate, ["--split", "training"], "--split"),
    (evaluate, ["--checkpoint", "{checkpoint}", "--dataset", "clothho"], "not a data set"),
    (evaluate, ["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (evaluate, [], "no run with a best.pt"),
    (evaluate, ["--checkpoint", "{checkpoint}", "--annotations", "nowhere.csv"], "nowhere.csv"),
    *[(evaluate, ["--checkpoint", "{checkpoint}", f"--{name}", value], words)
      for name, value, words in [
        ("json", "{file}/x", "{file}/x: {file} is no folder"), ("json", ".", "is a folder"),
        ("html", "{file}/x", "{file}/x: {file} is no folder"), ("html", ".", "is a folder"),
        ("submission", "{file}/x", "{file}/x: {file} is no folder"), ("submission", ".", "folder"),
        ("tokenizer", "nowhere", "evaluate.py: --tokenizer nowhere: cannot be fetched"),
        ("tokenizer", "", "evaluate.py: --tokenizer : "),
        ("tokenizer", "{file}", "evaluate.py: --tokenizer {file}: is not a tokenizer"),
    ]],
]


@pytest.mark.parametrize(("script", "arguments", "words"), BAD_OPTIONS)
def test_bad_options(refused, checkpoint, no_model, tmp_path, script, arguments, words):
    file = tmp_path / "file"
    file.write_text("of something else")

    def filled(text):
        return text.replace("{checkpoint}", str(checkpoint)).replace("{file}", str(file))

    common = {train: TINY, distill: [], evaluate: []}[script]
    lines = refused(script, *common, *map(filled, arguments))
    assert filled(words) in lines[0] and len(lines) == (3 if "(2)" in words else 1)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("of something else")
    lines = refused(train, *TINY, "--cache-dir", tmp_path / "file")
    assert "file/clotho-development" in lines[0] and "cannot be written" in lines[0]


# --- Checkpoints ---


def other_program(path):
    torch.save({"epoch": 3, "weights": torch.zeros(3)}, path)


def newer(path):
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"format": "dualenc 999"}, path)


def without(key):
    def change(path):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint[key]
        torch.save(checkpoint, path)

    return change


def with_config(**values):
    def change(path):
        checkpoint = torch.load(path, weights_only=True)
        torch.save(checkpoint | {"config": checkpoint["config"] | values}, path)

    return change


BAD_CHECKPOINTS = {
    "a whole tau": (with_config(tau=1, learn_tau=True), "not a complete checkpoint (tau is a int)"),
    "more dropout than all": (with_config(text_dropout=5.0), "(text_dropout is 5.0)"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
    "text": (lambda path: path.write_text("x" * 999), "is damaged or not a checkpoint"),
    "truncated": (lambda path: os.truncate(path, 1_000_000), "is damaged or not a checkpoint"),
    "another program's": (other_program, "is not a checkpoint of this program"),
    "a bare tensor": (lambda path: torch.save(torch.zeros(3), path), "is not a checkpoint of this"),
    "newer": (newer, "has the format 'dualenc 999', not 'dualenc 1'; update this program"),
    "without config": (without("config"), "is not a complete checkpoint ('config')"),
    "without weights": (without("model"), "it holds other things than tensors"),
    "without trained_on": (without("trained_on"), "is not a complete checkpoint ('trained_on')"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "checkpoint"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints(refused, checkpoint, no_model, case):
    spoil, words = BAD_CHECKPOINTS[case]
    spoil(checkpoint)
    for script, option in ((train, "--init"), (distill, "--teachers"), (evaluate, "--checkpoint")):
        (line,) = refused(script, option, checkpoint)
        assert str(checkpoint) in line
        assert words in line or (case == "a folder" and "file" in line)


@pytest.mark.parametrize("bad", [{"tau": torch.tensor(float("nan"))}, None])
def test_the_last_teacher_is_looked_at_before_the_first_embeds(
    refused, checkpoint, monkeypatch, tmp_path, bad
):
    monkeypatch.setattr(distill, "embed_split", None)
    whole = torch.load(checkpoint, weights_only=True)
    torch.save(bad and whole | {"model": whole["model"] | bad}, "bad.pt")
    (line,) = refused(distill, "--teachers", checkpoint, "bad.pt")
    assert line.startswith("distill.py: bad.pt: ") and not (tmp_path / "cache").exists()


def test_teachers_embeddings_that_cannot_be_written(refused, checkpoint, no_model, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/teachers").write_text("of something else")
    (line,) = refused(distill, "--teachers", checkpoint, "--out", "runs/a")
    assert "runs/teachers is no folder that can be written to" in line


# --- Where a run is written ---


def test_folders_of_something_else_are_left_alone(refused, no_model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("dear")
    (line,) = refused(train, *TINY, "--out", tmp_path / "thesis")
    assert "thesis: holds other files than a run's" in line
    (line,) = refused(train, *TINY, "--out", tmp_path / "thesis/chapter.tex/run")
    assert "chapter.tex cannot be written to" in line
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


OTHER_LOG = "its log.jsonl is not a run's log"


@pytest.mark.parametrize(("log", "words"), [
    ("", OTHER_LOG), ("[]\n", OTHER_LOG), ("no json\n", OTHER_LOG), ("\xff\n", OTHER_LOG),
    ("[" * 100_000, OTHER_LOG), ('{"model": 1}', OTHER_LOG), ("{}\n", "a run with other settings"),
])
def test_a_log_of_something_else_is_left_alone(refused, tmp_path, log, words):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/log.jsonl"
    path.write_bytes(log.encode("latin-1"))
    lines = refused(train, *TINY, "--out", tmp_path / "run")
    assert "run" in lines[0] and words in lines[0]
    assert path.read_bytes() == log.encode("latin-1")


def test_a_folder_that_may_not_be_written_to(refused, no_model, monkeypatch, tmp_path):
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile_folder())
        if os.geteuid() == 0:  # who may write anywhere
            monkeypatch.setattr(os, "access", lambda path, mode: False)
        else:
            os.chmod(folder, 0o555)
        (line,) = refused(train, *TINY, "--out", f"{folder}/a/run")
        assert f"{folder} cannot be written to" in line


def cut_log(path):
    with open(path, "rb+") as file:
        file.truncate(len(file.readline()))


CHANGED = {
    "--batch-size 8": "--batch-size: was 4, now 8",
    "--seed 7": "--seed: was 0, now 7",
    "--captions-per-clip 2": "--captions-per-clip: was 1, now 2",
    "--max-lr 0.01": "--max-lr: was 0.001, now 0.01",
    "--min-lr 0": "--min-lr: was 1e-06, now 0",
    "--warmup-epochs 2": "--warmup-epochs: was 1, now 2",
    "--decay-epochs 2": "--decay-epochs: was 15, now 2",
    "--weight-decay 0.1": "--weight-decay: was 0, now 0.1",
    "--tau 0.1": "--tau: was 0.05, now 0.1",
    "--learn-tau": "--learn-tau: was False, now True",
    "--precision bf16": "--precision: was fp32, now bf16",
    "--datasets audiocaps": "--datasets: was ['clotho'], now ['audiocaps']",
    "--validation audiocaps": "--validation: was None, now audiocaps",
    "--init tiny.pt": "--init: was random, now tiny.pt",
}
FREE = ["--workers 1", "--epochs 2", "--max-steps 3", "--checkpoint-every 1", "--log-every 1",
        "--micro-batch 2", "--cache-dir elsewhere", "--device cpu"]


def test_other_settings_are_refused_and_named_with_both_values(
    command, refused, checkpoint, miniature, tmp_path
):
    command(train, *TINY, "--out", "run", "--max-steps", 1)
    for option, words in CHANGED.items():
        lines = refused(train, *TINY, "--out", "run", *option.split())
        assert "run holds a run with other settings" in lines[0]
        assert any(words in line for line in lines), (words, lines)
    for steps, option in enumerate(FREE, start=2):
        status, printed = command(
            train, *TINY, "--out", "run", "--max-steps", steps, *option.split()
        )
        assert status == 0, printed
    data = shutil.copytree(miniature, tmp_path / "data")
    table = data / "CLOTHO_v2.1/clotho_csv_files/clotho_captions_development.csv"
    table.write_text(table.read_text().replace(" the ", " that ", 1))
    lines = refused(train, *TINY, "--out", "run", "--data-dir", data)
    words = "clips, captions and digest of clotho/development: was [10, 50, "
    assert any(words in line for line in lines)


BAD_STATES = {
    "no state": (lambda run: shutil.copy(run / "best.pt", run / "last.pt"), "has no log_bytes"),
    "a damaged state": (lambda run: os.truncate(run / "last.pt", 999), "is damaged"),
    "a log cut short": (lambda run: cut_log(run / "log.jsonl"), "is shorter than when"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_run_that_is_damaged_is_not_resumed(command, refused, tmp_path, case):
    spoil, words = BAD_STATES[case]
    command(train, *TINY, "--max-steps", 2, "--out", "run", "--log-every", 1)
    spoil(tmp_path / "run")
    log = (tmp_path / "run/log.jsonl").read_bytes()
    (line,) = refused(train, *TINY, "--out", "run", "--log-every", 1)
    assert words in line and (tmp_path / "run/log.jsonl").read_bytes() == log


@pytest.mark.parametrize("kind", ["a limit", "a full disk"])
def test_no_space_left_keeps_the_last_checkpoint(command, tmp_path, kind):
    out = tmp_path / "disk/run"
    out.parent.mkdir()
    with contextlib.ExitStack() as stack:
        if kind == "a full disk":
            stack.enter_context(small_disk(out.parent))
        status, printed = command(train, *TINY, "--max-steps", 2, "--out", out)
        assert status == 0, printed
        kept = [(out / name).read_bytes() for name in ("best.pt", "last.pt")]
        if kind == "a limit":
            stack.enter_context(largest_file(5_000_000))  # best.pt fits, last.pt does not
        status, printed = command(train, *TINY, "--out", out)
        assert status == 2 and "Traceback" not in printed
        reason = {"a limit": "File too large", "a full disk": "No space left on device"}[kind]
        message = f"last.pt: cannot be written ({reason}); what was there is kept"
        assert message in printed.splitlines()[-1]
        assert (out / "last.pt").read_bytes() == kept[1]
        DualEncoder.load(out / "best.pt")
        names = sorted(path.name for path in out.iterdir())
        assert names == ["best.pt", "curves.svg", "last.pt", "log.jsonl"]


@contextlib.contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder):
    """Room for one best.pt and one last.pt, and not for another while it is written."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# --- No network ---


def test_published_weights_that_cannot_be_fetched(refused, monkeypatch, no_model, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (line,) = refused(train)
    assert "--text-model roberta-large: cannot be fetched" in line
    assert "save_pretrained" in line and "--preset tiny" in line


def test_passt_that_cannot_be_fetched(refused, monkeypatch, roberta, no_model, capfd):
    def fail(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    capfd.readouterr()  # save_pretrained's bar
    (line,) = refused(train, "--text-model", roberta)
    assert "PaSST's weights cannot be fetched from https://" in line
    assert "copy the file into" in line and "--init random" in line


@pytest.fixture
def roberta(tiny, tmp_path):
    """A folder as save_pretrained writes it."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "roberta"
    tiny.text.roberta.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def with_roberta_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def with_weights(content):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def with_another_pad(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<pad>"', '"<pod>"'))


BAD_ROBERTAS = {
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "its tokenizer is miss"),
    "garbled tokenizer": (lambda f: (f / "tokenizer.json").write_text("x"), "its tokenizer cannot"),
    "another <pad>": (with_another_pad, "<pad> has not the id 1"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "its configuration cannot"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "its configuration cannot"),
    "another kind": (with_roberta_config(model_type="bert"), "is a bert, not a roberta"),
    "a width of text": (with_roberta_config(hidden_size="x"), "'hidden_size'"),
    "five heads": (with_roberta_config(num_attention_heads=5), "heads do not divide the width"),
    "few positions": (with_roberta_config(max_position_embeddings=20), "20 are too few"),
    "few tokens": (with_roberta_config(vocab_size=77), "its tokenizer has more than 77 tokens"),
    "relu": (with_roberta_config(hidden_act="relu"), "its hidden_act is relu, and only gelu"),
    "epsilon": (with_roberta_config(layer_norm_eps=1e-12), "its layer_norm_eps is 1e-12, and only"),
    "types": (with_roberta_config(type_vocab_size=2), "its type_vocab_size is 2, and only 1"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "its weights cannot be"),
    "empty weights": (with_weights(b""), "header too small"),
    "garbage": (with_weights(b"x" * 5000), "header too large"),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 1000), "header"),
    "other sizes": (with_roberta_config(intermediate_size=77), "intermediate.dense.bias, or"),
    "more layers": (with_roberta_config(num_hidden_layers=3), "its weights lack encoder.layer.2."),
}


@pytest.mark.parametrize("case", BAD_ROBERTAS)
def test_bad_text_models(refused, roberta, no_model, capfd, case):
    spoil, words = BAD_ROBERTAS[case]
    spoil(roberta)
    capfd.readouterr()  # save_pretrained's bar
    (line,) = refused(train, *TINY, "--init", "pretrained", "--text-model", roberta)
    assert line.startswith(f"train.py: --text-model {roberta}: ") and words in line


# --- The real commands ---


@pytest.mark.parametrize("arguments", [
    ["train.py", "--batch-size", "1"],
    ["distill.py", "--teachers", b"nowhere\xff.pt"],
])
def test_the_command_itself(arguments):
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(arguments[0]) and ended.stderr.count("\n") == 1
