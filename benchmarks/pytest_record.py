"""A pytest plugin that notes every outcome as it comes, so that a run that is stopped still has counts.

MOS_EXT_TEST_RECORD=FILE python -m pytest -p benchmarks.pytest_record
"""

import json
import os


def pytest_runtest_logreport(report):
    # With xdist every report also reaches the controlling process; only that one writes.
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    outcome = report.outcome if report.when == "call" or report.skipped else "error"
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    row = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3)}
    if outcome in ("failed", "error"):
        row["why"] = str(report.longrepr)[-1500:]
    with open(os.environ["MOS_EXT_TEST_RECORD"], "a") as f:
        f.write(json.dumps(row) + "\n")
