"""evaluate.py: Table 1 against a second route, the files, what may be evaluated on, bad input."""

import contextlib
import datetime
import functools
import html
import io
import itertools
import json
import os
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_annotations, write_csv, write_folder, write_wav
from torch.nn.functional import normalize

import distill
import evaluate
import train
from dualenc import DualEncoder, data, errors, search

# --- A small Clotho test split, and models whose embeddings are known ---

CLIPS = range(1, 21)  # "1.wav" to "20.wav"; "0.wav" is in the csv, first, but not on disk
CAPTIONS_PER_CLIP = 5
CAPTIONS_OF_CLIP_4 = 2
ANNOTATIONS = {  # query: numbers of its relevant clips
    "clip 2 sounds b": [2, 9],
    "clip 2 sounds d": [2, 7, 11],
    "clip 4 sounds a": [4],
    "clip 9 sounds c": [2, 5, 9, 13],
    "clip 12 sounds e": [3, 12],
    "clip 17 sounds a": [17, 18, 19],
    "clip 20 sounds b": [1, 20],
}
MODELS = {  # name: (temperature, embedding width, stage, what it was trained on)
    "a": (0.01, 8, "contrastive", ["clotho/development"]),
    "b": (0.02, 8, "contrastive", ["clotho/development"]),
    "c": (0.03, 12, "distilled", ["audiocaps/val", "clotho/development"]),
    "d": (0.04, 8, "contrastive", ["clotho/development"]),
    "seen": (0.05, 8, "contrastive", ["clotho/evaluation"]),
}
COLUMNS = {  # column of the table: (source of relevance and metric in the JSON)
    "new mAP@16": ("new annotations", "mAP@16"),
    "new mAP@10": ("new annotations", "mAP@10"),
    "mAP@10": ("captions", "mAP@10"),
    "R@1": ("captions", "R@1"),
    "R@5": ("captions", "R@5"),
    "R@10": ("captions", "R@10"),
}


def captions_of(clip: int) -> list[str]:
    count = CAPTIONS_OF_CLIP_4 if clip == 4 else CAPTIONS_PER_CLIP
    return [f"clip {clip} sounds {word}" for word in "abcde"[:count]]


@functools.cache
def unit_vector(model: str, content: str) -> torch.Tensor:
    """Draw a direction that depends on the model and on what is embedded, and on nothing else."""
    width = MODELS[model][1]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{model}: {content}".encode()))
    return normalize(torch.randn(width, generator=generator), dim=0)


def embedding_of_clip(model: str, clip: int) -> torch.Tensor:
    return unit_vector(model, f"the sound of clip {clip}")


@functools.cache
def embedding_of_caption(model: str, caption: str) -> torch.Tensor:
    """Return a direction of each caption's own, nearer to its clip than chance would be."""
    clip = int(caption.split()[1])
    return normalize(embedding_of_clip(model, clip) + unit_vector(model, caption), dim=0)


def model_name(model: DualEncoder) -> str:
    (name,) = [name for name in MODELS if abs(MODELS[name][0] - model.tau.item()) < 1e-6]
    return name


def known_embed_audio(model: DualEncoder, sounds) -> torch.Tensor:
    """Stand in for embed_audio; a clip's number is the height of its waveform."""
    clips = [round(100 * float(sound[0]) / 32_767) for sound in sounds]
    return torch.stack([embedding_of_clip(model_name(model), clip) for clip in clips])


def known_embed_text(model: DualEncoder, captions) -> torch.Tensor:
    return torch.stack([embedding_of_caption(model_name(model), caption) for caption in captions])


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_model) -> Path:
    """Write a folder: Clotho's test split, new annotations, somebody's own sounds, checkpoints."""
    folder = tmp_path_factory.mktemp("here")
    rows = []
    for clip in [0, *CLIPS]:
        captions = captions_of(clip)
        blanks = CAPTIONS_PER_CLIP - len(captions)
        rows.append([f"{clip}.wav", *captions, *itertools.repeat("", blanks)])
    header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    write_csv(folder / "clotho_captions_evaluation.csv", header, rows)
    for clip in CLIPS:
        write_wav(folder / "evaluation" / f"{clip}.wav", np.full(1600, clip / 100))
    write_numbered_annotations(folder / "metadata_eval.csv", ANNOTATIONS)
    write_folder(folder / "mine", 4)
    for name, (temperature, _, stage, trained_on) in MODELS.items():
        write_checkpoint(folder / f"{name}.pt", tiny_model, stage, trained_on, temperature)
    # As the published checkpoints, it holds no tokenizer.
    torch.save(tiny_model.checkpoint() | {"tokenizer": None}, folder / "bare.pt")
    return folder


