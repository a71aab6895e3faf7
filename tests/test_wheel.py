"""The wheel as users get it: what is in it, and what runs with jax and numpy alone."""

import email
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from taskmoe.kernels import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "moe", "cli", "wmt", "bench")
FOLDERS = (*PACKAGES, "tests", "runs")
#: Nothing of these belongs into a wheel.
STRAYS = (
    "kernels/notes.txt",
    "wmt/spm.model",
    "bench/gate/baseline/old.txt",
    "bench/results/new.json",
)
#: What taskmoe needs; jax's own needs come with it.
CORE = {"jax", "jaxlib", "numpy"}

LAYER = """
import importlib, pkgutil
import jax, taskmoe.kernels, taskmoe.moe
from taskmoe import moe

for package in (taskmoe.kernels, moe):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not module.name.endswith((".hopper_kernels", ".hopper_ring")):  # they want absl-py
            importlib.import_module(module.name)
config = moe.MoEConfig(d_model=8, d_ff=16, num_experts=4, routing="task", num_tasks=2)
params = moe.init(jax.random.key(0), config)
x, task = jax.numpy.ones((2, 3, 8)), jax.numpy.array([0, 1])
y = jax.jit(lambda params: moe.apply(params, config, x, task=task)[0])(params)
print(moe.__file__, moe.__version__, y.shape, float(abs(y).max()) > 0)
"""


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command that sees no module of the checkout."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist of a copy of the sources, in which strays were left."""
    copy = tmp_path_factory.mktemp("release") / "taskmoe"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, copy / path.name, ignore=ignored)
        elif path.is_file() and path.name != ".git":  # which is a file in a second work tree
            shutil.copy(path, copy)
    for stray in STRAYS:
        (copy / stray).write_text("left over", encoding="utf-8")
    done = run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the wheel, jax, numpy and what these need."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    core = folder / "core"
    core.mkdir()
    (site / "core.pth").write_text(f"{core}\n", encoding="utf-8")
    for distribution in with_needs(CORE):
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (core / name).symlink_to(Path(str(distribution.locate_file(name))).resolve())
    programs = folder / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    done = run(*pip, "install", "--no-index", "--no-deps", "--no-compile", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return programs


def with_needs(names: set[str]) -> list[metadata.Distribution]:
    """Installed distributions, and those that they need without any extra."""
    found: dict[str, metadata.Distribution] = {}
    left = sorted(names)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = metadata.distribution(name)
            needs = [Requirement(line) for line in found[name].requires or ()]
            left += [n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    return list(found.values())


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    wanted = {f"{name}/py.typed" for name in PACKAGES}
    for name in PACKAGES:
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*.py")}
    wanted -= {path for path in wanted if path.startswith("bench/suites/")}  # pytest's, no package
    wanted |= {"bench/gate/baseline/static.json", "bench/gate/baseline/timed.json"}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == {f"taskmoe/{n}" for n in wanted}
    about = {name.partition("/")[2] for name in names if ".dist-info/" in name}
    texts = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    assert about == {*texts, "licenses/LICENSE"}


def test_the_wheel_needs_jax_and_numpy_and_tells_its_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"taskmoe-{__version__}.dist-info/METADATA").decode()
    about = email.message_from_string(text)
    assert about["Version"] == __version__
    assert about["License-Expression"] == "Apache-2.0"
    needs = [Requirement(line) for line in about.get_all("Requires-Dist", [])]
    assert {need.name for need in needs if need.marker is None} == CORE


def test_a_layer_runs_with_jax_and_numpy_alone(scripts: Path) -> None:
    done = run(scripts / "python", "-W", "error", "-c", LAYER, cwd=scripts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[1] == f"{__version__} (2, 3, 8) True\n"
    assert Path(done.stdout.split()[0]).is_relative_to(scripts.parent)


@pytest.mark.parametrize("package", ["wmt", "bench"])
def test_command_lines_name_the_extra_that_they_lack(scripts: Path, package: str) -> None:
    module = (scripts / "python", "-m", f"taskmoe.{package}")
    for words in (module, (scripts / f"taskmoe-{package}",)):
        done = run(*words, cwd=scripts)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"python -m taskmoe.{package}: error: this needs the package")
        assert done.stderr.endswith(f"; pip install 'taskmoe[{package}]'\n")
        assert run(*words, "--version", cwd=scripts).stdout == f"taskmoe {__version__}\n"
