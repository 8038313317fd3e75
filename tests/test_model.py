"""The dual encoder as its users call it; the sizes of the report's; devices and precisions."""

import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from conftest import CAPTIONS, noise, write_wav
from hear21passt.models.passt import PaSST
from hear21passt.models.preprocess import AugmentMelSTFT
from torch import nn
from transformers import RobertaConfig, RobertaModel

import dualenc
from dualenc import DualEncoder, InputError, text
from dualenc.audio import AudioTower
from dualenc.decoding import INT16_SCALE, load_audio, resample, to_int16
from dualenc.model import PRESETS, choose_device, choose_precision

REPORT = PRESETS["report"]


# --- The report's sizes ---

def parameters(module: nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


def report_tower(depth: int) -> AudioTower:
    return AudioTower(
        REPORT.audio_width, depth, REPORT.audio_heads, REPORT.patch, REPORT.patchout
    )


def test_passt_has_the_reports_86_2_million_parameters():
    one_layer = parameters(report_tower(1))
    layer = parameters(report_tower(2)) - one_layer
    # The classifiers, which are not used here: two linear maps to 527 classes and a LayerNorm.
    classifiers = 2 * (768 * 527 + 527) + 2 * 768
    assert one_layer + (REPORT.audio_depth - 1) * layer + classifiers == 86_122_270


def test_roberta_has_the_reports_354_million_parameters(monkeypatch):
    monkeypatch.setattr("dualenc.model.AudioTower", nn.Identity)
    with torch.device("meta"):
        model = DualEncoder(REPORT, None)
    assert round(parameters(model.text) / 1e6) == 354
    # As in roberta-large's own configuration, which differs from the library's default.
    assert model.text.roberta.config.layer_norm_eps == 1e-5
    dropouts = [module.p for module in model.text.modules() if isinstance(module, nn.Dropout)]
    assert set(dropouts) == {0.2}  # the baseline's, of hidden states and of attention


def test_the_tiny_presets_matrices_are_scaled_to_its_width(tiny_model):
    # Both libraries draw with a standard deviation of 0.02.
    attention = tiny_model.text.roberta.encoder.layer[0].attention.self.query.weight
    assert attention.std().item() == pytest.approx(0.02 * (1024 / 96) ** 0.5, rel=0.05)
    attention = tiny_model.audio.passt.blocks[0].attn.qkv.weight
    assert attention.std().item() == pytest.approx(0.02 * (768 / 96) ** 0.5, rel=0.05)


def test_the_shared_space_has_the_baselines_width_and_temperature():
    assert REPORT.embedding == 1024
    assert REPORT.tau == 0.05


# --- The audio tower beside hear21passt's own parts ---

@pytest.fixture(scope="module", params=[True, False], ids=["training", "evaluation"])
def beside_hear21passt(request) -> types.SimpleNamespace:
    """Make the baseline's log-mel and a small PaSST, and our tower with the same weights."""
    torch.manual_seed(0)
    mel = AugmentMelSTFT(freqm=0, timem=0, fmin_aug_range=10, fmax_aug_range=2000)
    passt = PaSST(
        img_size=(128, 1000), patch_size=16, stride=16, embed_dim=128, depth=2, num_heads=2,
        distilled=True, s_patchout_t=15, s_patchout_f=2,
    )
    weights = passt.state_dict()
    without_classifiers = {n: w for n, w in weights.items() if not n.startswith("head")}
    tower = AudioTower(128, 2, 2, REPORT.patch, REPORT.patchout)
    tower.passt.load_state_dict(without_classifiers)
    return types.SimpleNamespace(
        mel=mel.train(request.param),
        passt=passt.train(request.param),
        tower=tower.train(request.param),
        segments=torch.randint(-3000, 3000, (2, 320_000), dtype=torch.int16),
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:stft with return", "ignore:.*autocast")  # hear21passt's
def test_log_mel_equals_hear21passts_with_jitter(beside_hear21passt):
    waveforms = beside_hear21passt.segments / INT16_SCALE
    torch.manual_seed(1)
    expected = beside_hear21passt.mel(waveforms)
    torch.manual_seed(1)
    log_mel = beside_hear21passt.tower.mel(waveforms)
    torch.testing.assert_close(log_mel, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:stft with return", "ignore:.*autocast")  # hear21passt's
def test_features_equal_hear21passts_with_jitter_and_patchout(beside_hear21passt):
    segments = beside_hear21passt.segments
    torch.manual_seed(1)
    log_mel = beside_hear21passt.mel(segments / INT16_SCALE)
    _, expected = beside_hear21passt.passt(log_mel[:, None])
    torch.manual_seed(1)
    features = beside_hear21passt.tower(segments)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


# --- What a user gives, and gets ---

def test_paths_arrays_and_tensors_of_one_sound_embed_alike(tiny_model, tmp_path):
    int16 = (noise(2) * INT16_SCALE).astype(np.int16)
    path = write_wav(tmp_path / "a.wav", int16 / INT16_SCALE)
    tensor = torch.from_numpy(int16 / INT16_SCALE)
    one, *others = tiny_model.embed_audio([path, str(path), int16, tensor, tensor[None]])
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_one_sound_alone_is_a_list_of_one(tiny_model, tmp_path):
    sound = noise(2)
    path = write_wav(tmp_path / "a.wav", sound)
    for alone in (path, str(path), sound, torch.from_numpy(sound)):
        assert torch.equal(tiny_model.embed_audio(alone), tiny_model.embed_audio([alone]))


def test_a_waveform_of_shape_1_n_is_that_waveform(tiny_model):
    sound = noise(2)
    assert torch.equal(tiny_model.embed_audio(sound[None]), tiny_model.embed_audio([sound]))


def test_a_generator_of_more_sounds_than_are_embedded_at_a_time_keeps_their_order(tiny_model):
    sounds = [noise(1 + i / 4, seed=i) for i in range(10)]
    alone = torch.cat([tiny_model.embed_audio(sound) for sound in sounds])
    together = tiny_model.embed_audio(sound for sound in sounds)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_captions_of_any_length_keep_their_order(tiny_model):
    captions = [" ".join(["bark rain sing"] * (i % 7)) + f" {i}" for i in range(80)]
    alone = torch.cat([tiny_model.embed_text(caption) for caption in captions])
    together = tiny_model.embed_text(caption for caption in captions)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_nothing_embeds_as_no_rows(tiny_model):
    assert tiny_model.embed_text([]).shape == (0, 1024)
    assert tiny_model.embed_audio([]).shape == (0, 1024)


def test_silence_and_an_empty_caption_have_embeddings_of_unit_norm(tiny_model):
    embeddings = torch.cat([tiny_model.embed_audio(np.zeros(1)), tiny_model.embed_text("...")])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_embeddings_are_ordinary_tensors(tiny_model):
    for embeddings in (tiny_model.embed_audio([noise(1)] * 2), tiny_model.embed_text(CAPTIONS)):
        assert embeddings.dtype == torch.float32
        assert not embeddings.requires_grad
        embeddings += 1
        probe = nn.Linear(1024, 2)
        probe(embeddings).sum().backward()  # refused where they are inference tensors
        torch.testing.assert_close(probe.weight.grad[0], embeddings.sum(dim=0))


# --- The model's mode ---

@pytest.fixture
def in_training(tiny_model) -> Iterator[DualEncoder]:
    """Return a model in training mode but for its audio tower, as if that were frozen."""
    tiny_model.train()
    tiny_model.audio.eval()
    yield tiny_model
    tiny_model.eval()


def modes_of(model: DualEncoder) -> list[bool]:
    return [module.training for module in model.modules()]


def test_sounds_are_embedded_without_patchout_and_jitter(tiny_model, in_training):
    in_training.audio.train()
    embedding = in_training.embed_audio(noise(3))
    assert torch.equal(in_training.embed_audio(noise(3)), embedding)
    tiny_model.eval()
    assert torch.equal(tiny_model.embed_audio(noise(3)), embedding)


def test_captions_are_embedded_without_dropout(tiny_model, in_training):
    embeddings = in_training.embed_text(CAPTIONS)
    assert torch.equal(in_training.embed_text(CAPTIONS), embeddings)
    tiny_model.eval()
    assert torch.equal(tiny_model.embed_text(CAPTIONS), embeddings)


def test_embedding_leaves_each_module_in_its_mode(in_training):
    before = modes_of(in_training)
    in_training.embed_text(CAPTIONS)
    in_training.embed_audio(noise(1))
    assert modes_of(in_training) == before


def test_a_sound_that_cannot_be_read_leaves_each_module_in_its_mode(in_training):
    before = modes_of(in_training)
    with pytest.raises(InputError):
        in_training.embed_audio("none.wav")
    assert modes_of(in_training) == before


def test_embedding_leaves_a_model_in_evaluation_mode(tiny_model):
    tiny_model.embed_text(CAPTIONS)
    assert not any(modes_of(tiny_model))


# --- Rates, lengths and levels ---

def test_waveforms_of_another_rate_are_resampled(tiny_model):
    sound = np.repeat(noise(5, rate=11_025), 4)  # at 44.1 kHz: soft above 5.5 kHz
    resampled = tiny_model.embed_audio(sound, rate=44_100)
    expected = tiny_model.embed_audio(resample(sound, 44_100))
    not_resampled = tiny_model.embed_audio(sound)
    torch.testing.assert_close(resampled, expected, rtol=0, atol=1e-5)
    assert (resampled @ not_resampled.T).item() < 0.99


def test_a_file_tells_its_own_rate(tiny_model, tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(2))
    expected = tiny_model.embed_audio(path)
    assert torch.equal(tiny_model.embed_audio(path, rate=44_100), expected)


def test_a_file_embeds_as_its_waveform_in_the_cache_to_the_last_bit(tiny_model, tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(2), rate=44_100)  # Resampling makes no int16.
    cached = to_int16(load_audio(path))
    assert torch.equal(tiny_model.embed_audio(path), tiny_model.embed_audio(cached))


def test_the_first_30_s_count_at_any_rate(tiny_model):
    for rate in (16_000, 32_000, 44_100):
        sound = noise(31, rate=rate)
        whole, start = tiny_model.embed_audio([sound, sound[: 30 * rate]], rate=rate)
        torch.testing.assert_close(whole, start, rtol=0, atol=1e-5)


def test_each_block_above_full_scale_is_divided_by_its_own_peak(tiny_model):
    quiet = noise(5, seed=1)
    loud = 99 * noise(10, seed=2)
    expected = np.concatenate([loud / np.abs(loud).max(), quiet])
    embeddings = tiny_model.embed_audio([np.concatenate([loud, quiet]), expected])
    torch.testing.assert_close(embeddings[0], embeddings[1], rtol=0, atol=1e-5)


def test_a_whole_rate_of_any_type_is_a_rate(tiny_model):
    sound = noise(1)
    expected = tiny_model.embed_audio(sound, rate=44_100)
    for rate in (44_100.0, np.int64(44_100), np.float32(44_100), torch.tensor(44_100)):
        assert torch.equal(tiny_model.embed_audio(sound, rate=rate), expected)


@pytest.mark.parametrize("rate", [7, 1_000_000, 3_000_000_000])
def test_a_waveform_too_short_to_be_resampled_is_refused(tiny_model, rate):
    with pytest.raises(InputError, match=f"^rate {rate}: a waveform of 50 samples"):
        tiny_model.embed_audio(noise(1)[:50], rate=rate)


@pytest.mark.parametrize("rate", [0, -1, 44_100.5, float("nan"), float("inf"), "44100", None])
def test_a_rate_that_is_no_positive_number_is_refused(tiny_model, rate):
    with pytest.raises(InputError, match="^rate .*: a whole number of Hz above 0 is needed$"):
        tiny_model.embed_audio(noise(1), rate=rate)


@pytest.mark.parametrize("shape", [(100, 2), (2, 100), (1, 0), (0,), ()])
def test_what_is_no_waveform_is_refused_with_what_is_wanted(tiny_model, shape):
    for sound in (np.zeros(shape, np.float32), torch.zeros(shape), [np.zeros(shape, np.int16)]):
        with pytest.raises(InputError, match=r"shape \(.*\).* \(n,\) is needed"):
            tiny_model.embed_audio(sound)


@pytest.mark.parametrize("sound", [np.array([0, np.nan]), np.array([0.0, np.inf]), np.arange(9)])
def test_samples_that_are_not_finite_floats_or_int16_are_refused(tiny_model, sound):
    with pytest.raises(InputError, match="int16, or finite floats"):
        tiny_model.embed_audio(sound)


# --- The tiny preset's own tokenizer ---

def test_a_trained_tokenizer_is_of_robertas_form():
    tokenizer = text.train_bpe(["A DOG!"] * 5, 300)
    shorter, longer = text.tokenize(tokenizer, ["a dog", "a dog dog"]).tolist()
    assert (shorter[0], *shorter[-2:]) == (0, 2, 1)  # <s>, </s> and <pad>
    assert (longer[0], longer[-1]) == (0, 2)


def test_a_tokenizer_that_was_saved_with_padding_does_not_pad():
    tokenizer = text.train_bpe(["A DOG!"] * 5, 300)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=32)
    text.set_truncation(tokenizer, "a folder")
    assert text.tokenize(tokenizer, ["a dog"]).shape == (1, 4)


def test_a_trained_tokenizer_knows_the_words_of_its_captions():
    tokenizer = text.train_bpe(["A DOG!"] * 5, 300)
    assert len(tokenizer.encode("a dog").tokens) == 4  # "a", " dog", <s> and </s>


# --- Published weights that cannot be had ---

@pytest.mark.parametrize("load, remedy", [
    ("load_tokenizer", "--tokenizer"), ("published_roberta", "tiny"),
])
def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(monkeypatch, load, remedy):
    fresh = types.ModuleType("fresh")  # The module remembers whether the hub answers.
    exec(Path(text.__file__).read_text(), vars(fresh))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    huggingface_hub.close_session()
    began = time.monotonic()
    with pytest.raises(InputError, match=f"^no-such: cannot be fetched .*{remedy}.*$"):
        getattr(fresh, load)("no-such")
    assert time.monotonic() - began < 15  # s; transformers alone would retry for 23 or 47


def test_a_roberta_that_lacks_weights_is_refused(tmp_path):
    config = RobertaConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=256,
    )
    roberta = RobertaModel(config, add_pooling_layer=False)
    weights = roberta.state_dict()
    some = {name: weights[name] for name in weights if "layer.1" not in name}
    roberta.save_pretrained(tmp_path, state_dict=some)
    with pytest.raises(InputError, match=f"^{tmp_path}: is no RoBERTa: lacks encoder.layer.1"):
        text.published_roberta(str(tmp_path))


def test_a_tokenizer_that_is_not_robertas_is_refused():
    with pytest.raises(InputError, match="^bert: its tokenizer is not RoBERTa's"):
        text.set_truncation(tokenizers.Tokenizer(tokenizers.models.BPE()), "bert")


# --- Device and precision ---

@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match=f"^device {name}: cannot be used here .*try cpu$"):
        choose_device(name)


