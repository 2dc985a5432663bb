from __future__ import annotations

from pathlib import Path

from smore_cli.evaluation.journal import Journal


def test_answers_come_back_to_the_same_question_of_the_same_subject_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.partial").answers_of("a model")
    key = journal.key([[1, 2], [3]])
    journal.keep(key, [[-1.25, True]])
    again = Journal(tmp_path / "x.partial")
    assert again.answers_of("a model").recall(again.key([[1, 2], [3]])) == [[-1.25, True]]
    assert again.recall(again.key([[1, 2], [4]])) is None
    assert again.answers_of("another").recall(again.key([[1, 2], [3]])) is None


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    journal = Journal(path)
    for number in range(3):
        journal.keep(journal.key(number), number)
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path)
    assert [again.recall(again.key(number)) for number in range(3)] == [0, 1, None]
    again.keep(again.key(2), 2)
    assert len(Journal(path)) == 3


def test_a_finished_evaluation_leaves_no_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.partial")
    journal.keep(journal.key(1), 1)
    journal.close()
    assert list(tmp_path.iterdir()) == []