def write_numbered_annotations(path: Path, annotations: dict[str, list[int]]) -> Path:
    """Write annotations {query: numbers of its relevant clips}."""
    rows = []
    for query, clips in annotations.items():
        rows.append([query, str([f"{clip}.wav" for clip in clips])])
    return write_annotations(path, rows)


def write_checkpoint(
    path: Path, model: DualEncoder, stage: str, trained_on: list[str], temperature: float = 0.01
) -> Path:
    values = model.checkpoint()
    values["model"] = values["model"] | {"tau": torch.tensor(temperature)}
    torch.save(values | {"stage": stage, "trained_on": trained_on}, path)
    return path


def use_known_embeddings(monkeypatch) -> None:
    monkeypatch.setattr(DualEncoder, "embed_audio", known_embed_audio)
    monkeypatch.setattr(DualEncoder, "embed_text", known_embed_text)


@pytest.fixture
def known_embeddings(monkeypatch) -> None:
    use_known_embeddings(monkeypatch)


def run_evaluate(here: Path, monkeypatch, *options) -> None:
    """Run evaluate.py in the folder `here`, in which it finds the data."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data-dir", ".", *map(str, options)])
    evaluate.main()


def print_of_evaluate(here: Path, *options, **constants) -> str:
    """Run evaluate.py with known embeddings and other constants, and return what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        use_known_embeddings(patch)
        for name, value in constants.items():
            patch.setattr(evaluate, name, value)
        run_evaluate(here, patch, *options)
    return printed.getvalue()


def rows_of_printed_table(printed: str) -> list[tuple[str, dict[str, str]]]:
    """Read (label, {column: cell}) of each line of the table; labels keep their indentation."""
    lines = printed.split("\n\n")[1].splitlines()
    header = re.split(r"\s{2,}", lines[0].strip())
    rows = []
    for line in lines[1:]:
        indentation = line[: len(line) - len(line.lstrip())]
        label, *cells = re.split(r"\s{2,}", line.strip())
        if cells:
            rows.append((indentation + label, dict(zip(header, cells, strict=True))))
        else:
            rows.append((indentation + label, {}))
    return rows


@pytest.fixture(scope="module")
def table(here) -> SimpleNamespace:
    """Evaluate four models and an ensemble of two of them; return what is printed and written."""
    checkpoints = [f"{name}.pt" for name in "abcd"]
    options = ["--checkpoint", *checkpoints, "--ensemble", "a.pt", "c.pt", "--device", "cpu"]
    lines = rows_of_printed_table(print_of_evaluate(here, *options, "--json", "table.json"))
    written = json.loads((here / "table.json").read_text())
    (mean_line,) = [i for i, (label, _) in enumerate(lines) if ": mean of" in label]
    return SimpleNamespace(
        lines_of_rows=lines[:mean_line],
        lines_of_groups=lines[mean_line:],
        about=written["about"],
        rows=written["rows"],
        groups=written["groups"],
    )


# --- The second route: sort, definition, and clips drawn one after the other ---

ROWS = [["a"], ["b"], ["c"], ["d"], ["a", "c"]]  # the models of each row; several: an ensemble
METRICS = ("mAP@10", "mAP@16", "R@1", "R@5", "R@10")


@functools.cache
def similarity(model: str, caption: str, clip: int) -> float:
    query = embedding_of_caption(model, caption)
    return float(query.double() @ embedding_of_clip(model, clip).double())


def mean_similarity(models: list[str], caption: str, clip: int) -> float:
    return sum(similarity(model, caption, clip) for model in models) / len(models)


def query_metrics_by_definition(models: list[str], caption: str, relevant: list[int]) -> list:
    """Compute the metrics of one query, in the order of METRICS."""
    ranking = sorted(CLIPS, key=lambda clip: -mean_similarity(models, caption, clip))
    hits = [clip in relevant for clip in ranking]
    values = []
    for k in (10, 16):
        precisions = []
        for rank in range(1, k + 1):
            if hits[rank - 1]:
                precisions.append(sum(hits[:rank]) / rank)
        values.append(sum(precisions) / len(relevant))
    for k in (1, 5, 10):
        values.append(float(any(hits[:k])))
    return values