def test_each_of_torchruns_processes_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "98")
    with pytest.raises(InputError, match="^device cuda:98: cannot be used here"):
        choose_device("cuda")


def test_a_model_is_not_loaded_onto_a_device_that_is_not_there(tiny_model, tmp_path):
    torch.save(tiny_model.checkpoint(), tmp_path / "best.pt")
    with pytest.raises(InputError, match="^device cuda:99: cannot be used here .*try cpu$"):
        DualEncoder.load(tmp_path, device="cuda:99")


def test_auto_is_the_cpu_where_there_is_no_gpu(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [])
    torch.save(tiny_model.checkpoint(), tmp_path / "best.pt")
    capfd.readouterr()
    assert DualEncoder.load(tmp_path, device="auto").device == torch.device("cpu")
    assert capfd.readouterr().err == ""


def test_auto_passes_on_why_a_gpu_that_is_there_is_not_used(monkeypatch, capfd):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "nvidia0"])
    assert choose_device("auto") == torch.device("cpu")
    assert capfd.readouterr().err == (
        "a GPU is here, but torch cannot use it: The NVIDIA driver on your system is too old\n"
    )


@pytest.mark.parametrize("name, expected", [
    ("auto", None), ("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16),
])
def test_a_cpu_computes_in_fp32_unless_told_otherwise(name, expected):
    assert choose_precision(name, torch.device("cpu")) == expected


@pytest.mark.parametrize("computes_bf16, expected", [
    (True, torch.bfloat16), (False, torch.float16),
])
def test_a_gpu_computes_in_bf16_where_it_can_without_emulation(
    monkeypatch, computes_bf16, expected
):
    def is_supported(including_emulation=True):  # torch's, on a GPU that emulates it or has it
        return computes_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_a_warning_says_that_fp16_is_slow_on_a_cpu(capfd):
    choose_precision("fp16", torch.device("cpu"))
    assert "fp16 is slow on most CPUs" in capfd.readouterr().err


@pytest.mark.parametrize("name, device", [("fp16", "cuda"), ("bf16", "cpu")])
def test_other_precisions_draw_no_warning(capfd, name, device):
    choose_precision(name, torch.device(device))
    assert capfd.readouterr().err == ""


def test_the_towers_compute_in_the_models_precision(tiny_model, monkeypatch):
    exact = tiny_model.embed_audio(noise(1))
    monkeypatch.setattr(tiny_model, "precision", torch.bfloat16)
    near = tiny_model.embed_audio(noise(1))
    assert (exact @ near.T).item() > 0.99
    assert not torch.equal(exact, near)


# --- The package ---

def test_the_package_tells_its_version():
    assert dualenc.__version__[0].isdigit()


def test_the_package_tells_type_checkers_that_it_has_types():
    assert Path(dualenc.__file__).with_name("py.typed").exists()
