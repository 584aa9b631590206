"""Captions as samples have them: which field, and what is no caption."""

import json

import pytest

from dit_video.data.reader import caption_members, captions_of
from dit_video.data.shards import ClipRecord, Member

FIELDS = ("txt", "json.short")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"a cat", "json": b'{"short": "cat"}'}, {"txt": "a cat", "json.short": "cat"}),
        ({"txt": b"\xef\xbb\xbf a cat \n"}, {"txt": "a cat"}),
        (
            {"txt": b"", "json": b'{"short": "cat"}'},
            {"json.short": "cat"},
        ),  # of several fields one that cannot be used costs nothing
        ({"txt": b"a cat", "json": b"{"}, {"txt": "a cat"}),
        ({"txt": b"a cat", "json": b'{"short": 3}'}, {"txt": "a cat"}),
        ({"txt": b"a cat", "json": b'[{"short": "cat"}]'}, {"txt": "a cat"}),
        ({"txt": b"a cat", "json": rb'{"short": "\ud800"}'}, {"txt": "a cat"}),
        ({"txt": b"\xff\xfe", "json": b'{"short": "cat"}'}, {"json.short": "cat"}),
    ],
)
def test_what_can_be_used_is(members: dict[str, bytes], expected: dict[str, str]) -> None:
    assert captions_of(members, FIELDS, 100) == expected


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b""}, "empty"),
        ({"txt": b"x" * 101}, "longer than max_caption_chars=100"),
        ({"txt": b"a\0b"}, "NUL"),
        ({"txt": b"\xff"}, "not UTF-8"),
        ({"json": json.dumps({"long": "cat"}).encode()}, "no caption: no .txt or .json.short"),
        ({"json": b"{", "txt": b""}, "empty; its json cannot be read"),
        ({"json": b"[" * 100_000}, "its json cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        captions_of(members, FIELDS, 100)


def test_large_members_are_refused_before_they_are_read() -> None:
    def record(**sizes: int) -> ClipRecord:
        return ClipRecord("0.tar", "a", {name: Member(0, size) for name, size in sizes.items()})  # type: ignore[arg-type]

    assert caption_members(record(txt=10, json=10, mp4=10), FIELDS, 100) == ["json", "txt"]
    for sizes in ({"txt": 2**20}, {"json": 2**21}, {"mp4": 10}):
        with pytest.raises(ValueError, match="longer|larger|no caption"):
            caption_members(record(**sizes), FIELDS, 100)
