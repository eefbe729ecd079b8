"""Keys of faces and of the photographs that they are in."""

from tasks.input.face import face_key, photo_keys


def test_keys() -> None:
    assert face_key("a.jpg", 2) == "a.jpg#2"
    assert face_key("a.jpg", None) == "a.jpg"


def test_each_photograph_is_there_once() -> None:
    known = {"a.jpg", "b.jpg", "t.tar:c#0"}
    keys = ["a.jpg#0", "a.jpg#1", "a.jpg#10", "b.jpg", "t.tar:c#0"]
    assert sorted(photo_keys(keys[:2] + keys[3:], known)) == sorted(known)
    assert sorted(photo_keys(["t.tar:c#0#0", "a.jpg#0", "b.jpg#0"], known)) == sorted(known)


def test_a_gap_and_a_stranger_come_back_as_keys_of_no_photograph() -> None:
    assert sorted(photo_keys(["a.jpg#0", "a.jpg#2"], {"a.jpg"})) == ["a.jpg", "a.jpg#2"]
    assert photo_keys(["x.jpg#0"], {"a.jpg"}) == ["x.jpg#0"]
    assert photo_keys(["a.jpg", "a.jpg"], {"a.jpg"}) == ["a.jpg", "a.jpg"]
