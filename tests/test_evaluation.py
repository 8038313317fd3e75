"""Evaluation: what the table says, what is refused, and the challenge's files."""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import evaluate as script
from dualenc import InputError
from dualenc.evaluation import (
    NEW_ANNOTATIONS,
    TEXT_TO_AUDIO,
    difference,
    evaluate,
    joined,
    read_annotations,
    spread,
)
from dualenc.layouts import Clip, Split, read_split
from dualenc.metrics import METRICS, bootstrap, interval, retrieval_metrics
from dualenc.submission import write_submission
from dualenc.tables import REPORT_TABLE, is_reports_split, of_one, report_table

# As real file names are: commas, quotes, a space before the extension, HTML entities.
ODD_NAMES = ['a, b.wav', 'the "big" one.wav', "rain .wav", "it&#39;s on.wav", "Bäche.wav", "-1.wav"]


def embeddings(seed, n, width=8):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, width, generator=generator), dim=1)


def make_split(clips=6, captions=5, name="clotho/evaluation", missing=0):
    names = [*ODD_NAMES, *(f"{i}.wav" for i in range(6, clips))][:clips]
    found = [
        Clip(file_name, None, tuple(f"{i} {c}" for c in range(captions)))
        for i, file_name in enumerate(names)
    ]
    return Split(name, found, [f"gone {i}.wav" for i in range(missing)], "flat")


# --- Figures ---


