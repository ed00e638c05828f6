"""What a registry is, in the fewest words: a dict of immutable versions and a dict of tags."""

from dataclasses import dataclass, field


@dataclass
class Adapter:
    """One adapter: version -> content (None once deleted), tag -> (generation, version or None)."""

    versions: dict[int, int | None] = field(default_factory=dict)
    tags: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    def newest(self) -> int | None:
        """The version a name without selector means."""
        return max(
            (version for version, content in self.versions.items() if content is not None), default=None
        )

    def readable(self, version: int | None) -> tuple[int, int] | None:
        """What reading a version gives."""
        content = None if version is None else self.versions.get(version)
        return None if version is None or content is None else (version, content)

    def tagged(self, tag: str) -> tuple[int, int] | None:
        """What reading a tag gives."""
        return self.readable(self.tags.get(tag, (0, None))[1])

    def pointing(self, version: int) -> list[str]:
        """The tags that point to a version."""
        return sorted(tag for tag, (_, target) in self.tags.items() if target == version)

    def push(self, content: int, wanted: int | None) -> str:
        """What a push must do: `new`, `same` or `conflict`."""
        version = self.newest() if wanted is None else wanted
        if version is None or version not in self.versions:
            return "new"
        if self.versions[version] == content:
            return "same"
        return "new" if wanted is None else "conflict"

    def move(self, tag: str, version: int | None) -> str:
        """What moving a tag must do: `moved`, `same` or `absent`."""
        if version is not None and self.versions.get(version) is None:
            return "absent"
        return "same" if self.tags.get(tag, (0, None))[1] == version else "moved"

    def delete(self, version: int, *, force: bool) -> str:
        """What deleting must do: `deleted`, `same`, `conflict` or `absent`."""
        if version not in self.versions:
            return "absent"
        if self.versions[version] is None:
            return "same"
        return "conflict" if self.pointing(version) and not force else "deleted"


@dataclass
class Model:
    """All adapters."""

    adapters: dict[str, Adapter] = field(default_factory=dict)

    def adapter(self, name: str) -> Adapter:
        """The adapter, made on first use."""
        return self.adapters.setdefault(name, Adapter())
