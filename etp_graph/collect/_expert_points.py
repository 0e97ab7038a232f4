"""Find the layers of experts where what each expert adds can be observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan, as_tensor

from ._watch_points import WatchPoint

_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""Of the layers of experts of transformers: tokens [t, width], the experts of each and their weights, both [t, k]."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPoint(WatchPoint):
    """A layer of experts, each of which is a unit.

    Attributes:
        run: the forward of the layer.
    """

    run: Callable[..., Tensor]

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Return the weight of the router times the norm of the output of each expert, [tokens, experts, 1].

        It is NaN where the router sends a token to other experts. The layer runs once more, without weights.
        """
        given = signature(self.run).bind(*args, **kwargs).arguments
        tokens, chosen, weights = (given[name].detach() for name in _ARGUMENTS)
        n_tokens, k = chosen.shape
        alone = self.run(tokens.repeat_interleave(k, 0), chosen.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
        added = weights.reshape(-1).double() * alone.double().norm(dim=1)
        place = torch.arange(n_tokens, device=chosen.device).repeat_interleave(k), chosen.reshape(-1)
        n_experts = max(int(self.index.max()), int(chosen.max())) + 1
        sums, hits = added.new_zeros(n_tokens, n_experts), added.new_zeros(n_tokens, n_experts)
        sums.index_put_(place, added, accumulate=True)
        hits.index_put_(place, torch.ones_like(added), accumulate=True)
        found = torch.where(hits > 0, sums, torch.nan)
        return found.index_select(1, self.index.to(found.device)).unsqueeze(-1)


def expert_points(model: nn.Module, plan: Plan) -> tuple[ExpertPoint, ...]:
    """Return the layers of experts whose units are not locked.

    Raises:
        ScoreError: the plan prunes no experts, or their layers do not take the arguments of those of transformers.
    """
    experts = [(group, span) for group, span in plan.spans() if group.kind == "experts" and group.locked is None]
    found = []
    for group, span in experts:
        for attribute in group.attributes:
            module = model.get_submodule(attribute.module)
            if all(name in signature(module.forward).parameters for name in _ARGUMENTS):
                units, local = (as_tensor(attribute.unit) + span.start).unique(return_inverse=True)
                index = as_tensor(attribute.index)
                found.append(ExpertPoint(attribute.module, "output", -1, index, units, local, module.forward))
    if not experts:
        raise ScoreError("the plan prunes no experts: trace(..., prune='experts') prunes them, if the model has any.")
    if not found:
        raise ScoreError(
            f"the layers of {quoted(group.name for group, _ in experts)} cannot be watched: their forward does not "
            f"take {', '.join(_ARGUMENTS)}, as those of transformers do. Use a criterion that reads weights."
        )
    return tuple(found)
