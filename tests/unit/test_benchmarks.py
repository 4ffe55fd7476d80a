"""The benchmarks' registry, runner, targets and report, without a GPU: nothing is timed here."""

import csv
import re
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import (
    __main__,
    first_use,
    generations,
    measure,
    peers,
    plot,
    registry,
    report,
    runner,
    targets,
)
from benchmarks.runner import Case, Run
from benchmarks.shapes import QKV

MACHINE = {
    "gpu": "a GPU",
    "torch": "2",
    "triton": "3",
    "python": "3.12",
    "date": "2026-01-01",
    "commit": "12e4567",
}


def clock(*calls, repeats, warmup):
    """Times of 10, 5, 2.5 ... ms, in place of a GPU's."""
    return [{"ms": 10 / 2**i, "ms_p20": 9.0, "ms_p80": 11.0} for i, _ in enumerate(calls)]


def make_run(name="ours", error=0.001, call=lambda: None, **columns):
    return Run(name, call, lambda out: error, 0.01, columns)


def fail(*_):
    raise RuntimeError("out of\nmemory")


def case_of(*runs, **columns):
    return Case({"case": "test", **columns}, lambda: list(runs))


def test_registry_has_every_verb():
    assert tuple(registry.REGISTRY) == report.BENCHMARKS
    assert set(targets.TARGETS) <= set(registry.REGISTRY)
    assert all(callable(source) for sources in registry.REGISTRY.values() for source in sources)


def test_nothing_is_measured_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        __main__.main(["kernel"])
    assert stop.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err


def test_quantiles():
    assert measure.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"ms": 3.5, "ms_p20": 2.0, "ms_p80": 5.0}
    assert measure.quantiles([7.0]) == {"ms": 7.0, "ms_p20": 7.0, "ms_p80": 7.0}


def test_rows_have_ratios_to_the_first_run():
    dense, ours = runner.rows_of(
        case_of(make_run("dense", density=1.0), make_run("ours", density=0.3), L=7), clock
    )
    assert dense["ratio"] == 1 and dense["status"] == runner.MEASURED
    assert ours["yardstick"] == "dense" and ours["yardstick_ms"] == 10 and ours["speedup"] == 2
    assert ours["ratio"] == pytest.approx(0.6) and ours["error"] == 0.001 and ours["L"] == 7
    assert {"ms", "ms_p20", "ms_p80"} <= ours.keys()


def test_figures_are_added():
    case = Case({}, lambda: [make_run(), make_run()], figures=lambda row: {"twice": 2 * row["ms"]})
    assert [row["twice"] for row in runner.rows_of(case, clock)] == [20, 10]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (make_run("bad", error=0.02), "withheld: error 0.02, not below 0.01"),
        (make_run("bad", error=float("inf")), "withheld: error inf, not below 0.01"),
        (make_run("bad", error=float("nan")), "withheld: error nan, not below 0.01"),
        (make_run("bad", call=fail), "withheld: RuntimeError: out of memory"),
        (
            Run("bad", missing="not installed: No module named 'peer'"),
            "not installed: No module named 'peer'",
        ),
    ],
)
def test_a_row_that_fails_is_withheld_alone(bad, reason):
    rows = runner.rows_of(case_of(make_run("dense"), bad, make_run("good")), clock)
    assert [row["impl"] for row in rows] == ["dense", "bad", "good"]
    assert rows[1]["status"] == reason and "ms" not in rows[1] and "speedup" not in rows[1]
    assert rows[2]["status"] == runner.MEASURED and rows[2]["ms"] == 5


def test_without_a_yardstick_nothing_is_measured():
    rows = runner.rows_of(case_of(make_run("dense", error=1.0), make_run()), clock)
    assert not [row for row in rows if "ms" in row or row["status"] == runner.MEASURED]


def test_a_case_that_cannot_be_made_or_timed_is_withheld():
    made = runner.rows_of(Case({"case": "huge"}, fail), clock)
    assert made == [{"case": "huge", "status": "withheld: RuntimeError: out of memory"}]
    timed = runner.rows_of(case_of(make_run()), lambda *calls, **_: fail())
    assert timed[0]["status"] == "withheld: RuntimeError: out of memory" and "ms" not in timed[0]


