"""Checkpoints: names and files, fetching from a local server, salsa's and the baseline's files."""

import http.server
import itertools
import math
import os
import string
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, noise, touch
from hear21passt.models.passt import PaSST
from hear21passt.models.preprocess import AugmentMelSTFT
from torch.nn.functional import normalize
from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

from dualenc import DualEncoder, InputError, checkpoints, text
from dualenc.checkpoints import (
    PASST, PUBLISHED, checkpoint_file, newest_checkpoint, published_passt, read_checkpoint,
    save_atomically,
)
from dualenc.model import PRESETS, DualEncoderConfig

pytestmark = pytest.mark.filterwarnings("ignore:stft with return", "ignore:.*autocast")  # theirs
# Sizes that are not the report's, each different from the others; heads are 64 wide.
AUDIO_SIZES = dict(embed_dim=128, depth=3, num_heads=2)
TEXT_SIZES = dict(
    vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
    intermediate_size=256, max_position_embeddings=100,
)
PATCH = (32, 16)
SENTENCES = [
    "A dog barks, twice; then it's quiet.", "Rain!", "Café – “quiet” 🐕", "...",
    "Birds sing while " + "a very long train " * 12 + "passes by",
]
PASST_NAME = "audio_embedding_model.model.model."
# How the names of the weights begin: of PaSST, RoBERTa and the two linear heads.
PREFIXES = {
    "baseline": (PASST_NAME, "text_embedding_model.", "audio_projection.", "text_projection."),
    "salsa": (PASST_NAME, "sentence_embedding_model.", "project_audio.0.", "project_sentence.0."),
}
NOT_USED = {
    "timing_tau": torch.ones(1), "audio_token": torch.ones(1, 1, 128),
    "posencode.pe": torch.ones(192, 128), "audio_sequence.0.norm1.weight": torch.ones(128),
    "audio_output_projection.weight": torch.ones(128, 128),
}


# --- The original models, in small, and their files ---

@pytest.fixture(scope="module")
def original():
    """Put the parts of both published models together from the libraries that they use."""
    torch.manual_seed(0)
    mel = AugmentMelSTFT(freqm=0, timem=0, fmin_aug_range=10, fmax_aug_range=2000)
    passt = PaSST(
        img_size=(128, 1000), patch_size=PATCH, stride=PATCH, distilled=True, **AUDIO_SIZES
    )
    roberta = RobertaModel(RobertaConfig(**TEXT_SIZES, type_vocab_size=1), add_pooling_layer=False)
    return types.SimpleNamespace(
        mel=mel.eval(), passt=passt.eval(), roberta=roberta.eval(),
        audio=torch.nn.Linear(128, 512), text=torch.nn.Linear(64, 512),
    )


