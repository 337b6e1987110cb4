"""Every mutation of tests/teeth can still be made, and asks for tests that are there; what counts as killed."""

import pytest

from tests.teeth.copy import ROOT, MutationError, failure_of, mutated
from tests.teeth.mutations import MUTATIONS, Edit, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_can_be_made_and_its_tests_are_there(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert mutated(source, mutation) != source
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_names_are_unique_and_the_proof_has_a_row_for_each() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    proof = (ROOT / "docs" / "proof.md").read_text()
    rows = [line.split("`")[1] for line in proof.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row in names] == names


def broken(*edits: Edit) -> Mutation:
    return Mutation("broken", "all", "some.py", edits, ("tests/test_some.py",))


@pytest.mark.parametrize("edit", [Edit("c", "d"), Edit("a", "b"), Edit("b = 1", "b = ")])
def test_a_mutation_whose_words_are_gone_or_stand_twice_or_that_makes_no_python_is_refused(edit: Edit) -> None:
    with pytest.raises(MutationError, match="broken: "):
        mutated("a = 1\na = 2\nb = 1\n", broken(edit))


def test_edits_are_made_one_after_the_other() -> None:
    assert mutated("a = 1\n", broken(Edit("a", "b"), Edit("b = 1", "b = 2"))) == "b = 2\n"


def report(*cases: str) -> str:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


PASSED = '<testcase classname="tests.test_some" name="test_one"/>'
FAILED = '<testcase classname="tests.test_some" name="test_two[a]"><failure message="no"/></testcase>'
ERROR = '<testcase classname="tests.test_some" name="test_three"><error message="setup"/></testcase>'


@pytest.mark.parametrize(
    ("status", "xml", "failure"),
    [
        pytest.param(1, report(PASSED, FAILED), "tests/test_some.py::test_two[a]", id="a test failed"),
        pytest.param(1, report(FAILED, ERROR), "tests/test_some.py::test_two[a]", id="and its end went wrong too"),
        pytest.param(0, report(PASSED), None, id="all passed"),
        pytest.param(1, report(ERROR), None, id="a fixture could not be made"),
        pytest.param(2, report(ERROR), None, id="a file could not be imported"),
        pytest.param(4, None, None, id="no such test"),
        pytest.param(None, report(FAILED), None, id="it did not end by itself"),
    ],
)
def test_a_mutation_is_killed_by_a_test_that_failed_and_by_nothing_else(
    status: int | None, xml: str | None, failure: str | None
) -> None:
    assert failure_of(status, xml) == failure