def test_one_failure_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "machine", lambda commit: MACHINE | {"commit": commit})

    def broken(quick):
        yield case_of(make_run("first"))
        fail()

    def fine(quick):
        yield {"case": "finished", "impl": "by hand", "status": runner.MEASURED, "ms": 1.23456}
        yield case_of(make_run("last"), quick=quick)

    runner.run("kernel", (broken, fine), True, tmp_path, "abc", clock=clock)
    rows, reached = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        for name in ("kernel", "kernel_targets")
    )
    assert [row["impl"] for row in rows] == ["first", "", "by hand", "last"]
    assert "out of memory" in rows[1]["status"] and rows[2]["ms"] == "1.235" and rows[3]["quick"] == "True"
    assert all(row["commit"] == "abc" and row["gpu"] == "a GPU" for row in rows)
    assert len(reached) == len(targets.TARGETS["kernel"])


def test_peers_that_are_missing_say_so(monkeypatch):
    qkv = QKV(*torch.randn(3, 1, 1, 64, 16))
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    for module in ("flash_attn", "flash_attn.cute", "flashinfer", "comfy_kitchen"):
        monkeypatch.setitem(sys.modules, module, None)
    for run in (
        peers.fa4(qkv),
        peers.fa4_sparse(qkv, mask, 64, 64),
        peers.flashinfer(qkv, mask, 64, 64),
        peers.sol(qkv, 1.0),
    ):
        assert run.missing.startswith("not installed: ") and run.name in report.NAMES | {"sol_attn": 0}


def test_a_peer_that_does_not_run_is_withheld(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(sol_attn=None))
    run = peers.sol(QKV(None, None, None), 1.0)
    assert run.missing.startswith("withheld: does not run here: AttributeError")


