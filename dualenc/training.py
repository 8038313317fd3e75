"""The one training loop, for both stages (report, section 2; the rest as in the baseline).

schedule -> loop. A script hands in the loss; a step's gradient is in step.py.
"""

import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from dualenc import InputError, stop_signals
from dualenc.checkpoints import check_shapes, load_strictly
from dualenc.config import TAU_BOUNDS
from dualenc.data import Batch, PairBatches
from dualenc.figures import write_curves
from dualenc.model import DualEncoder
from dualenc.processes import Processes
from dualenc.runs import Run
from dualenc.step import ADVICE, STOPPED, Loss, Losses, step_gradients
from dualenc.workers import load, lost_workers_are_named

Validate = Callable[[DualEncoder], dict[str, float]]
SELECTION_METRIC = "mAP@10"  # best.pt is the epoch with the highest on the validation split


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train; the defaults are the report's, or the baseline's where it is silent."""

    epochs: int = 20
    batch_size: int = 64
    captions_per_clip: int = 1
    micro_batch: int | None = None
    warmup_epochs: float = 1
    decay_epochs: float = 15
    max_lr: float = 2e-5
    min_lr: float = 1e-7
    weight_decay: float = 0.0
    seed: int = 0
    max_steps: int | None = None
    log_every: int = 10
    checkpoint_every: int | None = None
    workers: int = 2


# --- Schedule ---


def learning_rate(
    step: int, steps_per_epoch: int, warmup_epochs: float, decay_epochs: float,
    max_lr: float, min_lr: float,
) -> float:
    """Linear from min_lr to max_lr over the warm-up, a half cosine back to min_lr, then constant.

    Args:
        step: from 0, counted over the whole run.
        warmup_epochs, decay_epochs: lengths; the decay begins where the warm-up ends.
    """
    warmup, decay = warmup_epochs * steps_per_epoch, decay_epochs * steps_per_epoch
    if step < warmup:
        return min_lr + (max_lr - min_lr) * step / warmup
    if step < warmup + decay:
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2
    return min_lr


# --- The loop ---


class Trainer:
    """A model in training: everything that changes from step to step, and how to go on with it."""

    def __init__(
        self, model: DualEncoder, loss_of: Loss, run: Run, options: Options, processes: Processes
    ):
        self.model, self.loss_of, self.run = model, loss_of, run
        self.options, self.processes = options, processes
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=options.min_lr,
            weight_decay=options.weight_decay, fused=True,
        )
        fp16 = model.precision == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
        self.step, self.best = 0, -1.0
        self.tau_was_bound = False
        self.losses = Losses([])
        self._resume()

    def _resume(self) -> None:
        state = self.run.load_state()
        if state is not None:
            self._take(state)
        self.run.cut_log(state)
        if not self.processes.agree(self.run.settings, self.step, self.model.tokenizer.to_str()):
            raise InputError(
                f"{self.run.folder}: the processes differ in their settings or find another "
                "last.pt; give every machine the same command and a folder that all of them share"
            )
        self.processes.copy_from_first(self.model)

    def _take(self, state: dict) -> None:
        load_strictly(self.model, state["model"], self.run.last)
        try:
            self._check_moments(state["optimizer"]["state"])
            # A copy, or the moments would stay where the file is mapped.
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            self.scaler.load_state_dict(state["scaler"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{self.run.last}: is not this run's state ({error})") from error
        self.step, self.best = state["step"], state["best"]
        self.losses = Losses(state["losses"])

    def _check_moments(self, state: dict[int, dict[str, Tensor]]) -> None:
        """See that AdamW's moments are there, in their parameters' shapes, before they are copied.

        There are none as long as fp16's scaler skips the first steps.
        """
        shapes = [tuple(p.shape) for p in self.optimizer.param_groups[0]["params"]]
        if state.keys() != set(range(len(shapes))) and (state or not self.scaler.is_enabled()):
            raise ValueError("its moments are those of other weights")
        for i, moments in state.items():
            check_shapes(moments, {"exp_avg": shapes[i], "exp_avg_sq": shapes[i], "step": ()})

    def save(self) -> None:
        """Write last.pt.

        Raises:
            InputError: a loss, or a weight after a step whose loss was still finite, is not a
                finite number; the last.pt before is kept.
        """
        losses = self.losses.fetch()
        if not all(weights.isfinite().all() for weights in self.model.parameters()):
            raise InputError(
                f"step {self.step - 1}: it left weights that are not finite numbers; {STOPPED}"
            )
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best": self.best,
            "losses": losses,
        }
        self.run.save_state(self.model.checkpoint(), state)

    def fit(self, batches: PairBatches, validate: Validate) -> signal.Signals | None:
        """Train to the last epoch or step; returns the signal that ended it before, if any.

        An epoch's end: last.pt, validation, best.pt, log, last.pt. A run that ends among these goes
        on with the validation; that of a part of an epoch (--max-steps) leaves last.pt as it is.
        """
        options, per_epoch = self.options, batches.steps_per_epoch
        total, begun = options.epochs * per_epoch, self.step
        end = min(total, options.max_steps or total)
        loader = load(batches, range(begun, end), options.workers, self.model.device)
        bar = self._progress_bar(batches, end)
        with stop_signals() as stop, bar, lost_workers_are_named():
            if self.losses.fetch() and self.step % per_epoch == 0:
                self._end_epoch(bar, validate, per_epoch)
            for batch in loader:
                rate = self._rate(per_epoch)
                self._train_step(batch, rate)
                bar.update(len(batch.pair_ids))
                in_epoch = (self.step - 1) % per_epoch + 1
                whole = in_epoch == per_epoch
                if self.step == begun + 1:
                    self._show(bar, rate, self.losses.mean(1))
                if in_epoch % options.log_every == 0 or whole:
                    self._log_interval(bar, rate, per_epoch)
                stopping = self.processes.highest(stop.requested or 0)
                due = options.checkpoint_every and self.step % options.checkpoint_every == 0
                if stopping or due or whole or self.step == end:
                    self.save()
                if whole and not stopping:
                    self._end_epoch(bar, validate, per_epoch)
                    stopping = self.processes.highest(stop.requested or 0)
                if stopping:
                    return signal.Signals(stopping)
            if self.losses.fetch():  # --max-steps ended it within an epoch: show what it has learnt
                self._end_epoch(bar, validate, per_epoch)
        return None

    def _rate(self, per_epoch: int) -> float:
        o = self.options
        return learning_rate(
            self.step, per_epoch, o.warmup_epochs, o.decay_epochs, o.max_lr, o.min_lr
        )

    def _train_step(self, batch: Batch, rate: float) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        try:
            losses = step_gradients(
                self.model, batch, self.loss_of, self.processes, (self.options.seed, self.step),
                self.options.micro_batch, self.scaler.scale,
            )
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"step {self.step}: the GPU's memory is too small for this batch; --micro-batch 8 "
                "computes the same gradient in less"
            ) from error
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.model.config.learn_tau:
            with torch.no_grad():
                self.model.tau.clamp_(*TAU_BOUNDS)
            losses["tau"] = self.model.tau.detach().clone()
        self.losses.add(self.step, losses)
        self.step += 1

    def _log_interval(self, bar: tqdm, rate: float, per_epoch: int) -> None:
        in_epoch = len(self.losses.fetch())
        losses = self.losses.mean((in_epoch - 1) % self.options.log_every + 1)
        self._show(bar, rate, losses)
        self._say_if_tau_is_bound(bar)
        epoch = (self.step - 1) // per_epoch + 1
        self.run.log(step=self.step, epoch=epoch, lr=rate, **losses)

    def _show(self, bar: tqdm, rate: float, losses: dict[str, float]) -> None:
        bar.set_postfix(loss=f"{losses['loss']:.3f}", lr=f"{rate:.1e}", refresh=False)

    def _say_if_tau_is_bound(self, bar: tqdm) -> None:
        """Tell, once, that the temperature wants to be where it may not."""
        tau = self.losses.fetch()[-1].get("tau")
        at = [b for b in TAU_BOUNDS if tau is not None and math.isclose(tau, b, rel_tol=1e-6)]
        if at and self.processes.first and not self.tau_was_bound:
            bar.write(f"step {self.step}: tau has reached its bound {at[0]:g} and is held there")
        self.tau_was_bound = self.tau_was_bound or bool(at)

    def _end_epoch(self, bar: tqdm, validate: Validate, per_epoch: int) -> None:
        """Validate, and keep the best; after a part of an epoch, where no whole one has a best."""
        epoch, whole = -(-self.step // per_epoch), self.step % per_epoch == 0
        try:
            metrics, losses = validate(self.model), self.losses.mean()
        except InputError as error:
            raise InputError(f"epoch {epoch}, after step {self.step}: {error}; {ADVICE}") from error
        self.losses = Losses([])
        metric = metrics[SELECTION_METRIC]
        is_best = metric > self.best if whole else self.best < 0
        if is_best:
            self.best = metric
            self.run.save_best(self.model.checkpoint(), metrics, epoch)
        self.run.log(step=self.step, epoch=epoch, **losses, validation=metrics)
        if whole:
            self.save()
        bar.set_description_str(self._epoch_shown(per_epoch))
        if self.processes.first:
            bar.write(
                f"epoch {epoch:2}: loss {losses['loss']:.3f}, validation {SELECTION_METRIC} "
                f"{100 * metric:.2f} %" + (" (best so far)" if is_best else "")
            )
            try:
                write_curves([self.run.folder], self.run.folder / "curves.svg")
            except InputError as error:  # the run does not depend on it
                bar.write(str(error))

    def _epoch_shown(self, per_epoch: int) -> str:
        last = self.options.epochs
        return f"epoch {min(self.step // per_epoch + 1, last)}/{last}"

    def _progress_bar(self, batches: PairBatches, end: int) -> tqdm:
        pairs = len(batches.clip_of_pair)
        per_epoch = batches.steps_per_epoch

        def seen(step: int) -> int:  # an epoch's last batch may be short
            return pairs * (step // per_epoch) + batches.pairs_per_batch * (step % per_epoch)

        return tqdm(
            desc=self._epoch_shown(per_epoch), unit="pair",
            total=seen(end), initial=seen(self.step), disable=not self.processes.first,
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {rate_fmt}, {remaining} left{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True,
        )
