"""`loraplex load`: bring an adapter into a running server, into its engine or only into memory.

One line per step on standard error, one JSON object of the adapter on standard output at the end.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from loraplex_client.client import Client
from loraplex_client.errors import LoraplexError
from loraplex_client.types import LoadProgress, Tls


def main(arguments: Sequence[str] | None = None) -> int:
    """`loraplex load`: exit status 0, or 1 with one line saying why not."""
    options = _parser().parse_args(arguments)
    secure = options.tls or options.ca or options.cert or options.key
    tls = Tls(ca=options.ca, certificate=options.cert, key=options.key) if secure else None
    try:
        with Client(options.server, api_key=os.environ.get("LORAPLEX_API_KEY"), tls=tls) as client:
            for step in client.load_adapter(
                options.adapter, stage_only=options.stage_only, timeout_s=options.timeout
            ):
                print(_line(step), file=sys.stderr)
                if step.adapter is not None:
                    print(json.dumps(asdict(step.adapter)))
    except LoraplexError as error:
        print(f"loraplex load: {error}" + (f" [{error.code}]" if error.code else ""), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"loraplex load: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _line(step: LoadProgress) -> str:
    done = f" {step.done_bytes} of {step.total_bytes} bytes" if step.total_bytes else ""
    return f"{step.elapsed_s:7.3f} s  {step.phase}{done}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplex load",
        description="Bring an adapter into a running server. The API key comes from LORAPLEX_API_KEY.",
    )
    parser.add_argument("adapter", help="tenant/adapter[@tag]")
    parser.add_argument(
        "--stage-only",
        action="store_true",
        help="only into memory, so that a later load is quick; takes no slot",
    )
    parser.add_argument("--server", default=os.environ.get("LORAPLEX_SERVER", "127.0.0.1:8470"))
    parser.add_argument("--tls", action="store_true", help="encrypt the connection; the others imply it")
    parser.add_argument("--ca", metavar="FILE", default="", help="believe these issuers (PEM)")
    parser.add_argument("--cert", metavar="FILE", default="", help="the client's own certificate (PEM)")
    parser.add_argument("--key", metavar="FILE", default="", help="its private key (PEM)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the whole call")
    return parser


if __name__ == "__main__":
    sys.exit(main())
