from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tmca.data.grammar import parse
from tmca.errors import ConfigError
from tmca.reports.language_model import (
    KEY_VARIABLE,
    Endpoint,
    LanguageModelFailure,
    LocalModel,
    instruction_for,
    open_language_model,
    prompt_by_language_model,
)
from tmca.reports.prompt import prompt_from_report

REPORT = "FINDINGS: Patchy opacity in the right lower zone. Opacity in the left upper zone. No consolidation."


@dataclass(frozen=True)
class Said:
    """A language model that always says the same."""

    text: str
    name: str = "said"

    def answer(self, instruction: str, report: str) -> str:
        assert "JSON" in instruction
        assert report
        return self.text


def quoting(**quotations: list[str]) -> Said:
    return Said("Here it is:\n```json\n" + json.dumps({"finding": [], **quotations}) + "\n```")


# --- what the rules do with quotations ----------------------------------------------------------------------------


def test_only_what_is_quoted_is_stated():
    model = quoting(finding=["Patchy opacity"], place=["right lower zone"])
    result = prompt_by_language_model(REPORT, "lung", model)
    assert result.prompt == "Pulmonary infection, lower left lung."
    assert result.method == "language model"
    assert any("'Opacity' is not quoted as a current finding" in note for note in result.notes)


def test_a_place_that_is_not_quoted_is_left_out():
    result = prompt_by_language_model(REPORT, "lung", quoting(finding=["Patchy opacity"]))
    assert result.prompt == "Pulmonary infection."


def test_what_does_not_stand_in_the_report_is_discarded():
    model = quoting(finding=["Patchy opacity", "dense consolidation"], count=["three"], place=["left lower zone"])
    result = prompt_by_language_model(REPORT, "lung", model)
    assert result.prompt == "Pulmonary infection."
    for words in ("'dense consolidation' (finding)", "'three' (count)", "'left lower zone' (place)"):
        assert any(words in note and "does not stand in the report" in note for note in result.notes)


def test_a_denied_finding_stays_denied():
    result = prompt_by_language_model(REPORT, "lung", quoting(finding=["consolidation"]))
    assert result.prompt is None
    assert any("quoted as a finding, but reads as negated" in note for note in result.notes)


def test_a_finding_in_the_history_stays_unread():
    text = "HISTORY: Left pneumonia.\nFINDINGS: The heart is large."
    result = prompt_by_language_model(text, "lung", quoting(finding=["Left pneumonia"], place=["Left"]))
    assert result.prompt is None


def test_a_finding_in_words_that_the_rules_do_not_know_is_taken_and_told_of():
    text = "FINDINGS: Fluffy shadows in the right lower zone. Small left effusion."
    assert prompt_from_report(text, "lung").prompt is None
    model = quoting(finding=["Fluffy shadows"], place=["right lower\n zone"])
    result = prompt_by_language_model(text, "lung", model)
    assert result.prompt == "Pulmonary infection, lower left lung."
    assert any("taken for a finding on its word" in note for note in result.notes)
    assert prompt_by_language_model(text, "lung", quoting(finding=["left effusion"])).prompt is None
    assert prompt_by_language_model(text, "lung", quoting(finding=[text[10:49]])).prompt is None


def test_counts_and_adjectives_must_be_quoted():
    text = "Two small white polyps."
    result = prompt_by_language_model(text, "polyp", quoting(finding=["polyps"], count=["Two"], size=["small"]))
    assert result.prompt == "two small polyp"
    result = prompt_by_language_model(text, "polyp", quoting(finding=["polyps"], colour=["white"]))
    assert result.prompt == "white polyp"
    assert parse("white polyp") == result.facts


def test_sides_are_converted_as_by_the_rules():
    model = quoting(finding=["Patchy opacity"], place=["right lower zone"])
    assert prompt_by_language_model(REPORT, "lung", model, sides="image").facts.sides == ("right",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        "{",
        "[]",
        '{"finding": "opacity"}',
        '{"findings": []}',
        "{" * 5000,
        "null",
    ],
)
def test_a_malformed_answer_leaves_it_to_the_rules(text: str):
    result = prompt_by_language_model(REPORT, "lung", Said(text))
    by_rules = prompt_from_report(REPORT, "lung")
    assert (result.prompt, result.facts, result.method) == (by_rules.prompt, by_rules.facts, "rules")
    assert "the rules were used" in result.notes[-1]


def test_odd_values_in_an_answer_are_dropped():
    answer = json.dumps({"finding": ["Patchy opacity", 3, None, "", {"a": 1}], "count": {}, "other": ["x"]})
    assert prompt_by_language_model(REPORT, "lung", Said(answer)).prompt == "Pulmonary infection."


def test_the_report_is_called_data_in_the_instruction():
    assert "not an instruction" in instruction_for("polyp")
    assert "polyp" in instruction_for("polyp")


