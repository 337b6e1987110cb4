"""The Kafka transaction: a lane's two producers, its progress, and what their errors mean.

Every method blocks and is meant for a thread; librdkafka releases the GIL while it waits. Nothing here decides what
comes next: `relay.worker` orders the steps. Sources: KIP-98 (transactions), KIP-447 (offsets in a transaction),
KAFKA-17754 (a delayed EndTxn).

Traps of librdkafka 2.x, each measured (docs/design.md, "librdkafka"):

- After a fatal error later calls answer `_CONFLICT` with `retriable()` true: the first fatal one is what counts. Here
  every error ends the hold on the lane and the producers with it, so no later call is made.
- `produce()` that raises does not poison the transaction. Same answer.
- `commit_transaction()` may return as if nothing had been although its EndTxn was sent twice. Only the client's log
  shows it, and reliably only its debug log: `Watch` reads it, and `commit()` says so.
- `send_offsets_to_transaction()` may never return, whatever its timeout. `relay.worker.Shared.thread` gives it up.
- An undelivered record fails the flush or the commit; no delivery callback is needed for that.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import ClusterMetadata  # type: ignore[attr-defined]  # not re-exported

from relay.config import RelayConfig
from relay.errors import (
    ConfigError,
    EventRefused,
    KafkaTrouble,
    LaneLost,
    LaneTrouble,
    NotLetIn,
    Recycle,
    Refusal,
    Undelivered,
)
from relay.lane import PRODUCERS, Progress, parse_progress

FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
"""Another relay has opened producers of this lane."""

REFUSED = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.POLICY_VIOLATION,
        # after topic.metadata.propagation.max.ms
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)
"""What Kafka says of a record that it will never take as it is."""

REFUSED_AS_TOPIC = frozenset(
    {
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)
"""What it says of each record of a topic; the others may be said of a whole request for one record's sake."""

REFUSED_IN_REPORT = REFUSED | {KafkaError.UNKNOWN_TOPIC_OR_PART}
"""The same, in a record's delivery report, where no try follows any more."""


FLUSH_SECONDS = 0.1
"""After so long without an end a flush is looked at: of a transaction that has failed the client may keep records back
for ever."""

ABORT_SECONDS = 1.0

_COORDINATOR_MOVES = frozenset(
    {
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    }
)
"""A new or changing cluster says so for a moment; `committed` passes it on instead of asking again."""

_NEVER_UP = re.compile(r"Connect to|/bootstrap: |in state (INIT|DOWN|TRY_CONNECT|CONNECT)\b")

_NOT_LET_IN = re.compile(r"SASL |SSL |[Cc]ertificate|security\.protocol")

_AROUND = re.compile(r"^FAIL .*?\]: | \(after .*$")
"""What a line of the client's log has before and behind its words: the client, its thread, and how long that took."""

FIRST_LOOK = 1.0
"""Seconds after which `reached` looks for the first time whether it is let in; doubled each time."""


class Watch:
    """Reads the client's log for connections that were lost with requests under way, and for why there is none. In
    place of a logging.Logger: the client calls nothing but `log`, several times a transaction."""

    def __init__(self) -> None:
        self.suspicious: str | None = None
        self.failure: str | None = None
        """Why the last connection failed, in the client's words."""
        self.doomed: str | None = None
        """Why the transaction can only be aborted."""

    @property
    def refused(self) -> bool:
        """The last connection failed for a certificate, a user or a password."""
        return self.failure is not None and _NOT_LET_IN.search(self.failure) is not None

    def log(self, _level: int, line: str, *values: object) -> None:
        """What the client says, as logging.Logger.log takes it: `values` are (facility, client, text)."""
        text = line % values if values else line
        if text.startswith("TXNERR"):
            self.doomed = text
        if not text.startswith(("FAIL", "REQTMOUT")):
            return
        if text.startswith("FAIL"):
            self.failure = _AROUND.sub("", text)
        # A connection that never came up, or only to learn the brokers' names, carried no request of a transaction.
        if not _NEVER_UP.search(text):
            self.suspicious = text


