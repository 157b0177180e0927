"""`Trainer`: the loop that fits a model to data, survives being stopped, and goes on bit for bit."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar.data import Batch, Dataset, Sampler, batches, show
from entrenar.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UsageError
from entrenar.formats import checkpoint
from entrenar.formats.files import write_json
from entrenar.models.memory import peak_resident_bytes
from entrenar.observe.curve import write_curve
from entrenar.observe.events import emit, subscribed
from entrenar.observe.sinks import MetricsWriter, read_metrics
from entrenar.optim import clip_scale, grad_norm
from entrenar.tensor import default_rng, manual_seed
from entrenar.train.config import TrainConfig
from entrenar.train.data import AnyPath, TrainingData, batches_per_epoch, prepare
from entrenar.train.evaluate import Evaluation, evaluate
from entrenar.train.plan import plan_for
from entrenar.train.record import identity, require_same, run_record
from entrenar.train.setup import make_optimizer, make_schedule, resolved
from entrenar.train.stop import StopRequested, StopSignals

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

RECENT = 50  # steps over which TrainResult.train_loss is a mean


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: optimizer steps done, those of a resumed run's earlier parts included. total_steps: as planned.
        train_loss: mean over the last 50 steps, nats a token; NaN where there was none.
        evaluation: at the end, None without evaluation data or where the run was stopped.
        skipped: steps that were not applied. stopped_by: "SIGINT" or "SIGTERM", None for a finished run.
        out: directory of the run, or None.
    """

    steps: int
    total_steps: int
    train_loss: float
    evaluation: Evaluation | None
    skipped: int
    stopped_by: str | None
    out: Path | None

    @property
    def eval_loss(self) -> float | None:
        return None if self.evaluation is None else self.evaluation.nll


@dataclass
class Progress:
    """Where a run stands. All of it is saved in a checkpoint."""

    step: int = 0  # optimizer steps done or skipped
    tokens: int = 0  # labels learned from
    elapsed: float = 0.0  # seconds of all parts of the run
    skipped: int = 0
    consecutive: int = 0  # of the skipped ones, those since the last applied
    evaluated: int = 0  # step of the last evaluation that was finished


