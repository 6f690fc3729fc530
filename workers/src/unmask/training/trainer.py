"""The run: stages, steps, measurements and checkpoints, from wherever the last attempt came to.

All processes run the same loop and take the same decisions from the same sums; the
leader alone writes files. What happens after a step has an order that restarts rely on:
measurement and export first, then the log is synced, then the checkpoint is committed. So
whatever belongs to a committed step is there, and what is not committed is done again,
with the same result, bit for bit, on as many processes and threads.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unmask.errors import DivergedError, UsageError
from unmask.models.config import ModelConfig
from unmask.models.loading import read_values
from unmask.models.merging import merge
from unmask.models.registry import parse_config
from unmask.models.shape import ModelShape, adapters_of, shape_of
from unmask.models.slots import Slot
from unmask.training.arrangement import Reference, blank_weights, first_weights, reference_of
from unmask.training.background import BackgroundWriter
from unmask.training.balance import Balancing
from unmask.training.checkpoints import Checkpoint, CheckpointStore
from unmask.training.distributed import World
from unmask.training.identity import refuse_other_job
from unmask.training.learner import Learner
from unmask.training.manifest import StepsBefore, TrainingState
from unmask.training.merging import best_of, losses_of, open_checkpoint
from unmask.training.metrics_log import MetricsLog
from unmask.training.mirrored_checkpoints import MirroredCheckpoints
from unmask.training.observation import StepWatch
from unmask.training.packing import make_rows
from unmask.training.plan import StagePlan, stage_after
from unmask.training.preparation import Preparation, PreparedStage
from unmask.training.run_folder import RunFolder
from unmask.training.sizing.flops import flops_of
from unmask.training.stability import Past, Verdict, judge, remember
from unmask.training.steps import Preference, Totals, gradient_step, micro_batches, model_inputs
from unmask.training.stream import Purpose, philox_key

__all__ = ["Ending", "Observer", "Trainer"]

_log = logging.getLogger(__name__)

_SETTLE_S = 60.0
"""How long a run that fails waits for a checkpoint that is being written."""

Observer: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Called by the leader with each line of the log."""


class Ending(Enum):
    """How a run that did not fail ended."""

    COMPLETED = "Completed"
    ALREADY_COMPLETE = "AlreadyComplete"
    STOPPED = "Stopped"
    """Saved, on request."""


@dataclass(slots=True)
class _Position:
    """Where the run is."""

    step: int = 0
    """Steps done."""
    cursor: int = 0
    """Documents consumed in the present stage."""
    stage_seconds: float = 0.0
    """Time that the present stage took in earlier attempts."""
    past: Past = field(default_factory=Past)
    """What the next step is judged by."""


