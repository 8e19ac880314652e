"""`python -m benchmarks.gpu`: the rehearsal on a CPU, and what becomes of parts that fail, hang or no longer fit."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import experts, layers, part, starts, sweep, timing
from benchmarks.gpu.runner import Part
from benchmarks.lora_layers import HandWritten, gradients
from benchmarks.rates import Floor, Rates

ROOT = Path(__file__).parents[1]
BROKEN = """
import subprocess, sys, time

def fine(run):
    run.record["answer"] = 42

def fail(run):
    run.record["before"] = 1
    run.save()
    print("what it said")
    raise RuntimeError("injected")

def early(run):
    raise RuntimeError("before any record")

def silent(run):
    run.save = lambda: None

def crash(run):
    import os
    os.abort()

def hang(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    run.record["child"] = child.pid
    run.save()
    time.sleep(300)

def cases(run):
    run.end = time.monotonic() + 1.0

    def measure(run, number):
        if number == 1:
            raise ValueError("one case")
        if number == 3:
            time.sleep(max(run.left, 0))
        return {"square": float(number**2)}
    run.each([{"number": number} for number in range(5)], measure)
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Parts that misbehave, by name."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "broken_parts.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    def part_of(name, least=1.0, most=60.0):
        return Part(name, f"broken_parts:{name}", least, most)

    return part_of


def run(folder, parts, *arguments):
    return gpu.main(["--out", str(folder), "--cpu-rehearsal", *arguments], parts)


def record(folder, name):
    return json.loads((folder / f"gpu_{name}.json").read_text())


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_failing_part_takes_no_other(tmp_path, broken, capsys):
    names = ("fail", "crash", "silent", "fine")
    assert run(tmp_path / "out", [broken(name) for name in names]) == 1
    found = {name: record(tmp_path / "out", name) for name in names}
    assert [found[name]["status"] for name in names] == ["failed", "failed", "failed", "ok"]
    assert found["fine"]["answer"] == 42 and "error" not in found["fine"]
    assert found["fail"]["before"] == 1 and "RuntimeError: injected" in found["fail"]["output"]
    assert "exit status -6" in found["crash"]["error"] and "environment" in found["crash"]
    assert found["silent"]["error"] == "wrote no record"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "what it said" in log and "== fine" in log
    printed = capsys.readouterr().out
    assert "what it said" in printed and "injected" in printed.split("records in")[1]


def test_cases_fail_one_by_one_and_those_without_time_are_named(tmp_path, broken):
    assert run(tmp_path, [broken("cases")]) == 1
    found = record(tmp_path, "cases")
    assert [each["number"] for each in found["entries"]] == [0, 1, 2, 3] and found["left_out"] == [{"number": 4}]
    assert found["entries"][1]["error"] == "ValueError: one case" and found["entries"][2]["square"] == 4.0
    assert found["failures"] == ["number 1: ValueError: one case"] and "1 cases no longer fitted" in found["error"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_part_that_hangs_ends_at_its_limit_with_its_children(tmp_path, broken):
    started = time.monotonic()
    packed = tmp_path / "packed" / "all.tar.gz"
    parts = [broken("hang", most=5.0), broken("fine")]
    assert run(tmp_path / "out", parts, "--pack", str(packed)) == 1
    assert time.monotonic() - started < 45
    found = record(tmp_path / "out", "hang")
    assert found["status"] == "stopped" and "at its limit" in found["error"] and 5 <= found["part_seconds"] < 12
    for _ in range(50):
        if not alive(found["child"]):
            break
        time.sleep(0.1)
    assert not alive(found["child"])
    assert record(tmp_path / "out", "fine")["status"] == "ok"
    with tarfile.open(packed) as archive:
        assert {"gpu_hang.json", "gpu_fine.json", "log.txt"} <= set(archive.getnames())


def test_what_no_longer_fits_is_skipped_and_is_no_failure(tmp_path, broken, capsys):
    (tmp_path / "gpu_fine.json").write_text("{}")  # of another run
    assert run(tmp_path, [broken("fine", least=5.0)], "--minutes", "0.1") == 0
    assert "skipped" in capsys.readouterr().out and not (tmp_path / "gpu_fine.json").exists()


def test_only_the_parts_that_are_asked_for(tmp_path, broken):
    assert run(tmp_path, [broken("early"), broken("fine")], "--parts", "fine") == 0
    assert not (tmp_path / "gpu_early.json").exists()
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, [broken("fine")], "--parts", "finer")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, [broken("fine")], "--minutes", "0")


