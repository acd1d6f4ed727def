"""xai-client-key: add, list and remove client keys. The proxy reads them at its next request."""

import os
import sys
import time
from pathlib import Path

from xaiproxy import client_key_file, client_keys, command, config, key_uses, storage

# An example of each, and its effect.
ACTIONS = {
    "add": ("add laptop", "make a key and print it, this once"),
    "list": ("list", "print all keys, with when they were used"),
    "remove": ("remove laptop", "refuse the key from the next request on"),
}
NOTES = """\
Once there is a key, the proxy refuses requests without one.

Exit status: 0 done; 64 wrong usage; 75 the key file cannot be written; 78 wrong
settings, or a key file that cannot be used.
"""


def parser() -> command.ArgumentParser:
    examples = {
        action: f"  xai-client-key {words:15} {effect}\n"
        for action, (words, effect) in ACTIONS.items()
    }
    options = command.ArgumentParser(
        "".join(examples.values()),
        prog="xai-client-key",
        usage="xai-client-key {add NAME, list, remove NAME}",
        description="Add, list and remove the keys that clients send to the proxy.",
        epilog=NOTES,
    )
    actions = options.add_subparsers(
        prog=options.prog, dest="action", required=True, metavar="add | list | remove"
    )
    for action, (_, effect) in ACTIONS.items():
        added = actions.add_parser(action, help=effect, examples=examples[action])
        if action != "list":
            added.add_argument("name", metavar="NAME", help="the name of the key")
    return options


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)

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

    return command.run("xai-client-key", body)


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
