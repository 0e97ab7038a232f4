"""Hugging Face's Trainer: the callback does what a loop by hand does, and resuming changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.surgery import get_record
from tests.support.models.integration_models import (
    METHOD,
    MODELS,
    Batch,
    build,
    by_hand,
    collate,
    example,
    optimizer_of,
    same,
    schedule_of,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from etp_graph.integrations.transformers import Epochs, PruningCallback  # noqa: E402

STEPS, PRUNE = 6, 3


class Recording(transformers.Trainer):  # type: ignore[misc]
    """Remembers the loss of every micro-batch, the batches, and the random state before the first of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        self.batches: list[Batch] = []
        self.random = torch.get_rng_state()
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        self.random = torch.get_rng_state() if not self.batches else self.random
        self.batches.append({key: value.clone() for key, value in inputs.items()})
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        return loss


def callback(name: str = "cnn", **options: Any) -> PruningCallback:
    return PruningCallback(example(name), **{"speed_up": 1.5, "prune_at": PRUNE, "method": METHOD, **options})


def trainer(
    model: nn.Module, folder: Path, *callbacks: PruningCallback, name: str = "cnn", optimizer: str = "adam",
    n_items: int = 24, evaluate: Any = None, **options: Any,
) -> Recording:  # fmt: skip
    arguments = transformers.TrainingArguments(**{
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": STEPS, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "seed": 5, "logging_steps": 1, "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_grad_norm": 1.0, **options,
    })  # fmt: skip
    held = optimizer_of(model, optimizer)
    return Recording(
        model, arguments, train_dataset=MODELS[name][1](n_items), eval_dataset=evaluate, data_collator=collate,
        optimizers=(held, schedule_of(held)), callbacks=list(callbacks),
    )  # fmt: skip


def loss_by_hand(model: nn.Module, parts: list[Batch], part: Batch) -> Tensor:
    if isinstance(model, transformers.LlamaForCausalLM):
        items = sum((batch["labels"][..., 1:] != -100).sum() for batch in parts)
        return model(**part, num_items_in_batch=items)["loss"]
    loss = model(**part)["loss"]
    # The trainer leaves the scale to models that accept keyword arguments, and BERT's classifier ignores them.
    return loss if isinstance(model, transformers.BertForSequenceClassification) else loss / len(parts)


@pytest.mark.parametrize(
    ("name", "method", "parts", "optimizer"),
    [("cnn", "etp", 1, "sgd"), ("cnn", "torque", 2, "adam"), ("cnn", "l1", 1, "adam"),
     ("bert", "etp", 2, "adam"), ("llama", "etp", 2, "adam")],
)  # fmt: skip
def test_the_trainer_does_what_a_loop_by_hand_does(
    name: str, method: str, parts: int, optimizer: str, tmp_path: Path
) -> None:
    chosen = METHOD if method == "etp" else etp.methods.get(method)
    model = build(name)
    pruning = callback(name, method=chosen)
    run = trainer(model, tmp_path, pruning, name=name, optimizer=optimizer, n_items=4 * parts * STEPS,
                  gradient_accumulation_steps=parts)  # fmt: skip
    run.train()
    other = build(name)
    torch.set_rng_state(run.random)  # dropout
    steps = [run.batches[i * parts : (i + 1) * parts] for i in range(STEPS)]
    losses = by_hand(other, steps, example_inputs=example(name), prune_step=PRUNE, method=chosen,
                     loss_of=loss_by_hand, optimizer=optimizer, clip=1.0)  # fmt: skip
    assert losses == run.losses
    assert same(model, other)
    assert get_record(model) == get_record(other) != get_record(build(name))


def saving(folder: Path, *callbacks: PruningCallback, name: str, model: nn.Module | None = None, **options: Any) -> Any:
    return trainer(model or build(name), folder, *callbacks, name=name, save_strategy="steps", save_steps=1, **options)


