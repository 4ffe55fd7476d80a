"""Kernels compiled for every GPU of the launch table, without a GPU: no spills, shared memory fits."""

import itertools
import os

import pytest
import torch
from fgattn import Settings, TokenLayout
from fgattn.backends import hopper, selftest
from fgattn.backends import triton as portable
from fgattn.backends.shared import plan_table
from fgattn.backends.shared.available import HEAD_DIMS
from fgattn.backends.shared.plan_table import PLAN_TABLE, amd_generation, plan_launch_of
from fgattn.backends.triton.launch_table import TABLE, launch_for
from fgattn.call import Call

from tests.compile.sass import resources, spills_in_loops

triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")
attend_fwd = pytest.importorskip("fgattn.backends.triton.attend")
prepared = pytest.importorskip("fgattn.backends.shared.prepared")
gluon = pytest.importorskip("triton.experimental.gluon._runtime", reason="this Triton has no Gluon")
gluon_language = pytest.importorskip("triton.experimental.gluon.language")
lists = pytest.importorskip("fgattn.backends.shared.lists")
attend_hopper = pytest.importorskip("fgattn.backends.hopper.attend")
hopper_lister = pytest.importorskip("fgattn.backends.hopper.lister")
hopper_producers = pytest.importorskip("fgattn.backends.hopper.producers")
tail = pytest.importorskip("fgattn.backends.shared.tail")
tail_hopper = pytest.importorskip("fgattn.backends.hopper.tail")
select = pytest.importorskip("fgattn.backends.shared.select")
join = pytest.importorskip("fgattn.backends.shared.join")
refine = pytest.importorskip("fgattn.backends.shared.refine")
summarise = pytest.importorskip("fgattn.backends.shared.summarise")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("interpreted kernels cannot be compiled: run tests/compile without TRITON_INTERPRET")

NVIDIA_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block's share, CUDA programming guide
AMD_WAVE = {"gfx90a": 64, "gfx942": 64, "gfx1030": 32, "gfx1100": 32, "gfx1201": 32}
AMD_KIB = 64  # of local data share for a work-group
BROKEN = (
    {"gfx1030"} if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else set()
)  # for any kernel
ARCHS = [arch for arch in (*NVIDIA_KIB, *AMD_WAVE) if arch not in BROKEN]
TYPES = {
    **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
    **dict.fromkeys(("lists", "listed", "entries", "query_rows", "key_rows"), "*i32"),
    **dict.fromkeys(("tail_out", "tail_lse"), "*fp32"),
    **dict.fromkeys(("bits", "cell_bits", "joined_bits", "always"), "*u8"),
    **dict.fromkeys(("order", "joined_order", "words", "sources"), "*i32"),
    **dict.fromkeys(("requested_pairs", "executed_pairs"), "*fp64"),
    **dict.fromkeys(("scale", "half", "bound"), "fp32"),
    **dict.fromkeys(("stride_q", "stride_k", "stride_v", "stride_out"), ("i32", "i32", "i32")),
    **dict.fromkeys(("x", "centroid", "square", "mean", "variance", "second", "value"), "*bf16"),
    **dict.fromkeys(("rows", "widths", "counts", "valid"), "*i32"),
    "exists": "*u8",
    **dict.fromkeys(("lse", "limits", "totals", "weights"), "*fp32"),
}
BOXES = ("k_flat", "k_wide", "k_deep", "v_flat", "v_wide", "v_deep")  # tensor maps of the attention kernel
NO_DEVICES = itertools.count(1000)


def box_type():
    """The type of a tensor map, as a launch on bf16 tensors would give it."""
    box = hopper_producers.descriptors(torch.empty(2, 64, 64, dtype=torch.bfloat16), (1, 4, 16))[0]
    return f"tensordesc<bf16{box.block_shape},{box.layout!r}>"


def compiled(kernel, arch, constants, types=(), **options):
    """The kernel for one architecture, specialised as a launch on aligned tensors would be.

    types: of arguments that TYPES does not know, such as tensor maps.
    """
    signature, aligned, types = {}, {}, TYPES | dict(types)
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = signature[name] = types.get(name, "i32")
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            continue
        general = kernel.params[i].do_not_specialize  # one variant for every value
        assert name in types or general or name.startswith("stride_"), f"what type is {name}?"
        if kind != "fp32" and not general:
            places = [(i,)] if isinstance(kind, str) else [(i, j) for j in range(len(kind))]
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    make = gluon.GluonASTSource if kernel.is_gluon() else triton.compiler.ASTSource
    source = make(kernel, signature, constexprs=places, attrs=aligned)
    backend, wave = ("hip", AMD_WAVE[arch]) if arch in AMD_WAVE else ("cuda", 32)
    target = triton.backends.compiler.GPUTarget(backend, arch, wave)
    return triton.compile(source, target=target, options=options | prepared.ALWAYS)


