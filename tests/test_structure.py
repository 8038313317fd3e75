"""The house: which modules there are, which may import which, and how long things may be."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The core stands beside the report, from top to bottom; all may import errors and what is named.
CORE = {
    "train": "audio text model losses data metrics training page",
    "distill": "audio text model losses data metrics training train",
    "evaluate": "audio text model losses data metrics training search page miniature train distill",
    "__init__": "model", "errors": "", "audio": "", "text": "", "model": "audio text",
    "losses": "", "data": "audio text", "metrics": "", "training": "",
}
AROUND = {"search": "audio model page", "page": "audio metrics", "miniature": "audio"}
FILES = {p.stem: p for p in [*ROOT.glob("*.py"), *ROOT.glob("dualenc/**/*.py")]}
PLACES = "*.*", "dualenc/*.*", "tests/*.py", "benchmarks/*.*"
LINES = {p: p.read_text().count("\n") for g in PLACES for p in ROOT.glob(g) if p.is_file()}
NODES = {p: list(ast.walk(ast.parse(p.read_text()))) for p in LINES if p.suffix == ".py"}


def test_the_modules_and_what_they_import():
    assert FILES.keys() == CORE.keys() | AROUND.keys()
    for name, allowed in (CORE | AROUND).items():
        imports = [n for n in NODES[FILES[name]] if isinstance(n, ast.Import | ast.ImportFrom)]
        found = {f"{getattr(n, 'module', '') or ''}.{a.name}" for n in imports for a in n.names}
        ours = {f.strip(".").removeprefix("dualenc.").partition(".")[0] for f in found}
        assert ours & FILES.keys() <= {*allowed.split(), "errors"}, name


def test_the_ceilings_in_lines():
    def total(*places: str) -> int:
        return sum(LINES.get(path, 0) for place in places for path in ROOT.glob(place))

    functions = [(path, n) for path in NODES for n in NODES[path] if isinstance(n, ast.FunctionDef)]
    long = {f"{path.stem}.{n.name}" for path, n in functions if n.end_lineno - n.lineno >= 60}
    assert long <= {"train.train"} and max(LINES[path] for path in NODES) <= 450
    assert total("tests/*.py") <= 2_500 and total("benchmarks/*.*") <= 520
    assert total("README.md") <= 200 and total("*.py", "dualenc/*.*", "demo.sh") <= 3_500
    assert sum(LINES[FILES[name]] for name in CORE) <= 2_350
