"""Stand-ins: how a module would have been written for units that can go.

Most forwards need nothing: their operators are followed, and the attributes that they read say which sizes they count
(:mod:`etp_graph.graph._counted_sizes`). Some cannot be followed (a fused kernel, a hand-written norm), some cannot run
with fewer units (``reshape(batch, positions, channels)`` with the width of the *input*). A stand-in is another class
for such a module, with the same parameters and another ``forward``:

* a *view* stands in only while the library looks at the model: the tracer and the masked reference of the check;
* any other stand-in also takes the module's place when surgery changes it. The check compares it with the original.

Rows are declared in the modules of this package, in the user's code with :func:`register_standin`.
"""

from __future__ import annotations

from ._caches import size_caches_by_config_, size_caches_by_keys_
from ._pytorch import MultiheadAttention
from ._registry import register_standin, standin
from ._reshapes import HEADS
from ._source import unpickled_instance
from ._swap import replace_, replaceable, standing_in

__all__ = [
    "HEADS",
    "MultiheadAttention",
    "register_standin",
    "replace_",
    "replaceable",
    "size_caches_by_config_",
    "size_caches_by_keys_",
    "standin",
    "standing_in",
    "unpickled_instance",
]
