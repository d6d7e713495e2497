"""ToDRE: keeps visual tokens that are unlike each other, and drops them all once the text has stopped looking."""

from vtok.methods.todre.config import FirstStage, ToDRE, ToDREReducer, class_scores
from vtok.methods.todre.selection import k_center_select, kept_tokens, max_sum_select
from vtok.methods.todre.text_relevance import relevance

__all__ = [
    "FirstStage",
    "ToDRE",
    "ToDREReducer",
    "class_scores",
    "k_center_select",
    "kept_tokens",
    "max_sum_select",
    "relevance",
]
