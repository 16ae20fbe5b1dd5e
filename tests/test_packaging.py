"""What gets installed, and that a checkout works without installing."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

PACKAGES = {"dsparse": "dsparse", "dsparse/training": "dsparse/training", "dsparse/kernels": "kernels",
            "dsparse/checkpoints": "checkpoints"}  # fmt: skip


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "tree"  # building writes into the tree, so build a copy
    ignored = (".git", ".venv", "runs", "tests", "examples", "benchmarks")
    import shutil

    shutil.copytree(ROOT, source, ignore=lambda folder, names: [n for n in names if n in ignored or n == "__pycache__"])
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


def test_wheel_holds_every_module_once(wheel_files):
    expected = {f"{target}/{file.name}" for target, source in PACKAGES.items() for file in (ROOT / source).glob("*.py")}
    assert set(wheel_files) == expected
    assert len(wheel_files) == len(expected)


def test_every_subpackage_is_listed():
    folders = {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "dsparse").rglob("*.py")}
    assert folders <= set(PACKAGES), "add the new subpackage to pyproject.toml and here"


@pytest.mark.parametrize("folder", ["kernels", "checkpoints"])
def test_top_level_folders_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def run_python(code: str, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(cwd), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_from_the_root():
    assert run_python("import transformers; print(transformers.AutoModelForCausalLM.__name__)", ROOT).strip()


def test_checkout_works_uninstalled(tmp_path):
    code = "import dsparse, dsparse.checkpoints.mapping as m, dsparse.kernels; print(m.__file__)"
    assert run_python(code, tmp_path).strip() == str(ROOT / "checkpoints" / "mapping.py")


def test_importing_dsparse_stays_light(tmp_path):
    heavy = ("torch", "transformers", "tokenizers", "orbax", "tqdm", "matplotlib", "tensorboardX")
    code = f"import sys, dsparse, dsparse.cli; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_python(code, tmp_path).strip() == "[]"
