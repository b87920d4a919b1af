# SPDX-License-Identifier: Apache-2.0
"""reward-model serve, asked by a real client over loopback: each program's form, many at once, limits, and its end."""

import base64
import datetime
import http.client
import json
import math
import os
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from saved import save

pytest.importorskip("fastapi", reason="no fastapi: pip install '.[serve]'")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from server import Running, ask

from reward_model.__main__ import main
from reward_model.common.errors import UserError
from reward_model.config.scoring import ServeConfig
from reward_model.data.chat_template import settle_template
from reward_model.data.comparisons import Comparison
from reward_model.data.encoding import Encoded
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.data.whole_texts import WholeTexts
from reward_model.inference import RowScores, load_to_read
from reward_model.serving import api
from reward_model.serving.batcher import Batcher, Ending, Full, Job

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["cat", "mat", "fish", "there", "sat", "other", "eats", "where"]
CHAT = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "fish"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), template=tiny.CHATML)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_to_read(str(folder))


@pytest.fixture(scope="module")
def reward(folder):
    return load_to_read(str(folder))[0]  # beside the server's, which computes in another thread


@pytest.fixture(scope="module")
def running(folder, loaded):
    with Running(folder, loaded=loaded) as made:
        yield made


def said(chance, count):
    return " ".join(chance.choice(WORDS, count))


def close(found, expected):
    return found == pytest.approx(expected, abs=1e-5)


# --- scores ---


def test_a_prompt_and_its_responses(running, reward):
    answer = running.ask("/score", {"prompt": "the cat", "responses": [" sat", " eats", " sat", ""]})
    expected = reward.score(["the cat"] * 4, [" sat", " eats", " sat", ""])
    assert answer.status == 200 and close(answer.body["scores"], expected)
    assert answer.body["best"] == int(np.argmax(expected)) and answer.body["cut"] is False
    assert "raw" not in answer.body and "probability" not in answer.body
    two = running.ask("/score", {"prompt": "the cat", "responses": [" sat", " eats"]}).body
    assert two["probability"] == pytest.approx(1 / (1 + math.exp(expected[1] - expected[0])), abs=1e-5)


def test_lists_of_prompts_and_chats(running, reward):
    asked = {"prompt": ["the cat", CHAT[:1]], "responses": [[" sat", " eats"], ["fish", CHAT[1], [CHAT[1]]]]}
    answer = running.ask("/score", asked)
    first, second = (each["scores"] for each in answer.body["results"])
    assert close(first, reward.score(["the cat"] * 2, [" sat", " eats"]))
    assert close(second, reward.score_chats([CHAT]) * 3)
    alone = running.ask("/score", {"prompt": CHAT[:1], "responses": ["fish"]}).body
    assert close(alone["scores"], second[:1])
    whole = running.ask("/score", {"prompt": [], "responses": [CHAT]}).body
    assert close(whole["scores"], second[:1])


def test_openrlhf_form(running, reward):
    end = reward.tokenizer.eos_token
    prompts, texts = ["the cat", "where?", "fish"], [" sat", " there", " eats"]
    whole = [prompts[0] + texts[0] + end, prompts[1] + texts[1], prompts[2] + texts[2] + end]  # the second was cut
    expected = reward.score(prompts, texts)
    for asked in (
        {"query": whole, "prompts": prompts, "labels": [None, "x", 3]},
        {"query": whole},
        {"query": whole, "prompts": ["something else", None, "fish"]},
    ):
        answer = running.ask("/get_reward", asked)
        assert answer.status == 200
        assert close(answer.body["rewards"], expected) and answer.body["scores"] == answer.body["rewards"]
        assert answer.body["extra_logs"] == {"prompt_cut": [0.0] * 3}
    assert running.ask("/get_reward", {"query": []}).body["rewards"] == []


