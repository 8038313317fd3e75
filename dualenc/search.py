"""A folder of sounds and a sentence -> the sounds that match, and where in them.

    python -m dualenc.search "a dog barks, then a car passes" --audio FOLDER
    python -m dualenc.search --like bark.wav --audio FOLDER      # a sound as the query
    python -m dualenc.search --audio FOLDER                      # asks for sentence after sentence
    python -m dualenc.search --serve --audio FOLDER              # a local page to type into

The folder is embedded once, into an index in it; later only what is new or changed is.

N files    S segments of all files together, s of one    D embedding values
"""

import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualenc import audio, decoding, page
from dualenc.checkpoints import newest_checkpoint
from dualenc.errors import InputError, Parser, printable, replacing, run_command
from dualenc.model import DualEncoder, choose_device, choose_precision

INDEX_NAME = ".dualenc-index"  # hidden: sounds_below passes over it
SAVE_SECONDS = 60  # of embedding that an interruption may cost


class Match(NamedTuple):
    """A file found, and the seconds where its best segment starts and ends."""

    path: Path
    score: float  # cosine with the query
    above: float  # the share of the index that scores lower
    start: int
    end: float
    seconds: float  # of the whole file

    def where(self) -> str:
        return f"{page.clock(self.start)} to {page.clock(self.end)}"


class File(NamedTuple):
    """What the index knows of a file."""

    stamp: list[int]  # size in bytes, and time of modification in ns
    seconds: float  # as far as segments reach
    segments: int  # none where it could not be read
    fault: str  # why it could not be read, or not whole


