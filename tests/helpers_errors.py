"""What a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def message_of(error: type[Exception], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message with which a call is refused."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)
