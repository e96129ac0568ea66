"""Does the package install and run on each Python? `pip install nox && nox`, by hand: torch is a download of gigabytes.

Each session makes a fresh environment, of gigabytes, in .nox/ and measures it by `benchmarks/pythons.py`, which writes
results/pythons.md. One: `nox -s newest-3.12`; all of a kind: `nox -s numpy1`. Needs python3.10 to python3.13 on PATH.
"""

import nox

TORCH = "torch==2.13.0"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def measure(session, *options):
    kind = session.name.rpartition("-")[0]
    session.run("python", "benchmarks/pythons.py", f"--name={session.python}-{kind}", *options)


@nox.session(python=PYTHONS)
def newest(session):
    """What pip takes today, by the README's command."""
    session.install(TORCH, "-e", ".[test]")
    measure(session)


@nox.session(python=["3.11", "3.12"])
def numpy1(session):
    """The last numpy 1, pandas 2, and setuptools that still have what RecBole 1.2.1's ray imports."""
    session.install(TORCH, "-e", ".[test]", "numpy==1.26.4", "pandas<3", "setuptools<81")
    measure(session)


@nox.session(python=["3.12", "3.13"])
def recbole121(session):
    """RecBole 1.2.1 where its own requirement, ray<=2.6.3, cannot be met."""
    session.install(TORCH, "-e", ".[test]")
    session.install("--no-deps", "recbole==1.2.1")
    measure(session)


@nox.session(python=PYTHONS)
def alone(session):
    """RecBole without this package."""
    session.install(TORCH, "recbole")
    measure(session, "--alone")