class Transactions:
    """A lane's two transactional producers and its progress. One instance lives as long as one hold on the lane.

    `packing`: bytes of records that travel together, at most; None: as the settings have it. `closely`: a record as
    large as that travels alone (where it is 1, all do), and `flush` says which of those Kafka refuses, at a callback
    for each record.

    Raises (every method): LaneLost when another relay opened the producers; EventRefused (`flush`, when `closely`) when
    Kafka refuses an event for good; Undelivered when that may be so; KafkaTrouble for all else. After any of them the
    instance is to be discarded.
    """

    def __init__(
        self, config: RelayConfig, name: str, lane: int, *, closely: bool = False, packing: int | None = None
    ) -> None:
        self._config = config
        self._closely = closely
        self._producer_settings = config.producer()
        if packing is not None:
            self._producer_settings["batch.size"] = min(packing, int(self._producer_settings["batch.size"]))
        self._name = name
        self._lane = lane
        self._timeout = config.kafka_timeout
        self._transaction_timeout = config.transaction_timeout
        self._producers: dict[int, Producer] = {}
        self._deliveries: _Deliveries | None = None
        self._watches = [Watch() for _ in range(PRODUCERS)]
        settings = {"group.id": name, "isolation.level": "read_committed", "enable.auto.commit": False}
        self._reader = Consumer({**config.client(), **settings}, logger=Watch())
        # A group that no one joins: the metadata of a consumer that never subscribed carries no generation.
        self._group = self._reader.consumer_group_metadata()

    # ---- take --------------------------------------------------------------------------------------------------------

    def fence(self, number: int) -> None:
        """Step 2, for one of the two ids: a new producer. Once it returns, the former owner of the id can commit
        nothing."""
        settings = {**self._producer_settings, "transactional.id": f"{self._name}.{self._lane}.{number}"}
        with typed("open a producer of the lane", watch=self._watches[number]):
            self._producers[number] = producer = Producer(settings, logger=self._watches[number])
            try:
                producer.init_transactions(self._timeout)
            finally:
                producer.poll(0)  # serves the client's log
        self._watches[number].suspicious = None

    def lost(self, number: int) -> str | None:
        """Why a new producer is due for this id although it has no transaction open: a connection was lost meanwhile,
        and the client may look for the group's coordinator where it is no more. Does not block."""
        self._producers[number].poll(0)  # serves the client's log
        return self._watches[number].suspicious

    def progress(self) -> Progress | None:
        """Step 3, after both fences: what Kafka committed for this lane. None: nothing.

        Raises:
            ProgressError: what is there was not written by a relay.
        """
        return _progress(self._reader, self._name, self._lane, self._timeout)

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def begin(self, batch: int) -> Callable[..., None]:
        """Step 6, begin: opens the transaction of `batch`. Returned: `produce` of its producer.

        Raises:
            Recycle: a connection was lost while no transaction was open.
        """
        producer = self._producers[batch % PRODUCERS]
        with typed("begin a transaction"):
            if (lost := self.lost(batch % PRODUCERS)) is not None:
                raise Recycle(lost)
            producer.begin_transaction()
        self._watches[batch % PRODUCERS].doomed = None
        self._deliveries = _Deliveries(producer, self._producer_settings["batch.size"]) if self._closely else None
        return self._deliveries.produce if self._deliveries else producer.produce

    def flush(self, batch: int) -> None:
        """Step 6, flush: every record of the batch is acknowledged when this returns."""
        producer, watch = self._producers[batch % PRODUCERS], self._watches[batch % PRODUCERS]
        deadline = time.monotonic() + self._transaction_timeout
        with typed("deliver a batch", EventRefused):
            while (left := producer.flush(FLUSH_SECONDS)) and watch.doomed is None and time.monotonic() < deadline:
                pass
        if self._deliveries:
            self._deliveries.check()
        if left and watch.doomed is not None:
            raise Undelivered(watch.doomed)
        if left:
            raise KafkaTrouble(f"{left} records were not acknowledged within {self._transaction_timeout:g} s")

    def offsets(self, batch: int, metadata: str, number: int | None = None) -> None:
        """Step 6, progress: in the transaction, behind the events. `number`: by this id, else by the batch's own."""
        producer = self._producers[(batch if number is None else number) % PRODUCERS]
        offset = TopicPartition(control_topic(self._name), self._lane, batch, metadata)
        with typed("write the lane's progress", Undelivered):
            producer.send_offsets_to_transaction([offset], self._group, self._transaction_timeout)

    def commit(self, batch: int) -> str | None:
        """Step 6, commit. Returned: why the connection was suspicious during the transaction; None when it was not."""
        producer = self._producers[batch % PRODUCERS]
        with typed("commit a batch", Undelivered):
            producer.commit_transaction(self._transaction_timeout)
            producer.poll(0)  # serves the client's log
        return self._watches[batch % PRODUCERS].suspicious

    def abort(self, batch: int) -> None:
        """End the transaction of a batch that was refused, at once: who opens the id next would wait half a second for
        the broker to do it. What comes of it does not matter: that one's epoch fences a late request."""
        with suppress(KafkaException, SystemError):
            self._producers[batch % PRODUCERS].abort_transaction(ABORT_SECONDS)

    def rewrite(self, batch: int, metadata: str) -> str | None:
        """Write the progress again, in an empty transaction of each id: Kafka forgets what rests. Returned: as
        `commit`."""
        suspicious = None
        try:
            for number in range(PRODUCERS):
                self.begin(number)
                self.offsets(batch, metadata, number)
                suspicious = self.commit(number) or suspicious
        except Undelivered as error:  # there are no records that could be to blame
            raise KafkaTrouble(str(error)) from error
        return suspicious

    def discard(self) -> None:
        """Throw the producers away. What they left open is aborted by the lane's next taker, or by the broker in
        time."""
        for producer in self._producers.values():
            producer.purge(blocking=False)
        self._producers.clear()
        self._reader.close()