@pytest.fixture(scope="module")
def roberta_folder(original, tmp_path_factory):
    """Write the RoBERTa and its tokenizer into a folder by save_pretrained."""
    folder = tmp_path_factory.mktemp("roberta")
    original.roberta.save_pretrained(folder)
    tokenizer = DualEncoder.create("tiny", "random", SENTENCES).tokenizer
    RobertaTokenizer(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def original_weights(original, form: str) -> dict[str, torch.Tensor]:
    """Return the weights under the names that stand in a file of that form."""
    parts = (original.passt, original.roberta, original.audio, original.text)
    weights = {"tau": torch.tensor([-0.07])}
    for prefix, part in zip(PREFIXES[form], parts, strict=True):
        for name, values in part.state_dict().items():
            weights[prefix + name] = values
    if form == "salsa":
        weights |= NOT_USED
    return weights


@pytest.fixture(params=["salsa", "baseline"])
def published_file(request, original, tmp_path):
    path = tmp_path / f"{request.param}.ckpt"
    torch.save({"state_dict": original_weights(original, request.param)}, path)
    return path


@torch.no_grad()
def by_the_original(original, sounds, sentences, tokenizer):
    """Embed clips padded to three segments, leaving out silent ones; words padded to 32 tokens."""
    features = []
    for sound in sounds:
        padded = np.pad(sound, (0, 960_000 - len(sound)))
        mel = original.mel(torch.from_numpy(padded).view(3, 320_000))[:, None]
        segments_with_sound = math.ceil(len(sound) / 320_000)
        features.append(original.passt(mel)[1][:segments_with_sound].mean(0))
    no_punctuation = str.maketrans("", "", string.punctuation)
    plain = [sentence.lower().translate(no_punctuation) for sentence in sentences]
    tokens = tokenizer(
        plain, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    first_tokens = original.roberta(**tokens)[0][:, 0]
    audio = normalize(original.audio(torch.stack(features)), dim=1)
    return audio, normalize(original.text(first_tokens), dim=1)


def test_a_published_file_embeds_as_its_original_does(published_file, original, roberta_folder):
    model = DualEncoder.load(published_file, tokenizer=roberta_folder)
    sounds = [noise(seconds, seed=1) for seconds in (4, 10, 13.7, 24.03)]
    tokenizer = RobertaTokenizer.from_pretrained(roberta_folder)
    audio, words = by_the_original(original, sounds, SENTENCES, tokenizer)
    torch.testing.assert_close(model.embed_audio(sounds), audio, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.embed_text(SENTENCES), words, rtol=0, atol=1e-5)


def test_sizes_follow_from_the_weights(published_file):
    assert read_checkpoint(published_file)["config"] == {
        "audio_width": 128, "audio_depth": 3, "audio_heads": 2, "patch": (32, 16), **TEXT_SIZES,
        "embedding": 512, "tau": pytest.approx(0.07),  # both divide by the absolute value
    }


def test_a_published_models_temperature_is_kept(published_file, roberta_folder):
    model = DualEncoder.load(published_file, tokenizer=roberta_folder)
    assert model.tau.item() == pytest.approx(0.07)


@pytest.mark.parametrize("form, stage", [("salsa", "distilled"), ("baseline", "contrastive")])
def test_salsas_model_is_a_student_and_the_baselines_is_not(original, tmp_path, form, stage):
    torch.save({"state_dict": original_weights(original, form)}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["stage"] == stage


@pytest.mark.parametrize("settings, others", [
    (None, ["audiocaps/train", "wavcaps/train"]),  # a file without hyperparameters
    (dict(train_on="wavcaps", audiocaps={}, wavcaps={}), ["audiocaps/train", "wavcaps/train"]),
    (dict(audiocaps=True, wavcaps=False), ["audiocaps/train"]),
    (dict(audiocaps=False, wavcaps=True), ["wavcaps/train"]),
])
def test_clotho_was_trained_on_and_so_were_the_others_unless_the_file_says_not(
    original, tmp_path, settings, others
):
    saved = {"state_dict": original_weights(original, "salsa")}
    if settings is not None:
        saved["hyper_parameters"] = settings
    torch.save(saved, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["trained_on"] == ["clotho/development", *others]


def test_weights_of_a_compiled_model_are_read_as_those_of_a_plain_one(original, tmp_path):
    weights = original_weights(original, "baseline")
    compiled = {}
    for name, values in weights.items():
        name = name.replace("embedding_model.", "embedding_model._orig_mod.")
        compiled[f"_orig_mod.{name}"] = values
    torch.save({"state_dict": weights}, tmp_path / "plain.ckpt")
    torch.save({"state_dict": compiled}, tmp_path / "compiled.ckpt")
    plain = read_checkpoint(tmp_path / "plain.ckpt")["model"]
    assert read_checkpoint(tmp_path / "compiled.ckpt")["model"].keys() == plain.keys()


@pytest.mark.parametrize("name", ["project_audio.2.weight", "scale", "tau_of_text"])
def test_a_weight_that_is_not_known_is_refused_by_its_name(original, tmp_path, name):
    weights = original_weights(original, "salsa") | {name: torch.ones(1)}
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=f"a.ckpt: .*{name}"):
        DualEncoder.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name, our_name", [
    ("project_audio.0.weight", "audio_projection.weight"),
    ("project_sentence.0.bias", "text_projection.bias"),
    ("tau", "tau"),
])
def test_a_file_without_one_of_the_weights_is_refused_with_our_name_of_it(
    original, roberta_folder, tmp_path, name, our_name
):
    weights = original_weights(original, "salsa")
    del weights[name]
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=f"a.ckpt: .*{our_name}"):
        DualEncoder.load(tmp_path / "a.ckpt", tokenizer=roberta_folder)


