"""Numbers in messages."""

from gpt.wording import counted


def test_a_number_agrees_with_its_noun():
    found = [counted(1, "file"), counted(0, "file"), counted(2000, "file"), counted(3, "branch")]
    assert found == ["1 file", "0 files", "2,000 files", "3 branches"]
