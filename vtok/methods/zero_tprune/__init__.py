"""Zero-TPrune: ranks tokens on the attention graph, drops near duplicates, then the least important."""

from vtok.methods.zero_tprune.config import Step, ZeroTPrune, ZeroTPruneReducer, prune_plan

__all__ = ["Step", "ZeroTPrune", "ZeroTPruneReducer", "prune_plan"]
