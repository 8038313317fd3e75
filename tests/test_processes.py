"""Many processes against one: the same weights, metrics and files, and the same way out.

Processes of a group are forked from a server that has imported everything once; torchrun itself
is started only where it takes part.
"""

import contextlib
import csv
import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.multiprocessing

import distill
import evaluate
import train
from dualenc import run
from dualenc.cache import open_cache
from dualenc.data import PairBatches
from dualenc.layouts import read_split
from dualenc.losses import gather
from dualenc.model import DualEncoder
from dualenc.processes import Processes, embed_split, validation
from dualenc.runs import Run
from dualenc.step import embed_pairs, mixed_seed, step_gradients
from dualenc.training import Options, Trainer

ROOT = Path(__file__).parent.parent
BATCH = 5  # pairs; 17 make four steps, of 5, 5, 5 and 2: with three processes one has none at last
WORLDS = (1, 2, 3)
SCENARIOS = {
    "contrastive": {},
    "distillation": {},
    "micro-batched": {"micro_batch": 2},
    "captions together": {"batch_size": 6, "captions_per_clip": 2, "micro_batch": 2},
}


# --- Data and models ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 19 short sounds with 8 captions each: three batches of each to embed."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = "a dog barks rain falls on the roof car passes birds sing wind engine hums".split()
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        for i in range(19):
            seconds = 12 if i == 1 else 0.5
            sound = np.sin(2 * np.pi * (150 + 90 * i) * np.arange(int(seconds * 16_000)) / 16_000)
            soundfile.write(folder / f"{i}.wav", 0.3 * sound, 16_000)
            table.writerows([f"{i}.wav", " ".join(rng.choice(words, 3 + j))] for j in range(8))
    return folder


def pairs_of(split, cache):
    """17 pairs of 9 clips, to train on."""
    clips = [dataclasses.replace(c, captions=c.captions[:2]) for c in split.clips[:9]]
    clips[4] = dataclasses.replace(clips[4], captions=clips[4].captions[:1])
    return dataclasses.replace(split, clips=clips), [cache[i] for i in range(9)]


def tiny_model(captions, random):
    """random: whether dropout, patchout and jitter are on."""
    torch.manual_seed(0)
    off = {} if random else {"text_dropout": 0.0, "patchout": (0, 0)}
    model = DualEncoder.create("tiny", "random", captions, **off)
    if not random:
        model.audio.mel.fmin_aug_range = model.audio.mel.fmax_aug_range = 1
    model.set_temperature(None, learn=True)
    return model.train()


# --- One group of processes ---


@pytest.fixture(scope="module")
def start():
    """A function that starts a group: job(*args) in each process, after Processes.start."""
    multiprocessing.set_forkserver_preload(["train", "distill", "evaluate"])

    def start(job, world, *args):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return torch.multiprocessing.start_processes(
            _enter, (world, port, job, args), world, join=False, start_method="forkserver"
        )

    return start


def _enter(rank, world, port, job, args):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }
    job(*args)


def join(group, seconds=60):
    end = time.monotonic() + seconds
    while not group.join(timeout=1):
        assert time.monotonic() < end, "the processes hang"


# --- Weights, gradients, metrics ---


@pytest.fixture(scope="module")
def results(data, start, tmp_path_factory):
    """For each number of processes, what compute_results() saved; and resumed runs."""
    folder = tmp_path_factory.mktemp("results")
    read_and_cache(data, folder)
    for world in WORLDS:
        join(start(compute_results, world, data, folder))
    join(start(resume, 1, data, folder, 2))
    join(start(resume, 2, data, folder, 1))
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def read_and_cache(data, folder):
    split = read_split(str(data), "train", data)
    return split, open_cache(split, folder / "cache", processes=1)


def compute_results(data, folder):
    processes = Processes.start("cpu")
    split, cache = read_and_cache(data, folder)
    found = {name: train_four_steps(name, split, cache, folder, processes) for name in SCENARIOS}
    train_four_steps("contrastive", split, cache, folder, processes, max_steps=2)

    model = tiny_model(split.captions, random=True)
    found["embeddings"] = embed_split(model, split, cache, processes, "")
    found["metrics"] = validation(split, cache, processes)(model)
    found["replayed"] = replayed_gradients(model, split, cache, processes)
    if processes.first:
        torch.save(found, folder / f"{processes.world}.pt")
    processes.end()


def resume(data, folder, begun_by):
    """Go on where another number of processes stopped after two steps."""
    processes = Processes.start("cpu")
    split, cache = read_and_cache(data, folder)
    half = folder / f"{begun_by}-2"
    weights = train_four_steps("contrastive", split, cache, folder, processes, half)
    if processes.first:
        torch.save(weights, folder / f"resumed from {begun_by}.pt")
    processes.end()


