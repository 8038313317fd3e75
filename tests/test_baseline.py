"""The official baseline's checkpoint: the same embeddings, and nothing in the file is executed."""

import os
import string
import sys
import types

import numpy as np
import pytest
import torch
from hear21passt.models.passt import PaSST
from hear21passt.models.preprocess import AugmentMelSTFT
from torch.nn.functional import normalize
from transformers import RobertaConfig, RobertaModel

import distill
from dualenc import InputError
from dualenc.model import DualEncoder
from dualenc.text import train_tokenizer

CAPTIONS = [
    "A dog barks, twice; then it's quiet.",
    "Rain!",
    "Birds sing while " + "a very long train " * 12 + "passes by",
]
# hear21passt's, whose own code is run here for comparison
pytestmark = pytest.mark.filterwarnings("ignore:stft with return", "ignore:.*autocast")
SECONDS = (4.0, 10.0, 13.7, 20.0, 24.03, 30.0)


class Baseline(torch.nn.Module):
    """The official model, reduced to what its checkpoint holds and its evaluation computes."""

    def __init__(self, passt, roberta):
        super().__init__()
        self.tau = torch.nn.Parameter(torch.tensor([-0.07]))
        wrapper = torch.nn.Module()
        wrapper.mel = AugmentMelSTFT(
            n_mels=128, sr=32000, win_length=800, hopsize=320, n_fft=1024, freqm=0, timem=0,
            fmin=0.0, fmax=None, fmin_aug_range=10, fmax_aug_range=2000,
        )
        wrapper.model = passt
        self.audio_embedding_model = torch.nn.Module()
        self.audio_embedding_model.model = wrapper
        self.audio_projection = torch.nn.Linear(passt.embed_dim, 1024)
        self.text_embedding_model = roberta
        self.text_projection = torch.nn.Linear(roberta.config.hidden_size, 1024)
        self.eval()

    @torch.no_grad()
    def embed_audio(self, waveform):
        """Three segments of the clip, padded to 30 s; the mean of those that it reaches into."""
        padded = np.pad(waveform, (0, 960_000 - len(waveform))).reshape(3, 320_000)
        mel = self.audio_embedding_model.model.mel(torch.tensor(padded))
        _, features = self.audio_embedding_model.model.model(mel[:, None])
        mean = features[: int(np.ceil(len(waveform) / 320_000))].mean(0)
        return normalize(self.audio_projection(mean), dim=0)

    @torch.no_grad()
    def embed_text(self, caption, tokenizer):
        plain = caption.lower().translate(str.maketrans("", "", string.punctuation))
        ids = tokenizer.encode(plain).ids
        padded = torch.tensor([ids + [1] * (32 - len(ids))])
        hidden = self.text_embedding_model(padded, attention_mask=(padded != 1).long())[0]
        return normalize(self.text_projection(hidden[0, 0]), dim=0)


def small_baseline():
    torch.manual_seed(0)
    passt = PaSST(
        img_size=(128, 1000), patch_size=16, stride=16, embed_dim=128, depth=2, num_heads=2,
        distilled=True,
    )
    config = RobertaConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=256, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    )
    return Baseline(passt, RobertaModel(config, add_pooling_layer=False))


def compiled(name):
    """The name that a weight has where the two towers were compiled."""
    for prefix in ("audio_embedding_model.model.model.", "text_embedding_model."):
        if name.startswith(prefix):
            return f"{prefix}_orig_mod.{name.removeprefix(prefix)}"
    return name


