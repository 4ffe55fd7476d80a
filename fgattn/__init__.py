"""Fine-grained sparse attention: tiles of M queries skip slices of N keys, N down to one key."""

from .attention import attend, sparse_attention
from .errors import InvalidArgument, Unsupported
from .layout import TokenLayout
from .plan import SparsePlan
from .planning import build_plan, plan_from_mask
from .settings import Settings

__all__ = [
    "InvalidArgument",
    "Settings",
    "SparsePlan",
    "TokenLayout",
    "Unsupported",
    "attend",
    "build_plan",
    "plan_from_mask",
    "sparse_attention",
]
__version__ = "0.1.0"
