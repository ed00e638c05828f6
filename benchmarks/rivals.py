"""The tools the registry is measured against, as one process of another virtual environment.

It reads one JSON object per line, does what it says, and answers with the seconds it took. It verifies nothing:
that is what makes it a yardstick. Run by `benchmarks.registry_io`; needs boto3 and obstore and nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import obstore
from obstore.store import S3Store

STREAM_BYTES = 1 << 20


class Rivals:
    """Warm clients of one bucket."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        self._bucket = bucket
        self._boto3 = boto3.client("s3", endpoint_url=endpoint)
        self._obstore = S3Store(
            bucket,
            endpoint=endpoint,
            region="us-east-1",
            access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )

    def by_boto3(self, key: str, target: Path) -> None:
        """Download with boto3's transfer manager: ranges of 8 MiB on ten threads."""
        self._boto3.download_file(self._bucket, key, str(target))

    def by_obstore(self, key: str, target: Path) -> None:
        """Download one stream into a file."""
        stream = obstore.get(self._obstore, key).stream(min_chunk_size=STREAM_BYTES)
        with target.open("wb") as file:
            for chunk in stream:
                file.write(chunk)

    def directory(self, get: Callable[[str, Path], None], keys: list[str], target: str) -> None:
        """Download some objects into a new directory."""
        place = Path(target)
        place.mkdir()
        for key in keys:
            get(key, place / key.rpartition("/")[2])

    def many(self, keys: list[str], target: str, threads: int) -> None:
        """Download objects with raw GETs at once, each into a file that is removed again."""
        place = Path(target)
        place.mkdir()

        def one(numbered: tuple[int, str]) -> None:
            path = place / str(numbered[0])
            self.by_obstore(numbered[1], path)
            path.unlink()

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, enumerate(keys)))


def run(rivals: Rivals, order: dict[str, Any]) -> None:
    """Carry out one order."""
    if order["do"] == "many":
        rivals.many(order["keys"], order["target"], order["threads"])
    else:
        get = rivals.by_boto3 if order["do"] == "boto3" else rivals.by_obstore
        rivals.directory(get, order["keys"], order["target"])


def main() -> None:
    """Answer orders until standard input ends."""
    rivals = Rivals(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        order = json.loads(line)
        started = time.perf_counter()
        run(rivals, order)
        print(json.dumps(time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
