"""A folder of sounds and a sentence -> the sounds that match, and where in them.

    python -m dualenc.search "a dog barks, then a car passes" --audio FOLDER
    python -m dualenc.search --like bark.wav --audio FOLDER      # a sound as the query
    python -m dualenc.search --audio FOLDER                      # asks for sentence after sentence
    python -m dualenc.search --serve --audio FOLDER              # a local page to type into

The folder is embedded once, into an index beside it; later only what is new or changed is. From
Python: SoundIndex in dualenc.index.
"""

import json
import os
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from dualenc import MAX_LISTED_FAULTS, InputError, run
from dualenc.audio import SAMPLE_RATE
from dualenc.document import Players, clock, match_list, percent, write_document
from dualenc.index import Match, SoundIndex
from dualenc.model import DualEncoder
from dualenc.options import Parser, add_device_options, add_tokenizer_option, check_writable, number
from dualenc.processes import Processes
from dualenc.runs import newest_best
from dualenc.serve import Server, serve
from dualenc.sounds import embed_file, sounds_below
from dualenc.stages import place

INDEX_NAME = ".dualenc-index"  # hidden: sounds_below passes over it


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("sentence", nargs="?", help="what to search for (default: asks for it)")
    parser.add_argument("--like", type=Path, metavar="FILE", help="search for sounds like this one")
    parser.add_argument("--audio", type=Path, metavar="FOLDER", help="the sounds to search")
    parser.add_argument(
        "--index", type=Path, metavar="FOLDER",
        help=f"where the index is kept (default: {INDEX_NAME} in the folder of sounds); without "
        "--audio it is searched as it is",
    )
    parser.add_argument("--checkpoint", type=Path, help="default: the newest run's best.pt")
    add_tokenizer_option(parser)
    parser.add_argument("--top", type=number(int, 1), default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--by", choices=("file", "segment"), default="file",
        help="score a file by the mean over its 10 s segments, or by its best one (default file)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="a JSON object per query and line")
    output.add_argument("--html", type=Path, metavar="FILE", help="a page with players, too")
    output.add_argument("--serve", action="store_true", help="open a local page to type into")
    output.add_argument(
        "--port", type=number(int, 0, 65_535), default=8765, metavar="N",
        help="of --serve (default 8765; 0 takes any that is free)",
    )
    add_device_options(parser)
    args = parser.parse_args()
    _check_arguments(args)
    if args.sentence:  # bytes that are not UTF-8 are no word
        args.sentence = args.sentence.encode(errors="replace").decode()
    return args


def _check_arguments(args) -> None:
    if not (args.audio or args.index):
        raise InputError("--audio FOLDER, the sounds to search, is missing")
    if args.sentence is not None and args.like:
        raise InputError("a sentence and --like are two queries; give one")
    if args.serve and (args.sentence or args.like or args.json or args.html):
        raise InputError("--serve takes no query and writes no --json or --html")
    if args.html and not (args.sentence or args.like):
        raise InputError("--html needs a sentence or --like")
    if args.like and not args.like.is_file():
        raise InputError(f"--like {args.like}: no such file")
    if args.sentence is not None and not args.sentence.strip():
        raise InputError("the sentence is empty")
    check_writable(args.html)


# --- The index ---


def open_index(model: DualEncoder, audio: Path | None, folder: Path | None) -> SoundIndex:
    """The index, brought up to date with the folder of sounds; says on stderr what was left out."""
    folder = folder or audio / INDEX_NAME
    if audio is None:
        return SoundIndex.load(folder, model)
    paths, others, faults = sounds_below(audio)
    old = SoundIndex(model, audio)
    if (folder / "index.json").exists():
        old = SoundIndex.load(folder, model)
        if old.root.resolve() != audio.resolve():
            raise InputError(f"{folder}: is the index of {old.root}; name another with --index")
    index = old.updated(paths, folder, f"embedding {audio}")
    if others:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common())
        print(f"passed over: {printable(counts)}", file=sys.stderr)
    faults += index.faults
    for line in faults[:MAX_LISTED_FAULTS]:
        print(f"left out: {printable(line)}", file=sys.stderr)
    if len(faults) > MAX_LISTED_FAULTS:
        print(f"left out: {len(faults) - MAX_LISTED_FAULTS:,} more", file=sys.stderr)
    if not len(index):
        raise InputError(f"{audio}: no sound file below it that can be read")
    hours = index.files["samples"].sum() / (3600 * SAMPLE_RATE)
    print(f"index: {len(index):,} files, {hours:.2f} h, in {folder}", file=sys.stderr)
    return index


# --- The answers ---


def sentences() -> Iterator[str]:
    """What is typed or piped in, line by line."""
    sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 are no word
    while True:
        if sys.stdin.isatty():
            print("sentence> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            return
        if line.strip():
            yield line


def print_matches(matches: list[Match], root: Path) -> None:
    print(f"{'':4} {'score':>6}  {'above':>7}  {'where':>18}  file")
    for rank, match in enumerate(matches, start=1):
        where = f"{clock(match.start)} to {clock(match.end)}"
        file = printable(os.path.relpath(match.path, root))
        print(f"{rank:3}. {match.score:6.3f}  {percent(match.above):>7}  {where:>18}  {file}")


def json_line(query: str, matches: list[Match]) -> str:
    found = [vars(match) | {"path": str(match.path)} for match in matches]
    return json.dumps({"query": query, "matches": found})


def printable(text: str) -> str:
    """Text from outside, such as a file's name, that cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_page(path: Path, query: str, matches: list[Match], root: Path) -> None:
    """The matches as a page with players that start at the matching segment."""
    players = Players(path)

    def player(match: Match, label: str) -> str:
        return players.player(match.path, label, match.start)

    title = f"Sounds for: {query}"
    body = f"<h1>{escape(title)}</h1>\n{match_list(matches, root, player)}"
    write_document(path, title, body, players)


def main() -> int:
    args = parse_arguments()
    checkpoint = args.checkpoint or newest_best()
    model = DualEncoder.load(checkpoint, tokenizer=args.tokenizer)
    model = place(model, args, Processes.start(args.device))
    # Before the folder is embedded, which may take hours, the rest is seen to be possible.
    server = Server(None, args.port) if args.serve else None
    like = embed_file(model, args.like) if args.like else None
    index = open_index(model, args.audio, args.index)
    if server:
        server.index = index
        return serve(server)
    given = args.like or args.sentence
    for query in [str(given)] if given else sentences():
        embedded = model.embed_text([query]) if like is None else like
        (matches,) = index.nearest(embedded, args.top, args.by)
        if args.json:
            print(json_line(query, matches), flush=True)
        else:
            print_matches(matches, index.root)
        if args.html:
            write_page(args.html, query, matches, index.root)
    return 0


if __name__ == "__main__":
    run(main)
