"""One process or many (torchrun): who this one is, and work shared among them.

Shapes: N clips and Q captions of a split, D embedding values.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dualenc import InputError
from dualenc.cache import AudioCache
from dualenc.layouts import Split
from dualenc.losses import gather
from dualenc.metrics import retrieval_metrics
from dualenc.model import EMBED_CAPTIONS, EMBED_CLIPS, DualEncoder, by_length

# How long the others wait for the first, which decodes a data set while they do.
PATIENCE = datetime.timedelta(hours=12)


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started, or alone."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those of this machine

    @classmethod
    def start(cls, device: str = "auto") -> "Processes":
        """Join the others, if any.

        Args:
            device: "cpu", "cuda" (each process takes a GPU of its own), "cuda:N", or "auto": CUDA
                where there is one.

        Raises:
            InputError: there is no such device.
        """
        world = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        own = _device(device, local_rank, world)
        if world == 1:
            return cls(own)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        # gloo carries what lives on the CPU, such as the wish to stop, without waiting for a GPU.
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart: the dead processes' addresses stay behind.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=PATIENCE
        )
        return cls(own, rank, world, local_rank)

    def end(self) -> None:
        """Leave the others, when all is done."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process enters alone, then the first of each machine, then the others.

        So each finds made what it would else make at the same time as another: files on a disk
        that all machines share, or on their own.
        """
        own_turn = 0 if self.first else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            if turn == own_turn:
                yield
            self.highest(0)  # nobody passes before all are here

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers."""
        if self.world == 1:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def agree(self, *facts) -> bool:
        """Whether plain values are the same in all processes."""
        digest = hashlib.sha256(json.dumps(facts).encode()).digest()
        number = int.from_bytes(digest[:7])  # fits an int64, negated too
        return self.highest(number) == -self.highest(-number)

    def copy_from_first(self, model: DualEncoder) -> None:
        """Give all processes the first one's weights, to the last bit."""
        if self.world > 1:
            for weights in model.state_dict().values():
                dist.broadcast(weights, src=0)

    def shares(self, n: int, unit: int = 1) -> list[int]:
        """n things, shared as evenly as whole units allow: how many each process takes."""
        units = -(-n // unit)
        bounds = [min(n, units * rank // self.world * unit) for rank in range(self.world + 1)]
        return [bounds[rank + 1] - bounds[rank] for rank in range(self.world)]

    def own(self, sizes: list[int]) -> range:
        """Which things are this process's, of shares of these sizes."""
        start = sum(sizes[: self.rank])
        return range(start, start + sizes[self.rank])


def _device(name: str, local_rank: int, world: int) -> torch.device:
    """What --device names, for the process that is local_rank-th on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device(name)
    if kind != "cuda" or not (name == kind or index.isdecimal()):
        raise InputError(f"--device {name}: is neither cpu, cuda nor cuda:N")
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA device can be used here; try cpu")
    if index and world > 1:
        raise InputError(f"--device {name}: many processes need a GPU each; give --device cuda")
    number = int(index or local_rank)
    if number >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: there is no GPU {number} on this machine, which has "
            f"{torch.cuda.device_count()}; each process needs its own"
        )
    return torch.device(kind, number)


def embed_split(
    model: DualEncoder, split: Split, cache: AudioCache, processes: Processes, label: str
) -> tuple[Tensor, Tensor]:
    """All clips (N, D) and all captions (Q, D) of a split, embedded in shares, with a bar.

    Shares are whole batches of embed_audio and embed_text. The same batches are computed by any
    number of processes, and so the same embeddings, to the last bit.
    """
    sizes = processes.shares(len(cache), EMBED_CLIPS)
    own = processes.own(sizes)
    waveforms = tqdm(
        (cache[i] for i in own), label, total=len(own), unit="clip", leave=False,
        disable=None if processes.first else True, delay=1,
    )
    audio = gather(model.embed_audio(waveforms), sizes)

    order = by_length(split.captions)
    sizes = processes.shares(len(order), EMBED_CAPTIONS)
    own_captions = [split.captions[order[i]] for i in processes.own(sizes)]
    text = torch.empty(len(order), model.config.embedding)
    text[order] = gather(model.embed_text(own_captions), sizes)
    return audio, text


def validation(
    split: Split, cache: AudioCache, processes: Processes
) -> Callable[[DualEncoder], dict[str, float]]:
    """A function from a model to its text-to-audio metrics on a split."""
    relevant = [[clip] for clip in split.clip_of_caption]

    def validate(model: DualEncoder) -> dict[str, float]:
        audio, text = embed_split(model, split, cache, processes, "validating")
        return retrieval_metrics(text, audio, relevant)

    return validate
