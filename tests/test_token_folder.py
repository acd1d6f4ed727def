"""The token folder, and the access of other users to it and to tokens.json."""

import stat

import pytest
from token_files import OLD, make_store, save

from xaiproxy import errors, token_folder, token_lock


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def test_a_new_folder_is_private(tmp_path):
    store = make_store(tmp_path / "a" / "b")
    token_folder.prepare(store)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "mode, warned", [(0o700, 0), (0o755, 0), (0o770, 1), (0o707, 1), (0o1777, 0)]
)
def test_an_existing_folder_is_warned_about_and_not_changed(store, mode, warned, caplog):
    store.path.parent.chmod(mode)
    token_folder.prepare(store)
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == mode
    assert len(caplog.records) == warned


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for use in (token_folder.prepare, token_lock.beat, lambda store: save(store, OLD)):
        with pytest.raises(errors.StorageError, match=f"{tmp_path}/file.* Not a directory"):
            use(make_store(tmp_path / "file" / "sub"))


@pytest.mark.parametrize(
    "mode, sentence",
    [
        (0o600, ""),
        (0o400, ""),
        (0o640, "(mode 0640); its mode is now 0600"),
        (0o604, "(mode 0604); its mode is now 0600"),
    ],
)
def test_a_file_open_to_other_users_is_made_private(store, mode, sentence):
    save(store, OLD)
    store.path.chmod(mode)
    assert token_folder.tighten(store).endswith(sentence)
    assert not stat.S_IMODE(store.path.stat().st_mode) & 0o077
    assert token_folder.tighten(store) == ""
