import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lora_kernels as lk
from lora_kernels.statistics import Statistics
from tests.statistics.interrupted import Data, gather, model

ROOT = Path(__file__).parents[2]
BUDGET = 6000  # bytes: the sums of the three layers take three passes


def same(one, other, tolerance=0.0):
    assert list(one) == list(other)
    for name in one:
        assert one[name].sums.keys() == other[name].sums.keys()
        for statistic, a in one[name].sums.items():
            b = other[name].sums[statistic]
            for key, value in a.tensors().items():
                found = b.tensors()[key]
                if key in a.triangular:
                    value, found = value.tril(), found.tril()
                torch.testing.assert_close(value, found, rtol=0.0, atol=tolerance * float(found.abs().max()))
        assert one[name].shared_with == other[name].shared_with and one[name].notes == other[name].notes
    for key in ("batches", "tokens", "loss_items", "samples", "skipped_rows", "skipped_modules"):
        assert getattr(one, key) == getattr(other, key)


def attempt(checkpoint, out, kill_at, budget=0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.statistics.interrupted", str(checkpoint), str(out), kill_at, str(budget)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("budget", "kills"),
    [(0, ["batch:1", "batch:7", "before:1"]), (BUDGET, ["batch:9", "after:3", "batch:17", "before:2"])],
)
def test_a_killed_run_goes_on_and_gives_the_same_statistics(tmp_path, budget, kills):
    checkpoint, out = tmp_path / "run.safetensors", tmp_path / "out.safetensors"
    for kill_at in kills:
        done = attempt(checkpoint, out, kill_at, budget)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists()
    done = attempt(checkpoint, out, "never", budget)
    assert done.returncode == 0, done.stderr
    # Between processes, the BLAS behind the model need not round alike.
    same(Statistics.load(out), gather(Data(), budget=budget or None), 1e-6)
    same(Statistics.load(out), Statistics.load(checkpoint))


def test_more_passes_give_what_one_gives():
    alone, split = gather(Data()), gather(Data(), budget=BUDGET)
    same(alone, split)


def test_save_and_load(tmp_path):
    stats = gather(Data())
    stats.save(tmp_path / "s.safetensors")
    same(stats, Statistics.load(tmp_path / "s.safetensors"))
    assert [each.name for each in tmp_path.iterdir()] == ["s.safetensors"]


def test_sketches_and_shared_inputs_survive_the_trip(tmp_path):
    from tests.statistics.models import padded, samples, tiny_llama  # noqa: PLC0415
    from tests.statistics.test_gradients import gather as llama  # noqa: PLC0415

    stats = llama(
        tiny_llama(hidden_size=64),
        padded(samples(), 4),
        form="sketch",
        sketch_size=2,
        targets=None,
        dtype=torch.float32,
    )
    name = "model.layers.0.self_attn.q_proj"
    assert stats[name].input.kind == "input_sketch" and stats[name].form("gradient") == "sketch"
    stats.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    same(stats, again)
    assert again[name].input is again["model.layers.0.self_attn.k_proj"].input
    torch.testing.assert_close(again[name].sums["gradient"].svd(2).S, stats[name].sums["gradient"].svd(2).S)


def unfinished(path):
    class Stop(Exception):
        pass

    class Breaking(Data):
        def __iter__(self):
            yield from list(super().__iter__())[:5]
            raise Stop

    with pytest.raises(Stop):
        gather(Breaking(), path)


def test_other_data_another_model_and_other_options_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    unfinished(path)
    data = Data()
    data.batches[0] = (data.batches[0][0] + 1, data.batches[0][1])
    with pytest.raises(ValueError, match="after 4 other batches than the loader now yields"):
        gather(data, path)
    with pytest.raises(ValueError, match="after 4 batches, but the loader has 3"):
        data = Data()
        data.batches = data.batches[:3]
        gather(data, path)
    settings = {"forward": lambda model, batch: model(batch[0]), "progress": False, "checkpoint": path}
    with pytest.raises(ValueError, match="something else: it differs in wants"):
        lk.collect(model(), Data(), "input_second", **settings)
    other = model()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    whole = ("input_second", "fisher", "gradient")
    with pytest.raises(ValueError, match="differs in parameters"):
        lk.collect(other, Data(), whole, loss=lambda o, b: (o - b[1]).square().mean(), **settings)
    with pytest.raises(ValueError, match=r"differs in .*max_batches \(was None, is 7\)"):
        lk.collect(model(), Data(), whole, loss=lambda o, b: o.mean(), max_batches=7, **settings)
    with pytest.raises(ValueError, match="unfinished run"):
        Statistics.load(path)
    assert gather(Data(), path).batches == 12  # nothing of the above has touched the file


def test_truncated_changed_and_foreign_files_are_refused(tmp_path):
    path, bad = tmp_path / "s.safetensors", tmp_path / "bad.safetensors"
    gather(Data()).save(path)
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read as statistics"):
            Statistics.load(bad)
    for place in (len(content) - 3, len(content) // 2):
        bad.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="its digest does not match"):
            Statistics.load(bad)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document = json.loads(metadata["lora_kernels_statistics"])
    document["progress"]["tokens"] += 1
    save_file(tensors, bad, metadata={"lora_kernels_statistics": json.dumps(document)})
    with pytest.raises(ValueError, match="its digest does not match"):
        Statistics.load(bad)
    document["format"] = 99
    save_file(tensors, bad, metadata={"lora_kernels_statistics": json.dumps(document)})
    with pytest.raises(ValueError, match="has format 99"):
        Statistics.load(bad)
    save_file({"weight": torch.zeros(3)}, bad)
    with pytest.raises(ValueError, match="holds no statistics"):
        Statistics.load(bad)
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        Statistics.load(tmp_path / "missing")
    shutil.copy(path, bad)
    assert Statistics.load(bad).batches == 12


def test_a_finished_checkpoint_is_not_read_again(tmp_path):
    path = tmp_path / "run.safetensors"
    first = gather(Data(), path)
    data = Data(kill_at=0)  # would kill this process
    same(first, gather(data, path))
