"""The example programs say what they promise."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from taskmoe.wmt.commands import train
from taskmoe.wmt.config import PRESETS

ROOT = Path(__file__).parents[1]


def output(name: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # the tests' own
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_token_routed_training_lowers_the_loss_and_uses_every_expert() -> None:
    lines = re.findall(r"loss (\S+)  load of the experts (.*)", output("token_routed"))
    losses = [float(loss) for loss, _ in lines]
    assert len(lines) == 3
    assert losses[-1] < losses[0] / 10
    assert min(float(share) for share in lines[-1][1].split()) > 0


def test_extracted_layers_are_identical() -> None:
    text = output("task_routed")
    before, after = map(float, re.findall(r"loss (\S+) -> (\S+) in", text)[0])
    assert after < before / 2
    assert re.findall(r"identical to the layer: (\w+)", text) == ["True"] * 4
    assert max(map(float, re.findall(r"routed layer (\S+)", text))) < 1e-5


def test_eight_devices_exchange_and_a_sub_network_does_not() -> None:
    text = output("eight_devices")
    assert text.startswith("8 devices, 2 x 4")
    rows = re.findall(r"(\w+): largest difference to one device (\S+); (.*)", text)
    assert [name for name, _, _ in rows] == ["auto", "all_to_all", "all_gather", "ragged"]
    assert max(float(difference) for _, difference, _ in rows) < 1e-5
    assert all(found for _, _, found in rows)
    assert "sub-network: no collectives" in text


def test_an_export_holds_each_platforms_kernels() -> None:
    text = output("export")
    found = re.findall(r"for +(\w+): (\d+) Pallas kernels, (\d+) products by ragged_dot", text)
    counts = {name: (int(kernels), int(products)) for name, kernels, products in found}
    assert set(counts) == {"tpu", "cuda", "cpu"}
    assert counts["tpu"][0] > 0 == counts["tpu"][1]
    assert counts["cuda"][0] == 0 < counts["cuda"][1]
    assert counts["cpu"] == (0, 0)
    assert float(re.findall(r"runs here, largest difference (\S+)", text)[0]) < 1e-5
    assert "other tiles than for v4: True" in text


def test_what_is_not_kept_runs_again() -> None:
    text = output("checkpointing")
    rows = re.findall(r"^ *(.+?) +([\d,]+) +(\d) +(\d)$", text, re.MULTILINE)
    kept = [int(number.replace(",", "")) for _, number, _, _ in rows]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0
    runs = {name: (int(gating), int(experts)) for name, _, gating, experts in rows}
    assert runs["gating, experts"] == (1, 1)
    assert runs["gating"] == (1, 2)
    assert runs["nothing"] == (2, 2)
    assert float(re.findall(r"nothing kept: (\S+)", text)[0]) < 1e-5


def test_every_example_is_tested_and_named_in_the_quick_start() -> None:
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    tests = Path(__file__).read_text(encoding="utf-8")
    assert names == {f"{name}.py" for name in re.findall(r"output\(\"(\w+)\"\)", tests)}
    quick_start = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    assert names == set(re.findall(r"examples/(\w+\.py)", quick_start))


def test_the_clusters_jobs_are_well_formed_and_their_commands_are_ours() -> None:
    folder = ROOT / "examples" / "cluster"
    script = folder / "train.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    (slurm,) = re.findall(r"python -m taskmoe\.wmt (train .*?) &&", text)
    job = yaml.safe_load((folder / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (hosts,) = job["spec"]["replicatedJobs"]
    work = hosts["template"]["spec"]
    pod = work["template"]["spec"]
    (container,) = pod["containers"]
    assert work["parallelism"] == work["completions"] == 4
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert container["command"][:3] == ["python", "-m", "taskmoe.wmt"]
    words = [*container["command"][3:], *container["args"]]
    for command in (slurm.replace('"', "").split(), words):
        parser = argparse.ArgumentParser()
        train.add_arguments(parser.add_subparsers().add_parser("train"))
        given = parser.parse_args(command)
        assert given.distributed
        assert given.expert_parallel == 4
        assert given.config in PRESETS
