# SPDX-License-Identifier: Apache-2.0
"""The routes of a server, each in the form that some program asks in."""

from __future__ import annotations

import asyncio
import base64
import difflib
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException

import reward_model
from reward_model.common.errors import UserError, first_line, printable
from reward_model.common.logging import logger
from reward_model.config.scoring import ServeConfig
from reward_model.data.chats import template_arguments
from reward_model.data.comparisons import BadRow
from reward_model.data.encoding import Encoded
from reward_model.data.rows import texts_to_score
from reward_model.data.whole_texts import WholeTexts
from reward_model.inference import Reading, RewardScorer
from reward_model.models.scorer import embedding_rows
from reward_model.serving import wire
from reward_model.serving.batcher import Batcher, Ending, Full, Job
from reward_model.serving.gate import Gate, Metrics, error_body
from reward_model.serving.stream import probability

SHARED = 4  # batches of rows that are taken at once where rows are padded, so that those of a length come together
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.Error, "description": said}
    for status, said in {
        400: "what is asked cannot be scored",
        401: "no bearer token, or another",
        404: "another model's name",
        408: "the body did not arrive in time",
        413: "the body is too large, or has too many answers",
        422: "the body has another form",
        429: "too many answers wait",
        500: "a score that is not finite, or a fault",
        503: "the server ends",
        504: "not scored in time",
    }.items()
}


