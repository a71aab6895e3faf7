"""An exported model translates in a process that knows nothing of this library."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.model.decoding import length_limit
from taskmoe.wmt.model.export import export
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.saved import flatten, load_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.translation import Decoding, translate

FULL = support.model(tie_embeddings=False)

#: The first program in the documentation, which takes a folder, a language and sentences.
TRAINER = (support.ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
PROGRAM, _ = re.findall(r"```py\n(.*?)```", TRAINER, re.DOTALL)
ALONE = 'assert not any(name.startswith("taskmoe") for name in sys.modules)'


@pytest.mark.parametrize(
    ("beam", "int8", "batch"), [(1, False, 8), (2, False, None), (2, True, None), (2, True, 8)]
)
def test_a_clean_process_translates_identically(
    tmp_path: Path, beam: int, int8: bool, batch: int | None
) -> None:
    small = extract(FULL, "de")
    if int8:
        small = dataclasses.replace(small, params=quantized(small.params))
    size = export(small, tmp_path / "m", batch=batch, length=40, beam=beam)
    assert size == (tmp_path / "m" / "translate.stablehlo").stat().st_size
    # Short and long ones, which end at limits of their own; one that is cut, and an empty one.
    one = support.sentences("en", 4, seed=3)
    lines = [*one, " ".join(one * 2), "", " one", " ".join(one * 4)]
    command = [sys.executable, "-c", PROGRAM + ALONE, str(tmp_path / "m"), "de", *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    requests = [("en-de", line) for line in lines]
    want = translate(small, requests, Decoding(beam=beam, max_source=40))
    assert json.loads(done.stdout) == want
    assert len(set(want)) > 4
    assert want[5] == ""
    limits = [length_limit(len(ids)) for ids in small.tokenizer.encode_source(lines[:5], "de")]
    assert len(set(limits)) > 1
    some = [len(ids) for ids in small.tokenizer.encode_target(want[:5])]
    assert any(n >= limit for n, limit in zip(some, limits, strict=True))
    # The folder is a model folder too, for those who have the library.
    loaded = load_model(tmp_path / "m")
    assert translate(loaded, requests, Decoding(beam=beam, max_source=40)) == want
    other = translate(extract(FULL, "fr"), [("en-fr", x) for x in lines], Decoding(beam=beam))
    assert other != want


def test_one_program_takes_any_batch_and_length_on_several_platforms(tmp_path: Path) -> None:
    small = extract(FULL, "de")
    export(small, tmp_path / "m", length=40, platforms=("cpu", "tpu", "cuda"))
    about = json.loads((tmp_path / "m" / "export.json").read_text())
    program = jax.export.deserialize(
        bytearray((tmp_path / "m" / "translate.stablehlo").read_bytes())
    )
    assert list(program.platforms) == about["platforms"] == ["cpu", "tpu", "cuda"]
    assert about["batch"] is None
    assert about["jax"] == jax.__version__
    assert program.calling_convention_version == about["calling_convention"]
    assert about["jax"] in about["readable"]
    leaves = [flatten(small.params)[name] for name in about["parameters"]]
    lines = support.sentences("en", 5, seed=3)
    want = translate(small, [("en-de", line) for line in lines], Decoding(beam=4))
    ids = small.tokenizer.encode_source(lines, "de")
    for rows, width in ((5, 40), (5, 17), (2, 16), (1, 24)):
        source = np.zeros((rows, width), np.int32)
        for row, one in zip(source, ids, strict=False):
            row[: len(one)] = one
        found = np.asarray(program.call(leaves, source))
        rows_of = [[int(i) for i in row if i not in (0, 3)] for row in found]
        assert small.tokenizer.decode(rows_of) == want[:rows]
    with pytest.raises(ValueError, match="shapes"):  # longer than it was exported for
        program.call(leaves, np.zeros((1, 41), np.int32))
    export(small, tmp_path / "fixed", batch=2, length=16)
    fixed = (tmp_path / "fixed" / "translate.stablehlo").read_bytes()
    with pytest.raises(ValueError, match="hape"):
        jax.export.deserialize(bytearray(fixed)).call(leaves, np.zeros((3, 16), np.int32))


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    small = extract(FULL, "de")
    with pytest.raises(InputError, match="extract a task first"):
        export(FULL, tmp_path / "m")
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        export(small, tmp_path / "m", batch=0)
    with pytest.raises(InputError, match="max_length must be at least 1, got 0"):
        export(small, tmp_path / "m", max_length=0)
    with pytest.raises(InputError, match="platforms must be of cpu, tpu, cuda, rocm, got 'abacus'"):
        export(small, tmp_path / "m", platforms=("abacus",))
    assert not (tmp_path / "m").exists()
