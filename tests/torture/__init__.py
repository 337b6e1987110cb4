"""Every fault we can make, by a schedule that a seed decides, and a checker that knows nothing of our code.

python -m tests.torture --minutes 2 --seed 1            # or: make torture MINUTES=2 SEED=1

schedule.py   which faults, in which order, at whose expense: values out of a seed
faults.py     how each is made on running servers and processes
proxy.py      between the relays and their servers: cuts, delays, holds
writers.py    a process that writes events in every way, and a ledger row with each, in the same transaction
consumer.py   a process that takes effect of events, by the inbox
relay.py      a relay whose clock is not this machine's
stage.py      the servers, the processes, and what is seen of them from outside
watch.py      when events become visible, and for how long none did
checker.py    what is in Kafka and in the consumer's tables, against the ledger
trace.py      what happened when, one JSON line each
"""