def estimates_by_definition(models: list[str], source: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute the metrics' means over all queries (5,), and in 1000 resamples of clips (1000, 5).

    The clips of each resample are drawn with replacement, each with all of its queries.
    """
    if source == "captions":
        queries = {}
        for clip in CLIPS:
            queries |= dict.fromkeys(captions_of(clip), [clip])
    else:
        queries = ANNOTATIONS
    values_of_clip: dict[int, list] = {}
    for caption, relevant in queries.items():
        clip = int(caption.split()[1])
        values = query_metrics_by_definition(models, caption, relevant)
        values_of_clip.setdefault(clip, []).append(values)
    clips = sorted(values_of_clip)
    all_values = np.concatenate([values_of_clip[clip] for clip in clips])
    resamples = []
    for drawn in np.random.default_rng(0).integers(len(clips), size=(1000, len(clips))):
        drawn_values = np.concatenate([values_of_clip[clips[i]] for i in drawn])
        resamples.append(drawn_values.mean(axis=0))
    return all_values.mean(axis=0), np.array(resamples)


@pytest.fixture(scope="module", params=["captions", "new annotations"])
def source(request) -> str:
    """Name a source of relevance: the captions themselves, or the new annotations."""
    return request.param


@pytest.fixture(scope="module")
def expected(source) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute the estimates of each row by definition."""
    return [estimates_by_definition(models, source) for models in ROWS]


def in_order(metrics: dict) -> list:
    return [metrics[name] for name in METRICS]


def middle_95_percent(resamples: np.ndarray) -> np.ndarray:
    """Return the bounds of the middle 95 % of resamples: (1000, 5) -> (5, 2)."""
    return np.quantile(resamples, [0.025, 0.975], axis=0).T


# --- The figures ---


def test_results_are_the_means_over_all_queries(table, source, expected):
    for row, (means, _) in zip(table.rows, expected, strict=True):
        assert in_order(row["results"][source]) == pytest.approx(means, abs=1e-9), row["name"]


def test_intervals_hold_the_middle_of_resamples_of_the_clips(table, source, expected):
    for row, (_, resamples) in zip(table.rows, expected, strict=True):
        intervals = np.array(in_order(row["intervals"][source]))
        np.testing.assert_allclose(intervals, middle_95_percent(resamples), rtol=0, atol=1e-9)


def test_a_lead_is_the_row_minus_the_first(table, source, expected):
    first = expected[0][0]
    for row, (means, _) in zip(table.rows, expected, strict=True):
        lead = in_order(row["lead"]["results"][source])
        assert lead == pytest.approx(means - first, abs=1e-9), row["name"]


def test_a_leads_interval_compares_both_models_on_the_same_clips(table, source, expected):
    first = expected[0][1]
    for row, (_, resamples) in zip(table.rows, expected, strict=True):
        intervals = np.array(in_order(row["lead"]["intervals"][source]))
        paired = middle_95_percent(resamples - first)
        np.testing.assert_allclose(intervals, paired, rtol=0, atol=1e-9)


def test_rows_of_one_label_get_a_mean_and_a_sample_standard_deviation(table, source, expected):
    (group,) = table.groups
    assert group["label"] == "Clotho, contrastive"
    assert group["rows"] == 3
    means = np.array([expected[row][0] for row in (0, 1, 3)])
    assert in_order(group["mean"][source]) == pytest.approx(means.mean(axis=0))
    deviations = in_order(group["standard deviation"][source])
    assert deviations == pytest.approx(means.std(axis=0, ddof=1))


def test_rows_are_named_by_their_files(table):
    assert [row["name"] for row in table.rows] == ["a.pt", "b.pt", "c.pt", "d.pt", "a.pt + c.pt"]


def test_rows_are_labelled_in_the_reports_words(table):
    assert [row["label"] for row in table.rows] == [
        "Clotho, contrastive",
        "Clotho, contrastive",
        "Clotho + AudioCaps, distilled",
        "Clotho, contrastive",
        "Clotho, contrastive and Clotho + AudioCaps, distilled, ensemble",
    ]


@pytest.mark.parametrize(
    ("stage", "trained_on", "label"),
    [
        ("contrastive", ["clotho/development"], "Clotho, contrastive"),
        ("distilled", ["audiocaps/train", "clotho/development"], "Clotho + AudioCaps, distilled"),
        ("contrastive", ["wavcaps/train", "clotho/development"], "Clotho + WavCaps, contrastive"),
        ("distilled", ["mine@12ab/all", "clotho/development"], "Clotho + mine, distilled"),
        ("contrastive", ["b@1/all", "a@2/train"], "a + b, contrastive"),
    ],
)
def test_labels_tell_data_and_stage(stage, trained_on, label):
    assert evaluate.label_of(stage, trained_on) == label


# --- The printed table ---


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}"


