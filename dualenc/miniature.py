"""A miniature Clotho v2.1 and AudioCaps: synthetic sounds, captions and annotations on disk.

    python -m dualenc.miniature FOLDER

Every clip is a scene of one to three sounds over a quiet background, and its captions say what is
heard, in which order, and how. Folders and tables are laid out as the real ones are (as the package
aac-datasets writes them), so what reads the real data can be tried on this within minutes.
"""

import argparse
import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from dualenc import InputError, replacing, run

VERSION = 1  # raise it whenever the same seed comes to give other bytes
CLOTHO_CLIPS = (160, 48, 100)  # development, validation, evaluation
AUDIOCAPS_CLIPS = (400, 32, 32)  # train, val, test
SPLITS = ("development", "validation", "evaluation", "train", "val", "test")
OWN = ("CLOTHO_v2.1", "AUDIOCAPS", "metadata_eval.csv")  # what a miniature consists of
YOUTUBE_ALPHABET = "-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

# (sounds one after the other at the front, beds that go on underneath): its share of the scenes.
SHAPES = {(1, 0): 0.2, (2, 0): 0.35, (1, 1): 0.25, (3, 0): 0.1, (2, 1): 0.1}
PLAIN_SHARE = 0.25  # of the sounds are neither this nor that
UNSAID_SHARE = 0.25  # of the manners go unmentioned in any one caption
SLOT_S = 2.4  # at least this long for each sound at the front, or "slow" could not be heard
EDGE_S = 0.05  # fade at either end of a sound
FRAME_S = 0.02  # a sound's level is the RMS of its loudest frame of this length
PEAK = 0.9  # of full scale

# The ranges are kept apart, so that no word in a caption is a matter of taste.
LEVEL = {"loud": (0.18, 0.25), None: (0.06, 0.085), "faint": (0.015, 0.025)}  # RMS, of full scale
PITCH = {"high": (1.55, 1.9), None: (0.9, 1.1), "low": (0.5, 0.62)}  # times the usual frequency
PACE = {"fast": (1.7, 2.2), None: (0.9, 1.1), "slow": (0.45, 0.58)}  # times the usual rate
ADVERBS = {
    "loud": ("loudly", "noisily", "very loudly"),
    "faint": ("faintly", "softly", "quietly"),
    "high": ("at a high pitch", "in a high pitch", "shrilly"),
    "low": ("at a low pitch", "in a low pitch", "deeply"),
    "fast": ("quickly", "rapidly", "at a fast pace"),
    "slow": ("slowly", "unhurriedly", "at a slow pace"),
}


