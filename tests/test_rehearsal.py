"""The dress rehearsal: README's three commands, offline, on stand-ins of the true names.

    python tests/test_rehearsal.py FOLDER [OPTION ...]

is at full size, 441.5 M parameters: some 20 GB of memory and of disk. Options are added to those
of training: --micro-batch 8 takes half the memory.
"""

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

from dualenc import errors, model, text  # noqa: E402

PASST = "torch/hub/checkpoints/passt-s-f128-p16-s16-ap.468.pt"
SIZES = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
LARGE, SMALL = (50_265, 1024, 24, 16, 4096), (1000, 64, 2, 1, 96)  # of a RoBERTa


def write_stand_ins(folder: Path, depth: int, sizes: tuple) -> None:
    """What would be downloaded, with random weights; small Clotho and AudioCaps as unpacked."""
    (folder / PASST).parent.mkdir(parents=True)
    shape = dict(img_size=(128, 998), patch_size=16, stride=16, embed_dim=768, num_heads=12)
    whole = passt.PaSST(**shape, depth=depth, num_classes=527, distilled=True)
    torch.save(whole.state_dict(), folder / PASST)
    shape = dict(zip(SIZES, sizes, strict=True), max_position_embeddings=514, type_vocab_size=1)
    tokenizer = text.train_bpe(["a dog barks and rain falls"], 1000)
    RobertaForMaskedLM(RobertaConfig(**shape)).save_pretrained(folder / "roberta-large")
    RobertaTokenizer(tokenizer_object=tokenizer).save_pretrained(folder / "roberta-large")
    for split, clips in {"development": 13, "validation": 1, "evaluation": 2}.items():
        rows = [[f"{i}.wav", *(f"{split} {i} {j}" for j in range(5))] for i in range(clips)]
        header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
        write_csv(folder / f"data/clotho_captions_{split}.csv", header, rows)
        for seed, (name, *_) in enumerate(rows):
            write_wav(folder / "data" / split / name, noise(1, seed))
    for split in ("train", "val", "test"):
        header = ["audiocap_id", "youtube_id", "start_time", "caption"]
        write_csv(folder / f"data/csv_files_v1/{split}.csv", header, [["7", split, "30", "a dog"]])
        write_wav(folder / f"data/audio_32000Hz/{split}/{split}_30.wav", noise(1))


def commands(folder: Path, *options: str) -> list[list[str]]:
    """README's three commands, and a second teacher's; the runs' folders are the default ones."""
    options = ["--data-dir", f"{folder}/data", "--max-steps", "1", "--workers", "0", *options]
    first = ["train.py", "--datasets", "clotho", "audiocaps"]
    first += ["--text-model", f"{folder}/roberta-large", *options]
    teachers = [f"runs/contrastive-clotho-audiocaps-seed{seed}/best.pt" for seed in (0, 1)]
    return [first, [*first, "--seed", "1"], ["distill.py", "--teachers", *teachers, *options],
            ["evaluate.py", "--split", "test", *options[:2]]]


def test_the_readmes_commands_with_every_default(tmp_path, monkeypatch, capfd):
    # One layer of PaSST's twelve and a small RoBERTa: names, files and code are the real ones.
    preset = dataclasses.replace(model.PRESETS["report"], audio_depth=1)
    monkeypatch.setitem(model.PRESETS, "report", preset)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    write_stand_ins(tmp_path, 1, SMALL)
    capfd.readouterr()
    for command in commands(tmp_path):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            errors.run_command(importlib.import_module(command[0].removesuffix(".py")).main)
        printed = "".join(capfd.readouterr())
        noises = "UNEXPECTED", "Warning", "Loading", "self.norm", "Traceback"
        assert not (ended.value.code or any(noise in printed for noise in noises)), printed
    assert "Clotho + AudioCaps, distilled" in printed and "mAP@10" in printed  # the newest run
    run = Path("runs/contrastive-clotho-audiocaps-seed0")
    settings = json.loads((run / "log.jsonl").read_text().partition("\n")[0])["settings"]
    expected = {"batch_size": 64, "epochs": 20, "max_lr": 2e-5, "min_lr": 1e-7}
    assert settings | expected == settings
    trained = model.DualEncoder.load(run)
    assert (trained.config.text_dropout, trained.config.patchout) == (0.2, (2, 15))
    published = torch.load(PASST, weights_only=True)
    published |= RobertaForMaskedLM.from_pretrained("roberta-large").roberta.state_dict()
    for part in (trained.audio.passt, trained.text.roberta):
        for name, value in part.state_dict().items():  # one step at 1e-7 moves a weight by 1e-7
            torch.testing.assert_close(value, published[name], rtol=0, atol=1e-6)


if __name__ == "__main__":
    here = Path(sys.argv[1]).resolve()
    write_stand_ins(here, 12, LARGE)
    os.environ |= {"TORCH_HOME": f"{here}/torch", "HF_HUB_OFFLINE": "1"}
    for command in commands(here, *sys.argv[2:]):
        print("\n$ python", *command, flush=True)
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=here, check=True)
