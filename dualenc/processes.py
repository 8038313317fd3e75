"""One process or many (torchrun): who this one is, and work shared among them.

Shapes: N clips and Q captions of a split, D embedding values.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dualenc import InputError
from dualenc.data import AudioCache
from dualenc.layouts import Split
from dualenc.losses import gather
from dualenc.metrics import retrieval_metrics
from dualenc.model import DualEncoder


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started, or alone."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, device: str = "auto") -> "Processes":
        """Join the others, if any; "auto" is CUDA where there is one."""
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {device}: no CUDA device can be used here; try cpu")
        if "WORLD_SIZE" not in os.environ:
            return cls(torch.device(kind))
        if kind == "cuda":
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        # gloo carries what lives on the CPU, such as the wish to stop, without waiting for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind != "cpu" else "gloo")
        return cls(torch.device(kind), dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others enter once the first process has left: it has made the files they read."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in any process."""
        if self.world == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised)
        return bool(raised)

    def shares(self, n: int) -> list[int]:
        """n things, shared as evenly as can be: how many each process takes."""
        return [n // self.world + (rank < n % self.world) for rank in range(self.world)]

    def own(self, sizes: list[int]) -> range:
        """Which things are this process's, of shares of these sizes."""
        start = sum(sizes[: self.rank])
        return range(start, start + sizes[self.rank])


def embed_split(
    model: DualEncoder, split: Split, cache: AudioCache, processes: Processes, label: str
) -> tuple[Tensor, Tensor]:
    """All clips (N, D) and all captions (Q, D) of a split, embedded in shares, with a bar."""
    sizes = processes.shares(len(cache))
    own = processes.own(sizes)
    waveforms = tqdm(
        (cache[i] for i in own), label, total=len(own), unit="clip", leave=False,
        disable=None if processes.first else True, delay=1,
    )
    audio = gather(model.embed_audio(waveforms), sizes)
    sizes = processes.shares(len(split.captions))
    captions = split.captions
    return audio, gather(model.embed_text([captions[i] for i in processes.own(sizes)]), sizes)


def validation(
    split: Split, cache: AudioCache, processes: Processes
) -> Callable[[DualEncoder], dict[str, float]]:
    """A function from a model to its text-to-audio metrics on a split."""
    relevant = [[clip] for clip in split.clip_of_caption]

    def validate(model: DualEncoder) -> dict[str, float]:
        audio, text = embed_split(model, split, cache, processes, "validating")
        return retrieval_metrics(text, audio, relevant)

    return validate
