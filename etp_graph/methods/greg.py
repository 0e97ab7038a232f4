"""Growing regularization: weight decay that rises until the units which it acts on are gone."""

from __future__ import annotations

from .. import forces, schedules
from .method import Method

PRESETS = (
    Method(
        name="greg1", source="GReg-1: Wang et al. 2021, section 3.2: growing L2 on units chosen by L1 norm",
        force=forces.Ridge(), beta=1.0, mode="gradient", kappa="one", strength=schedules.WarmUp(end=1.0),
        acts_on="losers", criterion="magnitude", p=1, scope="local",
    ),
    Method(
        name="greg2", source="GReg-2: Wang et al. 2021, section 3.3: growing L2 on all units until they separate",
        force=forces.Ridge(), beta=1.0, mode="gradient", kappa="one", strength=schedules.WarmUp(end=1.0),
        acts_on="losers", select_at=0.25, criterion="magnitude", p=1, scope="local",
    ),
)  # fmt: skip
