"""Runs the tests in two processes, since a test keeps one core busy and a laptop has more.

pytest forks once it has collected the tests. One process takes them from the front, the other
from the back, until they meet. Then the first process reports what the second one saw.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# Where a process has used a GPU, or macOS's frameworks, its fork does not work.
CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()


class Half:
    """The hooks of one process: it takes tests while there are some, and notes its reports."""

    def __init__(self, config: pytest.Config, tickets: int, reports: Path | None) -> None:
        self.config, self.tickets, self.reports = config, tickets, reports

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        return None if os.read(self.tickets, 1) else True  # True: the other process has it

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.reports:
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with self.reports.open("a") as file:
                file.write(json.dumps(data) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session):
    config = session.config
    one_file = len({item.path for item in session.items}) < 2
    if one_file or not CAN_FORK or config.option.collectonly or config.option.usepdb:
        return (yield)
    tickets, write = os.pipe()  # one byte for every test: reading one takes the test
    os.write(write, bytes(len(session.items)))
    os.close(write)
    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    torch.compiler.reset()  # imports what every optimizer needs, once for both
    second = os.fork()
    if second == 0:
        session.items.reverse()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Half(config, tickets, reports=Path(name)))
        return (yield)
    config.pluginmanager.register(Half(config, tickets, reports=None))
    try:
        result = yield
    except BaseException:  # Ctrl-C, or a failure with -x
        os.kill(second, signal.SIGINT)
        raise
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
        lines = Path(name).read_text().splitlines()
        Path(name).unlink()
    for data in map(json.loads, lines):
        if isinstance(data["longrepr"], list):  # where and why it was skipped; JSON has no tuples
            data["longrepr"] = tuple(data["longrepr"])
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        config.hook.pytest_runtest_logreport(report=report)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the second process of the tests ended with {status}")
    return result
