"""How long the relay waits when there is nothing to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.pace import Pace

silences = st.floats(min_value=0, max_value=1e9)


def test_the_wait_grows_with_the_silence() -> None:
    pace = Pace()
    assert pace.wait(0) == 0.0015
    assert pace.wait(0.1) == pytest.approx(0.005)
    assert pace.wait(1) == 0.05
    assert pace.wait(2) == 0.1
    assert pace.wait(3600) == 0.125


@given(silences, silences)
def test_a_longer_silence_never_shortens_the_wait(one: float, other: float) -> None:
    pace = Pace()
    assert pace.shortest <= pace.wait(min(one, other)) <= pace.wait(max(one, other)) <= pace.longest
