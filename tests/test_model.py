"""The dual encoder as its users call it; its towers and the baseline's file by a second route."""

import dataclasses
import os
import string
import sys
import time
import types
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from conftest import CAPTIONS, noise, write_wav
from hear21passt.models.passt import PaSST
from hear21passt.models.preprocess import AugmentMelSTFT
from torch.nn.functional import normalize
from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

from dualenc import DualEncoder, text
from dualenc.audio import AudioTower
from dualenc.checkpoints import newest_checkpoint, published_passt
from dualenc.decoding import resample
from dualenc.errors import InputError
from dualenc.model import PRESETS, choose_device, choose_precision

pytestmark = pytest.mark.filterwarnings("ignore:stft with return", "ignore:.*autocast")  # theirs
SIZES = dict(vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
             intermediate_size=256)
REPORT = PRESETS["report"]
SMALL = dataclasses.replace(REPORT, audio_width=128, audio_depth=2, audio_heads=2, **SIZES)
SENTENCES = ["A dog barks, twice; then it's quiet.", "Rain!", "Café – “quiet” 🐕", "...",
             "Birds sing while " + "a very long train " * 12 + "passes by"]


@pytest.fixture(scope="module")
def theirs():
    """The parts of the official baseline, small."""
    torch.manual_seed(0)
    mel = AugmentMelSTFT(freqm=0, timem=0, fmin_aug_range=10, fmax_aug_range=2000)
    passt = PaSST(img_size=(128, 1000), patch_size=16, stride=16, embed_dim=128, depth=2,
                  num_heads=2, distilled=True, s_patchout_t=15, s_patchout_f=2)
    config = RobertaConfig(**SIZES, max_position_embeddings=514, type_vocab_size=1)
    roberta = RobertaModel(config, add_pooling_layer=False)
    heads = dict(audio=torch.nn.Linear(128, 1024), text=torch.nn.Linear(64, 1024))
    parts = dict(mel=mel.eval(), passt=passt.eval(), roberta=roberta.eval(), **heads)
    return types.SimpleNamespace(**parts)


@pytest.fixture(scope="module")
def roberta(theirs, tmp_path_factory):
    """A folder as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = DualEncoder.create("tiny", "random", SENTENCES).tokenizer
    for part in (theirs.roberta, RobertaTokenizer(tokenizer_object=tokenizer)):
        part.save_pretrained(folder)
    return folder


# --- Second routes ---

def baseline_weights(theirs) -> dict[str, torch.Tensor]:
    """The weights of a baseline's file, by the names that stand there."""
    parts = {"audio_embedding_model.model.model": theirs.passt, "audio_projection": theirs.audio,
             "text_embedding_model._orig_mod": theirs.roberta, "text_projection": theirs.text}
    weights = {f"{p}.{n}": w for p, part in parts.items() for n, w in part.state_dict().items()}
    return weights | {"tau": torch.tensor([-0.07])}