def test_vllm_forms(running, reward, folder):
    text = "the cat sat" + reward.tokenizer.eos_token
    expected = reward.score([""], ["the cat sat"])
    answer = running.ask("/classify", {"model": str(folder), "input": text, "activation": False}).body
    assert close(answer["data"][-1]["probs"], expected)
    assert (answer["object"], answer["model"], answer["data"][0]["num_classes"]) == ("list", str(folder), 1)
    ids = reward.tokenizer(text)["input_ids"]
    assert answer["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}
    for given in ([text, "fish"], [ids, ids[:1]]):
        data = running.ask("/pooling", {"input": given}).body["data"]
        assert [each["index"] for each in data] == [0, 1] and close(data[0]["data"], expected)
    assert close(running.ask("/pooling", {"input": ids}).body["data"][-1]["data"], expected)
    chat = running.ask("/classify", {"messages": CHAT}).body["data"][0]["probs"]
    assert close(chat, reward.score_chats([CHAT]))


def test_embeddings_form(running, reward):
    expected = reward.score([""], ["the cat sat"])
    answer = running.ask("/v1/embeddings", {"input": "the cat sat"}).body
    assert close(answer["data"][-1]["embedding"], expected) and answer["data"][0]["object"] == "embedding"
    packed = running.ask("/v1/embeddings", {"input": "the cat sat", "encoding_format": "base64"}).body
    assert close(list(struct.unpack("<f", base64.b64decode(packed["data"][0]["embedding"]))), expected)


def test_a_mean_and_a_temperature(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"score_mean": 0.5, "score_temperature": 2.0}))
    with Running(other) as running:
        scores = running.reward.score(["cat"] * 2, [" sat", " eats"])
        answer = running.ask("/score", {"prompt": "cat", "responses": [" sat", " eats"]}).body
        assert close(answer["scores"], scores) and close(answer["raw"], [score + 0.5 for score in scores])
        assert answer["probability"] == pytest.approx(1 / (1 + math.exp((scores[1] - scores[0]) / 2)), abs=1e-5)
        assert close(running.ask("/classify", {"input": "cat sat"}).body["data"][0]["probs"], answer["scores"][:1])
        model = running.ask("/v1/models").body["data"][0]
        assert (model["mean"], model["temperature"], model["max_model_len"]) == (0.5, 2.0, 64)


def test_200_requests_at_once_are_not_mixed_up(running, reward):
    chance = np.random.default_rng(0)
    prompts = [said(chance, chance.integers(1, 12)) for _ in range(200)]
    texts = [" " + said(chance, chance.integers(1, 8)) for _ in prompts]
    expected = reward.score(prompts, texts)
    assert np.ptp(expected) > 0.1  # mixed up, they would be far off

    def one(i):
        if i % 3 == 0:
            return running.ask("/score", {"prompt": prompts[i], "responses": [texts[i], " x"]}).body["scores"][0]
        if i % 3 == 1:
            asked = {"query": [prompts[i] + texts[i]], "prompts": [prompts[i]]}
            return running.ask("/get_reward", asked).body["rewards"][0]
        return running.ask("/classify", {"input": prompts[i] + texts[i]}).body["data"][-1]["probs"][-1]

    with ThreadPoolExecutor(24) as pool:
        assert close(list(pool.map(one, range(200))), expected)


# --- whole texts ---

WITH_START = "{{ bos_token }}" + tiny.CHATML


@pytest.mark.parametrize("template", [None, tiny.CHATML, WITH_START])
@pytest.mark.parametrize("kind", ["tokenizer", "llama", "bert"])
def test_a_whole_text_has_one_start_and_one_end(template, kind):
    marks = ("<|im_start|>", "<|im_end|>")
    tokenizer = getattr(tiny, kind)(reserved=marks, chat_template=template)
    if template == WITH_START and kind != "llama":
        pytest.skip("no start token")
    settle_template(tokenizer, datetime.datetime.now())
    special = choose_special_tokens(tokenizer, len(tokenizer))
    whole = WholeTexts(tokenizer, special, 64, 64)
    own = tokenizer("the cat sat")["input_ids"]  # what training makes of a text
    own = own if own[-1] == special.end else [*own, special.end]
    text = tokenizer.decode(own)
    start, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    for given in ("the cat sat", text, text.removeprefix(start), "the cat sat" + end):
        assert whole.ids(given) == own
    if template:
        written = tokenizer.apply_chat_template(CHAT, tokenize=False)
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        stripped = written.removeprefix(start) if start else written  # as verl does
        for given in (written, stripped, written.removesuffix("<|im_end|>")):
            assert whole.ids(given) == ids