def make_masked(length=100, rows=32, keys=16, heads=2):
    qkv = QKV(*torch.randn(3, 1, heads, length, 16, generator=torch.Generator().manual_seed(0)))
    mask = (
        torch.rand(heads, -(-length // rows), -(-length // keys), generator=torch.Generator().manual_seed(1))
        < 0.5
    )
    mask[..., 0] = True
    dense = mask.repeat_interleave(rows, 1)[:, :length].repeat_interleave(keys, 2)[..., :length]
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=dense[None])
    return qkv, mask, dense, out


def test_block_sparse_peers_are_judged_by_their_mask():
    """Right output passes, dense output does not; density counts short tiles and slices."""
    qkv, mask, dense, out = make_masked()
    run = peers.block_sparse("peer", qkv, mask, (32, 16), None)
    assert run.error(out) < 1e-5 < 0.1 < run.error(torch.nn.functional.scaled_dot_product_attention(*qkv))
    assert run.columns["density"] == pytest.approx(dense.double().mean().item())


def test_sampled_error_merges_a_tail():
    qkv, mask, dense, _ = make_masked(length=96)
    q, k, v = qkv
    scores = (q @ k.transpose(2, 3) / 4).double()
    run = 96 // 16
    pooled, total = torch.randn(1, 2, run, 16), torch.randn(1, 2, run)
    weights = scores.masked_fill(~dense, -torch.inf)
    weights = torch.cat((weights, total.repeat_interleave(16, 2)[..., None].double()), 3).softmax(3)
    expected = weights[..., :-1] @ v.double() + weights[..., -1:] * pooled.repeat_interleave(16, 2).double()

    def kept(head, tile):
        return mask[head, tile].repeat_interleave(16)

    assert measure.sampled_error(qkv, expected, 32, kept=kept, tail=(pooled, total)) < 1e-6
    assert measure.sampled_error(qkv, expected, 32, kept=kept) > 1e-2
    assert measure.sampled_error(qkv, expected * float("nan"), 32, kept=kept) == float("inf")


def test_listed():
    counts, places = peers.listed(torch.tensor([[False, True, False, True]]))
    assert counts.tolist() == [2] and places[0, :2].tolist() == [1, 3]


KERNEL_ROW = {
    "case": "random lists",
    "impl": "hopper",
    "D": 128,
    "L": 32760,
    "M": 128,
    "density": 0.3,
    "status": targets.MEASURED,
}


def kernel_rows(**ratios):
    return [KERNEL_ROW | {"N": int(n[1:]), "ratio": ratio} for n, ratio in ratios.items()]


def by_figure(name, rows):
    return {line["figure"]: line for line in targets.table(name, rows)}


@pytest.mark.parametrize("ratio, met", [(0.94, "no"), (0.95, "yes"), (0.99, "yes"), (1.0, "stretch")])
def test_targets_that_are_met(ratio, met):
    line = by_figure("kernel", kernel_rows(n1=ratio))["M=128, N=1"]
    assert (line["value"], line["target"], line["stretch"], line["met"]) == (ratio, 0.95, 1.0, met)


def test_targets_are_the_worst_of_all_their_rows():
    figure = "M=128, N from 8 to 128, the lowest"
    rows = kernel_rows(n8=1.1, n16=0.9, n32=1.1, n64=1.1, n128=1.1)
    assert by_figure("kernel", rows)[figure]["value"] == 0.9
    assert by_figure("kernel", rows[1:])[figure]["met"] == "N=8 is not measured"
    rows[1] = {k: v for k, v in rows[1].items() if k != "ratio"} | {"status": "withheld: wrong"}
    line = by_figure("kernel", rows)[figure]
    assert line["met"] == "withheld: wrong" and line["value"] is None


def test_small_tiles_are_a_mean_over_real_masks():
    rows = [
        {"case": "small tiles", "impl": "hopper", "M": 32, "ratio": r, "status": targets.MEASURED}
        for r in (0.4, 0.9)
    ]
    line = by_figure("kernel", rows)["M=32, N=16, real masks, density 0.15"]
    assert line["value"] == pytest.approx(0.6) and line["met"] == "yes"


def test_targets_at_most_and_their_percentages():
    rows = [{"case": "given tail", "impl": "hopper, tail", "ratio": 1 / 1.007, "status": targets.MEASURED}]
    line = by_figure("kernel", rows)["merging a given tail, more time"]
    assert line["value"] == pytest.approx(0.7) and line["met"] == "yes" and line["unit"] == "%"


def test_plan_targets_add_stages_up():
    shape, dense = targets.P480, {"yardstick_ms": 10.0, "status": targets.MEASURED, "case": "stages"}
    rows = [
        dense | {"shape": shape, "impl": impl, "ms": ms} | ({"N": n} if n else {})
        for impl, n, ms in (
            ("summarise q, k", 0, 0.1),
            ("summarise q, k, v", 0, 0.15),
            ("plan", 16, 0.4),
            ("lists", 16, 0.03),
            ("tail", 16, 0.25),
            ("means and tail", 16, 0.3),
        )
    ]
    lines = by_figure("plan", rows)
    assert lines[f"score, select and lists, N=16, {shape}"]["value"] == pytest.approx(3.3)
    assert lines[f"summarise and tail, N=16, {shape}"]["value"] == pytest.approx(4.0)
    assert lines[f"all of it, plans kept for 4 steps, N=16, {shape}"]["value"] == pytest.approx(4.3)
    assert lines[f"score, select and lists, N=1, {shape}"]["met"] == "not measured"


def quality_rows(impl, points, **columns):
    return [
        {"impl": impl, "threshold": t, "error": error, "ms": ms, "status": targets.MEASURED, **columns}
        for t, error, ms in points
    ]


def test_equal_error_reads_our_curve_between_its_points():
    ours = quality_rows("fgattn", ((1.0, 0.02, 4.0), (2.0, 0.08, 1.0)), M=128, N=16)
    sol = quality_rows("sol_attn", ((t, 0.04, 8.0) for t in (1.0, 1.3, 1.7)), order="raster")
    worse = quality_rows("sol_attn", ((t, 0.5, 9.0) for t in (1.0, 1.3, 1.7)), order="cells")
    line = targets.table("quality", ours + sol + worse)[0]
    assert line["value"] == pytest.approx(2.0 / 8.0) and line["met"] == "stretch"  # 2 ms at an error of 4 %
    line = targets.table("quality", ours[1:] + sol + worse)[0]
    assert line["value"] is None and "4 %" in line["met"]


def generation_rows(impl, points, **columns):
    """One row per (threshold, ms, PSNR) and seed; the seeds are 1 dB around the PSNR."""
    return [
        {
            "case": "generation",
            "impl": impl,
            "threshold": t,
            "ms": ms,
            "psnr_db": psnr + off,
            "seed": seed,
            "status": targets.MEASURED,
            "density": 0.3,
            **columns,
        }
        for t, ms, psnr in points
        for seed, off in ((1, -1), (2, 1))
    ]


OURS = generation_rows("fgattn", ((2.0, 1.0, 20.0), (1.0, 4.0, 40.0)), M=128, N=16, order="cells")


def sol_rows(*times, psnr=22.0):
    points = list(zip((1.0, 1.3, 1.7), times, (psnr,) * 3, strict=True))
    worse = [(tau, 0.01, psnr - 1) for tau, *_ in points]  # the order with the lower PSNR does not matter
    return [
        row
        for order, some in (("raster", points), ("cells", worse))
        for row in generation_rows("sol_attn", some, M=64, N=64, order=order)
    ]


def test_nearer_frames_reads_our_curve_at_the_time_of_sol():
    """Half way over log time; the slowest threshold where sol_attn is slower still."""
    mean, worst = targets.table("generations", OURS + sol_rows(4.0, 2.0, 9.0))
    assert mean["value"] == pytest.approx((18 + 8 + 18) / 3) and mean["met"] == "stretch"
    assert worst["value"] == pytest.approx(8) and worst["met"] == "yes" and worst["unit"] == "dB"
    assert targets.nearer_frames(OURS + sol_rows(4.0, 2.0, 9.0)) == pytest.approx([18, 8, 18])
    for line in targets.table("generations", OURS + sol_rows(4.0, 2.0, 0.9)):
        assert line["value"] is None and "0.90 ms" in line["met"]


def test_generations_are_dense_at_first_and_then_timed(monkeypatch):
    """The first steps do not count; afterwards every call is the one that is measured."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            pass

        def record(self):
            Event.now, self.at = Event.now + 1.5, Event.now

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    x = torch.zeros(1)
    timer = generations.Timer(lambda q, k, v, timed: (timed(lambda: q + 1), torch.tensor(0.25)))
    for _ in range(generations.DENSE_STEPS + 2):
        timer.begin_evaluation(0.5)
        outs = [timer.attention(x, x, x, layout=None, dense=lambda: x, block=b).item() for b in range(3)]
        assert outs == [float(timer.evaluations > generations.DENSE_STEPS)] * 3
    assert timer.columns() == {"density": 0.25, "calls": 6, "ms": 1.5}


@pytest.mark.parametrize(
    "off, status", [(0.01, targets.MEASURED), (1.0, "withheld: PSNR"), (float("nan"), "withheld: PSNR nan")]
)
def test_generations_that_are_absurd_are_withheld(off, status):
    expected = torch.rand(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    judged = generations.judged(expected + off * 3.2, expected)
    assert judged["status"].startswith(status)
    assert generations.judged(expected, expected) == {"status": targets.MEASURED}


def test_tables_of_the_demo_model(tmp_path):
    """Means over calls or seeds, a line or cell for each setting."""

    def rows(name, *rows):
        every = [{"status": targets.MEASURED, **row} for row in rows]
        measure.write(tmp_path / f"{name}.csv", every, MACHINE)

    rows("generations", {"impl": "cudnn", "ms": 5.0, "seed": 1}, *OURS)
    rows(
        "quality",
        *(
            {
                "impl": "fgattn",
                "M": m,
                "N": n,
                "order": "cells",
                "threshold": 1,
                "density": 0.25,
                "error": error,
                "executed_density": 0.5,
                "ms": 2.0,
                "yardstick_ms": 10.0,
                "speedup": 5.0,
            }
            for m, n, error in ((128, 16, 0.01), (128, 16, 0.04), (16, 2, 0.05))
        ),
    )
    rows(
        "methods",
        *(
            {
                "impl": "top_k",
                "M": 64,
                "N": 64,
                "order": "raster",
                "strength": share,
                "executed_density": share,
                "error": 0.1,
            }
            for share in (0.2, 0.4)
        ),
    )
    rows(
        "reuse",
        {
            "plan_age": 3,
            "seed": 2,
            "attention_error": 0.02,
            "worst_attention_error": 0.05,
            "executed_density": 0.3,
        },
        {
            "reuse_steps": 2,
            "seed": 2,
            "attention_error": 0.02,
            "psnr_db": 30.04,
            "executed_density": 0.3,
            "plans_made": 8,
            "plans_reused": 7,
            "planning_ms": 4.0,
            "planning_saved_ms": 3.6,
        },
    )
    results = report.Results(tmp_path)
    lines = {name: report.SECTIONS[name](results).splitlines() for name in report.SECTIONS}
    assert lines["generations"][0].endswith("| PSNR, dB, seeds 1, 2 |")
    assert lines["generations"][2] == "| cuDNN (SDPA) |  |  |  | 100 % | 5.00 |  |"
    assert lines["generations"][3] == "| FG-Attn | 128 x 16 | cells | 1 | 30 % | 4.00 | 39.0, 41.0 |"
    assert lines["quality"][2] == "| FG-Attn | 128 x 16 | cells | 1 | 25 % | 2.0 % | 2.00 | 10.0 | 5.0 x |"
    assert len(lines["quality"]) == 5  # 16 x 2 stands in the grid only
    assert lines["quality grid"][0] == "|  |  | N=2 | N=16 |"
    assert "| M=16 | executed | 50 % |  |" in lines["quality grid"]
    assert "| M=128 | error |  | 2.0 % |" in lines["quality grid"]
    assert not [line for line in lines["quality grid"] if line.startswith("| M=128 | executed")]
    assert lines["methods"][2] == "| top_k | 64 x 64 | raster | 0.4: 40 %, 10.0 % | 0.2: 20 %, 10.0 % |"
    assert lines["plan age"][2] == "| 3 | 2.00 % | 5.0 % | 30 % |"
    assert lines["reuse"][2] == "| 2 | 2.00 % | 30.0 | 30 % | 8 + 7 | 4 | 4 |"
    for picture in report.pictures(results).values():
        ElementTree.fromstring(picture)


def test_report_is_what_the_results_say():
    """The committed tables and plots are those of the committed CSV files."""
    results = report.Results(measure.RESULTS)
    for path in report.PAGES:
        text = path.read_text()
        assert report.page(text, results) == text, f"python -m benchmarks report changes {path.name}"
    for name, picture in report.pictures(results).items():
        assert (measure.RESULTS / name).read_text() == picture


def test_committed_targets_are_those_of_the_committed_rows(tmp_path):
    results = report.Results(measure.RESULTS)
    for name in targets.TARGETS:
        report.write_targets(results, name, tmp_path)
        made, committed = (folder / f"{name}_targets.csv" for folder in (tmp_path, measure.RESULTS))
        assert made.exists() == committed.exists() == bool(results.rows(name))
        assert not made.exists() or made.read_text() == committed.read_text()


def test_every_table_is_on_a_page_and_says_where_it_comes_from():
    text = "".join(path.read_text() for path in report.PAGES)
    marks = re.findall(r"<!-- results: (.+?) -->\n(.*?)<!-- end of results -->", text, re.S)
    assert {name for name, _ in marks} == set(report.SECTIONS)
    for name, content in marks:
        if content.startswith("|") and name != "withheld":
            last = content.strip().splitlines()[-1]
            assert re.match(r".+, torch .+, Triton .+, \d{4}-\d\d-\d\d, commit .+`benchmarks/.+\.csv`$", last)


def test_report_without_results(tmp_path):
    results = report.Results(tmp_path)
    assert {section(results) for section in report.SECTIONS.values()} == {"Not measured.", "Nothing."}
    for picture in report.pictures(results).values():
        ElementTree.fromstring(picture)


def test_report_leaves_the_rest_of_a_page_alone(tmp_path):
    text = "before\n<!-- results: plan -->\nold\n<!-- end of results -->\nafter\n"
    expected = "before\n<!-- results: plan -->\nNot measured.\n<!-- end of results -->\nafter\n"
    assert report.page(text, report.Results(tmp_path)) == expected


def test_results_keep_a_commit_as_text(tmp_path):
    measure.write(tmp_path / "x.csv", [{"N": 16, "ms": 1.5, "status": "measured", "none": None}], MACHINE)
    (row,) = report.Results(tmp_path).measured("x", N=16)
    assert row == {"N": 16, "ms": 1.5, "status": "measured"} | MACHINE
    assert report.provenance([row, row]) == "a GPU, torch 2, Triton 3, 2026-01-01, commit 12e4567"


def imitated(calls, *said):
    """A program that says what a first use would."""
    return f"""
import json, os
open(os.environ["TRITON_CACHE_DIR"] + "/kernel", "w")
print(json.dumps({{"marks": [1.0, 1.5, 7.5, 8.0], "calls": {calls}, "said": {list(said)}}}))
"""


def test_first_use_is_that_of_a_process_of_its_own(tmp_path, monkeypatch):
    program = imitated({"sparse": 1}, "FG-Attn is compiling kernels, once: select_kernel", "something else")
    monkeypatch.setattr(first_use, "PROGRAM", program)
    found = first_use.first_use(tmp_path)
    assert found == (0.5, 6.0, 0.5, {"sparse": 1}, ["select_kernel"]) and found.seconds == 7.0
    assert (tmp_path / "kernel").exists()
    monkeypatch.setattr(first_use, "PROGRAM", "raise ValueError('no kernel image')")
    with pytest.raises(RuntimeError, match=r"(?s)first use failed: .*no kernel image"):
        first_use.first_use(tmp_path)


@pytest.mark.parametrize(("quick", "busy"), [(False, [0, 0, 8, 8]), (True, [8, 8])])
def test_first_use_has_its_rows(quick, busy, monkeypatch):
    """Empty cache first; what did not run sparse has no figure; busy processes end with the rows."""
    started, beside = [], []
    popen = first_use.subprocess.Popen
    monkeypatch.setattr(
        first_use.subprocess, "Popen", lambda *a, **o: started.append(popen(*a, **o)) or started[-1]
    )

    def of_process(cache):
        beside.append(sum(process.poll() is None for process in started))
        (cache / str(len(beside))).touch()
        number = len(list(cache.iterdir()))
        return first_use.FirstUse(0.5, 5.0, 0.5, {"sparse": 1} if number == 1 else {"error": 1}, ["a", "b"])

    monkeypatch.setattr(first_use, "first_use", of_process)
    rows = list(first_use.rows(quick))
    assert [row["busy"] for row in rows] == beside == busy
    assert all(process.poll() is not None for process in started)
    assert [row["cache"] for row in rows] == ["empty", "filled"] * (len(rows) // 2)
    assert {(row["cache"], row["status"]) for row in rows} == {
        ("empty", "measured"),
        ("filled", "withheld: {'error': 1}"),
    }
    assert {row["seconds"] for row in rows} == {6.0} and {row["kernels"] for row in rows} == {2}
    (target,) = targets.table("first_use", rows)
    assert target["value"] == 6.0 and target["met"] == "yes"


def test_plot_places_points_on_its_axes():
    curve = plot.Curve("a & b", plot.GREEN, [(1, 0.0), (10, 0.5), (100, 1.0)], labels=["x", "y", "z"])
    empty = plot.Curve("empty", plot.RED, [])
    x, y = plot.Axis((1, 100), log=True), plot.Axis((0, 1))
    picture = plot.draw([curve, empty], "title", "across", "up", x, y, note="")
    line = ElementTree.fromstring(picture).find("{http://www.w3.org/2000/svg}polyline")
    middle_x, middle_y = (plot.LEFT + plot.RIGHT) / 2, (plot.TOP + plot.BOTTOM) / 2
    assert line.get("points") == (
        f"{plot.LEFT:.1f},{plot.BOTTOM:.1f} {middle_x:.1f},{middle_y:.1f} {plot.RIGHT:.1f},{plot.TOP:.1f}"
    )
    assert "a &amp; b" in picture and "empty" not in picture
