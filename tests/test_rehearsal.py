"""The dress rehearsal: README's three commands, offline, on stand-ins of the true names.

    python tests/test_rehearsal.py FOLDER [OPTION ...]

is at full size, 441.5 M parameters: some 20 GB of memory and of disk. Options are added to those
of training: --micro-batch 8 takes half the memory.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import noise, write_csv, write_wav  # noqa: E402
from hear21passt.models import passt  # noqa: E402
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer  # noqa: E402

import train  # noqa: E402
from dualenc.errors import run_command  # noqa: E402
from dualenc.model import PRESETS, DualEncoder  # noqa: E402
from dualenc.text import train_bpe  # noqa: E402

PASST_FILE = "torch/hub/checkpoints/passt-s-f128-p16-s16-ap.468.pt"
LARGE = {  # RoBERTa-large
    "vocab_size": 50_265, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}
SMALL = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
    "intermediate_size": 96,
}


# --- Stand-ins ---


def write_published_passt(path: Path, depth: int) -> None:
    """Write what would be downloaded, with random weights and so many of PaSST's 12 layers."""
    path.parent.mkdir(parents=True)
    whole = passt.PaSST(
        img_size=(128, 998), patch_size=16, stride=16, embed_dim=768, num_heads=12, depth=depth,
        num_classes=527, distilled=True,
    )
    torch.save(whole.state_dict(), path)


def write_published_roberta(folder: Path, sizes: dict[str, int]) -> None:
    """Write what would be downloaded, with random weights and a small vocabulary."""
    config = RobertaConfig(**sizes, max_position_embeddings=514, type_vocab_size=1)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer = train_bpe(["a dog barks and rain falls"], 1000)
    RobertaTokenizer(tokenizer_object=tokenizer).save_pretrained(folder)


def write_clotho(folder: Path) -> None:
    """Write a small Clotho as its archives unpack."""
    for part, clips in {"development": 13, "validation": 1, "evaluation": 2}.items():
        rows = []
        for clip in range(clips):
            write_wav(folder / part / f"{clip}.wav", noise(1, seed=clip))
            captions = [f"{part} {clip} {number}" for number in range(5)]
            rows.append([f"{clip}.wav", *captions])
        header = ["file_name", *(f"caption_{number}" for number in range(1, 6))]
        write_csv(folder / f"clotho_captions_{part}.csv", header, rows)


def write_audiocaps(folder: Path) -> None:
    """Write a small AudioCaps as aac-datasets leaves it."""
    header = ["audiocap_id", "youtube_id", "start_time", "caption"]
    for part in ("train", "val", "test"):
        write_wav(folder / "audio_32000Hz" / part / f"{part}_30.wav", noise(1))
        write_csv(folder / "csv_files_v1" / f"{part}.csv", header, [["7", part, "30", "a dog"]])


def write_stand_ins(folder: Path, passt_depth: int, roberta_sizes: dict[str, int]) -> None:
    write_published_passt(folder / PASST_FILE, passt_depth)
    write_published_roberta(folder / "some-roberta", roberta_sizes)
    write_clotho(folder / "data")
    write_audiocaps(folder / "data")


def commands(folder: Path, *more: str) -> list[list[str]]:
    """Return README's three commands and a second teacher's; the runs have the default folders."""
    data = ["--data-dir", f"{folder}/data"]
    training = [*data, "--max-steps", "1", "--workers", "0", *more]
    teacher = ["train.py", "--datasets", "clotho", "audiocaps"]
    teacher += ["--text-model", f"{folder}/some-roberta", *training]
    teachers = [f"runs/contrastive-clotho-audiocaps-seed{seed}/best.pt" for seed in (0, 1)]
    return [
        teacher,
        [*teacher, "--seed", "1"],
        ["distill.py", "--teachers", *teachers, *training],
        ["evaluate.py", "--split", "test", *data],
    ]


# --- The rehearsal ---


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """Run the commands in a folder, and return it; printed.txt there holds what they printed.

    PaSST has one layer of its twelve, RoBERTa is small and batches are of eight pairs; names, files
    and code are the real ones.
    """
    folder = tmp_path_factory.mktemp("rehearsal")
    write_stand_ins(folder, 1, SMALL)
    with pytest.MonkeyPatch.context() as patch, open(folder / "printed.txt", "w") as printed:
        patch.setitem(PRESETS, "report", dataclasses.replace(PRESETS["report"], audio_depth=1))
        patch.setattr(train, "write_curves", lambda folders, path: None)  # They take seconds.
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        patch.chdir(folder)
        for command in commands(folder, "--batch-size", "8"):
            patch.setattr(sys, "argv", command)
            script = importlib.import_module(command[0].removesuffix(".py"))
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                with pytest.raises(SystemExit) as ended:
                    run_command(script.main)
            assert not ended.value.code, (folder / "printed.txt").read_text()
    return folder


def test_the_libraries_noise_does_not_reach_a_user(rehearsal):
    printed = (rehearsal / "printed.txt").read_text()
    for noise_of_libraries in ("UNEXPECTED", "Warning", "Loading", "self.norm", "Traceback"):
        assert noise_of_libraries not in printed


def test_evaluate_takes_the_newest_run(rehearsal):
    printed = (rehearsal / "printed.txt").read_text()
    table = printed.rpartition("Next: python evaluate.py")[2]
    assert "mAP@10" in table
    assert "Clotho + AudioCaps, distilled" in table


def test_a_student_has_a_folder_named_by_its_teachers_data(rehearsal):
    assert (rehearsal / "runs/distilled-clotho-from-audiocaps-clotho-seed0/best.pt").is_file()


def test_the_defaults_are_the_reports_and_the_baselines(rehearsal, monkeypatch):
    log = rehearsal / "runs/contrastive-clotho-audiocaps-seed0/log.jsonl"
    settings = json.loads(log.read_text().partition("\n")[0])["settings"]
    expected = {
        "epochs": 20, "max_lr": 2e-5, "min_lr": 1e-7, "warmup_epochs": 1, "decay_epochs": 15,
        "captions_per_clip": 1, "precision": "fp32", "preset": "report",
    }
    assert settings | expected == settings
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.parse_arguments().batch_size == 64


def test_the_model_regularises_as_the_baseline(rehearsal):
    config = DualEncoder.load(rehearsal / "runs/contrastive-clotho-audiocaps-seed0").config
    assert config.text_dropout == 0.2
    assert config.patchout == (2, 15)


def test_training_starts_from_the_published_weights(rehearsal):
    trained = DualEncoder.load(rehearsal / "runs/contrastive-clotho-audiocaps-seed0")
    roberta = RobertaForMaskedLM.from_pretrained(rehearsal / "some-roberta").roberta
    published = torch.load(rehearsal / PASST_FILE, weights_only=True) | roberta.state_dict()
    for part in (trained.audio.passt, trained.text.roberta):
        for name, weights in part.state_dict().items():
            # The one step, at a learning rate of 1e-7, moves a weight by 1e-7.
            torch.testing.assert_close(weights, published[name], rtol=0, atol=1e-6)


if __name__ == "__main__":
    here = Path(sys.argv[1]).resolve()
    write_stand_ins(here, 12, LARGE)
    os.environ |= {"TORCH_HOME": f"{here}/torch", "HF_HUB_OFFLINE": "1"}
    for command in commands(here, *sys.argv[2:]):
        print("\n$ python", *command, flush=True)
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=here, check=True)
