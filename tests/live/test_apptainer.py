"""Singularity and Apptainer: each test on the strict stand-in and, where it is installed, on the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.apptainer import Apptainer

pytestmark = pytest.mark.live

# ---- what the stand-in is strict about, tried on the real one too -----------------------------------


@pytest.fixture(scope="session")
def tree(apptainer: Apptainer, python_rootfs: Path) -> Path:
    """An image that is a folder."""
    return python_rootfs


def test_only_what_is_bound_is_visible(apptainer: Apptainer, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    seen = ["exec", "--contain", "--bind", f"{tmp_path}:/.envkernel:ro", tree, "sh", "-c"]
    assert apptainer.run(*seen, "cat /.envkernel/file").stdout == "text"
    assert apptainer.run(*seen, f"ls {tmp_path} || echo hidden").stdout == "hidden\n"
    assert "Read-only" in apptainer.run(*seen, "touch /.envkernel/new", status=1).stderr


def test_a_bind_without_source_is_refused(apptainer: Apptainer, tree: Path) -> None:
    said = apptainer.run("exec", "--bind", "/no/such/folder:/a", tree, "true", status=255)
    assert "mount source /no/such/folder doesn't exist" in said.stderr


@pytest.mark.parametrize("option", ["--volume=/a:/b", "--network-alias", "-v"])
def test_options_it_does_not_have_are_refused(apptainer: Apptainer, tree: Path, option: str) -> None:
    assert "unknown" in apptainer.run("exec", option, tree, "true", status=1).stderr


def test_the_host_is_there_unless_contained(apptainer: Apptainer, tree: Path, tmp_path: Path) -> None:
    assert apptainer.run("exec", tree, "ls", "-d", "/proc/self", tmp_path).returncode == 0
    assert apptainer.run("exec", "--contain", tree, "sh", "-c", "ls -A ~ /tmp; pwd").stdout.split() == [
        *("/root:", "/tmp:"),
        os.path.expanduser("~root"),
    ]


def test_variables_are_evaluated_unless_told_otherwise(
    apptainer: Apptainer, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINERENV_X", '$(echo evaluated) "q"')
    show = ("exec", "--cleanenv", tree, "printenv", "X")
    assert apptainer.run(*show).stdout == 'evaluated "q"\n'
    monkeypatch.setenv("APPTAINER_NO_EVAL", "1")
    assert apptainer.run(*show).stdout == '$(echo evaluated) "q"\n'
