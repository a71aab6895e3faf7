"""The paper's models on TPU: parameters by part, bytes in all-to-alls, the search, the model."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.tpu import compiler
from taskmoe.bench.tpu.model import measure as tpu_model
from taskmoe.bench.tpu.model import search as tpu_model_search
from taskmoe.bench.tpu.model import step, view
from taskmoe.bench.tpu.model.step import (
    Step,
    busiest_link,
    exchange_bytes,
    group_size,
    longest_way,
)
from taskmoe.cli.errors import InputError
from taskmoe.kernels.quantized import nbytes
from taskmoe.moe.exchange import STRATEGIES
from taskmoe.moe.travel import Peers

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")

PEERS = ",".join(map(str, range(32)))


def line(result: str) -> str:
    """An all-to-all as the compiler writes it, in two groups of 32."""
    groups = "{{" + PEERS + "},{" + PEERS + "}}"
    return (
        f"  %a = {result} all-to-all(%r), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    )


ROWS = line("f32[32,2,512]{2,1,0:T(2,128)S(1)}")
LAYER = "\n".join([ROWS, line("pred[32,1,2]{2,1,0:T(4,128)(4,1)}"), ROWS])


def test_parameters_by_part_are_the_papers() -> None:
    table = tpu_model.parameters()
    for system, told in view.PAPER_MILLIONS.items():
        for part, millions in zip(tpu_model.PARTS, told, strict=True):
            if millions is not None:
                assert table[system][part] == pytest.approx(millions, abs=0.8), (system, part)
        assert sum(table[system][part] for part in tpu_model.PARTS[:3]) == pytest.approx(
            table[system]["all"]
        )
    ratio = table["token-MoE"]["decoder"] / table["sub-network"]["decoder"]
    assert ratio == pytest.approx(7.0, abs=0.05)


def test_bytes_sent_are_those_of_the_rows_and_their_masks() -> None:
    config = step.shapes("token-MoE")[1].moe("decoder")
    assert config is not None
    rows = STRATEGIES["all_to_all"].sent(config, 1024 // 64, Peers(32, ragged=True))
    masks = 31 * 2
    assert exchange_bytes(LAYER) == rows * 512 * 4 + masks
    # A planted wrong shape shows: rows of twice the width, a mask of words, fewer peers.
    assert exchange_bytes(LAYER.replace("2,512]", "2,1024]")) == 2 * rows * 512 * 4 + masks
    assert exchange_bytes(LAYER.replace("pred", "s32")) == rows * 512 * 4 + 4 * masks
    halves = LAYER.replace(PEERS, PEERS[: PEERS.index(",16")])
    assert exchange_bytes(halves) < exchange_bytes(LAYER)
    assert exchange_bytes("  %r = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}") == 0


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,32]<=[64]", 32),
        ("mesh['data'=2,'expert'=32] {'expert'}", 32),
        ("mesh['data'=2,'expert'=32] {'data','expert'}", 64),
        ("mesh['data'=2,'expert'=32] {'expert':(1)4}", None),  # a part of an axis
        ("", None),
    ],
)
def test_devices_of_a_group_in_every_form(groups: str, size: int | None) -> None:
    assert group_size(f"all-to-all(%r), replica_groups={groups}, dimensions={{0}}") == size


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("f32[32,2,512]", "c64[32,2,512]"),  # an element of unknown width
        ("f32[32,2,512]", "f32[33,1,3]"),  # what 32 peers do not divide
        ("all-to-all(", "all-to-all-start("),
        ("replica_groups", "groups"),
    ],
)
def test_an_unknown_all_to_all_is_no_silent_zero(old: str, new: str) -> None:
    with pytest.raises(ValueError, match="all-to-all"):
        exchange_bytes(LAYER.replace(old, new))


def test_busiest_link_by_hand() -> None:
    line = [(x, 0, 0) for x in range(4)]
    assert busiest_link(line) == pytest.approx(2 * 2 / 3)  # over the middle
    square = [(x, y, 0) for y in range(4) for x in range(4) for _ in range(2)]
    assert busiest_link(square) == pytest.approx(16 * 16 / 31 / 4)
    assert longest_way(square) == 6
    assert busiest_link([(0, 0, 0)] * 2) == 0  # two cores of a chip


@pytest.mark.parametrize("largest", [4, 5, 23, 24, 6144, 7000])
def test_the_search_finds_the_largest_batch_within_a_quarter(largest: int) -> None:
    asked = []

    def ask(system: str, chip: str, batch: int) -> Step:
        asked.append(batch)
        return Step(batch, "RESOURCE_EXHAUSTED: too much" if batch > largest else None)

    found = tpu_model_search.largest_batch("dense", "v3", ask)
    assert found.batch <= largest < found.batch * 1.25 + 1
    assert found.limit == "RESOURCE_EXHAUSTED: too much"
    assert asked == sorted(asked, reverse=True)


def test_another_error_ends_the_search() -> None:
    found = tpu_model_search.largest_batch("dense", "v3", lambda *_: Step(error="INTERNAL: a bug"))
    assert found == Step(error="INTERNAL: a bug")


def test_a_sub_network_in_fewer_bytes_reads_fewer() -> None:
    whole = step.shapes("sub-network")[0]
    sizes = {name: nbytes(step.shapes(name)[0]) for name in step.SMALLER}
    assert sizes["sub-network in bf16"] == pytest.approx(nbytes(whole) / 2, rel=1e-3)
    assert sizes["sub-network in int8"] == pytest.approx(nbytes(whole) / 4, rel=2e-2)
    one = Step(8, flops=197e9, read_bytes=82_000_000)  # v5e: 197 Tflop/s, 820 GB/s
    found = tpu_model.served_at("v5e", "sub-network", 8, lambda *_: one)
    assert found.step_s == pytest.approx(1e-3, rel=0.02)
    assert found.tokens_per_s == pytest.approx(8000, rel=0.02)
    twice = dataclasses.replace(one, read_bytes=2 * 820_000_000)
    found = tpu_model.served_at("v5e", "sub-network", 8, lambda *_: twice)
    assert found.step_s == pytest.approx(2e-3, rel=0.02)
    with pytest.raises(InputError, match="int8 of batch 8 does not compile for v5e: no"):
        tpu_model.served_at("v5e", "sub-network in int8", 8, lambda *_: Step(error="no"))


@needs_libtpu
@pytest.mark.parametrize("system", step.SMALLER)
def test_a_sub_network_in_fewer_bytes_compiles_for_one_core(system: str) -> None:
    found = step.compile_step(system, "v5e", 8)
    assert found.error is None
    assert found.collectives == {}
    assert found.read_bytes < 140e6


def test_model_by_hand() -> None:
    sub = Step(2, flops=1.0, read_bytes=412_500_000, optimal_s=2e-3)
    token = dataclasses.replace(
        sub,
        batch=64,
        collectives={"all-to-all": 2},
        exchange_bytes=41_000_000,
        busiest_link=2.0,
        hops=6,
    )
    wire_s = 41e6 * 2 / 82e9 + 2 * 6 * 1e-6
    for by, compute_s in (("roofline", 1e-3), ("compiler", 2e-3)):
        row = tpu_model.compare("v3", token, sub, by)
        assert row.sub.step_s == pytest.approx(compute_s)
        assert row.sub.communication_share == 0
        share = row.token.communication_share
        assert share == pytest.approx(wire_s / (compute_s + wire_s))
        assert row.throughput_ratio == pytest.approx(2 * (compute_s + wire_s) / compute_s)
        half, twice = row.sensitivity["half"], row.sensitivity["twice"]
        assert half.token.communication_share > share
        assert twice.throughput_ratio < row.throughput_ratio
        links = {"v3": tpu_model.Link(tpu_model.needed("v3", row), "")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpu_model, "LINKS", links)
            again = tpu_model.compare("v3", token, sub, by)
        assert again.token.communication_share == pytest.approx(0.25)


@needs_libtpu
def test_steps_compile_and_only_the_mixture_exchanges() -> None:
    with tpu_model_search.compiler() as ask:
        sub, token = ask("sub-network", "v5e", 16), ask("token-MoE", "v5e", 64)
    assert sub.collectives == {}
    assert sub.exchange_bytes == sub.kernels == sub.hops == 0
    assert sub.hbm_bytes > 4 * 154e6
    assert token.collectives == {"all-to-all": 9}
    assert token.kernels > 0
    assert token.exchange_bytes == 3 * (2 * 31 * 512 * 4 + 31)  # one row an expert


@needs_libtpu
def test_tables_and_json(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Step(hbm_bytes=2**30, read_bytes=2**29, flops=1e9, optimal_s=1e-3, kernels=18)
    token = {
        "collectives": {"all-to-all": 9},
        "exchange_bytes": 10**6,
        "busiest_link": 2.0,
        "hops": 6,
    }

    class Fake:
        def __enter__(self) -> Any:
            return lambda system, chip, batch: dataclasses.replace(
                facts, batch=batch, **(token if system == "token-MoE" else {})
            )

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(tpu_model, "compiler", Fake)
    path = tmp_path / "model.json"
    assert main(["tpu", "--model", "wmt", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("modelled", "1.87", "26.9%", "25%", "656 Gbit/s", "no overlap", "54 us"):
        assert words in out
    found = json.loads(path.read_text())
    assert [one["chip"] for one in found["chips"]] == ["v3"]
    assert {row["batches"] for row in found["chips"][0]["scenarios"]} == {
        "the blog's", "equal a core", "largest",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "big"], "--model must be of wmt, got 'big'"),
        (["--model", "wmt", "--chips", "v3,v9"], "--chips must be of v3, v5e, v6e"),
        (["--model", "wmt", "--ops", "gmm"], "go with --kernels, not with --model"),
        (["--model", "wmt", "--kernels"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], message: str, capsys: Any
) -> None:
    try:
        code = main(["tpu", *options])
    except SystemExit as stop:  # the parser's own
        code = int(str(stop.code))
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_without_libtpu_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="libtpu, the TPU compiler, is not installed"):
        compiler.need_libtpu()


@needs_libtpu
def test_where_libtpu_would_abort_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "CPUS_FILE", tmp_path / "possible")
    with pytest.raises(InputError, match=r"needs .*possible: mount /sys"):
        compiler.need_libtpu()
