"""What tests of exports share: tracing meets sizes that are symbols, which the type checks of the other tests refuse."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(scope="session", autouse=True)
def _sizes_may_be_symbols() -> Iterator[None]:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # noqa: FBT003
    yield
    jaxtyping.config.update("jaxtyping_disable", before)  # noqa: FBT003
