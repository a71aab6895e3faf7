"""An exported model translates in a process that knows nothing of this library."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.model.decoding import length_limit
from taskmoe.wmt.model.export import export
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.saved import load_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.translation import Decoding, translate

FULL = support.model(tie_embeddings=False)

#: The first program in the documentation, which takes a folder, a language and sentences.
TRAINER = (support.ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
PROGRAM, _ = re.findall(r"```py\n(.*?)```", TRAINER, re.DOTALL)
ALONE = 'assert not any(name.startswith("taskmoe") for name in sys.modules)'


@pytest.mark.parametrize(("beam", "int8"), [(1, False), (2, False), (2, True)])
def test_a_clean_process_translates_identically(tmp_path: Path, beam: int, int8: bool) -> None:
    small = extract(FULL, "de")
    if int8:
        small = dataclasses.replace(small, params=quantized(small.params))
    size = export(small, tmp_path / "m", batch=8, length=40, beam=beam)
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