@torch.no_grad()
def by_the_baseline(theirs, sounds, sentences, tokenizer):
    """Clips padded to three segments, those without sound left out; words padded to 32 tokens."""
    padded = np.concatenate([np.pad(sound, (0, 960_000 - len(sound))) for sound in sounds])
    mel = theirs.mel(torch.from_numpy(padded).view(-1, 320_000))[:, None]
    features = zip(theirs.passt(mel)[1].split(3), sounds, strict=True)
    means = [each[: -(-len(sound) // 320_000)].mean(0) for each, sound in features]
    plain = [s.lower().translate(str.maketrans("", "", string.punctuation)) for s in sentences]
    full = dict(padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    words = theirs.roberta(**tokenizer(plain, **full))[0][:, 0]
    audio, words = theirs.audio(torch.stack(means)), theirs.text(words)
    return normalize(audio, dim=1), normalize(words, dim=1)


def test_the_baselines_checkpoint_embeds_as_the_baseline_does(
    theirs, roberta, tmp_path, monkeypatch, capfd
):
    monkeypatch.setitem(PRESETS, "report", SMALL)
    module = types.ModuleType("lightning_data")  # gone when the file is read
    module.Settings = type("Settings", (dict,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = module.Settings(audiocaps=True, wavcaps=False)
    settings.strategy = module.Settings()
    saved = {"state_dict": baseline_weights(theirs), "hyper_parameters": settings}
    torch.save(saved, tmp_path / "baseline.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)

    capfd.readouterr()
    model = DualEncoder.load(tmp_path / "baseline.ckpt", tokenizer=roberta)
    assert model.trained_on == ["clotho/development", "audiocaps/train"]
    assert model.tau.item() == pytest.approx(0.07)  # the baseline divides by the absolute value
    sounds = [noise(seconds, 1) for seconds in (4, 10, 13.7, 24.03)]
    audio, words = model.embed_audio(sounds), model.embed_text(SENTENCES)
    assert capfd.readouterr() == ("", "")
    tokenizer = RobertaTokenizer.from_pretrained(roberta)
    wanted = by_the_baseline(theirs, sounds, SENTENCES, tokenizer)
    torch.testing.assert_close((audio, words), wanted, rtol=0, atol=1e-5)


def test_a_baseline_file_without_hyperparameters_counts_as_trained_on_audiocaps(
    theirs, roberta, tmp_path, monkeypatch
):
    monkeypatch.setitem(PRESETS, "report", SMALL)
    torch.save({"state_dict": baseline_weights(theirs)}, tmp_path / "baseline.ckpt")
    model = DualEncoder.load(tmp_path / "baseline.ckpt", tokenizer=roberta)
    assert "audiocaps/train" in model.trained_on


@pytest.mark.parametrize("training", [False, True])
def test_passt_equals_hear21passts_with_jitter_and_patchout(training, theirs):
    tower = AudioTower(128, 2, 2, REPORT.patch, REPORT.patchout).train(training)
    weights = theirs.passt.state_dict().items()
    tower.passt.load_state_dict({n: w for n, w in weights if not n.startswith("head")})
    lengths = set()
    tower.passt.blocks[0].register_forward_hook(lambda *call: lengths.add(call[2].shape[1]))
    segments = torch.randint(-3000, 3000, (2, 320_000), dtype=torch.int16)
    with torch.no_grad():
        torch.manual_seed(1)
        mel = theirs.mel.train(training)(segments / 32_768)
        wanted = theirs.passt.train(training)(mel[:, None])[1]
        torch.manual_seed(1)
        torch.testing.assert_close(tower(segments), wanted, rtol=0, atol=1e-5)
        torch.manual_seed(1)
        torch.testing.assert_close(tower.mel(segments / 32_768), mel, rtol=0, atol=1e-4)
    assert lengths == {2 + 6 * 47 if training else 2 + 8 * 62}
    theirs.passt.eval(), theirs.mel.eval()


def test_the_report_preset_has_the_reports_sizes():
    sizes = REPORT.audio_heads, REPORT.patch, REPORT.patchout
    one, two = (AudioTower(REPORT.audio_width, n, *sizes).state_dict() for n in (1, 2))
    layer, rest = (sum(w.numel() for n, w in two.items() if (n in one) is x) for x in (False, True))
    classifiers = 2 * (768 * 527 + 527) + 2 * 768  # two linear ones, a LayerNorm: not used here
    assert rest + (REPORT.audio_depth - 1) * layer + classifiers == 86_122_270
    with torch.device("meta"), mock.patch("dualenc.model.AudioTower", torch.nn.Identity):
        words = sum(p.numel() for p in DualEncoder(REPORT, None).text.parameters())
    assert round(words / 1e6) == 354 and (REPORT.embedding, REPORT.tau) == (1024, 0.05)


# --- Published weights ---

def test_published_weights_are_found_offline(theirs, roberta, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(PRESETS, "report", SMALL)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints/passt-s-f128-p16-s16-ap.468.pt"
    place.parent.mkdir(parents=True)
    torch.save(theirs.passt.state_dict(), place)
    capfd.readouterr()
    model = DualEncoder.create("report", "pretrained", [], str(roberta))
    assert capfd.readouterr() == ("", "")
    for ours, other in ((model.audio.passt, theirs.passt), (model.text.roberta, theirs.roberta)):
        for name, weights in ours.state_dict().items():
            assert torch.equal(weights, other.state_dict()[name]), name


def test_what_cannot_be_reached_is_said_in_one_line_in_seconds(tmp_path, monkeypatch):
    fresh = types.ModuleType("fresh")  # it remembers whether the hub answers
    exec(Path(text.__file__).read_text(), vars(fresh))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    huggingface_hub.close_session()
    begin = time.monotonic()
    for load, way in ((fresh.load_tokenizer, "--tokenizer"), (fresh.published_roberta, "tiny")):
        with pytest.raises(InputError, match=f"^no-such: cannot be fetched .*{way}.*$"):
            load("no-such")
    with pytest.raises(InputError, match=f"^PaSST.*{tmp_path}/hub/checkpoints.*--init random$"):
        published_passt()
    assert time.monotonic() - begin < 5


def test_other_models_and_tokenizers_are_refused(theirs, tmp_path):
    some = {n: w for n, w in theirs.roberta.state_dict().items() if "layer.1" not in n}
    theirs.roberta.save_pretrained(tmp_path, state_dict=some)
    with pytest.raises(InputError, match=f"^{tmp_path}: is no RoBERTa: lacks encoder.layer.1"):
        text.published_roberta(str(tmp_path))
    with pytest.raises(InputError, match="not RoBERTa's"):
        text.set_truncation(tokenizers.Tokenizer(tokenizers.models.BPE()))


# --- Python, as users write it ---

def test_one_alone_is_a_list_of_one_and_generators_are_taken(tiny_model, tmp_path):
    sound = (noise(2) * 32_768).astype(np.int16)
    path, floats = write_wav(tmp_path / "a.wav", sound / 32_768), torch.from_numpy(sound / 32_768)
    embedded = tiny_model.train().embed_audio(each for each in (path, sound, floats))
    assert embedded.shape == (3, 1024) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    for alone in (path, str(path), sound, floats):
        one = tiny_model.embed_audio(alone)
        torch.testing.assert_close(one.expand(3, -1), embedded, rtol=0, atol=1e-5)
    words = tiny_model.train().embed_text(line for line in SENTENCES * 30)  # several batches
    alone = torch.cat([tiny_model.embed_text(sentence) for sentence in SENTENCES])
    torch.testing.assert_close(words, alone.repeat(30, 1), rtol=0, atol=1e-5)
    assert tiny_model.embed_text([]).shape == tiny_model.embed_audio([]).shape == (0, 1024)


def test_waveforms_of_another_rate_are_resampled_and_the_first_30_s_count(tiny_model):
    sound = np.repeat(noise(31, rate=11_025), 4)  # at 44.1 kHz: soft above 5.5 kHz
    whole, start = tiny_model.embed_audio([sound, sound[: 30 * 44_100]], rate=44_100)
    same, other = tiny_model.embed_audio([resample(sound, 44_100), sound])
    assert whole @ start > 0.99999 and whole @ same > 0.99999 and whole @ other < 0.99
    loud, full = tiny_model.embed_audio([99 * sound, sound / np.abs(sound).max()])
    assert loud @ full > 0.99999


@pytest.mark.parametrize("shape", [(100, 2), (2, 100), (0,), ()])
def test_what_is_no_waveform_is_refused_with_what_is_wanted(tiny_model, shape):
    for sound in (np.zeros(shape, np.float32), torch.zeros(shape), [np.zeros(shape, np.int16)]):
        with pytest.raises(InputError, match=r"shape \(.*\).* \(n,\) is needed"):
            tiny_model.embed_audio(sound)
    with pytest.raises(InputError, match="finite floats"):
        tiny_model.embed_audio(np.array([0, np.nan]))
    silence = tiny_model.embed_audio(np.zeros(1)), tiny_model.embed_text("...")
    torch.testing.assert_close(torch.cat(silence).norm(dim=1), torch.ones(2))


# --- Checkpoints, device, precision ---

def test_a_checkpoint_needs_nothing_else(tiny_model, tmp_path, roberta):
    best = tmp_path / "run" / "best.pt"
    best.parent.mkdir()
    torch.save(tiny_model.checkpoint(), best)
    for path in (tmp_path / "run", str(best)):
        loaded = DualEncoder.load(path)
        assert loaded.config == tiny_model.config and not loaded.training
        assert torch.equal(loaded.embed_audio(noise(1)), tiny_model.embed_audio(noise(1)))
        assert torch.equal(loaded.embed_text(CAPTIONS), tiny_model.embed_text(CAPTIONS))
    assert newest_checkpoint(tmp_path) == best and os.listdir(tmp_path / "run") == ["best.pt"]
    loaded = DualEncoder.load(path, tokenizer=roberta)
    assert loaded.tokenizer.to_str() == text.load_tokenizer(roberta).to_str()
    trained_on = ["mine@1/all", "audiocaps/train", "clotho/x"]
    loaded.trained_on, loaded.stage = trained_on, "distilled"
    torch.save(loaded.checkpoint(), best)
    loaded = DualEncoder.load(best)
    assert (loaded.trained_on, loaded.stage) == (trained_on, "distilled")


def test_no_checkpoint_is_said_and_nothing_in_it_is_executed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = type("Attack", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    good = tiny_model.checkpoint()
    for content, reason in (
        ([attack], "no checkpoint"), ([1, 2], "no checkpoint"),
        ({"state_dict": {"scale": 1}}, "scale"),
        (good | {"model": {}}, "Missing key"),
        (good | {"config": good["config"] | {"depth": 2}}, "depth"),
        (good | {"config": good["config"] | {"audio_width": 48}}, "size mismatch"),
    ):
        torch.save(content, "a.pt")
        with pytest.raises(InputError, match=f"^a.pt: .*{reason}.*$"):
            DualEncoder.load("a.pt")
    os.truncate("a.pt", 9999)
    for line in ("a.pt: is damaged.*", "none.pt: no such checkpoint file"):
        with pytest.raises(InputError, match=f"^{line}$"):
            DualEncoder.load(line.partition(":")[0])
    assert os.listdir() == ["a.pt"]


def test_device_and_precision(tiny_model, monkeypatch):
    cpu, cuda, half = choose_device("cpu"), torch.device("cuda"), [torch.bfloat16, torch.float16]
    with pytest.raises(InputError, match="--device cuda:99: cannot be used here"):
        choose_device("cuda:99")
    names = "auto", "fp32", "bf16", "fp16"
    assert [choose_precision(name, cpu) for name in names] == [None, None, *half]
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **options: has)
        assert choose_precision("auto", cuda) == half[not has]
    exact = tiny_model.embed_audio(noise(1))
    monkeypatch.setattr(tiny_model, "precision", torch.bfloat16)
    near = tiny_model.embed_audio(noise(1))
    assert (exact @ near.T).item() > 0.99 and not torch.equal(exact, near)