@dataclass(frozen=True)
class Voice:
    """What a synthesiser works with: a length, and how high and how fast it is to sound."""

    rng: np.random.Generator
    sample_rate: int  # Hz
    samples: int
    pitch: float  # times the usual frequency
    pace: float  # times the usual rate

    def vary(self, value, spread=0.12):
        return value * self.rng.uniform(1 - spread, 1 + spread)

    def time(self, duration_s=None):
        """Seconds since the start (samples,), of the whole sound unless a duration is given."""
        samples = self.samples if duration_s is None else int(duration_s * self.sample_rate)
        return np.arange(samples) / self.sample_rate

    def noise(self, t, low_hz, high_hz):
        """Gaussian noise as long as t, RMS 1, that falls by 12 dB an octave outside its band."""
        # White noise has a random spectrum, shaped here. Large prime factors slow the FFT tenfold,
        # hence a length that is a multiple of a power of two.
        step = 2 ** max(1, len(t).bit_length() - 4)
        samples = -(-len(t) // step) * step
        hz = np.fft.rfftfreq(samples, 1 / self.sample_rate).astype(np.float32) + 1e-3
        gain = 1 / ((1 + (low_hz / hz) ** 2) * (1 + (hz / high_hz) ** 2))
        real, imaginary = self.rng.standard_normal((2, len(hz)), np.float32)
        band = np.fft.irfft(gain * (real + 1j * imaginary))[: len(t)]
        return band / band.std()

    def phase(self, hz):
        return 2 * np.pi * np.cumsum(hz) / self.sample_rate

    def pulses(self, hz, sharpness):
        """Smooth pulses at the rate hz (samples,): the sharper, the more harmonics."""
        train = np.exp(sharpness * (np.cos(self.phase(hz)) - 1))
        return train - train.mean()

    def repeat(self, one, period_s, jitter=0.05):
        """Call one() for a short sound again and again and lay the results out in time."""
        out = np.zeros(self.samples)
        period_s = self.vary(period_s) / self.pace
        start_s = self.rng.uniform(0.1, 0.3) * period_s
        while (start := int(start_s * self.sample_rate)) < self.samples:
            short = one()[: self.samples - start]
            out[start : start + len(short)] += short
            start_s += self.vary(period_s, jitter)
        return out


# Each synthesiser returns (samples,) at a level of its own. What it varies once differs between
# clips, what it varies in one() differs from one bark, step or chirp to the next.


def arch(t):
    """A smooth rise and fall over the length of t."""
    return np.sin(np.linspace(0, np.pi, len(t)))


def bark(voice):
    usual_hz, usual_s = voice.vary(430 * voice.pitch), voice.vary(0.17)

    def one():
        t = voice.time(voice.vary(usual_s))
        # The mouth opens and shuts, and the pitch goes up and down with it.
        hz = voice.vary(usual_hz, 0.05) * (0.75 + 0.6 * arch(t))
        breath = voice.noise(t, usual_hz, 5 * usual_hz)
        return arch(t) ** 0.7 * (voice.pulses(hz, 5) + 0.07 * breath)

    return voice.repeat(one, 0.5, jitter=0.15)


def chirp(voice):
    usual_hz = voice.vary(3200 * voice.pitch, 0.08)

    def one():
        t = voice.time(voice.vary(0.1, 0.4) / voice.pace**0.5)
        bend = voice.rng.uniform(-0.3, 0.3) * np.cos(np.pi * t / t[-1] + voice.rng.uniform(0, 1))
        hz = voice.vary(usual_hz, 0.06) * (1 + bend)
        return voice.vary(arch(t), 0.3) * np.sin(voice.phase(hz))

    return voice.repeat(one, 0.24, jitter=0.35)


def patter(voice):
    t = voice.time()
    # Many small drops and a few big ones, each a few milliseconds of noise.
    drop = int(0.003 * voice.sample_rate)
    drops = np.repeat(voice.rng.gamma(0.4, size=len(t) // drop + 1), drop)[: len(t)]
    return voice.noise(t, voice.vary(2000, 0.3), 7000) * (0.4 + drops)


def toll(voice):
    t = voice.time(2.0)
    base_hz, strike = voice.vary(700 * voice.pitch), 0
    for ratio in (0.5, 1, 1.19, 1.5, 2, 2.66, 3.4):  # hum, prime, minor third, fifth, octave, ...
        partial = np.sin(2 * np.pi * voice.vary(ratio, 0.01) * base_hz * t)
        strike = strike + voice.vary(partial, 0.5) * np.exp(-4 * ratio**0.7 * t)
    return voice.repeat(lambda: voice.vary(strike), 0.8)


def wail(voice):
    turns = voice.vary(0.6) * voice.pace * voice.time() + voice.rng.uniform()
    octaves = voice.vary(0.5) * np.sin(2 * np.pi * turns)
    return voice.pulses(voice.vary(750 * voice.pitch) * 2**octaves, 1.5)


def motor(voice):
    t = voice.time()
    usual_hz = voice.vary(85 * voice.pitch)
    hz = usual_hz * (1 + 0.04 * np.sin(2 * np.pi * voice.vary(0.7, 0.5) * t))
    rattle = voice.noise(t, 3 * usual_hz, 8 * usual_hz)
    return voice.pulses(hz, voice.vary(10, 0.4)) + 0.08 * rattle


def steps(voice):
    usual_hz = voice.vary(95, 0.25)

    def one():
        t = voice.time(0.18)
        thud = np.sin(2 * np.pi * voice.vary(usual_hz) * t) * np.exp(-t / 0.03)
        scrape = voice.noise(t, 250, 1500) * np.exp(-t / 0.02)
        return voice.vary(thud + 0.35 * scrape, 0.3)

    return voice.repeat(one, 0.55)


def tick(voice):
    t = voice.time(0.06)
    pair = []
    for hz in (voice.vary(2900), voice.vary(2000)):
        click = voice.noise(t, hz, 2 * hz) * np.exp(-t / 0.003)
        pair.append(np.sin(2 * np.pi * hz * t) * np.exp(-t / 0.006) + 0.4 * click)
    sides = itertools.cycle(pair)
    return voice.repeat(lambda: next(sides), 0.5, jitter=0.01)


def surf(voice):
    t = voice.time()
    turn = (t / voice.vary(3.2, 0.25) + voice.rng.uniform()) % 1
    # A wave gathers slowly and breaks; only the breaking hisses, the sea rumbles all the time.
    swell = np.where(turn < 0.35, (turn / 0.35) ** 2, np.exp((0.35 - turn) / 0.2))
    return voice.noise(t, 60, 300) * (0.15 + 0.3 * swell) + voice.noise(t, 400, 2500) * swell


def ring(voice):
    t = voice.time(voice.vary(0.8))
    hz = voice.vary(1100 * voice.pitch, 0.08)
    hammer = 1 + 0.9 * np.sign(np.sin(2 * np.pi * voice.vary(20) * t))
    gongs = np.sin(2 * np.pi * hz * t) + np.sin(2 * np.pi * voice.vary(1.3 * hz, 0.03) * t)
    return voice.repeat(lambda: hammer * gongs, 1.25, jitter=0.01)


def rasp(voice):
    teeth_hz, low_hz = voice.vary(130), voice.vary(1100, 0.25)

    def one():
        t = voice.time(0.27 / voice.pace)
        teeth = 1 + 0.8 * np.sin(2 * np.pi * voice.vary(teeth_hz) * t)
        return arch(t) * teeth * voice.noise(t, low_hz, 3 * low_hz)

    return voice.repeat(one, 0.36, jitter=0.04)


def stridulate(voice):
    t = voice.time(voice.vary(0.13))
    wings = np.maximum(0, np.sin(2 * np.pi * voice.vary(32) * t))
    song = arch(t) * wings * np.sin(2 * np.pi * voice.vary(4700) * t)
    return voice.repeat(lambda: voice.vary(song), 0.36, jitter=0.03)


@dataclass(frozen=True)
class Kind:
    """A kind of sound: how it is made, what it can be, and how files and people call it."""

    synthesise: Callable[[Voice], np.ndarray]
    manners: tuple[str, ...]
    title: str  # of files; commas, spaces and apostrophes are in the real names too
    phrases: tuple[str, ...]  # subject|verb|participle|place


LOUDNESS = ("loud", "faint")
TUNED = (*LOUDNESS, "high", "low")
PACED = (*LOUDNESS, "fast", "slow")
TUNED_AND_PACED = (*TUNED, "fast", "slow")
KINDS = {
    "dog": Kind(bark, TUNED_AND_PACED, "Dog, yard", (
        "a dog|barks|barking|in the yard", "a hound|barks|barking|outdoors",
        "a dog|yaps|yapping|at someone")),
    "bird": Kind(chirp, TUNED_AND_PACED, "bird song, dawn", (
        "a bird|chirps|chirping|in a tree", "a bird|sings|singing|outside",
        "a songbird|tweets|tweeting|in the garden")),
    "rain": Kind(patter, LOUDNESS, "rain on tent's roof", (
        "rain|falls|falling|on a roof", "rain|pours|pouring|onto the ground",
        "the rain|patters|pattering|on the leaves")),
    "bell": Kind(toll, TUNED_AND_PACED, "church bell", (
        "a bell|rings|ringing|in a tower", "a church bell|tolls|tolling|nearby",
        "a bell|chimes|chiming|in the village")),
    "siren": Kind(wail, TUNED_AND_PACED, "Siren_street", (
        "a siren|wails|wailing|in the street", "an emergency siren|sounds|sounding|in the city",
        "a police siren|howls|howling|outside")),
    "engine": Kind(motor, TUNED, "engine idle", (
        "an engine|runs|running|in a garage", "a car engine|idles|idling|on the road",
        "a motor|hums|humming|nearby")),
    "footsteps": Kind(steps, PACED, "footsteps, hall", (
        "someone|walks|walking|on a hard floor", "a person|walks|walking|down a hallway",
        "footsteps|sound|sounding|on the floor")),
    "clock": Kind(tick, PACED, "grandma's clock", (
        "a clock|ticks|ticking|on the wall", "an old clock|ticks|ticking|in a room",
        "a wall clock|clicks|clicking|indoors")),
    "waves": Kind(surf, LOUDNESS, "sea_waves", (
        "waves|break|breaking|on the beach", "ocean waves|crash|crashing|on the shore",
        "the sea|washes|washing|onto the sand")),
    "telephone": Kind(ring, TUNED, "old telephone", (
        "a telephone|rings|ringing|in an office", "a phone|rings|ringing|on a desk",
        "an old telephone|jangles|jangling|indoors")),
    "saw": Kind(rasp, PACED, "hand-saw", (
        "a saw|cuts|cutting|through wood", "a handsaw|rasps|rasping|back and forth",
        "a carpenter|saws|sawing|in a workshop")),
    "crickets": Kind(stridulate, PACED, "Crickets at night", (
        "crickets|chirp|chirping|at night", "a cricket|chirps|chirping|in the grass",
        "insects|trill|trilling|in the dark")),
}


def pick(rng, options):
    return options[rng.integers(len(options))]


def clotho_name(rng, heard, index):
    return f"{KINDS[heard.front[0].kind].title} {index:03d}.wav"


def audiocaps_name(rng, heard, index):
    # The first two ids begin with a minus and an underscore: both trip readers of the real ones.
    letters = [pick(rng, YOUTUBE_ALPHABET) for _ in range(11)]
    letters[0] = YOUTUBE_ALPHABET[index] if index < 2 else letters[0]
    return f"{''.join(letters)}_{10 * rng.integers(30)}.flac"


@dataclass(frozen=True)
class Style:
    """How a data set names and samples its clips, how long they are, and how it words them."""

    file_name: Callable[..., str]
    rate_hz: int
    durations_s: tuple[tuple[float, float, float], ...]  # share of the clips, from, to
    full: bool  # sentences with places and a full stop, or participles only
    alone: tuple[str, ...]  # around one sound on its own
    orders: dict[int, tuple[str, ...]]  # around so many sounds, one after the other
    beds: tuple[str, ...]  # {0} over the bed, as a clause {1} or a participle {2}


CLOTHO = Style(
    file_name=clotho_name,
    rate_hz=16_000,  # the real ones are at 44 100 Hz; this keeps the folder small
    durations_s=((0.6, 4, 10), (0.3, 10.5, 20), (0.1, 20.5, 24)),
    full=True,
    alone=("{} for a while", "one can hear how {}", "{} in this clip"),
    orders={
        1: ("{}",),
        2: ("{} and then {}", "{}, after which {}", "first {}, then {}", "{} before {}"),
        3: ("{}, then {}, and finally {}", "first {}, next {}, then {}", "{}, {} and then {}"),
    },
    beds=("{0} while {1}", "{0} and meanwhile {1}", "{0} over the sound of {2}"),
)
AUDIOCAPS = Style(
    file_name=audiocaps_name,
    rate_hz=32_000,
    durations_s=((0.4, 5, 10), (0.6, 10, 10)),
    full=False,
    alone=("{}", "{} for a while", "the sound of {}"),
    orders={
        1: ("{}",),
        2: ("{} followed by {}", "{} then {}", "{} and then {}"),
        3: ("{} followed by {} then {}", "{}, {} and then {}", "{} then {} and finally {}"),
    },
    beds=("{0} as {1}", "{0} while {1}", "{0} with {2} in the background", "{0} over {2}"),
)


@dataclass(frozen=True)
class Event:
    """One sound. Without a manner it is neither this nor that or, in a caption, left open."""

    kind: str
    manner: str | None = None


@dataclass(frozen=True)
class Scene:
    """One to three sounds in order at the front, and maybe a bed under them from start to end."""

    front: tuple[Event, ...]
    bed: Event | None
    duration_s: float

    @property
    def events(self):
        return self.front + ((self.bed,) if self.bed else ())

    def relations(self):
        """What is heard before what, and what together with what."""
        kinds = [event.kind for event in self.front]
        before = {("before", *pair) for pair in itertools.combinations(kinds, 2)}
        return before | {("with", *sorted((kind, self.bed.kind))) for kind in kinds if self.bed}


def scene(rng, style=CLOTHO):
    """Draw a scene; every kind of sound is as likely as the others, and none comes twice."""
    ahead, beds = list(SHAPES)[rng.choice(len(SHAPES), p=list(SHAPES.values()))]
    events = []
    for place, kind in enumerate(rng.permutation(list(KINDS))[: ahead + beds].tolist()):
        # A loud bed would drown what the caption says is in front of it.
        manners = [m for m in KINDS[kind].manners if place < ahead or m != "loud"]
        events.append(Event(kind, None if rng.random() < PLAIN_SHARE else pick(rng, manners)))
    shares, shortest, longest = zip(*style.durations_s, strict=True)
    band = rng.choice(len(shares), p=shares)
    duration_s = max(SLOT_S * ahead, rng.uniform(shortest[band], longest[band]))
    return Scene(tuple(events[:ahead]), events[-1] if beds else None, duration_s)


def matches(said, heard):
    """Whether all that the scene `said` asks for is in the scene `heard`, which may hold more."""
    manners = {event.kind: event.manner for event in heard.events}
    return said.relations() <= heard.relations() and all(
        event.kind in manners and event.manner in (None, manners[event.kind])
        for event in said.events
    )


def phrase(event, rng, full, finite):
    subject, verb, participle, place = pick(rng, KINDS[event.kind].phrases).split("|")
    adverb = pick(rng, ADVERBS[event.manner]) if event.manner else ""
    words = (subject, verb if finite else participle, adverb, place if full else "")
    return " ".join(filter(None, words))


def caption(said, rng, style):
    frames = style.orders[len(said.front)] if len(said.events) > 1 else style.alone
    text = pick(rng, frames).format(*(phrase(e, rng, style.full, style.full) for e in said.front))
    if said.bed:
        clause, participle = (phrase(said.bed, rng, style.full, finite) for finite in (True, False))
        text = pick(rng, style.beds).format(text, clause, participle)
    return text[0].upper() + text[1:] + ("." if style.full else "")


def captions(heard, rng, n, style=CLOTHO):
    """Word a scene in n different ways: {caption: the scene as far as this caption tells it}."""

    def told(event):
        return replace(event, manner=None) if rng.random() < UNSAID_SHARE else event

    texts = {}
    while len(texts) < n:
        bed = told(heard.bed) if heard.bed else None
        said = replace(heard, front=tuple(map(told, heard.front)), bed=bed)
        texts[caption(said, rng, style)] = said
    return texts


def sound(event, rng, samples, sample_rate):
    """Synthesise one event (samples,) as high, as fast and as loud as its manner says."""
    level, pitch, pace = (
        rng.uniform(*table.get(event.manner, table[None])) for table in (LEVEL, PITCH, PACE)
    )
    wave = KINDS[event.kind].synthesise(Voice(rng, sample_rate, samples, pitch, pace))
    ramp = np.arange(samples) / (EDGE_S * sample_rate)
    wave = wave * np.minimum(1, np.minimum(ramp, ramp[::-1]))
    frame = int(FRAME_S * sample_rate)
    power = np.square(wave[: samples // frame * frame]).reshape(-1, frame).mean(axis=1)
    return wave * (level / np.sqrt(power.max()))


def background(rng, samples, sample_rate):
    """A room's noise and mains hum (samples,), well below the faintest sound."""
    voice = Voice(rng, sample_rate, samples, pitch=1, pace=1)
    t = voice.time()
    noise = voice.noise(t, 20, 10 ** rng.uniform(2.3, 3.7))  # from a rumble to a hiss
    hum = np.sin(2 * np.pi * pick(rng, (100, 120)) * t)
    return 10 ** rng.uniform(-3.6, -2.7) * noise + 10 ** rng.uniform(-4.5, -3) * hum


def render(heard, rng, sample_rate):
    """Synthesise a scene: float32 (samples,), within PEAK of full scale."""
    samples = round(heard.duration_s * sample_rate)
    mix = background(rng, samples, sample_rate)
    if heard.bed:
        mix += sound(heard.bed, rng, samples, sample_rate)
    widths = rng.uniform(0.85, 1.15, len(heard.front))
    bounds = itertools.pairwise([0, *(np.cumsum(widths) / widths.sum() * samples)])
    for event, (start, end) in zip(heard.front, bounds, strict=True):
        pauses = rng.uniform(0.02, 0.08, 2) * (end - start)
        first, last = int(start + pauses[0]), int(end - pauses[1])
        mix[first:last] += sound(event, rng, last - first, sample_rate)
    return (mix * min(1, PEAK / np.abs(mix).max())).astype(np.float32)


@dataclass(frozen=True)
class Clip:
    name: str  # of the file
    heard: Scene
    captions: dict[str, Scene]


def write_clips(folder, keys, style, n, bar):
    """Write one audio file, worded in n captions, for each key (seed, number of the split, index).

    A generator of its own makes each clip the same however many others there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for key in keys:
        rng = np.random.default_rng(key)
        heard = scene(rng, style)
        texts = captions(heard, rng, n, style)
        name = style.file_name(rng, heard, key[-1])
        wave = render(heard, rng, style.rate_hz)
        soundfile.write(folder / name, wave, style.rate_hz, "PCM_16")
        clips.append(Clip(name, heard, texts))
        bar.update()
    return clips


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])


def write_clotho(root, split, keys, bar):
    clips = write_clips(root / "clotho_audio_files" / split, keys, CLOTHO, 5, bar)
    tables = root / "clotho_csv_files"
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    rows = [(clip.name, *clip.captions) for clip in clips]
    write_csv(tables / f"clotho_captions_{split}.csv", header, rows)
    header = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license"
    rows = []
    for index, clip in enumerate(clips):
        keywords = ";".join(event.kind for event in clip.heard.events)
        span = [0, round(clip.heard.duration_s * CLOTHO.rate_hz)]
        link = f"https://example.org/{split}/{index}"
        rows.append((clip.name, keywords, index, link, span, "miniature", "CC0 1.0"))
    write_csv(tables / f"clotho_metadata_{split}.csv", header, rows)
    return clips


def write_audiocaps(root, split, keys, bar):
    n = 1 if split == "train" else 5
    clips = write_clips(root / "audio_32000Hz" / split, keys, AUDIOCAPS, n, bar)
    ids = [Path(clip.name).stem.rsplit("_", 1) for clip in clips]
    # All first captions, then all second ones, and so on: in the real tables, too, the rows of one
    # clip lie apart.
    rounds = zip(*(clip.captions for clip in clips), strict=True)
    rows = [(*ids[i], text) for texts in rounds for i, text in enumerate(texts)]
    numbered = [(number, *row) for number, row in enumerate(rows)]
    header = "audiocap_id,youtube_id,start_time,caption"
    write_csv(root / "csv_files_v1" / f"{split}.csv", header, numbered)
    return clips


def annotations(clips, rng):
    """Ask with one caption of each clip: rows of (query, names of all clips that it is true of)."""
    rows = {}
    for clip in clips:
        query, said = pick(rng, list(clip.captions.items()))
        rows[query] = [other.name for other in clips if matches(said, other.heard)]
    return list(rows.items())


def claim(folder, settings):
    """Mark a folder as a miniature in the making; False if it is this very one, and complete.

    Raises:
        InputError: it holds something else, which is left as it is.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder")
    marker = folder / "miniature.json"
    try:
        held = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
    except ValueError:
        held = {}
    if held == {**settings, "complete": True}:
        return False
    if held not in (None, {**settings, "complete": False}):
        raise InputError(f"{marker}: a miniature of other settings; choose another folder")
    foreign = [name for name in OWN if (folder / name).exists()]
    if held is None and foreign:
        raise InputError(f"{folder}: holds {foreign[0]} of other making; choose another folder")
    mark(folder, settings, complete=False)
    return True


def mark(folder, settings, complete):
    with replacing(folder / "miniature.json") as path:
        path.write_text(json.dumps({**settings, "complete": complete}) + "\n", encoding="utf-8")


def write_miniature(folder, seed=0, clotho=CLOTHO_CLIPS, audiocaps=AUDIOCAPS_CLIPS):
    """Write both data sets and the annotations; return a line that says what was done.

    Args:
        folder: written into; what is there already is never overwritten, see `claim`.
        seed: the same seed gives the same bytes.
        clotho, audiocaps: numbers of clips (training, validation, evaluation).
    """
    folder, counts = Path(folder), (*clotho, *audiocaps)
    if min(seed, *counts) < 0:
        raise InputError("--seed, --clotho and --audiocaps take numbers from 0 up")
    settings = {"version": VERSION, "seed": seed, "clips": list(counts)}
    if not claim(folder, settings):
        return f"{folder}: this miniature is there already."
    written = {}
    with tqdm(total=sum(counts), unit="clip", disable=None) as bar:
        for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
            keys = [(seed, number, index) for index in range(count)]
            if number < len(clotho):
                written[split] = write_clotho(folder / "CLOTHO_v2.1", split, keys, bar)
            else:
                written[split] = write_audiocaps(folder / "AUDIOCAPS", split, keys, bar)
    rows = annotations(written["evaluation"], np.random.default_rng((seed, len(SPLITS))))
    write_csv(folder / "metadata_eval.csv", "query,audio_filenames", rows)
    mark(folder, settings, complete=True)
    return summary(folder, [clip for clips in written.values() for clip in clips])


def summary(folder, clips):
    minutes = sum(clip.heard.duration_s for clip in clips) / 60
    texts = sum(len(clip.captions) for clip in clips)
    sizes = [path.stat().st_size for name in OWN for path in (folder / name).rglob("*")]
    size = f"{minutes:.0f} minutes, {sum(sizes) / 1e6:.0f} MB"
    return f"{folder}: {len(clips)} clips, {texts} captions, {size}."


def main(argv=None):
    headline = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser("python -m dualenc.miniature", description=headline)
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips (default 0)")
    for name, default in (("clotho", CLOTHO_CLIPS), ("audiocaps", AUDIOCAPS_CLIPS)):
        text = f"clips to train, validate and evaluate with (default {default})"
        parser.add_argument(f"--{name}", type=int, nargs=3, metavar="N", default=default, help=text)
    args = parser.parse_args(argv)
    print(write_miniature(args.folder, args.seed, args.clotho, args.audiocaps))


if __name__ == "__main__":
    run(main)
