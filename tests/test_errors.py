from __future__ import annotations

import pytest

from tmca import errors
from tmca.errors import EXIT_INTERRUPTED, ConfigError, DataError, TMCAError, unknown_name

TABLE = {
    "TMCAError": (1, 500, "runtime_error"),
    "ConfigError": (2, 422, "invalid_config"),
    "DataError": (3, 422, "invalid_input"),
    "PartialFailureError": (4, 207, "some_cases_failed"),
    "CheckpointError": (5, 503, "invalid_checkpoint"),
    "WeightsError": (5, 503, "weights_missing"),
    "OutOfMemoryError": (6, 503, "out_of_memory"),
    "ParityError": (1, 500, "masks_differ"),
    "StorageError": (1, 507, "cannot_write"),
}


def _classes() -> dict[str, type[TMCAError]]:
    return {
        name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, TMCAError)
    }


def test_the_table_of_exit_codes_is_complete():
    assert {name: (cls.exit_code, cls.http_status, cls.code) for name, cls in _classes().items()} == TABLE
    assert EXIT_INTERRUPTED == 130


def test_codes_are_distinct():
    codes = [cls.code for cls in _classes().values()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", _classes().values())
def test_an_error_says_what_was_wrong_and_what_to_do(cls: type[TMCAError]):
    error = cls("got 3, expected 4", hint="add one")
    assert (error.message, error.hint) == ("got 3, expected 4", "add one")
    assert str(error) == "got 3, expected 4 (add one)"
    assert str(cls("got 3, expected 4")) == "got 3, expected 4"
    assert isinstance(error, TMCAError)


def test_causes_are_kept_apart():
    with pytest.raises(DataError):
        raise DataError("no image")
    assert not issubclass(DataError, ConfigError)
    assert not issubclass(DataError, ValueError)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    error = unknown_name("colour", "gren", iter(["red", "green", "blue"]))
    assert isinstance(error, ConfigError)
    assert error.message == "Unknown colour 'gren'; known: blue, green, red"
    assert error.hint == "did you mean 'green'?"


def test_an_unknown_name_that_is_near_to_nothing():
    assert unknown_name("colour", "xyz", ["red", "green"]).hint == "choose one of the known names"