@dataclass(frozen=True)
class Scored:
    """A row of a request with the scores of its responses."""

    encoded: Encoded
    scores: list[float]
    beside: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of its texts, each with its prompt."""
        row = self.encoded.row
        return sum(len(row.prompt) + len(response) for response in row.responses)


class Service:
    """A model with its queue, and the application that asks it."""

    def __init__(self, name: str, reward: RewardScorer, reading: Reading, config: ServeConfig, key: str | None = None):
        """
        Args:
            name: of the model, as it was given.
            key: the bearer token; None: nobody needs one.
        """
        self.reward, self.reading, self.config = reward, reading, config
        self.names = list(config.served_model_name) or [name]
        self.whole = WholeTexts(
            reward.tokenizer, reward.special, embedding_rows(reward.scorer), reading.max_seq_len, reading.chat
        )
        self.created = int(time.time())
        logger.info(reward.choose_attention(reading.max_seq_len, config.attention))
        assert reward.sharing is not None  # it was chosen
        padded = reward.sharing.layout in ("shared", "separate")
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.batcher = Batcher(
            lambda rows: reward.assess_rows(rows, config.tokens_per_batch),
            config.tokens_per_batch * (SHARED if padded else 1),
            config.max_waiting,
            self.metrics.batch,
        )
        self.app = Gate(
            application(self, key is not None), key, int(config.max_body * 1e6), config.timeout, self.metrics, PATHS
        )

    async def ask(self, encode: Callable[[], list[Encoded]], answers: int) -> list[Scored]:
        """The scores of some rows, when they are there.

        Args:
            encode: makes the rows, in a thread of its own.
            answers: how many they have together.

        Raises:
            HTTPException: they cannot be scored, or not now.
        """
        most = self.config.max_waiting
        if answers > most:
            raise HTTPException(413, f"{answers} answers in a request, and no more than {most} may wait: divide it")
        job = Job(encode, answers)
        try:
            future = asyncio.wrap_future(self.batcher.submit(job))
            scores = await asyncio.wait_for(future, self.config.timeout)
        except (BadRow, UserError) as error:
            raise HTTPException(400, str(error)) from error
        except Full as full:
            raise HTTPException(429, str(full), {"Retry-After": str(full.seconds)}) from full
        except Ending as end:
            raise HTTPException(503, "the server ends", {"Retry-After": "1"}) from end
        except asyncio.TimeoutError as error:
            raise HTTPException(504, f"not scored within {self.config.timeout:g} s") from error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise HTTPException(500, f"it could not be scored: {printable(first_line(error))}") from error
        self.metrics.answers.inc(answers)
        self.metrics.cut.inc(sum(row.cut for row in job.rows))
        return [Scored(row, *each) for row, each in zip(job.rows, scores)]

    def require_model(self, name: str | None) -> str:
        """The name that an answer has; raises HTTPException where a request asks for another model."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise HTTPException(404, printable(f"no model {name}; there is {known} (--served_model_name gives others)"))
        return name or self.names[0]

    # --- what is asked, as rows ---

    async def score(self, asked: wire.ScoreRequest) -> list[wire.Scores]:
        """Prompts with their responses."""
        prompts: Sequence[Any] = asked.prompt if asked.is_list else [asked.prompt]
        lists: Sequence = asked.responses if asked.is_list else [asked.responses]
        if len(lists) != len(prompts) or not all(isinstance(each, list) for each in lists):
            raise HTTPException(400, f"{len(prompts)} prompts: give a list of as many lists of responses")

        def encode() -> list[Encoded]:
            arguments = template_arguments({"tools": asked.tools, "chat_template_kwargs": asked.chat_template_kwargs})
            texts = []
            for number, (prompt, responses) in enumerate(zip(prompts, lists), 1):
                try:
                    texts.append(texts_to_score(prompt, responses, self.reward.tokenizer, self.reading.chat, arguments))
                except BadRow as problem:
                    raise BadRow(f"prompt {number}: {problem}" if asked.is_list else str(problem)) from problem
            found = self.reward.encoded(texts, self.reading.max_seq_len)
            for number, each in enumerate(found, 1):
                if isinstance(each, BadRow):
                    raise BadRow(f"prompt {number}: {each}" if asked.is_list else str(each))
            return [each for each in found if isinstance(each, Encoded)]

        scored = await self.ask(encode, sum(map(len, lists)))
        return [self._scores(each) for each in scored]

    def _scores(self, scored: Scored) -> wire.Scores:
        scores = scored.scores
        return wire.Scores(
            scores=scores,
            raw=[score + self.reward.mean for score in scores] if self.has_mean else None,
            best=max(range(len(scores)), key=scores.__getitem__),
            probability=probability(scores[0] - scores[1], self.reward.temperature) if len(scores) == 2 else None,
            cut=scored.encoded.cut,
            **scored.beside,
        )

    @property
    def has_mean(self) -> bool:
        """Whether scores are normalized."""
        return hasattr(self.reward.scorer.config, "score_mean")

    async def queries(self, texts: list[str], prompts: Sequence[str | None]) -> list[Scored]:
        """Whole texts with the prompts that they begin with."""

        def encode() -> list[Encoded]:
            require_whole_texts(self.reward, "/get_reward")
            return _each("query", [partial(self.whole.encoded, text, prompt) for text, prompt in pairs])

        pairs = list(zip(texts, prompts))
        return await self.ask(encode, len(texts)) if texts else []

    async def pooled(self, asked: wire.PoolingRequest, path: str) -> list[Scored]:
        """What vLLM's requests ask for."""
        for name in ("truncate_prompt_tokens", "add_generation_prompt", "continue_final_message", "chat_template"):
            if getattr(asked, name):
                raise HTTPException(400, f"{name} is not supported")
        if asked.dimensions not in (None, 1):
            raise HTTPException(400, "a score has one dimension")
        if (asked.input is None) == (asked.messages is None):
            raise HTTPException(400, "give input or messages")
        if asked.messages is not None:
            return await self.ask(lambda: [self._chat(asked)], 1)
        given: list[Any] = asked.input if isinstance(asked.input, list) else [asked.input]
        if not given:
            raise HTTPException(400, "input is empty")
        if isinstance(given[0], int):
            given = [given]

        def encode() -> list[Encoded]:
            if isinstance(given[0], str):
                require_whole_texts(self.reward, path)
            make: Callable[[Any], Encoded] = self.whole.encoded if isinstance(given[0], str) else self.whole.given
            return _each("input", [partial(make, each) for each in given])

        return await self.ask(encode, len(given))

    def _chat(self, asked: wire.PoolingRequest) -> Encoded:
        arguments = template_arguments({"tools": asked.tools, "chat_template_kwargs": asked.chat_template_kwargs})
        return self.whole.chat(asked.messages or [], arguments)