def test_rows_are_the_metrics_of_both_directions():
    split, audio, text = make_split(), embeddings(0, 6), embeddings(1, 30)
    found = evaluate("x", split, audio, text)
    own = [[i // 5] for i in range(30)]
    assert found.results["text to audio"] == retrieval_metrics(text, audio, own)
    captions = [list(range(5 * i, 5 * i + 5)) for i in range(6)]
    assert found.results["audio to text"] == retrieval_metrics(audio, text, captions)
    draws = bootstrap(found.rows[TEXT_TO_AUDIO].values, [i // 5 for i in range(30)])
    assert found.intervals["text to audio"]["R@5"] == interval(draws["R@5"])


def test_a_model_does_not_differ_from_itself_and_leads_a_worse_one_surely():
    split, audio = make_split(40), embeddings(0, 40)
    good = audio.repeat_interleave(5, dim=0)
    bad = normalize(good + 3 * embeddings(1, 200), dim=1)
    first, second = evaluate("bad", split, audio, bad), evaluate("good", split, audio, good)
    itself = difference(first, first)[TEXT_TO_AUDIO]["mAP@10"]
    assert itself == (0.0, (0.0, 0.0), 0.0)
    lead = difference(first, second)[TEXT_TO_AUDIO]["mAP@10"]
    assert lead.mean == pytest.approx(1 - first.results[TEXT_TO_AUDIO]["mAP@10"])
    assert 0 < lead.interval[0] < lead.mean < lead.interval[1] < 1
    assert lead.above_zero == 1.0


def test_an_ensemble_ranks_by_the_mean_of_similarities():
    members = [(embeddings(w, 6, w), embeddings(-w, 30, w)) for w in (8, 5, 9)]
    audio, text = joined(members)
    mean = torch.stack([t @ a.T for a, t in members]).mean(0)
    torch.testing.assert_close(text @ audio.T, mean)
    torch.testing.assert_close(audio.norm(dim=1), torch.ones(6))


def test_spread_over_runs_by_hand():
    split = make_split(3, 1)
    eye = torch.eye(3)
    turned = eye[[1, 2, 0]]  # no caption finds its clip first
    runs = [evaluate("a", split, eye, eye), evaluate("b", split, eye, turned)]
    means, deviations = spread(runs)
    assert means[TEXT_TO_AUDIO]["R@1"] == 0.5
    assert deviations[TEXT_TO_AUDIO]["R@1"] == pytest.approx(math.sqrt(0.5))  # n - 1


def test_the_reports_rows_stand_beside_its_own_split_only():
    assert is_reports_split(make_split(1045))
    assert not is_reports_split(make_split(1043, missing=2))
    assert not is_reports_split(make_split(100))
    assert not is_reports_split(make_split(1045, name="audiocaps/test"))
    text = report_table([evaluate("mine.pt", make_split(), embeddings(0, 6), embeddings(1, 30))])
    for name, (_, *figures) in REPORT_TABLE.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"report: {name}")]
        assert [float(cell) for cell in line.split() if cell.replace(".", "").isdigit()] == figures


# --- New annotations ---


def write_rows(path, *rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_annotations_keep_odd_names_and_skip_what_is_not_on_disk(tmp_path):
    split = make_split(missing=1)
    path = write_rows(
        tmp_path / "new.csv",
        ["query", "audio_filenames"],
        ["3 4", repr([*ODD_NAMES, "gone 0.wav"])],
        ["a caption of the missing clip", repr(["gone 0.wav"])],
        ["0 0", repr(["gone 0.wav"])],
    )
    found = read_annotations(path, split)
    assert (found.queries, found.relevant) == ([3 * 5 + 4], [[0, 1, 2, 3, 4, 5]])
    row = evaluate("x", split, embeddings(0, 6), embeddings(1, 30), found).rows[NEW_ANNOTATIONS]
    assert row.ranks[0].tolist() == [1, 2, 3, 4, 5, 6] and row.clip_of_query == [3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0  0", "['-1.wav']"], "query '0  0' is no caption"),
        (["0 0", "['1.wav']"], "'1.wav' is no clip"),
        (["0 0", "__import__('os').getcwd()"], "is not a list"),
        (["0 0", "[]"], "is not a list"),
    ],
)
def test_annotations_that_do_not_fit_are_named(row, message, tmp_path):
    path = write_rows(tmp_path / "new.csv", ["query", "audio_filenames"], row)
    with pytest.raises(InputError, match=message):
        read_annotations(path, make_split())


# --- The challenge's files ---


def test_submission_keeps_names_and_queries_byte_for_byte(tmp_path):
    queries = ['says "hello", twice', " padded ", "it&#39;s", "says \"hello\", twice"]
    names = [*ODD_NAMES, b"caf\xe9.wav".decode(errors="surrogateescape")]
    audio, text = embeddings(0, 7), embeddings(1, 4)
    said = write_submission(tmp_path / "out.csv", queries, names, audio, text)
    assert "3 queries, 7 clips" in said and "1 repeated" in said
    assert b"caf\xe9.wav" in (tmp_path / "out.csv").read_bytes()
    with open(tmp_path / "out.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", *names]
    assert [row[0] for row in rows] == queries[:3]
    written = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    assert torch.equal(written, text[:3] @ audio.T)  # nothing is lost in the digits


def test_submission_of_earlier_years_ranks_the_earlier_of_equals_first(tmp_path):
    audio = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    write_submission(tmp_path / "o.csv", ["q"], list("abcd"), audio, torch.tensor([[1.0, 0.0]]), 3)
    assert (tmp_path / "o.csv").read_text() == "caption,fname_1,fname_2,fname_3\nq,b,d,c\n"


def test_submission_refuses_what_nobody_can_rank(tmp_path):
    path, one = tmp_path / "o.csv", torch.ones(1, 1)
    with pytest.raises(InputError, match="not finite"):
        write_submission(path, ["q"], ["a"], one * math.nan, one)
    with pytest.raises(InputError, match="share a name"):
        write_submission(path, ["q"], ["a", "a"], torch.ones(2, 1), one)
    assert not path.exists()


# --- The script ---


@pytest.fixture
def run_script(miniature, tmp_path, monkeypatch, capsys):
    def run(*options):
        base = ["evaluate.py", "--data-dir", str(miniature), "--cache-dir", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", [*base, "--precision", "fp32", *map(str, options)])
        assert script.main() == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.trained_on = ["clotho/development", "audiocaps/test"]
    tiny.save(tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_script_prints_and_writes_the_same_numbers(
    run_script, checkpoint, tiny, miniature, tmp_path
):
    out = run_script("--checkpoint", checkpoint, "--json", tmp_path / "r.json")
    numbers = json.loads((tmp_path / "r.json").read_text())
    split = read_split("clotho", "test", miniature)
    audio = tiny.embed_audio([clip.path for clip in split.clips])
    text = tiny.embed_text(split.captions)
    alone = retrieval_metrics(text, audio, [[c] for c in split.clip_of_caption])
    assert numbers["results"]["text to audio"] == pytest.approx(alone, abs=1e-9)
    assert set(numbers["results"]) == {"text to audio", "audio to text", NEW_ANNOTATIONS}
    for row in numbers["results"]:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{row}  ")]
        shown = [float(cell) for cell in line.split()[-5:]]
        assert shown == [round(100 * numbers["results"][row][m], 2) for m in METRICS]
    assert numbers["queries"]["audio to text"] == len(split.clips)
    assert f"95 % interval, {len(split.captions)} queries" in out
    assert "report:" not in out  # 6 clips are not Clotho's test split


def test_script_refuses_seen_splits_unless_it_may_mark_them(run_script, checkpoint):
    seen = "--dataset", "audiocaps", "--checkpoint", checkpoint
    with pytest.raises(InputError, match="flatter.* was trained on audiocaps/test"):
        run_script(*seen)
    assert "text to audio (seen)" in run_script(*seen, "--allow-seen")
    assert "(seen)" not in run_script("--dataset", "audiocaps", "--split", "val", *seen[2:])


def test_script_compares_averages_and_joins(run_script, checkpoint, tiny, tmp_path):
    with torch.no_grad():
        tiny.text_projection.weight.mul_(torch.linspace(0.5, 2, 1024)[:, None])
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        tiny.save(tmp_path / name / "best.pt")
    out = run_script("--compare", checkpoint, tmp_path / "b/best.pt")
    assert all(label in out for label in ("a.pt", "b/best.pt", "second - first", "above zero in"))
    out = run_script("--seeds", checkpoint, str(tmp_path / "[bc]"), "--json", tmp_path / "s.json")
    assert out.count("95 % interval") == 3 * 3  # of each run, each row
    assert "mean of 3 runs" in out and "standard deviation" in out
    assert len(json.loads((tmp_path / "s.json").read_text())["models"]) == 3
    both = run_script("--ensemble", checkpoint, shutil.copy(checkpoint, tmp_path / "copy.pt"))
    # The same twice is an ensemble that changes nothing.
    assert both.splitlines()[3:] == run_script("--checkpoint", checkpoint).splitlines()[3:]
    with pytest.raises(InputError, match="no such run"):
        run_script("--seeds", tmp_path / "nothing*")


def test_script_says_what_is_not_on_disk(run_script, checkpoint, miniature, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(miniature, copy)
    next((copy / "CLOTHO_v2.1/clotho_audio_files/evaluation").iterdir()).unlink()
    out = run_script("--data-dir", copy, "--checkpoint", checkpoint)
    assert "5 of 6 clips found: not comparable with the report" in out


def test_script_writes_submissions(run_script, checkpoint, miniature, tmp_path):
    folder = miniature / "CLOTHO_v2.1/clotho_audio_files/validation"
    queries = write_rows(tmp_path / "q.csv", ["id", "caption"], ["1", "a bell"], ["2", "rain, far"])
    run_script(
        "--checkpoint", checkpoint, "--submission", tmp_path / "out.csv", "--queries", queries,
        "--audio", folder,
    )
    with open(tmp_path / "out.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", *sorted(path.name for path in folder.iterdir())]
    assert [row[0] for row in rows] == ["a bell", "rain, far"]
    assert all(np.isfinite(float(cell)) for row in rows for cell in row[1:])
    out = run_script("--checkpoint", checkpoint, "--submission", tmp_path / "own.csv", "--top", 3)
    assert "30 queries, 6 clips" in out and "text to audio" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--submission", "x.csv", "--audio", "."], "--audio needs --queries"),
        (["--submission", "x.csv", "--top", "7"], "there are only 6 clips"),
        (["--submission", "x.csv", "--compare", "a.pt", "b.pt"], "takes one --checkpoint"),
        (["--submission", "x", "--queries", "q", "--json", "r"], "--json and --annotations are"),
        (["--submission", "x", "--queries", "q", "--annotations", "a"], "--queries have none"),
        (["--top", "3"], "go with --submission"),
        (["--compare", "a.pt", "b.pt", "--ensemble", "c.pt"], "not allowed with"),
        (["--ensemble", "a.pt", "./a.pt"], "--ensemble: the same file is named twice"),
    ],
)
def test_script_refuses_options_that_contradict_each_other(
    options, message, run_script, checkpoint
):
    chosen = {"--compare", "--ensemble"} & {*options}
    with pytest.raises(InputError, match=message):
        run_script(*([] if chosen else ["--checkpoint", checkpoint]), *options)


def test_a_log_that_is_none_is_told_before_anything_is_embedded(
    run_script, checkpoint, tmp_path, monkeypatch
):
    (tmp_path / "log.jsonl").write_text('{"teachers": 5}\n')
    monkeypatch.setattr(script, "embed", None)
    with pytest.raises(InputError, match="log.jsonl: line 1 is not of a run's log"):
        run_script("--checkpoint", checkpoint, "--html", tmp_path / "page.html")


def test_figures_in_the_table_are_percent_with_their_interval():
    text, _ = of_one(evaluate("x", make_split(3, 1), torch.eye(3), torch.eye(3)))
    assert text.splitlines()[1].split() == ["text", "to", "audio", *["100.00"] * 5]
    assert text.splitlines()[2].split()[-1] == "100.00..100.00"