def generation_of(arch):
    """The row of the launch tables that an architecture takes."""
    return amd_generation(arch) if arch in AMD_WAVE else arch


def check(made, arch, folder, programs=1, reloads=0):
    """Shared memory suffices for so many programs, and loops do not spill. Returns registers of a thread.

    Of AMD's GPUs only shared memory is looked at here.

    What is spilled outside of loops, arguments mostly, costs nothing that can be measured. reloads: so many
    instructions of all loops together may reload, or store, what is spilled.
    """
    if arch in AMD_WAVE:
        assert made.metadata.shared <= AMD_KIB * 1024
        return None
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    registers, stack = resources(cubin)
    spilled = spills_in_loops(cubin) if stack else []
    assert programs * (made.metadata.shared + 1024) <= (NVIDIA_KIB[arch] + 1) * 1024
    assert len(spilled) <= reloads, f"{made.name}: {registers} registers, {spilled}"
    return registers


def test_table_is_complete():
    """Every GPU generation that can run the kernel, both head sizes, both tile heights."""
    generations = {*map(generation_of, (*NVIDIA_KIB, *AMD_WAVE)), "xpu"}
    assert set(itertools.product(generations, HEAD_DIMS, (64, 128))) == set(TABLE)
    assert set(PLAN_TABLE) <= generations and {g for g in generations if isinstance(g, str)} <= set(
        PLAN_TABLE
    )
    for (_, _, tile), row in TABLE.items():
        assert tile // row.parts >= 16
        for launch in (row.keys, row.cells):
            assert launch.block_keys % 16 == 0 and launch.warps in (4, 8, 16) and launch.stages >= 1


@pytest.mark.parametrize(
    ("arch", "row"), [(75, 80), (80, 80), (87, 86), (89, 89), (90, 90), (103, 100), (121, 120), (200, 120)]
)
def test_unknown_gpu_takes_the_row_below(arch, row):
    """A new GPU runs with settings that fit an older one."""
    for dim, tile in itertools.product(HEAD_DIMS, (64, 128)):
        assert launch_for(arch, dim, tile) == TABLE[row, dim, tile]


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("gfx90a:sramecc+:xnack-", "cdna"),
        ("gfx942", "cdna"),
        ("gfx950", "cdna"),
        ("gfx906", "rdna2"),
        ("gfx1030", "rdna2"),
        ("gfx1100", "rdna3"),
        ("gfx1151", "rdna3"),
        ("gfx1201", "rdna3"),
        ("gfx1300", "rdna2"),
    ],
)
def test_amd_is_known_by_its_architecture(name, generation, monkeypatch):
    """ROCm's compute capability, 9.0 of gfx90a, is not NVIDIA's."""
    properties = type("Properties", (), {"gcnArchName": name})
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    plan_table.generation.cache_clear()
    assert plan_table.generation(torch.device("cuda", 0)) == generation
    plan_table.generation.cache_clear()
    assert plan_table.generation(torch.device("xpu", 0)) == "xpu"