@pytest.mark.parametrize("name", MODELS)
def test_resuming_before_and_after_surgery_equals_the_run_without_a_break(name: str, tmp_path: Path) -> None:
    options = {"n_items": 16, "gradient_accumulation_steps": 2}  # two steps an epoch
    whole = saving(tmp_path / "whole", callback(name), name=name, **options)
    whole.train()
    for step in (1, 2, PRUNE, PRUNE + 1) if name == "cnn" else (1, PRUNE):  # within an epoch, and at its end
        pruning = callback(name)
        again = saving(tmp_path / f"again{step}", pruning, name=name, **options)
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        before = dict(again.model.named_parameters())
        assert pruning.resume(again.model, checkpoint) is again.model
        assert all(before[key] is value for key, value in again.model.named_parameters())
        again.train(resume_from_checkpoint=str(checkpoint))
        assert again.losses == whole.losses[2 * step :]
        assert same(again.model, whole.model)
        assert get_record(again.model) == get_record(whole.model)
        states = [run.optimizer.state_dict()["state"] for run in (again, whole)]
        assert all(torch.equal(states[0][key][part], value) for key, entry in states[1].items()
                   for part, value in entry.items())  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_after_surgery_are_ones_that_load_reads(name: str, tmp_path: Path) -> None:
    run = saving(tmp_path, callback(name), name=name)
    run.train()
    assert same(etp.load(tmp_path / f"checkpoint-{STEPS}", build=build(name)), run.model)
    cut = etp.load(tmp_path / f"checkpoint-{PRUNE}", build=build(name))
    assert get_record(cut) == get_record(run.model)
    assert not (tmp_path / f"checkpoint-{PRUNE - 1}" / "manifest.json").exists()