def percent_interval(bounds: list[float], sign: str = "") -> str:
    return f"{percent(bounds[0], sign)}..{percent(bounds[1], sign)}"


def cells_of(figures: dict, write, sign: str = "") -> dict[str, str]:
    """Write {column: cell} of figures from the JSON."""
    cells = {}
    for column, (source, metric) in COLUMNS.items():
        cells[column] = write(figures[source][metric], sign)
    return cells


def test_the_printed_rows_are_the_jsons(table):
    expected = []
    for i, row in enumerate(table.rows):
        label = row["label"]
        if label == "Clotho, contrastive":  # there are three of these
            label += f": {row['name']}"
        expected.append((label, cells_of(row["results"], percent)))
        interval = cells_of(row["intervals"], percent_interval)
        expected.append(("  95 % interval (too narrow: few clips)", interval))
        if i > 0:
            lead = row["lead"]
            expected.append(("  lead over the first", cells_of(lead["results"], percent, "+")))
            interval = cells_of(lead["intervals"], percent_interval, "+")
            expected.append(("    95 % interval (too narrow: few clips)", interval))
    assert table.lines_of_rows == expected


def test_the_printed_mean_and_deviation_are_the_jsons(table):
    (group,) = table.groups
    mean, deviation = table.lines_of_groups[:2]
    assert mean == ("Clotho, contrastive: mean of 3", cells_of(group["mean"], percent))
    assert deviation == ("  standard deviation", cells_of(group["standard deviation"], percent))


def test_the_files_of_averaged_rows_are_named(table):
    labels = [label for label, _ in table.lines_of_groups[2:]]
    assert labels == ["  averaged: a.pt", "  averaged: b.pt", "  averaged: d.pt"]
    assert table.groups[0]["names"] == ["a.pt", "b.pt", "d.pt"]


def test_the_columns_stand_in_the_order_of_table_1(table):
    assert list(table.lines_of_rows[0][1]) == list(COLUMNS)


@pytest.fixture(scope="module")
def real_table(here) -> SimpleNamespace:
    """Evaluate a model as if the small split were the one of the report."""
    as_many = {"REPORTED_CLIPS": len(CLIPS), "CLIPS_FOR_AN_INTERVAL": len(CLIPS)}
    printed = print_of_evaluate(here, "--checkpoint", "a.pt", **as_many)
    return SimpleNamespace(
        lines=rows_of_printed_table(printed),
        notes=printed.split("\n\n")[2],
    )


def test_the_reports_table_is_shown_beside_its_own_split(real_table):
    lines = [(label, " ".join(cells.values())) for label, cells in real_table.lines[-4:]]
    assert lines == [
        ("report: Clotho, contrastive", "- 31.95 27.57 16.95 42.73 58.04"),
        ("report: Clotho, distilled", "- 32.54 28.20 16.44 43.89 58.89"),
        ("report: Clotho + AudioCaps, contrastive", "35.21 - 30.97 19.56 46.45 59.48"),
        ("report: Clotho + AudioCaps, distilled", "- 37.21 32.75 19.80 47.45 60.48"),
    ]


def test_a_note_says_that_the_reports_first_column_mixes_two_metrics(real_table):
    assert "31.95 (row 1) is the official baseline's mAP@10" in real_table.notes
    assert "35.21 (row 3) its mAP@16" in real_table.notes


def test_intervals_from_enough_clips_are_not_marked(real_table):
    assert real_table.lines[1][0] == "  95 % interval"


# --- What the figures are of ---