def test_a_template_that_goes_on_after_its_last_token_is_completed():
    tokenizer = tiny.chatml()  # closes with <|im_end|> and a line break, as models of others do
    special = choose_special_tokens(tokenizer, len(tokenizer))
    whole = WholeTexts(tokenizer, special, 64, 64)
    written = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert written.endswith("<|im_end|>\n")
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    for given in (written, written[:-1], written.removesuffix("<|im_end|>\n")):
        assert whole.ids(given) == ids


def test_a_long_text_loses_the_left_of_its_prompt_or_is_refused(running, reward):
    prompt, text = "where " * 60, " cat"
    answer = running.ask("/get_reward", {"query": [prompt + text], "prompts": [prompt]})
    ids = running.service.whole.ids(prompt + text)
    assert len(ids) > 64
    assert close(answer.body["rewards"], reward.score_ids([ids[-64:]]))
    assert answer.body["extra_logs"] == {"prompt_cut": [1.0]}
    scored = running.ask("/score", {"prompt": prompt, "responses": [text]}).body
    assert scored["cut"] is True and close(scored["scores"], answer.body["rewards"])
    for asked in ({"query": [prompt + text]}, {"query": ["x " + prompt], "prompts": ["x "]}):
        refused = running.ask("/get_reward", asked)
        assert refused.status == 400 and "the longest may have 64" in refused.body["error"]["message"]
    refused = running.ask("/score", {"prompt": "x", "responses": [prompt]})
    assert refused.status == 400 and "longer than --max_seq_len 64" in refused.body["error"]["message"]


def test_whole_texts_are_refused_where_pairs_are_read(folder, loaded):
    with Running(folder, loaded=loaded) as running:
        own = running.reward.encoding
        running.reward.encoding = replace(own, pairs=True)
        try:
            for path, asked in (("/get_reward", {"query": ["a"]}), ("/classify", {"input": "a"})):
                refused = running.ask(path, asked)
                assert refused.status == 400 and "use POST /score" in refused.body["error"]["message"]
        finally:
            running.reward.encoding = own


# --- what is refused ---


