"""Reading the TPU compiler's dumps: the main loop, its slots and spills, and unknown formats."""

from pathlib import Path

import pytest

from taskmoe.bench.tpu import schedule

BUNDLES = """
= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sphi }
   0x2   : > { %v1 = vld }
   0x3 PF: > { %v2 = vmatmul }
   0x4   : > { %v3 = vmatmul }
   0x5   : > { %v4 = vst }
   0x6 LB: >> { %v5 = vmatmul }
   0x7 PF:  { %s3 = sfence }
"""
SLOTS = """== CAPACTIY:
MXU, VLOAD:FILL, VSTORE:SPILL
    2     1     1
== UTILIZATION:
0 0 0
0 0 0
0 1 0
2 0 0
2 1 0
0 0 1
1 0 0
0 0 0
"""


def test_the_main_loop_is_the_run_with_most_products() -> None:
    found = schedule.read_schedule("k", BUNDLES, SLOTS)
    assert (found.bundles, found.main_bundles, found.spills) == (8, 3, 2)
    assert found.filled["MXU"] == pytest.approx(4 / 6)


def test_a_planted_bundle_shows() -> None:
    bundles = BUNDLES.replace("   0x5   :", "   0x4   : > { nop }\n   0x5   :")
    slots = SLOTS.replace("0 0 1\n", "0 0 0\n0 0 1\n")
    found = schedule.read_schedule("k", bundles, slots)
    assert found.main_bundles == 4
    assert found.filled["MXU"] == pytest.approx(4 / 8)


def test_a_kernel_without_products_has_its_longest_loop() -> None:
    slots = "\n".join(
        line if i < 4 else "0" + line[1:] for i, line in enumerate(SLOTS.splitlines())
    )
    assert schedule.read_schedule("k", BUNDLES, slots).main_bundles == 3


@pytest.mark.parametrize(
    ("bundles", "slots", "message"),
    [
        (BUNDLES, SLOTS + "0 0 0\n", "8 bundles but slots of 9"),
        (BUNDLES, "nothing", "not of the known format"),
        (BUNDLES, SLOTS.replace("MXU", "TPU"), "not of the known format"),
        (BUNDLES, SLOTS.replace("0 0 1", "0 1"), "not of the known format"),
    ],
)
def test_unknown_formats_are_said(bundles: str, slots: str, message: str) -> None:
    with pytest.raises(schedule.ScheduleError, match=message):
        schedule.read_schedule("k", bundles, slots)


def test_files_of_a_kernel_are_found_by_its_plain_name(tmp_path: Path) -> None:
    with pytest.raises(schedule.ScheduleError, match="no schedule of gmm: this libtpu may not"):
        schedule.read_schedules(tmp_path, {"gmm"})
    stem = "12345-transpose_jvp_gmm__.1"
    (tmp_path / f"{stem}-72-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / f"{stem}-71-schedule-analysis_final_bundles.txt").write_text("")
    with pytest.raises(schedule.ScheduleError, match="no slot utilization beside"):
        schedule.read_schedules(tmp_path, {"gmm"})
    (tmp_path / f"{stem}-70-{schedule.UTILIZATION}").write_text(SLOTS)
    (found,) = schedule.read_schedules(tmp_path, {"gmm"})
    assert (found.kernel, found.main_bundles) == ("gmm", 3)


def test_vmem_of_kernels_in_the_hlo() -> None:
    hlo = (
        '%jvp_taskmoe_gmm_.3 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0",'
        '"size":"4096"}]}\n%add.1 = f32[] add(%a, %b)\n'
    )
    assert schedule.kernel_vmem_bytes(hlo) == {"taskmoe_gmm": 4096}
