"""Writes are whole or not at all, wherever a process is killed."""

import os
import resource
import signal
import stat
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lora_kernels as lk
from lora_kernels import _files
from lora_kernels._files import append_line
from lora_kernels.api.text_files import read
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.chmod")
KILLED = 9


def in_child(action):
    """The exit status of a process of its own that runs an action."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(step, folder, action):
    """Whether an action, in a process of its own, was killed before its nth step in a folder; if not it was done."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in EVENTS and any(
            isinstance(part, (str, os.PathLike)) and str(folder) in str(part) for part in arguments
        ):
            count += 1
            if count == step:
                os._exit(KILLED)

    def run():
        sys.addaudithook(hook)
        action()

    status = in_child(run)
    assert status in (0, KILLED)
    return status == KILLED


def test_a_file_is_the_old_or_the_new_one_at_every_step(tmp_path):
    file, step, seen = tmp_path / "file.txt", 1, set()
    while True:
        file.write_text("old" * 1000)
        killed = killed_before(step, tmp_path, lambda: _files.write_text(file, "new" * 1000))
        seen.add(file.read_text())
        assert seen <= {"old" * 1000, "new" * 1000}
        if not killed:
            break
        step += 1
    assert step > 4 and len(seen) == 2
    assert sorted(os.listdir(tmp_path)) == ["file.txt"]  # the parts of killed processes are gone


@pytest.mark.parametrize("way", ["exchange", "two renames", "one by one"])
def test_a_folder_is_the_old_or_the_new_one_at_every_step(tmp_path, monkeypatch, way):
    def refuse(*_):
        raise OSError("not here")

    if way != "exchange":
        monkeypatch.setattr(_files, "_exchange", refuse)
    if way == "one by one":
        monkeypatch.setattr(os, "rename", refuse)

    def write():
        with _files.replacing_folder(folder) as fresh:
            for name in ("a", "b"):
                (fresh / name).write_text("new")

    folder, step, seen = tmp_path / "folder.d", 1, set()
    while True:
        folder.mkdir(exist_ok=True)
        for name in ("a", "b"):
            (folder / name).write_text("old")
        (folder / "more").mkdir(exist_ok=True)
        (folder / "more" / "file").write_text("other")
        killed = killed_before(step, tmp_path, write)
        read = {name: (folder / name).read_text() for name in ("a", "b") if (folder / name).exists()}
        seen.add(tuple(sorted(read.items())))
        if folder.exists():
            assert (folder / "more" / "file").read_text() == "other"
        if not killed:
            break
        step += 1
    whole = {(("a", "old"), ("b", "old")), (("a", "new"), ("b", "new"))}
    assert whole <= seen and step > 8
    # Where folders cannot be exchanged nobody can read a mixture: there is nothing, or the first file is missing.
    assert (
        seen - whole <= {"exchange": set(), "two renames": {()}, "one by one": {(("b", "old"),), (("b", "new"),)}}[way]
    )
    if way == "exchange":
        assert os.listdir(tmp_path) == ["folder.d"]


def test_names_modes_and_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        _files.write_text("text", "a")
        _files.write_tensors(tmp_path / "new" / "t.safetensors", {"a": torch.ones(2).expand(3, 2).mT}, {"k": "v"})
        with _files.replacing_folder("folder") as fresh:
            (fresh / "a").write_text("1")
    finally:
        os.umask(before)
    assert load_file("new/t.safetensors")["a"].tolist() == [[1.0] * 3] * 2
    modes = {name: stat.S_IMODE(os.stat(name).st_mode) for name in ("text", "new/t.safetensors", "folder", "folder/a")}
    assert modes == {"text": 0o640, "new/t.safetensors": 0o640, "folder": 0o750, "folder/a": 0o640}
    os.chmod("text", 0o600)
    os.symlink("text", "link")
    os.symlink("folder", "link to folder")
    os.symlink("a", "folder/link")
    _files.write_text("link", "b")
    with _files.replacing_folder("link to folder") as fresh:
        (fresh / "b").write_text("2")
    assert os.readlink("link") == "text" and (tmp_path / "text").read_text() == "b"
    assert stat.S_IMODE(os.stat("text").st_mode) == 0o600 and stat.S_IMODE(os.stat("folder").st_mode) == 0o750
    assert os.readlink("link to folder") == "folder" and os.readlink("folder/link") == "a"
    assert (tmp_path / "folder" / "link").read_text() == "1" and (tmp_path / "folder" / "b").read_text() == "2"
    # The working directory itself is not moved.
    monkeypatch.chdir("folder")
    with _files.replacing_folder(".") as fresh:
        (fresh / "a").write_text("3")
    assert sorted(os.listdir(".")) == ["a", "b", "link"] and (tmp_path / "folder" / "a").read_text() == "3"
    # A change of directory in between changes nothing.
    with _files.replacing("c") as fresh:
        monkeypatch.chdir(tmp_path)
        fresh.write_text("4")
    assert (tmp_path / "folder" / "c").read_text() == "4"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "link to folder", "new", "text"]


