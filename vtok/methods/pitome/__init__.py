"""PiToMe: merges inside large clusters of similar tokens, protects isolated ones."""

from vtok.methods.pitome.config import PiToMe, PiToMeReducer, energy_plan, energy_score, merge_count, sorted_bsm_plan

__all__ = ["PiToMe", "PiToMeReducer", "energy_plan", "energy_score", "merge_count", "sorted_bsm_plan"]
