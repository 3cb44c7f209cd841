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
"""

import candle_coreml.coremltools as bridge  # before coremltools

import hashlib
import json
import os

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


def _names(variable):
    path = os.environ.get(variable)
    if not path:
        return None
    with open(path, encoding="utf-8") as file:
        return set(file.read().split("\n"))


def _chosen(item, done, only):
    every = int(os.environ.get("CONFORMANCE_EVERY", "1"))
    part = int(os.environ.get("CONFORMANCE_PART", "0"))
    precision = os.environ.get("CONFORMANCE_PRECISION", "")
    name = item.nodeid
    if done is not None and name in done or only is not None and name not in only:
        return False
    if precision and _precision(item) not in ("", precision):
        return False
    return every == 1 or int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) % every == part


def pytest_collection_modifyitems(config, items):
    done, only = _names("CONFORMANCE_DONE"), _names("CONFORMANCE_ONLY")
    kept, left = [], []
    for item in items:
        (kept if _chosen(item, done, only) else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
    names = os.environ.get("CONFORMANCE_NAMES")
    if names and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(names, "w", encoding="utf-8") as file:
            file.write("\n".join(item.nodeid for item in kept))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _versions.clear()
    _loads.clear()
    yield


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
            "test": report.nodeid,
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
