from __future__ import annotations

import inspect

from checkpointd import errors
from checkpointd.cli.main import exit_codes


def classes() -> list[type[errors.CheckpointdError]]:
    found = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [error for error in found if issubclass(error, errors.CheckpointdError)]


def test_no_two_errors_share_an_exit_code() -> None:
    codes = [error.exit_code for error in classes()]
    assert len(codes) > 10
    assert len(set(codes)) == len(codes)


def test_exit_codes_are_in_their_range() -> None:
    """1 degraded, 2 usage, 3 to 99 one each; 128 and above are signals."""
    for error in classes():
        assert 1 <= error.exit_code <= 99, error
        assert (error.exit_code == 1) == (error is errors.CheckpointdError), error
        assert (error.exit_code == 2) == (error is errors.UsageError), error


def test_every_error_says_what_it_means() -> None:
    for error in classes():
        assert "__doc__" in vars(error), error
        assert (inspect.getdoc(error) or "").endswith("."), error


def test_the_help_has_them_all() -> None:
    assert set(exit_codes()) == {0, *(error.exit_code for error in classes())}
