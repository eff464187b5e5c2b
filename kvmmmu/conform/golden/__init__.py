"""Golden runs against the model: the same scripts, operation by operation."""

from kvmmmu.conform.golden.runner import check

__all__ = ["check"]
