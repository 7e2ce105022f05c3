import os

import pytest

from jem.files import Location


@pytest.fixture
def root(tmp_path):
    return Location.of(tmp_path / "root")


def test_paths_and_file_uris_are_the_same_place_and_go_up_and_down(tmp_path, monkeypatch):
    place = Location.of(tmp_path)
    assert Location.of(f"file://{tmp_path}").uri == place.uri == str(tmp_path)
    assert (place / "a" / 7).uri == f"{tmp_path}/a/7"
    assert ((place / "a" / 7).name, (place / "a" / 7).parent) == ("7", place / "a")
    monkeypatch.chdir(tmp_path)
    assert Location.of("a").uri == f"{tmp_path}/a"
    assert place.is_local


def test_another_scheme_is_kept_in_the_uri_and_an_unknown_one_refused():
    place = Location.of("mock:///bucket/run")
    assert not place.is_local
    assert (place / "a").uri.startswith("mock://")
    with pytest.raises(ValueError, match="nonsense://x"):
        Location.of("nonsense://x")
    with pytest.raises(ValueError, match="not on the local disk"):
        _ = place.local


@pytest.mark.parametrize("name", ["größe", "a#b", "a%20b", "a?b", "a[1]", "a b", "a=b+c&d'~(1)", "digits-0b0f8f3c"])
def test_a_uri_opens_the_place_that_it_was_told_of(name):
    place = Location.of("s3://bucket/runs?region=us-east-1") / name / "checkpoints"
    again = Location.of(place.uri)
    assert (again.path, again.uri) == (place.path, place.uri)
    assert place.path == f"bucket/runs/{name}/checkpoints"
    assert name != "digits-0b0f8f3c" or name in place.uri, "as it is, where nothing has to be written otherwise"


@pytest.mark.parametrize("scheme", ["local", "mock"])
def test_what_is_written_is_read_listed_moved_and_removed(tmp_path, scheme):
    root = Location.of(tmp_path / "root") if scheme == "local" else Location.of("mock:///root")
    root.mkdir()
    (root / "b").write(b"12345")
    (root / "b").write(b"123")
    (root / "a").mkdir()
    assert (root / "b").read() == b"123"
    assert (root / "b").size() == 3
    assert [child.name for child in root.children()] == ["a", "b"]
    assert (root / "a").is_dir()
    assert not (root / "b").is_dir()
    (root / "b").move_to(root / "c")
    assert not (root / "b").exists()
    assert (root / "c").read() == b"123"
    (root / "c").remove()
    (root / "c").remove()
    (root / "a").remove()
    assert root.children() == []
    assert (root / "nowhere").children() == []


def test_a_write_that_fails_leaves_the_old_file_and_no_other(root, monkeypatch):
    (root / "a").write(b"old")

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        (root / "a").write(b"new and longer")
    assert (root / "a").read() == b"old"
    assert [child.name for child in root.children()] == ["a"]


def test_reading_what_is_not_there_says_so(root):
    with pytest.raises(FileNotFoundError):
        (root / "a").read()
    assert not (root / "a").exists()


def test_a_uri_that_cannot_be_opened_is_told_without_its_password():
    with pytest.raises(ValueError, match="not a location") as caught:
        Location.of("nowhere://KEY:SE/CRET@bucket/runs")
    assert "CRET" not in str(caught.value)