def test_four_calls_leave_one_file(tmp_path, broken):
    packed = tmp_path / "all.tar.gz"
    names = {"fine": 0, "early": 1, "cases": 2, "fail": 3}
    parts = [dataclasses.replace(broken(name), call=call) for name, call in names.items()]
    for call, status in ((1, 1), (2, 1), (3, 1), (4, 0)):
        assert run(tmp_path / "out", parts, "--call", str(call), "--pack", str(packed)) == status
    with tarfile.open(packed) as archive:
        assert {f"gpu_{name}.json" for name in names} < set(archive.getnames())
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [log.count(f"== {name}\n") for name in names] == [1, 1, 1, 1]  # what all need, the first one runs


def test_every_call_fits_into_ten_minutes():
    for call in range(1, gpu.CALLS + 1):
        most = sum(part.most for part in gpu.PARTS if part.call == call)
        assert 0 < most <= 9 * 60, f"call {call} may take {most} s"
    assert sum(part.most for part in gpu.PARTS if part.call in (0, 1)) <= 9 * 60


def test_the_sweep_compares_tiles_that_are_right(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    one = part.Run("sweep", tmp_path, time.monotonic() + 300, True)
    sweep.sweep(one)
    entries = one.record["entries"]
    assert one.failures == [] and one.record["left_out"] == []
    assert {entry["kernel"] for entry in entries} == {
        "covariance", "gradient", "shrink", "tsreduce", "expand", "lora_pro"
    }  # fmt: skip
    for entry in entries:
        assert entry["shipped_over_best"] >= 1 and len(entry["seconds"]) == 3 and entry["refused"] == {}


@pytest.mark.parametrize("method", ["eva", "pissa"])
def test_starts_of_the_rehearsal(tmp_path, method):
    pytest.importorskip("peft")
    one = part.Run("starts", tmp_path, time.monotonic() + 60, True)
    one.each([{"method": method, "batches": 2, "batch": 2, "length": 12, "rank": 4}], starts._start)
    assert one.failures == [] and one.record["entries"][0]["initialize_seconds"] > 0


def test_a_slow_side_ends_the_rounds(monkeypatch):
    calls = []
    timing.interleaved({"slow": lambda: calls.append(time.sleep(0.01))}, 50, torch.device("cpu"), most=0.0)
    assert len(calls) == 4  # one before, three timed


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the part looks for a GPU's rates")
def test_rehearsal_writes_records_with_floors(tmp_path):
    assert gpu.main(["--out", str(tmp_path), "--cpu-rehearsal", "--parts", "rates", "statistics", "tune"]) == 0
    rates, sums = record(tmp_path, "rates"), record(tmp_path, "statistics")
    assert rates["environment"]["versions"]["torch"] and rates["copy_bytes_per_second"] > 0
    assert set(rates["flop_per_second"]) == {"bfloat16", "float16", "float32", "tf32"}
    assert {each["op"] for each in sums["entries"]} == {"covariance_", "gradient_statistics_", "sketch_"}
    for each in sums["entries"]:
        assert each["seconds"]["ours"]["p20"] <= each["seconds"]["ours"]["p50"] <= each["seconds"]["ours"]["p80"]
        assert each["ours_over_floor"] == pytest.approx(each["seconds"]["ours"]["p50"] / each["floor"]["seconds"])
        assert each["over_ours"]["torch"] > 0 and 0 < each["errors"]["torch"] < 0.01 and each["errors"]["ours"] < 1e-5
    assert all(each["products"][0]["choice"] for each in record(tmp_path, "tune")["entries"])
    from lora_kernels.ops.lora_linear import table

    assert len(table.read(tmp_path / "tuned.json")) == 3  # the forward pass has no masked form
    assert not any(name["status"] != "ok" for name in (rates, sums))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_layers_of_the_rehearsal_agree(tmp_path, dropout):
    pytest.importorskip("peft")
    one = part.Run("layers", tmp_path, time.monotonic() + 60, True)
    one.each([{"tokens": 33, "n": 24, "m": 40, "rank": 8, "dropout": dropout}], layers._layer)
    (entry,) = one.record["entries"]
    assert one.failures == [] and ("ours_dropped" in entry["errors"]) == (dropout > 0)
    assert entry["over_ours"]["hand_written"] > 0 and entry["over_ours"]["peft"] > 0


def test_experts_of_the_rehearsal_agree(tmp_path):
    pytest.importorskip("peft")
    one = part.Run("experts", tmp_path, time.monotonic() + 60, True)
    experts.experts(one)
    (entry,) = one.record["entries"]
    assert one.failures == [] and entry["errors"]["ours"] <= 2 * entry["errors"]["peft"]
    assert entry["over_ours"].keys() == {"peft", "base"} and entry["floor"]["flops"] > 0


def test_the_baseline_of_library_passes_is_the_layer():
    torch.manual_seed(3)
    x, w, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((7, 5), (6, 5), (2, 5), (6, 2)))
    leaves = [each.requires_grad_() for each in (x, a, b)]
    g = torch.randn(7, 6, dtype=torch.float64)
    truth = layers._truth(x, w, a, b, g, 0.7, None)
    found = gradients(HandWritten.apply(x, None, w, None, a, b, 0.7), leaves, g)
    for one, two in zip(found, truth, strict=True):
        assert torch.allclose(one, two, rtol=1e-12)
    # With dropout the adapter's input is a tensor of its own, whose gradient goes back to x.
    mask = torch.tensor([[0.0, 2.0, 2.0, 0.0, 2.0]], dtype=torch.float64)
    found = gradients(HandWritten.apply(x, x * mask, w, None, a, b, 0.7), leaves, g)
    y = x @ w.mT + 0.7 * (x * mask) @ a.mT @ b.mT
    for one, two in zip(found, gradients(y, leaves, g), strict=True):
        assert torch.allclose(one, two, rtol=1e-12)


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_wrong_numbers_are_compared_with_nothing(tmp_path, factor):
    one = part.Run("x", tmp_path, time.monotonic() + 60, True)
    x = torch.randn(9)
    errors = {"ours": part.relative_error(factor * x, x.double()), "torch": part.relative_error(x, x.double())}
    found = one.compare({"ours": lambda: None, "torch": lambda: None}, errors)
    assert "wrong numbers" in found["error"] and "over_ours" not in found
    one.each([{}], lambda run: found)
    assert one.failures and json.loads((tmp_path / "gpu_x.json").read_text())["entries"][0]["error"]


def test_a_floor_is_the_larger_of_both_times():
    rates = Rates(10.0, {"bfloat16": 100.0})
    assert Floor(1000.0, 10.0, rates).seconds == 10.0 and Floor(1.0, 50.0, rates).seconds == 5.0
    assert Floor(1.0, 1.0, None).seconds is None


def test_rates_of_another_device_do_not_count(tmp_path):
    found = {"environment": {"gpu": "another"}, "copy_bytes_per_second": 1.0, "flop_per_second": {}}
    (tmp_path / "gpu_rates.json").write_text(json.dumps(found))
    assert timing.read_rates(tmp_path) is None and timing.read_rates(tmp_path / "nowhere") is None