def test_objects_of_missing_programs_beside_the_weights_are_dictionaries(
    original, tmp_path, monkeypatch
):
    module = types.ModuleType("lightning_data")
    module.Settings = type("Settings", (dict,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = module.Settings(audiocaps=True, wavcaps=False)
    settings.strategy = module.Settings()
    weights = original_weights(original, "baseline")
    torch.save({"state_dict": weights, "hyper_parameters": settings}, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    trained_on = read_checkpoint(tmp_path / "a.ckpt")["trained_on"]
    assert trained_on == ["clotho/development", "audiocaps/train"]


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = type("Attack", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    torch.save([attack], "a.pt")
    with pytest.raises(InputError, match="^a.pt: "):
        DualEncoder.load("a.pt")
    assert os.listdir() == ["a.pt"]


# --- Files that are no checkpoints ---

@pytest.mark.parametrize("content", [[1, 2], {"weight": torch.ones(1)}])
def test_what_torch_saved_but_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"^{tmp_path}/a.pt: is no checkpoint of dualenc"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_damaged_file_is_refused(tiny_model, tmp_path):
    torch.save(tiny_model.checkpoint(), tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 9999)
    with pytest.raises(InputError, match=f"^{tmp_path}/a.pt: is damaged or no checkpoint .*$"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_without_weights_is_refused(tiny_model, tmp_path):
    torch.save(tiny_model.checkpoint() | {"model": {}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"^{tmp_path}/a.pt: .*Missing key.*$"):
        DualEncoder.load(tmp_path / "a.pt")


@pytest.mark.parametrize("setting, reason", [
    ({"depth": 2}, "depth"),  # not known
    ({"audio_width": 48}, "size mismatch"),  # not the weights'
])
def test_a_checkpoint_whose_settings_do_not_fit_is_refused(tiny_model, tmp_path, setting, reason):
    saved = tiny_model.checkpoint()
    saved["config"] = saved["config"] | setting
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"^{tmp_path}/a.pt: .*{reason}.*$"):
        DualEncoder.load(tmp_path / "a.pt")


# --- Names and paths ---

def test_a_runs_folder_stands_for_its_best(tmp_path):
    touch(tmp_path / "best.pt", tmp_path / "last.pt")
    assert checkpoint_file(tmp_path) == tmp_path / "best.pt"


def test_a_path_names_its_file(tmp_path):
    touch(tmp_path / "best.pt", tmp_path / "last.pt")
    assert checkpoint_file(str(tmp_path / "last.pt")) == tmp_path / "last.pt"


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/none.pt: no such checkpoint file$"):
        checkpoint_file(tmp_path / "none.pt")


def test_a_folder_without_best_pt_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/best.pt: no such checkpoint file$"):
        checkpoint_file(tmp_path)


@pytest.mark.parametrize("path", ["salsa", "salsa/best.pt"])
def test_a_file_or_folder_named_salsa_goes_before_the_published_one(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    touch(Path(path))
    assert checkpoint_file("salsa") == Path(path)


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    for name, time in (("a", 200), ("b", 300), ("c", 100)):
        best = tmp_path / name / "best.pt"
        best.parent.mkdir()
        best.touch()
        os.utime(best, (time, time))
    assert newest_checkpoint(tmp_path) == tmp_path / "b" / "best.pt"


def test_without_a_run_the_published_model_is_named(tmp_path):
    with pytest.raises(InputError, match="train first, or give --checkpoint .*--checkpoint salsa"):
        newest_checkpoint(tmp_path)


def test_what_was_saved_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    save_atomically({"step": 1}, tmp_path / "last.pt")

    def full(values, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904  as torch does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="last.pt: cannot be written .No space left on device"):
        save_atomically({"step": 2}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt") == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


# --- Fetching published weights, from a server of our own ---

class Server:
    """An HTTP server of files that are bytes, of which it sends the last one by its behaviour."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.behaviour = "whole"
        self.sent: list[str] = []  # the paths whose bytes were sent whole

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805
                self.answer(handler)

            def log_message(handler, *args):  # noqa: N805
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def urls(self) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{self.http.server_port}{path}" for path in self.files)

    def answer(self, handler) -> None:
        content = self.files[handler.path]
        is_last = handler.path == list(self.files)[-1]
        behaviour = self.behaviour if is_last else "whole"
        if behaviour == "missing":
            handler.send_error(404)
            return
        if behaviour == "web page":
            content = b"<!DOCTYPE html><html>We are being repaired.</html>"
        handler.send_response(200)
        if behaviour not in ("without a size", "without a size, breaks off"):
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if "breaks off" in behaviour:
            content = content[: len(content) // 2]
        try:
            handler.wfile.write(content)
            self.sent.append(handler.path)
        except ConnectionError:  # the size was asked for, no more
            pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()


@pytest.fixture
def hub(tmp_path):
    return tmp_path / "torch/hub/checkpoints"


def publish(server, monkeypatch, original, tmp_path, parts: int = 5) -> bytes:
    """Let the server have salsa's small file in parts; return the whole."""
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": original_weights(original, "salsa")}, path)
    content = path.read_bytes()
    size = math.ceil(len(content) / parts)
    for number in range(parts):
        server.files[f"/part.{number}"] = content[number * size : (number + 1) * size]
    monkeypatch.setitem(PUBLISHED, "salsa", PUBLISHED["salsa"]._replace(urls=server.urls()))
    return content


def test_salsa_is_fetched_under_its_name(
    server, hub, monkeypatch, original, roberta_folder, tmp_path
):
    publish(server, monkeypatch, original, tmp_path)
    fetched = DualEncoder.load("salsa", tokenizer=roberta_folder)
    local = DualEncoder.load(tmp_path / "published.ckpt", tokenizer=roberta_folder)
    assert torch.equal(fetched.embed_text(SENTENCES), local.embed_text(SENTENCES))


def test_parts_are_joined_in_order(server, hub, monkeypatch, original, tmp_path):
    content = publish(server, monkeypatch, original, tmp_path)
    assert checkpoint_file("salsa").read_bytes() == content
    assert os.listdir(hub) == ["salsa_passt_roberta.ckpt"]


def test_what_was_fetched_is_not_fetched_again(server, monkeypatch, original, tmp_path):
    publish(server, monkeypatch, original, tmp_path)
    first = checkpoint_file("salsa")
    server.behaviour = "missing"
    assert checkpoint_file("salsa") == first


def test_address_and_size_are_reported_first(server, monkeypatch, original, tmp_path, capfd):
    content = publish(server, monkeypatch, original, tmp_path)
    checkpoint_file("salsa")
    first_line = capfd.readouterr().err.splitlines()[0]
    megabytes = round(len(content) / 1e6)
    assert first_line == f"fetching the model salsa from {server.urls()[0]}, {megabytes} MB"


def test_a_server_that_tells_no_size_is_believed(server, monkeypatch, original, tmp_path, capfd):
    content = publish(server, monkeypatch, original, tmp_path)
    server.behaviour = "without a size"
    assert checkpoint_file("salsa").read_bytes() == content
    assert capfd.readouterr().err.splitlines()[0].endswith(server.urls()[0])


@pytest.mark.parametrize("behaviour, reason", [
    ("breaks off", "broke off, [0-9,]+ bytes before its end"),
    ("without a size, breaks off", "what it sent is no whole checkpoint"),
    ("web page", "what it sent is no whole checkpoint"),
    ("missing", "HTTP Error 404"),
])
def test_a_download_that_is_not_whole_is_one_line_and_leaves_nothing(
    server, hub, monkeypatch, original, tmp_path, behaviour, reason
):
    publish(server, monkeypatch, original, tmp_path)
    server.behaviour = behaviour
    last_url = server.urls()[-1]
    with pytest.raises(InputError, match=f"^the model salsa .* {last_url} .*{reason}.*{hub}.*$"):
        checkpoint_file("salsa")
    assert not hub.exists() or os.listdir(hub) == []


def test_passt_is_fetched_the_same_way(server, hub, monkeypatch, original, tmp_path):
    torch.save(original.passt.state_dict(), tmp_path / "passt.pt")
    server.files["/passt.pt"] = (tmp_path / "passt.pt").read_bytes()
    monkeypatch.setattr(checkpoints, "PASST", PASST._replace(urls=server.urls()))
    weights = published_passt()
    assert os.listdir(hub) == ["passt-s-f128-p16-s16-ap.468.pt"]
    expected = original.passt.state_dict()
    without_classifiers = {name for name in expected if not name.startswith("head")}
    assert weights.keys() == without_classifiers
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


def test_passt_that_cannot_be_reached_names_the_way_without(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(InputError, match=f"^PaSST .*{tmp_path}/hub/checkpoints/.*--init random$"):
        published_passt()


def read_salsa():
    return read_checkpoint("salsa")


@pytest.mark.parametrize("published, read", [
    (PUBLISHED["salsa"], read_salsa), (PASST, published_passt),
])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"PK\3\4" + bytes(99)])
def test_a_broken_published_file_is_one_line_that_says_what_to_do(
    server, hub, published, read, content
):
    path = hub / published.file_name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: is damaged.*; delete it and run again.*$"):
        read()


def test_the_addresses_are_those_that_the_authors_name():
    url = "https://cloud.cp.jku.at/index.php/s"
    assert len(PUBLISHED["salsa"].urls) == 5
    assert PUBLISHED["salsa"].urls[0] == f"{url}/pMWRbJzXqFPPzgD/download/passt_roberta.1.ckpt"
    assert PUBLISHED["salsa"].urls[4] == f"{url}/Np4A5nobAkaSGpY/download/passt_roberta.5.ckpt"
    assert PUBLISHED["baseline"].urls == (f"{url}/6ZTQ3mcwk9AAS4i/download",)


def test_published_weights_begin_the_reports_model_and_nothing_is_printed(
    server, hub, original, roberta_folder, monkeypatch, capfd
):
    small = DualEncoderConfig(audio_width=128, audio_depth=3, audio_heads=2, patch=PATCH)
    monkeypatch.setitem(PRESETS, "report", small)
    hub.mkdir(parents=True)
    torch.save(original.passt.state_dict(), hub / PASST.file_name)
    capfd.readouterr()
    model = DualEncoder.create("report", "pretrained", [], str(roberta_folder))
    assert capfd.readouterr() == ("", "")
    passt = original.passt.state_dict()
    for name, weights in model.audio.passt.state_dict().items():
        assert torch.equal(weights, passt[name]), name
    roberta = original.roberta.state_dict()
    for name, weights in model.text.roberta.state_dict().items():
        assert torch.equal(weights, roberta[name]), name


# --- Tokenizers ---

def test_a_checkpoint_with_a_tokenizer_keeps_it(tiny_model, tmp_path, roberta_folder):
    torch.save(tiny_model.checkpoint(), tmp_path / "a.pt")
    loaded = DualEncoder.load(tmp_path / "a.pt", tokenizer=roberta_folder)
    assert loaded.tokenizer.to_str() == tiny_model.tokenizer.to_str()


def test_a_checkpoint_without_a_tokenizer_takes_the_one_given(published_file, roberta_folder):
    model = DualEncoder.load(published_file, tokenizer=roberta_folder)
    assert model.tokenizer.to_str() == text.load_tokenizer(roberta_folder).to_str()


def test_a_tokenizer_with_more_entries_than_the_embedding_has_rows_is_refused(
    published_file, tmp_path
):
    pairs_of_letters = itertools.product(string.ascii_letters, "abcdefghijklmnop")
    words = ["".join(pair) for pair in pairs_of_letters]
    tokenizer = text.train_bpe(words * 2, 401)
    assert tokenizer.get_vocab_size() == 401
    RobertaTokenizer(tokenizer_object=tokenizer).save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match=f"^{tmp_path}/large: .* 401 .* 400 .*{published_file}"):
        DualEncoder.load(published_file, tokenizer=tmp_path / "large")


# --- Our own checkpoints ---

SPLITS = ["mine@1/all", "clotho/development"]


@pytest.fixture
def loaded(tiny_model, tmp_path, monkeypatch) -> DualEncoder:
    """Save the tiny model as a student, and load it."""
    monkeypatch.setattr(tiny_model, "stage", "distilled")
    monkeypatch.setattr(tiny_model, "trained_on", SPLITS)
    torch.save(tiny_model.checkpoint(), tmp_path / "best.pt")
    return DualEncoder.load(tmp_path)


def test_a_loaded_model_is_ready_to_embed(loaded):
    assert not loaded.training


def test_a_loaded_model_has_the_sizes_stage_and_splits_that_were_saved(loaded, tiny_model):
    assert loaded.config == tiny_model.config
    assert loaded.stage == "distilled"
    assert loaded.trained_on == SPLITS


def test_a_loaded_model_embeds_as_the_saved_one(loaded, tiny_model):
    assert torch.equal(loaded.embed_audio(noise(1)), tiny_model.embed_audio(noise(1)))
    assert torch.equal(loaded.embed_text(CAPTIONS), tiny_model.embed_text(CAPTIONS))
