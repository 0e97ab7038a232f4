"""Distillation: the distance by its definition, what is left out, and what the trainers of users get."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.errors import ForceError
from etp_graph.recovery import Distillation

transformers = pytest.importorskip("transformers")


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


def llama(**config: int) -> nn.Module:
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 16, **config,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)  # initial weights of std 0.02 predict next to nothing
    return model


def test_distance_is_the_divergence_of_softened_classes() -> None:
    torch.manual_seed(0)
    student, teacher, x = classifier(), classifier(), torch.randn(5, 6)
    student[2] = nn.Identity()
    with Distillation(student, teacher, temperature=3.0) as distillation:
        logits = student(x)
        found = distillation.distance()
    p, q = (teacher(x) / 3).softmax(-1), (logits / 3).softmax(-1)  # the teacher is in eval mode: no dropout
    wanted = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_mixed_weighs_loss_and_distance() -> None:
    student, teacher, x = classifier(), classifier(), torch.randn(5, 6)
    with Distillation(student, teacher, weight=0.25, compare="values") as distillation:
        output = student(x)
        found = distillation.mixed(torch.tensor(8.0))
    torch.testing.assert_close(found, 0.75 * 8.0 + 0.25 * nn.functional.mse_loss(output, teacher(x)))


def test_own_function_compares() -> None:
    student, teacher, x = classifier(), classifier(), torch.randn(5, 6)
    with Distillation(student, teacher, compare=lambda mine, dense: (mine - dense).abs().max()) as distillation:
        output = student(x)
        torch.testing.assert_close(distillation.distance(), (output - teacher(x)).abs().max())


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    student, teacher = llama(), llama()
    tokens, mask = torch.randint(32, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    found = []
    with Distillation(student, teacher) as distillation:
        for padding in (0, 7):
            tokens[1, 5:] = padding
            student.train()(input_ids=tokens, attention_mask=mask)
            found.append(distillation.distance())
        student.train()(input_ids=tokens)
        assert not torch.isclose(distillation.distance(), found[0])
    torch.testing.assert_close(found[0], found[1])


def test_student_is_pruned_while_attached() -> None:
    torch.manual_seed(0)
    teacher = llama()
    student = copy.deepcopy(teacher)
    batch = {"input_ids": torch.randint(32, (2, 8)), "use_cache": False}
    with Distillation(student, teacher) as distillation:
        student.train()(**batch)
        assert abs(distillation.distance().item()) < 1e-5
        etp.oneshot_(student, [batch], params=0.7)
        student.train()(**batch)
        assert distillation.distance().item() > 1e-3


def test_hidden_states_are_compared() -> None:
    torch.manual_seed(0)
    student, teacher = llama(), llama()
    batch = {"input_ids": torch.randint(32, (2, 8)), "use_cache": False}
    seen = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model.model.layers[1].register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with Distillation(student, teacher) as plain, Distillation(student, teacher, hidden=["model.layers.1"]) as deep:
        student.train()(**batch)
        gap = (seen["student"] - seen["teacher"]).square().mean() / seen["teacher"].square().mean()
        torch.testing.assert_close(deep.distance() - plain.distance(), gap)


def test_hidden_states_of_other_layers() -> None:
    teacher = llama(num_hidden_layers=3)
    student = copy.deepcopy(teacher)
    etp.depth.shorten_(student, [{"input_ids": torch.randint(32, (2, 8)), "use_cache": False}], n_blocks=1)
    with Distillation(student, teacher, hidden={"model.layers.1": "model.layers.2"}) as distillation:
        student.train()(input_ids=torch.randint(32, (2, 8)))
        distillation.distance().backward()
    assert student.model.layers[1].mlp.down_proj.weight.grad is not None


def test_copy_of_the_student_runs_no_teacher() -> None:
    student, teacher, x = classifier(), classifier(), torch.randn(5, 6)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    with Distillation(student, teacher, hidden=["1"]) as distillation:
        copied = copy.deepcopy(student)
        copied(x)
        assert not calls
        student.eval()(x)
        assert not calls, "a student in eval mode is measured, not trained"
        student.train()(x)
        assert calls
        distillation.distance()
    calls.clear()
    student(x)
    assert not calls, "removed"


def test_saved_student_does_not_hold_the_teacher(tmp_path: Path) -> None:
    student, teacher = classifier(), classifier()
    with Distillation(student, teacher):
        torch.save(student, tmp_path / "student.pt")
    assert isinstance(torch.load(tmp_path / "student.pt", weights_only=False), nn.Sequential)


def _trained(student: nn.Module, teacher: nn.Module, tokens: Tensor, size: int, parts: int, folder: Path) -> nn.Module:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=1,
        learning_rate=0.1, optim="sgd", max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    with Distillation(student, teacher, change_loss=True):
        transformers.Trainer(student, arguments, train_dataset=data).train()
    return student


def test_trainer_accumulates_the_same_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher, tokens = llama(), llama(), torch.randint(32, (4, 8))
    whole = _trained(copy.deepcopy(student), teacher, tokens, 4, 1, tmp_path)
    parts = _trained(copy.deepcopy(student), teacher, tokens, 1, 4, tmp_path)
    alone = copy.deepcopy(student)
    with Distillation(alone, teacher, weight=0.5) as distillation:
        output = alone.train()(input_ids=tokens, labels=tokens)
        # The trainer divides the sum over the 4 * 7 predicted tokens by the number of labels, 4 * 8 or 4 * 7.
        (0.5 * output.loss + 0.5 * distillation.distance()).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter, parts.get_parameter(name), rtol=1e-4, atol=1e-6)
        moved = (student.get_parameter(name) - parameter).flatten() / 0.1
        wanted = alone.get_parameter(name).grad.flatten()
        assert torch.cosine_similarity(moved, wanted, 0) > 0.99, name


def test_bad_settings_are_refused() -> None:
    student, teacher, x = classifier(), classifier(), torch.randn(5, 6)
    with pytest.raises(ForceError, match="shares parameters"):
        Distillation(student, student)
    with pytest.raises(ForceError, match="temperature"):
        Distillation(student, teacher, temperature=0)
    with pytest.raises(ForceError, match="no module '9'"):
        Distillation(student, teacher, hidden=["1", "9"])
    assert not student[1]._forward_hooks
    assert not student._forward_hooks
    with Distillation(student, teacher) as distillation:
        student.eval()(x)
        with pytest.raises(ForceError, match="training mode"):
            distillation.distance()
    wide = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with Distillation(wide, teacher, hidden=["0"]), pytest.raises(ForceError, match=r"'0'.*\[5, 8\].*\[5, 16\]"):
        wide(x)
    with Distillation(wide, teacher, change_loss=True), pytest.raises(ForceError, match="field loss"):
        wide(x)


def test_pruning_inside_a_trainer_is_distilled(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from etp_graph.integrations.transformers import PruningCallback

    torch.manual_seed(0)
    teacher = llama()
    student, tokens = copy.deepcopy(teacher), torch.randint(32, (16, 8))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = PruningCallback({"input_ids": tokens[:1], "use_cache": False}, params=0.8, prune_at=0.5)
    seen: list[float] = []
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def far(mine: Any, dense: Any) -> Tensor:
        distance = (mine.logits - dense.logits).square().mean()
        seen.append(distance.item())
        return distance

    with Distillation(student, teacher, compare=far, change_loss=True):
        transformers.Trainer(student, arguments, train_dataset=data, callbacks=[callback]).train()
    assert len(seen) == 6
    assert seen[0] < 1e-9 < seen[-1]
    assert sum(p.numel() for p in student.parameters()) <= 0.8 * sum(p.numel() for p in teacher.parameters())


def test_compress_is_distilled_in_both_phases() -> None:
    torch.manual_seed(0)
    teacher, x = classifier(), torch.randn(32, 6)
    student, phases = copy.deepcopy(teacher), []
    with Distillation(student, teacher) as distillation:

        def train(model: nn.Module, phase: etp.Phase) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            phase.attach(optimizer, steps=4)
            for _ in range(4):
                optimizer.zero_grad()
                model(x)
                distillation.distance().backward()
                optimizer.step()
            phases.append(phase.name)

        etp.compress(student, x, train=train, evaluate=lambda model: 0.0, params=0.6, progress=False)
    assert phases == ["sparse", "finetune"]
    assert student[0].out_features < 16
