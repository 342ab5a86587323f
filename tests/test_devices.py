from __future__ import annotations

import pytest
import torch

from tmca.devices import resolve_device
from tmca.errors import ConfigError


def test_auto_is_what_the_environment_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TMCA_DEVICE", "cpu")
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setenv("TMCA_DEVICE", "")
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("TMCA_DEVICE", "abacus")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="abacus"):
        resolve_device("auto")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0:1"])
def test_an_unknown_device_is_refused(name: str):
    with pytest.raises(ConfigError, match="Unknown device"):
        resolve_device(name)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="'cuda:99' is not available"):
        resolve_device("cuda:99")