def test_the_json_says_what_its_figures_are_of(table):
    date = datetime.datetime.fromisoformat(table.about.pop("date"))
    assert abs(datetime.datetime.now().astimezone() - date) < datetime.timedelta(minutes=10)
    assert table.about == {
        "data set": "clotho",
        "split": "clotho/evaluation",
        "captions": "clotho_captions_evaluation.csv",
        "clips": 20,
        "clips not on disk": 1,
        "queries": 97,
        "annotations": "metadata_eval.csv",
        "annotated queries": 7,
        "resamples": 1000,
        "device": "cpu",
        "precision": "fp32",
    }


def test_the_json_says_what_each_model_is(table):
    assert table.rows[4]["checkpoints"] == [
        {"file": "a.pt", "stage": "contrastive", "trained on": ["clotho/development"]},
        {
            "file": "c.pt",
            "stage": "distilled",
            "trained on": ["audiocaps/val", "clotho/development"],
        },
    ]


# --- The page ---


@pytest.fixture(scope="module")
def page(here, tiny_model) -> SimpleNamespace:
    """Write the page of an ensemble: of the folder of a run, which has a log, and c.pt."""
    temperature, _, stage, trained_on = MODELS["b"]
    run = here / "run-b"
    run.mkdir()
    write_checkpoint(run / "best.pt", tiny_model, stage, trained_on, temperature)
    (run / "log.jsonl").write_text('{"settings": {}}\n{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    printed = print_of_evaluate(here, "--ensemble", "run-b", "c.pt", "--html", "page.html")
    text = (here / "page.html").read_text()
    return SimpleNamespace(text=text, printed=printed, facts=facts_of_the_page(text))


def facts_of_the_page(text: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))


def items_of_the_page(text: str) -> list[tuple[str, int, str]]:
    """List (query, number of a clip, what the page shows of it) for each clip below each query."""
    items = []
    for card in re.findall(r'<details class="query">.*?</details>', text, re.DOTALL):
        query = re.search(r"<summary>(clip \d+ sounds .)", card)[1]
        for item in re.findall(r"<li.*?</li>", card, re.DOTALL):
            clip = int(re.search(r">(\d+)\.wav<", item)[1])
            items.append((query, clip, item))
    return items


def test_the_pages_table_is_the_printed_one(page):
    rows = []
    for row in re.findall(r"<tr.*?>(.*?)</tr>", page.text, re.DOTALL):
        rows.append([html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)])
    printed = [[label, *cells.values()] for label, cells in rows_of_printed_table(page.printed)]
    assert rows == [["", *COLUMNS], *printed]


def test_the_page_marks_clips_that_the_new_annotations_name(page):
    marked = set()
    expected = set()
    for query, clip, item in items_of_the_page(page.text):
        if "✓ relevant, too" in item:
            marked.add((query, clip))
        is_right = query.startswith(f"clip {clip} ")
        if clip in ANNOTATIONS.get(query, []) and not is_right:
            expected.add((query, clip))
    assert len(expected) > 0
    assert marked == expected


def test_the_page_marks_the_right_clip(page):
    for query, clip, item in items_of_the_page(page.text):
        is_right = query.startswith(f"clip {clip} ")
        assert ("✓ the right clip" in item) == is_right, (query, clip)


def test_the_pages_scores_are_mean_similarities(page):
    for query, clip, item in items_of_the_page(page.text):
        score = float(re.search(r"score (-?\d\.\d+)", item)[1])
        assert score == pytest.approx(mean_similarity(["b", "c"], query, clip), abs=6e-4)


def test_the_page_is_headed_by_the_rows_label(page):
    assert "<h1>Clotho, contrastive and Clotho + AudioCaps, distilled, ensemble on" in page.text


def test_the_page_tells_what_each_model_is(page):
    assert page.facts["checkpoint run-b"] == "Clotho, contrastive, on clotho/development"
    assert page.facts["checkpoint c.pt"] == (
        "Clotho + AudioCaps, distilled, on audiocaps/val, clotho/development"
    )


def test_the_page_tells_what_its_figures_are_of(page):
    facts = {name: page.facts[name] for name in ("split", "clips", "queries", "annotations")}
    assert facts == {
        "split": "clotho/evaluation",
        "clips": "20",
        "queries": "97",
        "annotations": "metadata_eval.csv",
    }
    assert re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d", page.facts["date"])


def test_the_page_draws_the_log_of_a_runs_folder(page):
    assert "There is no log of a run" not in page.text


