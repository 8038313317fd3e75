"""Twelve kinds of sound, synthesised: what the miniature data's clips are made of.

All lengths are in samples unless a name ends in _s (seconds) or _hz.
"""

import itertools
from dataclasses import dataclass

import numpy as np


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
