"""A folder that is not the same on every node is noticed before anything is trained."""

import socket

import pytest
from pyarrow import fs
from worker_runs import fit

from jem.errors import DataError, JEMError
from jem.files import Location
from orchestrator.shared import NAME, Word, apart, sees, word_in


def test_a_word_is_seen_in_the_same_folder_alone_and_only_while_it_is_asked_for(tmp_path):
    here, there = Location.of(tmp_path / "here"), Location.of(tmp_path / "there")
    with word_in(here) as word:
        assert word.host == socket.gethostname()
        assert sees(here, word)
        assert not sees(there, word)
        with word_in(there):
            assert not sees(there, word), "another driver's word"
    assert not (here / NAME).exists()
    with word_in(here):
        (here / NAME).write(b"of who has taken the run over")
    assert (here / NAME).exists()
    assert "all nodes share, or an object store" in str(apart(here, ["a", "b"], word))


def test_an_object_store_is_the_same_for_all(tmp_path):
    store = Location(fs.LocalFileSystem(), str(tmp_path), scheme="s3")
    with word_in(store) as word:
        assert word is None
        assert sees(store, word)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_to_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JEMError, match=r"file/run: cannot be written .* then give the same command again"):
        word_in(Location.of(tmp_path / "file" / "run")).__enter__()


def test_a_worker_elsewhere_ends_before_its_first_step_with_the_hosts_and_the_remedy(tmp_path):
    outcome = fit(tmp_path / "elsewhere", word=Word("word", "the-drivers-host"))
    assert outcome["status"] == "bad data"
    assert f"on {socket.gethostname()} is not the folder that the driver on the-drivers-host has" in outcome["message"]
    assert not (tmp_path / "elsewhere").exists(), "nothing is left there"
    with word_in(Location.of(tmp_path / "run")) as word:
        assert fit(tmp_path / "run", "steps=4", word=word)["status"] == "finished"


def test_a_trial_elsewhere_is_not_begun(tmp_path):
    from types import SimpleNamespace

    from orchestrator.sweep.tuning import SweepTrial

    setting = SimpleNamespace(root=Location.of(tmp_path / "sweep"))
    with pytest.raises(DataError, match="is not the folder that the driver on host has"):
        SweepTrial.setup(object.__new__(SweepTrial), {}, setting, Word("word", "host"))
