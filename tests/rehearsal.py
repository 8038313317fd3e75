"""A dress rehearsal: the README's three commands at full size, without network or real data.

    python tests/rehearsal.py FOLDER [--max-steps 1]

Writes files of the true names and shapes with random weights where the published ones would be
downloaded to, and a very small Clotho and AudioCaps in their real layouts; then runs the commands
with nothing added but --data-dir, --out and --max-steps. Needs 16 GB of memory and 25 GB of disk.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from hear21passt.models import passt
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dualenc.miniature import write_miniature  # noqa: E402 - found through the line above
from dualenc.text import train_tokenizer  # noqa: E402

WORDS = ["a dog barks and rain falls while a bell rings far away"]


def write_passt(torch_home: Path, depth: int = 12) -> None:
    """passt-s-f128-p16-s16-ap.468.pt, classifiers included, as torch.hub would keep it."""
    model = passt.PaSST(
        img_size=(128, 998), patch_size=16, stride=16, embed_dim=768, depth=depth, num_heads=12,
        num_classes=527, distilled=True,
    )
    folder = torch_home / "hub/checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "passt-s-f128-p16-s16-ap.468.pt")


def write_roberta(hf_home: Path, **sizes) -> None:
    """roberta-large as the Hugging Face hub's cache keeps it: with its language-model head."""
    large = {
        "vocab_size": 50_265, "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    }
    repository = hf_home / "hub/models--roberta-large"
    snapshot = repository / "snapshots/0000"
    RobertaForMaskedLM(RobertaConfig(**large | sizes)).save_pretrained(snapshot)
    RobertaTokenizer(tokenizer_object=train_tokenizer(WORDS, 1000)).save_pretrained(snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text("0000")


def commands(folder: Path, max_steps: int) -> list[list[str]]:
    """The README's three commands, and a second teacher."""
    data = ["--data-dir", f"{folder}/data"]
    steps = ["--max-steps", str(max_steps)]
    train = ["train.py", "--datasets", "clotho", "audiocaps"]
    teachers = [f"{folder}/runs/{name}/best.pt" for name in "ab"]
    return [
        [*train, *data, *steps, "--out", f"{folder}/runs/a"],
        [*train, "--seed", "1", *data, *steps, "--out", f"{folder}/runs/b"],
        ["distill.py", "--teachers", *teachers, *data, *steps, "--out", f"{folder}/runs/c"],
        ["evaluate.py", "--split", "test", *data],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-steps", type=int, default=1)
    args = parser.parse_args()
    folder = args.folder.resolve()
    torch.manual_seed(0)
    write_passt(folder / "torch")
    write_roberta(folder / "huggingface")
    write_miniature(folder / "data", clotho=(2, 2, 4), audiocaps=(4, 1, 1))
    environment = os.environ | {
        "TORCH_HOME": f"{folder}/torch", "HF_HOME": f"{folder}/huggingface", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    for command in commands(folder, args.max_steps):
        print("\n$ python", *command, flush=True)
        start = time.monotonic()
        subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:]], env=environment, cwd=folder,
            check=True,
        )
        print(f"[{time.monotonic() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