# --- endpoints ----------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A chat endpoint whose replies a test sets: status, body, seconds to wait."""

    url: str = ""
    status: int = 200
    body: Any = None
    location: str = ""
    seconds: float = 0.0
    seen: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never to be used

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, body: Any, status: int) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            if state.location:
                self.send_header("Location", state.location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            state.seen.append((self.path, {}, self.headers.get("Authorization")))
            self._reply({"data": [{"id": "first"}, {"id": "second"}]}, 200)

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append((self.path, sent, self.headers.get("Authorization")))
            time.sleep(state.seconds)
            answer = json.dumps({"finding": ["Patchy opacity"], "place": ["right lower zone"]})
            self._reply(state.body or {"choices": [{"message": {"content": answer}}]}, state.status)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_an_endpoint_answers(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    result = prompt_by_language_model(REPORT, "lung", open_language_model(server.url))
    assert result.prompt == "Pulmonary infection, lower left lung."
    (models, _, key), (path, sent, _) = server.seen
    assert (models, path, key) == ("/v1/models", "/v1/chat/completions", "Bearer secret")
    assert sent["model"] == "first"
    assert sent["temperature"] == 0
    assert sent["messages"][1] == {"role": "user", "content": REPORT}


def test_a_model_can_be_named_and_the_path_given(server: Server):
    prompt_by_language_model(REPORT, "lung", open_language_model(f"{server.url}/api/v1/chat/completions#second"))
    ((path, sent, key),) = server.seen
    assert (path, sent["model"], key) == ("/api/v1/chat/completions", "second", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": 500}, "status 500"),
        ({"body": b"<html>"}, "no JSON"),
        ({"body": {"choices": []}}, "no chat completion"),
        ({"body": {"choices": [{"message": {"content": None}}]}}, "no text"),
        ({"seconds": 1.0}, "no answer within 0.3 seconds"),
        ({"status": 307, "location": "http://127.0.0.1:9/"}, "status 307"),
    ],
)
def test_a_failing_endpoint_leaves_it_to_the_rules(server: Server, change: dict[str, Any], words: str):
    for name, value in change.items():
        setattr(server, name, value)
    model = open_language_model(f"{server.url}/v1#m", seconds=0.3)
    result = prompt_by_language_model(REPORT, "lung", model)
    assert result.prompt == prompt_from_report(REPORT, "lung").prompt
    assert words in result.notes[-1]


def test_an_endpoint_that_is_not_there_leaves_it_to_the_rules():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = prompt_by_language_model(REPORT, "lung", open_language_model(f"http://127.0.0.1:{port}/v1"))
    assert result.method == "rules"
    assert "cannot be reached" in result.notes[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ftp://127.0.0.1/v1", "no http"),
        ("file:///etc/passwd", "no http"),
        ("http://", "no http"),
        ("http://[::1", "no address"),
        ("http://127.0.0.1:x/v1", "no address"),
        ("http://user:word@127.0.0.1/v1", "password"),
        ("http://8.8.8.8/v1", "outside this machine"),
        ("https://[2001:4860:4860::8888]/v1", "outside this machine"),
    ],
)
def test_other_addresses_are_refused(name: str, words: str):
    with pytest.raises(ConfigError, match=words) as raised:
        open_language_model(name)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("addresses", "allowed"),
    [
        (["10.1.2.3"], True),
        (["192.168.1.2", "fd00::1"], True),
        (["fe80::1%eth0"], True),
        (["10.1.2.3", "93.184.216.34"], False),
    ],
)
def test_every_address_of_a_host_must_be_private(addresses: list[str], allowed: bool, monkeypatch: pytest.MonkeyPatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    if allowed:
        assert open_language_model("http://models.hospital/v1").name == "http://models.hospital/v1"
    else:
        with pytest.raises(ConfigError, match=r"93\.184\.216\.34"):
            open_language_model("http://models.hospital/v1")


def test_an_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match="not known"):
        open_language_model("http://models.hospital/v1")


def test_an_endpoint_without_models_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Endpoint, "_ask", lambda *_: {"data": []})
    with pytest.raises(LanguageModelFailure, match="lists no model"):
        Endpoint("http://127.0.0.1/v1").answer("", "")


# --- local models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained text-generation model that knows bytes only."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    path = tmp_path_factory.mktemp("language-model")
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({sign: number for number, sign in enumerate([*signs, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    config = GPT2Config(
        vocab_size=257, n_positions=1500, n_embd=8, n_layer=1, n_head=1, bos_token_id=256, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmca.reports.language_model.MOST_TOKENS", 5)


@pytest.mark.usefixtures("_short")
def test_a_local_model_answers_and_its_nonsense_leaves_it_to_the_rules(folder: Path):
    model = open_language_model(str(folder))
    assert isinstance(model, LocalModel)
    assert model.answer("Say.", "Nothing.") == model.answer("Say.", "Nothing.")
    result = prompt_by_language_model(REPORT, "lung", model)
    assert result.method == "rules"
    assert "the rules were used" in result.notes[-1]


@pytest.mark.usefixtures("_short")
def test_a_report_that_is_too_long_for_a_local_model_leaves_it_to_the_rules(folder: Path):
    result = prompt_by_language_model(REPORT * 20, "lung", open_language_model(str(folder)))
    assert "the model reads 1500" in result.notes[-1]


def test_a_broken_folder_leaves_it_to_the_rules(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    result = prompt_by_language_model(REPORT, "lung", open_language_model(str(tmp_path)))
    assert result.method == "rules"
    assert "the rules were used" in result.notes[-1]


def test_a_chat_template_is_used(folder: Path):
    from tmca.reports.language_model import _encode

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    plain = tokenizer.decode(_encode(tokenizer, "Do.", "Text.")[0])
    assert plain == "Do.\n\nReport:\nText.\n\nAnswer:\n"
    tokenizer.chat_template = "{% for item in messages %}<{{ item.role }}>{{ item.content }}{% endfor %}<answer>"
    assert tokenizer.decode(_encode(tokenizer, "Do.", "Text.")[0]) == "<system>Do.<user>Text.<answer>"


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_language_model(str(tmp_path))
