"""The user service: users and what they may do. Each change says so; what changes nothing says nothing."""

from sqlalchemy import ForeignKey
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality.events import UserEvent
from outbox.message import uuid7
from outbox.writer import Outbox


class Conflict(Exception):  # noqa: N818 -- named for what happened
    """The name is taken."""


class NotFound(Exception):  # noqa: N818 -- named for what happened
    """There is no such user."""


class Base(DeclarativeBase):
    """The service's own tables."""


class User(Base):
    """Somebody."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Permission(Base):
    """What somebody may do."""

    __tablename__ = "permissions"

    user_id: Mapped[str] = mapped_column(ForeignKey(User.id), primary_key=True)
    resource: Mapped[str] = mapped_column(primary_key=True)


class UserService:
    """What the service does, each time inside a transaction that the caller begins and commits."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def create(self, session: AsyncSession, name: str) -> str:
        """A new user; the id. Raises Conflict where the name is taken."""
        new = insert(User).values(id=str(uuid7()), name=name).on_conflict_do_nothing().returning(User.id)
        user_id = await session.scalar(new)
        if user_id is None:
            raise Conflict(f"there is a user {name!r} already")
        self._outbox.add(session, UserEvent.user_created(user_id=user_id, username=name, action="create"))
        return user_id

    async def rename(self, session: AsyncSession, user_id: str, name: str) -> None:
        """Another name."""
        user = await self._locked(session, user_id)
        user.name = name
        self._outbox.add(session, UserEvent.user_updated(user_id=user_id, username=name, action="rename"))

    async def grant(self, session: AsyncSession, user_id: str, resource: str) -> None:
        """The user may use the resource."""
        await self._locked(session, user_id)
        if await session.get(Permission, (user_id, resource)) is None:
            session.add(Permission(user_id=user_id, resource=resource))
            granted = UserEvent.permission_granted(user_id=user_id, action="grant", resource=resource)
            self._outbox.add(session, granted)

    async def revoke(self, session: AsyncSession, user_id: str, resource: str) -> None:
        """No longer."""
        await self._locked(session, user_id)
        permission = await session.get(Permission, (user_id, resource))
        if permission is not None:
            await session.delete(permission)
            revoked = UserEvent.permission_revoked(user_id=user_id, action="revoke", resource=resource)
            self._outbox.add(session, revoked)

    async def log_in(self, session: AsyncSession, user_id: str, address: str, *, success: bool) -> None:
        """Somebody came in as this user, or was not let in: both are said."""
        await self._locked(session, user_id)
        came = UserEvent.user_login(user_id=user_id, action="login", ip_address=address, success=success)
        self._outbox.add(session, came)

    async def _locked(self, session: AsyncSession, user_id: str) -> User:
        """The user's row, locked: the events of a user have the order of the changes."""
        user = await session.get(User, user_id, with_for_update=True)
        if user is None:
            raise NotFound(f"there is no user {user_id}")
        return user
