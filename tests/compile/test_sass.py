"""The reader of the assembler's code, on which the tests of kernels rely: it must not miss a spill."""

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")
test_kernels = pytest.importorskip("tests.compile.test_kernels")
from tests.compile import sass  # noqa: E402 - needs Triton

LOOP = """
        /*0000*/                   STL [R1], R0 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0040*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   LDL R3, [R1] ;
.L_x_2:
        /*0060*/                   FADD R4, R4, R3 ;
        /*0070*/                   LDL.64 R6, [R1+0x8] ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
"""


def test_loops_are_circles_of_the_control_flow():
    """Before and after a loop does not count, nor where warps wait for their part of the program."""
    code, edges = sass._graph(LOOP)
    assert [code[i] for i in sorted(sass._on_circles(edges))] == [
        "FADD R4, R4, R3",
        "LDL.64 R6, [R1+0x8]",
        "@P1 BRA `(.L_x_2)".partition(" ")[2],
    ]


def test_a_kernel_that_spills_is_found(tmp_path):
    """With half of the registers that it wants: what the assembler writes is understood."""
    launch = test_kernels.launch_for(90, 128, 128).keys
    sizes = {"TILE_QUERIES": 128, "BLOCK_KEYS": 64, "UNIT": 1, "D": 128, "PARTS": 1}
    constants = {**sizes, "AHEAD": False, "HAS_TAIL": True}
    made = test_kernels.compiled(
        test_kernels.attend_fwd.attend_kernel,
        90,
        constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=128,
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    assert sass.resources(cubin)[1] > 100 and len(sass.spills_in_loops(cubin)) > 10
