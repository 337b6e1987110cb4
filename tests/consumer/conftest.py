"""Fixtures of the consumer's tests."""

from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.consumer.stage import Effects, async_engine
from tests.roles import ROLES, as_role


@pytest.fixture
def effects(database: str) -> Iterator[Effects]:
    """What the tests' handlers have written."""
    effects = Effects(database)
    yield effects
    effects.close()


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    """For `async def` handlers. In the inbox role, as what a consumer does elsewhere in these tests."""
    engine = async_engine(as_role(database, ROLES.inbox))
    yield engine
    await engine.dispose()
