"""Rows, labels, leads and spreads; what may be evaluated on; the files; bad input, line by line."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, write_csv, write_folder, write_wav

import distill
import evaluate
import train
from dualenc import data, errors, search
from dualenc.metrics import bootstrap, interval, query_metrics, ranks

CLOTHO = ["file_name", *(f"caption_{i}" for i in range(1, 6))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Path:
    """A test split of six clips with new annotations, a folder, and three checkpoints."""
    folder = tmp_path_factory.mktemp("place")
    rows = [[f"{i}.wav", *(f"clip {i} sounds {word}" for word in "abcde")] for i in range(6)]
    write_csv(folder / "clotho_captions_evaluation.csv", CLOTHO, rows)
    for i in range(6):
        write_wav(folder / "evaluation" / f"{i}.wav", noise(0.5, seed=i) * (i + 1) / 6)
    new = [[rows[0][1], "['0.wav', '3.wav']"], [rows[4][2], "['4.wav']"]]
    write_csv(folder / "metadata_eval.csv", ["query", "audio_filenames"], new)
    write_folder(folder / "mine", 4)
    for name, stage, seen in (("a", "contrastive", ["clotho/development"]),
                              ("b", "contrastive", ["clotho/development"]),
                              ("c", "distilled", ["audiocaps/val", "clotho/development"])):
        with torch.no_grad():
            for i, weights in enumerate(tiny_model.parameters()):
                weights.add_(torch.randn(weights.shape, generator=torch.manual_seed(i)) * 0.02)
        tiny_model.stage, tiny_model.trained_on = stage, seen
        torch.save(tiny_model.checkpoint(), folder / f"{name}.pt")
    return folder


def run(place, monkeypatch, *arguments) -> int:
    given = ["evaluate.py", "--data-dir", str(place), *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", given)
    return evaluate.main()


def test_rows_leads_and_spreads(place, monkeypatch, capsys, tmp_path):
    paths = [place / f"{name}.pt" for name in "abc"]
    run(place, monkeypatch, "--checkpoint", *paths, "--json", tmp_path / "x.json",
        "--ensemble", *paths[:2])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    rows = found["rows"]
    assert [row["label"] for row in rows] == [
        "Clotho, contrastive", "Clotho, contrastive", "Clotho + AudioCaps, distilled",
        "Clotho, contrastive, ensemble"]
    assert out.count("95 % interval (too short)") == 7 and "report:" not in out
    split = data.read_split("clotho", "test", place)
    data.decode_splits([split], place / "cache")
    embedded = []
    for path in paths[:2]:
        model = evaluate.DualEncoder.load(path)
        embedded.append((model.embed_audio(split.waveforms), model.embed_text(split.captions)))
    own = [[clip] for clip in split.clip_of_caption]
    values = [query_metrics(ranks(text, audio, own)) for audio, text in embedded]
    draws = [bootstrap(v, split.clip_of_caption)["R@5"] for v in values]
    assert rows[0]["results"]["captions"]["R@5"] == pytest.approx(values[0]["R@5"].mean().item())
    lead = rows[1]["lead"]
    assert lead["results"]["captions"]["R@5"] == pytest.approx(
        (values[1]["R@5"] - values[0]["R@5"]).mean().item())
    assert lead["intervals"]["captions"]["R@5"] == pytest.approx(interval(draws[1] - draws[0]))
    (group,) = found["groups"]
    two = [row["results"]["captions"]["mAP@10"] for row in rows[:2]]
    assert group["mean"]["captions"]["mAP@10"] == pytest.approx(np.mean(two))
    assert group["standard deviation"]["captions"]["mAP@10"] == pytest.approx(np.std(two, ddof=1))
    new = query_metrics(ranks(embedded[0][1][[0, 21]], embedded[0][0], [[0, 3], [4]]))
    got = rows[0]["results"]["new annotations"]["mAP@16"]
    assert got == pytest.approx(new["mAP@16"].mean().item())
    audio, text = evaluate.joined(embedded)
    cosines = sum(t @ a.T for a, t in embedded) / 2
    torch.testing.assert_close(text @ audio.T, cosines, rtol=0, atol=1e-6)


def test_a_submission_is_a_row_a_query_and_a_column_a_file(place, monkeypatch, tmp_path):
    queries = write_csv(tmp_path / "q.csv", ["caption"], [["rain"], ["a, dog"], ["rain"]])
    run(place, monkeypatch, "--checkpoint", place / "a.pt", "--submission", tmp_path / "out.csv",
        "--queries", queries, "--audio", place / "mine")
    header, *rows = csv.reader((tmp_path / "out.csv").open())
    assert header == ["index", *(f"{i}.wav" for i in range(4))]
    assert [row[0] for row in rows] == ["rain", "a, dog"]
    model = evaluate.DualEncoder.load(place / "a.pt")
    audio = model.embed_audio(place / "mine" / f"{i}.wav" for i in range(4))
    expected = (model.embed_text(["rain", "a, dog"]) @ audio.T).numpy()
    np.testing.assert_allclose(np.array([r[1:] for r in rows], float), expected, atol=1e-6)


def test_a_page_is_written(place, monkeypatch, tmp_path):
    run(place, monkeypatch, "--checkpoint", place / "a.pt", "--html", tmp_path / "page.html")
    assert "clip 3 sounds b" in (tmp_path / "page.html").read_text()


def test_what_was_seen_is_refused_or_marked(place, monkeypatch, capsys, tiny_model):
    split = data.read_split(str(place / "mine"), "train", place)
    tiny_model.trained_on = [split.name]
    torch.save(tiny_model.checkpoint(), place / "seen.pt")
    arguments = "--dataset", place / "mine", "--checkpoint", place / "seen.pt", "--split"
    for part in ("train", "all"):
        with pytest.raises(errors.InputError, match="was trained on mine@.*--allow-seen"):
            run(place, monkeypatch, *arguments, part)
    run(place, monkeypatch, *arguments, "val")
    run(place, monkeypatch, *arguments, "train", "--allow-seen")
    assert "(seen)" in capsys.readouterr().out


# --- Bad input: one line, exit status 2, before any long work ---

TINY = "--preset tiny --device cpu --cache-dir cache --datasets"
BAD = [
    (train, f"{TINY} clotho", "no clotho here: looked for"),
    (train, f"{TINY} nowhere", "nowhere: no data set"),
    (train, f"{TINY} place/mine --batch-size 99", "--batch-size 99: at most the 4 pairs"),
    (train, f"{TINY} place/mine --batch-size 2 --out place", "holds other files than a run's"),
    (train, f"{TINY} place/mine --batch-size 2 --device cuda:9", "--device cuda:9: cannot be used"),
    (train, f"{TINY} place/mine --init gone.pt", "gone.pt: no such checkpoint"),
    (train, f"{TINY} place/mine --init place/mine/0.wav", "is damaged or not this program's"),
    (train, f"{TINY} place/mine --frobnicate", "unrecognized arguments"),
    (distill, "--teachers gone.pt --datasets place/mine", "gone.pt: no such checkpoint"),
    (evaluate, "--data-dir place --checkpoint gone.pt", "gone.pt: no such checkpoint"),
    (evaluate, "--data-dir place", "train first, or give --checkpoint"),
    (evaluate, "--data-dir place --checkpoint place/a.pt --json no/x.json", "cannot be written"),
    (evaluate, "--data-dir place --checkpoint place/a.pt --annotations wrong.csv",
     "'gone.wav' is no clip of clotho/evaluation"),
    (evaluate, "--data-dir place --checkpoint place/a.pt --split all", "no clotho here"),
    (evaluate, "--submission a.csv --queries b.csv --audio place --html c --checkpoint place/a.pt",
     "go together, without --html"),
    (search, "dog --audio nowhere --checkpoint place/a.pt", "nowhere: no such folder"),
    (search, "dog --audio place/mine --checkpoint gone.pt", "gone.pt: no such checkpoint"),
    (data, "check nowhere", "nowhere: no such folder"),
]


@pytest.mark.parametrize(("script", "line", "says"), BAD)
def test_bad_input_is_one_line(script, line, says, place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "place").symlink_to(place)
    write_csv(tmp_path / "wrong.csv", ["query", "audio_filenames"], [["x", "['gone.wav']"]])
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
    with pytest.raises(SystemExit) as ended:
        errors.run_command(script.main)
    err = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and says in err and "Traceback" not in err
    assert len(err.splitlines()) == 1, err


def test_damaged_sounds_are_listed_before_training(place, monkeypatch, tmp_path, capsys):
    folder = write_folder(tmp_path / "mine", 6)
    for i in (1, 4):
        (folder / f"{i}.wav").write_bytes(b"no sound")
    monkeypatch.chdir(tmp_path)
    given = f"{TINY} {folder} --batch-size 2 --out {tmp_path / 'run'}".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    with pytest.raises(SystemExit):
        errors.run_command(train.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "cannot be used (2)" in lines[0] and "1.wav" in lines[1] and "4.wav" in lines[2]