def test_parts_of_processes_that_run_stay(tmp_path):
    file = tmp_path / "[a].txt"
    with _files.replacing(file) as one, _files.replacing(file) as two:
        one.write_text("1")
        two.write_text("2")
    assert file.read_text() == "1" and os.listdir(tmp_path) == ["[a].txt"]


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def fill_the_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for name, write in (
            ("a", lambda: _files.write_text(tmp_path / "a", "a" * 10000)),
            ("b", lambda: _files.write_tensors(tmp_path / "b", {"b": torch.zeros(10000)})),
        ):
            with pytest.raises(OSError, match=r"File too large|b cannot be written"):
                write()
            assert not (tmp_path / name).exists()

    assert in_child(fill_the_disk) == 0
    with pytest.raises(ZeroDivisionError), _files.replacing_folder(tmp_path / "c") as fresh:
        (fresh / "c").write_text(str(1 / 0))
    assert not os.listdir(tmp_path)


def test_an_export_killed_at_any_step_is_the_old_or_the_new_adapter(tmp_path):
    torch.manual_seed(0)
    batch = padded(samples(), 4)[0]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def logits(model):
        with torch.no_grad():
            return model.eval()(**inputs).logits

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    folder, step, seen = tmp_path / "adapter", 1, []
    truth = []
    for scale in (0.05, 0.5):  # other weights under another alpha
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.normal_(0.0, scale)
        for layer in model.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.scaling["default"] = 0.1 / scale
        lk.export(model, folder if not truth else tmp_path / "new")
        truth.append(logits(model))
    assert relative_error(*truth) > 1e-2
    while killed_before(step, folder.parent, lambda: lk.export(model, folder)):
        found = logits(PeftModel.from_pretrained(tiny_llama(), folder))
        seen.append(relative_error(found, truth[0]) < 1e-5)
        assert seen[-1] or relative_error(found, truth[1]) < 1e-5, step
        step += 1
    assert seen == sorted(seen, reverse=True) and len(set(seen)) == 2
    assert relative_error(logits(PeftModel.from_pretrained(tiny_llama(), folder)), truth[1]) < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["adapter", "new"]


APPEND = """
import sys
from lora_kernels._files import append_line
for number in range(200):
    append_line(sys.argv[1], f"{sys.argv[2]} {number} " + "x" * 100)
"""


def test_lines_of_two_processes_stay_whole(tmp_path):
    path = tmp_path / "log"
    runs = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), name]) for name in "ab"]
    assert not any(run.wait() for run in runs)
    lines = [line.split() for line in path.read_text().splitlines()]
    for name in "ab":
        assert [int(number) for who, number, rest in lines if who == name and rest == "x" * 100] == list(range(200))


@pytest.mark.parametrize("whole", ["", "one\n", "one\ntwo\n"])
@pytest.mark.parametrize("cut", ["", "thr", "x" * 200_000])
def test_a_line_that_was_cut_off_is_removed(tmp_path, whole, cut):
    path = tmp_path / "log"
    path.write_text(whole + cut)
    append_line(path, "last")
    assert path.read_text() == f"{whole}last\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\nhello, world,1\n", "more than 2 columns"),
        ("text,label\nhello\n", "fewer than 2 columns"),
        ('text,label\n"hello,1\n', "must be UTF-8 CSV"),
        ("text,text\na,b\n", "twice"),
    ],
)
def test_csv_that_would_lose_text_is_refused(tmp_path, text, said):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read(path, "text")
