"""Membership of groups: channels sorted by range, permutations folded into the producers (design notes, section 3)."""

from flexiq.layout.fold import LayoutReport, apply_layout
from flexiq.layout.groups import group_bounds
from flexiq.layout.plan import FrozenSpace, LayoutPlan, Segment, plan_layout

__all__ = ["FrozenSpace", "LayoutPlan", "LayoutReport", "Segment", "apply_layout", "group_bounds", "plan_layout"]