class Trainer:
    """One attempt of a run."""

    def __init__(
        self,
        preparation: Preparation,
        world: World,
        folder: RunFolder,
        *,
        stop_requested: Callable[[], bool],
        observe: Observer,
        progress: Callable[[str], None] = lambda done: None,
        keeps_log: bool = False,
        fetch_first_model: Callable[[], None] = lambda: None,
    ) -> None:
        """Look for a checkpoint to go on from, and restore or make the model.

        Args:
            preparation: What the job needs beside weights.
            world: This process among all.
            folder: The run's.
            stop_requested: Whether this process was asked to stop.
            observe: Called by the leader with each line of the log.
            progress: Called with a word for each thing that is done.
            keeps_log: Whether a process that does not lead writes the log as well: into another folder.
            fetch_first_model: Called before the weights are read that the run starts from.

        Raises:
            UsageError: There is a checkpoint, and it is another job's or ``resume`` is Never.
            ModelError: The model or all checkpoints are damaged.
        """
        self._prepared, self._spec = preparation, preparation.spec
        self._world, self._folder = world, folder
        self._stop_requested, self._observe, self._progress = stop_requested, observe, progress
        self._plans = [stage.plan for stage in preparation.stages]
        self._total_steps = self._plans[-1].end
        self._keeps_log, self._fetch_first_model = world.leads or keeps_log, fetch_first_model
        self._store = _store_of(folder, keep_last=self._spec.checkpoint.keep_last)
        self.checkpoint = self._find_checkpoint()
        """The newest committed one."""
        self._at = self._position()
        self._compared: tuple[int, Reference] | None = None
        with world.together():
            self._learner = self._first_learner()
        self._writer = BackgroundWriter()
        self._saving_s = 0.0
        self._shape: tuple[ModelConfig, ModelShape] | None = None
        self._beside = world
        if self._spec.checkpoint.asynchronous and self._learner.weights.shared_out:
            self._beside = world.beside()
        self._stage_started = time.monotonic()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._at.step

    def run(self) -> Ending:
        """Train to the end, or until a process is asked to stop.

        Raises:
            DivergedError: A loss or gradient is not finite, and the job does not say to skip such steps; or
                too many were skipped.
        """
        with self._world.together():
            if self._world.leads and self.checkpoint is not None:
                self._store.remove_older(self._at.step, self._still_wanted())
        if self._at.step == self._total_steps and not self._is_to_be_merged(self._plans[-1]):
            with self._world.together():
                removed = self._world.leads and not self._folder.holds(self._folder.model)
            removed = bool(self._world.from_leader(int(removed)))
            if removed and self._plans[-1].merge_best is not None:
                self._learner.weights.fill(self._exported(self._plans[-1]))
            self._write_models(self._plans[-1], [self._folder.model] if removed else [])
            return Ending.ALREADY_COMPLETE
        if self._world.leads:
            self._store.remove_leftovers()
            self._folder.remove_leftovers()
        if self._keeps_log:
            self._metrics = MetricsLog(self._folder.metrics, step=self._at.step)
        try:
            while (plan := stage_after(self._plans, self._at.step)) is not None:
                if plan.index and self._at.step == plan.first_step:
                    self._merge(self._plans[plan.index - 1])
                if self._run_stage(self._prepared.stages[plan.index]):
                    return Ending.STOPPED
            self._merge(self._plans[-1])
        finally:
            self.checkpoint = self._writer.settle(_SETTLE_S) or self.checkpoint
            if self._keeps_log:
                self._metrics.__exit__()
        return Ending.COMPLETED

    # Where to begin

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, if there is one and it is this job's."""
        checkpoint = self._store.agreed(self._world)
        if checkpoint is None:
            return None
        if self._spec.checkpoint.resume == "Never":
            raise UsageError(
                f"spec.checkpoint.resume: Never, but {checkpoint.place} exists; set Auto to go on from it, "
                "or name another checkpoint.uri"
            )
        own = json.loads(json.dumps(self._prepared.identity))
        refuse_other_job(checkpoint.manifest.job, own, where=checkpoint.place)
        _log.info("going on from %s", checkpoint.place)
        return checkpoint

    def _position(self) -> _Position:
        at = self._position_saved()
        cursor, rollbacks = self._last_jump(at.step)
        if rollbacks > at.past.rollbacks:
            at.cursor, at.past = cursor, at.past.gone_back(rollbacks)
        return at

    def _position_saved(self) -> _Position:
        """Where the checkpoint was taken, or the beginning."""
        if self.checkpoint is None:
            return _Position()
        step, state = self.checkpoint.manifest.step, self.checkpoint.manifest.state
        before = state.steps_before
        past = Past()
        if before is not None:
            past = Past(tuple(before.losses), tuple(before.norms), before.skipped, before.rollbacks)
        if state.stage_step == self._plans[state.stage].steps:  # the next stage starts anew
            return _Position(step, past=past.next_stage())
        return _Position(step, state.cursor, state.stage_seconds, past)

    def _last_jump(self, step: int) -> tuple[int, int]:
        """The cursor at which the run went on when it last went back to ``step``, and the jump's number.

        The log says so. Lines of later steps are cut off it when the run goes on, so what it says of
        ``step`` is what came of this very checkpoint. A jump that was not written yet is decided again.
        """
        jumps = [
            (line["cursor"], line["rollbacks"])
            for line in (
                self._folder.log_lines() if self._world.leads and self._folder.metrics.exists() else ()
            )
            if line["kind"] == "rollback" and line["step"] == step
        ]
        cursor, rollbacks = jumps[-1] if jumps else (0, 0)
        return self._world.from_leader(cursor), self._world.from_leader(rollbacks)

    def _first_learner(self) -> Learner:
        if self.checkpoint is None or self._spec.lora is not None:
            self._fetch_first_model()
        if self.checkpoint is None:
            return Learner(first_weights(self._spec, self._prepared.config, self._world), self._spec)
        config = parse_config(self.checkpoint.manifest.config, source=f"{self.checkpoint.place}: config")
        learner = Learner(blank_weights(self._spec, config, self._world), self._spec)
        learner.restore(self.checkpoint)
        return learner

    # One stage

    def _run_stage(self, stage: PreparedStage) -> bool:
        """Run what is left of a stage; whether it was stopped on request."""
        plan = stage.plan
        self._stage_started = time.monotonic()
        if self._at.step == plan.first_step and self._learner.model.config != plan.config:
            self._learner = self._learner.recast(plan.config)
        if plan.beta is not None and self._at.step == plan.first_step:
            self._write_reference(plan)
        while self._at.step < plan.end:
            stop = self._one_step(stage)
            self._progress(f"step {self._at.step}")
            self._heed_writer()
            if self._spec.stability and self._at.past.skipped >= self._spec.stability.max_skips:
                self._roll_back(plan)
                return stop  # what is left begins with this stage again
            done = self._at.step == plan.end
            if stage.evaluator is not None and (done or self._is_due(stage.evaluator.every_steps)):
                self._measure(stage)
                self._progress(f"the measurement after step {self._at.step}")
            if done:
                self._close(plan)
            # Not while steps are skipped: it would be one to go back to that is no way back.
            due = stop or self._is_due(self._spec.checkpoint.every_steps)
            if done or (due and not self._at.past.skipped):
                self._save(plan, wait=done or stop)
                self._progress(f"the checkpoint of step {self._at.step}")
            if stop:
                self._finish_writing()
                return self._at.step < self._total_steps
            if done:
                self._at = _Position(self._at.step, past=self._at.past.next_stage())
        return False

    def _is_due(self, every: int) -> bool:
        return self._at.step % every == 0

    def _one_step(self, stage: PreparedStage) -> bool:
        """Take one step and log it; whether any process was asked to stop."""
        started = time.monotonic()
        watch = StepWatch(self._world.device)
        plan, stage_step = stage.plan, self._at.step - stage.plan.first_step
        with watch.phase("data"):
            layout = stage.stream.step(
                self._at.cursor,
                rows=plan.rows,
                length=plan.length,
                multiple=plan.multiple(stage_step),
                random_length=plan.random_length,
            )
            config = self._learner.model.config
            rows = make_rows(
                layout,
                stage.stream.corpus,
                rank=self._world.rank,
                world=self._world.size,
                responses_only=plan.responses_only,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            )
            watch.note_rows(rows)
        key = philox_key(self._spec.data.seed, Purpose.NOISE, plan.index)
        block_length = plan.block_length(stage_step)
        batches = (
            model_inputs(
                batch,
                plan,
                self._learner.model,
                block_length=block_length,
                noise_key=key,
                disturbance=plan.disturbance(stage_step),
            )
            for batch in micro_batches(rows, self._spec.parallelism.micro_batch_rows)
        )
        totals = gradient_step(
            self._learner.weights,
            watch.batches(batches),
            self._world,
            stop=self._stop_requested(),
            confidence_weight=plan.confidence_weight,
            balancing=Balancing.of(self._spec.balance),
            preference=self._preference(plan),
            watch=watch,
        )
        with watch.phase("optimizer"):
            norm = self._learner.gradient_norm(totals)
            verdict = self._judge(plan, totals, norm)
            rate = plan.rate.at(stage_step)
            if verdict is Verdict.TAKEN:
                frozen = plan.freeze_router_bias or self._spec.lora is not None
                self._learner.step(totals, rate, freeze_router_bias=frozen)
            else:
                self._learner.skip()
        self._at.step += 1
        self._at.cursor += len(layout.document)
        balance = totals.balance
        losses = {"load_balance": balance.load, "router_z": balance.z} if balance else {}
        self._write(
            {
                "kind": "step",
                "step": self._at.step,
                "stage": plan.name,
                "stage_step": stage_step + 1,
                "stage_steps": plan.steps,
                "total_steps": self._total_steps,
                "block_size": block_length,
                "loss": totals.loss,
                "grad_norm": norm,
                "lr": rate,
                "tokens": layout.tokens,
                **losses,
                "seconds": (seconds := time.monotonic() - started),
            }
            | totals.measures
            | {"telemetry": self._telemetry(plan, watch, totals, tokens=layout.tokens, seconds=seconds)}
            | ({} if verdict is Verdict.TAKEN else {"skipped": verdict.value})
        )
        return totals.stop

    def _telemetry(
        self, plan: StagePlan, watch: StepWatch, totals: Totals, *, tokens: int, seconds: float
    ) -> dict[str, Any]:
        config = self._learner.model.config
        if self._shape is None or self._shape[0] is not config:
            self._shape = (config, shape_of(config))
        shape, lora = self._shape[1], self._spec.lora
        flops = flops_of(
            shape,
            watch.work(tokens),
            reference=plan.objective == "dpo",
            adapters=adapters_of(shape, lora)[0] if lora else 0,
        )
        watch.seconds["checkpoint"], self._saving_s = self._saving_s, 0.0
        peak = self._spec.telemetry.peak_flops
        return watch.summary(
            tokens=tokens,
            seconds=seconds,
            useful_flops=flops.useful,
            peak_flops=float(peak) * self._world.size if peak is not None else None,
            expert_tokens=totals.expert_tokens,
            step=self._at.step,
        ) | ({"checkpoint_write_seconds": self._writer.seconds} if self._writer.seconds else {})

    def _write_reference(self, plan: StagePlan) -> None:
        """Keep the model as it is when a preference stage begins: restarts within the stage need it too."""
        with self._world.together():
            self._learner.weights.keep_reference(self._folder.reference(plan.name))
            if self._world.leads:
                self._folder.publish(self._folder.reference(plan.name))
        self._compared = None

    def _preference(self, plan: StagePlan) -> Preference | None:
        """What ``plan`` compares the model with; loaded when it is first asked for."""
        if plan.beta is None:
            return None
        if self._compared is None or self._compared[0] != plan.index:
            path = self._folder.reference(plan.name)
            with self._world.together():
                self._folder.bring(path)
            with self._world.together():
                reference = reference_of(self._spec, path, self._learner.weights, self._world)
            self._compared = (plan.index, reference)
        assert plan.noise is not None, "every diffusion objective has noise"
        return Preference(beta=plan.beta, views=plan.noise.views, reference=self._compared[1].model)

    def _measured(self, stage: PreparedStage, stage_step: int) -> dict[str, float]:
        """What the stage's evaluator measures of the weights as they are."""
        assert stage.evaluator is not None, "the caller's part"
        preference = self._preference(stage.plan)
        followers = self._compared[1].followers if preference is not None and self._compared else ()
        weights = self._learner.weights
        return stage.evaluator.measure(
            weights.computing,
            stage_step=stage_step,
            unequal=weights.unequal,
            losses_unequal=lambda: weights.unequal(*followers),
            preference=preference,
        )

    def _judge(self, plan: StagePlan, totals: Totals, norm: float) -> Verdict:
        """Whether the step is taken; the same in all processes, for they have the same numbers."""
        policy = self._spec.stability
        if policy is not None:
            verdict = judge(totals.loss, norm, self._at.past, policy)
            self._at.past = remember(self._at.past, verdict, totals.loss, norm, policy)
            return verdict
        if math.isfinite(totals.loss) and math.isfinite(norm):
            return Verdict.TAKEN
        self._finish_writing()
        saved = self.checkpoint.place if self.checkpoint else "none"
        raise DivergedError(
            f"stage {plan.name}, step {self._at.step + 1}: loss {totals.loss}, gradient norm {norm}; lower "
            "learningRate.peak or raise warmupSteps of the stage, or set spec.stability to skip such steps "
            f"(newest checkpoint: {saved})"
        )

    def _roll_back(self, plan: StagePlan) -> None:
        """Go back to the newest checkpoint, and on with the documents that no step has seen yet.

        Raises:
            DivergedError: The run has gone back as often as it may.
        """
        policy = self._spec.stability
        assert policy is not None
        failed, cursor, past = self._at.step, self._at.cursor, self._at.past
        self._finish_writing()
        self.checkpoint = self._store.agreed(self._world)
        if past.rollbacks == policy.max_rollbacks:
            raise DivergedError(
                f"stage {plan.name}, step {failed}: {past.skipped} steps in a row were skipped after "
                f"{past.rollbacks} rollbacks (stability.maxRollbacks); lower learningRate.peak or raise "
                "warmupSteps of the stage, or look into its data "
                f"(newest checkpoint: {self.checkpoint.place if self.checkpoint else 'none'})"
            )
        at = self._position_saved()
        at.stage_seconds = self._stage_seconds()
        at.cursor, at.past = cursor, at.past.gone_back(past.rollbacks + 1)
        _log.warning("step %d: %d steps skipped, going back to step %d", failed, past.skipped, at.step)
        self._at = at
        if self._keeps_log:
            self._metrics.cut_back(at.step)
        self._write(
            {
                "kind": "rollback",
                "step": at.step,
                "stage": plan.name,
                "failed_step": failed,
                "cursor": cursor,
                "rollbacks": at.past.rollbacks,
            }
        )
        with self._world.together():
            if self._world.leads:
                self._metrics.sync()
                self._folder.publish_log()
        if self.checkpoint is None:
            self._learner = self._first_learner()
        else:
            self._learner.restore(self.checkpoint)

    # What follows a step

    def _measure(self, stage: PreparedStage) -> None:
        measured = self._measured(stage, self._at.step - stage.plan.first_step - 1)
        self._write({"kind": "eval", "step": self._at.step, "stage": stage.plan.name, **measured})

    def _close(self, plan: StagePlan) -> None:
        """Log the stage's time and write its models; they are there before the checkpoint that says so."""
        self._write(
            {"kind": "stage", "step": self._at.step, "stage": plan.name, "seconds": self._stage_seconds()}
        )
        if plan.merge_best is not None:
            return  # its models come of its checkpoints, once the last one is committed
        targets = [self._folder.export(plan.name)] if plan.export else []
        if plan.end == self._total_steps:
            targets.append(self._folder.model)
        self._write_models(plan, targets)

    # The mean of a stage's checkpoints

    def _is_to_be_merged(self, plan: StagePlan) -> bool:
        """Whether ``plan``, which has run to its end, asks for a mean that is not there and logged yet."""
        if plan.merge_best is None:
            return False
        with self._world.together():
            done = (
                self._world.leads
                and self._folder.holds(self._folder.export(plan.name))
                and self._merge_is_logged(plan)
            )
        return not self._world.from_leader(int(done))

    def _merge_is_logged(self, plan: StagePlan) -> bool:
        lines = self._folder.log_lines()
        return any(line["kind"] == "merge" and line["stage"] == plan.name for line in lines)

    def _merge(self, plan: StagePlan) -> None:
        """End ``plan`` with the mean of its best checkpoints, if it asks for that.

        A run that is killed while it merges finds the checkpoints again, and merges again: they are
        removed with the first checkpoint of the next stage.
        """
        if plan.merge_best is None:
            return
        export = self._folder.export(plan.name)
        pending = self._is_to_be_merged(plan)
        with self._world.together():
            if pending and self._world.leads:
                self._write_mean(plan, export)
                self._folder.publish(export)
        self._learner.weights.fill(self._exported(plan))
        if pending:
            measured = self._measured(self._prepared.stages[plan.index], plan.steps - 1)
            line = {
                "kind": "merge",
                "step": self._at.step,
                "stage": plan.name,
                "steps": self._best_steps(plan),
            }
            self._write(line | measured)
        if plan.end == self._total_steps:
            self._write_models(plan, [self._folder.model])

    def _write_mean(self, plan: StagePlan, export: Path) -> None:
        with ExitStack() as stack:
            opened = [
                stack.enter_context(open_checkpoint(self._store.present(step)))
                for step in self._best_steps(plan)
            ]
            merge(opened, export, companions=self._companions(plan))

    def _best_steps(self, plan: StagePlan | None) -> list[int]:
        """The best checkpoints of ``plan`` so far, if it is to be merged; only the leader has the log."""
        if plan is None or plan.merge_best is None or not self._world.leads:
            return []
        committed = {step for step in self._store.steps() if step < self._at.step} | {self._at.step}
        losses = losses_of(self._folder.log_lines(), plan.name)
        return best_of({step: loss for step, loss in losses.items() if step in committed}, plan.merge_best)

    def _still_wanted(self) -> list[int]:
        """The checkpoints that a mean is, or may come to be, made of, where the run begins."""
        plan = stage_after(self._plans, self._at.step) or self._plans[-1]
        before = self._plans[plan.index - 1] if plan.index and self._at.step == plan.first_step else None
        return [*self._best_steps(plan), *self._best_steps(before)]

    def _exported(self, plan: StagePlan) -> Iterator[tuple[Slot, Tensor]]:
        """The weights that ``plan`` has exported, in every process."""
        with self._world.together():
            self._folder.bring(self._folder.export(plan.name))
        return read_values(self._folder.export(plan.name))

    def _write_models(self, plan: StagePlan, targets: Sequence[Path]) -> None:
        """Write the model as it is at the end of ``plan`` to each folder of ``targets``."""
        with self._world.together():
            for path in targets:
                self._learner.weights.export(path, companions=self._companions(plan))
                if self._world.leads:
                    self._folder.publish(path)
                self._progress(f"the export {path.name}")

    def _companions(self, plan: StagePlan) -> dict[str, bytes]:
        """The tokenizer's files, and how the model is to be decoded."""
        config = self._learner.model.config
        decoding: dict[str, Any] = {"eos_token_id": config.eos_token_id}
        if not self._learner.model.causal:
            evaluation = self._spec.evaluation
            threshold = evaluation.generation.threshold if evaluation and evaluation.generation else "0.95"
            decoding |= {
                "block_length": plan.block_length(plan.steps - 1),
                "threshold": float(threshold),
                "mask_token_id": self._learner.model.mask_token_id,
            }
            if plan.shifted:
                decoding["prediction"] = "shifted"
        files = self._prepared.tokenizer.contents(mask_token_id=config.mask_token_id)
        return files | {"generation_config.json": (json.dumps(decoding, indent=2) + "\n").encode()}

    def _save(self, plan: StagePlan, *, wait: bool) -> None:
        """Commit a checkpoint: now, or beside the steps that follow unless all are to ``wait`` for it."""
        started = time.monotonic()
        self._finish_writing()
        with self._world.together():
            if self._world.leads:
                self._metrics.sync()
        beside = self._spec.checkpoint.asynchronous and not wait
        shared_out = self._learner.weights.shared_out
        writes = shared_out or self._world.leads
        about: dict[str, Any] = {
            "step": self._at.step,
            "state": self._state(plan),
            "job": self._prepared.identity,
            "config": self._learner.config(),
            "spared": self._best_steps(plan),
        }
        boxes = self._learner.boxes()
        if beside and writes:
            boxes = iter(self._writer.copy(boxes))
        save: Callable[[], Checkpoint | None]
        if shared_out:
            save = partial(
                self._store.save_shares, self._beside if beside else self._world, boxes=boxes, **about
            )
        else:
            save = partial(self._store.save, tensors=boxes, **about)
        if beside and writes:
            self._writer.start(save)
        elif not beside:
            with self._world.together():
                self.checkpoint = (save() if writes else None) or self.checkpoint
        self._saving_s += time.monotonic() - started

    def _finish_writing(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UnmaskError: It could not be written.
        """
        with self._world.together():
            self.checkpoint = self._writer.wait() or self.checkpoint

    def _heed_writer(self) -> None:
        """End the run if the checkpoint at hand has failed in any process."""
        if not self._spec.checkpoint.asynchronous:
            return
        failed = torch.tensor([float(self._writer.failed)], device=self._world.device)
        self._world.sum(failed)
        if failed:
            self._finish_writing()

    def _state(self, plan: StagePlan) -> TrainingState:
        past = self._at.past
        before = StepsBefore(
            losses=list(past.losses),
            norms=list(past.norms),
            skipped=past.skipped,
            rollbacks=past.rollbacks,
        )
        return TrainingState(
            stage=plan.index,
            stage_step=self._at.step - plan.first_step,
            cursor=self._at.cursor,
            stage_seconds=self._stage_seconds(),
            steps_before=before if self._spec.stability else None,
        )

    def _stage_seconds(self) -> float:
        return self._at.stage_seconds + time.monotonic() - self._stage_started

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._keeps_log:
            line = {name: None if _is_not_finite(value) else value for name, value in line.items()}
            self._metrics.write(line)
        if self._world.leads:
            self._observe(line)


def _store_of(folder: RunFolder, *, keep_last: int) -> CheckpointStore:
    if folder.mirror is not None:
        return MirroredCheckpoints(folder.mirror, folder.checkpoints, keep_last=keep_last)
    return CheckpointStore(folder.checkpoints, keep_last=keep_last)


def _is_not_finite(value: object) -> bool:
    """Whether JSON has no such number."""
    return isinstance(value, float) and not math.isfinite(value)