@pytest.mark.parametrize("unit", [1, 16], ids=["keys", "cells"])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_attend_kernel(arch, dim, tile, unit, tmp_path):
    """A spill costs more than any setting of the table gains; too much shared memory does not launch.

    With the tail, which needs more of both.
    """
    row = launch_for(generation_of(arch), dim, tile)
    launch = row.keys if unit == 1 else row.cells
    made = compiled(
        attend_fwd.attend_kernel,
        arch,
        num_warps=launch.warps,
        num_stages=launch.stages,
        constants={
            "TILE_QUERIES": tile // row.parts,
            "PARTS": row.parts,
            "BLOCK_KEYS": launch.block_keys,
            "UNIT": unit,
            "AHEAD": launch.ahead,
            "D": dim,
            "HAS_TAIL": True,
        },
    )
    check(made, arch, tmp_path)
    if arch not in AMD_WAVE:
        assert f"sm_{arch}" in made.asm["ptx"]
        return
    assert arch in made.asm["amdgcn"]
    if arch not in ("gfx1030", "gfx1100"):  # the one spills in any step, the other from Triton 3.7 on
        assert ".vgpr_spill_count: 0" in made.asm["amdgcn"]


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("arch", ARCHS)
def test_list_kernel(arch, unit, tmp_path):
    """The list of every tile is made on the device."""
    constants = {
        "UNIT": unit,
        "SLICE_UNITS": 1,
        "HAS_ENTRIES": unit == 1,
        "CHECKED": False,
        "BLOCK": lists.LIST_BLOCK,
    }
    made = compiled(lists.list_kernel, arch, constants, num_warps=4)
    check(made, arch, tmp_path)
    assert made.metadata.shared < 16 * 1024


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_planning_kernels(arch, dim, tmp_path):
    """Summaries, selection and tail run with one setting on every GPU."""
    tiles = {
        "BLOCK_QUERY_CELLS": 64,
        "BLOCK_KEY_CELLS": tail.BLOCK_KEY_CELLS,
        "D": dim,
        "TILE_CELLS": 8,
        "CELL_SLICES": 1,
        "SLICE_CELLS": 1,
    }
    for kernel, num_warps, stages, constants in (
        (summarise.summarise_kernel, 4, 3, {"CELLS": summarise.CHANNELS // dim, "D": dim, "SECOND": True}),
        (
            join.join_kernel,
            join.WARPS,
            3,
            {
                "WINDOW": join.WINDOW,
                "TILE_CELLS": 1,
                "FARTHEST": join.FARTHEST,
                "BLOCK_BYTES": join.BLOCK_BYTES,
                "COUNT": True,
            },
        ),
        (tail.tail_kernel, tail.WARPS, tail.STAGES, {**tiles, "order": None}),
        (tail.tail_kernel, tail.WARPS, tail.STAGES, {**tiles, "TILE_CELLS": 4}),
    ):
        types = {"executed_pairs": "*i64"} if kernel is join.join_kernel else {}
        made = compiled(kernel, arch, constants, types, num_warps=num_warps, num_stages=stages)
        check(made, arch, tmp_path)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCHS)
def test_selection_kernels(arch, dim, tmp_path):
    """Each GPU's settings: the passes over cells and over keys, and what makes slices of their words."""
    launch = plan_launch_of(generation_of(arch))
    block, keys = {"BLOCK_QUERY_CELLS": launch.query_cells, "D": dim}, {"BLOCK_KEYS": launch.keys}
    cells = {**block, "BLOCK_KEY_CELLS": launch.key_cells}
    slices = {"TILES": refine.SLICE_TILES, "WORDS": refine.SLICE_WORDS}
    width = {64: "*i16", 128: "*i32"}
    for kernel, bits, num_warps, stages, constants in (
        (select.total_kernel, None, launch.warps, launch.stages, {**cells, "sources": None}),
        (select.total_kernel, None, launch.warps, launch.stages, cells),
        *(
            (
                select.select_kernel,
                width[launch.key_cells],
                launch.warps,
                launch.stages,
                {**cells, "TILE_CELLS": query_cells},
            )
            for query_cells in (1, 8)
        ),
        (
            refine.refine_kernel,
            width[launch.keys],
            launch.key_warps,
            launch.key_stages,
            {**block, **keys, "TILE_CELLS": 8, "order": None},
        ),
        (
            refine.refine_kernel,
            width[launch.keys],
            launch.key_warps,
            launch.key_stages,
            {**block, **keys, "TILE_CELLS": 1},
        ),
        (
            select.slice_kernel,
            "*u8",
            1,
            3,
            {"TILE_QUERIES": 128, "SLICE_CELLS": 1, "TILES": select.SLICE_TILES, "BYTES": select.SLICE_BYTES},
        ),
        (
            refine.key_slice_kernel,
            "*i32",
            4,
            3,
            {**slices, "TILE_CELLS": 8, "JOINED": 1, "SLICE_KEYS": 1, "order": None},
        ),
        (refine.key_slice_kernel, "*u8", 4, 3, {**slices, "TILE_CELLS": 1, "JOINED": 4, "SLICE_KEYS": 8}),
    ):
        types = {"bits": bits, "exists": "*i32" if kernel is refine.key_slice_kernel else "*u8"}
        made = compiled(kernel, arch, constants, types, num_warps=num_warps, num_stages=stages)
        check(made, arch, tmp_path)


@pytest.mark.parametrize("split", [1, 4, 16, 128, "box"])
@pytest.mark.parametrize(("dim", "tile"), attend_hopper.TABLE, ids=str)
def test_hopper_kernel(dim, tile, split, tmp_path):
    """Loops do not spill, but for two words of a gatherer with Triton 3.9, and the programs fit on the SM."""
    launch, boxed = attend_hopper.TABLE[dim, tile], split == "box"
    limit = {} if launch.max_registers is None else {"maxnreg": launch.max_registers}
    constants = {
        "CONSUMERS": tile // 64,
        "BLOCK_KEYS": launch.block_keys,
        "D": dim,
        "SLICE_KEYS": None if boxed else split,
        "STAGES": launch.stages,
        "HAS_TAIL": True,
        "GATHERS": not boxed,
        "REGISTERS": attend_hopper.BOX_REGISTERS if boxed else launch.registers,
        "GATHERERS": launch.gatherers,
    }
    constants |= dict.fromkeys(("bits", "valid", "key_rows") if boxed else (*BOXES, "lists"))
    if not boxed and split != 4:  # all keys exist
        constants["valid"] = None
    maps = dict.fromkeys(BOXES, box_type()) if boxed else {}
    made = compiled(attend_hopper.hopper_kernel, 90, constants, maps, num_warps=4, **limit)
    programs = 1 if launch.max_registers is None else 2
    threads = 128 * (tile // 64) + 32 * (4 if boxed else -(-(launch.gatherers + tile // 32) // 4) * 4)
    assert programs * threads * check(made, 90, tmp_path, programs, reloads=2) <= 65536
    assert "wgmma" in made.asm["ptx"] and "setmaxnreg" in made.asm["ptx"]
    assert ("cp.async.bulk.tensor" in made.asm["ptx"]) == boxed


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("split", [1, 2, 16, 128])
def test_count_kernel(split, checked, tmp_path):
    """Keys of every tile are counted on the device."""
    constants = {"SLICE_KEYS": split} if checked else {"SLICE_KEYS": split, "valid": None}
    made = compiled(hopper_lister.count_kernel, 90, constants, num_warps=4)
    check(made, 90, tmp_path)


@pytest.mark.parametrize("n", [1, 2, 16, 128])
@pytest.mark.parametrize("tile_cells", [4, 8])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_hopper_tail_kernel(dim, tile_cells, n, tmp_path):
    """The ring fits; of some hundred instructions of a step, few reload words, most of them where N is 1."""
    block = [1, tail_hopper.STEP.value, dim]
    layout = gluon_language.NVMMASharedLayout.get_default_for(block, gluon_language.bfloat16)
    constants = {
        "D": dim,
        "TILE_CELLS": tile_cells,
        "SLICE_KEYS": n,
        "STAGES": tail_hopper.STAGES,
        "REGISTERS": tail_hopper.REGISTERS,
    }
    if n > 1:
        constants |= {"valid": None, "order": None}
    maps = dict.fromkeys(("mean", "value"), f"tensordesc<bf16{block},{layout!r}>")
    made = compiled(tail_hopper.tail_hopper_kernel, 90, constants, maps, num_warps=4)
    assert check(made, 90, tmp_path, reloads=10) * 512 <= 65536
    assert all(name in made.asm["ptx"] for name in ("wgmma", "setmaxnreg", "cp.async.bulk.tensor"))


@pytest.fixture
def compiles(monkeypatch):
    """Names of kernels that launches have Triton compile, for an H100 that is not there."""

    class Driver:
        def get_current_target(self):
            return triton.backends.compiler.GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return device

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device):
            return 0

    names, device = [], next(NO_DEVICES)  # another one each time: Triton keeps kernels by device
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda src, **_: names.append(src.name))
    for module in (plan_table, attend_fwd):
        monkeypatch.setattr(module, "generation", lambda device: 90)
    plan_table.plan_launch.cache_clear()
    yield names
    plan_table.plan_launch.cache_clear()


@pytest.mark.parametrize(
    ("backend", "probe", "settings"),
    [
        (hopper.BACKEND, hopper.BY_BOXES, Settings()),
        (hopper.BACKEND, hopper.BY_ROWS, Settings(tile_keys=1)),
        (portable.BACKEND, portable.PROBE, Settings()),
    ],
    ids=["boxes", "rows", "portable"],
)
def test_a_run_finds_the_kernels_of_the_self_test(backend, probe, settings, compiles):
    """First use compiles nothing twice: all kernels at once, and no other for any video, heads and batch."""
    selftest.compile_ahead(backend, selftest.case(torch.device("cpu"), probe))
    assert {"total_kernel", "select_kernel", "summarise_kernel"} < set(compiles)
    assert len(compiles) == len(set(compiles))
    compiles.clear()
    for grid, batch, heads, front in (((5, 12, 16), 1, 12, 0), ((3, 10, 12), 2, 1, 77), ((1, 4, 8), 1, 3, 0)):
        layout = TokenLayout(grid, front)
        q, k, v = torch.zeros(3, batch, heads, layout.length, 128, dtype=torch.bfloat16).unbind()
        by_token = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        selftest.compile_ahead(backend, Call.to_plan(*by_token, settings, layout))
    assert not compiles
