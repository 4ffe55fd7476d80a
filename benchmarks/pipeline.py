"""Planning, tail and attention of whole calls, on the demo model's own q, k and v at 480p length."""

from __future__ import annotations

import torch

from fgattn import Settings, attend, build_plan
from fgattn.tail import pooled_tail

from .measure import milliseconds, relative_error