@pytest.mark.parametrize("prune_at", [4, 0.5, Epochs(2), Epochs(1.5)])
def test_surgery_takes_place_after_a_step_a_share_or_epochs(prune_at: Any, tmp_path: Path) -> None:
    run = trainer(build("cnn"), tmp_path, callback(prune_at=prune_at), n_items=8 * 4 - 4, max_steps=8,
                  gradient_accumulation_steps=4)  # fmt: skip
    expected = {4: 4, 0.5: 4, Epochs(2): 4, Epochs(1.5): 3}[prune_at]
    sizes: list[int] = []

    class Sizes(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            sizes.append(sum(p.numel() for p in model.parameters()))

    run.add_callback(Sizes())
    run.train()
    assert sizes.index(min(sizes)) + 1 == expected
    assert len(set(sizes)) == 2


def test_autocast_changes_neither_the_plan_nor_the_surgery(tmp_path: Path) -> None:
    for name in ("cnn", "bert"):
        pruning = callback(name)
        model = build(name)
        run = trainer(model, tmp_path, pruning, name=name, bf16=True)
        run.train()
        assert pruning.plan == etp.trace(build(name), example(name))
        assert "_original_forward" in model.__dict__  # the casts of accelerate are still there
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert get_record(model).selections == (pruning.selection.to_json(),)  # type: ignore[union-attr]


def test_the_best_model_is_one_from_after_surgery(tmp_path: Path) -> None:
    model = build("cnn")
    run = saving(tmp_path, callback(), name="cnn", model=model, eval_strategy="steps", eval_steps=1,
                 load_best_model_at_end=True, metric_for_best_model="step", evaluate=MODELS["cnn"][1](4))  # fmt: skip
    # The metric falls with every step: the first model is the best of all, the first after surgery the best there.
    run.evaluate = lambda *a, **k: {"eval_step": float(-run.state.global_step)}
    run.args.greater_is_better = True
    run.train()
    assert run.state.best_global_step == PRUNE
    assert same(model, etp.load(tmp_path / f"checkpoint-{PRUNE}", build=build("cnn")))


def test_a_checkpoint_of_other_shapes_is_refused_with_a_remedy(tmp_path: Path) -> None:
    run = saving(tmp_path, callback(), name="cnn")
    run.train()
    for step in (1, STEPS):
        again = saving(tmp_path / "again", callback(), name="cnn")
        with pytest.raises(etp.CheckpointError, match=r"callback\.resume"):
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    other = saving(tmp_path / "other", callback(speed_up=3), name="cnn")
    other.train()
    with pytest.raises(etp.CheckpointError, match="cut in another way"):
        callback().resume(other.model, tmp_path / f"checkpoint-{STEPS}")
    with pytest.raises(etp.CheckpointError, match="cut in another way"):
        callback().resume(other.model, tmp_path / "checkpoint-1")
    unknown = saving(tmp_path / "unknown", name="cnn")
    unknown.add_callback(callback())  # too late for the guard
    with pytest.raises(etp.CheckpointError, match="is unknown"):
        unknown.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    forgotten = callback()
    anew = saving(tmp_path / "anew", forgotten, name="cnn")
    forgotten.resume(anew.model, tmp_path / "checkpoint-1")
    with pytest.raises(etp.CheckpointError, match="later checkpoint"):
        anew.train()
    with pytest.raises(etp.CheckpointError, match=r"holds no etp_graph\.safetensors"):
        callback().resume(build("cnn"), tmp_path)
    file = tmp_path / "checkpoint-1" / "etp_graph.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(etp.CheckpointError, match="damaged"):
        callback().resume(build("cnn"), tmp_path / "checkpoint-1")


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    method = replace(METHOD, mode="loss", beta=0.02, acts_on="units")
    for error, options in (
        (etp.ForceError, {"prune_at": 0}), (etp.ForceError, {"prune_at": 1.5}), (etp.ForceError, {"prune_at": True}),
        (etp.ForceError, {"method": method}), (etp.ForceError, {"method": replace(METHOD, rounds=2)}),
        (etp.BudgetError, {"speed_up": None}), (etp.ForceError, {"prune_at": Epochs(0)}),
    ):  # fmt: skip
        with pytest.raises(error):
            callback(**options)  # type: ignore[arg-type]
    for error, options in (
        (etp.ForceError, {"prune_at": STEPS + 1}), (etp.BudgetError, {"speed_up": 1e9}),
        (etp.PlanError, {"ignore": "nothing.*"}),
    ):  # fmt: skip
        model = build("cnn")
        run = trainer(model, tmp_path, callback(**options))  # type: ignore[arg-type]
        with pytest.raises(error):
            run.train()
        assert same(model, build("cnn"))


def test_a_method_without_a_force_and_a_model_made_by_the_trainer(tmp_path: Path) -> None:
    options = {"method": etp.methods.get("l1")}
    whole = saving(tmp_path / "whole", callback(**options), name="cnn")
    whole.model_init = partial(build, "cnn")
    whole.create_optimizer = partial(_new_optimizer, whole)
    whole.train()
    for step in (1, PRUNE):
        pruning = callback(**options)
        again = saving(tmp_path / "again", pruning, name="cnn")
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        again.model_init = partial(_resumed, pruning, checkpoint)
        again.create_optimizer = partial(_new_optimizer, again)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert same(again.model, whole.model)


def _resumed(pruning: PruningCallback, checkpoint: Path) -> nn.Module:
    return pruning.resume(build("cnn"), checkpoint)


def _new_optimizer(run: Any) -> Any:
    run.optimizer = optimizer_of(run.model)
    run.lr_scheduler = schedule_of(run.optimizer)
    return run.optimizer


def test_training_that_stops_before_surgery_warns(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    run = trainer(build("cnn"), tmp_path, callback())
    run.add_callback(Stop())
    with pytest.warns(UserWarning, match="not pruned"):
        run.train()
    assert not run.optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_models_whose_cache_the_trainer_leaves_on_lose_heads(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0,
        ))  # fmt: skip
    else:
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=24, num_local_experts=2,
        ))  # fmt: skip
    inputs: dict[str, Any] = {"input_ids": example("llama")["input_ids"]}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if name == "t5" else {}
    alone = etp.trace(model, {**inputs, "use_cache": False})
    pruning = PruningCallback(inputs, speed_up=1.3, prune_at=PRUNE, method="l1")
    trainer(model, tmp_path, pruning, name="llama").train()
    assert pruning.plan is not None
    assert {group.name for group in pruning.plan.prunable} == {group.name for group in alone.prunable}
    assert any(group.kind == "heads" for group in pruning.plan.prunable)
    model.eval()
    ids = inputs["input_ids"]
    written = [
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=on, pad_token_id=0) for on in (True, False)
    ]
    assert torch.equal(*written)