class Trainer:
    """Fits `model` to `data` as `config` says; ``fit()`` runs it.

    What is trained is what ``model.named_parameters()`` gives: the adapter, or all weights. With ``config.out`` the
    run's directory holds checkpoints/, metrics.jsonl, run.json and, at the end, loss.svg; the caller saves the model
    or adapter as it likes. Without it nothing is written.

    A step whose loss or gradient is NaN or infinite is not applied: weights and optimizer stay as they were. Ctrl-C
    or SIGTERM saves a checkpoint before the next micro-batch and returns; a second one ends the process at once.

    Args:
        data: rows (`TrainingData`), or the path of a file or directory, or several, to be read with the model's
            tokenizer.

    Raises:
        ConfigError: nothing is trainable.
        DataError, TokenizerError: see `prepare`.
        UsageError: `out` holds a run and ``config.resume`` is not set.
        CheckpointError: what `out` holds can't be resumed; the message names the setting that differs.
        MemoryLimitError: a step does not fit into ``config.memory_budget``.
    """

    def __init__(
        self, model: CausalLM, data: TrainingData | AnyPath | Iterable[AnyPath], config: TrainConfig | None = None
    ) -> None:
        self.model = model
        self.config = config = resolved(config or TrainConfig(), model.config, model.adapter)
        self.parameters = dict(model.named_parameters())
        if not any(tensor.ndim >= 2 for tensor in self.parameters.values()):
            raise ConfigError(
                "model", "no matrix of it is trainable; attach an adapter with add_lora, or load it with dtype='f32'"
            )
        self.out = None if config.out is None else Path(config.out)
        newest = self._newest_checkpoint()
        self.data = data if isinstance(data, TrainingData) else prepare(data, model.tokenizer, config)
        self.sampler = Sampler(len(self.data.train), config.batch_size, config.seed, replacement=config.random_crops)
        self.batches_per_epoch = batches_per_epoch(self.data.train, config)
        micro_batches = config.num_train_epochs * self.batches_per_epoch
        self.total_steps = config.max_steps or max(1, math.ceil(micro_batches / config.gradient_accumulation_steps))
        self.optimizer = make_optimizer(config, self.parameters)
        self.schedule = make_schedule(config, self.total_steps)
        self.plan = plan_for(model, config)
        self.identity = identity(model, config, self.data.digest())
        self.progress = Progress()
        self.evaluation: Evaluation | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._metrics_position: int | None = None
        self._resumed_from: int | None = None
        self._rng_state: dict[str, int] | None = None
        if newest is not None:
            self._load(newest)

    def fit(self) -> TrainResult:
        """Run to the end, or until a signal.

        Raises:
            NonFiniteError: `max_skipped_steps` steps in a row, or all, could not be applied; the message reports them.
        """
        was_training = self.model.training
        before = self.model.model.recompute, self.model.logits_rows
        self.model.model.recompute, self.model.logits_rows = self.plan.recomputed, self.plan.rows
        if self._rng_state is None:
            manual_seed(self.config.seed)
        else:
            default_rng.load_state_dict(self._rng_state)
        stopped_by = None
        with ExitStack() as stack:
            self._stop = stack.enter_context(StopSignals())
            self._metrics = self._open_run(stack)
            self._clock = time.monotonic() - self.progress.elapsed
            self._say_data()
            emit(
                "train.plan",
                predicted=self.plan.predicted,
                budget=self.plan.budget,
                recomputed=self.plan.recomputed,
                layers=self.plan.layers,
            )
            emit(
                "train.start",
                step=self.progress.step,
                total_steps=self.total_steps,
                resumed=self._resumed_from is not None,
            )
            try:
                self._run()
            except StopRequested:
                self._save()
                stopped_by = self._stop.name
                emit("train.stop", step=self.progress.step, reason=stopped_by)
            finally:
                self.model.train(was_training)
                self.model.model.recompute, self.model.logits_rows = before
                self.optimizer.zero_grad()
                self._rng_state = default_rng.state_dict()
                if self._metrics is not None:
                    self._metrics_position = self._metrics.position()
                    self._draw_curve()
        recent = list(self._recent)
        return TrainResult(
            steps=self.progress.step,
            total_steps=self.total_steps,
            train_loss=sum(recent) / len(recent) if recent else math.nan,
            evaluation=self.evaluation if stopped_by is None else None,
            skipped=self.progress.skipped,
            stopped_by=stopped_by,
            out=self.out,
        )

    # ---- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        progress, config = self.progress, self.config
        self.model.train()
        saved = progress.step if self._resumed_from is not None else -1
        while True:
            if self.data.valid is not None and self._due_evaluation():
                self._evaluate(self.data.valid)
                saved = -1
            finished = progress.step >= self.total_steps
            # Not amid skipped steps: were the weights ruined, the good checkpoints would be pruned one by one.
            due = progress.step > 0 and progress.step % config.save_every == 0 and progress.consecutive == 0
            if (due or finished) and saved != progress.step:
                self._save()
                saved = progress.step
            if finished:
                emit("train.end", step=progress.step, total_steps=self.total_steps)
                return
            self._stop.check()
            self._step()

    def _step(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` micro-batches, applied or skipped.

        A stop between two micro-batches puts data order and random numbers back to where the step began, so that
        the resumed run does the whole step again.
        """
        began = time.monotonic()
        progress = self.progress
        before = default_rng.state_dict(), self.sampler.state_dict()
        micro_batches = [
            self.data.train.batch(next(self.sampler)) for _ in range(self.config.gradient_accumulation_steps)
        ]
        total = sum(batch.tokens for batch in micro_batches)
        if total == 0:
            raise DataError(f"step {progress.step + 1}: every label in it is masked; nothing to learn")
        try:
            loss = self._accumulate(micro_batches, total)
        except StopRequested:
            default_rng.load_state_dict(before[0])
            self.sampler.load_state_dict(before[1])
            self.optimizer.zero_grad()
            raise
        norm = grad_norm(self.parameters.values())
        rate = self.schedule(progress.step)
        progress.step += 1
        progress.elapsed = time.monotonic() - self._clock
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(rate, clip_scale(norm, self.config.max_grad_norm or math.inf))
            self.optimizer.zero_grad()
            progress.tokens += total
            progress.consecutive = 0
            self._recent.append(loss)
            if progress.step % self.config.log_every == 0 or progress.step == self.total_steps:
                self._say_step(loss, rate, norm, sum(batch.ids.size for batch in micro_batches), began)
        else:
            self.optimizer.zero_grad()
            self._skip(loss, norm)

    def _accumulate(self, micro_batches: list[Batch], total: int) -> float:
        """Adds up the gradients of the mean loss over all `total` labels; returns that mean."""
        loss = 0.0
        for batch in micro_batches:
            self._stop.check()
            if batch.tokens == 0:
                continue
            part = self.model.loss(batch.ids, batch.labels, denominator=total, starts=batch.starts)
            loss += part.item()
            if not math.isfinite(loss):
                break  # the step will be skipped
            part.backward()
        return loss

    def _say_data(self) -> None:
        """How much data there is, and the beginning of a sample with its mask: a wrong template is seen at once."""
        train, valid, tokenizer = self.data.train, self.data.valid, self.model.tokenizer
        sample = None if tokenizer is None else shorten(show(train.sample(0), tokenizer))
        rows = 0 if valid is None else len(valid)
        emit(
            "train.data",
            rows=len(train),
            valid_rows=rows,
            seq_len=self.config.seq_len,
            truncated=train.truncated,
            sample=sample,
        )

    def _say_step(self, loss: float, rate: float, norm: float, positions: int, began: float) -> None:
        progress = self.progress
        emit(
            "train.step",
            step=progress.step,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            epoch=round(self.sampler.progress, 4) if not self.config.random_crops else None,
            tokens=progress.tokens,
            tokens_per_second=positions / max(time.monotonic() - began, 1e-9),
            peak_rss_gb=peak_resident_bytes() / 2**30,
            elapsed=progress.elapsed,
        )

    def _skip(self, loss: float, norm: float) -> None:
        """Account for a step that was not applied; the last allowed one in a row, or of all, ends the run."""
        progress, limit = self.progress, self.config.max_skipped_steps
        progress.skipped += 1
        progress.consecutive += 1
        reason = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        emit(
            "train.skip",
            step=progress.step,
            loss=loss,
            grad_norm=norm,
            consecutive=progress.consecutive,
            reason=reason,
        )
        none = progress.skipped == progress.step  # of all steps so far was applied
        if progress.consecutive < limit and not (none and progress.step >= self.total_steps):
            return
        emit("train.stop", step=progress.step, reason=f"{progress.consecutive} steps in a row could not be applied")
        newest = None if self.out is None else checkpoint.latest(self.out / "checkpoints")
        cause = f"Try a smaller learning_rate (it is {self.config.learning_rate:g}), a warm-up, or look at the data."
        if none:
            cause = "None was applied, so it comes from the model, the adapter or the data as they were given."
        raise NonFiniteError(
            f"training stopped after step {progress.step}: {progress.consecutive} steps in a row were not applied "
            f"because of NaN or infinity ({reason}). The weights are those after step "
            f"{progress.step - progress.consecutive}; "
            + (f"the newest checkpoint is {newest}. " if newest else "no checkpoint was saved yet. ")
            + cause
        )

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def _due_evaluation(self) -> bool:
        """Whether the present step is one to evaluate at, and that has not been done."""
        step, every = self.progress.step, self.config.eval_every
        if step == 0 or self.progress.evaluated == step:
            return False
        return step >= self.total_steps or (every is not None and step % every == 0)

    def _evaluate(self, valid: Dataset) -> None:
        step = self.progress.step
        self.evaluation = evaluate(self.model, self._evaluation_batches(valid))
        self.progress.evaluated = step
        self.progress.elapsed = time.monotonic() - self._clock
        emit(
            "train.eval",
            step=step,
            nll=self.evaluation.nll,
            perplexity=self.evaluation.perplexity,
            tokens=self.evaluation.tokens,
        )

    def _evaluation_batches(self, valid: Dataset) -> Iterator[Batch]:
        size, limit = self.config.batch_size, self.config.eval_batches
        count = -(-len(valid) // size)
        count = count if limit is None else min(limit, count)
        emit("train.eval.start", step=self.progress.step, batches=count)
        for i, batch in zip(range(1, count + 1), batches(valid, size), strict=False):
            self._stop.check()
            yield batch
            emit("train.eval.batch", step=self.progress.step, batch=i, batches=count)

    # ---- the run's directory --------------------------------------------------------------------------------------

    def _newest_checkpoint(self) -> Path | None:
        """The checkpoint to resume, None to start. Never starts over a run that is there."""
        if self.out is None:
            if self.config.resume:
                raise UsageError("resume: give out, the directory of the run to resume")
            return None
        newest = checkpoint.latest(self.out / "checkpoints")
        if newest is not None and not self.config.resume:
            raise UsageError(
                f"{self.out}: holds a run already (newest checkpoint {newest.name}); resume it, or give another out"
            )
        if newest is None and self.config.resume and not (self.out / "run.json").exists():
            raise CheckpointError(f"{self.out}: there is no run to resume")
        return newest

    def _open_run(self, stack: ExitStack) -> MetricsWriter | None:
        if self.out is None:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        record = run_record(
            self.model, self.config, self.plan, self.data.files, self.total_steps, self._resumed_from
        )
        write_json(self.out / "run.json", record)
        metrics = MetricsWriter(self.out / "metrics.jsonl", self._metrics_position)
        stack.callback(metrics.close)
        stack.enter_context(subscribed(metrics))
        return metrics

    def _draw_curve(self) -> None:
        if self.out is not None:
            write_curve(self.out / "loss.svg", read_metrics(self.out / "metrics.jsonl"), f"Training of {self.out.name}")

    def _save(self) -> None:
        """Commit a checkpoint of everything that the next step depends on."""
        if self.out is None or self._metrics is None:
            return
        root = self.out / "checkpoints"
        optimizer = self.optimizer.state_dict(copy=False)
        arrays = {f"weight/{name}": tensor.data for name, tensor in self.parameters.items()}
        arrays |= {f"optimizer/{name}": array for name, array in optimizer.pop("arrays").items()}
        state = {
            "identity": self.identity,
            "progress": vars(self.progress),
            "recent_losses": list(self._recent),
            "evaluation": None if self.evaluation is None else vars(self.evaluation),
            "optimizer": optimizer,
            "rng": default_rng.state_dict(),
            "sampler": self.sampler.state_dict(),
            "metrics_bytes": self._metrics.position(),
        }
        path = checkpoint.save(root / f"step-{self.progress.step:08d}", arrays, state)
        checkpoint.prune(root, self.config.keep_checkpoints)
        emit("train.checkpoint", step=self.progress.step, path=str(path))

    def _load(self, path: Path) -> None:
        """Put everything back that `_save` wrote, after making sure that it is of this run."""
        arrays, state = checkpoint.load(path)
        try:
            require_same(state["identity"], self.identity, str(path))
            optimizer = {key.removeprefix("optimizer/"): arrays[key] for key in arrays if key.startswith("optimizer/")}
            weights = {name: arrays[f"weight/{name}"] for name in self.parameters}
            for name, tensor in self.parameters.items():
                if weights[name].shape != tensor.shape or weights[name].dtype != tensor.dtype:
                    raise CheckpointError(f"{path}: {name} is {weights[name].dtype} {weights[name].shape}")
            self.optimizer.load_state_dict({**state["optimizer"], "arrays": optimizer})
            self.sampler.load_state_dict(state["sampler"])
            self.progress = Progress(**state["progress"])
            self.evaluation = None if state["evaluation"] is None else Evaluation(**state["evaluation"])
            self._recent.extend(state["recent_losses"])
            self._metrics_position = int(state["metrics_bytes"])
            self._rng_state = dict(state["rng"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: its state lacks what a training run needs: {error!r}") from error
        for name, tensor in self.parameters.items():
            tensor.data[...] = weights[name]
            tensor.version += 1
        self._resumed_from = self.progress.step


def shorten(text: str, limit: int = 600) -> str:
    """Text of at most `limit` characters: its beginning and its end."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]}"
