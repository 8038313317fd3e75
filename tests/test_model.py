"""The dual encoder as its users call it."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

import evaluate
from dualenc import InputError
from dualenc.config import PRESETS, DualEncoderConfig
from dualenc.model import DualEncoder
from dualenc.text import tokenize

CAPTIONS = ["A dog barks.", "rain", "A bell rings, then rain falls on a tin roof for a while"]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_report_preset_has_the_reports_sizes():
    def shallow(depth):
        config = dataclasses.replace(PRESETS["report"], audio_depth=depth, text_depth=depth)
        return DualEncoder(config, Tokenizer(BPE()))

    one, two = shallow(1), shallow(2)  # the other layers are like the second

    def full(part, depth):
        sizes = [parameters(getattr(model, part)) for model in (one, two)]
        return sizes[0] + (depth - 1) * (sizes[1] - sizes[0])

    classifiers = 2 * (768 * 527 + 527) + 2 * 768  # two linear ones, a LayerNorm: not used here
    # 86.1 M; the report says 86.2.
    assert full("audio", PRESETS["report"].audio_depth) + classifiers == 86_122_270
    assert round(full("text", PRESETS["report"].text_depth) / 1e6) == 354
    assert one.audio_projection.weight.shape == (1024, 768)
    assert one.text_projection.weight.shape == (1024, 1024)


def test_embeddings_have_unit_norm_and_keep_their_order(tiny, noise):
    embedded = tiny.embed_audio(noise)
    assert embedded.shape == (len(noise), 1024) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(noise)))
    backwards = tiny.embed_audio(reversed(noise))
    torch.testing.assert_close(backwards.flip(0), embedded, rtol=0, atol=1e-5)
    one_by_one = torch.cat([tiny.embed_audio([waveform]) for waveform in noise])
    torch.testing.assert_close(one_by_one, embedded, rtol=0, atol=1e-5)


def test_a_clip_is_the_mean_over_its_segments(tiny):
    """Against the baseline's way: all padded to 30 s, three segments computed, the first kept."""
    rng = np.random.default_rng(1)
    for seconds, kept in ((4, 1), (10, 1), (10.2, 2), (23, 3), (30, 3), (35, 3)):
        waveform = (0.1 * rng.standard_normal(int(seconds * 32_000))).astype(np.float32)
        padded = np.zeros(960_000, np.float32)
        padded[: len(waveform)] = waveform[:960_000]
        with torch.inference_mode():
            features = tiny.audio(torch.from_numpy(padded).view(3, 320_000))[:kept].mean(0)
            wanted = torch.nn.functional.normalize(tiny.audio_projection(features), dim=0)
        torch.testing.assert_close(tiny.embed_audio([waveform])[0], wanted, rtol=0, atol=1e-5)


def test_only_segments_that_hold_sound_are_computed(tiny):
    seen = []
    tiny.audio.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for seconds in (10, 23):
        tiny.embed_audio([np.zeros(seconds * 32_000, np.float32)])
    assert seen == [1, 3]


def test_captions_do_not_depend_on_their_company(tiny):
    together = tiny.embed_text(CAPTIONS)
    alone = torch.cat([tiny.embed_text([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert tiny.embed_text([]).shape == (0, 1024)
    many = tiny.embed_text(CAPTIONS * 50)  # several batches
    torch.testing.assert_close(many.view(50, 3, -1), alone.expand(50, 3, -1), rtol=0, atol=1e-5)


def test_files_and_waveforms_embed_alike(tiny, write_sound, noise):
    waveform = (noise[2] * 32_768).astype(np.int16)
    path = write_sound("a.wav", waveform)
    floats = waveform.astype(np.float32) / 32_768
    embedded = tiny.embed_audio([path, str(path), waveform, floats, torch.from_numpy(floats)])
    for other in embedded[1:]:
        torch.testing.assert_close(other, embedded[0], rtol=0, atol=1e-6)


def test_embedding_leaves_the_mode_as_it_was(tiny):
    tiny.train()
    first, second = tiny.embed_text(["rain"]), tiny.embed_text(["rain"])
    assert tiny.training and torch.equal(first, second)  # without dropout


@pytest.mark.parametrize("waveform", [np.zeros((2, 100)), np.zeros(0)])
def test_what_is_no_waveform_is_refused(tiny, waveform):
    with pytest.raises(InputError, match="waveform of shape"):
        tiny.embed_audio([waveform])


def test_a_checkpoint_needs_nothing_else(tiny, noise, tmp_path):
    tiny.trained_on = ["clotho/development"]
    tiny.save(tmp_path / "model.pt")
    loaded = DualEncoder.load(tmp_path / "model.pt")
    assert loaded.config == tiny.config and loaded.trained_on == tiny.trained_on
    assert not loaded.training
    assert torch.equal(loaded.embed_audio(noise[:3]), tiny.embed_audio(noise[:3]))
    assert torch.equal(loaded.embed_text(CAPTIONS), tiny.embed_text(CAPTIONS))
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt"]


def test_a_tokenizer_can_be_replaced(tiny, tmp_path):
    tiny.save(tmp_path / "model.pt")
    other = DualEncoder.create("tiny", "random", ["quite other words " * 3])
    other.tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = DualEncoder.load(tmp_path / "model.pt", tokenizer=tmp_path / "tokenizer.json")
    assert torch.equal(tokenize(loaded.tokenizer, CAPTIONS), tokenize(other.tokenizer, CAPTIONS))


def test_a_temperature_can_be_set_and_learnt(tiny):
    assert tiny.tau.item() == pytest.approx(0.05) and not tiny.tau.requires_grad
    tiny.set_temperature(0.1, learn=True)
    assert tiny.tau.item() == pytest.approx(0.1) and tiny.tau.requires_grad
    assert tiny.config.tau == 0.1 and tiny.config.learn_tau


def test_loading_is_strict_and_names_the_fault(tiny, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint = tiny.checkpoint()
    weights = dict(checkpoint["model"])
    weights["extra"] = weights.pop("tau")
    torch.save(checkpoint | {"model": weights}, path)
    with pytest.raises(InputError, match="(?s)lacks tau.*extra, which is unknown"):
        DualEncoder.load(path)
    wider = dataclasses.asdict(dataclasses.replace(tiny.config, audio_width=48))
    torch.save(checkpoint | {"config": wider}, path)
    with pytest.raises(InputError, match="has shape"):
        DualEncoder.load(path)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_embed_alike(tiny):
    plain = tiny.embed_text(CAPTIONS)
    torch._dynamo.utils.counters.clear()
    tiny.compile_blocks()
    torch.testing.assert_close(tiny.embed_text(CAPTIONS), plain, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled
    torch._dynamo.reset()


def test_where_nothing_can_be_compiled_one_line_says_so(command, tiny, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler\nand a long story")

    tiny.save("a.pt")
    monkeypatch.setattr(torch, "compile", fail)
    status, printed = command(evaluate, "--checkpoint", "a.pt", "--compile")
    reason = "--compile: cannot be done here (no C++ compiler); leave it out"
    assert status == 2 and printed == f"evaluate.py: {reason}\n"


def test_config_is_plain_numbers():
    assert DualEncoderConfig() == PRESETS["report"]
    assert set(dataclasses.asdict(PRESETS["tiny"])) == set(dataclasses.asdict(PRESETS["report"]))
