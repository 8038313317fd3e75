"""The way over a GPU: on a pretended one anywhere, on a real one where there is one.

Pretended: tensors of FakeTensorMode have shape, type and device, but no values and no memory. It
refuses what meets on two devices, but for CPU tensors as indices, and does not look at types:
PretendedGPU does. Backward cannot run so, and code that asks for FakeTensors goes another way.
"""

import contextlib
import copy
import functools
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

PRETENDED = torch.device("cuda", 7)  # unlike a real one: what is cached by device stays apart
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
ONE_TYPE = ("mm addmm bmm linear matmul convolution conv2d native_layer_norm segment_reduce "
            "_fft_r2c").split()  # what takes floats of one type only


class PretendedGPU(TorchDispatchMode):
    """Looks at every operation on the GPU: types {operation: of its floats}, waits {copy to it}."""

    def __init__(self):
        super().__init__()
        self.types, self.waits = {}, set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if function.namespace == "prim":  # asks for a device
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = [t.fake_device if isinstance(t, FakeTensor) else t.device for t in tensors]
        if PRETENDED not in devices:
            return out
        away = [t for t, d in zip(tensors, devices, strict=True) if d != PRETENDED and t.ndim]
        if name == "index" or (name in ("to", "_to_copy") and not kwargs.get("non_blocking")):
            self.waits |= {f"{name} {tuple(t.shape)}" for t in away}
        elif name not in ("to", "_to_copy"):
            assert not away, f"{name} on the devices {devices}"
        if name in ONE_TYPE:
            floats = {t.dtype for t in tree_leaves(args) if getattr(t, "ndim", 0)} - {torch.int64}
            assert len(floats) == 1 and [*floats][0].is_floating_point, f"{name} of {floats}"
            self.types.setdefault(name, set()).update(floats)
        return out


@contextlib.contextmanager
def pretended_gpu():
    pieces = Batch.pieces

    def pieces_outside(batch, pairs):  # it reads values, on the CPU
        with unset_fake_temporarily():
            return list(pieces(batch, pairs))

    def value(tensor):
        assert tensor.device.type == "cpu", "the GPU is waited for"
        return 0

    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),  # else no autocast
        mock.patch.object(Batch, "pieces", pieces_outside),
        mock.patch.object(Tensor, "item", value),
        FAKE, PretendedGPU() as gpu,
    ):
        yield gpu


@functools.cache
def pretended_model(preset: str) -> DualEncoder:
    """A model as .to(PRETENDED) would leave it: all that is registered has moved."""
    with pretended_gpu():
        model = DualEncoder.create(preset, "random", CAPTIONS).train()
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(value.to(PRETENDED))
            for name, value in module.named_buffers(recurse=False):
                module._buffers[name] = value.to(PRETENDED)
    return model


def make_batch() -> Batch:
    """Five pairs of four clips, every second one of two segments; the middle pairs share theirs."""
    clips = [to_int16(noise(3 + 10 * (i % 2), seed=i)) for i in range(4)]
    rows, tokens = torch.tensor([0, 1, 2, 2, 3]), torch.arange(30).view(5, 6)
    return Batch(*to_segments(clips), rows, tokens, rows, rows)


def checked(encode, *tensors, **options):
    assert {t.device for t in tensors} == {PRETENDED}  # else its random state is not replayed
    return checkpoint(encode, *tensors, **options)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None])
def test_devices_and_types_fit(precision, tmp_path):
    model, batch, own = pretended_model("report"), make_batch(), precision or torch.float32
    model.precision = precision
    with pretended_gpu() as gpu, mock.patch("dualenc.model.checkpoint", checked):
        audio, text = model.encode_pairs(batch, 3 if precision == torch.bfloat16 else None)
        ids = batch.clip_ids.to(PRETENDED, non_blocking=True)
        teacher = [torch.zeros(6, 512, device=PRETENDED)[ids]]
        contrastive_loss(audio, text, ids, model.tau)
        distillation_loss(audio, text, teacher, teacher, model.tau)
    assert not gpu.waits  # within a step
    assert gpu.types.pop("addmm") == {own, torch.float32}  # autocast for towers, not for heads,
    assert set.union(*gpu.types.values()) == {torch.float32}  # log-mel, norms and losses

    model = pretended_model("tiny")
    model.precision = precision
    with pretended_gpu() as gpu, mock.patch("dualenc.model.checkpoint", checked):
        assert {t.device for t in model.encode_pairs(batch, 3)} == {PRETENDED}
        assert not gpu.waits  # within a step
        audio, text = model.embed_audio([noise(11), noise(4)]), model.embed_text(CAPTIONS)
        shares, _ = embed_file(model, write_wav(tmp_path / "a.wav", noise(11)))
    assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (audio, text, shares))


# --- On a real GPU ---


def gradients(model: DualEncoder, micro_batch: int | None = None) -> Tensor:
    """Of one step, taken as train.py takes it."""
    device, batch = model.device, make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision == torch.float16)
    torch.manual_seed(0)
    audio, text = model.encode_pairs(batch, micro_batch)
    loss = contrastive_loss(audio, text, batch.clip_ids.to(device), model.tau)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    found = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    optimizer.zero_grad()
    return found


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
    found, whole = gradients(model, 2), gradients(model)
    with mock.patch("dualenc.model.checkpoint", lambda encode, *tensors, **_: encode(*tensors)):
        expected = gradients(model, 2)  # the same pieces in one graph
    assert (found - expected).norm() < 1e-4 * expected.norm() < (whole - expected).norm()
