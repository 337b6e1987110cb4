"""The platform's consumers on a real database: each event has its effect once, however often and in what batches it
comes. Kafka is left out: that the runtime brings each message is shown in tests/consumer and by the demo."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from io import StringIO
from typing import Any

import psycopg
import pytest
from rich.console import Console
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.chip_quality import analytics, audit, events, inference, manufacturing, notification, quality, users
from examples.chip_quality.events import AlertLevel, InspectionEvent, QualityEvent, UserEvent
from examples.chip_quality.mailbox import Mailbox, mail_server
from examples.chip_quality.process import catalogue, engine_for
from outbox.catalogue import TypedEvent
from outbox.consumer import Consumer, Meta
from outbox.consumer.runtime import Process
from outbox.message import uuid7
from outbox.testing import pending_async
from outbox.writer import Outbox

NOWHERE = "127.0.0.1:1"
"""No Kafka: the consumers are not run."""

CHIP: dict[str, Any] = {
    "inspection_id": "i-1",
    "batch_id": "b-1",
    "chip_id": "c-1",
    "inspection_type": "visual",
    "status": "STARTED",
}
JUDGED: dict[str, Any] = {"inspection_id": "i-1", "batch_id": "b-1", "threshold": 80.0}
VOID = events.Defect(defect_type="void", severity="major", confidence=0.5, location="die 1")


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    """A database with an inbox and an outbox, and the tables of all the services."""
    engine = engine_for(database)
    async with engine.begin() as connection:
        for module in (analytics, audit, notification, quality, inference, manufacturing, users):
            await connection.run_sync(module.Base.metadata.create_all)
    yield engine
    await engine.dispose()


def delivered(consumer: Consumer, happened: Sequence[TypedEvent]) -> list[Meta]:
    """The events as Kafka would bring them."""
    found = []
    for offset, event in enumerate(happened):
        row = consumer.catalogue.encode(event)
        frame = b"\xc3\x01" + (row.fingerprint or 0).to_bytes(8, "little", signed=True)
        meta = Meta(row.topic, 0, offset, (row.key or "").encode(), frame + (row.value or b""), [], None)
        meta.event_id, meta.type = str(row.id), row.type
        found.append(meta)
    return found


async def take(consumer: Consumer, happened: Sequence[TypedEvent]) -> None:
    """What the runtime does with a unit of messages of one topic."""
    effects = consumer.effects(consumer.database(), consumer.inbox)
    batch = consumer.topics[delivered(consumer, happened[:1])[0].topic].batch or 1
    metas = delivered(consumer, happened)
    for start in range(0, len(metas), batch):
        await effects.take(metas[start : start + batch], Process())


def rows(database: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database) as connection:
        return connection.execute(query).fetchall()


# ---- analytics -------------------------------------------------------------------------------------------------------


async def test_analytics_counts_an_event_once_however_often_it_comes(engine: AsyncEngine, database: str) -> None:
    inspections: list[TypedEvent] = [
        InspectionEvent.inspection_created(**CHIP),
        InspectionEvent.defect_detected(**CHIP, defects=[VOID]),
        InspectionEvent.inspection_completed(**CHIP, quality_score=0.1),
        InspectionEvent.inspection_completed(**CHIP, quality_score=0.2),
    ]
    verdicts: list[TypedEvent] = [
        QualityEvent.quality_rejected(**JUDGED, quality_score=0.1),
        QualityEvent.quality_approved(**JUDGED, quality_score=90.0),
        QualityEvent.threshold_violated(**JUDGED, quality_score=0.1, pass_fail=False, alert_level=AlertLevel.WARNING),
    ]
    consumer = analytics.make_consumer(engine, NOWHERE)
    for _ in range(2):
        await take(consumer, inspections[:3])
        await take(consumer, [*inspections, *inspections])
        await take(consumer, verdicts)
    hour = inspections[2].timestamp.strftime("%Y-%m-%dT%H")  # type: ignore[attr-defined]  # it is an InspectionEvent
    squares = Decimal("0.05")
    assert rows(database, "SELECT * FROM completed") == [("visual", 2, Decimal("0.3"), squares)]
    assert rows(database, "SELECT * FROM score_windows") == [("visual", hour, 2, Decimal("0.3"))]
    assert rows(database, "SELECT * FROM defect_counts") == [("void", "major", 1)]
    assert rows(database, "SELECT * FROM yields") == [("b-1", 1, 1)]
    assert rows(database, "SELECT * FROM violations") == [("b-1", "WARNING", 1)]


def test_capability_is_that_of_the_scores() -> None:
    scores = [Decimal(n) for n in (86, 88, 90, 92, 94)]
    found = analytics.capability(len(scores), sum(scores, Decimal(0)), sum((s * s for s in scores), Decimal(0)))
    assert found.mean == 90
    assert found.deviation == pytest.approx(8**0.5)
    assert found.cp == pytest.approx(20 / (6 * 8**0.5))
    assert found.cpk == pytest.approx(10 / (3 * 8**0.5))
    assert analytics.capability(1, Decimal(90), Decimal(8100)).cpk is None


def test_a_p_chart_finds_the_batch_that_chance_does_not_explain() -> None:
    points = analytics.p_chart([("good", 95, 5), ("bad", 60, 40), ("small", 1, 1)])
    share = 46 / 202
    assert [point.in_control for point in points] == [False, False, True]
    assert points[0].upper == pytest.approx(share + 3 * (share * (1 - share) / 100) ** 0.5)
    assert points[2].lower == 0
    assert analytics.p_chart([]) == []


async def test_the_report_shows_what_was_counted(engine: AsyncEngine) -> None:
    completed = InspectionEvent.inspection_completed(**CHIP, quality_score=91)
    await take(analytics.make_consumer(engine, NOWHERE), [completed])
    out = StringIO()
    async with AsyncSession(engine) as session:
        await analytics.report(session, Console(file=out, width=120))
    assert "visual" in out.getvalue()
    assert "91.00" in out.getvalue()


# ---- quality: consume, judge, produce --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (80.0, ["QUALITY_ASSESSED", "QUALITY_APPROVED"]),
        (79.9, ["QUALITY_ASSESSED", "THRESHOLD_VIOLATED", "ALERT_TRIGGERED", "QUALITY_REJECTED"]),
    ],
)
async def test_a_completed_inspection_is_judged_once(engine: AsyncEngine, score: float, said: list[str]) -> None:
    consumer = quality.make_consumer(engine, NOWHERE)
    happened: list[TypedEvent] = [
        InspectionEvent.defect_detected(**CHIP, defects=[VOID, VOID]),
        InspectionEvent.inspection_completed(**CHIP, quality_score=score),
    ]
    await take(consumer, [*happened, *happened])
    async with AsyncSession(engine) as session:
        found: list[Any] = list(await pending_async(session))
    assert [event.event_type for event in found] == said
    assert {event.defect_count for event in found} == {2}
    assert [event.metadata["version"] for event in found] == [str(n + 1) for n in range(len(said))]


# ---- notification ----------------------------------------------------------------------------------------------------


def violated(level: AlertLevel) -> TypedEvent:
    return QualityEvent.alert_triggered(**JUDGED, quality_score=50.0, pass_fail=False, alert_level=level)


async def sent_by(sender: notification.Sender) -> int:
    count = 0
    while await sender.send_next():
        count += 1
    return count


@pytest.fixture
def mailbox() -> Any:
    with mail_server() as mailbox:
        yield mailbox


async def test_one_mail_an_alert_to_those_whom_its_level_concerns(engine: AsyncEngine, mailbox: Mailbox) -> None:
    consumer = notification.make_consumer(engine, NOWHERE)
    alerts = [violated(level) for level in AlertLevel]
    await take(consumer, [*alerts, *alerts, QualityEvent.quality_approved(**JUDGED, quality_score=99.0)])
    host, _, port = mailbox.address.partition(":")
    senders = [notification.Sender(engine, notification.by_smtp(host, int(port))) for _ in range(2)]
    assert sum(await asyncio.gather(*map(sent_by, senders))) == 3
    by_level = {str(alert.event_id): list(notification.ROUTES[alert.alert_level]) for alert in alerts}  # type: ignore[attr-defined]  # they are QualityEvents
    assert dict(mailbox.recipients) == {key: to for key, to in by_level.items() if to}
    assert set(mailbox.received.values()) == {1}


async def test_a_mail_server_that_is_away_is_waited_for(engine: AsyncEngine, database: str, mailbox: Mailbox) -> None:
    await take(notification.make_consumer(engine, NOWHERE), [violated(AlertLevel.ERROR)])
    assert await sent_by(notification.Sender(engine, notification.by_smtp("127.0.0.1", 1))) == 0
    assert rows(database, "SELECT state FROM alerts") == [("DUE",)]
    host, _, port = mailbox.address.partition(":")
    assert await sent_by(notification.Sender(engine, notification.by_smtp(host, int(port)))) == 1


async def test_a_mail_that_may_have_gone_out_is_not_sent_again(engine: AsyncEngine, database: str) -> None:
    tried = []

    async def breaks(message: Any) -> None:
        tried.append(message["Message-ID"])
        raise ConnectionResetError("gone in the middle")

    await take(notification.make_consumer(engine, NOWHERE), [violated(AlertLevel.ERROR)])
    sender = notification.Sender(engine, breaks)
    assert await sent_by(sender) == 0
    assert await sent_by(sender) == 0
    assert len(tried) == 1
    assert rows(database, "SELECT state FROM alerts") == [("UNSURE",)]


async def test_a_sender_that_died_leaves_an_alert_for_a_person(engine: AsyncEngine, database: str) -> None:
    await take(notification.make_consumer(engine, NOWHERE), [violated(AlertLevel.ERROR)])
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE alerts SET state = 'SENDING', since = now() - interval '59 seconds'")
    sender = notification.Sender(engine, notification.by_smtp("127.0.0.1", 1))
    assert await sender.give_up_unsure() == 0
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE alerts SET since = now() - interval '61 seconds'")
    assert await sender.give_up_unsure() == 1
    assert await sent_by(sender) == 0


# ---- audit -----------------------------------------------------------------------------------------------------------


def login(user: str) -> TypedEvent:
    return UserEvent.user_login(user_id=user, action="login", ip_address="10.0.0.1")


async def test_the_audit_log_grows_and_holds(engine: AsyncEngine, database: str) -> None:
    consumer = audit.make_consumer(engine, NOWHERE)
    happened = [login(f"u-{number}") for number in range(5)]
    await take(consumer, happened[:3])
    await take(consumer, happened)
    async with AsyncSession(engine) as session:
        number, last = await audit.verify(session)
    assert number == 5
    assert rows(database, "SELECT encode(hash, 'hex') FROM audit_head") == [(last.hex(),)]
    users_ = [row[0] for row in rows(database, "SELECT said->>'user_id' FROM audit_log ORDER BY number")]
    assert users_ == [f"u-{number}" for number in range(5)]
    with psycopg.connect(database) as connection, pytest.raises(psycopg.errors.RaiseException, match="only grows"):
        connection.execute("DELETE FROM audit_log WHERE number = 2")


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE audit_log SET said = jsonb_set(said, '{user_id}', '\"other\"') WHERE number = 2",
        "DELETE FROM audit_log WHERE number = 2",
        "DELETE FROM audit_log WHERE number = 3",
        "UPDATE audit_log SET hash = sha256('x') WHERE number = 3",
    ],
)
async def test_an_audit_log_that_was_changed_is_found_out(engine: AsyncEngine, database: str, tamper: str) -> None:
    await take(audit.make_consumer(engine, NOWHERE), [login(f"u-{number}") for number in range(3)])
    with psycopg.connect(database) as connection:
        connection.execute("ALTER TABLE audit_log DISABLE TRIGGER grows_only")
        connection.execute(tamper)
    async with AsyncSession(engine) as session:
        with pytest.raises(audit.Broken):
            await audit.verify(session)


# ---- the services that publish ---------------------------------------------------------------------------------------


async def said_by(engine: AsyncEngine) -> list[str]:
    async with AsyncSession(engine) as session:
        return [str(event.event_type) for event in await pending_async(session)]  # type: ignore[union-attr]


async def test_inference_looks_at_each_new_inspection_once(engine: AsyncEngine, database: str) -> None:
    consumer = inference.make_consumer(engine, NOWHERE, lambda _: ([VOID], 61.5))
    created = InspectionEvent.inspection_created(**CHIP)
    await take(consumer, [created, created, InspectionEvent.inspection_started(**CHIP)])
    assert await said_by(engine) == ["DEFECT_DETECTED", "QUALITY_ASSESSED"]
    assert rows(database, "SELECT inspection_id, score, defects FROM inferences") == [("i-1", 61.5, 1)]


async def test_manufacturing_follows_a_lot_from_its_batches_to_its_milestone(engine: AsyncEngine) -> None:
    service = manufacturing.ManufacturingService(Outbox(catalogue()))
    async with AsyncSession(engine) as session, session.begin():
        lot = await service.create_lot(session, "CQ-7", batches=2, quantity=10)
    async with AsyncSession(engine) as session, session.begin():
        await service.finish_batch(session, (await service.batches(session, lot))[0], good=True)
    with pytest.raises(manufacturing.Conflict):
        async with AsyncSession(engine) as session, session.begin():
            await service.finish_batch(session, (await service.batches(session, lot))[0], good=True)
    async with AsyncSession(engine) as session, session.begin():
        await service.finish_batch(session, (await service.batches(session, lot))[1], good=False)
    assert await said_by(engine) == [
        "LOT_CREATED",
        "BATCH_CREATED",
        "BATCH_CREATED",
        "BATCH_COMPLETED",
        "BATCH_FAILED",
        "LOT_PROCESSED",
        "PRODUCTION_MILESTONE",
    ]


async def test_users_say_what_is_done_to_them_and_what_is_refused_is_not_said(engine: AsyncEngine) -> None:
    service = users.UserService(Outbox(catalogue()))
    async with AsyncSession(engine) as session, session.begin():
        user = await service.create(session, "ada")
        await service.grant(session, user, "batches")
        await service.grant(session, user, "batches")
        await service.revoke(session, user, "batches")
        await service.log_in(session, user, "10.0.0.1", success=False)
    with pytest.raises(users.Conflict):
        async with AsyncSession(engine) as session, session.begin():
            await service.create(session, "ada")
    with pytest.raises(users.NotFound):
        async with AsyncSession(engine) as session, session.begin():
            await service.rename(session, str(uuid7()), "eve")
    assert await said_by(engine) == ["USER_CREATED", "PERMISSION_GRANTED", "PERMISSION_REVOKED", "USER_LOGIN"]
