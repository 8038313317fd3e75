"""A miniature Clotho v2.1 and AudioCaps: synthetic sounds, captions and annotations on disk.

    python -m dualenc.miniature data/miniature

Every clip begins as a scene: one to three sounds that follow one another, each in some manner, and
sometimes a bed, a sound that lasts under all of them. A loud dog, then a bell, over rain, becomes

    render      a waveform: barks, then strokes of a bell, and patter from beginning to end
    captions    "A dog barks loudly in the yard and then a bell rings in a tower while rain falls on
                a roof.", and others; each tells the whole scene, except some manners
    annotate    for such a caption as a query, all clips of whose scenes it is true

The layout on disk is that of the real data sets, as aac-datasets writes them.
"""

import csv
import functools
import itertools
import math
import wave
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dualenc.decoding import SAMPLE_RATE, to_int16, usable_cores
from dualenc.errors import Parser, run_command

# Both data sets have this rate: if one had more treble, a model could tell them apart by it.
RATE_HZ = SAMPLE_RATE // 2
SEED = 0


def choose(rng: np.random.Generator, options: Sequence):
    return options[rng.integers(len(options))]


def choose_by_share(rng: np.random.Generator, shares: dict):
    """Choose one of the keys; a key's value is its probability."""
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


# --- Sources: how each of them sounds ---------------------------------------------------------

def sine(cycles: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * cycles)


def arch(t: np.ndarray) -> np.ndarray:
    """Return a smooth rise from 0 to 1 and back, as long as t (n,)."""
    return np.sin(np.linspace(0, np.pi, len(t)))


