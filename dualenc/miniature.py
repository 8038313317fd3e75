"""A miniature Clotho v2.1 and AudioCaps: synthetic sounds, captions and annotations on disk.

    python -m dualenc.miniature FOLDER

Every clip is a scene of one to three sounds over a quiet background, and its captions say what is
heard, in which order, and how. Folders and tables are laid out as the real ones are (as the package
aac-datasets writes them), so what reads the real data can be tried on this within minutes.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from dualenc import InputError, replacing, run
from dualenc.decoding import resample
from dualenc.options import Parser
from dualenc.scenes import (
    AUDIOCAPS,
    CLOTHO,
    RENDER_HZ,
    Scene,
    captions,
    matches,
    pick,
    render,
    scene,
)

VERSION = 1  # raise it whenever the same seed comes to give other bytes
CLOTHO_CLIPS = (160, 48, 100)  # development, validation, evaluation
AUDIOCAPS_CLIPS = (480, 16, 16)  # train, val, test
SPLITS = ("development", "validation", "evaluation", "train", "val", "test")
OWN = ("CLOTHO_v2.1", "AUDIOCAPS", "metadata_eval.csv")  # what a miniature consists of


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
        wave = render(heard, rng)
        if style.rate_hz != RENDER_HZ:
            wave = resample(wave, RENDER_HZ)
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
    except (ValueError, RecursionError):
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
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips (default 0)")
    for name, default in (("clotho", CLOTHO_CLIPS), ("audiocaps", AUDIOCAPS_CLIPS)):
        text = f"clips to train, validate and evaluate with (default {default})"
        parser.add_argument(f"--{name}", type=int, nargs=3, metavar="N", default=default, help=text)
    args = parser.parse_args(argv)
    try:
        done = write_miniature(args.folder, args.seed, args.clotho, args.audiocaps)
    except (OSError, soundfile.LibsndfileError) as error:  # no space, no permission
        raise InputError(
            f"{args.folder}: cannot be written ({error}): is there room? It can be tried again"
        ) from error
    print(done)


if __name__ == "__main__":
    run(main)
