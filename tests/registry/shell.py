"""A home of its own in which the real `registry` command is run."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("registry")


@dataclass
class Shell:
    """Call it with the words behind `registry`; `extra` is added to the environment."""

    home: Path
    extra: dict[str, str]
    made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def acme(cls, home: Path) -> "Shell":
        """Make a home and a registry of tenant acme in it; `made` is what `registry init` said."""
        home.mkdir()
        shell = cls(home, {})
        shell.made = shell.json("init", "--tenant", "acme")
        return shell

    @property
    def environment(self) -> dict[str, str]:
        return {"HOME": str(self.home), "PATH": os.environ["PATH"], **self.extra}

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [COMMAND, *map(str, arguments)],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "\r" not in done.stderr
        return done

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        done = self.run(*arguments)
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stdout + done.stderr

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code))


def failing(shell: Shell, code: int, reason: str, *arguments: str | Path) -> str:
    """The command fails with this exit code, says one sentence, and gives this reason as JSON; returns the sentence."""
    said = shell(*arguments, code=code)
    assert said.startswith(("registry: ", "usage: registry"))
    error = shell.json(*arguments, code=code)["error"]
    assert error["code"] == reason
    assert error["message"] in said
    return said