class Voice(NamedTuple):
    """A synthesiser for one sound; each method from `bark` on imitates a source: (samples,).

    Such a method first draws what holds throughout the sound (which dog it is). What it draws
    within its function `stroke` differs from stroke to stroke (how each of its barks sounds).
    """

    rng: np.random.Generator
    samples: int
    pitch: float = 1.0  # times the usual frequency
    pace: float = 1.0  # times the usual rate

    def vary(self, value, spread=0.12):
        """Return the value times a random factor of 1 - spread to 1 + spread."""
        return value * self.rng.uniform(1 - spread, 1 + spread)

    def time(self, duration_s=None):
        """Return each sample's time in seconds: (n,), of the whole sound if without duration."""
        n = self.samples if duration_s is None else int(duration_s * RATE_HZ)
        return np.arange(n) / RATE_HZ

    def noise(self, n, low_hz, high_hz):
        """Return noise (n,) of RMS 1 that falls by 12 dB an octave outside the band."""
        # The length is rounded up, since large prime factors would make the FFT ten times as slow.
        step = 2 ** max(1, n.bit_length() - 4)
        length = math.ceil(n / step) * step
        hz = np.fft.rfftfreq(length, 1 / RATE_HZ).astype(np.float32)
        high_pass = hz**2 / (hz**2 + low_hz**2)
        low_pass = high_hz**2 / (hz**2 + high_hz**2)
        white = np.fft.rfft(self.rng.standard_normal(length, np.float32))
        band = np.fft.irfft(white * high_pass * low_pass)[:n]
        return band / band.std()

    def pulses(self, hz, sharpness):
        """Return pulses (n,) at the rate hz (n,); the sharper they are, the more harmonics."""
        train = np.exp(sharpness * (np.cos(2 * np.pi * np.cumsum(hz) / RATE_HZ) - 1))
        return train - train.mean()

    def repeat(self, stroke, period_s, jitter=0.05):
        """Repeat strokes through the whole sound, at this voice's pace: (samples,).

        Args:
            stroke: a function that returns a new stroke (n,) at each call.
            jitter: by what share the time between two strokes varies.
        """
        sound = np.zeros(self.samples)
        period_s = self.vary(period_s) / self.pace
        start_s = self.rng.uniform(0.1, 0.3) * period_s
        while start_s < self.samples / RATE_HZ:
            start = int(start_s * RATE_HZ)
            waveform = stroke()[: self.samples - start]
            sound[start : start + len(waveform)] += waveform
            start_s += self.vary(period_s, jitter)
        return sound

    def room(self):
        """Return the background of every clip: noise and mains hum below the faintest sound."""
        # Noise up to 200 Hz is a rumble, noise up to 5 kHz a hiss.
        noise = self.noise(self.samples, 20, 10 ** self.rng.uniform(2.3, 3.7))
        hum = sine(choose(self.rng, (100, 120)) * self.time())
        noise_level = 10 ** self.rng.uniform(-3.6, -2.7)
        hum_level = 10 ** self.rng.uniform(-4.5, -3)
        return noise_level * noise + hum_level * hum

    def bark(self):
        """Imitate a dog: the mouth opens and shuts, and the pitch goes up and down with it."""
        dog_hz = self.vary(430 * self.pitch)
        dog_s = self.vary(0.17)

        def stroke():
            t = self.time(self.vary(dog_s))
            mouth = arch(t)
            hz = self.vary(dog_hz, 0.05) * (0.75 + 0.6 * mouth)
            breath = 0.07 * self.noise(len(t), dog_hz, 5 * dog_hz)
            return mouth**0.7 * (self.pulses(hz, sharpness=5) + breath)

        return self.repeat(stroke, period_s=0.5, jitter=0.15)

    def chirp(self):
        """Imitate a bird: short whistles, each bent up or down."""
        bird_hz = self.vary(3200 * self.pitch, 0.08)

        def stroke():
            t = self.time(self.vary(0.1, 0.4) / self.pace**0.5)
            turn = np.pi * t / t[-1] + self.rng.uniform(0, 1)
            bend = self.rng.uniform(-0.3, 0.3) * np.cos(turn)
            hz = self.vary(bird_hz, 0.06) * (1 + bend)
            return self.vary(arch(t), 0.3) * sine(np.cumsum(hz) / RATE_HZ)

        return self.repeat(stroke, period_s=0.24, jitter=0.35)

    def patter(self):
        """Imitate rain: many small drops and a few big ones, each 3 ms of noise."""
        drop_samples = int(0.003 * RATE_HZ)
        drop_levels = self.rng.gamma(0.4, size=self.samples // drop_samples + 1)
        drops = np.repeat(drop_levels, drop_samples)[: self.samples]
        return self.noise(self.samples, self.vary(2000, 0.3), 7000) * (0.4 + drops)

    def toll(self):
        """Imitate a bell: partials at a bell's ratios; the higher ones die away sooner."""
        bell_hz = self.vary(700 * self.pitch)
        t = self.time(2.0)
        strike = np.zeros(len(t))
        for ratio in (0.5, 1, 1.19, 1.5, 2, 2.66, 3.4):  # hum, prime, minor third, fifth, octave
            partial = sine(self.vary(ratio, 0.01) * bell_hz * t)
            strike += self.vary(partial, 0.5) * np.exp(-4 * ratio**0.7 * t)

        def stroke():
            return self.vary(strike)

        return self.repeat(stroke, period_s=0.8)

    def wail(self):
        """Imitate a siren: its pitch goes up and down without a pause."""
        siren_hz = self.vary(750 * self.pitch)
        octaves = self.vary(0.5)
        turns = self.vary(0.6) * self.pace * self.time() + self.rng.uniform()
        return self.pulses(siren_hz * 2 ** (octaves * sine(turns)), sharpness=1.5)

    def motor(self):
        """Imitate an engine: explosions at a wavering rate, and the rattle of its case."""
        engine_hz = self.vary(85 * self.pitch)
        wavering_hz = engine_hz * (1 + 0.04 * sine(self.vary(0.7, 0.5) * self.time()))
        explosions = self.pulses(wavering_hz, sharpness=self.vary(10, 0.4))
        rattle = self.noise(self.samples, 3 * engine_hz, 8 * engine_hz)
        return explosions + 0.08 * rattle

    def steps(self):
        """Imitate footsteps: the thud of a heel and the scrape of a sole."""
        floor_hz = self.vary(95, 0.25)
        t = self.time(0.18)

        def stroke():
            thud = sine(self.vary(floor_hz) * t) * np.exp(-t / 0.03)
            scrape = 0.35 * self.noise(len(t), 250, 1500) * np.exp(-t / 0.02)
            return self.vary(thud + scrape, 0.3)

        return self.repeat(stroke, period_s=0.55)

    def tick(self):
        """Imitate a clock: a tick and a lower tock in turn."""
        t = self.time(0.06)
        clicks = []
        for hz in (self.vary(2900), self.vary(2000)):
            tone = sine(hz * t) * np.exp(-t / 0.006)
            knock = 0.4 * self.noise(len(t), hz, 2 * hz) * np.exp(-t / 0.003)
            clicks.append(tone + knock)
        tick_tock = itertools.cycle(clicks)

        def stroke():
            return next(tick_tock)

        return self.repeat(stroke, period_s=0.5, jitter=0.01)


# --- Manners, and the words for everything ----------------------------------------------------

class Manner(NamedTuple):
    """A way in which a sound is made: words for it, and ranges to draw from.

    The ranges of different manners lie apart, so that an adverb is either true or false.
    """

    adverbs: tuple[str, ...] = ()
    level: tuple[float, float] = (0.06, 0.085)  # RMS of the loudest frame; full scale is 1
    pitch: tuple[float, float] = (0.9, 1.1)  # times the usual frequency
    pace: tuple[float, float] = (0.9, 1.1)  # times the usual rate


PLAIN = Manner()
MANNERS = {
    "loud": Manner(("loudly", "noisily", "very loudly"), level=(0.18, 0.25)),
    "faint": Manner(("faintly", "softly", "quietly"), level=(0.015, 0.025)),
    "high": Manner(("at a high pitch", "in a high pitch", "shrilly"), pitch=(1.55, 1.9)),
    "low": Manner(("at a low pitch", "in a low pitch", "deeply"), pitch=(0.5, 0.62)),
    "fast": Manner(("quickly", "rapidly", "at a fast pace"), pace=(1.7, 2.2)),
    "slow": Manner(("slowly", "unhurriedly", "at a slow pace"), pace=(0.45, 0.58)),
}
LEVELS = ("loud", "faint")
PITCHES = ("high", "low")
PACES = ("fast", "slow")


class Phrase(NamedTuple):
    """One way to name a source and what it does: "a dog barks in the yard", "a dog barking"."""

    subject: str
    finite: str
    participle: str
    place: str


class Source(NamedTuple):
    """Something that sounds: its synthesiser, its possible manners, and the words for it."""

    synthesiser: Callable[[Voice], np.ndarray]
    manners: tuple[str, ...]
    title: str  # the beginning of its files' names, which are as awkward as Clotho's
    phrases: tuple[Phrase, ...]


SOURCES = {
    "dog": Source(
        Voice.bark,
        LEVELS + PITCHES + PACES,
        "Dog, yard",
        (
            Phrase("a dog", "barks", "barking", "in the yard"),
            Phrase("a hound", "barks", "barking", "outdoors"),
            Phrase("a dog", "yaps", "yapping", "at a visitor"),
        ),
    ),
    "bird": Source(
        Voice.chirp,
        LEVELS + PITCHES + PACES,
        "bird song, dawn",
        (
            Phrase("a bird", "chirps", "chirping", "in a tree"),
            Phrase("a bird", "sings", "singing", "outside"),
            Phrase("a songbird", "tweets", "tweeting", "in the garden"),
        ),
    ),
    "rain": Source(
        Voice.patter,
        LEVELS,
        "rain on tent's roof",
        (
            Phrase("rain", "falls", "falling", "on a roof"),
            Phrase("rain", "pours", "pouring", "onto the ground"),
            Phrase("the rain", "patters", "pattering", "on the leaves"),
        ),
    ),
    "bell": Source(
        Voice.toll,
        LEVELS + PITCHES + PACES,
        "church bell",
        (
            Phrase("a bell", "rings", "ringing", "in a tower"),
            Phrase("a church bell", "tolls", "tolling", "nearby"),
            Phrase("a bell", "chimes", "chiming", "in the village"),
        ),
    ),
    "siren": Source(
        Voice.wail,
        LEVELS + PITCHES + PACES,
        "Siren_street",
        (
            Phrase("a siren", "wails", "wailing", "in the street"),
            Phrase("an emergency siren", "sounds", "sounding", "in the city"),
            Phrase("a police siren", "howls", "howling", "outside"),
        ),
    ),
    "engine": Source(
        Voice.motor,
        LEVELS + PITCHES,
        "engine idle",
        (
            Phrase("an engine", "runs", "running", "in a garage"),
            Phrase("a car engine", "idles", "idling", "on the road"),
            Phrase("a motor", "hums", "humming", "nearby"),
        ),
    ),
    "footsteps": Source(
        Voice.steps,
        LEVELS + PACES,
        "footsteps, hall",
        (
            Phrase("someone", "walks", "walking", "on a hard floor"),
            Phrase("a person", "walks", "walking", "down a hallway"),
            Phrase("footsteps", "sound", "sounding", "on the floor"),
        ),
    ),
    "clock": Source(
        Voice.tick,
        LEVELS + PACES,
        "grandma's clock",
        (
            Phrase("a clock", "ticks", "ticking", "on the wall"),
            Phrase("an old clock", "ticks", "ticking", "in a room"),
            Phrase("a wall clock", "clicks", "clicking", "indoors"),
        ),
    ),
}


# --- Scenes -----------------------------------------------------------------------------------

class Sound(NamedTuple):
    """A source that is heard in some manner."""

    source: str  # a key of SOURCES
    manner: str | None  # a key of MANNERS, or None: nothing remarkable, or not told by a caption


class Scene(NamedTuple):
    """The sounds of a clip, or those that a caption tells of."""

    front: tuple[Sound, ...]  # one to three, one after another
    bed: Sound | None  # lasts under all of them

    @property
    def sounds(self) -> tuple[Sound, ...]:
        if self.bed is None:
            return self.front
        return (*self.front, self.bed)


# {(number of sounds at the front, whether there is a bed): the share of such scenes}
SHAPES = {(1, False): 0.2, (2, False): 0.35, (3, False): 0.1, (1, True): 0.25, (2, True): 0.1}
# The share of sounds that have no manner, and of manners that a caption leaves out.
PLAIN_SHARE = 0.25
UNTOLD_SHARE = 0.25


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene in which no source occurs twice."""
    front_sounds, has_bed = choose_by_share(rng, SHAPES)
    sources = rng.permutation(list(SOURCES)).tolist()
    front = []
    for source in sources[:front_sounds]:
        front.append(draw_sound(source, SOURCES[source].manners, rng))
    bed = None
    if has_bed:
        source = sources[front_sounds]
        # A loud bed would drown the front.
        manners = [manner for manner in SOURCES[source].manners if manner != "loud"]
        bed = draw_sound(source, manners, rng)
    return Scene(tuple(front), bed)


def draw_sound(source: str, manners: Sequence[str], rng: np.random.Generator) -> Sound:
    if rng.random() < PLAIN_SHARE:
        return Sound(source, None)
    return Sound(source, choose(rng, manners))


def facts(scene: Scene) -> set[str]:
    """Return all that is true of a scene, as short sentences.

    A caption is true of a clip if the facts that it tells are among the facts of the clip's scene.
    """
    sentences = set()
    for sound in scene.sounds:
        sentences.add(f"{sound.source} is heard")
        if sound.manner is not None:
            sentences.add(f"{sound.source} is {sound.manner}")
    for earlier, later in itertools.combinations(scene.front, 2):
        sentences.add(f"{earlier.source} comes before {later.source}")
    if scene.bed is not None:
        for sound in scene.front:
            first, second = sorted((sound.source, scene.bed.source))
            sentences.add(f"{first} and {second} are heard together")
    return sentences


# --- Scene -> waveform ------------------------------------------------------------------------

FADE_SAMPLES = RATE_HZ // 20  # 50 ms
FRAME_SAMPLES = RATE_HZ // 50  # 20 ms; a sound's level is the RMS of its loudest frame
PEAK = 0.9  # the most that a mix's largest sample may be; full scale is 1


def render(scene: Scene, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return a scene's waveform: (samples,) float32."""
    mix = Voice(rng, samples).room()
    if scene.bed is not None:
        mix += synthesise(scene.bed, samples, rng)

    # The sounds at the front share the clip's time almost equally, with a pause around each.
    widths = rng.uniform(0.85, 1.15, len(scene.front))
    ends = np.cumsum(widths) / widths.sum() * samples
    start = 0
    for sound, end in zip(scene.front, ends, strict=True):
        pause_before, pause_after = rng.uniform(0.02, 0.08, 2) * (end - start)
        first = int(start + pause_before)
        last = int(end - pause_after)
        mix[first:last] += synthesise(sound, last - first, rng)
        start = end

    peak = np.abs(mix).max()
    if peak > PEAK:
        mix *= PEAK / peak
    return mix.astype(np.float32)


def synthesise(sound: Sound, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Return one sound (samples,), as loud, as high and as fast as its manner says."""
    manner = MANNERS.get(sound.manner, PLAIN)
    level = rng.uniform(*manner.level)
    voice = Voice(rng, samples, pitch=rng.uniform(*manner.pitch), pace=rng.uniform(*manner.pace))
    waveform = SOURCES[sound.source].synthesiser(voice)

    fade_in = np.minimum(1, np.arange(samples) / FADE_SAMPLES)
    waveform = waveform * fade_in * fade_in[::-1]
    whole_frames = waveform[: samples // FRAME_SAMPLES * FRAME_SAMPLES]
    frame_power = np.square(whole_frames.reshape(-1, FRAME_SAMPLES)).mean(axis=1)
    return waveform * (level / np.sqrt(frame_power.max()))


# --- Scene -> captions ------------------------------------------------------------------------

class DataSet(NamedTuple):
    """The places of a data set's files, the lengths of its clips, the wording of its captions.

    In the patterns of captions, each {} stands for a sound at the front. In with_bed, {front}
    stands for one of the patterns, filled in, {bed_clause} for words such as "rain falls", and
    {bed_participle} for words such as "rain falling".
    """

    sounds: str  # the folder of a split's sounds; {} is the split
    table: str  # a split's csv file
    seconds: dict[tuple[float, float], float]  # ranges of durations, and the share of each
    # Captions are sentences with finite verbs, places and a full stop, or else use participles.
    has_sentences: bool
    one_sound: tuple[str, ...]
    two_sounds: tuple[str, ...]
    three_sounds: tuple[str, ...]
    with_bed: tuple[str, ...]


CLOTHO = DataSet(
    sounds="CLOTHO_v2.1/clotho_audio_files/{}",
    table="CLOTHO_v2.1/clotho_csv_files/clotho_captions_{}.csv",
    seconds={(4, 10): 0.7, (10.5, 20): 0.22, (20.5, 24): 0.08},
    has_sentences=True,
    one_sound=("{}", "one can hear how {}", "{} in this recording"),
    two_sounds=("{} and then {}", "{}, after which {}", "first {}, then {}", "{} before {}"),
    three_sounds=(
        "{}, then {}, and finally {}",
        "first {}, next {}, then {}",
        "{}, {} and then {}",
    ),
    with_bed=(
        "{front} while {bed_clause}",
        "{front} and meanwhile {bed_clause}",
        "{front} over the sound of {bed_participle}",
    ),
)
AUDIOCAPS = DataSet(
    sounds="AUDIOCAPS/audio_32000Hz/{}",
    table="AUDIOCAPS/csv_files_v1/{}.csv",
    seconds={(5, 10): 0.4, (10, 10): 0.6},
    has_sentences=False,
    one_sound=("{}", "the sound of {}", "{} can be heard"),
    two_sounds=("{} followed by {}", "{} then {}", "{} and then {}"),
    three_sounds=("{} followed by {} then {}", "{}, {} and then {}", "{} then {} and finally {}"),
    with_bed=(
        "{front} as {bed_clause}",
        "{front} while {bed_clause}",
        "{front} over {bed_participle}",
        "{front} with {bed_participle} in the background",
    ),
)


def captions(scene: Scene, data_set: DataSet, n: int, rng: np.random.Generator) -> dict[str, Scene]:
    """Return {caption: what it tells of the scene}, with n different captions."""
    scene_of_caption = {}
    while len(scene_of_caption) < n:
        told = leave_out_manners(scene, rng)
        scene_of_caption[compose(told, data_set, rng)] = told
    return scene_of_caption


def leave_out_manners(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene without some of its manners, since a caption need not tell all of them."""
    told = []
    for sound in scene.sounds:
        if rng.random() < UNTOLD_SHARE:
            sound = Sound(sound.source, None)
        told.append(sound)
    if scene.bed is None:
        return Scene(tuple(told), None)
    return Scene(tuple(told[:-1]), told[-1])


def compose(told: Scene, data_set: DataSet, rng: np.random.Generator) -> str:
    """Compose a caption that tells all of a scene, in the style of a data set."""
    patterns = (data_set.one_sound, data_set.two_sounds, data_set.three_sounds)
    pattern = choose(rng, patterns[len(told.front) - 1])
    verb_form = "finite" if data_set.has_sentences else "participle"
    phrases = [phrase(sound, verb_form, data_set, rng) for sound in told.front]
    caption = pattern.format(*phrases)

    if told.bed is not None:
        caption = choose(rng, data_set.with_bed).format(
            front=caption,
            bed_clause=phrase(told.bed, "finite", data_set, rng),
            bed_participle=phrase(told.bed, "participle", data_set, rng),
        )
    caption = caption[0].upper() + caption[1:]
    if data_set.has_sentences:
        caption += "."
    return caption


def phrase(sound: Sound, verb_form: str, data_set: DataSet, rng: np.random.Generator) -> str:
    """Word one sound: "a dog barks loudly in the yard", or "a dog barking loudly"."""
    wording = choose(rng, SOURCES[sound.source].phrases)
    words = [wording.subject]
    if verb_form == "finite":
        words.append(wording.finite)
    else:
        words.append(wording.participle)
    if sound.manner is not None:
        words.append(choose(rng, MANNERS[sound.manner].adverbs))
    if data_set.has_sentences:
        words.append(wording.place)
    return " ".join(words)


# --- Clips, and the annotations of the evaluation split ---------------------------------------

# Each clip is drawn from the seed (SEED, the number of its split here, its index in the split).
SPLITS = {
    "development": CLOTHO,
    "validation": CLOTHO,
    "evaluation": CLOTHO,
    "train": AUDIOCAPS,
    "val": AUDIOCAPS,
    "test": AUDIOCAPS,
}
CLIPS = dict(development=160, validation=48, evaluation=100, train=480, val=16, test=16)
# Clips have at least this many seconds for each sound at the front, since a slow one would not be
# heard to be slow in less.
SECONDS_PER_SOUND = 2.4
YOUTUBE_ALPHABET = "-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class Clip(NamedTuple):
    """A clip whose sound is on disk."""

    file_name: str
    scene: Scene
    captions: dict[str, Scene]  # {caption: what it tells of the scene}


def write_clip(folder: Path, split: str, index: int) -> Clip:
    """Write the sound of one clip; everything about it follows from its split and index."""
    rng = np.random.default_rng((SEED, list(SPLITS).index(split), index))
    data_set = SPLITS[split]
    captions_per_clip = 1 if split == "train" else 5  # Only AudioCaps' train split has one.

    scene = draw_scene(rng)
    shortest, longest = choose_by_share(rng, data_set.seconds)
    seconds = max(SECONDS_PER_SOUND * len(scene.front), rng.uniform(shortest, longest))
    waveform = render(scene, round(seconds * RATE_HZ), rng)
    scene_of_caption = captions(scene, data_set, captions_per_clip, rng)

    if data_set is CLOTHO:
        file_name = f"{SOURCES[scene.front[0].source].title} {index:03d}.wav"
    else:
        # The first ids begin with - and _, as some real ones do, on which programs may stumble.
        youtube_id = YOUTUBE_ALPHABET[index % len(YOUTUBE_ALPHABET)]
        for _ in range(10):
            youtube_id += choose(rng, YOUTUBE_ALPHABET)
        start_s = 10 * rng.integers(30)
        file_name = f"{youtube_id}_{start_s}.wav"
    write_wav(folder / data_set.sounds.format(split) / file_name, waveform)
    return Clip(file_name, scene, scene_of_caption)


def annotate(clips: Sequence[Clip], rng: np.random.Generator) -> dict[str, list[str]]:
    """Choose a caption of each clip as a query: {query: files of all clips of which it is true}."""
    relevant_files = {}
    for clip in clips:
        query = choose(rng, list(clip.captions))
        told_facts = facts(clip.captions[query])
        relevant_files[query] = []
        for candidate in clips:
            if told_facts <= facts(candidate.scene):
                relevant_files[query].append(candidate.file_name)
    return relevant_files


# --- Files ------------------------------------------------------------------------------------

def write_miniature(folder: Path, sizes: dict[str, int] = CLIPS) -> str:
    """Write both data sets into a new folder, and return a line that says what was done.

    All is first written to a hidden folder beside it, which is renamed at the end. After an
    interruption the next call writes that folder anew and completes it.

    Args:
        sizes: {split: number of its clips}.
    """
    if folder.exists() and any(folder.iterdir()):
        return f"{folder}: is there already, and left as it is."
    target = folder.absolute()  # "." has no name of its own.
    unfinished = target.with_name(f".{target.name}.unfinished")
    with ProcessPoolExecutor(usable_cores()) as pool:
        for split, count in sizes.items():
            (unfinished / SPLITS[split].sounds.format(split)).mkdir(parents=True, exist_ok=True)
            write = functools.partial(write_clip, unfinished, split)
            written = pool.map(write, range(count))
            bar = tqdm(written, split, count, unit="clip", leave=False, disable=None)
            write_tables(unfinished, split, list(bar))
    unfinished.replace(target)
    return f"{folder}: {sum(sizes.values())} clips with captions and annotations."


def write_tables(folder: Path, split: str, clips: Sequence[Clip]) -> None:
    """Write a split's captions, and for the evaluation split the annotations."""
    data_set = SPLITS[split]
    table = folder / data_set.table.format(split)
    if data_set is CLOTHO:
        header = ["file_name", "caption_1", "caption_2", "caption_3", "caption_4", "caption_5"]
        write_csv(table, header, [[clip.file_name, *clip.captions] for clip in clips])
    else:
        header = ["audiocap_id", "youtube_id", "start_time", "caption"]
        write_csv(table, header, audiocaps_rows(clips))
    if split == "evaluation":
        annotations = annotate(clips, np.random.default_rng((SEED, len(SPLITS))))
        header = ["query", "audio_filenames"]
        write_csv(folder / "metadata_eval.csv", header, annotations.items())


def audiocaps_rows(clips: Sequence[Clip]) -> list[list]:
    """Return one row for each caption; a clip's rows lie apart, as in the real tables."""
    rows = []
    for turn in range(len(clips[0].captions)):
        for clip in clips:
            youtube_id, start_s = clip.file_name.removesuffix(".wav").rsplit("_", 1)
            rows.append([len(rows), youtube_id, start_s, list(clip.captions)[turn]])
    return rows


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_wav(path: Path, waveform: np.ndarray) -> None:
    """Write a mono waveform (n,) with 16 bits a sample."""
    # Where `wave` itself cannot open a file, it prints a traceback beside the error that it raises.
    with path.open("wb") as file, wave.open(file) as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE_HZ)
        sound.writeframes(to_int16(waveform).tobytes())


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    print(write_miniature(parser.parse_args().folder))


if __name__ == "__main__":
    run_command(main)
