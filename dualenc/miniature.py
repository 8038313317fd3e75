"""A miniature Clotho v2.1 and AudioCaps: synthetic sounds, captions and annotations on disk.

    python -m dualenc.miniature data/miniature

Every clip is a scene of one to three sounds over a quiet background, and its captions say what is
heard, in which order, and how. The layout is that of the real ones as aac-datasets writes them.
"""

import csv
import functools
import itertools
import wave
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dualenc.decoding import SAMPLE_RATE, to_int16
from dualenc.errors import Parser, run_command

RATE_HZ = SAMPLE_RATE // 2  # of both: a model could tell the data sets apart by their treble


def pick(rng, options):  # from a sequence, or from {option: its share}
    shares = list(options.values()) if isinstance(options, dict) else None
    return list(options)[rng.choice(len(options), p=shares)]


def sine(cycles):
    return np.sin(2 * np.pi * cycles)


def arch(t):  # rises and falls smoothly
    return np.sin(np.linspace(0, np.pi, len(t)))


class Voice(NamedTuple):
    """Synthesises a sound (samples,). What is varied within one() differs from bark to bark."""

    rng: np.random.Generator
    samples: int
    pitch: float = 1  # times the usual frequency
    pace: float = 1  # times the usual rate

    def vary(self, value, spread=0.12):
        return value * self.rng.uniform(1 - spread, 1 + spread)

    def time(self, duration_s=None):  # in seconds; of the whole sound, unless a duration is given
        return np.arange(int(duration_s * RATE_HZ) if duration_s else self.samples) / RATE_HZ

    def noise(self, t, low_hz, high_hz):  # RMS 1; falls by 12 dB an octave outside the band
        step = 2 ** max(1, len(t).bit_length() - 4)  # a prime length would slow the FFT tenfold
        hz = np.fft.rfftfreq(-(-len(t) // step) * step, 1 / RATE_HZ).astype(np.float32) + 1e-3
        gain = 1 / ((1 + (low_hz / hz) ** 2) * (1 + (hz / high_hz) ** 2))
        real, imaginary = self.rng.standard_normal((2, len(hz)), np.float32)
        band = np.fft.irfft(gain * (real + 1j * imaginary))[: len(t)]
        return band / band.std()

    def pulses(self, hz, sharpness):  # at the rate hz (samples,): the sharper, the more harmonics
        train = np.exp(sharpness * (np.cos(2 * np.pi * np.cumsum(hz) / RATE_HZ) - 1))
        return train - train.mean()

    def repeat(self, one, period_s, jitter=0.05):  # lays out what one() returns, again and again
        out, period_s = np.zeros(self.samples), self.vary(period_s) / self.pace
        start_s = self.rng.uniform(0.1, 0.3) * period_s
        while (start := int(start_s * RATE_HZ)) < self.samples:
            short = one()[: self.samples - start]
            out[start : start + len(short)] += short
            start_s += self.vary(period_s, jitter)
        return out

    def bark(self):
        usual_hz, usual_s = self.vary(430 * self.pitch), self.vary(0.17)
        def one():  # the mouth opens and shuts, and the pitch goes up and down with it
            t = self.time(self.vary(usual_s))
            voice = self.pulses(self.vary(usual_hz, 0.05) * (0.75 + 0.6 * arch(t)), 5)
            return arch(t) ** 0.7 * (voice + 0.07 * self.noise(t, usual_hz, 5 * usual_hz))
        return self.repeat(one, 0.5, jitter=0.15)

    def chirp(self):
        usual_hz = self.vary(3200 * self.pitch, 0.08)
        def one():
            t = self.time(self.vary(0.1, 0.4) / self.pace**0.5)
            bend = self.rng.uniform(-0.3, 0.3) * np.cos(np.pi * t / t[-1] + self.rng.uniform(0, 1))
            hz = self.vary(usual_hz, 0.06) * (1 + bend)
            return self.vary(arch(t), 0.3) * sine(np.cumsum(hz) / RATE_HZ)
        return self.repeat(one, 0.24, jitter=0.35)

    def patter(self):  # many small drops and a few big ones, each a few milliseconds of noise
        t, drop = self.time(), int(0.003 * RATE_HZ)
        drops = np.repeat(self.rng.gamma(0.4, size=len(t) // drop + 1), drop)[: len(t)]
        return self.noise(t, self.vary(2000, 0.3), 7000) * (0.4 + drops)

    def toll(self):
        t, hz, strike = self.time(2.0), self.vary(700 * self.pitch), 0
        for n in (0.5, 1, 1.19, 1.5, 2, 2.66, 3.4):  # hum, prime, minor third, fifth, octave
            strike += self.vary(sine(self.vary(n, 0.01) * hz * t), 0.5) * np.exp(-4 * n**0.7 * t)
        return self.repeat(lambda: self.vary(strike), 0.8)

    def wail(self):
        turns = self.vary(0.6) * self.pace * self.time() + self.rng.uniform()
        return self.pulses(2 ** (self.vary(0.5) * sine(turns)) * self.vary(750 * self.pitch), 1.5)

    def motor(self):
        t, usual_hz = self.time(), self.vary(85 * self.pitch)
        hz = usual_hz * (1 + 0.04 * sine(self.vary(0.7, 0.5) * t))
        rattle = self.noise(t, 3 * usual_hz, 8 * usual_hz)
        return 0.08 * rattle + self.pulses(hz, self.vary(10, 0.4))

    def steps(self):
        t, usual_hz = self.time(0.18), self.vary(95, 0.25)
        def one():
            thud = sine(self.vary(usual_hz) * t) * np.exp(-t / 0.03)
            return self.vary(thud + 0.35 * self.noise(t, 250, 1500) * np.exp(-t / 0.02), 0.3)
        return self.repeat(one, 0.55)

    def tick(self):
        t, pair = self.time(0.06), []
        for hz in (self.vary(2900), self.vary(2000)):
            click = self.noise(t, hz, 2 * hz) * np.exp(-t / 0.003)
            pair.append(sine(hz * t) * np.exp(-t / 0.006) + 0.4 * click)
        return self.repeat(itertools.cycle(pair).__next__, 0.5, jitter=0.01)

    def surf(self):  # a wave gathers slowly and breaks; only that hisses, the sea rumbles always
        t = self.time()
        turn = (t / self.vary(3.2, 0.25) + self.rng.uniform()) % 1
        swell = np.where(turn < 0.35, (turn / 0.35) ** 2, np.exp((0.35 - turn) / 0.2))
        return self.noise(t, 60, 300) * (0.15 + 0.3 * swell) + self.noise(t, 400, 2500) * swell

    def ring(self):
        t, hz = self.time(self.vary(0.8)), self.vary(1100 * self.pitch, 0.08)
        hammer = 1 + 0.9 * np.sign(sine(self.vary(20) * t))
        gongs = sine(hz * t) + sine(self.vary(1.3 * hz, 0.03) * t)
        return self.repeat(lambda: hammer * gongs, 1.25, jitter=0.01)

    def rasp(self):
        t, teeth_hz, low_hz = self.time(0.27 / self.pace), self.vary(130), self.vary(1100, 0.25)
        def one():
            teeth = arch(t) * (1 + 0.8 * sine(self.vary(teeth_hz) * t))
            return teeth * self.noise(t, low_hz, 3 * low_hz)
        return self.repeat(one, 0.36, jitter=0.04)

    def stridulate(self):
        t = self.time(self.vary(0.13))
        song = arch(t) * np.maximum(0, sine(self.vary(32) * t)) * sine(self.vary(4700) * t)
        return self.repeat(lambda: self.vary(song), 0.36, jitter=0.03)

    def room(self):  # a background of noise and mains hum, well below the faintest sound
        noise = self.noise(self.time(), 20, 10 ** self.rng.uniform(2.3, 3.7))  # rumble to hiss
        hum = sine(pick(self.rng, (100, 120)) * self.time())
        return 10 ** self.rng.uniform(-3.6, -2.7) * noise + 10 ** self.rng.uniform(-4.5, -3) * hum


# --- Kinds and manners: ranges are kept apart, so that no word is a matter of taste ---------------
LEVEL = {"loud": (0.18, 0.25), None: (0.06, 0.085), "faint": (0.015, 0.025)}  # RMS, of full scale
PITCH = {"high": (1.55, 1.9), None: (0.9, 1.1), "low": (0.5, 0.62)}  # times the usual frequency
PACE = {"fast": (1.7, 2.2), None: (0.9, 1.1), "slow": (0.45, 0.58)}  # times the usual rate
ADVERBS = {
    "loud": "loudly|noisily|very loudly", "faint": "faintly|softly|quietly",
    "high": "at a high pitch|in a high pitch|shrilly", "fast": "quickly|rapidly|at a fast pace",
    "low": "at a low pitch|in a low pitch|deeply", "slow": "slowly|unhurriedly|at a slow pace",
}
EVERY = ("loud", "faint", "high", "low", "fast", "slow")
LEVELS, TUNED, PACED = EVERY[:2], EVERY[:4], EVERY[:2] + EVERY[4:]
# Synthesiser, manners, title of files (as awkward as the real ones), and three phrases.
KINDS = {
    "dog": (Voice.bark, EVERY, "Dog, yard", "a dog|barks|barking|in the yard",
        "a hound|barks|barking|outdoors", "a dog|yaps|yapping|at someone"),
    "bird": (Voice.chirp, EVERY, "bird song, dawn", "a bird|chirps|chirping|in a tree",
        "a bird|sings|singing|outside", "a songbird|tweets|tweeting|in the garden"),
    "rain": (Voice.patter, LEVELS, "rain on tent's roof", "rain|falls|falling|on a roof",
        "rain|pours|pouring|onto the ground", "the rain|patters|pattering|on the leaves"),
    "bell": (Voice.toll, EVERY, "church bell", "a bell|rings|ringing|in a tower",
        "a church bell|tolls|tolling|nearby", "a bell|chimes|chiming|in the village"),
    "siren": (Voice.wail, EVERY, "Siren_street", "a siren|wails|wailing|in the street",
        "an emergency siren|sounds|sounding|in the city", "a police siren|howls|howling|outside"),
    "engine": (Voice.motor, TUNED, "engine idle", "an engine|runs|running|in a garage",
        "a car engine|idles|idling|on the road", "a motor|hums|humming|nearby"),
    "footsteps": (Voice.steps, PACED, "footsteps, hall", "someone|walks|walking|on a hard floor",
        "a person|walks|walking|down a hallway", "footsteps|sound|sounding|on the floor"),
    "clock": (Voice.tick, PACED, "grandma's clock", "a clock|ticks|ticking|on the wall",
        "an old clock|ticks|ticking|in a room", "a wall clock|clicks|clicking|indoors"),
    "waves": (Voice.surf, LEVELS, "sea_waves", "waves|break|breaking|on the beach",
        "ocean waves|crash|crashing|on the shore", "the sea|washes|washing|onto the sand"),
    "telephone": (Voice.ring, TUNED, "old telephone", "a telephone|rings|ringing|in an office",
        "a phone|rings|ringing|on a desk", "an old telephone|jangles|jangling|indoors"),
    "saw": (Voice.rasp, PACED, "hand-saw", "a saw|cuts|cutting|through wood",
        "a handsaw|rasps|rasping|back and forth", "a carpenter|saws|sawing|in a workshop"),
    "crickets": (Voice.stridulate, PACED, "Crickets at night", "crickets|chirp|chirping|at night",
        "a cricket|chirps|chirping|in the grass", "insects|trill|trilling|in the dark"),
}

# --- Scenes: one to three sounds at the front, in order, and at most one bed under all of them ----
# A sound is (kind, manner); the manner None is neither this nor that or, in a caption, unsaid.
SHAPES = {(1, 0): 0.2, (2, 0): 0.35, (1, 1): 0.25, (3, 0): 0.1, (2, 1): 0.1}  # share of each
PLAIN = 0.25  # share of the sounds without a manner, and of the manners that a caption leaves out
SLOT_S = 2.4  # at least this long for each sound at the front, or "slow" could not be heard
FRAME = RATE_HZ // 50  # a sound's level is the RMS of its loudest frame of this length
PEAK = 0.9  # of full scale


def draw_scene(rng):
    """Draw (front, beds): no kind comes twice, and no bed is loud, which would drown the front."""
    ahead, behind = pick(rng, SHAPES)
    sounds = []
    for place, kind in enumerate(rng.permutation(list(KINDS))[: ahead + behind].tolist()):
        manners = [m for m in KINDS[kind][1] if place < ahead or m != "loud"]
        sounds.append((kind, None if rng.random() < PLAIN else pick(rng, manners)))
    return sounds[:ahead], sounds[ahead:]


def facts(front, beds):
    """The set of all that is true: what is heard, how, before what, and together with what."""
    sounds = {(kind, how) for kind, manner in front + beds for how in (None, manner)}
    before = {(a, "before", b) for (a, _), (b, _) in itertools.combinations(front, 2)}
    return sounds | before | {frozenset((a, b)) for a, _ in front for b, _ in beds}


def render(front, beds, samples, rng):
    """Synthesise a scene: float32 (samples,), within PEAK of full scale."""
    def sound(kind, manner, samples):  # as loud, as high and as fast as its manner says
        ranges = (table.get(manner, table[None]) for table in (LEVEL, PITCH, PACE))
        level, pitch, pace = (rng.uniform(*limits) for limits in ranges)
        ramp = np.minimum(1, np.arange(samples) / (RATE_HZ // 20))  # fades within 50 ms
        faded = KINDS[kind][0](Voice(rng, samples, pitch, pace)) * np.minimum(ramp, ramp[::-1])
        power = np.square(faded[: samples // FRAME * FRAME]).reshape(-1, FRAME).mean(axis=1)
        return faded * (level / np.sqrt(power.max()))
    mix = sum((sound(*bed, samples) for bed in beds), Voice(rng, samples).room())
    widths = rng.uniform(0.85, 1.15, len(front))
    bounds = itertools.pairwise([0, *(np.cumsum(widths) / widths.sum() * samples)])
    for event, (start, end) in zip(front, bounds, strict=True):
        pauses = rng.uniform(0.02, 0.08, 2) * (end - start)
        first, last = int(start + pauses[0]), int(end - pauses[1])
        mix[first:last] += sound(*event, last - first)
    return (mix * min(1, PEAK / np.abs(mix).max())).astype(np.float32)


# --- Sentences: a small grammar, in Clotho's style or in AudioCaps' -------------------------------
CLOTHO = SimpleNamespace(
    sounds="CLOTHO_v2.1/clotho_audio_files/{}",
    table="CLOTHO_v2.1/clotho_csv_files/clotho_captions_{}.csv",
    columns=["file_name", "caption_1", "caption_2", "caption_3", "caption_4", "caption_5"],
    durations_s={(4, 10): 0.7, (10.5, 20): 0.22, (20.5, 24): 0.08},  # share of the clips
    one=("{} for a while", "one can hear how {}", "{} in this clip"),
    two=("{} and then {}", "{}, after which {}", "first {}, then {}", "{} before {}"),
    three=("{}, then {}, and finally {}", "first {}, next {}, then {}", "{}, {} and then {}"),
    beds=("{0} while {1}", "{0} and meanwhile {1}", "{0} over the sound of {2}"),
)
AUDIOCAPS = SimpleNamespace(
    sounds="AUDIOCAPS/audio_32000Hz/{}",
    table="AUDIOCAPS/csv_files_v1/{}.csv",
    columns=["audiocap_id", "youtube_id", "start_time", "caption"],
    durations_s={(5, 10): 0.4, (10, 10): 0.6},
    one=("{}", "{} for a while", "the sound of {}"),
    two=("{} followed by {}", "{} then {}", "{} and then {}"),
    three=("{} followed by {} then {}", "{}, {} and then {}", "{} then {} and finally {}"),
    beds=("{0} as {1}", "{0} while {1}", "{0} with {2} in the background", "{0} over {2}"),
)


def captions(front, beds, rng, style, n):
    """Word a scene in n different ways: {caption: the facts that it tells}."""
    full = style == CLOTHO  # sentences with places and a full stop, or participles only
    def phrase(kind, manner, finite=full):
        subject, *verbs, place = pick(rng, KINDS[kind][3:]).split("|")
        adverb = pick(rng, ADVERBS[manner].split("|")) if manner else ""
        return " ".join(filter(None, (subject, verbs[not finite], adverb, place * full)))
    texts = {}
    while len(texts) < n:
        said = [(kind, None if rng.random() < PLAIN else how) for kind, how in beds + front]
        under, ahead = said[: len(beds)], said[len(beds) :]
        one = ("{}",) if under else style.one
        frame = pick(rng, (one, style.two, style.three)[len(ahead) - 1])
        text = frame.format(*(phrase(*event) for event in ahead))
        for bed in under:  # {0} over the bed, as a clause {1} or a participle {2}
            clause, participle = phrase(*bed, True), phrase(*bed, False)
            text = pick(rng, style.beds).format(text, clause, participle)
        texts[text[0].upper() + text[1:] + "." * full] = facts(ahead, under)
    return texts


# --- Files: sounds, tables, annotations -----------------------------------------------------------
CLIPS = dict(development=160, validation=48, evaluation=100, train=480, val=16, test=16)
YOUTUBE_ALPHABET = "-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def write_clip(folder, n, style, key):
    """Write one sound; return (file name, facts, {n captions}). All follows from its key."""
    rng, index = np.random.default_rng(key), key[-1]
    front, beds = draw_scene(rng)
    duration_s = max(SLOT_S * len(front), rng.uniform(*pick(rng, style.durations_s)))
    texts = captions(front, beds, rng, style, n)
    if style == CLOTHO:
        name = f"{KINDS[front[0][0]][2]} {index:03d}.wav"
    else:  # YouTube's id, whose first character may trip readers, and the second of the beginning
        letters = "".join(pick(rng, YOUTUBE_ALPHABET) for _ in range(11))
        name = f"{'-_'[index : index + 1] or letters[0]}{letters[1:]}_{10 * rng.integers(30)}.wav"
    with wave.open(str(folder / name), "wb") as file:
        file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))  # mono, two bytes a sample
        file.writeframes(to_int16(render(front, beds, round(duration_s * RATE_HZ), rng)).tobytes())
    return name, facts(front, beds), texts


def write_csv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def write_miniature(folder, sizes=CLIPS):
    """Write both data sets into a new folder; return a line that says what was done."""
    if folder.exists() and any(folder.iterdir()):
        return f"{folder}: is there already, and left as it is."
    unfinished = folder.with_name(f".{folder.name}.unfinished")  # an interrupted one is completed
    for number, (split, count) in enumerate(sizes.items()):
        style, n = CLOTHO if number < 3 else AUDIOCAPS, 1 if split == "train" else 5
        sounds = unfinished / style.sounds.format(split)
        sounds.mkdir(parents=True, exist_ok=True)
        write = functools.partial(write_clip, sounds, n, style)
        with ProcessPoolExecutor() as pool:
            made = pool.map(write, [(0, number, index) for index in range(count)])
            clips = [*tqdm(made, split, count, unit="clip", leave=False, disable=None)]
        rows = [(name, *texts) for name, _, texts in clips]
        if style is AUDIOCAPS:  # one caption a row; a clip's rows lie apart, as in the real tables
            names, *turns = zip(*rows, strict=True)
            ids = itertools.cycle(name.removesuffix(".wav").rsplit("_", 1) for name in names)
            rows = [(i, *next(ids), text) for i, text in enumerate(itertools.chain(*turns))]
        write_csv(unfinished / style.table.format(split), style.columns, rows)
        if split == "evaluation":  # a caption of each clip, and all clips that it is true of
            rng = np.random.default_rng((0, 6))
            asked = dict(pick(rng, list(texts.items())) for _, _, texts in clips)
            rows = [(query, [name for name, true, _ in clips if said <= true])
                    for query, said in asked.items()]
            write_csv(unfinished / "metadata_eval.csv", ["query", "audio_filenames"], rows)
    unfinished.replace(folder)
    return f"{folder}: {sum(sizes.values())} clips with captions and annotations."


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    print(write_miniature(parser.parse_args().folder))


if __name__ == "__main__":
    run_command(main)
