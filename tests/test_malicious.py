"""Nothing in a file is executed, and nothing that a file claims is believed unchecked."""

import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import evaluate
import train
from dualenc import InputError, model
from dualenc.cache import open_cache
from dualenc.checkpoints import read_tensors
from dualenc.layouts import read_split
from dualenc.model import DualEncoder

TINY = ["--preset", "tiny", "--batch-size", 16, "--workers", 0, "--epochs", 1]
TRACE = "it-ran"


class Trap:
    """Unpickled, it leaves a trace."""

    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


class Evaluating:
    def __reduce__(self):
        return eval, (f"open({TRACE!r}, 'w')",)


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(TRACE).exists()


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.save(tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def changed(path, **values):
    torch.save(torch.load(path, weights_only=True) | values, path)


def test_the_trap_works(tmp_path):
    Path("trap.pt").write_bytes(pickle.dumps(Trap()))
    pickle.loads(Path("trap.pt").read_bytes())
    Path(TRACE).unlink()


# --- Checkpoints ---


@pytest.mark.parametrize("trap", [Trap(), Evaluating()])
@pytest.mark.parametrize("place", ["whole", "beside", "config", "weights", "plain pickle"])
def test_checkpoints_that_would_run_something(checkpoint, trap, place):
    holding = torch.load(checkpoint, weights_only=True)
    if place == "weights":
        holding["model"] |= {"tau": trap}
    contents = {
        "whole": trap, "beside": holding | {"more": trap}, "config": holding | {"config": trap},
        "weights": holding, "plain pickle": trap,
    }[place]
    if place == "plain pickle":
        checkpoint.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, checkpoint)
    try:
        DualEncoder.load(checkpoint)
    except InputError:
        return
    assert place == "beside"  # what is beside a checkpoint's own values may be read as nothing


def test_a_state_that_would_run_something(command, tmp_path):
    command(train, *TINY, "--out", "run", "--max-steps", 1)
    last = Path("run/last.pt")
    state = torch.load(last, weights_only=True)
    for place in ("optimizer", "losses", "best"):
        torch.save(state | {"training": state["training"] | {place: Trap()}}, last)
        status, printed = command(train, *TINY, "--out", "run")
        assert status == 2 and "Traceback" not in printed and "last.pt" in printed


CLAIMS = {
    "audio_depth": 10**9, "text_depth": 10**9, "audio_width": 96 * 10**7, "text_width": 96 * 10**7,
    "vocabulary": 10**12, "text_hidden": 10**12, "text_positions": 10**12, "embedding": 10**12,
    "audio_heads": 0, "text_heads": 7, "patch": (1, 1), "patchout": (-1, 0), "tau": float("nan"),
    "preset": "huge", "text_dropout": "0.1", "unknown": 1,
}


