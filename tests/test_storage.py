"""Which users may write in the token folder, and the advice when it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import Sandbox

from xaiproxy import errors, storage, token_folder, token_store, token_writer

OWNER = 10001
COMMAND = [sys.executable, "-W", "error", "-m"]
# With this capability, that user can read the folder of this Python and checkout.
AS_OWNER = [
    "setpriv",
    f"--reuid={OWNER}",
    f"--regid={OWNER}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]


# root, and the folder of another user


class Service:
    """The folder of a service that runs as user 10001, and the commands as root or as that user."""

    def __init__(self, folder: Path, sandbox: Sandbox):
        self.folder = folder / "data"
        self.folder.mkdir()
        os.chown(self.folder, OWNER, OWNER)
        self.path = self.folder / "tokens.json"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "XAI_PROXY_ISSUER": sandbox.url,
            "XAI_PROXY_UPSTREAM": sandbox.url,
            "XAI_PROXY_TOKEN_PATH": str(self.path),
            "XAI_PROXY_PORT": "0",
        }

    def run(self, module: str, *arguments: str, user: int = 0, **environ: str) -> tuple[int, str]:
        command = [*(AS_OWNER if user else []), *COMMAND, f"xaiproxy.{module}", *arguments]
        done = subprocess.run(
            command,
            cwd="/",
            env=self.environ | environ,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        return done.returncode, done.stderr

    @contextlib.contextmanager
    def running(self, module: str, message: str) -> Iterator[None]:
        """Run a process as root, from when it has logged `message` until the end of the block."""
        with open(self.folder.parent / module, "w+") as log:
            process = subprocess.Popen(
                [*COMMAND, f"xaiproxy.{module}"], cwd="/", env=self.environ, stderr=log
            )
            try:
                end = time.monotonic() + 20
                while message not in Path(log.name).read_text():
                    assert time.monotonic() < end and process.poll() is None, Path(
                        log.name
                    ).read_text()
                    time.sleep(0.02)
                yield
            finally:
                process.terminate()
                process.wait(10)

    def owners(self) -> dict[str, int]:
        return {
            str(path.relative_to(self.folder)): path.stat().st_uid
            for path in self.folder.rglob("*")
        }


@pytest.fixture
def service(sandbox: Sandbox) -> Iterator[Service]:
    if os.geteuid() != 0 or subprocess.run([*AS_OWNER, "true"], capture_output=True).returncode:
        pytest.skip("only root can become another user, and not in every container")
    # tmp_path is closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        service = Service(Path(folder), sandbox)
        sandbox.reset()
        yield service


COMMANDS = [("login", "--device"), ("client_key_command", "add", "laptop")]


def test_root_makes_nothing_in_another_users_folder(service: Service, sandbox: Sandbox):
    message = (
        f"{service.folder} belongs to user {OWNER}, and this is user 0 (root), whose files would be closed to that user; "
        f"nothing was changed. Run the same as user {OWNER}, as with `docker exec -u {OWNER}` or `sudo -u '#{OWNER}'`\n"
    )
    sandbox.set(auto_approve=0, device_interval=0)
    for arguments in COMMANDS:
        for environ in ({}, {"XAI_PROXY_TOKEN_PATH": f"{service.folder}/deeper/still/tokens.json"}):
            code, stderr = service.run(*arguments, **environ)
            assert message in stderr and code == 75, stderr
    assert service.owners() == {} and sandbox.requests() == []


def test_root_refuses_to_change_another_users_login(service: Service, sandbox: Sandbox):
    sandbox.set(auto_approve=0, device_interval=0)
    assert service.run("login", "--device", user=OWNER)[0] == 0
    assert service.run("client_key_command", "add", "laptop", user=OWNER)[0] == 0
    before, content = service.owners(), service.path.read_bytes()
    for arguments in [*COMMANDS, ("login", "--logout"), ("refresher", "--once")]:
        code, stderr = service.run(*arguments)
        assert re.search(
            rf"{service.path.parent}/(tokens.json|client-keys) belongs to user {OWNER}, and this",
            stderr,
        )
        assert code in (75, 77)
    assert service.owners() == before and service.path.read_bytes() == content


def test_a_refresher_and_a_proxy_of_root_leave_the_folder_to_its_owner(
    service: Service, sandbox: Sandbox
):
    sandbox.set(auto_approve=0, device_interval=0)
    with service.running("refresher", "belongs to user"), service.running("__main__", "listening"):
        assert service.run("login", "--device", user=OWNER)[0] == 0
    assert service.owners() == {"tokens.json": OWNER, "tokens.json.lock": OWNER}


def test_root_may_sign_in_where_root_serves(service: Service, sandbox: Sandbox):
    """As in a container that runs as root with a mounted folder of another user."""
    sandbox.set(auto_approve=0, device_interval=0)
    sandbox.write_login(service.path)
    assert (
        service.run("login", "--device")[0]
        == service.run("client_key_command", "add", "laptop")[0]
        == 0
    )


def test_a_lock_that_is_closed_to_us_is_named_with_its_owner(service: Service):
    for name in ("tokens.json.lock", "client-keys.lock"):
        (service.folder / name).touch(0o600)
    for arguments, name in (
        (("login", "--device"), "tokens.json.lock"),
        (("client_key_command", "add", "laptop"), "client-keys.lock"),
    ):
        code, stderr = service.run(*arguments, user=OWNER)
        lock = service.folder / name
        assert (
            code == 75
            and f"{lock} cannot be written: Permission denied" in stderr
            and f". {lock} belongs to user 0, "
            f"and this is user {OWNER}: run as user 0, or chown it to user {OWNER}\n"
            in stderr
        )


def test_a_home_folder_that_is_the_root_folder_is_refused(service: Service):
    """Many images give it to a user that they do not know."""
    for arguments, setting in (
        (("login", "--device"), "XAI_PROXY_TOKEN_PATH"),
        (("client_key_command", "add", "laptop"), "XAI_PROXY_CLIENT_KEYS_FILE"),
    ):
        code, stderr = service.run(*arguments, user=OWNER, HOME="/", XAI_PROXY_TOKEN_PATH="")
        assert code == 75 and "/.xai-proxy cannot be written: Permission denied" in stderr
        assert (
            f"User {OWNER} cannot write in /: set {setting} to a file in a folder where that user can\n"
            in stderr
        )


# advice


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.ENOSPC, "Make room on the disk that {folder} is on"),
        (errno.EDQUOT, "Make room on the disk"),
        (errno.EROFS, "Mount {folder} writable, or set A_SETTING to a file elsewhere"),
        (errno.EBUSY, "Mount {folder} itself"),
        (errno.ENOLCK, "The file system of {folder} has no locks"),
        (errno.EOPNOTSUPP, "The file system of {folder} has no locks"),
        (errno.ENAMETOOLONG, "set A_SETTING"),
        (errno.EMFILE, "limit of open files"),
        (errno.ENFILE, "limit of open files"),
        (errno.ESTALE, "Mount the file system of {folder} anew"),
        (errno.EIO, "Check {folder} and the disk that it is on"),
    ],
)
def test_the_advice_fits_the_error(tmp_path: Path, number: int, message: str):
    advice = storage.advice(
        tmp_path / "tokens.json", OSError(number, os.strerror(number)), "A_SETTING"
    )
    assert message.format(folder=tmp_path) in advice and "Let user" not in advice


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: folder.touch(), "Something else is there: move {folder} away"),
        (
            lambda folder: folder.symlink_to("nowhere"),
            "Something else is there: move {folder} away",
        ),
        (
            lambda folder: (folder / "tokens.json.lock").mkdir(parents=True),
            "move {folder}/tokens.json.lock away",
        ),
        (
            lambda folder: (folder / "tokens.json.new").mkdir(parents=True),
            "move {folder}/tokens.json.new away",
        ),
        (
            lambda folder: folder.mkdir() or (folder / "tokens.json.lock").symlink_to("x"),
            "{folder}/tokens.json.lock",
        ),
        (
            lambda folder: folder.mkdir() or (folder / "tokens.json.new").symlink_to("x"),
            "{folder}/tokens.json.new",
        ),
    ],
)
def test_a_file_that_blocks_a_save_is_named(tmp_path: Path, prepare, message: str):
    from xaiproxy import config

    folder = tmp_path / "login"
    prepare(folder)
    store = token_store.TokenStore(
        config.from_environ({"XAI_PROXY_TOKEN_PATH": f"{folder}/tokens.json"})
    )
    with pytest.raises(errors.StorageError) as caught:
        token_folder.prepare(store)
        with token_writer.locked(store, 0):
            pass
    assert message.format(folder=folder) in str(caught.value) and "Let user" not in str(
        caught.value
    )


def test_root_makes_no_key_file_in_another_users_folder_elsewhere(service: Service, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.mkdir()
    os.chown(keys, OWNER, OWNER)
    code, stderr = service.run(
        "client_key_command", "add", "laptop", XAI_PROXY_CLIENT_KEYS_FILE=str(keys / "client-keys")
    )
    assert code == 75 and f"{keys} belongs to user {OWNER}" in stderr and not list(keys.iterdir())


def test_a_key_file_keeps_the_group_that_may_read_it(service: Service, tmp_path: Path):
    path = tmp_path / "client-keys"
    options = {"XAI_PROXY_CLIENT_KEYS_FILE": str(path)}
    assert service.run("client_key_command", "add", "laptop", **options)[0] == 0
    os.chown(path, -1, OWNER)
    path.chmod(0o640)
    assert service.run("client_key_command", "add", "other", **options)[0] == 0
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (OWNER, 0o640)


@pytest.mark.parametrize(
    "owner, mode, advice",
    [
        (0, 0o700, ""),
        (0, 0o755, ""),
        (0, 0o1777, ""),
        (0, 0o770, "chmod go-w"),
        (0, 0o702, "chmod go-w"),
        (12345, 0o700, "belongs to user 12345"),
        (12345, 0o1777, "belongs to user 12345"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_users_that_could_replace_a_file_of_a_folder_are_named(tmp_path, owner, mode, advice):
    os.chown(tmp_path, owner, 0)
    tmp_path.chmod(mode)
    risk = storage.risk_of(os.stat(tmp_path))
    assert advice in risk and bool(risk) is bool(advice)