def peek(config: RelayConfig, name: str, lane: int) -> Progress | None:
    """The lane's progress as it is now, before anything is fenced: what a transaction under way will say is not waited
    for.

    Raises:
        ProgressError, KafkaTrouble: as `Transactions.progress`.
    """
    settings = {"group.id": name, "isolation.level": "read_uncommitted", "enable.auto.commit": False}
    watch = Watch()
    reader = Consumer({**config.client(), **settings}, logger=watch)
    try:
        _reached(reader, watch, config.kafka_timeout, control_topic(name))
        return _progress(reader, name, lane, config.kafka_timeout)
    finally:
        reader.close()


def reached(config: RelayConfig, topic: str | None = None) -> ClusterMetadata:
    """What the cluster says of itself and of `topic`, or of all topics. Blocks.

    Raises:
        NotLetIn, KafkaTrouble: no connection within `kafka_timeout`; why the last one failed.
    """
    watch = Watch()
    # Not an admin client: that one says things at its end which go past its logger, to stderr.
    return _reached(Producer(config.client(), logger=watch), watch, config.kafka_timeout, topic)


def _reached(client: Consumer | Producer, watch: Watch, timeout: float, topic: str | None) -> ClusterMetadata:
    """A broker that does not let us in is told of within a second or so: the client itself would try until the time is
    up, and then say no more than that."""
    deadline, patience = time.monotonic() + timeout, FIRST_LOOK
    while True:
        try:
            left = max(0.1, min(patience, deadline - time.monotonic()))
            return client.list_topics(topic, timeout=left)  # type: ignore[no-any-return] # its stub says nothing
        except KafkaException as error:
            client.poll(0)  # serves the client's log
            passing = error.args[0].code() in _NO_CONNECTION
            if not passing or watch.refused or time.monotonic() >= deadline:
                raise classify("reach Kafka", error.args[0], watch=watch) from error
        patience *= 2  # a request that was under way is lost


def _progress(reader: Consumer, name: str, lane: int, timeout: float) -> Progress | None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            found = _committed(reader, TopicPartition(control_topic(name), lane), timeout)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return None
            if error.args[0].code() not in _COORDINATOR_MOVES or time.monotonic() > deadline:
                raise classify("read the lane's progress", _heard(reader) or error.args[0]) from error
            time.sleep(0.1)
        else:
            return parse_progress(found.offset, found.metadata or "") if found.offset >= 0 else None


def _heard(reader: Consumer) -> KafkaError | None:
    """An error that the client did not answer with: of a group that we may not use it says that the time is up."""
    message = reader.poll(0)
    return None if message is None else message.error()


def _committed(reader: Consumer, asked: TopicPartition, timeout: float) -> TopicPartition:
    [found] = reader.committed([asked], timeout)
    if found.error is not None:
        raise KafkaException(found.error)
    return found


