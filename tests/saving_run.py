"""A stand-in for a training run: the first signal lets it save, a second one ends it."""

import signal
import sys
import time


def save(number, frame):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.5)
    with open("saved.txt", "a") as file:
        file.write("saved\n")
    sys.exit(143)


signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
with open("started.txt", "a") as file:
    file.write("started\n")
time.sleep(99)
