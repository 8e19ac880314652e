"""What importing the package, and asking the command line for help, costs: neither loads what it does not use."""

import subprocess
import sys

import lora_kernels as lk

SLOW = ("torch", "triton", "peft", "transformers", "matplotlib", "numpy", "rich")


def loaded_after(code):
    code = f"import sys\n{code}\nprint(*(name for name in {SLOW!r} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_importing_the_package_loads_nothing():
    assert loaded_after("import lora_kernels; lora_kernels.__version__; dir(lora_kernels)") == set()


def test_methods_and_statistics_need_neither_peft_nor_transformers():
    code = "import lora_kernels as lk; lk.initialize, lk.init.EVA(), lk.accelerate, lk.api.LandscapeMonitor"
    assert loaded_after(code).isdisjoint({"peft", "transformers", "matplotlib"})


def test_public_names_are_few_and_there():
    modules = {"api", "init", "landscape", "linalg", "ops", "statistics", "training", "__version__"}
    names = set(lk.__all__) - modules
    assert len(names) == 13 and all(callable(getattr(lk, name)) for name in names)
    assert set(lk.__all__) <= set(dir(lk)) and not hasattr(lk, "nothing")


def test_help_is_quick():
    """The commands whose options are their own show them, too; those with options of a config load it."""
    cli = "from lora_kernels.cli import main\ntry:\n    main({})\nexcept SystemExit:\n    pass"
    for words in (["--help"], ["--version"], ["verify", "--help"], ["tune", "--help"], ["inspect", "--help"]):
        assert loaded_after(cli.format(words)) == set(), words