@pytest.fixture
def little_memory():
    """What would take more than half a gigabyte fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", CLAIMS)
def test_sizes_that_the_weights_do_not_have(checkpoint, monkeypatch, little_memory, name):
    config = torch.load(checkpoint, weights_only=True)["config"]
    changed(checkpoint, config=config | {name: CLAIMS[name]})
    monkeypatch.setattr(model, "AudioTower", None)  # building one would fail otherwise
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        DualEncoder.load(checkpoint)


def test_views_that_claim_more_than_the_file_holds(checkpoint, little_memory):
    weights = torch.load(checkpoint, weights_only=True)["model"]
    weights["audio_projection.weight"] = torch.zeros(1, 1).expand(10**7, 10**7)
    changed(checkpoint, model=weights)
    with pytest.raises(InputError, match="claim more than the file holds"):
        DualEncoder.load(checkpoint)


class Allocating:
    """Unpickled, it takes as much memory as a number says."""

    def __init__(self, kind, size):
        self.kind, self.size = kind, size

    def __reduce__(self):
        return self.kind, (self.size,)


@pytest.mark.parametrize("kind", [bytearray, torch.FloatTensor])
def test_memory_that_a_number_asks_for(checkpoint, little_memory, kind):
    changed(checkpoint, more=Allocating(kind, 10**8))  # enough to be found, and there
    with pytest.raises(InputError, match="tiny.pt: is damaged .* nothing was loaded"):
        DualEncoder.load(checkpoint)


def test_names_that_a_checkpoint_gives_are_not_called(checkpoint):
    weights = torch.load(checkpoint, weights_only=True)["model"]
    del weights["tau"]
    changed(checkpoint, model=weights, called=5)
    with pytest.raises(InputError, match="lacks tau"):
        DualEncoder.load(checkpoint)


@pytest.mark.parametrize("value", [
    torch.tensor(float("nan")), torch.tensor(1), torch.tensor(1 + 2j), torch.zeros(2), "text",
    torch.sparse_coo_tensor([[0]], [1.0], (10**12,), check_invariants=True),
    torch.empty(10**9, device="meta"),
])
def test_weights_of_another_kind(checkpoint, little_memory, value):
    weights = torch.load(checkpoint, weights_only=True)["model"]
    changed(checkpoint, model=weights | {"tau": value})
    with pytest.raises(InputError, match="tiny.pt: "):
        DualEncoder.load(checkpoint)


def test_compressed_checkpoints_are_refused(checkpoint):
    with zipfile.ZipFile(checkpoint) as plain, zipfile.ZipFile("bomb.pt", "w", 8) as bomb:
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    with pytest.raises(InputError, match="bomb.pt: is damaged"):
        read_tensors("bomb.pt")


def test_moments_of_other_shapes(command):
    command(train, *TINY, "--out", "run", "--max-steps", 1)
    state = torch.load("run/last.pt", weights_only=True)
    moments = state["training"]["optimizer"]["state"][0]
    moments["exp_avg"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(state, "run/last.pt")
    status, printed = command(train, *TINY, "--out", "run")
    assert status == 2 and "run/last.pt: is not this run's state (exp_avg has shape" in printed


# --- Tokenizers ---


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 100_000, '{"model": 1}', "\0"])
def test_tokenizers_that_are_none(checkpoint, text):
    Path("tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="^--tokenizer tokenizer.json: is not a tokenizer"):
        DualEncoder.load(checkpoint, tokenizer="tokenizer.json")
    changed(checkpoint, tokenizer=text)
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        DualEncoder.load(checkpoint)


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint):
    tokenizer = json.loads(torch.load(checkpoint, weights_only=True)["tokenizer"])
    tokenizer["model"]["vocab"]["zebra"] = 10**6
    changed(checkpoint, tokenizer=json.dumps(tokenizer))
    with pytest.raises(InputError, match="its tokenizer has more than 1000 tokens"):
        DualEncoder.load(checkpoint)


def test_a_roberta_folder_with_code_of_its_own(command, tiny):
    folder = Path("roberta")
    tiny.text.roberta.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny.tokenizer.to_str())
    code = f"open({str(Path(TRACE).resolve())!r}, 'w')\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text()) if path.exists() else {}
        automatic = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        settings |= {"auto_map": automatic, "model_type": "evil", "tokenizer_class": "Evil"}
        path.write_text(json.dumps(settings))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save(Trap(), folder / "pytorch_model.bin")
    status, printed = command(train, *TINY, "--init", "random", "--text-model", folder)
    assert status == 2 and "Traceback" not in printed and "roberta" in printed


def test_published_weights_that_would_run_something(monkeypatch, tmp_path):
    from dualenc.audio import published_passt

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/passt-s-f128-p16-s16-ap.468.pt"
    path.parent.mkdir(parents=True)
    for contents in (Trap(), {"tau": Trap()}, [1, 2], {"weight": "text"}):
        torch.save(contents, path)
        with pytest.raises(InputError, match="passt-s-f128-p16-s16-ap.468.pt: is damaged or not"):
            published_passt()


# --- Caches ---


INDICES = {
    "no json": "x",
    "a deep list": "[" * 100_000,
    "a list": "[]",
    "no files": '{"format": 2}',
    "rows that are none": '{"format": 2, "files": [1, 2]}',
    "rows without lengths": lambda rows: [row[:3] for row in rows],
    "negative lengths": lambda rows: [[*row[:3], n] for row, n in zip(
        rows, [-5, sum(row[3] for row in rows) + 5] + [0] * (len(rows) - 2), strict=True)],
    "huge lengths": lambda rows: [[*row[:3], 10**15] for row in rows],
    "lengths that are none": lambda rows: [[*row[:3], float(row[3])] for row in rows],
    "names that are none": lambda rows: [[["a"], *row[1:]] for row in rows],
    "other names": lambda rows: [["../../../etc/passwd", *row[1:]] for row in rows],
}


@pytest.mark.parametrize("case", INDICES)
def test_a_cache_index_is_not_believed(miniature, tmp_path, case):
    split = read_split("clotho", "val", miniature)
    good = [np.array(waveform) for waveform in open_cache(split, tmp_path / "cache")]
    (path,) = (tmp_path / "cache").glob("*.json")
    index = INDICES[case]
    if not isinstance(index, str):
        index = json.dumps({"format": 2, "files": index(json.loads(path.read_text())["files"])})
    path.write_text(index)
    again = open_cache(split, tmp_path / "cache")
    assert all(np.array_equal(a, b) for a, b in zip(good, again, strict=True))


def test_a_huge_cache_index_is_not_read(miniature, tmp_path):
    split = read_split("clotho", "val", miniature)
    open_cache(split, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.json")
    os.truncate(path, 2**40)  # a file with a hole
    assert len(open_cache(split, tmp_path / "cache")) == 4
    assert path.stat().st_size < 10_000


def embeddings_of_another_kind(sizes):
    clips, captions = sizes
    yield Trap()
    yield {"audio": Trap(), "text": Trap()}
    yield {"audio": torch.zeros(clips, 8)}
    yield {"audio": torch.zeros(clips + 1, 8), "text": torch.zeros(captions, 8)}
    yield {"audio": torch.zeros(clips, 8), "text": torch.zeros(captions, 9)}
    yield {"audio": torch.zeros(clips, 8).double(), "text": torch.zeros(captions, 8)}
    yield {"audio": torch.full((clips, 8), torch.nan), "text": torch.zeros(captions, 8)}
    endless = torch.zeros(1, 1)
    yield {"audio": endless.expand(clips, 10**12), "text": endless.expand(captions, 10**12)}
    yield {"audio": "text", "text": 1}
    yield [1, 2]


def test_teachers_embeddings_are_not_believed(little_memory):
    for contents in embeddings_of_another_kind((5, 25)):
        torch.save(contents, "stored.pt")
        with pytest.raises(InputError, match="stored.pt: is damaged"):
            distill.read_embeddings(Path("stored.pt"), [5, 25])
    np.save("stored.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    shutil.move("stored.npy", "stored.pt")
    with pytest.raises(InputError, match="stored.pt: is damaged"):
        distill.read_embeddings(Path("stored.pt"), [5, 25])


# --- Annotations ---


@pytest.mark.parametrize("expression", [
    f"[open({TRACE!r}, 'w')]", f"__import__('os').system('touch {TRACE}')",
    f"[__import__('os').system('touch {TRACE}')]", f"[f\"{{open('{TRACE}', 'w')}}\"]",
    f"['a'] if open('{TRACE}', 'w') else []",
])
def test_annotations_are_never_evaluated(command, miniature, checkpoint, expression):
    caption = read_split("clotho", "test", miniature).captions[0]
    quoted = ",".join('"' + text.replace('"', '""') + '"' for text in (caption, expression))
    Path("new.csv").write_text(f"query,audio_filenames\n{quoted}\n")
    status, printed = command(
        evaluate, "--checkpoint", checkpoint, "--annotations", "new.csv"
    )
    assert status == 2 and "new.csv" in printed and "Traceback" not in printed
