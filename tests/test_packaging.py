"""The package as others get it: what a wheel holds, what an import costs, and the two top-level folders, `kernels` and
`patches`, that must work beside packages of the same name."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "megatron_lowbit": "megatron_lowbit",
    "kernels": "megatron_lowbit.kernels",
    "patches": "megatron_lowbit.patches",
}

HEAVY = (
    "transformers",
    "numba",
    "triton",
    "megatron",
    "safetensors",
    "deepspeed",
    "accelerate",
    "matplotlib",
    "torch._dynamo",
    "torch._inductor",
)


def modules_on_disk() -> dict[str, Path]:
    """Name and file of every module in the tree, packages by the name of the package."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


def data_on_disk() -> set[str]:
    """What is no module, as a wheel names it."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder)}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix != ".py" and file.parent.name != "__pycache__" and file.name[0] != "."
    }


def packages_on_disk() -> list[str]:
    return sorted(name for name, file in modules_on_disk().items() if file.name == "__init__.py")


def setup_cfg() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip() and not line.startswith("#")]


def call(*command, cwd, path=None) -> str:
    """Standard output of a command that must succeed."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, *, cwd, path=None, executable=sys.executable) -> str:
    return call(executable, "-c", textwrap.dedent(code), cwd=cwd, path=path)


def make_environment(folder: Path) -> Path:
    """The interpreter of a new environment that sees what this one has installed, except editable installs."""
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    executable = folder / "bin" / "python"
    site = python("import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, executable=executable).strip()
    Path(site, "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return executable


def pip(*arguments, executable=sys.executable) -> None:
    pytest.importorskip("pip")
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        executable,
        *arguments,
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--no-build-isolation",
        cwd=ROOT,
    )


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what a build reads, so that no build leaves anything in the repository or finds anything there."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


IMPORT_ALL = """
    from importlib import import_module
    for name in {packages}:
        print(import_module(name).__file__)
"""


def assert_imports_from(folder: Path, **kwargs) -> None:
    files = python(IMPORT_ALL.format(packages=packages_on_disk()), **kwargs).split()
    assert len(files) == len(packages_on_disk())
    assert [file for file in files if not Path(file).resolve().is_relative_to(folder.resolve())] == []


def test_every_package_in_the_tree_is_listed():
    assert sorted(lines(setup_cfg()["options"]["packages"])) == packages_on_disk()


def test_every_folder_with_python_is_a_package():
    folders = {file.parent for file in modules_on_disk().values()}
    assert sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()) == []


def test_what_make_installs_is_pinned():
    def names(requirements):
        return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}

    extras = setup_cfg()["options.extras_require"]
    wanted = names(lines(setup_cfg()["options"]["install_requires"]))
    for extra in ("cpu", "megatron", "hf", "eval", "dev"):
        wanted |= names(lines(extras[extra]))
    assert wanted - names(lines((ROOT / "constraints.txt").read_text())) == {"megatron-lowbit"}


def test_import_loads_no_framework():
    code = f"""
        import sys, torch
        before = set(sys.modules)
        import megatron_lowbit
        print(*[name for name in {HEAVY} if name in set(sys.modules) - before])
    """
    assert python(code, cwd=ROOT).split() == []


def test_folders_at_the_root_import_nothing():
    code = """
        import sys, kernels, patches
        assert kernels.__version__ == "0"
        print(*[name for name in ("torch", "numpy", "numba", "triton", "megatron_lowbit") if name in sys.modules])
    """
    assert python(code, cwd=ROOT).split() == []


def test_transformers_works_beside_our_kernels_folder():
    pytest.importorskip("transformers")
    code = """
        import kernels, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2)
        print(tuple(LlamaForCausalLM(config)(torch.arange(4)[None]).logits.shape), kernels.__file__)
    """
    assert python(code, cwd=ROOT).strip() == f"(1, 4, 32) {ROOT / 'kernels' / '__init__.py'}"


def test_patches_are_imported_on_first_use():
    code = """
        import sys
        import megatron_lowbit as lowbit
        lowbit.patches
        for name in ("megatron_core", "deepspeed", "transformers"):
            assert f"megatron_lowbit.patches.{name}" not in sys.modules
        try:
            lowbit.patches.no_such_framework
        except AttributeError as error:
            print(error)
    """
    message = python(code, cwd=ROOT)
    assert "no_such_framework" in message
    for file in (ROOT / "patches").glob("[!_]*.py"):
        assert file.stem in message


def test_runs_from_the_source_tree_without_being_installed(tmp_path):
    bare = make_environment(tmp_path / "environment")
    assert_imports_from(ROOT, cwd=tmp_path, path=ROOT, executable=bare)
    assert_imports_from(ROOT, cwd=ROOT, executable=bare)


def test_wheel_holds_and_imports_everything(tmp_path, source):
    pip("wheel", source, "--wheel-dir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packed = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in names if name.endswith(".py")
    }
    assert packed == set(modules_on_disk())
    assert {name for name in names if not name.endswith(".py")} == data_on_disk() != set()

    target = tmp_path / "target"
    pip("install", wheel, "--target", target)
    bare = make_environment(tmp_path / "environment")
    assert_imports_from(target, cwd=tmp_path, path=target, executable=bare)
    # From a checkout the checkout wins, whole: never half of one and half of the other.
    assert_imports_from(ROOT, cwd=ROOT, path=target, executable=bare)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-e"]], ids=["plain", "editable"])
def test_install_works_from_any_folder(tmp_path, source, options):
    bare = make_environment(tmp_path / "environment")
    pip("install", *options, source, executable=bare)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert_imports_from(source if options else bare.parent.parent, cwd=elsewhere, executable=bare)
    for command in ([bare.with_name("megatron-lowbit")], [bare, "-m", "megatron_lowbit"]):
        assert "generate" in call(*command, "--help", cwd=elsewhere)