def lightning_settings(monkeypatch):
    """Hyperparameters of a class that cannot be imported when the file is read again."""
    module = types.ModuleType("lightning_data")
    for kind in ("AttributeDict", "Strategy"):
        base = dict if kind == "AttributeDict" else object
        setattr(module, kind, type(kind, (base,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    strategy = module.Strategy()
    strategy.devices = 1
    return module.AttributeDict(audiocaps=True, wavcaps=False, strategy=strategy)


def save(path, weights, settings, monkeypatch):
    checkpoint = {"epoch": 15, "pytorch-lightning_version": "2.5.0", "state_dict": weights}
    torch.save(checkpoint | {"hyper_parameters": settings}, path)
    monkeypatch.undo()  # from here on there is no Lightning
    return path


@pytest.fixture(scope="module")
def baseline():
    return small_baseline()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(CAPTIONS, 400).save(str(path))
    return path


def deviations(baseline, model):
    """The largest difference of any component of the embeddings: (audio, text)."""
    rng = np.random.default_rng(0)
    sounds = [rng.normal(0, 0.1, round(s * 32_000)).astype(np.float32) for s in SECONDS]
    audio = torch.stack([baseline.embed_audio(sound) for sound in sounds])
    text = torch.stack([baseline.embed_text(caption, model.tokenizer) for caption in CAPTIONS])
    return (
        (model.embed_audio(sounds) - audio).abs().max().item(),
        (model.embed_text(CAPTIONS) - text).abs().max().item(),
    )


@pytest.mark.parametrize("renamed", [str, compiled])
def test_embeddings_equal_the_baselines(renamed, baseline, tokenizer_file, tmp_path, monkeypatch):
    weights = {renamed(name): value for name, value in baseline.state_dict().items()}
    settings = lightning_settings(monkeypatch)
    path = save(tmp_path / "baseline.ckpt", weights, settings, monkeypatch)
    model = DualEncoder.load(path, tokenizer=tokenizer_file)
    assert "lightning_data" not in sys.modules
    assert max(deviations(baseline, model)) < 1e-5
    assert model.tau.item() == pytest.approx(0.07)  # the baseline divides by the absolute value
    assert model.config.text_dropout == 0.2


def test_it_is_a_model_like_any_other(baseline, tokenizer_file, tmp_path, monkeypatch):
    settings = lightning_settings(monkeypatch)
    path = save(tmp_path / "baseline.ckpt", baseline.state_dict(), settings, monkeypatch)
    model = DualEncoder.load(path, tokenizer=tokenizer_file)
    assert model.trained_on == ["clotho/development", "audiocaps/train"]
    model.save(tmp_path / "ours.pt")
    again = DualEncoder.load(tmp_path / "ours.pt")
    assert again.config == model.config and again.trained_on == model.trained_on
    assert torch.equal(again.embed_text(CAPTIONS), model.embed_text(CAPTIONS))


def test_it_teaches_and_is_fine_tuned(baseline, tokenizer_file, miniature, tmp_path, monkeypatch):
    torch.save({"state_dict": baseline.state_dict()}, tmp_path / "baseline.ckpt")
    options = {
        "--teachers": tmp_path / "baseline.ckpt", "--tokenizer": tokenizer_file,
        "--data-dir": miniature, "--cache-dir": tmp_path / "cache", "--out": tmp_path / "run",
        "--max-steps": 1, "--batch-size": 4, "--workers": 0,
    }
    argv = ["distill.py", *(str(word) for option in options.items() for word in option)]
    monkeypatch.setattr(sys, "argv", argv)
    assert distill.main() == 0
    student = DualEncoder.load(tmp_path / "run/best.pt")  # with the tokenizer in it
    assert student.trained_on == ["audiocaps/train", "clotho/development", "wavcaps/train"]
    weight = student.text_projection.weight
    assert 0 < (weight - baseline.text_projection.weight).abs().max() < 1e-4  # one small step


def test_without_settings_the_published_training_data_are_assumed(
    baseline, tokenizer_file, tmp_path
):
    path = tmp_path / "baseline.ckpt"
    torch.save({"state_dict": baseline.state_dict()}, path)
    model = DualEncoder.load(path, tokenizer=tokenizer_file)
    assert model.trained_on == ["clotho/development", "audiocaps/train", "wavcaps/train"]


def test_a_tokenizer_of_another_model_is_refused(baseline, tmp_path):
    torch.save({"state_dict": baseline.state_dict()}, tmp_path / "baseline.ckpt")
    train_tokenizer([f"word{i} {i * i}" for i in range(900)], 900).save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match="more than 400 tokens"):
        DualEncoder.load(tmp_path / "baseline.ckpt", tokenizer=tmp_path / "t.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("tau"), "lacks tau"),
        (lambda w: w.pop("text_projection.bias"), "lacks text_projection.bias"),
        (
            lambda w: w.pop("audio_embedding_model.model.model.blocks.0.norm1.weight"),
            "lacks audio_embedding_model.model.model.blocks.0.norm1.weight",
        ),
        (
            lambda w: w.update({"text_embedding_model.pooler.dense.bias": torch.zeros(64)}),
            "has text_embedding_model.pooler.dense.bias, which is unknown",
        ),
        (lambda w: w.update({"scale": torch.zeros(1)}), "has scale, which is unknown"),
        (
            lambda w: w.update({"audio_projection.bias": torch.zeros(3)}),
            r"audio_projection.bias has shape \(3,\), not \(1024,\)",
        ),
        (lambda w: w.update({1: torch.zeros(1)}), "has 1, which is unknown"),
        *[
            (lambda w, name=name: w.update({name: torch.tensor(1.0)}), "not the baseline's shape")
            for name in (
                "audio_projection.weight",
                "text_embedding_model.embeddings.position_embeddings.weight",
                "text_embedding_model.encoder.layer.0.intermediate.dense.weight",
            )
        ],
    ],
)
def test_names_what_does_not_fit(change, message, baseline, tokenizer_file, tmp_path):
    weights = dict(baseline.state_dict())
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "baseline.ckpt")
    with pytest.raises(InputError, match=message):
        DualEncoder.load(tmp_path / "baseline.ckpt", tokenizer=tokenizer_file)


class Attack:
    """Pickles as a call of any function with a path that it would make."""

    def __init__(self, function, path):
        self.function, self.path = function, path

    def __reduce__(self):
        return self.function, (self.path,)


@pytest.mark.parametrize("call", [os.mkdir, os.system, open, exec, eval, np.save])
def test_nothing_in_the_file_is_executed(call, baseline, tokenizer_file, tmp_path):
    made = tmp_path / "made"
    argument = {
        os.mkdir: str(made),
        os.system: f"touch {made}",
        exec: f"open({str(made)!r}, 'w')",
        eval: f"open({str(made)!r}, 'w')",
    }.get(call, str(made))
    path = tmp_path / "baseline.ckpt"
    settings = {"audiocaps": Attack(call, argument)}
    torch.save({"state_dict": baseline.state_dict(), "hyper_parameters": settings}, path)
    try:
        model = DualEncoder.load(path, tokenizer=tokenizer_file)
        assert model.trained_on[0] == "clotho/development"
    except InputError as error:
        assert "nothing was loaded" in str(error)
    assert not made.exists()