@pytest.mark.parametrize(
    ("path", "asked", "status", "message"),
    [
        ("/score", b"{", 400, "not JSON"),
        ("/score", b"[" * 100_000, 400, "not JSON"),
        ("/score", b"\xff", 400, "not JSON"),
        ("/score", b"", 422, "the body is no JSON object"),
        ("/score", {}, 422, "prompt: is missing"),
        ("/score", {"prompt": "a"}, 422, "responses: is missing"),
        ("/score", {"prompt": "a", "responses": ["b"], "tool": []}, 422, "did you mean tools?"),
        ("/score", {"promt": "a", "responses": ["b"]}, 422, "did you mean prompt?"),
        ("/score", {"prompt": 3, "responses": ["a"]}, 422, "prompt: is not text"),
        ("/score", {"prompt": "a", "responses": "b"}, 422, "responses: is not a list"),
        ("/score", {"prompt": "a", "responses": []}, 400, "no responses"),
        ("/score", {"prompt": ["a", "b"], "responses": ["c"]}, 400, "as many lists"),
        ("/score", {"prompt": ["a", "b"], "responses": [["c"]]}, 400, "as many lists"),
        ("/score", {"prompt": ["a", "b"], "responses": [["c"], ["\ud83d"]]}, 400, "prompt 2"),
        ("/score", {"prompt": "\ud83d", "responses": ["a"]}, (400, 422), ""),
        ("/score", {"prompt": [{"role": "user"}], "responses": ["a"]}, 400, "not text or chat messages"),
        ("/score", {"prompt": CHAT[:1], "responses": [[CHAT[0]]]}, 400, "of role user"),
        ("/score", {"prompt": "a", "responses": ["b"], "tools": [{"x": 1}]}, 400, "need chat messages"),
        ("/score", {"prompt": "a", "responses": ["b"], "model": "gpt"}, 404, "no model gpt"),
        ("/get_reward", {"query": "a"}, 422, "query"),
        ("/get_reward", {"query": ["a"], "prompts": ["a", "b"]}, 400, "1 texts in query and 2 prompts"),
        ("/get_reward", {"query": ["a", "\udcff"]}, (400, 422), ""),
        ("/classify", {}, 400, "give input or messages"),
        ("/classify", {"input": "a", "messages": CHAT}, 400, "give input or messages"),
        ("/classify", {"input": []}, 400, "input is empty"),
        ("/classify", {"input": [[]]}, 400, "token ids"),
        ("/classify", {"input": [99_999]}, 400, "token ids are numbers from 0 to"),
        ("/classify", {"input": [-1]}, 400, "token ids"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 4}, 400, "truncate_prompt_tokens is not supported"),
        ("/classify", {"messages": []}, 400, "not a list of messages"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, "one dimension"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, 422, "encoding_format"),
        ("/nothing", {"input": "a"}, 404, "Not Found"),
        ("/health", {"input": "a"}, 405, "Method Not Allowed"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(running, path, asked, status, message):
    answer = running.ask(path, asked)
    assert answer.status in (status if isinstance(status, tuple) else (status,)), answer.body
    error = answer.body["error"]
    assert error["code"] == answer.status and message in error["message"]
    assert "\n" not in error["message"] and error["type"] == "invalid_request_error"


def test_a_token_is_needed_where_one_is_set(folder, loaded):
    with Running(folder, key="secret-of-mine", loaded=loaded) as running:
        for given in ("", "Bearer", "Bearer wrong", "Basic secret-of-mine", "bearer secret-of-minf"):
            answer = running.ask("/score", {"prompt": "a", "responses": ["b"]}, authorization=given)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "secret" not in json.dumps(answer.body)
        assert running.ask("/metrics", authorization="").status == 401
        assert running.ask("/health", authorization="").status == running.ask("/ready", authorization="").status == 200
        assert running.ask("/score", {"prompt": "a", "responses": ["b"]}).status == 200
        schema = running.ask("/openapi.json").body
        assert schema["components"]["securitySchemes"]


def test_bodies_and_requests_that_are_too_large(folder, loaded):
    with Running(folder, loaded=loaded, max_body=0.001, max_waiting=4) as running:
        assert running.ask("/score", {"prompt": "a" * 2000, "responses": ["b"]}).status == 413
        chunks = (b"x" * 600 for _ in range(2))  # nothing says before how many they are
        client = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        client.request("POST", "/score", chunks, {"content-type": "application/json"}, encode_chunked=True)
        assert client.getresponse().status == 413
        client.close()
        answer = running.ask("/get_reward", {"query": ["a"] * 5})
        assert answer.status == 413 and "divide it" in answer.body["error"]["message"]
        assert running.ask("/get_reward", {"query": ["a"] * 4}).status == 200


def test_more_than_may_wait_is_refused_for_a_while(folder, loaded):
    with Running(folder, loaded=loaded, held=True, max_waiting=4) as running, ThreadPoolExecutor(8) as pool:
        held = [pool.submit(running.ask, "/get_reward", {"query": ["the cat", "fish"]}) for _ in range(2)]
        while running.service.batcher.waiting < 4:
            time.sleep(0.01)
        refused = running.ask("/get_reward", {"query": ["one more"]})
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert "too many answers wait" in refused.body["error"]["message"]
        running.release.set()
        assert [each.result().status for each in held] == [200, 200]
        assert running.ask("/get_reward", {"query": ["one more"]}).status == 200
        assert running.service.batcher.waiting == 0


def test_what_is_not_scored_in_time_is_given_up(folder, loaded):
    with Running(folder, loaded=loaded, held=True, timeout=0.3) as running:
        answer = running.ask("/get_reward", {"query": ["the cat"]})
        assert answer.status == 504 and "within 0.3 s" in answer.body["error"]["message"]
        assert running.service.batcher.waiting == 0  # nobody waits for it any more
        running.release.set()
        assert running.ask("/get_reward", {"query": ["the cat"]}).status == 200


def test_a_body_that_does_not_come_is_waited_for_no_longer(folder, loaded):
    with Running(folder, loaded=loaded, timeout=0.3) as running:
        client = socket.create_connection(("127.0.0.1", running.port), timeout=20)
        client.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
        client.close()


def test_a_row_that_fails_takes_no_other_with_it(folder, loaded, capsys):
    with Running(folder, loaded=loaded) as running:
        score, spoilt = running.service.batcher.score, running.service.whole.ids("spoilt")

        def sometimes(rows):
            if any(row.responses == [spoilt] for row in rows):
                raise RuntimeError("out of memory\nsecond line")
            broken = RowScores([math.nan], {})
            return [broken if len(row.responses[0]) == 12 else each for row, each in zip(rows, score(rows))]

        running.service.batcher.score = sometimes
        with ThreadPoolExecutor(8) as pool:
            texts = ["spoilt", "the cat", "fish", "where"] * 3
            asked = [pool.submit(running.ask, "/get_reward", {"query": [text]}) for text in texts]
            found = [each.result() for each in asked]
        assert [each.status for each in found] == [500, 200, 200, 200] * 3
        assert found[0].body["error"]["message"] == "it could not be scored: out of memory"
        long = next(n * "fish " for n in range(1, 20) if len(running.service.whole.ids(n * "fish ")) == 12)
        answer = running.ask("/get_reward", {"query": [long]})
        assert answer.status == 500 and "not finite" in answer.body["error"]["message"]


# --- state, and the end ---


def test_models_health_metrics_and_the_page(running, folder):
    assert running.ask("/health").body == {"status": "alive"} and running.ask("/ready").body == {"status": "ready"}
    assert running.ask("/v1/models").body["data"][0]["id"] == str(folder)
    assert "swagger" in running.ask("/docs").body
    paths = running.ask("/openapi.json").body["paths"]
    assert {"/score", "/get_reward", "/classify", "/pooling", "/v1/embeddings", "/v1/models", "/health"} <= set(paths)

    def counted(name):
        found = re.search(rf"^reward_model_{re.escape(name)} (\S+)$", running.ask("/metrics").body, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = counted("answers_total"), counted('requests_total{endpoint="/score",status="422"}')
    running.ask("/score", {"prompt": "a", "responses": ["b", "c"]})
    running.ask("/score", {})
    assert counted("answers_total") == before[0] + 2
    assert counted('requests_total{endpoint="/score",status="422"}') == before[1] + 1
    assert counted("waiting_answers") == 0 and counted("tokens_total") > 0


def test_other_names_of_the_model(folder, loaded):
    with Running(folder, loaded=loaded, served_model_name=["rm", "other"]) as running:
        assert [each["id"] for each in running.ask("/v1/models").body["data"]] == ["rm", "other"]
        assert running.ask("/classify", {"model": "other", "input": "a"}).body["model"] == "other"
        assert running.ask("/classify", {"model": str(folder), "input": "a"}).status == 404


def test_whoever_asked_before_the_end_is_answered(folder, loaded):
    with Running(folder, loaded=loaded, held=True) as running, ThreadPoolExecutor(4) as pool:
        held = [pool.submit(running.ask, "/get_reward", {"query": ["the cat"]}) for _ in range(3)]
        while running.service.batcher.waiting < 3:
            time.sleep(0.01)
        running.server.should_exit = True
        time.sleep(0.3)
        assert not any(each.done() for each in held)
        running.release.set()
        assert [each.result().status for each in held] == [200] * 3
        running.thread.join(20)
        with pytest.raises(OSError):
            ask(running.port, "/health")


def job(*texts):
    rows = [Encoded(Comparison([], [text]), False) for text in texts]
    return Job(lambda: rows, len(rows))


def test_the_queue_alone():
    seen = []
    batcher = Batcher(
        lambda rows: [RowScores([float(sum(row.responses[0]))], {}) for row in rows], 4, 3, lambda *a: seen.append(a)
    )
    with pytest.raises(Ending):
        batcher.submit(job([1]))  # not started
    batcher.start()
    assert batcher.submit(job([1, 2], [3], [4])).result(5) == [([3.0], {}), ([3.0], {}), ([4.0], {})]
    batcher.rate = 0.0
    with pytest.raises(Full) as full:
        batcher.submit(job([1], [1], [1], [1]))
    assert full.value.seconds == 1
    fails = Job(lambda: 1 / 0, 1)
    with pytest.raises(ZeroDivisionError):
        batcher.submit(fails).result(5)
    last = batcher.submit(job([5]))
    batcher.end(5)
    assert last.result(5) == [([5.0], {})] and not batcher.is_alive
    with pytest.raises(Ending):
        batcher.submit(job([1]))
    assert sum(rows for rows, _, _ in seen) == 4 and max(tokens for _, tokens, _ in seen) <= 4 + 1


# --- the command ---


def test_the_token_is_read_and_never_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(api.KEY, raising=False)
    assert api.read_key(None) is None
    monkeypatch.setenv(api.KEY, "of the environment")
    assert api.read_key(None) == "of the environment"
    file = tmp_path / "key"
    file.write_text("of a file\n")
    assert api.read_key(str(file)) == "of a file"
    with pytest.raises(UserError) as error:
        api.read_key("sk-given-by-mistake")
    assert "given-by-mistake" not in str(error.value)
    file.write_text("\n")
    with pytest.raises(UserError, match="no token"):
        api.read_key(str(file))


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_is_not_installed_is_said(missing, monkeypatch, capsys):
    for name in ("server", "gate"):
        monkeypatch.delitem(sys.modules, f"reward_model.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", "model"]) == 1
    assert "pip install 'dschat-reward[serve]'" in capsys.readouterr().err


def test_an_address_that_is_taken(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 1
    assert "Address already in use" in capsys.readouterr().err
    assert main(["serve"]) == 1 and "name one model" in capsys.readouterr().err
    with pytest.raises(UserError, match="--port"):
        ServeConfig(port=65_536)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_ends_gracefully_at_a_signal(number, folder):
    words = [sys.executable, "-m", "reward_model", "serve", str(folder), "--port", "0", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=os.environ, **pipes) as process:
        try:
            lines = iter(process.stdout.readline, "")
            port = next(int(found[1]) for line in lines if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
            ends = time.monotonic() + 30
            while time.monotonic() < ends:
                try:
                    if ask(port, "/ready").status == 200:
                        break
                except OSError:
                    time.sleep(0.1)
            with ThreadPoolExecutor(32) as pool:
                body = {"query": ["the cat sat " * 15] * 64}
                asked = [pool.submit(ask, port, "/get_reward", body) for _ in range(16)]
                while not any(each.done() for each in asked):
                    time.sleep(0.005)
                process.send_signal(number)
                found = []
                for each in asked:
                    try:
                        found.append(each.result().status)
                    except OSError:  # came after the socket was closed
                        found.append(None)
            assert found.count(200) >= 1 and set(found) <= {200, None}
            assert process.wait(30) == 0
            assert "Traceback" not in process.stdout.read()
        finally:
            process.kill()


@pytest.mark.slow
def test_of_100_000_answers_none_is_lost_or_mixed_up_and_the_memory_is_flat(folder, tmp_path):
    path = Path(__file__).parent / "benchmarks" / "serving.py"
    serving = SimpleNamespace(**runpy.run_path(str(path)))
    found = serving.ours(str(folder), serving.requests(str(folder), 100_000, True, 10), 16, tmp_path / "log")
    print(found)
    assert (found.answers, found.lost, found.wrong) == (100_000, 0, 0)
    half = found.memory[len(found.memory) // 2]
    assert found.memory[-1] - half < 10  # MB; a list of the scores alone would be 3


@pytest.mark.slow
def test_a_second_signal_ends_at_once_without_a_stack(folder):
    """While a request is under way, of which half the body has come."""
    words = [sys.executable, "-m", "reward_model", "serve", str(folder), "--port", "0", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=os.environ, **pipes) as process:
        try:
            lines = iter(process.stdout.readline, "")
            port = next(int(found[1]) for line in lines if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
                client.sendall(b"Content-Length: 100\r\n\r\n{")
                for _ in range(2):
                    time.sleep(2)
                    assert process.poll() is None
                    process.send_signal(signal.SIGINT)
                rest = process.stdout.read()
                assert process.wait(30) == 130, rest
            assert "Traceback" not in rest and "ended at once: requests were given up" in rest
        finally:
            process.kill()