class SoundIndex:
    """Embedded sound files, and exact search in them.

    Attributes:
        files: {name: File}; a name is relative to root.
        shares: (S, D) float32: segments of one file after the other, so scaled that those of a file
            add up to its embedding, which is their mean brought to unit norm.
        names: (N,) of the files that could be read: those that are searched.
    """

    def __init__(self, model: DualEncoder, root: Path, files: dict[str, File], shares: Tensor):
        self.model, self.root, self.files, self.shares = model, root, files, shares
        self.names = [name for name, file in files.items() if file.segments]
        self._ends = np.cumsum([0, *(files[name].segments for name in self.names)])

    @classmethod
    def build(cls, model: DualEncoder, sounds, folder: Path | None = None) -> "SoundIndex":
        """Embed a folder of sounds, or paths of files; an InputError where none can be read.

        What the index in `folder` holds already is not embedded again; it is kept there.
        """
        below = isinstance(sounds, str | os.PathLike)
        root = Path(os.path.abspath(sounds if below else os.sep))
        paths = map(os.path.abspath, decoding.sounds_below(sounds) if below else sounds)
        stamps = {os.path.relpath(path, root): _stamp(path) for path in paths}
        index = cls(model, root, {}, torch.zeros(0, model.config.embedding))
        if folder is not None and (folder / "index").exists():
            index = cls.load(folder, model, root)
        parts = index.shares.split([file.segments for file in index.files.values()])
        rows = zip(index.files, index.files.values(), parts, strict=True)
        rows = {name: row for name, *row in rows if stamps.get(name) == row[0].stamp}

        def gathered() -> SoundIndex:
            files = {name: rows[name][0] for name in sorted(rows)}
            shares = torch.cat([index.shares[:0], *(rows[name][1] for name in files)])
            own = cls(model, root, files, shares)
            if folder is not None:
                own.save(folder)
            return own

        fresh, due = [name for name in stamps if name not in rows], time.monotonic() + SAVE_SECONDS
        for name in tqdm(fresh, "embedding", unit="file", disable=None if folder else True):
            part, *found = embed_file(model, root / name)
            rows[name] = File(stamps[name], *found), part
            if time.monotonic() > due:
                gathered()
                due = time.monotonic() + SAVE_SECONDS
        if fresh or len(rows) < len(index.files):
            index = gathered()
        if not index.names:
            faults = [f"{name}: {file.fault}" for name, file in index.files.items()]
            raise InputError.of(f"{root}: no sound file that can be read", faults or ["none there"])
        return index

    def save(self, folder: Path) -> None:
        header = json.dumps([_origin(self.model, self.root, folder), self.files])
        with replacing(folder / "index") as temporary, open(temporary, "wb") as file:
            torch.save([header, self.shares], file)

    @classmethod
    def load(cls, folder: Path, model: DualEncoder, root: Path) -> "SoundIndex":
        """Open the index of this model and root, memory-mapped; else an InputError."""
        try:
            header, shares = torch.load(folder / "index", weights_only=True, mmap=True)
            origin, files = json.loads(header)
        except Exception:  # torch.load raises whatever its parsers meet
            origin = "damaged"
        if origin != _origin(model, root, folder):
            raise InputError(
                f"{folder}: is the index of another checkpoint or folder, or damaged; give that "
                f"--checkpoint, another --index, or remove it (rm -r {shlex.quote(str(folder))})"
            )
        return cls(model, root, {name: File(*file) for name, file in files.items()}, shares)

    def search(self, sentence: str, k: int = 10, by: str = "file") -> list[Match]:
        """The k files that match a sentence best, best first; of equal ones the first by name.

        A file's score is that of its embedding, or by "segment" that of its best segment.
        """
        return self.nearest(self.model.embed_text(in_words(sentence))[0], k, by)

    def search_like(self, path: str | os.PathLike, k: int = 10, by: str = "file") -> list[Match]:
        """The k files that sound most like one, which need not be of the index."""
        shares, _, segments, fault = embed_file(self.model, path)
        if not segments:
            raise InputError(f"{path}: {fault}")
        return self.nearest(shares.sum(dim=0), k, by)

    def nearest(self, query: Tensor, k: int = 10, by: str = "file") -> list[Match]:
        """Exact search: the k best files for a (D,) query of unit norm."""
        if k < 1 or by not in ("file", "segment"):
            raise InputError(f"k={k}, by={by}: at least 1, and 'file' or 'segment', are needed")
        products = self.shares @ query  # (S,)
        if by == "segment":
            products /= self.shares.norm(dim=1)
        reduce = np.add if by == "file" else np.maximum
        scores = torch.from_numpy(reduce.reduceat(products.numpy(), self._ends[:-1]))  # (N,)
        least = scores.topk(min(k, len(scores))).values[-1]
        reached = (scores >= least).nonzero().flatten()  # more than k where the last are equal
        order = scores[reached].argsort(descending=True, stable=True)[:k]
        matches = []
        for i in reached[order].tolist():
            above = (scores < scores[i]).double().mean().item()
            shares = self.shares[self._ends[i] : self._ends[i + 1]]
            start = int((shares @ query / shares.norm(dim=1)).argmax()) * audio.SEGMENT_SECONDS
            seconds = self.files[self.names[i]].seconds
            end = min(start + audio.SEGMENT_SECONDS, seconds)
            path = self.root / self.names[i]
            matches.append(Match(path, scores[i].item(), above, start, end, seconds))
        return matches


def in_words(sentence: str) -> str:
    """The sentence as it is embedded; an InputError where no word is left of it."""
    if not any(c.isalnum() for c in sentence):
        raise InputError(f"{sentence.strip()!r}: no word is left to search for")
    return sentence.strip().encode(errors="replace").decode()


