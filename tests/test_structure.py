"""The house: which modules there are, and which may import which."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each module, and the modules of this project that it may import; all may import errors.
MODULES = {
    # the report, from top to bottom
    "dualenc/audio.py": {"decoding"},
    "dualenc/text.py": set(),
    "dualenc/model.py": {"audio", "text", "decoding", "checkpoints"},
    "dualenc/losses.py": set(),
    "dualenc/data.py": {"audio", "text", "decoding"},
    "dualenc/metrics.py": set(),
    # around it
    "dualenc/__init__.py": {"model"},
    "dualenc/decoding.py": set(),
    "dualenc/checkpoints.py": set(),
    "dualenc/training.py": {"checkpoints"},
    "dualenc/errors.py": set(),
    # beside it
    "dualenc/search.py": {"model", "audio", "decoding", "checkpoints", "page", "data"},
    "dualenc/page.py": {"decoding", "metrics"},
    "dualenc/miniature.py": {"decoding"},
}
SCRIPTS = ["train.py", "distill.py", "evaluate.py"]
REPORT_AND_AROUND = {
    "audio", "text", "model", "losses", "data", "metrics", "decoding", "checkpoints", "training",
    "errors",
}


def imported_modules(path: Path) -> set[str]:
    """Return the names of this project's modules and scripts that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    ours = {Path(module).stem for module in MODULES} | {Path(script).stem for script in SCRIPTS}
    stems = {name.removeprefix("dualenc.") for name in names}
    return stems & ours


def test_the_modules_are_those_of_the_house():
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dualenc").rglob("*.py")}
    assert modules == MODULES.keys()
    scripts = [path.name for path in ROOT.glob("*.py")]
    assert sorted(scripts) == sorted(SCRIPTS)


def test_modules_import_only_what_they_may():
    for module, allowed in MODULES.items():
        imported = imported_modules(ROOT / module)
        assert imported <= allowed | {"errors"}, module


def test_scripts_import_the_report_and_little_beside_it():
    assert imported_modules(ROOT / "train.py") <= REPORT_AND_AROUND | {"page"}
    assert imported_modules(ROOT / "distill.py") <= REPORT_AND_AROUND | {"train"}
    assert imported_modules(ROOT / "evaluate.py") <= REPORT_AND_AROUND | {"page"}
