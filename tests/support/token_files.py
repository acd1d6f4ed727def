"""Token folders of this process, and logins to put there."""

import os
from pathlib import Path

from xaiproxy import config, token_writer, tokens
from xaiproxy.token_store import TokenStore

OLD = tokens.Login("old", 2000, "old-refresh", extra={"theirs": 1})
NEW = tokens.Login("new", 3000, "new-refresh", extra={"theirs": 1})


def make_store(folder: Path) -> TokenStore:
    return TokenStore(
        config.from_environ(
            {"XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json")}, dotenv_path=os.devnull
        )
    )


def save(store: TokenStore, login: tokens.Login) -> None:
    with token_writer.locked(store, 0) as writer:
        writer.save(login)


def files(store: TokenStore) -> list[str]:
    return sorted(os.listdir(store.path.parent))
