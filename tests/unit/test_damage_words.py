"""What is said of pages that another process has touched."""

from __future__ import annotations

from qemu_postcopy.plugged import damage_words


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert damage_words({}, ["m0"]) == ""
    assert damage_words({"pages_foreign": 0}, ["m0"]) == ""


def test_how_many_and_the_first_are_named() -> None:
    told = {"pages_foreign": 3, "foreign_block": 1, "foreign_page": 77}
    words = damage_words(told, ["m0", "m1"])
    assert "3 pages" in words
    assert "page 77 of block m1" in words
    assert "number 1" in damage_words(told, ["m0"])
