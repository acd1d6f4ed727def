"""xai-client-key: add, list and remove client keys. The proxy reads them at its next request."""

import contextlib
import fcntl
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from xaiproxy import client_keys, command, config, durable_file, errors, folder_file, storage

HEADER = "# client keys: a name and the SHA-256 of a key a line; made by xai-client-key"
EXAMPLES = """\
  xai-client-key add laptop        make a key and print it, this once
  xai-client-key list              print the names of all keys
  xai-client-key remove laptop     refuse the key from the next request on
"""


def main(argv: list[str] | None = None) -> int:
    parser = command.ArgumentParser(
        prog="xai-client-key",
        usage="xai-client-key {add NAME, list, remove NAME}",
        description="Keys that clients send to the proxy.",
        epilog=EXAMPLES,
    )
    actions = parser.add_subparsers(
        prog=parser.prog, dest="action", required=True, metavar="add | list | remove"
    )
    for action in ("add", "remove"):
        actions.add_parser(action).add_argument("name", metavar="NAME")
    actions.add_parser("list")
    arguments = parser.parse_args(argv)

    def body() -> None:
        settings = config.from_environ(os.environ)
        path = settings.client_keys_file
        if arguments.action != "list":
            beside = path.parent == settings.token_path.parent and not os.path.lexists(path)
            storage.check_owner(settings.token_path if beside else path)
        if arguments.action == "list":
            names = _read(path)
            for name in names:
                print(name)
            if not names:
                command.say(f"There is no client key in {path}.")
        elif arguments.action == "add":
            key = "xaip_" + secrets.token_urlsafe(32)
            _change(
                path,
                lambda keys: _added(keys, arguments.name, key),
                lambda: _show(arguments.name, key),
            )
        else:
            _change(path, lambda keys: _removed(keys, arguments.name))
            command.say(f"The key of {arguments.name} is refused from now on.")
            if not _read(path):
                command.say(
                    "It was the last one: all clients are refused now. To serve without keys "
                    f"again, remove {path} and restart the proxy."
                )

    return command.run(parser.prog, body)


def _show(name: str, key: str) -> None:
    command.say(f"The key of {name}, shown this once; clients send it as their API key:")
    print(key)
    command.flush_results("nothing was changed, since")


def _added(keys: dict[str, str], name: str, key: str) -> dict[str, str]:
    if not client_keys.NAME.fullmatch(name):
        raise errors.UsageError(
            f"{name!r} cannot be a name: 1 to 64 letters, digits, dots, dashes and underscores"
        )
    if name in keys:
        raise errors.UsageError(
            f"{name} already has a key; remove it first, or choose another name"
        )
    return keys | {name: client_keys.digest(key)}


def _removed(keys: dict[str, str], name: str) -> dict[str, str]:
    if name not in keys:
        raise errors.UsageError(
            f"{name} has no key; {errors.typed('xai-client-key list')} prints the names"
        )
    return {other: digest for other, digest in keys.items() if other != name}


def _read(path: Path) -> dict[str, str]:
    try:
        return client_keys.load(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.ConfigurationError(
            f"{path} cannot be used: {reason}; correct or remove it"
        ) from error


def _change(
    path: Path,
    edit: Callable[[dict[str, str]], dict[str, str]],
    show: Callable[[], None] = lambda: None,
) -> None:
    """Replace the key file under its lock, so that no change is lost.

    `edit`: returns the new keys, from the former ones. `show`: called when only the rename is left
    to do; if it raises, nothing is changed.
    """
    outcome = "nothing was changed"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            # A mounted Secret, or a file that is kept elsewhere: the rename would replace the link.
            if path.is_symlink():
                raise errors.ConfigurationError(
                    f"{path} is a symbolic link to {os.readlink(path)!r} and is left alone; name "
                    "that file with XAI_PROXY_CLIENT_KEYS_FILE, or remove the link"
                )
            keys = edit(_read(path))
            lines = [HEADER, *(f"{name} {digest}" for name, digest in keys.items())]
            new = durable_file.NewFile(path.with_name(path.name + ".new"))
            try:
                _keep_access(path, new.fd)
                new.write("".join(f"{line}\n" for line in lines).encode())
                show()
                new.rename(path)
            finally:
                new.remove()
            outcome = "it was changed, but a power cut may undo that"
            durable_file.sync_folder(path.parent)
    except OSError as error:
        raise errors.StorageError(
            f"{error.filename or path} cannot be written: {error.strerror}; {outcome}. "
            f"{storage.advice(path, error, 'XAI_PROXY_CLIENT_KEYS_FILE')}"
        ) from error


def _keep_access(path: Path, fd: int) -> None:
    """Let the group of the file at `path` read the new one as well: it may be the proxy's."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        if status.st_gid != os.fstat(fd).st_gid:
            os.fchown(fd, -1, status.st_gid)
            os.fchmod(fd, 0o600 | status.st_mode & 0o040)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = folder_file.opened(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
