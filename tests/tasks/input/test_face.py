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


def test_a_photograph_without_one_of_its_faces_is_not_there() -> None:
    assert photo_keys(["a.jpg#0", "a.jpg#2"], {"a.jpg"}) == []
    assert photo_keys(["a.jpg#1"], {"a.jpg"}) == []


def test_strangers_come_back_as_they_are() -> None:
    assert sorted(photo_keys(["a.jpg#0", "a.jpg#x"], {"a.jpg"})) == ["a.jpg", "a.jpg#x"]
    assert photo_keys(["a.jpg#x"], {"a.jpg"}) == ["a.jpg#x"]
    assert photo_keys(["x.jpg#0"], {"a.jpg"}) == ["x.jpg#0"]
    assert photo_keys(["a.jpg", "a.jpg"], {"a.jpg"}) == ["a.jpg", "a.jpg"]