def require_whole_texts(reward: RewardScorer, path: str) -> None:
    """Raises UserError for a model that reads prompt and answer apart, which nothing tells of a whole text."""
    if reward.encoding.pairs:
        raise UserError(f"this model reads pairs of prompt and answer, and {path} has whole texts: use POST /score")


def _each(name: str, made: Sequence[Callable[[], Encoded]]) -> list[Encoded]:
    """Every row, or why one cannot be: says which of them."""
    found = []
    for number, make in enumerate(made, 1):
        try:
            found.append(make())
        except BadRow as problem:
            raise BadRow(f"{name} {number}: {problem}" if len(made) > 1 else str(problem)) from problem
    return found


PATHS = frozenset(
    ("/score", "/get_reward", "/classify", "/pooling", "/v1/embeddings", "/v1/models", "/health", "/ready", "/metrics")
)


def application(service: Service, needs_key: bool) -> FastAPI:
    """The routes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await asyncio.to_thread(service.batcher.end, service.config.timeout)

    app = FastAPI(
        title="reward-model serve",
        version=reward_model.__version__,
        description="Scores of a reward model. They are raw: no sigmoid is taken, whatever a field is called; the mean "
        "that a normalized model stores is taken off.",
        lifespan=lifespan,
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if needs_key else [],
    )
    app.add_exception_handler(AnyHTTPException, _http_error)  # of routes that are not there, too
    app.add_exception_handler(RequestValidationError, _wrong_form)
    _routes_of_state(app, service)
    _routes_of_scores(app, service)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)  # by its registration
    said = "the body is not JSON" if "parsing the body" in str(error.detail) else str(error.detail)  # FastAPI's words
    return JSONResponse(error_body(error.status_code, said), error.status_code, error.headers)


async def _wrong_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # a misspelt name is missing under its right one, too, and says more
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    kind, sent = first["type"], request.headers.get("content-type", "")
    if kind == "json_invalid":
        return JSONResponse(error_body(400, "the body is not JSON"), 400)
    parts = [str(part) for part in first["loc"] if part != "body"]
    place = ".".join(part for part in parts if part not in KINDS and "[" not in part)
    said = WRONG.get(kind, str(first["msg"]))
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(place, wire.ScoreRequest.model_fields, n=1)
        said += f"; did you mean {near[0]}?" if near else ""
    if not place:
        said = "the body is no JSON object" if "json" in sent else "send JSON, with Content-Type: application/json"
    return JSONResponse(error_body(422, printable(f"{place}: {said}" if place else said)), 422)


KINDS = ("str", "int", "float", "bool")  # of a value that may be of several, beside its name; longer ones have brackets
WRONG = {  # pydantic's kinds of error, in the words that this package has for them
    "missing": "is missing",
    "extra_forbidden": "is no name that a request has",
    "string_type": "is not text",
    "list_type": "is not a list",
    "dict_type": "is not an object",
    "int_type": "is not a whole number",
}


def _routes_of_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=wire.State)
    async def health() -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready", response_model=wire.State, responses={503: ERRORS[503]})
    async def ready() -> Response:
        """Whether requests are scored."""
        if service.batcher.is_ending or not service.batcher.is_alive:
            raise HTTPException(503, "not ready")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """In Prometheus' form."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", response_model=wire.Models, responses={401: ERRORS[401]})
    async def models() -> Response:
        """The model, by each of its names."""
        each: dict[str, Any] = {
            "created": service.created,
            "max_model_len": service.reading.max_seq_len,
            "mean": service.reward.mean if service.has_mean else None,
            "temperature": service.reward.temperature,
        }
        found = wire.Models(data=[wire.Model(id=name, **each) for name in service.names])
        return JSONResponse(found.model_dump())


