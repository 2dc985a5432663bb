"""The mathematics of the adapters, in plain torch: no files, no recipes, no command line.

Dimensions, one letter each, in every comment below this package:

    N   tokens (batch x sequence, flattened)      d_in, d_out   width of a linear map's input and output
    L   layers of a tree                          s   experts   r   rank of an expert   f   children picked (fanout)
    F   nodes of a tree level                     m   width of a router's hidden state and keys
"""

from smore_cli.nn.adapted import AdaptedModule, Adapter
from smore_cli.nn.attach import adapted_modules, attach, detach, set_active
from smore_cli.nn.context import AdapterContext, RoutingRecord, checkpoint_contexts, current_context

__all__ = [
    "AdaptedModule",
    "Adapter",
    "AdapterContext",
    "RoutingRecord",
    "adapted_modules",
    "attach",
    "checkpoint_contexts",
    "current_context",
    "detach",
    "set_active",
]
