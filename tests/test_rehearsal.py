"""The whole real way offline: the default preset, published weights where downloads would lie."""

import dataclasses
import json
import sys

import pytest
import torch

import distill
import evaluate
import train
from dualenc import model, run
from dualenc.config import PRESETS
from dualenc.miniature import write_miniature
from dualenc.model import DualEncoder
from tests.rehearsal import commands, write_passt, write_roberta

SCRIPTS = {"train.py": train, "distill.py": distill, "evaluate.py": evaluate}


def test_the_readmes_commands_with_every_default(tmp_path, monkeypatch, capfd):
    # One layer of PaSST's twelve and a small RoBERTa: names, files and code are the real ones.
    monkeypatch.setitem(
        model.PRESETS, "report", dataclasses.replace(PRESETS["report"], audio_depth=1)
    )
    write_passt(tmp_path / "torch", depth=1)
    write_roberta(
        tmp_path / "huggingface", hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=96, vocab_size=1000,
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "huggingface/hub"))
    write_miniature(tmp_path / "data", clotho=(2, 1, 2), audiocaps=(2, 1, 1))
    monkeypatch.chdir(tmp_path)
    for name, *arguments in commands(tmp_path, max_steps=1):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            run(SCRIPTS[name].main)
        printed = capfd.readouterr()
        assert not ended.value.code, printed.err
        for noise in ("UNEXPECTED", "Warning", "Loading", "self.norm", "Traceback"):
            assert noise not in printed.out + printed.err, printed
    settings = json.loads((tmp_path / "runs/a/log.jsonl").read_text().splitlines()[0])
    assert (settings["batch_size"], settings["epochs"]) == (64, 20)
    assert (settings["max_lr"], settings["min_lr"]) == (2e-5, 1e-7)
    assert settings["model"]["text_dropout"] == 0.2 and settings["model"]["patchout"] == [2, 15]
    assert "c/best.pt" in printed.out.replace(str(tmp_path), "") and "mAP@10" in printed.out

    published = torch.load(next((tmp_path / "torch/hub/checkpoints").iterdir()), weights_only=True)
    trained = DualEncoder.load("runs/a/best.pt").audio.passt.state_dict()
    for name, value in trained.items():  # one step at 1e-7 moves a weight by 1e-7
        torch.testing.assert_close(value, published[name], rtol=0, atol=1e-6)
