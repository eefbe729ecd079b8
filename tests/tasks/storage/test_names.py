"""File names from sample keys: no way out of the folder, no two keys in one file."""

from pathlib import PurePosixPath

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tasks.storage.names import file_name


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("dir/a.png", "dir/a.png"),
        ("a.PNG", "a.PNG"),
        ("a.jpg", "a.jpg.png"),
        ("a.jpg#0", "a.jpg#0.png"),
        ("t.tar:x/y", "t.tar:x/y.png"),
        ("../../etc/passwd", "%2E%2E/%2E%2E/etc/passwd.png"),
        ("/root/a", "%/root/a.png"),
        ("a//b/./c", "a/%/b/%2E/c.png"),
        ("..\\a", "..%5Ca.png"),
        ("50%", "50%25.png"),
        ("a\nb", "a%0Ab.png"),
        ("..", "...png"),
    ],
)
def test_names(key: str, expected: str) -> None:
    assert file_name(key, "png") == expected


@given(st.text(max_size=600))
def test_no_key_leads_out(key: str) -> None:
    name = file_name(key, "png")
    path = PurePosixPath(name)
    assert not path.is_absolute()
    assert not {"..", ".", ""} & set(name.split("/"))
    assert all(len(part.encode()) <= 255 for part in path.parts)
    assert name.lower().endswith(".png")


def test_long_names_stay_different() -> None:
    names = {file_name("x" * 300 + end, "png") for end in ("a", "b")}
    assert len(names) == 2
