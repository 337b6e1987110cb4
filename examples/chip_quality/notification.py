"""The notification service: one alert for each THRESHOLD_VIOLATED and ALERT_TRIGGERED, routed by its level, mailed.

The inbox makes what happens in the database happen once. A mail is outside of it, so there are two steps:

    1  the handler records the alert as DUE, in the transaction that claims the event: one alert an event
    2  the sender takes DUE alerts: SENDING (committed), then the mail, then SENT

A process that dies between SENDING and SENT leaves a mail of which nobody knows whether it went out. It is not sent
again: it becomes UNSURE, which the log says, and a person looks. Whoever would rather have an alert twice than not at
all sends UNSURE ones again: Message-ID and Idempotency-Key of the mail are made of the event's id, and stay the same.

    export NOTIFICATION_DATABASE_URL=postgresql://postgres@localhost/notification KAFKA_BOOTSTRAP_SERVERS=localhost:9092
    export SMTP_SERVER=localhost:25
    outbox migrate $NOTIFICATION_DATABASE_URL && python -m examples.chip_quality.notification
"""

import asyncio
import os
import smtplib
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from email.message import EmailMessage
from enum import StrEnum
from uuid import UUID

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.chip_quality import process
from examples.chip_quality.events import AlertLevel, QualityEvent, QualityEventType
from outbox.consumer import Consumer, Meta

log = structlog.get_logger("notification")

NAME = "notification"
"""The consumer group in Kafka, and the consumer in the inbox."""

ROUTES: Mapping[AlertLevel, tuple[str, ...]] = {
    AlertLevel.INFO: (),  # recorded, and nobody is disturbed
    AlertLevel.WARNING: ("quality@chip.example",),
    AlertLevel.ERROR: ("quality@chip.example", "line-lead@chip.example"),
    AlertLevel.CRITICAL: ("quality@chip.example", "line-lead@chip.example", "on-call@chip.example"),
}
"""Who is told, by level."""

SENDER = "alerts@chip.example"

ALERTING = (QualityEventType.THRESHOLD_VIOLATED, QualityEventType.ALERT_TRIGGERED)

BATCH = 100
"""Quality events in one transaction."""

SEND_TIMEOUT = 10.0
"""Seconds that the mail server may take."""

UNSURE_AFTER = timedelta(seconds=60)
"""So long after SENDING no sender can be at it any more."""

SENDERS = 4
"""Mails at once."""

PAUSE = 0.2
"""Seconds between looks for DUE alerts."""


class Base(DeclarativeBase):
    """The service's own tables."""


class State(StrEnum):
    """Of an alert."""

    DUE = "DUE"
    SENDING = "SENDING"
    SENT = "SENT"
    RECORDED = "RECORDED"
    """Nobody is to be told."""
    UNSURE = "UNSURE"


class Alert(Base):
    """One alert; its id is the event's."""

    __tablename__ = "alerts"

    event_id: Mapped[UUID] = mapped_column(primary_key=True)
    inspection_id: Mapped[str]
    what: Mapped[str]
    level: Mapped[str]
    text: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    since: Mapped[datetime] = mapped_column(server_default=func.now())
    """Of the state."""


def make_consumer(engine: AsyncEngine, bootstrap: str) -> Consumer:
    """Step 1: what records the alerts."""
    consumer = Consumer(NAME, engine, catalogue=process.catalogue(), kafka=process.kafka(NAME, bootstrap))

    @consumer.on_batch(QualityEvent, size=BATCH)
    async def alert(events: list[QualityEvent], session: AsyncSession, _: list[Meta]) -> None:
        session.add_all(alert_of(event) for event in events if event.event_type in ALERTING)

    return consumer


def alert_of(event: QualityEvent) -> Alert:
    """What is to be told of the event, and whether somebody is."""
    level = event.alert_level or AlertLevel.WARNING
    return Alert(
        event_id=event.event_id,
        inspection_id=event.inspection_id,
        what=event.event_type,
        level=level,
        text=f"inspection {event.inspection_id} of batch {event.batch_id}: score {event.quality_score:g},"
        f" threshold {event.threshold}, {event.defect_count} defects",
        state=State.DUE if ROUTES[level] else State.RECORDED,
    )