def _origin(model: DualEncoder, root: Path, folder: Path) -> list[str]:
    """What an index is of: sounds, and the model, by some thousand values of each weight tensor."""
    values = [value.flatten().cpu() for value in model.state_dict().values()]
    spread = torch.cat([value[:: max(1, len(value) // 1000)] for value in values])
    place = os.path.relpath(root.resolve(), folder.resolve())  # both may have moved together
    return ["index 2", hashlib.sha256(spread.numpy()).hexdigest(), place]


def _stamp(path: str | os.PathLike) -> list[int]:
    """What tells that a file has changed; where it may not be read there is none yet."""
    found = os.stat(path) if os.access(path, os.R_OK) else None
    return [found.st_size, found.st_mtime_ns] if found else []


def embed_file(model: DualEncoder, path: Path) -> tuple[Tensor, float, int, str]:
    """One file, however long: its shares (s, D); seconds, segments and fault as in File."""
    samples, faults, vectors = 0, [], [torch.zeros(0, model.config.embedding)]
    try:
        for block in decoding.stream_audio(path, faults):
            if samples and len(block) < audio.MIN_REMAINDER:
                break  # a remainder that does not count
            samples += len(block)
            block = decoding.to_int16(block / max(1.0, np.abs(block).max()))
            with torch.inference_mode():
                segments, _ = audio.to_segments([block])
                vectors.append(model.eval().project_segments(segments.to(model.device)).cpu())
    except InputError as error:
        vectors, faults = vectors[:1], [str(error).removeprefix(printable(f"{path}: "))]
    own = torch.cat(vectors)
    seconds = min(samples / decoding.SAMPLE_RATE, len(own) * audio.SEGMENT_SECONDS)
    return own / own.sum(dim=0).norm(), seconds, len(own), "; ".join(faults)


# --- The command ---

def parse_arguments():
    parser = Parser(__doc__)
    add, add_query = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add_query("sentence", nargs="?", help="what to search for (default: asks for it)")
    add_query("--like", type=Path, metavar="FILE", help="search for sounds like this one")
    add_query("--serve", action="store_true", help="open a local page to type into")
    add_query("--list-faults", action="store_true", help="what could not be read, or not whole")
    add("--audio", type=Path, metavar="FOLDER", required=True, help="the sounds to search")
    add("--index", type=Path, metavar="FOLDER", help=f"default: {INDEX_NAME} among the sounds")
    add("--checkpoint", type=Path, help="default: the newest best.pt of runs/")
    add("--tokenizer", help="a name or folder, instead of the checkpoint's own")
    add("--top", type=int, default=10, metavar="N", help="files shown (10)")
    add("--by", choices=("file", "segment"), default="file",
        help="score a file by the mean over its 10 s segments, or by its best one (file)")
    add("--json", action="store_true", help="a JSON object per query and line")
    add("--port", type=int, default=8765, help="of --serve (8765; 0 takes any that is free)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    try:
        args = parser.parse_args()
    except InputError as error:
        dashed = any(word[:1] == "-" != word[1:2] for word in sys.argv[1:])
        way = "; a sentence that begins with a dash goes after --" if dashed else ""
        raise InputError(f"{error}{way}") from error
    if args.sentence is not None:
        args.sentence = in_words(args.sentence)
    if args.like:
        next(decoding.stream_audio(args.like))  # is a sound, or said before the folder is embedded
    return args


def show(query: str, matches: list[Match], root: Path, as_json: bool) -> None:
    if as_json:
        found = [match._asdict() | {"path": str(match.path)} for match in matches]
        return print(json.dumps({"query": query, "matches": found}), flush=True)
    print(f"{'':4} {'score':>6}  {'above':>6}  {'where':>18}  file")
    for rank, match in enumerate(matches, start=1):
        name = printable(os.path.relpath(match.path, root))
        print(f"{rank:3}. {match.score:6.3f}  {match.above:6.1%}  {match.where():>18}  {name}")


def main() -> None:
    args = parse_arguments()
    server = page.search_server(args.port) if args.serve else None  # before all that takes long
    device = choose_device(args.device)
    model = DualEncoder.load(args.checkpoint or newest_checkpoint(), device, args.tokenizer)
    model.precision = choose_precision(args.precision, device)
    folder = args.index or args.audio / INDEX_NAME
    index = SoundIndex.build(model, args.audio, folder)
    print(f"{len(index.names):,} files; index in {folder}", file=sys.stderr)
    faults = {name: file.fault for name, file in index.files.items() if file.fault}
    if faults:
        said = f"{len(faults):,} could not be read, or not to their end; --list-faults lists them"
        print(said, file=sys.stderr)
    if args.list_faults:
        for name, fault in faults.items():
            print(printable(f"{name}: {fault}"))
    elif server:
        page.serve(server, index, args.top, args.by)
    elif given := args.like or args.sentence:
        find = index.search_like if args.like else index.search
        show(str(given), find(given, args.top, args.by), index.root, args.json)
    else:
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 are no word
        if sys.stdin.isatty():
            print("Type a sentence, then another; Ctrl-D ends it.", file=sys.stderr)
        for query in sys.stdin:
            try:
                matches = index.search(query, args.top, args.by)
                show(query.strip(), matches, index.root, args.json)
            except InputError as error:
                print(error, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
