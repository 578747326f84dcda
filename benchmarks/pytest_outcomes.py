"""A plugin of pytest that says at once what failed, and how many passed: `pytest -p benchmarks.pytest_outcomes`.

A run of tests that is stopped in the middle has then told what it knew.
"""

from typing import Any

from benchmarks import outcomes
from benchmarks.outcomes import FAILED, PASSED


class _Telling:
    def __init__(self, config: Any) -> None:
        self.config, self.passed, self.failed = config, 0, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            self._tell(report.nodeid, FAILED, str(report.longrepr) if crash is None else crash.message)
        elif report.passed and report.when == "call":
            self.passed += 1
            if self.passed % 20 == 0:
                self._tell("tests so far", FAILED if self.failed else PASSED, passed=self.passed, failed=self.failed)

    def _tell(self, name: str, outcome: str, cause: str = "", **counts: int) -> None:
        cause = outcomes.innermost_line(cause) if cause else ""
        # What is printed to standard output is captured.
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write(f"\n{outcomes.line(name, outcome, cause, **counts)}\n")


def pytest_configure(config: Any) -> None:
    """pytest's hook."""
    if not hasattr(config, "workerinput"):  # with xdist the first process hears of all
        config.pluginmanager.register(_Telling(config))