def train_four_steps(name, split, cache, folder, processes, out=None, max_steps=None):
    model = tiny_model(split.captions, random=False)
    settings = {"batch_size": BATCH} | SCENARIOS[name]
    options = Options(epochs=1, warmup_epochs=0, max_steps=max_steps, workers=0, **settings)
    pairs = pairs_of(split, cache)
    batches = PairBatches(
        [pairs], model.tokenizer, options.batch_size, options.captions_per_clip, 0,
        (processes.rank, processes.world),
    )
    loss_of = distillation_loss_of(*pairs) if name == "distillation" else train.loss_of
    out = out or folder / f"{processes.world}-{max_steps or name}"
    kept = Run(out, {}, writes=processes.first)
    trainer = Trainer(model, loss_of, kept, options, processes)
    # With AdamW's own 1e-8 a gradient that differs from zero by rounding alone moves its weight by
    # the whole learning rate, and either way: some 20 of this model's 900,000 do.
    trainer.optimizer.param_groups[0]["eps"] = 1e-5
    trainer.fit(batches, lambda model: {"mAP@10": 0.0})
    assert trainer.step == (max_steps or batches.steps_per_epoch)
    return {name: value.clone() for name, value in model.state_dict().items()}


def distillation_loss_of(split, cache):
    generator = torch.Generator().manual_seed(0)
    teachers = [
        tuple(
            torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
            for n in (len(cache), len(split.captions))
        )
        for width in (8, 12)
    ]
    return distill.distillation(teachers, (1.0, 0.5))


def replayed_gradients(model, split, cache, processes):
    """All random: the gradient in pieces, and of one graph over the same pieces."""
    whole = PairBatches(
        [pairs_of(split, cache)], model.tokenizer, 9, 1, 0, (processes.rank, processes.world)
    )
    batch = whole[0]
    found = {}
    for precision in (None, torch.bfloat16):
        model.precision = precision
        model.zero_grad()
        step_gradients(model, batch, train.loss_of, processes, (3, 4), micro_batch=2)
        found["pieces", precision] = gradients_of(model)
        model.zero_grad()
        one_graph(model, batch, processes, (3, 4))
        found["one graph", precision] = gradients_of(model)
    model.precision = None
    return found


def one_graph(model, batch, processes, seed):
    embedded = []
    for i, piece in enumerate(batch.pieces(2)):
        torch.manual_seed(mixed_seed(*seed, processes.rank, i))
        embedded.append(embed_pairs(model, piece))
    audio, text = gather(torch.cat(embedded), batch.sizes).unbind(dim=1)
    losses = train.loss_of(audio, text, batch.clip_ids, batch.pair_ids, model.tau)
    (losses["loss"] / processes.world).backward()
    if processes.world > 1:
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def deviation(some, others):
    assert some.keys() == others.keys()
    each = {name: (some[name] - others[name]).abs().max().item() for name in some}
    return max(each.values())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", SCENARIOS)
def test_weights_after_four_steps_equal_one_process(results, name, world):
    assert deviation(results[f"{world}"][name], results["1"][name]) <= 1e-6


def test_micro_batches_train_as_whole_batches_do(results):
    for world in WORLDS:
        assert deviation(results[f"{world}"]["micro-batched"], results["1"]["contrastive"]) <= 1e-6


@pytest.mark.parametrize("begun_by", [1, 2])
def test_another_number_of_processes_goes_on(results, begun_by):
    resumed = results[f"resumed from {begun_by}"]
    assert deviation(resumed, results["1"]["contrastive"]) <= 1e-6


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("world", WORLDS)
def test_both_passes_of_a_micro_batch_see_the_same_network(results, world, precision):
    replayed = results[f"{world}"]["replayed"]
    pieces, one_graph = replayed["pieces", precision], replayed["one graph", precision]
    assert one_graph["audio_projection.weight"].abs().max() > 1e-3
    assert deviation(pieces, one_graph) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_passes_see_the_same_network_on_a_gpu(data, tmp_path):
    split, cache = read_and_cache(data, tmp_path)
    processes = Processes.start("cuda")
    model = tiny_model(split.captions, random=True).to(processes.device)
    found = replayed_gradients(model, split, cache, processes)
    for precision in (None, torch.bfloat16):
        assert deviation(found["pieces", precision], found["one graph", precision]) <= 1e-5


def test_a_scaled_loss_scales_the_gradient(data, tmp_path):
    """As fp16 needs it: the scale is on the loss before the embeddings' gradient is taken."""
    split, cache = read_and_cache(data, tmp_path)
    model = tiny_model(split.captions, random=True)
    batch = PairBatches([pairs_of(split, cache)], model.tokenizer, 4)[0]
    gradients = []
    for scale in (1, 1024):
        model.zero_grad()
        step_gradients(
            model, batch, train.loss_of, Processes(torch.device("cpu")), (0, 0), 2,
            lambda loss, scale=scale: scale * loss,
        )
        gradients.append({n: g / scale for n, g in gradients_of(model).items()})
    assert deviation(*gradients) <= 1e-6


