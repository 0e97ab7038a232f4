"""Distillation: fine-tune a pruned model towards the predictions of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from etp_graph._config import require, require_choice, require_number
from etp_graph.errors import ForceError

Compare = Literal["predictions", "values"] | Callable[[Any, Any], Tensor]

_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
"""Arguments that show that an ``attention_mask`` is that of the encoder, and not of the logits."""


class Distillation:
    """Adds the distance from a teacher to the loss, while a student is trained.

    It watches the forwards of the student in training mode, and has the teacher answer the same inputs. The loss that
    you minimise becomes ``(1 - weight) * loss + weight * distance``. Use it as a context manager, or call
    :meth:`remove`.

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2; for hidden states Romero et
    al. 2015, "FitNets".

    Args:
        student: the model that is trained. It may be pruned while this is attached.
        teacher: the dense model, or any that takes the same inputs. It may have another dtype. It is put into eval
            mode, and nothing else of it changes.
        temperature: logits are divided by it before they become probabilities.
        weight: share of the distance in the loss, in [0, 1].
        compare: ``"predictions"``: Kullback-Leibler divergence of the classes, times temperature². Logits
            [..., classes] are the field ``logits`` of the output, or its first tensor. The mean is over all positions
            but those whose ``attention_mask`` is zero. ``"values"``: mean square error of the first tensor. Or a
            function of (output of the student, output of the teacher) that returns a scalar.
        hidden: names of modules whose outputs are compared, too; or, if the names differ, a mapping from those of the
            student to those of the teacher. Their outputs have the same shape, so they are not units.
        hidden_weight: what the distance of hidden states is multiplied with. For each module it is the mean square
            error over the mean square of the teacher.
        change_loss: change the field ``loss`` of the student's output, for trainers that read it there (the
            ``Trainer`` of transformers). Without it, call :meth:`mixed`.

    Raises:
        ForceError: a setting is out of range, a module does not exist, or the models share parameters.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        weight: float = 0.5,
        compare: Compare = "predictions",
        hidden: Sequence[str] | Mapping[str, str] = (),
        hidden_weight: float = 1.0,
        change_loss: bool = False,
    ) -> None:
        require_number("temperature", temperature, 0, excluded=(0,))
        require_number("weight", weight, 0, 1)
        require_number("hidden_weight", hidden_weight, 0)
        if not callable(compare):
            require_choice("compare", compare, get_args(get_args(Compare)[0]))
        of_teacher = {id(parameter) for parameter in teacher.parameters()}
        require(
            not any(id(parameter) in of_teacher for parameter in student.parameters()),
            "the student shares parameters with the teacher: make the teacher before pruning, by copy.deepcopy(model).",
            ForceError,
        )
        pairs = hidden if isinstance(hidden, Mapping) else {name: name for name in _names(hidden)}
        self.teacher = teacher.eval()
        self._temperature, self._weight, self._compare = temperature, weight, compare
        self._hidden_weight, self._change_loss = hidden_weight, change_loss
        self._distance: Tensor | None = None
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._pairs = list(pairs.items())
        watched = [(student, "student", name) for name in pairs] + [(teacher, "teacher", one) for one in pairs.values()]
        for model, role, name in watched:
            _module(model, role, name)
        self._handles: list[RemovableHandle] = [
            _module(model, role, name).register_forward_hook(_Hook(self, role, name)) for model, role, name in watched
        ]
        self._handles.append(student.register_forward_hook(_Hook(self, "student", None), with_kwargs=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop watching both models."""
        for handle in self._handles:
            handle.remove()

    def distance(self) -> Tensor:
        """Return the distance in the student's last forward, a scalar with a graph. It can be taken once.

        Raises:
            ForceError: the student has not run since, or not in training mode.
        """
        found, self._distance = self._distance, None
        if found is None:
            raise ForceError(
                "the student has not run in training mode since the distance was taken: call student.train(), run it, "
                "then take the distance. With change_loss=True the loss in its output has the distance already."
            )
        return found

    def mixed(self, loss: Tensor) -> Tensor:
        """Return ``(1 - weight) * loss + weight * distance`` for the student's last forward.

        Raises:
            ForceError: as :meth:`distance`.
        """
        return (1 - self._weight) * loss + self._weight * self.distance()

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Hook of the student: let the teacher answer, and return the output with another loss, if asked."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        with torch.no_grad():
            wanted = self.teacher(*args, **kwargs)
        self._distance = self._between(output, wanted, kwargs)
        self._seen.clear()
        if not self._change_loss:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ForceError(
                "change_loss=True: the output of the student has no field loss. Pass the labels to the model, or leave "
                "out change_loss and call mixed()."
            )
        mixed = self.mixed(loss)
        if isinstance(output, Mapping):
            output["loss"] = mixed  # type: ignore[index]  # outputs of transformers are mappings that can be written
        else:
            output.loss = mixed
        return output

    def _between(self, output: Any, wanted: Any, kwargs: Mapping[str, Any]) -> Tensor:
        if callable(self._compare):
            distance = self._compare(output, wanted)
        elif self._compare == "values":
            distance = F.mse_loss(*_same_shape(_main(output), _main(wanted), "the output"))
        else:
            distance = self._divergence(_main(output), _main(wanted), kwargs)
        for mine, other in self._pairs:
            missing = [role for role, name in (("student", mine), ("teacher", other)) if (role, name) not in self._seen]
            if missing:
                raise ForceError(f"hidden: module {mine!r} did not run in the forward of the {missing[0]}.")
            found, dense = _same_shape(self._seen["student", mine], self._seen["teacher", other], f"module {mine!r}")
            distance = distance + self._hidden_weight * F.mse_loss(found, dense) / dense.square().mean()
        return distance

    def _divergence(self, found: Tensor, wanted: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        found, wanted = _same_shape(found, wanted, "the logits")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == found.shape[:-1] and not any(
            kwargs.get(name) is not None for name in _DECODER
        ):  # fmt: skip
            found, wanted = found[mask > 0], wanted[mask > 0]
        student = (found / self._temperature).log_softmax(-1).flatten(0, -2)
        dense = (wanted / self._temperature).log_softmax(-1).flatten(0, -2)
        total = F.kl_div(student, dense, reduction="sum", log_target=True)
        # Trainers that accumulate gradients pass the number of all tokens, and do not divide by the number of parts.
        count = kwargs.get("num_items_in_batch") if self._change_loss else None
        return self._temperature**2 * total / (len(student) if count is None else count)

    def _note(self, role: str, name: str, output: Any) -> None:
        if role == "teacher" or torch.is_grad_enabled():
            self._seen[role, name] = _main(output)


class _Hook:
    """Hook of a module. A copy of the model has a hook that does nothing, so that no copy runs the teacher."""

    def __init__(self, owner: Distillation | None, role: str, name: str | None) -> None:
        self._owner, self._role, self._name = owner, role, name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, self._role, self._name)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None, str, str | None]]:
        return _Hook, (None, self._role, self._name)

    def __call__(self, module: nn.Module, *found: Any) -> Any:
        if self._owner is None:
            return None
        if self._name is None:
            return self._owner._watch(module, *found)
        self._owner._note(self._role, self._name, found[-1])
        return None


def _names(hidden: Sequence[str]) -> Sequence[str]:
    return [hidden] if isinstance(hidden, str) else hidden


def _module(model: nn.Module, role: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ForceError(
            f"hidden: the {role} has no module {name!r}. Names are those of {role}.named_modules(); where they differ, "
            "pass a mapping from names of the student to names of the teacher."
        ) from error


def _main(output: Any) -> Tensor:
    """Return the logits of an output, or its first tensor."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ForceError(f"{type(output).__name__} holds no tensor of numbers to compare: pass a function as compare=.")


def _same_shape(found: Tensor, wanted: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return both tensors in float32 (or float64) on one device; raise :class:`ForceError` if the shapes differ."""
    if found.shape != wanted.shape:
        raise ForceError(
            f"{what} has shape {list(found.shape)} in the student and {list(wanted.shape)} in the teacher: compare "
            "what was not pruned, or pass a function as compare=."
        )
    kind = torch.float64 if found.dtype == torch.float64 else torch.float32
    return found.to(kind), wanted.to(found.device, kind)