def check_settings(config: RelayConfig) -> None:
    """See whether librdkafka takes the settings. Needs no connection.

    Raises:
        ConfigError: with librdkafka's words.
    """
    try:
        Producer({**config.producer(), "transactional.id": "check"}, logger=Watch())
        Consumer({**config.client(), "group.id": "check"}, logger=Watch()).close()
    except KafkaException as error:
        raise ConfigError(f"a Kafka setting cannot be used: {error.args[0].str()}") from error


class _Deliveries:
    """Learns what becomes of each record of a batch."""

    def __init__(self, producer: Producer, packing: int) -> None:
        self._producer = producer
        self._packing = packing
        self._produced = 0
        self._alone: set[int] = set()
        """Places of records that travel alone."""
        self._failed: dict[int, KafkaError] = {}
        self._over: KafkaError | None = None

    def produce(self, topic: str, value: Any, key: Any, partition: int, _: None, __: None, *rest: Any) -> None:
        """`Producer.produce`, which goes on when this very record is refused, and when an earlier one was meanwhile:
        its report will say why."""
        place, self._produced = self._produced, self._produced + 1
        if len(value or b"") >= self._packing or self._packing == 1:
            self._alone.add(place)
        try:
            self._producer.produce(topic, value, key, partition, partial(self._note, place), None, *rest)
        except KafkaException as error:
            if error.args[0].code() == KafkaError._STATE:
                self._over = error.args[0]
                return
            if error.args[0].code() not in REFUSED:
                raise
            self._failed[place] = error.args[0]
            self._alone.add(place)

    def _note(self, place: int, error: KafkaError | None, _message: Any) -> None:
        if error is not None:
            self._failed[place] = error

    def check(self) -> None:
        """Raises what the failed ones mean, if there are any; serves after a flush. Where one is refused, others fail
        for its sake."""
        refused = {place: error for place, error in sorted(self._failed.items()) if error.code() in REFUSED_IN_REPORT}
        if refused:
            events = {
                place: Refusal(_words(error), error.name())
                for place, error in refused.items()
                if place in self._alone or error.code() in REFUSED_AS_TOPIC
            }
            raise EventRefused(f"cannot deliver events of a batch: {_words(next(iter(refused.values())))}", events)
        if failed := self._over or next(iter(self._failed.values()), None):
            raise classify("deliver a batch", failed)


def _words(error: KafkaError) -> str:
    return f"{error.str()} ({error.name()})"


@contextmanager
def typed(what: str, refusal: type[LaneTrouble] = KafkaTrouble, watch: Watch | None = None) -> Iterator[None]:
    """Turn librdkafka's errors into ours, once, here. `refusal`, `watch`: as in `classify`."""
    try:
        yield
    except KafkaException as error:
        raise classify(what, error.args[0], refusal, watch) from error
    except SystemError as error:
        # The client calls its logger while the error that it is about to raise is already set: seen with a fatal one.
        if not isinstance(error.__cause__, KafkaException):
            raise
        raise classify(what, error.__cause__.args[0]) from error
    except BufferError as error:
        raise KafkaTrouble(f"cannot {what}: the client's queue is full") from error


_NO_CONNECTION = frozenset({KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN})
"""What the client says when it has none to send a request on, whatever the reason."""


def classify(
    what: str, error: KafkaError, refusal: type[LaneTrouble] = KafkaTrouble, watch: Watch | None = None
) -> LaneTrouble:
    """What a Kafka error means for the hold on the lane. None of the answers says whether a commit took place.

    `refusal`: what it means here that something is refused for good. Only where records are handed over that is an
    event's fault; after them the control topic or the group may be meant as well; before them nothing else can be.
    `watch`: the client's logger, which has heard why there is no connection.
    """
    text = f"cannot {what}: {_words(error)}"
    if watch is not None and watch.failure is not None and error.code() in _NO_CONNECTION:
        return (NotLetIn if watch.refused else KafkaTrouble)(f"{text}. {watch.failure}")
    if error.code() in FENCED:
        return LaneLost(text)
    if error.code() in REFUSED:
        return refusal(text)
    if error.code() == KafkaError._INCONSISTENT:  # "failed delivery (see individual delivery reports)"
        return Undelivered(text)
    return KafkaTrouble(text)


def control_topic(name: str) -> str:
    """The topic whose partitions stand for lanes in the offsets of group `name`. Nothing is ever written to it."""
    return f"{name}.lanes"
