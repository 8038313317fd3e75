"""Captions to tokens to RoBERTa, against transformers used plainly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

from dualenc import text

CAPTIONS = [
    "A dog barks loudly, twice.", "Rain falls on a tin roof", "Wind, and a far-off bell!",
    "Cars pass by; someone's footsteps crunch on gravel",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(CAPTIONS, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A RoBERTa as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("roberta")
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=96, max_position_embeddings=66,
        type_vocab_size=1, layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(path)
    RobertaTokenizer(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_normalise_lowers_and_drops_ascii_punctuation_only():
    assert text.normalise("A Dog's bark, 3 times!") == "a dogs bark 3 times"
    assert text.normalise("Café – “quiet”…") == "café – “quiet”…"


def test_tokens_have_robertas_form(tokenizer):
    tokens = text.tokenize(tokenizer, ["rain", "A DOG barks loudly, twice", "🐕"])
    assert (tokens[:, 0] == 0).all()
    for row in tokens:
        end = row.tolist().index(2)
        assert (row[end + 1 :] == text.PAD_ID).all() and not (row[:end] == text.PAD_ID).any()
    assert tokenizer.decode(tokens[1].tolist()) == "a dog barks loudly twice"
    assert tokenizer.decode(tokens[2].tolist()) == "🐕"


def test_long_captions_are_cut_at_32_tokens(tokenizer):
    tokens = text.tokenize(tokenizer, ["dog " * 10_000, "rain"])
    assert tokens.shape == (2, 32) and tokens[0, -1] == 2 and tokens[0, 0] == 0


def test_training_is_repeatable_and_serialises(tokenizer):
    again = text.train_tokenizer(CAPTIONS, 400)
    assert again.to_str() == tokenizer.to_str()
    parsed = text.parse_tokenizer(tokenizer.to_str(), 400)
    assert torch.equal(text.tokenize(parsed, CAPTIONS), text.tokenize(tokenizer, CAPTIONS))


def test_published_files_give_the_same_tokens_as_transformers(folder, tokenizer):
    theirs = RobertaTokenizer.from_pretrained(folder)
    normalised = [text.normalise(caption) for caption in CAPTIONS]
    wanted = theirs(normalised, padding="longest", truncation=True, max_length=32)["input_ids"]
    for source in (folder, folder / "tokenizer.json"):
        ours = text.load_tokenizer(source, 400)
        assert text.tokenize(ours, CAPTIONS).tolist() == wanted


def test_tower_equals_roberta_padded_to_32(folder):
    tokenizer = text.load_tokenizer(folder, 400)
    tower = text.TextTower(text.published_roberta_config(str(folder))).eval()
    tower.roberta.load_state_dict(text.published_roberta(str(folder)))
    theirs = RobertaModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inputs = RobertaTokenizer.from_pretrained(folder)(
        [text.normalise(caption) for caption in CAPTIONS],
        padding="max_length", truncation=True, max_length=32, return_tensors="pt",
    )
    with torch.inference_mode():
        wanted = theirs(inputs["input_ids"], inputs["attention_mask"])[0][:, 0]
        ours = tower(text.tokenize(tokenizer, CAPTIONS))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_loading_prints_nothing(folder, capfd):
    text.published_roberta(str(folder))
    text.load_tokenizer(folder, 400)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_unknown_names_give_one_line_with_the_ways_out():
    for load in (text.published_roberta_config, text.published_roberta):
        with pytest.raises(ValueError, match="cannot be fetched.*save_pretrained.*--preset tiny"):
            load("no-such-roberta")
    with pytest.raises(ValueError, match="cannot be fetched.*save_pretrained.*--preset tiny"):
        text.load_tokenizer("no-such-roberta", 400)


def test_without_network_the_command_ends_soon_and_in_one_line(miniature, tmp_path):
    """A user's machine: nothing is cached, and nobody has set HF_HUB_OFFLINE."""
    settings = {name: v for name, v in os.environ.items() if name != "HF_HUB_OFFLINE"}
    settings |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    ended = subprocess.run(
        [sys.executable, "train.py", "--data-dir", miniature, "--out", tmp_path / "run"],
        cwd=Path(__file__).parents[1], env=settings, capture_output=True, text=True, timeout=15,
    )
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("train.py: --text-model roberta-large: cannot be fetched")


def test_another_tokenizer_is_refused():
    from tokenizers.models import BPE

    with pytest.raises(ValueError, match="not RoBERTa's"):
        text.parse_tokenizer(Tokenizer(BPE()).to_str(), 400)
    with pytest.raises(ValueError):
        text.parse_tokenizer("{}", 400)