def test_where_the_page_is_is_printed(page):
    assert "page  page.html" in page.printed


# --- What may be evaluated on ---


def test_what_was_trained_on_is_refused(here, monkeypatch):
    with pytest.raises(errors.InputError, match="seen.pt: was trained on clotho/evaluation"):
        run_evaluate(here, monkeypatch, "--checkpoint", "seen.pt")


def test_every_member_of_an_ensemble_is_looked_at(here, monkeypatch):
    with pytest.raises(errors.InputError, match="seen.pt: was trained on clotho/evaluation"):
        run_evaluate(here, monkeypatch, "--ensemble", "a.pt", "seen.pt")


@pytest.fixture(scope="module")
def seen_table(here) -> SimpleNamespace:
    """Evaluate with --allow-seen a model that has not seen the split, one that has, an ensemble."""
    models = ["--checkpoint", "c.pt", "seen.pt", "--ensemble", "a.pt", "seen.pt"]
    printed = print_of_evaluate(here, *models, "--allow-seen", "--json", "seen.json")
    return SimpleNamespace(
        labels=[label for label, _ in rows_of_printed_table(printed)],
        rows=json.loads((here / "seen.json").read_text())["rows"],
    )


def test_allow_seen_marks_the_printed_row(seen_table):
    assert "Clotho + AudioCaps, distilled" in seen_table.labels
    assert "Clotho, contrastive (seen)" in seen_table.labels
    assert "Clotho, contrastive, ensemble (seen)" in seen_table.labels


def test_allow_seen_marks_the_row_in_the_json(seen_table):
    assert [row["seen"] for row in seen_table.rows] == [False, True, True]


@pytest.fixture
def trained_on_mine(here, tiny_model) -> list[str]:
    """Return options that evaluate, on the folder, a model that was trained on a part of it."""
    trained_on = data.read_split(str(here / "mine"), "train", here).name
    write_checkpoint(here / "mine.pt", tiny_model, "contrastive", [trained_on])
    return ["--dataset", "mine", "--checkpoint", "mine.pt", "--split"]


@pytest.mark.parametrize("part", ["train", "all"])
def test_a_folder_is_refused_where_a_part_of_it_was_trained_on(
    part, here, monkeypatch, trained_on_mine
):
    with pytest.raises(errors.InputError, match="was trained on mine@.*--allow-seen"):
        run_evaluate(here, monkeypatch, *trained_on_mine, part)


def test_the_part_of_a_folder_that_was_held_out_is_evaluated(
    here, monkeypatch, trained_on_mine, capsys
):
    run_evaluate(here, monkeypatch, *trained_on_mine, "val")
    assert "mine, contrastive" in capsys.readouterr().out


def test_without_checkpoint_the_newest_run_is_evaluated(
    here, monkeypatch, capsys, tmp_path, tiny_model, known_embeddings
):
    for name, time in (("first", 3_000_000), ("second", 5_000_000), ("third", 4_000_000)):
        best = tmp_path / "runs" / name / "best.pt"
        best.parent.mkdir(parents=True)
        write_checkpoint(best, tiny_model, "contrastive", ["clotho/development"])
        os.utime(best, (time, time))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data-dir", str(here)])
    evaluate.main()
    assert "runs/second/best.pt" in capsys.readouterr().out


# --- How the split is embedded ---


def test_the_models_embed_in_the_precision_given(here, monkeypatch, known_embeddings):
    precisions = []

    def embed_and_note(model, captions):
        precisions.append(model.precision)
        return known_embed_text(model, captions)

    monkeypatch.setattr(DualEncoder, "embed_text", embed_and_note)
    run_evaluate(here, monkeypatch, "--checkpoint", "a.pt", "--precision", "bf16")
    assert precisions == [torch.bfloat16]


