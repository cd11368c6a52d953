"""The checksum of blocks sees what a crash does to a file."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.merge.checksum import checksum

SIZES = st.sampled_from([0, 1, 7, 511, 512, 513, 1024, 5000])


def content(size: int) -> bytearray:
    return bytearray(random.Random(0).randbytes(size))


@given(SIZES, st.data())
def test_any_change_of_one_byte_is_seen(size, data):
    before = content(size)
    if not size:
        return
    after = bytearray(before)
    place = data.draw(st.integers(0, size - 1))
    after[place] ^= data.draw(st.integers(1, 255))
    assert checksum(memoryview(after)) != checksum(memoryview(before))


@pytest.mark.parametrize("page", range(3))
def test_a_lost_page_is_seen(page):
    before = content(3 * 4096)
    after = bytearray(before)
    after[page * 4096 : (page + 1) * 4096] = bytes(4096)
    assert checksum(memoryview(after)) != checksum(memoryview(before))


def test_pages_that_changed_places_are_seen():
    before = content(2 * 4096)
    after = before[4096:] + before[:4096]
    assert checksum(memoryview(after)) != checksum(memoryview(before))


def test_the_same_bytes_have_the_same_sum_wherever_they_lie():
    whole = content(2048 + 3)
    assert checksum(memoryview(whole)[3:]) == checksum(memoryview(bytearray(whole[3:])))
