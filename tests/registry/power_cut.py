"""A disk that forgets: records what a local store does to its directory and rebuilds what a power cut could leave.

The model is POSIX at its weakest that journalling file systems still exceed:

- bytes written to a file are certain only after an fsync of the file; before, any prefix of them may be there, and
  when a rename made the name certain first, the file may be empty;
- a new, replaced or removed name is certain only after an fsync of its directory; before, each name on its own is as
  it was after any of its changes since the last fsync;
- a directory that is not certain takes everything below it with it.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_registry.storage.disk import Disk


@dataclass
class File:
    """An inode: all bytes written, and those that are certain."""

    written: bytes = b""
    certain: int = 0


@dataclass
class Directory:
    """Names that are certain, and for each name its changes since: a node, or None for removed."""

    certain: dict[str, "File | Directory"] = field(default_factory=dict)
    pending: dict[str, list["File | Directory | None"]] = field(default_factory=dict)

    def now(self, name: str) -> "File | Directory | None":
        """What the name is while the power is on."""
        changes = self.pending.get(name)
        return changes[-1] if changes else self.certain.get(name)

    def change(self, name: str, node: "File | Directory | None") -> None:
        self.pending.setdefault(name, []).append(node)

    def sync(self) -> None:
        for name, changes in self.pending.items():
            if changes[-1] is None:
                self.certain.pop(name, None)
            else:
                self.certain[name] = changes[-1]
        self.pending.clear()


class ForgetfulDisk(Disk):
    """Does everything for real, and keeps the model of what would survive."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Directory()  # stands for the root, which is certain
        self._files: dict[int, File] = {}
        self.steps = 0
        self.on_step = lambda: None  # called before each change: the moments at which the power may go

    def make_directory(self, path: Path) -> None:
        self._step()
        new = not path.exists()
        super().make_directory(path)
        if new:
            self._parent(path).change(path.name, Directory())

    def create(self, path: Path, mode: int) -> int:
        self._step()
        descriptor = super().create(path, mode)
        file = self._files[descriptor] = File()
        self._parent(path).change(path.name, file)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self._step()
        count = super().write(descriptor, data)
        self._files[descriptor].written += bytes(data[:count])
        return count

    def sync(self, descriptor: int) -> None:
        self._step()
        super().sync(descriptor)
        self._files[descriptor].certain = len(self._files[descriptor].written)

    def link(self, source: Path, target: Path) -> None:
        self._step()
        super().link(source, target)
        self._parent(target).change(target.name, self._node(source))

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)
        node = self._node(source)
        self._parent(target).change(target.name, node)
        self._parent(source).change(source.name, None)

    def unlink(self, path: Path) -> None:
        self._step()
        there = path.exists()
        super().unlink(path)
        if there:
            self._parent(path).change(path.name, None)

    def remove_directory(self, path: Path) -> None:
        self._step()
        super().remove_directory(path)
        self._parent(path).change(path.name, None)

    def sync_directory(self, path: Path) -> None:
        self._step()
        super().sync_directory(path)
        if path == self.root.parent:
            return  # above the model
        node = self._node(path)
        assert isinstance(node, Directory)
        node.sync()

    def _step(self) -> None:
        self.on_step()
        self.steps += 1

    def _node(self, path: Path) -> File | Directory:
        node: File | Directory | None = self.top
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, Directory)
            node = node.now(name)
        assert node is not None, path
        return node

    def _parent(self, path: Path) -> Directory:
        node = self._node(path.parent)
        assert isinstance(node, Directory)
        return node


def after_power_cut(top: Directory, rng: random.Random, *, how: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and bytes of every file one possible disk has when the power is back.

    Args:
        top: the model.
        rng: decides what is lost.
        how: "all" loses everything uncertain, "none" nothing, "some" a part of it.
    """
    for name in sorted(top.certain.keys() | top.pending.keys()):
        outcomes = [top.certain.get(name), *top.pending.get(name, [])]
        node = {"all": outcomes[0], "none": outcomes[-1]}.get(how) if how != "some" else rng.choice(outcomes)
        if isinstance(node, Directory):
            for path, body in after_power_cut(node, rng, how=how):
                yield f"{name}/{path}", body
        elif isinstance(node, File):
            sizes = {"all": node.certain, "none": len(node.written)}
            size = sizes[how] if how != "some" else rng.randint(node.certain, len(node.written))
            yield name, node.written[:size]


def rebuild(top: Directory, target: Path, rng: random.Random, *, how: str) -> None:
    """Make the directory that such a disk has."""
    os.makedirs(target)
    for name, body in after_power_cut(top, rng, how=how):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
