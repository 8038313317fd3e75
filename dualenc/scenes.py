"""Scenes of one to three sounds, and the sentences that describe them.

A scene says which sounds are heard, in which order, and how; it is rendered into a waveform and
worded by a small grammar, in Clotho's style or in AudioCaps'.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dualenc.synthesis import (
    Voice,
    bark,
    chirp,
    motor,
    patter,
    rasp,
    ring,
    steps,
    stridulate,
    surf,
    tick,
    toll,
    wail,
)

YOUTUBE_ALPHABET = "-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
RENDER_HZ = 16_000  # for both data sets: by its treble, a model could tell one from the other

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
    rate_hz: int  # of the files
    durations_s: tuple[tuple[float, float, float], ...]  # share of the clips, from, to
    full: bool  # sentences with places and a full stop, or participles only
    alone: tuple[str, ...]  # around one sound on its own
    orders: dict[int, tuple[str, ...]]  # around so many sounds, one after the other
    beds: tuple[str, ...]  # {0} over the bed, as a clause {1} or a participle {2}


CLOTHO = Style(
    file_name=clotho_name,
    rate_hz=16_000,  # the real ones are at 44 100 Hz; this keeps the folder small
    durations_s=((0.7, 4, 10), (0.22, 10.5, 20), (0.08, 20.5, 24)),
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


def render(heard, rng, sample_rate=RENDER_HZ):
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