@pytest.mark.parametrize("world", [2, 3])
def test_embeddings_and_metrics_are_the_same_to_the_last_bit(results, world):
    one, many = results["1"], results[f"{world}"]
    assert all(map(torch.equal, one["embeddings"], many["embeddings"]))
    assert one["metrics"] == many["metrics"]


def test_the_batches_of_these_tests_are_the_hard_ones(data, tmp_path):
    """One clip stands in two processes' parts, and a process has no pairs."""
    split, cache = read_and_cache(data, tmp_path)
    model = tiny_model(split.captions, random=False)
    batches = PairBatches([pairs_of(split, cache)], model.tokenizer, BATCH, processes=(2, 3))
    ids = [batches[step].clip_ids.split(batches[step].sizes) for step in range(4)]
    assert any(set(a.tolist()) & set(b.tolist()) for a, b, _ in ids)
    assert [batches[step].sizes for step in range(4)] == [[2, 2, 1]] * 3 + [[1, 1, 0]]


# --- The scripts ---


@pytest.fixture(scope="module")
def trained(data, start, tmp_path_factory):
    """The run of train.py in two processes, without interruption."""
    folder = tmp_path_factory.mktemp("trained")
    join(start(call, 2, train.main, training_command(data, folder), folder / "output"))
    return folder


def training_command(data, folder):
    return [
        "train.py", "--preset", "tiny", "--datasets", str(data), "--device", "cpu", "--precision",
        "fp32", "--batch-size", "40", "--captions-per-clip", "8", "--epochs", "2", "--log-every",
        "1", "--checkpoint-every", "1", "--workers", "1", "--cache-dir", str(folder / "cache"),
        "--out", str(folder / "run"),
    ]


def call(main, command, output):
    """A script's main, as `run` calls it; what it prints goes to a file for each process."""
    sys.argv = command
    with (
        open(f"{output}{os.environ['RANK']}", "w") as file,
        contextlib.redirect_stdout(file), contextlib.redirect_stderr(file),
    ):
        status = main()
    assert status == 0


def call_to_its_end(main, command, output):
    call(lambda: run(main), command, output)


def test_only_the_first_process_prints(trained):
    assert "Done after step 8" in (trained / "output0").read_text()
    assert (trained / "output1").read_text() == ""


def test_evaluate_writes_the_same_bytes(data, trained, start, tmp_path):
    for world in WORLDS:
        command = [
            "evaluate.py", "--dataset", str(data), "--allow-seen", "--checkpoint",
            str(trained / "run/best.pt"), "--cache-dir", str(trained / "cache"), "--device", "cpu",
            "--precision", "fp32", "--json", str(tmp_path / f"{world}.json"),
        ]
        join(start(call, world, evaluate.main, command, tmp_path / f"{world}-"))
    one, two, three = (tmp_path / f"{world}.json" for world in WORLDS)
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()
    assert (tmp_path / "1-0").read_bytes() == (tmp_path / "3-0").read_bytes()


def test_sigterm_to_one_process_ends_all_with_status_0(data, start, tmp_path):
    command = [*training_command(data, tmp_path), "--epochs", "1000"]
    group = start(call, 2, train.main, command, tmp_path / "output")
    wait_for(tmp_path / "run/last.pt")
    os.kill(group.pids()[1], signal.SIGTERM)
    join(group)
    assert "SIGTERM after step" in (tmp_path / "output0").read_text()


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.02)


def test_a_process_that_dies_takes_the_run_back_and_it_goes_on(data, trained, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "--max-restarts", "1"]
        + training_command(data, tmp_path),
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    wait_for(tmp_path / "run/last.pt")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, errors = launcher.communicate(timeout=90)
    assert launcher.returncode == 0, errors
    assert "going on after step" in output
    assert "Traceback" not in errors
    logs = [(folder / "run/log.jsonl").read_text() for folder in (trained, tmp_path)]
    assert logs[0] == logs[1]


def test_bad_input_is_said_once(start, tmp_path):
    """Only the first process opens the bad files; the other waits for it and loses it."""
    (tmp_path / "captions.csv").write_text("file_name,caption\na.wav,rain\nb.wav,wind\n")
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"not a sound")
    command = training_command(tmp_path, tmp_path)
    group = start(call_to_its_end, 2, train.main, command, tmp_path / "output")
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as ended:
        join(group)  # ends the others when one has failed, as torchrun does
    assert ended.value.exit_code == 2
    lines = (tmp_path / "output0").read_text().splitlines()  # one is held out: a line of its own
    assert lines[0].startswith("train.py: ") and len(lines) == 2
    assert all("cannot be decoded" in line for line in lines)
    assert (tmp_path / "output1").read_text() == ""