def test_decoded_sounds_are_kept_in_the_folder_given(
    here, monkeypatch, tmp_path, known_embeddings
):
    run_evaluate(here, monkeypatch, "--checkpoint", "a.pt", "--cache-dir", tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == len(CLIPS)


# --- The new annotations ---


@pytest.fixture(scope="module")
def table_without_annotations(here) -> SimpleNamespace:
    options = ["--checkpoint", "a.pt", "--annotations", "none", "--json", "without.json"]
    printed = print_of_evaluate(here, *options)
    return SimpleNamespace(
        lines=rows_of_printed_table(printed),
        written=json.loads((here / "without.json").read_text()),
    )


def test_without_annotations_their_columns_hold_dashes(table_without_annotations):
    _, cells = table_without_annotations.lines[0]
    assert cells["new mAP@16"] == "-"
    assert cells["new mAP@10"] == "-"


def test_without_annotations_the_json_has_figures_of_the_captions_alone(table_without_annotations):
    written = table_without_annotations.written
    assert list(written["rows"][0]["results"]) == ["captions"]
    assert written["about"]["annotations"] is None


def test_annotations_that_are_not_there_are_reported(here, tmp_path):
    for name in ("evaluation", "clotho_captions_evaluation.csv"):
        (tmp_path / name).symlink_to(here / name)
    printed = print_of_evaluate(tmp_path, "--checkpoint", here / "a.pt")
    assert "metadata_eval.csv: not there" in printed


def test_of_equal_captions_the_first_is_the_query(tmp_path):
    for name in ("1.wav", "2.wav"):
        write_wav(tmp_path / name, np.zeros(1600))
    rows = [["1.wav", "wind", "rain"], ["2.wav", "rain", "rain"]]
    write_csv(tmp_path / "captions.csv", ["file_name", "caption_1", "caption_2"], rows)
    split = data.read_split(str(tmp_path), "all", tmp_path)
    path = write_numbered_annotations(tmp_path / "new.csv", {"rain": [2, 1]})
    assert evaluate.read_annotations(path, split) == {1: [0, 1]}


def annotated_results(here, monkeypatch, path: Path) -> dict:
    """Return model a's results by the annotations in a file."""
    options = ["--checkpoint", "a.pt", "--annotations", path, "--json", "other.json"]
    run_evaluate(here, monkeypatch, *options)
    results = json.loads((here / "other.json").read_text())["rows"][0]["results"]
    return results.get("new annotations", {})


def annotated_by_definition(queries: dict[str, list[int]]) -> list[float]:
    values = [query_metrics_by_definition(["a"], *query) for query in queries.items()]
    return np.mean(values, axis=0).tolist()


def test_clips_that_are_not_on_disk_are_left_out(here, monkeypatch, tmp_path, known_embeddings):
    path = write_numbered_annotations(tmp_path / "new.csv", {"clip 3 sounds a": [3, 0, 8]})
    results = annotated_results(here, monkeypatch, path)
    assert in_order(results) == pytest.approx(annotated_by_definition({"clip 3 sounds a": [3, 8]}))


def test_a_query_without_a_clip_on_disk_is_left_out(here, monkeypatch, tmp_path, known_embeddings):
    queries = {"clip 3 sounds a": [3], "clip 5 sounds b": [0], "clip 0 sounds a": [0, 4]}
    path = write_numbered_annotations(tmp_path / "new.csv", queries)
    results = annotated_results(here, monkeypatch, path)
    assert in_order(results) == pytest.approx(annotated_by_definition({"clip 3 sounds a": [3]}))


def test_a_file_name_may_stand_without_a_list(here, monkeypatch, tmp_path, known_embeddings):
    path = write_annotations(tmp_path / "new.csv", [["clip 3 sounds a", "8.wav"]])
    results = annotated_results(here, monkeypatch, path)
    assert in_order(results) == pytest.approx(annotated_by_definition({"clip 3 sounds a": [8]}))


def test_unknown_clips_are_refused(here, monkeypatch, tmp_path):
    path = write_numbered_annotations(tmp_path / "new.csv", {"clip 3 sounds a": [3, 21]})
    with pytest.raises(errors.InputError, match="'21.wav' is no clip of clotho/evaluation"):
        annotated_results(here, monkeypatch, path)


def test_a_query_that_is_no_caption_is_refused_where_all_clips_are_there(
    here, monkeypatch, tmp_path
):
    (tmp_path / "evaluation").symlink_to(here / "evaluation")
    rows = [[f"{clip}.wav", f"clip {clip} sounds a"] for clip in CLIPS]
    write_csv(tmp_path / "clotho_captions_evaluation.csv", ["file_name", "caption_1"], rows)
    queries = {"clip 3 sounds a": [3], "clip 3 sounds a ": [3]}
    write_numbered_annotations(tmp_path / "metadata_eval.csv", queries)
    with pytest.raises(errors.InputError, match="query 'clip 3 sounds a ': it is no caption of"):
        run_evaluate(tmp_path, monkeypatch, "--checkpoint", here / "a.pt")


# --- Bad input: one line, exit status 2, before any long work ---

TRAIN = "--preset tiny --device cpu --cache-dir cache --batch-size 2 --datasets"
STUDENT = "--datasets here/mine --device cpu --cache-dir cache --batch-size 2"
EVALUATE = "--data-dir here --checkpoint here/a.pt"
BARE = "here/bare.pt --tokenizer elsewhere"
NO_TOKENIZER = "elsewhere: cannot be fetched"
BAD = [  # script, its options, what the line says
    (train, f"{TRAIN} clotho", "no clotho here: looked for"),
    (train, f"{TRAIN} nowhere", "nowhere: no data set"),
    (train, f"{TRAIN} here/mine --batch-size 99", "--batch-size 99: at most the 4 pairs"),
    (train, f"{TRAIN} here/mine --out here", "holds other files than a run's"),
    (train, f"{TRAIN} here/mine --device cuda:9", "device cuda:9: cannot be used"),
    (train, f"{TRAIN} here/mine --init gone.pt", "gone.pt: no such checkpoint"),
    (train, f"{TRAIN} here/mine --init here/mine/0.wav", "is damaged or no checkpoint"),
    (train, f"{TRAIN} here/mine --frobnicate", "unrecognized arguments"),
    (distill, "--teachers gone.pt --datasets here/mine", "gone.pt: no such checkpoint"),
    (evaluate, "--data-dir here --checkpoint gone.pt", "gone.pt: no such checkpoint"),
    (evaluate, "--data-dir here", "train first, or give --checkpoint"),
    (evaluate, "--data-dir here", "--checkpoint salsa fetches a published model"),
    (evaluate, f"{EVALUATE} --json no/x.json", "no/x.json: cannot be written"),
    (evaluate, f"{EVALUATE} --html here", "here: cannot be written"),
    (evaluate, f"{EVALUATE} here/b.pt --html x.html", "--html takes one --checkpoint, or one"),
    (evaluate, f"{EVALUATE} --ensemble here/b.pt --html x.html", "--html takes one --checkpoint"),
    (evaluate, f"{EVALUATE} --annotations wrong.csv", "'gone.wav' is no clip of clotho/evaluat"),
    (evaluate, f"{EVALUATE} --annotations gone.csv", "--annotations gone.csv: no such file"),
    (evaluate, f"{EVALUATE} --split all", "clotho has train, val"),
    (search, "dog --audio here/mine --checkpoint gone.pt", "gone.pt: no such checkpoint"),
    (train, f"{TRAIN} here/mine --init {BARE}", NO_TOKENIZER),
    (distill, f"{STUDENT} --teachers {BARE}", NO_TOKENIZER),
    (distill, f"{STUDENT} --init here/a.pt --teachers {BARE}", NO_TOKENIZER),
    (evaluate, f"--data-dir here --checkpoint {BARE}", NO_TOKENIZER),
    (search, f"dog --audio here/mine --checkpoint {BARE}", NO_TOKENIZER),
]


def fails_with_status_2(script, options: list[str], monkeypatch, capsys) -> list[str]:
    """Run a script that must end with status 2, and return the lines that it writes to stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options])
    with pytest.raises(SystemExit) as ended:
        errors.run_command(script.main)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(("script", "options", "message"), BAD)
def test_bad_input_is_one_line(script, options, message, here, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").symlink_to(here)
    write_annotations(tmp_path / "wrong.csv", [["x", "['gone.wav']"]])
    (line,) = fails_with_status_2(script, options.split(), monkeypatch, capsys)
    assert message in line


def test_damaged_sounds_are_listed_before_training(monkeypatch, tmp_path, capsys):
    folder = write_folder(tmp_path / "mine", 6)
    for name in ("1.wav", "4.wav"):
        (folder / name).write_bytes(b"no sound")
    monkeypatch.chdir(tmp_path)
    headline, first, second = fails_with_status_2(
        train, f"{TRAIN} mine --out run".split(), monkeypatch, capsys
    )
    assert "cannot be used" in headline
    assert headline.endswith("(2):")
    assert "1.wav" in first
    assert "4.wav" in second
