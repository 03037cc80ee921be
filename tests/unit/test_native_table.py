"""Promise: every failure of the C core has an exception; the tables of both sides match."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from qemu_postcopy._native import EXCEPTIONS, check, ffi, lib, new_error, raise_error
from qemu_postcopy.errors import HostError, PostcopyError
from qemu_postcopy.paging.pager import PagerState, Statistics


def test_every_code_but_ok_has_an_exception() -> None:
    codes = ffi.typeof("enum qpc_code").relements
    assert set(EXCEPTIONS) == {value for name, value in codes.items() if name != "QPC_OK"}


@pytest.mark.parametrize("code", sorted(EXCEPTIONS))
def test_a_failure_keeps_its_message_hint_and_cause(code: int) -> None:
    error = new_error()
    error.code = code
    error.errnum = errno.EBUSY
    error.message = b"it failed"
    with pytest.raises(PostcopyError) as caught:
        raise_error(error, hint="do this")
    assert type(caught.value) is EXCEPTIONS[code]
    assert "it failed" in caught.value.message
    assert caught.value.hint == "do this"
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EBUSY


def test_a_failure_without_errno_has_no_cause() -> None:
    error = new_error()
    error.code = lib.QPC_SYSTEM
    error.message = b"it failed"
    with pytest.raises(HostError) as caught:
        check(-1, error)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("result", [0, 1, 7])
def test_a_result_that_is_not_negative_is_passed_on(result: int) -> None:
    assert check(result, new_error()) == result


def test_every_counter_of_the_pager_is_in_the_statistics() -> None:
    fields = {name for name, _ in ffi.typeof("struct qpc_pager_statistics").fields}
    assert fields == {field.name for field in dataclasses.fields(Statistics)}


def test_every_state_of_the_pager_has_its_name() -> None:
    states = ffi.typeof("enum qpc_pager_state").relements
    assert {f"QPC_PAGER_{state.name}": state.value for state in PagerState} == states
