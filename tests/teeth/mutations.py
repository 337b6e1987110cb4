"""What is broken, one at a time: words of the shipped source, and what takes their place.

The words are as few as will stand in the file just once. tests/test_teeth.py sees that each mutation can still be
made; where it cannot, the code has changed, and the mutation is to be changed with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

HAZARDS = "tests/test_hazards.py"
"""Its broker has more listeners than the one that all other tests share, so it starts one itself."""


class Edit(NamedTuple):
    """Words that stand in the file just once, and what takes their place."""

    old: str
    new: str


def behind(words: str, more: str) -> Edit:
    return Edit(words, words + more)


def before(words: str, more: str) -> Edit:
    return Edit(words, more + words)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to break the code."""

    name: str
    breaks: str
    """What is wrong then, in a line."""
    file: str
    edits: tuple[Edit, ...]
    """Made one after the other."""
    tests: tuple[str, ...]
    """What pytest is asked for: the tests that must notice."""


MUTATIONS = (
    # ---- the lane protocol: take -------------------------------------------------------------------------------------
    Mutation(
        "lease-by-own-clock",
        "a lease ends by the relay's clock, not by the database's",
        "relay/queries.py",
        (
            Edit("import asyncpg\n", "import time\n\nimport asyncpg\n"),
            Edit(
                "clock_timestamp() + make_interval(secs => $3)\n             WHERE lane = $1 AND halted IS NULL AND (",
                "to_timestamp({time.time()} + $3)\n             WHERE lane = $1 AND halted IS NULL AND (",
            ),
        ),
        ("tests/test_queries.py::test_the_relay_s_clock_plays_no_part",),
    ),
    Mutation(
        "look-after-fencing",
        "a relay with another outbox's name fences that one's relay before it notices",
        "relay/worker.py",
        (Edit("if not self._known:", "if False:"),),
        ("tests/test_resolve.py::test_of_two_outboxes_of_one_name_the_second_halts_and_fences_nobody",),
    ),
    Mutation(
        "progress-before-fence",
        "progress is read before the former owner is fenced",
        "relay/worker.py",
        (
            Edit("await shared.thread(kafka.progress)", "early"),
            Edit("await _both(shared", "early = await shared.thread(kafka.progress)\n        await _both(shared"),
        ),
        (f"{HAZARDS}::test_a_batch_that_the_former_owner_commits_while_its_lane_is_taken_is_finished",),
    ),
    Mutation(
        "one-id-unfenced",
        "the second producer is opened when it is needed: until then the former owner's can commit",
        "relay/transaction.py",
        (
            behind(
                "    def fence(self, number: int) -> None:\n",
                "        if number == 0:\n            self._open(0)\n\n    def _open(self, number: int) -> None:\n",
            ),
            Edit(
                "self._producers[number].poll(0)",
                "number in self._producers and self._producers[number].poll(0)",
            ),
            before(
                'producer = self._producers[batch % PRODUCERS]\n        with typed("begin',
                "if batch % PRODUCERS not in self._producers:\n            self._open(batch % PRODUCERS)\n        ",
            ),
        ),
        ("tests/test_transaction.py::test_a_zombie_is_fenced_at_whatever_it_does_next",),
    ),
    Mutation(
        "foreign-progress",
        "the progress of another outbox is taken for one's own",
        "relay/lane.py",
        (Edit("if progress is None or progress.outbox == outbox:", "if True:"),),
        ("tests/test_lane.py::test_what_cannot_be_settled",),
    ),
    Mutation(
        "in-doubt-is-uncommitted",
        "a batch of which only Kafka knows is taken for not committed, and published again",
        "relay/lane.py",
        (Edit("return Finish(progress.batch, progress.runs, progress.digest)", "return Resume(batch)"),),
        ("tests/test_lane.py::test_what_the_two_readings_mean",),
    ),
    Mutation(
        "finish-without-digest",
        "the rows with the last batch's seqs are deleted, whatever their events are",
        "relay/worker.py",
        (Edit("!= verdict.digest", "is None"),),
        (
            "tests/test_relay.py::test_a_database_restored_to_before_the_last_batch_was_written_halts_when_its_seqs_are_given_again",
        ),
    ),
    Mutation(
        "begin-with-the-old-number",
        "a lane that was left clean goes on with progress that Kafka may be about to forget",
        "relay/lane.py",
        (Edit("return Begin(batch + 1) if released else Resume(batch)", "return Resume(batch)"),),
        ("tests/test_lane.py::test_what_the_two_readings_mean",),
    ),
    Mutation(
        "step-4-without-owner",
        "whoever lost the lease meanwhile may still settle the lane",
        "relay/queries.py",
        (Edit("($7::uuid IS NULL OR owner = $7)", "($7::uuid IS NULL OR true)"),),
        ("tests/test_queries.py::test_where_an_owner_is_named_the_lane_must_be_its",),
    ),
    # ---- the lane protocol: cycle ------------------------------------------------------------------------------------
    Mutation(
        "rows-under-way-seen",
        "a fetch returns rows that are being published",
        "relay/lane.py",
        (Edit("return union([batch.runs for batch in self.window])", "return ()"),),
        ("tests/test_lane.py::test_a_batch_goes_its_way",),
    ),
    Mutation(
        "restored-behind-a-pooler",
        "a fetch reads a lane that is not where the relay left it",
        "relay/queries.py",
        (Edit("- $6 BETWEEN 0 AND 1", "- $6 IS NOT NULL"),),
        ("tests/test_queries.py::test_a_lane_that_is_elsewhere_gives_no_rows",),
    ),
    Mutation(
        "batch-not-cut",
        "a batch names more seqs than fit into an offset's metadata",
        "relay/lane.py",
        (Edit("if len(text) <= limit or count == 1:", "if True:"),),
        ("tests/test_lane.py::test_a_cut_batch_fits_and_is_not_much_smaller_than_it_could_be",),
    ),
    Mutation(
        "produced-before-the-last-flush",
        "a batch may stand before the one before it in a partition",
        "relay/lane.py",
        (Edit("before.stage is not Stage.FETCHED\n            and", "True\n            and"),),
        ("tests/test_lane.py::test_an_illegal_step_is_refused",),
    ),
    Mutation(
        "id-still-busy",
        "a batch is produced by an id whose last transaction is open",
        "relay/lane.py",
        (Edit("(before.number > number - PRODUCERS or before.stage is Stage.COMMITTED)", "True"),),
        ("tests/test_lane.py::test_an_illegal_step_is_refused",),
    ),
    Mutation(
        "one-id-for-all",
        "all batches are published by one id: each waits for the markers of the last one",
        "relay/transaction.py",
        (
            Edit(
                'producer = self._producers[batch % PRODUCERS]\n        with typed("begin',
                'producer = self._producers[0]\n        with typed("begin',
            ),
            Edit("producer, watch = self._producers[batch % PRODUCERS]", "producer, watch = self._producers[0]"),
            Edit("self._producers[(batch if number is None else number) % PRODUCERS]", "self._producers[0]"),
            Edit(
                'producer = self._producers[batch % PRODUCERS]\n        with typed("commit',
                'producer = self._producers[0]\n        with typed("commit',
            ),
        ),
        (f"{HAZARDS}::test_events_come_before_their_progress_and_the_two_ids_take_turns",),
    ),
    Mutation(
        "progress-before-events",
        "progress is sent before the events: a torn batch would be taken for a whole one",
        "relay/worker.py",
        (
            Edit("self._kafka.offsets(number, metadata)", "pass"),
            behind(
                "produce = self._kafka.begin(fetched.number)\n",
                "        self._kafka.offsets(fetched.number, fetched.metadata)\n",
            ),
        ),
        (f"{HAZARDS}::test_events_come_before_their_progress_and_the_two_ids_take_turns",),
    ),
    Mutation(
        "not-flushed",
        "progress is sent while events are still on their way",
        "relay/worker.py",
        (Edit("await self._shared.thread(self._kafka.flush, number)", "await asyncio.sleep(0)"),),
        (f"{HAZARDS}::test_events_come_before_their_progress_and_the_two_ids_take_turns",),
    ),
    Mutation(
        "commit-before-the-last-delete",
        "a batch is committed before the delete of the one before it is acknowledged",
        "relay/lane.py",
        (
            Edit(
                "return self._is(number, Stage.FLUSHED) and number == self.batch + 1",
                "return self._is(number, Stage.FLUSHED)",
            ),
        ),
        ("tests/test_lane.py::test_an_illegal_step_is_refused",),
    ),
    Mutation(
        "failed-commit-is-committed",
        "an exception of the commit is ignored, and the rows are deleted",
        "relay/transaction.py",
        (Edit('with typed("commit a batch", Undelivered):', "with suppress(KafkaException, SystemError):"),),
        ("tests/test_transaction.py::test_a_fenced_zombie_commits_nothing_and_learns_that_the_lane_is_lost",),
    ),
    Mutation(
        "delete-before-commit",
        "the rows are deleted before Kafka has answered the commit",
        "relay/worker.py",
        (
            Edit("        suspicious = await commit\n        queries", "        queries"),
            Edit(
                "        self._lane = self._lane.deleted(number)",
                "        suspicious = await commit\n        self._lane = self._lane.deleted(number)",
            ),
        ),
        (f"{HAZARDS}::test_what_a_dead_relay_sent_arrives_after_its_successor_came[END_TXN]",),
    ),
    Mutation(
        "no-compare-and-set",
        "a relay that was thought dead deletes, and sets the batch back",
        "relay/queries.py",
        (
            Edit(
                "SET batch = $3, released = false\n                 WHERE lane = $1 AND batch = $2",
                "SET batch = $3, released = false\n                 WHERE lane = $1 AND $2::bigint IS NOT NULL",
            ),
        ),
        ("tests/test_queries.py::test_a_lane_that_moved_on_is_left_alone",),
    ),
    Mutation(
        "rows-without-the-number",
        "rows are deleted although the lane's number was not the expected one",
        "relay/queries.py",
        (Edit("ARRAY(SELECT o.ctid FROM own, ", "ARRAY(SELECT o.ctid FROM "),),
        ("tests/test_queries.py::test_a_lane_that_moved_on_is_left_alone",),
    ),
    Mutation(
        "one-row-too-many",
        "the row behind a run is deleted with it, unpublished",
        "relay/queries.py",
        (Edit("seq < upper(run)", "seq <= upper(run)"),),
        ("tests/test_queries.py::test_the_lane_moves_and_its_rows_go_together",),
    ),
    Mutation(
        "released-while-at-work",
        "a lane at work still says that it was left clean",
        "relay/queries.py",
        (Edit("SET batch = $3, released = false", "SET batch = $3"),),
        ("tests/test_queries.py::test_an_empty_batch_moves_the_lane_only",),
    ),
    Mutation(
        "left-in-doubt-is-left-clean",
        "a lane given up with a batch under way is called clean",
        "relay/worker.py",
        (
            Edit(
                "queries.release(self.lane, self._shared.relay, clean)",
                "queries.release(self.lane, self._shared.relay, True)",
            ),
        ),
        ("tests/test_relay.py::test_a_drain_that_takes_too_long_is_abandoned_and_nothing_is_doubled",),
    ),
    # ---- late requests, and what Kafka forgets -----------------------------------------------------------------------
    Mutation(
        "no-recycling",
        "a commit whose request was repeated is not followed by new producers (KAFKA-17754)",
        "relay/transaction.py",
        (
            Edit("return self._watches[batch % PRODUCERS].suspicious", "return None"),
            Edit("return self._watches[number].suspicious", "return None"),
        ),
        (f"{HAZARDS}::test_a_late_request_does_no_harm[END_TXN]",),
    ),
    Mutation(
        "timeouts-unnoticed",
        "a request that timed out is no reason for new producers",
        "relay/transaction.py",
        (Edit('startswith(("FAIL", "REQTMOUT"))', 'startswith("FAIL")'),),
        ("tests/test_transaction.py::test_a_connection_that_is_lost_with_requests_under_way_is_suspicious",),
    ),
    Mutation(
        "ordinary-log-only",
        "the client's debug log is off: it does not say each loss of a connection",
        "relay/config.py",
        (Edit('"debug": f"{own[\'debug\']},broker" if own.get("debug") else "broker",', ""),),
        (f"{HAZARDS}::test_losses_while_the_id_is_fenced_do_not_hide_the_one_that_matters",),
    ),
    Mutation(
        "not-kept-alive",
        "a lane at rest lets Kafka forget its progress",
        "relay/worker.py",
        (Edit("> self._shared.config.keepalive", '> float("inf")'),),
        (f"{HAZARDS}::test_a_lane_at_rest_writes_the_same_progress_again_with_both_ids",),
    ),
    Mutation(
        "kept-alive-by-one-id",
        "Kafka forgets the other transactional id of a lane at rest",
        "relay/transaction.py",
        (Edit("for number in range(PRODUCERS):", "for number in range(1):"),),
        (f"{HAZARDS}::test_a_lane_at_rest_writes_the_same_progress_again_with_both_ids",),
    ),
    Mutation(
        "kept-alive-without-seqs",
        "the progress that is written again does not name the last batch's rows",
        "relay/worker.py",
        (
            Edit(
                "self._kafka, self._lane.batch, self._metadata)",
                "self._kafka, self._lane.batch, Progress(self._shared.meta.uuid, self._lane.batch, ()).metadata())",
            ),
        ),
        (f"{HAZARDS}::test_a_lane_at_rest_writes_the_same_progress_again_with_both_ids",),
    ),
    # ---- the safe floor ----------------------------------------------------------------------------------------------
    Mutation(
        "naive-floor",
        "a fetch looks above the highest seq seen: rows that commit late are lost",
        "relay/floor.py",
        (Edit("self.top = max(self.top, last)", "self.value = self.top = max(self.top, last)"),),
        ("tests/test_floor.py::test_no_row_is_passed_and_the_key_s_order_holds",),
    ),
    Mutation(
        "no-extra-fetch",
        "the floor rises when the holders are gone, without one more fetch",
        "relay/floor.py",
        (
            behind(
                "            self._blockers |= {name for name in now if name.startswith(PREPARED)}\n",
                "        if not self._blockers:\n            self.value, self._blockers = self._candidate, None\n",
            ),
        ),
        ("tests/test_floor.py::test_no_row_is_passed_and_the_key_s_order_holds",),
    ),
    Mutation(
        "prepared-under-a-new-name",
        "a holder that became a prepared transaction counts as gone",
        "relay/floor.py",
        (Edit("if any(not name.startswith(PREPARED) for name in gone):", "if False:"),),
        ("tests/test_floor.py::test_no_row_is_passed_and_the_key_s_order_holds",),
    ),
    Mutation(
        "prepared-not-among-holders",
        "prepared transactions do not hold the floor back",
        "relay/queries.py",
        (Edit("mode = 'RowExclusiveLock' AND granted", "mode = 'RowExclusiveLock' AND granted AND pid IS NOT NULL"),),
        ("tests/test_queries.py::test_a_prepared_transaction_is_a_holder_without_a_connection",),
    ),
    Mutation(
        "cut-off-fetch-is-complete",
        "a fetch that was cut off below the floor's candidate lets it rise",
        "relay/floor.py",
        (Edit("(complete or last >= self._candidate)", "True"),),
        ("tests/test_floor.py::test_no_row_is_passed_and_the_key_s_order_holds",),
    ),
    Mutation(
        "untaken-rows-counted",
        "the floor counts rows that were fetched and did not fit into the batch",
        "relay/worker.py",
        (Edit("last = fetched.last", "last = rows[-1][0]"),),
        ("tests/test_relay.py::test_a_batch_is_cut_where_its_progress_would_not_fit",),
    ),
    # ---- order, poison, settings -------------------------------------------------------------------------------------
    Mutation(
        "lane-by-id",
        "the events of one key are spread over the lanes",
        "migrations/versions/0001_first_tables.py",
        (Edit("coalesce(key, id::text)", "id::text"),),
        ("tests/test_tables.py::test_a_plain_insert_gets_its_lane_from_its_key_and_without_a_key_from_its_id",),
    ),
    Mutation(
        "another-partitioner",
        "a key lands elsewhere than where Java's producers put it",
        "relay/config.py",
        (Edit('"murmur2_random"', '"consistent_random"'),),
        ("tests/test_relay.py::test_keys_land_where_those_of_java_producers_land",),
    ),
    Mutation(
        "later-events-overtake",
        "later events of a parked event's key are published",
        "relay/quarantine.py",
        (Edit("self._held.add((topic, key))", "pass"),),
        ("tests/test_quarantine.py::test_later_events_of_the_key_follow_and_other_keys_and_topics_go_on",),
    ),
    Mutation(
        "held-keys-forgotten",
        "the next relay publishes later events of a parked event's key",
        "relay/worker.py",
        (Edit("self._quarantine.hold(await shared.queries.held(self.lane))", "pass"),),
        ("tests/test_relay.py::test_the_held_keys_are_held_by_the_next_relay_too",),
    ),
    Mutation(
        "trouble-parks",
        "trouble of Kafka's own is taken for an event's fault",
        "relay/transaction.py",
        (Edit("    return KafkaTrouble(text)", "    return refusal(text)"),),
        ("tests/test_transaction.py::test_trouble_of_the_broker_parks_nothing",),
    ),
    Mutation(
        "transactional-id-set",
        "an operator may set the transactional.id by which lanes are fenced",
        "relay/config.py",
        (Edit('    "transactional.id": "the lane\'s two producers are fenced by it",\n', ""),),
        ("tests/test_config.py::test_the_settings_that_the_guarantee_rests_on_are_these",),
    ),
    Mutation(
        "guarantee-unguarded",
        "settings that void the guarantee are accepted",
        "relay/config.py",
        (Edit("            if name in self.kafka:\n", "            if False:\n"),),
        ("tests/test_config.py::test_what_the_guarantee_rests_on_is_refused_by_name_from_the_environment",),
    ),
    # ---- relay resolve -----------------------------------------------------------------------------------------------
    Mutation(
        "resolve-deletes-all",
        "resolve deletes rows that Kafka does not have",
        "relay/resolve.py",
        (
            Edit(
                "for row, _ in plan.published]\n",
                "for row, _ in plan.published] + [(row.seq, row.id) for row in plan.unpublished]\n",
            ),
        ),
        ("tests/test_resolve.py::test_a_database_that_is_ahead_of_kafka",),
    ),
    Mutation(
        "resolve-one-above",
        "the number after a resolve is one that an older copy takes for its own next one",
        "relay/resolve.py",
        (Edit("if self.kafka else 0) + 2", "if self.kafka else 0) + 1"),),
        ("tests/test_resolve.py::test_both_stand_two_above_both_afterwards",),
    ),
    # ---- writing and consuming ---------------------------------------------------------------------------------------
    Mutation(
        "savepoints-ignored",
        "events of a savepoint that was rolled back are written",
        "outbox/writer.py",
        (Edit("if transaction not in entry.savepoints]", "if True]"),),
        ("tests/test_writer.py::test_case",),
    ),
    Mutation(
        "open-savepoint-passes",
        "a commit over an open savepoint is let pass, and its events are lost",
        "outbox/writer.py",
        (
            Edit(
                '    if ledger.entries:\n        raise TransactionError(\n            "the transaction',
                '    if False:\n        raise TransactionError(\n            "the transaction',
            ),
            Edit("    if ledger.entries:  # no way here", "    if False:  # no way here"),
        ),
        ("tests/test_writer.py::test_case",),
    ),
    Mutation(
        "written-before-the-flush",
        "events get their seq before the aggregate's UPDATE has locked it",
        "outbox/writer.py",
        (
            Edit(
                "        session.flush()  # its hooks may add events\n        if not ledger.entries:",
                "        if not ledger.entries:",
            ),
        ),
        ("tests/test_writer.py::test_the_events_of_a_transaction_are_one_insert_after_its_flush",),
    ),
    Mutation(
        "autocommit-accepted",
        "add() takes a connection that commits each statement by itself",
        "outbox/transaction.py",
        (Edit('if level == "AUTOCOMMIT":', "if False:"),),
        ("tests/test_writer.py::test_autocommit_is_refused_at_add",),
    ),
    Mutation(
        "claim-of-its-own",
        "the inbox claims in a transaction of its own: what fails afterwards is never done",
        "outbox/inbox.py",
        (
            Edit(
                "return set(connection.exec_driver_sql(",
                "with connection.engine.begin() as own:\n                return set(own.exec_driver_sql(",
            ),
        ),
        ("tests/test_inbox.py::test_a_rolled_back_claim_is_no_claim",),
    ),
    Mutation(
        "repeats-in-a-batch",
        "an event that stands twice in one batch is handled twice",
        "outbox/inbox.py",
        (
            Edit(
                "return _first_seen(by_id, self.claim_ids(session, by_id))",
                "known = self.claim_ids(session, by_id)\n"
                "        return [message for message in messages if (id or id_of)(message) not in known]",
            ),
        ),
        ("tests/test_inbox.py::test_of_repeats_in_a_batch_the_first_is_kept",),
    ),
    Mutation(
        "ids-unsorted",
        "consumers that claim the same events in another order wait for each other in a circle",
        "outbox/inbox.py",
        (Edit("FROM given ORDER BY id", "FROM given"),),
        ("tests/test_inbox.py::test_overlapping_batches_in_any_order_claim_each_event_once_and_do_not_deadlock",),
    ),
    Mutation(
        "claimed-before-handled",
        "a consumer's claim is committed before its handler has run: what fails is never tried again",
        "outbox/consumer/work.py",
        (behind("self._inbox.claim_ids(session, by_id)}  # 2\n", "        session.commit()\n"),),
        (
            "tests/consumer/test_failures.py::test_a_handler_that_fails_is_tried_again_and_nothing_of_the_failed_attempt_stays",
        ),
    ),
    Mutation(
        "dead-key-not-held",
        "a consumer handles later messages of a dead one's key",
        "outbox/consumer/work.py",
        (Edit("elif failures.hold and key in held:", "elif False:"),),
        ("tests/consumer/test_failures.py::test_in_a_batch_messages_behind_a_dead_one_of_their_key_are_held",),
    ),
)
