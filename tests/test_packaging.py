"""The wheel, installed where the repository is not: data files, side packages and the console command are all in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PACKAGES = ("lens_megatron", "model_configs", "launchers", "checkpoints_tools")
DATA = (".typed", ".yaml", ".json", ".jsonl", ".html", ".jinja", ".sh", ".css", ".js")


def source_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in (".py", *DATA) and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_the_pinned_versions_exist_for_every_python_that_we_promise(python: str) -> None:
    """As far as what is installed here says: a pin that another Python cannot have stops `make install` there."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    looked_at = 0
    for requirement in (Requirement(line) for line in lines if line):
        try:
            found = metadata(requirement.name)
        except PackageNotFoundError:
            continue
        meant = requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        if meant and requirement.specifier.contains(found["Version"]):
            looked_at += 1
            assert SpecifierSet(found["Requires-Python"] or "").contains(f"{python}.0"), requirement
    assert looked_at > 10


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, text=True)
    return folder


def run_outside(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Our package from `installed` alone: its path first, the repository's editable install undone."""
    start = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]; "
        f"sys.path[:] = [{str(installed)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]; "
    )
    return subprocess.run(
        [sys.executable, "-c", start + arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_every_source_and_data_file_is_in_the_wheel(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert source_files() <= inside
    strays = {name for name in inside if name.split("/")[0] not in PACKAGES or "__pycache__" in name}
    assert not strays


def test_licence_and_console_command_are_declared(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    by_end = {name.split(".dist-info/")[-1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in by_end
    assert "lens-megatron = lens_megatron.cli:main" in archive.read(by_end["entry_points.txt"]).decode()


def test_side_packages_and_data_are_found_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    code = (
        "import lens_megatron, model_configs, launchers, checkpoints_tools; "
        "from pathlib import Path; "
        "[print(Path(m.__file__).parent) for m in (lens_megatron, model_configs, launchers, checkpoints_tools)]; "
        "print(len(list(Path(model_configs.__file__).parent.glob('*.yaml')))); "
        "print(len(list((Path(lens_megatron.__file__).parent / 'algorithms' / 'presets').glob('*.yaml'))))"
    )
    done = run_outside(installed, tmp_path, code)
    assert done.returncode == 0, done.stderr
    *folders, models, presets = done.stdout.splitlines()
    assert folders == [str(installed / package) for package in PACKAGES]
    assert int(models) == len(list((ROOT / "model_configs").glob("*.yaml"))) >= 19
    assert int(presets) == len(list((ROOT / "lens_megatron" / "algorithms" / "presets").glob("*.yaml")))


def test_the_console_command_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "lens-megatron"
    assert script.is_file()
    code = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_outside(installed, tmp_path, code, str(script), "models", "--json", "models.json")
    assert done.returncode == 0, done.stderr
    assert "8.19B" in done.stdout
    assert '"qwen3-8b-base"' in (tmp_path / "models.json").read_text()
