"""Measure one model of the sweep, in this process.

Importing this module imports the libraries that most models need, so that a process forked afterwards has them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import re
import resource
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch

import etp_graph as etp
from benchmarks.coverage.sources import PRELOADED, Case, build
from benchmarks.coverage.sources._common import NotBuilt, share_run
from etp_graph.plan import Plan

for _library in PRELOADED:
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(_library)
gc.freeze()  # a forked process would copy the pages of all these modules as soon as the garbage collector visits them

RATIO = 0.5
"""Share of the units that ``verify`` removes, by random choice."""


def measure_into(sender: Connection, case: Case, gibibytes: float) -> None:
    """Send the line of a model: what :func:`measure` returns, or why there is nothing."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gibibytes * 2**30),) * 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sender.send(measure(case))


def measure(case: Case) -> dict[str, Any]:
    """Build, trace and verify a model, and return what was found.

    ``outcome`` is ``exact`` (the plan of the default call is right at half of the units), ``wrong`` (it is not),
    ``unseen`` (its outputs do not depend on the units, as those of a quantiser do not, so that nothing is proved),
    ``closed`` (``trace`` finds nothing to prune, and says why), ``exception``, ``memory``, or ``not built``.
    ``not_run`` is the share of the parameters in modules that the inputs do not run: nothing is known of their units.
    """
    torch.manual_seed(0)
    line: dict[str, Any] = {}
    try:
        model, inputs = build(case)
        line["model"] = type(model).__name__
        line["params"] = sum(p.numel() for p in model.parameters())
        line["not_run"] = round(1 - share_run(model, inputs), 4)
        start = time.perf_counter()
        plan = etp.trace(model, inputs)
        line["trace_seconds"] = round(time.perf_counter() - start, 2)
        line |= describe_plan(plan, model)
        found = etp.verify(model, plan, inputs, ratio=RATIO)
    except NotBuilt as error:
        return {**line, "outcome": "not built", "message": str(error)[:600]}
    except etp.EquivalenceError as error:
        outcome = "unseen" if "changes no output" in str(error) else "wrong"
        return {**line, "outcome": outcome, "message": str(error)[:600]}
    except etp.PlanError as error:
        return {**line, "outcome": "closed", "message": str(error)[:900]}
    except MemoryError:
        return {**line, "outcome": "memory", "message": ""}
    except Exception as error:  # noqa: BLE001 - whatever a user would see is the result
        out_of_memory = "can't allocate memory" in str(error)
        return {**line, "outcome": "memory" if out_of_memory else "exception", "message": _with_place(error)}
    return {**line, "outcome": "exact", "error": found.error, "dtype": found.dtype, "note": found.note}


def describe_plan(plan: Plan, model: torch.nn.Module) -> dict[str, Any]:
    """Return the share of parameters that a removable unit holds, and the shares that each reason locks."""
    names = dict(model.named_parameters())
    total = max(1, sum(p.numel() for p in names.values()))
    open_ = _numbers_held(plan, [g.name for g in plan.prunable], names)
    reasons: Counter[str] = Counter()
    for reason in {g.locked for g in plan.groups if g.locked}:
        held = _numbers_held(plan, [g.name for g in plan.groups if g.locked == reason], names, without=open_)
        reasons[reason] += sum(int(mask.sum()) for mask in held.values())
    untouched = total - sum(
        int(mask.sum()) for mask in _numbers_held(plan, [g.name for g in plan.groups], names).values()
    )
    refuted = sum((g.locked or "").startswith("check failed") for g in plan.groups)
    return {
        "prunable": round(sum(int(mask.sum()) for mask in open_.values()) / total, 4),
        "in_no_group": round(untouched / total, 4),
        "locked": {reason: round(n / total, 4) for reason, n in reasons.most_common(6) if n},
        "groups": len(plan.groups), "refuted": refuted, "notes": list(plan.notes)[:6],
    }  # fmt: skip


def _numbers_held(
    plan: Plan,
    groups: list[str],
    tensors: dict[str, torch.nn.Parameter],
    *,
    without: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return, for each parameter, a mask of the numbers that a unit of these groups holds."""
    found: dict[str, torch.Tensor] = {}
    for name in groups:
        for part in plan[name].slices:
            if part.tensor in tensors:
                shape = tensors[part.tensor].shape
                mask = found.setdefault(part.tensor, torch.zeros(shape, dtype=torch.bool))
                index = torch.as_tensor(part.index if not isinstance(part.index, range) else list(part.index))
                mask.index_fill_(part.axis, index, True)
    for tensor, mask in (without or {}).items():
        if tensor in found:
            found[tensor] &= ~mask
    return found


def _with_place(error: Exception) -> str:
    """Return an exception with the last line of the traceback that lies in this library, or the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "etp_graph" in frame.filename] or list(frames)
    last = own[-1]
    place = re.sub(r".*/(site-packages|etp_graph)/", "", last.filename)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place}:{last.lineno} {last.name})"
