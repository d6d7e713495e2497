"""ATS: each image keeps the tokens its own class token attends to, as many as it needs."""

from vtok.methods.ats.config import ATS, ATSReducer, patch_scores, significance_scores

__all__ = ["ATS", "ATSReducer", "patch_scores", "significance_scores"]
