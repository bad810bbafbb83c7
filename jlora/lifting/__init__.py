"""Run unmodified models on adapted weights."""

from jlora.lifting.lifted_function import lift, on_merged

__all__ = ["lift", "on_merged"]
