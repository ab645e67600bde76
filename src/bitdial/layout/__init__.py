"""Membership of groups: channels sorted by range, permutations folded into the producers (design notes, section 3)."""

from bitdial.layout.fold import LayoutReport, apply_layout
from bitdial.layout.groups import group_bounds
from bitdial.layout.plan import FrozenSpace, LayoutPlan, Segment, plan_layout

__all__ = ["FrozenSpace", "LayoutPlan", "LayoutReport", "Segment", "apply_layout", "group_bounds", "plan_layout"]
