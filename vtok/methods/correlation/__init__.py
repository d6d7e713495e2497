"""Token-level correlation-guided compression for models that cut pages into crops."""

from vtok.methods.correlation.config import Correlation, CorrelationReducer
from vtok.methods.correlation.scores import redundant_tokens

__all__ = ["Correlation", "CorrelationReducer", "redundant_tokens"]
