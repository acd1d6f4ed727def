"""An image in an archive of `docker save`: its configuration, and the files of its layers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

WHITEOUT = ".wh."


class Archive:
    """`files`: path to layer and entry, of all layers together.

    Ours are the layers that the base does not have, from the one with /data on.
    """

    def __init__(self, document: dict[str, Any], layers: list[tarfile.TarFile]):
        self.architecture: str = document["architecture"]
        self.config: dict[str, Any] = document["config"]
        self.files: dict[str, tuple[tarfile.TarFile, tarfile.TarInfo]] = {}
        for layer in layers:
            for entry in layer:
                self._add(layer, entry)
        first = next(number for number, layer in enumerate(layers) if "data" in layer.getnames())
        self._ours = layers[first:]
        self.own_digests: list[str] = document["rootfs"]["diff_ids"][first:]

    def _add(self, layer: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        folder, _, name = entry.name.rpartition("/")
        if not name.startswith(WHITEOUT):
            self.files[entry.name] = layer, entry
            return
        removed = f"{folder}/{name.removeprefix(WHITEOUT)}".strip("/")
        for path in [p for p in self.files if p == removed or p.startswith(removed + "/")]:
            del self.files[path]

    def read(self, path: str) -> bytes:
        return _content(*self.files[path])

    def own_entries(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        for layer in self._ours:
            for entry in layer:
                yield layer, entry

    def own_contents(self) -> dict[str, tuple[object, ...]]:
        """What an entry of our layers is, except its time."""
        return {
            entry.name: (
                entry.type,
                entry.mode,
                entry.uid,
                entry.gid,
                entry.linkname,
                hashlib.sha256(_content(layer, entry)).hexdigest() if entry.isreg() else "",
            )
            for layer, entry in self.own_entries()
        }


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Archive]:
    with contextlib.ExitStack() as stack:
        tar = stack.enter_context(tarfile.open(path))
        manifest = json.loads(_content(tar, "manifest.json"))[0]
        document = json.loads(_content(tar, manifest["Config"]))
        layers = [
            stack.enter_context(tarfile.open(fileobj=tar.extractfile(name)))
            for name in manifest["Layers"]
        ]
        yield Archive(document, layers)


def _content(tar: tarfile.TarFile, name: str | tarfile.TarInfo) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    with file:
        return file.read()