Send = Callable[[EmailMessage], Awaitable[None]]
"""Hands a mail over. Raises NotSent when it certainly did not; another OSError says nothing about it."""


class NotSent(OSError):  # noqa: N818 -- named for what happened
    """Nothing was handed over: the mail server is away."""


class Sender:
    """Step 2. Several may run at once: an alert is taken by one of them."""

    def __init__(self, engine: AsyncEngine, send: Send) -> None:
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)
        self._send = send

    async def run(self) -> None:
        """Send what is due, for ever. A mail server that is away is tried again; the alert stays DUE."""
        while True:
            await self.give_up_unsure()
            while await self.send_next():
                pass
            await asyncio.sleep(PAUSE)

    async def send_next(self) -> bool:
        """Send one alert; whether there was one, and it went out."""
        async with self._sessions.begin() as session:
            due = select(Alert).where(Alert.state == State.DUE).order_by(Alert.since).limit(1)
            alert = await session.scalar(due.with_for_update(skip_locked=True))
            if alert is None:
                return False
            alert.state, alert.since = State.SENDING, func.now()
        try:
            await self._send(mail(alert))
        except OSError as error:  # every error of smtplib is one
            await self._to(alert.event_id, State.DUE if isinstance(error, NotSent) else State.UNSURE, error)
            return False
        await self._to(alert.event_id, State.SENT)
        return True

    async def give_up_unsure(self) -> int:
        """Alerts whose sender died on the way; how many."""
        old = (Alert.state == State.SENDING) & (Alert.since < func.now() - UNSURE_AFTER)
        async with self._sessions.begin() as session:
            found = await session.scalars(
                update(Alert).where(old).values(state=State.UNSURE, since=func.now()).returning(Alert.event_id)
            )
            ids = list(found)
        for event_id in ids:
            log.error(
                "alert unsure", alert=str(event_id), remedy="look whether its mail has come; else send it by hand"
            )
        return len(ids)

    async def _to(self, event_id: UUID, state: State, error: Exception | None = None) -> None:
        async with self._sessions.begin() as session:
            await session.execute(update(Alert).where(Alert.event_id == event_id).values(state=state, since=func.now()))
        if error is None:
            log.info("alert sent", alert=str(event_id))
        else:
            log.warning("alert not sent", alert=str(event_id), state=state, error=str(error))


def mail(alert: Alert) -> EmailMessage:
    """The mail of an alert: the same one, with the same ids, whenever it is made."""
    message = EmailMessage()
    message["From"] = SENDER
    message["To"] = ", ".join(ROUTES[AlertLevel(alert.level)])
    message["Subject"] = f"[{alert.level}] {alert.what.replace('_', ' ').lower()}: inspection {alert.inspection_id}"
    message["Message-ID"] = f"<{alert.event_id}@chip.example>"
    message["Idempotency-Key"] = str(alert.event_id)
    message.set_content(alert.text)
    return message


def by_smtp(host: str, port: int) -> Send:
    """Sends through a mail server."""

    def deliver(message: EmailMessage) -> None:
        try:
            server = smtplib.SMTP(host, port, timeout=SEND_TIMEOUT)
        except OSError as error:
            raise NotSent(f"the mail server at {host}:{port} cannot be reached: {error}") from error
        with server:
            server.send_message(message)

    async def send(message: EmailMessage) -> None:
        await asyncio.to_thread(deliver, message)

    return send


def main() -> None:
    """The process. Logs are JSON lines on stderr."""
    process.configure_log()
    engine = process.engine_for(os.environ["NOTIFICATION_DATABASE_URL"])
    host, _, port = os.environ["SMTP_SERVER"].partition(":")
    sender = Sender(engine, by_smtp(host, int(port or 25)))
    consumer = make_consumer(engine, os.environ["KAFKA_BOOTSTRAP_SERVERS"])
    asyncio.run(process.run(consumer, Base, *[sender.run] * SENDERS))


if __name__ == "__main__":
    main()
