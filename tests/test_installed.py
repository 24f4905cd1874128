"""Installed with pip, not editable: everything is carried, and commands work in any folder."""
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import BASE, ROOT

from runtime.config import shipped

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that `pip install --target` has filled, from a copy of the files that git has."""
    folder = tmp_path_factory.mktemp("installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0")[:-1]:
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile",
             "--no-index", "--target", str(folder / "packages"), str(folder / "source")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_configurations_templates_and_the_base_are_carried(installed):
    """Every file of the packages that git has, and every script."""
    folders = [name.replace(".", "/") for name in PROJECT["packages"]]
    expected = {path.relative_to(installed / "source") for folder in folders
                for path in (installed / "source" / folder).rglob("*") if path.is_file()}
    expected |= {Path(f"{name}.py") for name in PROJECT["py-modules"]}
    missing = {str(path) for path in expected if not (installed / "packages" / path).is_file()}
    assert missing == set() and {Path("data/tiny/base/model.safetensors"), Path("collect/annotate.html")} <= expected
    scripts = {path.stem for path in (installed / "source").glob("*.py")}
    assert scripts == set(PROJECT["py-modules"])


def test_sft_and_judge_run_from_an_empty_folder(installed, tmp_path):
    """With the shipped configurations and base model, which are named in what is printed."""
    environment = {"PYTHONPATH": str(installed / "packages"), "OMP_NUM_THREADS": "1"}

    def run(module: str, *words: str) -> str:
        done = subprocess.run([sys.executable, "-m", module, *words], cwd=tmp_path, env=os.environ | environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("data.tiny.build", "part=data", "out=runs/tiny/0/data", "demos=20", "prompts=1", "more_prompts=1", "evals=1")
    said = run("sft", "--config", "configs/tiny/sft.toml", "max_steps=1", "batch=4", "threads=1", "device=cpu",
               "eval_data=")
    assert f"data/tiny/base: the one installed in {installed / 'packages'}" in said
    config = tomllib.loads((tmp_path / "runs/tiny/0/sft/config.toml").read_text())
    assert config["model"] == str(installed / "packages" / "data/tiny/base") and config["batch"] == 4
    run("judge", "--config", "configs/tiny/judge.toml", 'models=["base=data/tiny/base", "SFT=runs/tiny/0/sft/model"]',
        "max_tokens=4", "threads=1", "device=cpu")
    assert (tmp_path / "runs/tiny/0/judge/report.html").is_file()


def test_a_path_of_the_current_folder_comes_before_the_installed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert shipped("base=data/tiny/base") == f"base={BASE}"
    assert shipped("3 * rewards/tiny.py:required") == f"3 * {ROOT}/rewards/tiny.py:required"
    assert shipped("/data/tiny/base") == "/data/tiny/base" and shipped("my/configs/tiny/sft.toml")[:3] == "my/"
    assert shipped("configs/tiny/none.toml") == "configs/tiny/none.toml"
    (tmp_path / "data" / "tiny" / "base").mkdir(parents=True)
    assert shipped("base=data/tiny/base") == "base=data/tiny/base"
