"""xai-client-key: add, list and remove client keys. The proxy reads them at its next request."""

import contextlib
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xaiproxy import (
    client_keys,
    command,
    config,
    durable_file,
    errors,
    folder_file,
    key_uses,
    storage,
)

HEADER = "# client keys: a name and the SHA-256 of a key a line; made by xai-client-key"
EXAMPLES = """\
  xai-client-key add laptop        make a key and print it, this once
  xai-client-key list              print all keys: name, when made, when last used
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
            _list(path)
        elif arguments.action == "add":
            key = "xaip_" + secrets.token_urlsafe(32)
            former = _change(
                path,
                lambda text: _added(text, arguments.name, key),
                lambda: _show(arguments.name, key),
            )
            if not client_keys.parse(former):
                command.say(
                    "It is the only one: clients without a key are refused from now on, also by a "
                    "proxy that is running."
                )
        else:
            _change(path, lambda text: _removed(text, arguments.name))
            command.say(f"The key of {arguments.name} is refused from now on.")
            left = client_keys.parse(_read(path))
            # The file is no more than a memory aid.
            with contextlib.suppress(OSError, errors.StorageError):
                key_uses.save(path, {}, left.values())
            if not left:
                command.say(
                    "It was the last one: all clients are refused now. To serve without keys "
                    f"again, remove {path} and restart the proxy."
                )

    return command.run(parser.prog, body)


def _show(name: str, key: str) -> None:
    command.say(f"The key of {name}, shown this once; clients send it as their API key:")
    print(key)
    command.flush_results("nothing was changed, since")


def _list(path: Path) -> None:
    text = _read(path)
    keys, made, uses = client_keys.parse(text), client_keys.made_at(text), key_uses.load(path)
    width = max(map(len, keys), default=0)
    for name, digest in keys.items():
        print(
            f"{name:{width}}  made {_local_time(made.get(name), 'unknown'):16}"
            f"  last used {_local_time(uses.get(digest), 'not recorded')}"
        )
    if not keys:
        command.say(f"There is no client key in {path}.")


def _local_time(at: float | None, otherwise: str) -> str:
    return otherwise if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _added(text: str, name: str, key: str) -> str:
    if not client_keys.NAME.fullmatch(name):
        raise errors.UsageError(
            f"{name!r} cannot be a name: 1 to 64 letters, digits, dots, dashes and underscores"
        )
    if name in client_keys.parse(text):
        raise errors.UsageError(
            f"{name} already has a key; remove it first, or choose another name"
        )
    made = time.strftime(client_keys.MADE, time.gmtime())
    lines = [*(text or HEADER).splitlines(), made, f"{name} {client_keys.digest(key)}", ""]
    return "\n".join(lines)


def _removed(text: str, name: str) -> str:
    if name not in client_keys.parse(text):
        raise errors.UsageError(
            f"{name} has no key; {errors.typed('xai-client-key list')} prints the names"
        )
    lines: list[str] = []
    for line in text.splitlines():
        if line.split()[:1] != [name]:
            lines.append(line)
        elif lines and client_keys.made_time(lines[-1]) is not None:
            lines.pop()
    return "\n".join([*lines, ""])


def _read(path: Path) -> str:
    """Return the text of the key file, which parses; "" if there is none."""
    try:
        text = client_keys.read(path)
        client_keys.parse(text)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.ConfigurationError(
            f"{path} cannot be used: {reason}; correct or remove it"
        ) from error
    return text


def _change(
    path: Path,
    edit: Callable[[str], str],
    show: Callable[[], None] = lambda: None,
) -> str:
    """Replace the key file under its lock, so that no change is lost; return its former text.

    `edit`: returns the new text, from the former one. `show`: called when only the rename is left
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
            former = _read(path)
            text = edit(former)
            new = durable_file.NewFile(path.with_name(path.name + ".new"))
            try:
                _keep_access(path, new.fd)
                new.write(text.encode())
                show()
                new.rename(path)
            finally:
                new.remove()
            outcome = "it was changed, but a power cut may undo that"
            durable_file.sync_folder(path.parent)
            return former
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
