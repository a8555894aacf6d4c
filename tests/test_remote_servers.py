"""What needs a real server beside the tests that run on all of them: the command by its URL, and the demonstration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tensors
from remotes import Nodes, warm_up

from bench._object_stores import ACCESS, BUCKET, SECRET, Moto, options_for, running
from snapstore.cli import main

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture(scope="session", autouse=True)
def _client():
    warm_up()


def test_the_command_takes_endpoint_and_credentials_from_the_environment(tmp_path, monkeypatch, capsys):
    url = f"s3://{BUCKET}/prefix"
    with running(Moto(tmp_path / "server")) as server:
        nodes = Nodes(tmp_path, url, remote_options=options_for(server.endpoint))
        assert nodes("a").save("request", 1024, tensors(1)).wait_published(20)
        nodes.close()
        for name, value in {
            "AWS_ENDPOINT": server.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(name, value)
        answers = {}
        for name, *arguments in (
            ("ls", "--snapshots"),
            ("verify",),
            ("stats",),
            ("prune", "--older-than", "0s", "--include-live", "--yes"),
        ):
            assert main([name, url, "--json", *arguments]) == 0
            answers[name] = json.loads(capsys.readouterr().out)
        assert answers["ls"]["rows"][0]["request"] == "request"
        assert answers["verify"]["checked"] == answers["stats"]["snapshots"]["count"] == 1
        assert answers["prune"]["snapshots"] == 1
        assert main(["ls", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["total"] == 0


def test_the_demonstration():
    checkout = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "examples/two_nodes.py"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resumes at 4096 tokens, from remote" in done.stdout
    assert "clean=True" in done.stdout and "neither here nor in the remote store" in done.stdout
