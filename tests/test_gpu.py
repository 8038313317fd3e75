"""The way over a GPU: on a pretended one anywhere, on a real one where there is one.

How one pretends a GPU. Under torch's FakeTensorMode, a tensor made with device="cuda" has a shape,
a type and a device, but no values and no memory, so a CPU runs the report's model in a second.
The mode itself refuses operations whose tensors are on two devices. It does not see three things:

    types          an operation whose floats are of two types fails on a real GPU, not here
    CPU indices    indexing a GPU tensor with a CPU tensor works, but copies the index first
    blocking copies from the CPU, for which the CPU waits (a sync)

PretendedGPU looks at every operation for these three. Some ways through the libraries are still not
those of a real GPU: backward does not run, values cannot be read, and transformers treats fake
tensors as if it traced a graph. Two syncs hide there, and have tests of their own below: the shape
of the text tower's mask, and the check inside segment_reduce.
"""

import contextlib
import copy
import functools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import CAPTIONS, noise, write_wav
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dualenc import DualEncoder
from dualenc.audio import to_segments
from dualenc.data import Batch
from dualenc.decoding import to_int16
from dualenc.losses import contrastive_loss, distillation_loss
from dualenc.search import embed_file

# Its number is no real one's, so that what is cached by device is not mixed up with it.
PRETENDED = torch.device("cuda", 7)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
# Operations that take floats of one type only.
ONE_TYPE = (
    "mm", "addmm", "bmm", "linear", "matmul", "convolution", "conv2d", "native_layer_norm",
    "segment_reduce", "_fft_r2c",
)
COPIES = ("to", "_to_copy")


class PretendedGPU(TorchDispatchMode):
    """A look at every operation that has a tensor on the pretended GPU.

    types: {operation: the types of its floats}, of the operations in ONE_TYPE.
    syncs: copies and indices for which a real GPU would make the CPU wait.
    """

    def __init__(self):
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}
        self.syncs: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if function.namespace == "prim":  # It only asks for a device.
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if all(device_of(tensor) != PRETENDED for tensor in tensors):
            return out
        elsewhere = [t for t in tensors if device_of(t) != PRETENDED and t.ndim > 0]
        if name == "index" or (name in COPIES and not kwargs.get("non_blocking")):
            self.syncs |= {f"{name} {tuple(tensor.shape)}" for tensor in elsewhere}
        elif name not in COPIES:
            assert not elsewhere, f"{name} of tensors that are not on the GPU"
        if name in ONE_TYPE:
            floats = {t.dtype for t in tree_leaves(args) if getattr(t, "ndim", 0)} - {torch.int64}
            assert len(floats) == 1, f"{name} of {floats}"
            assert all(dtype.is_floating_point for dtype in floats), f"{name} of {floats}"
            self.types.setdefault(name, set()).update(floats)
        return out


def device_of(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


@contextlib.contextmanager
def pretended_gpu():
    """Run the block on the pretended GPU; reading a value there fails, since it would be a sync."""
    pieces = Batch.pieces

    def pieces_outside(batch, pairs):
        # It reads values on the CPU, which fake tensors do not have.
        with unset_fake_temporarily():
            return list(pieces(batch, pairs))

    def value(tensor):
        assert tensor.device.type == "cpu", "a value is read: a GPU sync"
        return 0

    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        # Autocast switches itself off where bf16 is not supported.
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(Batch, "pieces", pieces_outside),
        mock.patch.object(Tensor, "item", value),
        FAKE, PretendedGPU() as gpu,
    ):
        yield gpu


@functools.cache
def pretended_model(preset: str) -> DualEncoder:
    """Return a model as .to(PRETENDED) would leave it: all that is registered has moved."""
    with pretended_gpu():
        model = DualEncoder.create(preset, "random", CAPTIONS).train()
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(value.to(PRETENDED))
            for name, value in module.named_buffers(recurse=False):
                module._buffers[name] = value.to(PRETENDED)
    return model


def make_batch() -> Batch:
    """Make five pairs of four clips: every other clip has two segments, two pairs share a clip."""
    clips = [to_int16(noise(3 + 10 * (i % 2), seed=i)) for i in range(4)]
    rows = torch.tensor([0, 1, 2, 2, 3])
    tokens = torch.arange(30).view(5, 6)
    return Batch(*to_segments(clips), rows, tokens, rows, rows)


# --- A training step of the report's model ---


class Step(NamedTuple):
    """A step's forward pass and losses: the towers' type, and what the pretended GPU has seen."""

    tower_type: torch.dtype
    gpu: PretendedGPU


@pytest.fixture(
    scope="module",
    params=[(torch.bfloat16, 3), (torch.float16, None), (None, None)],
    ids=["bf16 in pieces", "fp16", "fp32"],
)
def step(request) -> Step:
    """Return a step in each precision; one of them is encoded in pieces of three pairs."""
    precision, micro_batch = request.param
    model = pretended_model("report")
    model.precision = precision
    batch = make_batch()
    with pretended_gpu() as gpu:
        audio, text = model.encode_pairs(batch, micro_batch)
        ids = batch.clip_ids.to(PRETENDED, non_blocking=True)
        teacher = [torch.zeros(6, 512, device=PRETENDED)[ids]]
        contrastive_loss(audio, text, ids, model.tau)
        distillation_loss(audio, text, teacher, teacher, model.tau)
    return Step(precision or torch.float32, gpu)


