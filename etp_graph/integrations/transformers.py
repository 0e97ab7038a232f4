"""Pruning inside Hugging Face's ``Trainer``: sparse phase, surgery and fine-tuning in one ``train()``."""

from __future__ import annotations

import math
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from etp_graph.checkpoint import MANIFEST_FILE, load, read_manifest, save_into
from etp_graph.distributed import rewrap_
from etp_graph.errors import CheckpointError, PlanError
from etp_graph.surgery import SurgeryRecord, get_record

from ._state import STATE_FILE, read_state, require_equal_shapes, write_state
from .core import Epochs, Pruning, check_state

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ImportError(
        "etp_graph.integrations.transformers needs transformers and accelerate: pip install 'etp-graph[transformers]'."
    ) from error


__all__ = ["Epochs", "PruningCallback", "last_checkpoint"]

Model = TypeVar("Model", bound=nn.Module)

_RESUME = (
    "call callback.resume(trainer.model, checkpoint) before trainer.train(resume_from_checkpoint=checkpoint), with the "
    "dense model."
)


class PruningCallback(Pruning, TrainerCallback):
    """A sparse phase, surgery and fine-tuning in one ``train()``, with the trainer's optimizer and scheduler.

    Use it as ``Trainer(..., callbacks=[PruningCallback(example_inputs, speed_up=2, prune_at=0.5)])``. The arguments are
    those of :class:`etp_graph.integrations.core.Pruning`. Surgery takes place after its step, before the trainer
    evaluates and saves that step. :func:`etp_graph.load` can read the checkpoints from after surgery.

    With ``load_best_model_at_end``, surgery makes the trainer forget the best model so far, so that it never loads the
    weights of a dense model at the end. To resume from a checkpoint, call :meth:`resume` first. Several processes may
    train with DDP.
    """

    _wrapped: DistributedDataParallel | None = None

    def resume(self, model: Model, checkpoint: str | os.PathLike[str]) -> Model:
        """Prepare ``trainer.train(resume_from_checkpoint=checkpoint)``: read the state and prune the model.

        Args:
            model: the trainer's dense model (``trainer.model``). If the checkpoint is from after surgery, the model is
                pruned and gets the checkpoint's values; its parameters stay the same objects. A model that is already
                pruned as in the checkpoint stays unchanged.
            checkpoint: a folder that the trainer wrote with this callback.

        Returns:
            The model, so that a ``model_init`` of the trainer may return it.

        Raises:
            CheckpointError: the state is missing or damaged, or the model was pruned in another way.
        """
        folder = Path(checkpoint)
        state = read_state(folder)
        check_state(state)  # before the model changes
        record = read_manifest(folder).record if (folder / MANIFEST_FILE).exists() else SurgeryRecord()
        if state["cut"] and state["cut"] not in record.fingerprints:
            raise CheckpointError(
                f"{folder}: its state tells of surgery {state['cut'][:12]!r}, and its manifest does not: files of two "
                "checkpoints were mixed. Use another checkpoint."
            )
        if get_record(model) not in (SurgeryRecord(), record):
            raise CheckpointError(
                f"{folder}: the model was cut in another way than this checkpoint's: build the dense model anew."
            )
        if get_record(model) != record:
            load(folder, build=model)
        self.load_state(state)
        return model

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Install a check that rejects weights of other shapes than the model's until training begins."""
        if isinstance(model := kwargs.get("model"), nn.Module):
            self._guard = model.register_load_state_dict_pre_hook(_refuse_other_shapes)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trace and attach the force; if training is resumed after surgery, only check the model."""
        if hasattr(self, "_guard"):
            self._guard.remove()
        _check_run(args, state)
        if bool(state.global_step) != self.resumed:
            what = "is unknown" if state.global_step else "was read from a later checkpoint"
            raise CheckpointError(
                f"training begins after step {state.global_step}, and the state of the pruning {what}: call "
                "callback.resume(trainer.model, checkpoint) before trainer.train(resume_from_checkpoint=checkpoint)."
            )
        self.begin(
            kwargs["model"], kwargs["optimizer"], done=state.global_step, total=state.max_steps,
            per_epoch=_steps_per_epoch(args, kwargs.get("train_dataloader")), together=args.world_size > 1,
        )  # fmt: skip
        self._wrapped = None
        if args.world_size > 1 and self.stage == "sparse":
            self._watch(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Perform surgery if it is due."""
        if args.world_size > 1 and self.stage == "sparse" and self._wrapped is None:
            raise PlanError("the model ran outside of a DistributedDataParallel, whose shapes surgery would change.")
        if self.advance(state.global_step):
            if self._wrapped is not None:
                rewrap_(self._wrapped)
                self._wrapped = None
            # Otherwise the trainer could load the weights of a dense best model at the end, which no longer fit.
            state.best_metric, state.best_model_checkpoint, state.best_global_step = None, None, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state to the checkpoint just written; after surgery also the manifest and the weights."""
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if get_record(kwargs["model"]) != SurgeryRecord():
            save_into(kwargs["model"], folder)
        write_state(self.state(), folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the force."""
        self.finish()

    def _watch(self, model: nn.Module) -> None:
        """Find the wrapper of the model in its first forward, because the trainer does not pass it to callbacks."""

        def look(module: nn.Module, inputs: Any) -> None:
            if isinstance(module, DistributedDataParallel) and module.module is model:
                self._wrapped = module
                handle.remove()

        handle = register_module_forward_pre_hook(look)


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint in the trainer's output folder; ``None`` if there is none.

    The state of the pruning is written last, so a checkpoint without it is incomplete. The trainer's own search
    (``resume_from_checkpoint=True``) does not check this and would use an incomplete checkpoint.
    """
    if not Path(folder).is_dir():
        return None
    found = {int(c.name.rpartition("-")[2]): c for c in Path(folder).glob("checkpoint-*") if c.name[11:].isdecimal()}
    return next((found[step] for step in sorted(found, reverse=True) if (found[step] / STATE_FILE).is_file()), None)


def _check_run(args: TrainingArguments, state: TrainerState) -> None:
    """Raise :class:`PlanError` for a hyperparameter search and for parallel training other than DDP."""
    if state.is_hyper_param_search:
        raise PlanError("this callback cannot prune in a search for hyperparameters: prune after it.")
    kind = args.parallel_mode.value
    if args.world_size > 1 and (kind != "distributed" or args.deepspeed or args.fsdp):
        raise PlanError(
            f"the trainer shares the model among {args.world_size} processes, and this callback knows "
            "DistributedDataParallel alone: train without DeepSpeed, FSDP and the like."
        )


def _steps_per_epoch(args: TrainingArguments, batches: object) -> int | None:
    """Return the optimizer steps in an epoch, as the trainer counts them; ``None`` if the data has no length."""
    if not isinstance(batches, Sized):
        return None
    try:
        return max(1, math.ceil(len(batches) / args.gradient_accumulation_steps))
    except TypeError:  # the loader of an iterable dataset has __len__, but it raises
        return None


def _refuse_other_shapes(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Raise :class:`CheckpointError` if weights of other shapes are about to be loaded."""
    require_equal_shapes(model.state_dict(prefix=prefix), state, remedy=_RESUME)
