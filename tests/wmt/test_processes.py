"""Training by two processes gives the losses of one, and one goes on where two were stopped."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from taskmoe.tests.wmt import support

SIZES = ["d_model=16", "d_ff=16", "num_heads=2", "num_experts=4", "vocab_size=330"]
TRAINING = ["batch_tokens=512", "buckets=[16]", "learning_rate=0.01", "checkpoint_every=4"]


def start(data: Path, workdir: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "taskmoe.wmt", "train", "--data", str(data)]
    command += ["--workdir", str(workdir), "--steps", str(steps), "--encoder", "token"]
    command += ["--cache", str(data / "cache"), *more]
    for item in SIZES + TRAINING:
        command += ["--set", item]
    env = os.environ | {"PYTHONPATH": str(support.ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    # A device for each process, as a process without the tests' settings has.
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    if "--coordinator" in more:
        del env["JAX_COMPILATION_CACHE_DIR"]  # it is not made for two at a time
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    printed = []
    for process in processes:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        printed.append(said)
    return printed


def losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def test_two_processes_train_as_one_does_and_one_goes_on_from_two(tmp_path: Path) -> None:
    data = support.write_folder(tmp_path / "data")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    together = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    together += ["--expert-parallel", "2", "--process-id"]
    two, one = tmp_path / "two", tmp_path / "one"
    pair = (start(data, two, 8, *together, str(i)) for i in range(2))
    said, silent, _ = finish(*pair, start(data, one, 12))
    assert "2 devices in 2 processes: data 1 x expert 2" in said
    assert "step 8" in said
    assert "step" not in silent
    want = losses(one)
    for step in (4, 8):
        np.testing.assert_allclose(losses(two)[step], want[step], rtol=1e-4)
    # One device goes on with the experts that two processes shared; a fresh start is not that.
    (said,) = finish(start(data, two, 12))
    assert "resuming at step 8 of 12" in said
    np.testing.assert_allclose(losses(two)[12], want[12], rtol=1e-4)
    assert abs(want[4] - want[12]) > 1e-2
