"""Curves and the evaluation page: what they show against what was put in."""

import json
import re
import sys

import numpy as np
import pytest
import soundfile
import torch

from dualenc import InputError, figures, page
from dualenc.document import Players, clock, percent
from dualenc.evaluation import Annotations, evaluate
from dualenc.layouts import CLOTHO_TEST_CLIPS, Clip, Split


def write_run(folder, epochs=3, **settings):
    rows = [{"stage": "train", **settings}]
    for epoch in range(1, epochs + 1):
        rows.append({"step": 10 * epoch, "epoch": epoch, "lr": 1e-3 / epoch, "loss": 4 / epoch})
        rows.append({"step": 10 * epoch, "epoch": epoch, "loss": 4 / epoch,
                     "validation": {"mAP@10": 0.1 * epoch}})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- Curves ---


def test_a_log_is_read(tmp_path):
    run = write_run(tmp_path / "a", teachers=["x/best.pt"])
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # being written
    log = figures.read_log(run)
    assert log.settings["teachers"] == ["x/best.pt"]
    assert [row["loss"] for row in log.steps] == [4, 2, 4 / 3]
    assert [row["validation"]["mAP@10"] for row in log.epochs] == pytest.approx([0.1, 0.2, 0.3])


def path_points(svg, colour):
    """The numbers of every line drawn in a colour."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', svg)
    return [np.array(re.findall(r"[-\d.]+", path), float).reshape(-1, 2) for path in paths]


def test_the_metric_curve_goes_through_the_logs_values(tmp_path):
    log = figures.read_log(write_run(tmp_path / "a"))
    svg = figures.curves([log])["validation mAP@10, %"]
    line = next(points for points in path_points(svg, figures.COLOURS[0]) if len(points) == 3)
    # 10, 20, 30 % at steps 10, 20, 30: evenly spaced on the page, upwards.
    steps = np.diff(line, axis=0)
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-4)
    assert steps[0][0] > 0 > steps[0][1]


def test_curves_of_several_runs_in_one_picture(tmp_path, monkeypatch, capsys):
    runs = [str(write_run(tmp_path / name, epochs)) for name, epochs in [("a$b$", 3), ("c<d>", 5)]]
    for name, signature in [("c.svg", b"<?xml"), ("c.png", b"\x89PNG")]:
        out = tmp_path / name
        monkeypatch.setattr(sys, "argv", ["page", "curves", *runs, "--out", str(out)])
        assert page.main() == 0
        assert out.read_bytes().startswith(signature)
        first = out.read_bytes()
        assert page.main() == 0
        assert out.read_bytes() == first  # no date, no random ids
    text = (tmp_path / "c.svg").read_text()
    assert "a$b$" in text and "c&lt;d&gt;" in text
    assert all(colour in text for colour in figures.COLOURS[:2])
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "out", "message"),
    [
        (None, "c.svg", "no log of a run can be read here"),
        ("", "c.svg", "is empty"),
        ('{"stage": "train"}\nnonsense\n', "c.svg", "line 2 is not of a run's log"),
        ('{"stage": "train"}\n{"step": 3}\n', "c.svg", "line 2 is not of a run's log"),
        ("5\n", "c.svg", "line 1 is not of a run's log"),
        ("[]\n", "c.svg", "line 1 is not of a run's log"),
        ("[" * 100_000 + "\n", "c.svg", "line 1 is not of a run's log"),
        ('{"teachers": 5}\n', "c.svg", "line 1 is not of a run's log"),
        ('{"teachers": [5]}\n', "c.svg", "line 1 is not of a run's log"),
        ('{}\n{"step": 3, "loss": 1, "validation": 5}\n', "c.svg", "line 2 is not of a run's log"),
        ('{}\n{"step": 3, "loss": "1"}\n', "c.svg", "line 2 is not of a run's log"),
        ('{"stage": "train"}\n', "c.gif", "must end in .svg or .png"),
    ],
)
def test_a_run_without_a_log_is_one_line(tmp_path, content, out, message):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        figures.write_curves([tmp_path], tmp_path / out)
    assert not (tmp_path / out).exists()


def test_curves_of_a_run_before_its_first_epoch(tmp_path):
    figures.write_curves([write_run(tmp_path / "a", epochs=0)], tmp_path / "c.svg")


def test_the_runs_behind_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "teacher")
    teachers = ["teacher/best.pt", "gone/best.pt", "teacher/last.pt"]
    student = write_run(tmp_path / "student", teachers=teachers)
    found = page.runs_behind([student / "best.pt", tmp_path / "elsewhere.pt"])
    assert [folder.name for folder in found] == ["student", "teacher"]


# --- The evaluation page ---


N_CLIPS, PER_CLIP = 30, 2


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for i in range(N_CLIPS):
        path = folder / f"clip {i}.wav"
        soundfile.write(path, np.sin(np.arange(8000) * 0.01 * (i + 1)), 8000)
        clips.append(Clip(path.name, path, (f"sound {i}, once", f"sound {i}, again")))
    return Split("some/test", clips, [], "folder")


@pytest.fixture(scope="module")
def embeddings(split):
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    audio = unit(torch.randn(N_CLIPS, 8), dim=1)
    return audio, unit(audio[split.clip_of_caption] + torch.randn(60, 8), dim=1)


def cards(html):
    """Of each query shown its caption, rank, and [(place, file, mark)]."""
    found = []
    for card in re.findall(r'<details class="query">.*?</details>', html, re.DOTALL):
        caption, rank = re.search(r"<summary>(.*) <span.*>rank (\d+)<", card).groups()
        clips = re.findall(
            r'<li value="(\d+)"[^>]*><span class="file">(.*)</span> <span class="mark">(.*)</span>',
            card,
        )
        found.append((caption, int(rank), [(int(n), name, mark) for n, name, mark in clips]))
    return found


def test_the_page_shows_what_a_plain_sort_finds(split, embeddings, tmp_path):
    audio, text = embeddings
    annotations = Annotations([0, 7], [[0, 5, 6], [3, 9]])
    path = tmp_path / "page.html"
    evaluation = evaluate("a & b.pt", split, audio, text, annotations, seen=True)
    page.write_evaluation(path, evaluation)
    html = path.read_text()
    assert "<h1>a &amp; b.pt (seen) on some/test</h1>" in html
    for name, values in evaluation.results.items():
        for metric, value in values.items():
            low, high = evaluation.intervals[name][metric]
            cell = f"{100 * value:.2f}<small>{100 * low:.2f}..{100 * high:.2f}</small>"
            assert cell in html, (name, metric)
    assert "Table 1" not in html  # this is not the report's split
    scores = (text @ audio.T).numpy()
    captions, relevant = split.captions, dict(zip(*annotations, strict=True))
    shown = cards(html)
    assert len(shown) == 4 * 20
    for caption, rank, clips in shown:
        row = captions.index(caption)
        right = split.clip_of_caption[row]
        order = np.argsort(-scores[row], kind="stable").tolist()
        assert rank == order.index(right) + 1
        expected = list(enumerate(order[:10], start=1))
        expected += [(rank, right)] if rank > 10 else []
        marks = {clip: "✓ relevant, too" for clip in relevant.get(row, [])}
        marks |= {right: "✓ the right clip"}
        assert clips == [(n, split.clips[c].name, marks.get(c, "")) for n, c in expected]
    assert any(rank > 10 for _, rank, _ in shown)
    assert html.count('class="relevant"') == sum(bool(m) for _, _, c in shown for *_, m in c)


def test_on_the_reports_split_its_table_stands_beside(split, embeddings):
    whole = Split("clotho/evaluation", split.clips * 35, [], "flat")
    whole = Split(whole.name, whole.clips[:CLOTHO_TEST_CLIPS], [], "flat")
    audio, text = (side.repeat(35, 1) for side in embeddings)
    evaluation = evaluate("x", whole, audio[:CLOTHO_TEST_CLIPS], text[: 2 * CLOTHO_TEST_CLIPS])
    html = page._results(evaluation)
    low, high = evaluation.intervals["text to audio"]["R@5"]
    assert f"<td>{100 * low:.2f}..{100 * high:.2f}</td>" in html
    assert "report: Clotho + AudioCaps, distilled" in html and "<td>37.21</td>" in html


def test_the_groups_of_queries_by_hand(split, embeddings):
    queries = page.Queries(evaluate("x", split, *embeddings))
    queries.rank = np.arange(1, 61)[::-1].copy()  # the last caption is answered best
    groups = queries.groups()
    assert groups["Best"].tolist() == list(range(59, 39, -1))
    assert groups["Worst"].tolist() == list(range(20))
    assert groups["Median"].tolist() == list(range(39, 19, -1))
    assert len(set(groups["Random"].tolist())) == 20


def test_a_split_smaller_than_a_group(split, embeddings, tmp_path):
    audio, text = embeddings
    small = Split("tiny/test", split.clips[:2], ["gone.wav"], "folder")
    page.write_evaluation(tmp_path / "page.html", evaluate("x", small, audio[:2], text[:4]))
    assert "2 of 3 clips found: not comparable" in (tmp_path / "page.html").read_text()
    assert len(cards((tmp_path / "page.html").read_text())) == 4 * 4


def test_the_histogram_counts_every_query(embeddings):
    svg = figures.rank_histogram(np.array([1, 1, 3, 5, 11, 30]), 30)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for interval in ("1", "2 to 5", "6 to 10", "11 to 20", "21 to 30"):
        assert interval in labels
    counts = labels[labels.index("rank of the right clip") + 1 :]
    assert counts == ["2", "2", "0", "1", "1"]


def test_what_is_most_alike_is_grouped():
    kinds = np.array([0, 1, 2, 0, 1, 0])
    similarities = (kinds[:, None] == kinds) * 0.8 + 0.1
    assert figures.group(similarities, 3) == [[0, 3, 5], [1, 4], [2]]


def test_sounds_are_held_once_and_up_to_the_limit(tmp_path):
    paths = [tmp_path / "sub" / f"{i} #1%.wav" for i in range(3)]
    paths[0].parent.mkdir()
    for path in paths:
        soundfile.write(path, np.sin(np.arange(64_000) * 0.02), 32_000)
    sounds = Players(tmp_path / "page.html", room=22_000)  # two of some 9 kB each
    players = [sounds.player(path, "a & b", start) for path in paths for start in (0, 20)]
    assert len(sounds.embedded) == 2
    assert ['data-sound="0"' in p for p in players] == [True, True, False, False, False, False]
    assert 'src="sub/2%20%231%25.wav#t=20"' in players[-1]
    assert 'data-from="#t=20"' in players[1] and 'aria-label="a &amp; b"' in players[0]


def test_a_sound_that_is_gone_or_too_large_is_linked(tmp_path):
    noise = tmp_path / "noise.wav"  # takes more in mp3 than is estimated
    soundfile.write(noise, np.random.default_rng(0).uniform(-1, 1, 64_000), 32_000)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    sounds = Players(tmp_path / "page.html", room=12_000)
    for name in ("gone.wav", "bad.wav", "noise.wav"):
        assert f'src="{name}"' in sounds.player(tmp_path / name, name)
    assert sounds.embedded == [] and sounds.room == 12_000


def test_times_and_shares_by_hand():
    assert [clock(s) for s in (0, 0.9, 20, 61, 3740)] == ["0:00", "0:01", "0:20", "1:01", "1:02:20"]
    assert [percent(s) for s in (1, 0.9999, 0.5, 0)] == ["100.0 %", "99.9 %", "50.0 %", "0.0 %"]
