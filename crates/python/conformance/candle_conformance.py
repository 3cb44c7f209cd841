"""pytest plugin: coremltools' own tests, with this engine under `predict`. It records and counts; it changes no result.

    cd SITE-PACKAGES
    python -m pytest -p candle_conformance -p no:cacheprovider coremltools/converters/mil/mil/ops/tests/iOS14

CONFORMANCE_RECORD=FILE   one JSON line a test: its name, outcome, whether it reached predict, precision and version of its
                          programs, what loading took, why it failed
CONFORMANCE_EVERY=N       every N-th test of those collected, the same ones each time; CONFORMANCE_PART=K (0 to N-1): which ones
CONFORMANCE_PRECISION=P   only tests whose programs are fp32 or fp16, and those that do not say
CONFORMANCE_DONE=FILE     names of tests to leave out, one a line; CONFORMANCE_ONLY=FILE: names of the tests to run
CONFORMANCE_NAMES=FILE    where to write the names of the tests that are chosen
CONFORMANCE_ATOL, _RTOL   upper bounds for the tolerances that tests give numpy (they allow 0.5 and 0.05 for fp16)
CONFORMANCE_GRID=G        the random numbers that tests draw are multiples of 1/G. With G = 16, float16 holds them, and most sums of
                          their products: a test that fails without it and passes with it computed its expectation from numbers
                          that its program does not have

Tests draw the same random numbers in every run.
"""

import candle_coreml.coremltools as bridge  # before coremltools

import gc
import hashlib
import json
import os
import random
import signal
import sys

import numpy as np
import pytest

_versions = set()
_loads = []


def _watch_predict():
    whole = bridge._MLModelProxy.predict

    def watched(self, *arguments):
        _versions.add(self._model.specification_version)
        return whole(self, *arguments)

    bridge._MLModelProxy.predict = watched


def _watch_load():
    whole = bridge._MLModelProxy.__init__

    def watched(self, *arguments, **named):
        whole(self, *arguments, **named)
        _loads.append(self.get_load_duration_in_nano_seconds())

    bridge._MLModelProxy.__init__ = watched


_watch_predict()
_watch_load()


def _bound_tolerances():
    bounds = {k: os.environ.get(f"CONFORMANCE_{k.upper()}") for k in ("atol", "rtol")}
    if not any(bounds.values()):
        return
    whole = np.testing.assert_allclose

    def bounded(actual, desired, rtol=1e-7, atol=0, **others):
        rtol = min(rtol, float(bounds["rtol"] or "inf"))
        atol = min(atol, float(bounds["atol"] or "inf"))
        return whole(actual, desired, rtol=rtol, atol=atol, **others)

    np.testing.assert_allclose = bounded


_bound_tolerances()


def _on_grid(grid):
    """Rounds the random numbers of numpy and PyTorch to multiples of 1/grid."""

    def rounded(draw):
        return lambda *arguments, **named: np.round(np.multiply(draw(*arguments, **named), grid)) / grid

    for name in ("rand", "randn", "random", "random_sample", "sample", "uniform", "normal"):
        setattr(np.random, name, rounded(getattr(np.random, name)))
    try:
        import torch
    except ImportError:
        return

    def drawn(draw):
        return lambda *arguments, **named: torch.round(draw(*arguments, **named) * grid) / grid

    def filled(fill):
        def inner(tensor, *arguments, **named):
            fill(tensor, *arguments, **named)
            with torch.no_grad():
                return tensor.copy_(torch.round(tensor * grid) / grid)

        return inner

    for name in ("rand", "randn"):
        setattr(torch, name, drawn(getattr(torch, name)))
    for name in ("uniform_", "normal_"):
        setattr(torch.Tensor, name, filled(getattr(torch.Tensor, name)))


def _too_long(*_):
    raise TimeoutError(f"no numbers were found on the grid in {_GRID_SECONDS} s")


_grid = int(os.environ.get("CONFORMANCE_GRID", "0"))
#: A test that wants numbers that all differ may never find enough of them on the grid.
_GRID_SECONDS = 120


def _seed(item):
    place = _place(item)
    random.seed(place)
    np.random.seed(place)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(place)


if _grid:
    _on_grid(_grid)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, _too_long)


def _precision(item):
    """Precision of the programs that a test makes, where one of its parameters says it."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    for value in parameters:
        found = getattr(value, "precision", None)
        if isinstance(value, tuple) and len(value) > 1 and value[0] == "mlprogram":
            found = value[1]
        if found in ("fp16", "fp32"):
            return found
    return ""


def _name(nodeid):
    """The name of a test on one line: some have arrays in it."""
    return nodeid.replace("\n", "\\n")


def _names(variable):
    path = os.environ.get(variable)
    if not path:
        return None
    with open(path, encoding="utf-8") as file:
        return set(file.read().split("\n"))


def _place(item):
    """A number that is the same in every run and has nothing to do with what the test is."""
    return int(hashlib.sha1(item.nodeid.encode()).hexdigest()[:8], 16)


def _chosen(item, done, only):
    every = int(os.environ.get("CONFORMANCE_EVERY", "1"))
    part = int(os.environ.get("CONFORMANCE_PART", "0"))
    precision = os.environ.get("CONFORMANCE_PRECISION", "")
    name = _name(item.nodeid)
    if done is not None and name in done or only is not None and name not in only:
        return False
    if precision and _precision(item) not in ("", precision):
        return False
    return every == 1 or _place(item) % every == part


def pytest_collection_modifyitems(config, items):
    done, only = _names("CONFORMANCE_DONE"), _names("CONFORMANCE_ONLY")
    kept, left = [], []
    for item in items:
        (kept if _chosen(item, done, only) else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
    # In this order the tests of a run that was cut are a fair sample of all of them.
    items[:] = sorted(kept, key=_place)
    names = os.environ.get("CONFORMANCE_NAMES")
    # With several workers each of them collects the same.
    if names and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        with open(names, "w", encoding="utf-8") as file:
            file.write("\n".join(_name(item.nodeid) for item in kept))


def pytest_collection_finish(session):
    # coremltools collects garbage in each conversion: with tens of thousands of tests in memory that takes longer than the
    # conversion, unless the collector is told that they stay.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _versions.clear()
    _loads.clear()
    _seed(item)
    if _grid and hasattr(signal, "alarm"):
        signal.alarm(_GRID_SECONDS)
    yield
    if _grid and hasattr(signal, "alarm"):
        signal.alarm(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    report.reached = sorted(_versions)
    report.loads = list(_loads)
    report.precision = _precision(item)


def pytest_runtest_logreport(report):
    record = os.environ.get("CONFORMANCE_RECORD")
    # With several workers the controller sees all reports; workers do not write.
    if not record or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
        line = {
            "test": _name(report.nodeid),
            "outcome": report.outcome,
            "when": report.when,
            "reached": getattr(report, "reached", []),
            "precision": getattr(report, "precision", ""),
            "loads_us": [round(ns / 1000) for ns in getattr(report, "loads", [])],
            "seconds": round(report.duration, 3),
            "reason": reason[:2000],
        }
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
