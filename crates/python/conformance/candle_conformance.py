"""pytest plugin: coremltools' own tests, with this engine under `predict`. It records and counts; it changes no result.

    cd SITE-PACKAGES
    python -m pytest -p candle_conformance -p no:cacheprovider coremltools/converters/mil/mil/ops/tests/iOS14

CONFORMANCE_RECORD=FILE   one JSON line a test: its name, outcome, whether it reached predict, model versions, why it failed
CONFORMANCE_EVERY=N       every N-th test of those collected, the same ones each time; CONFORMANCE_PART=K (0 to N-1): which ones
CONFORMANCE_ATOL, _RTOL   upper bounds for the tolerances that tests give numpy (they allow 0.5 and 0.05 for fp16)
"""

import candle_coreml.coremltools as bridge  # before coremltools

import hashlib
import json
import os

import numpy as np
import pytest

_versions = set()
_failures = []


def _watch(name):
    whole = getattr(bridge._MLModelProxy, name)

    def watched(self, *arguments):
        _versions.add(self._model.specification_version)
        return whole(self, *arguments)

    setattr(bridge._MLModelProxy, name, watched)


_watch("predict")


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


def pytest_collection_modifyitems(config, items):
    every = int(os.environ.get("CONFORMANCE_EVERY", "1"))
    part = int(os.environ.get("CONFORMANCE_PART", "0"))
    if every > 1:
        chosen = [i for i in items if int(hashlib.sha1(i.nodeid.encode()).hexdigest()[:8], 16) % every == part]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
        items[:] = chosen


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _versions.clear()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    report.reached = sorted(_versions)


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
            "seconds": round(report.duration, 3),
            "reason": reason[:2000],
        }
        with open(record, "a") as file:
            file.write(json.dumps(line) + "\n")
