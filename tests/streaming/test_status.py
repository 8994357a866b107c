"""What clients read at the end."""

from __future__ import annotations

import json

from shim_streaming import status


def test_success_is_told_in_json_only() -> None:
    assert json.loads(status.success().json) == {"metadata": {}, "status": "Success"}
    assert status.success().text == b""
    assert status.exited(0) == status.success()


def test_exit_code_is_a_cause() -> None:
    assert json.loads(status.exited(137).json) == {
        "metadata": {},
        "status": "Failure",
        "message": "command terminated with non-zero exit code: 137",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": "137"}]},
    }


def test_failure() -> None:
    failed = status.failed("no such file: \udcff/x")
    assert json.loads(failed.json)["message"] == "Internal error occurred: no such file: \udcff/x"
    assert failed.text == b"Internal error occurred: no such file: ?/x"
