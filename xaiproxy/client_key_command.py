"""xai-client-key: add, list and remove client keys. The proxy reads them at its next request."""

import os
import sys
import time
from pathlib import Path

from xaiproxy import client_key_file, client_keys, command, config, key_uses, storage

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
            key = client_key_file.new_key()
            if client_key_file.add(path, arguments.name, key, lambda: _show(arguments.name, key)):
                command.say(
                    "It is the only one: clients without a key are refused from now on, also by a "
                    "proxy that is running."
                )
        else:
            last = client_key_file.remove(path, arguments.name)
            command.say(f"The key of {arguments.name} is refused from now on.")
            if last:
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
    text = client_key_file.read(path)
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


if __name__ == "__main__":
    sys.exit(main())