def test_nothing_in_a_step_waits_for_the_gpu(step):
    assert step.gpu.syncs == set()


def test_linear_maps_are_in_the_towers_type_or_in_fp32(step):
    assert step.gpu.types["addmm"] == {step.tower_type, torch.float32}


def test_log_mel_norms_and_losses_are_in_fp32(step):
    operations = step.gpu.types.keys() - {"addmm"}
    assert {"_fft_r2c", "native_layer_norm", "segment_reduce", "mm"} <= operations
    for operation in operations:
        assert step.gpu.types[operation] == {torch.float32}, operation


def test_a_piece_is_recomputed_with_the_gpus_random_numbers(monkeypatch):
    devices = set()

    # Those of a device are drawn again where it is that of an argument.
    def recorded(encode, *tensors, **options):
        devices.update(tensor.device for tensor in tensors)
        return checkpoint(encode, *tensors, **options)

    monkeypatch.setattr("dualenc.model.recompute_in_backward", recorded)
    model = pretended_model("tiny")
    model.precision = None
    batch = make_batch()
    with pretended_gpu():
        model.encode_pairs(batch, 3)
    assert devices == {PRETENDED}


def test_embeddings_for_users_are_float32_on_the_cpu(tmp_path):
    model = pretended_model("tiny")
    model.precision = torch.bfloat16
    path = write_wav(tmp_path / "a.wav", noise(11))
    with pretended_gpu():
        audio = model.embed_audio([noise(11), noise(4)])
        text = model.embed_text(CAPTIONS)
        _, segments_of_the_index = embed_file(model, path)
    for embeddings in (audio, text, segments_of_the_index):
        assert embeddings.device.type == "cpu"
        assert embeddings.dtype == torch.float32


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_both_towers_attend_in_the_towers_type(precision, monkeypatch):
    attend = nn.functional.scaled_dot_product_attention
    types = []

    def recorded(query, key, value, *args, **options):
        types.append({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value, *args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recorded)
    model = pretended_model("tiny")
    model.precision = precision
    with pretended_gpu():
        model.encode_pairs(make_batch())
    assert types == [{precision}] * 4  # two layers in each tower


@pytest.mark.parametrize("head", ["audio_projection", "text_projection"])
def test_both_heads_are_in_fp32_beside_towers_in_bf16(head):
    types = []

    def record(module, inputs, output):
        types.append(output.dtype)

    model = pretended_model("tiny")
    model.precision = torch.bfloat16
    hook = getattr(model, head).register_forward_hook(record)
    with pretended_gpu():
        model.encode_pairs(make_batch())
    hook.remove()
    assert types == [torch.float32]


def test_the_text_mask_has_the_shape_that_transformers_does_not_check_on_the_host(tiny_model):
    shapes = []

    def record(roberta, args, options):
        shapes.append(options["attention_mask"].shape)

    hook = tiny_model.text.roberta.register_forward_pre_hook(record, with_kwargs=True)
    tiny_model.encode_text(torch.tensor([[0, 5, 2], [0, 2, 1]]))
    hook.remove()
    assert shapes == [(2, 1, 1, 3)]  # a mask of two axes is tested for padding: a sync


def test_the_mean_over_segments_is_taken_without_a_check_of_the_counts(tiny_model, monkeypatch):
    options = []
    reduce = torch.segment_reduce

    def record(*args, **kwargs):
        options.append(kwargs)
        return reduce(*args, **kwargs)

    monkeypatch.setattr(torch, "segment_reduce", record)
    tiny_model.embed_audio(noise(1))
    assert options[0]["unsafe"] is True  # the check reads the counts: a sync


# --- On a real GPU ---

def gradients(model: DualEncoder, micro_batch: int | None = None) -> Tensor:
    """Return the gradients of one step, taken as train.py takes it."""
    device = model.device
    batch = make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision == torch.float16)
    torch.manual_seed(0)
    audio, text = model.encode_pairs(batch, micro_batch)
    loss = contrastive_loss(audio, text, batch.clip_ids.to(device), model.tau)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    result = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    optimizer.zero_grad()
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("precision, near", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_step_equals_the_cpus(tiny_model, precision, near):
    model = copy.deepcopy(tiny_model).eval()  # without dropout, patchout and jitter
    expected = gradients(model)
    model.to("cuda").precision = precision
    assert (gradients(model) - expected).norm() < near * expected.norm()


@pytest.mark.gpu
def test_pieces_replay_dropout(tiny_model):
    model = copy.deepcopy(tiny_model).to("cuda").train()
    replayed = gradients(model, 2)
    whole = gradients(model)

    def encode_once(encode, *tensors, **_):
        return encode(*tensors)

    with mock.patch("dualenc.model.recompute_in_backward", encode_once):
        expected = gradients(model, 2)  # the same pieces in one graph
    assert (replayed - expected).norm() < 1e-4 * expected.norm()
    assert (whole - expected).norm() > 1e-4 * expected.norm()  # other draws of dropout
