"""`python -m xaiproxy.sandbox`. gevent patches the standard library before the rest is imported."""

import sys


def main(arguments: list[str] | None = None) -> int:
    from gevent import monkey

    monkey.patch_all()
    from xaiproxy.sandbox import command

    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