def _routes_of_scores(app: FastAPI, service: Service) -> None:
    @app.post("/score", response_model=wire.ScoreAnswer | wire.ScoreAnswers, responses=ERRORS)
    async def score(asked: wire.ScoreRequest) -> Response:
        """The scores of a prompt's responses, or of several prompts' responses, in ``results``.

        A prompt is encoded once for all of its responses where the model allows it.
        """
        model = {"model": service.require_model(asked.model)}
        results = [each.model_dump(exclude_none=True) for each in await service.score(asked)]
        return JSONResponse(model | ({"results": results} if asked.is_list else results[0]))

    @app.post("/get_reward", response_model=wire.Rewards, responses=ERRORS)
    async def get_reward(asked: wire.GetReward) -> Response:
        """The rewards of whole texts, as OpenRLHF asks for them.

        A text keeps the start and end tokens that it has, and gets those that it lacks: one that was cut is scored as
        if it ended there.
        """
        prompts = asked.prompts or [None] * len(asked.query)
        if len(prompts) != len(asked.query):
            raise HTTPException(400, f"{len(asked.query)} texts in query and {len(prompts)} prompts")
        scored = await service.queries(asked.query, prompts)
        rewards = [each.scores[0] for each in scored]
        logs = {"prompt_cut": [float(each.encoded.cut) for each in scored]}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": logs})

    @app.post("/classify", response_model=wire.Classifications, responses=ERRORS)
    async def classify(asked: wire.PoolingRequest) -> Response:
        """The scores of texts or of a chat in the form of vLLM's ``/classify``; ``probs`` holds the raw score."""
        return JSONResponse(_head("classify") | await _pooled(service, asked, "/classify", _class))

    @app.post("/pooling", response_model=wire.Poolings, responses=ERRORS)
    async def pooling(asked: wire.PoolingRequest) -> Response:
        """The same in the form of vLLM's ``/pooling``."""
        return JSONResponse(_head("pool") | await _pooled(service, asked, "/pooling", _pooling))

    @app.post("/v1/embeddings", response_model=wire.Embeddings, responses=ERRORS)
    async def embeddings(asked: wire.PoolingRequest) -> Response:
        """The same as embeddings of one number, which is where verl reads scores of SGLang."""
        return JSONResponse({"object": "list"} | await _pooled(service, asked, "/v1/embeddings", _embedding))


async def _pooled(
    service: Service, asked: wire.PoolingRequest, path: str, form: Callable[[list[float], str], dict[str, Any]]
) -> dict[str, Any]:
    """The body of a list of scores, each in a form; ``form`` takes the scores and how they are encoded."""
    model = service.require_model(asked.model)
    scored = await service.pooled(asked, path)
    tokens = sum(each.tokens for each in scored)
    return {
        "model": model,
        "data": [{"index": i} | form(each.scores, asked.encoding_format) for i, each in enumerate(scored)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _class(scores: list[float], encoding: str) -> dict[str, Any]:
    return {"label": "LABEL_0", "probs": scores, "num_classes": 1}


def _pooling(scores: list[float], encoding: str) -> dict[str, Any]:
    return {"object": "pooling", "data": _written(scores, encoding)}


def _embedding(scores: list[float], encoding: str) -> dict[str, Any]:
    return {"object": "embedding", "embedding": _written(scores, encoding)}


def _head(kind: str) -> dict[str, Any]:
    """With which vLLM's answers begin."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}


def _written(scores: list[float], encoding: str) -> list[float] | str:
    """As numbers, or as the base64 text of little-endian float32, which OpenAI's client asks for by itself."""
    return scores if encoding == "float" else base64.b64encode(struct.pack(f"<{len(scores)}f", *scores)).decode()
