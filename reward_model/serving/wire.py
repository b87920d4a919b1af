# SPDX-License-Identifier: Apache-2.0
"""The JSON of requests and answers, in the forms of the programs that ask."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Message = dict[str, Any]
Prompt = str | list[Message]
Answer = str | Message | list[Message]


class Asked(BaseModel):
    """Whatever else a request has is not read."""

    model_config = ConfigDict(extra="allow")


class ScoreRequest(Asked):
    """A prompt and its responses, or a list of prompts and for each a list of its responses."""

    model_config = ConfigDict(extra="forbid")  # it is ours alone, and a name that nothing reads is a mistake

    model: str | None = None
    prompt: Prompt | list[Prompt] = Field(description="Text or chat messages, or a list of either.")
    responses: list[Answer] | list[list[Answer]] = Field(
        description="Text, which is joined to a prompt of text as it is, or chat messages."
    )
    tools: list[dict[str, Any]] | None = Field(None, description="For the chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For the chat template.")

    @property
    def is_list(self) -> bool:
        """Whether there are several prompts."""
        return isinstance(self.prompt, list) and any(not isinstance(each, dict) for each in self.prompt)


class Scores(BaseModel):
    """Of one prompt's responses. ``raw``: before the mean is taken off, of a model that has one."""

    scores: list[float]
    raw: list[float] | None = None
    std: list[float] | None = Field(None, description="Over the score heads, of a model that has several.")
    lower: list[float] | None = Field(
        None, description="Score less β times std; β is --beta, or score_beta in config.json."
    )
    novelty: list[float] | None = Field(
        None, description="The share of held-out training texts that are less novel, of a model it was fitted to."
    )
    novel: list[bool] | None = Field(None, description="Whether novelty has come to the threshold that it has.")
    best: int | None = Field(None, description="The response with the highest score, counted from 0.")
    probability: float | None = Field(None, description="Of two responses, that the first is preferred.")
    cut: bool = Field(False, description="Whether the prompt lost its left, to fit the longest text.")


class ScoreAnswer(Scores):
    model: str


class ScoreAnswers(BaseModel):
    model: str
    results: list[Scores]


class GetReward(Asked):
    """OpenRLHF's: texts of prompt and response, decoded with special tokens kept."""

    query: list[str]
    prompts: list[str | None] | None = Field(
        None, description="With which the texts begin. Of a text that is too long the left of its prompt is cut."
    )
    labels: list[Any] | None = Field(None, description="Not read.")


class Rewards(BaseModel):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class PoolingRequest(Asked):
    """vLLM's: texts, token ids, or the messages of one chat."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]] | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    # what would change a score there and is not done here is refused
    truncate_prompt_tokens: int | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    dimensions: int | None = None


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Classification(BaseModel):
    index: int
    label: str | None = None
    probs: list[float] = Field(description="The score, in vLLM's name for it: not a probability.")
    num_classes: int = 1


class Classifications(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


class Pooled(BaseModel):
    index: int
    object: str = "pooling"
    data: list[float] | str


class Poolings(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class Embedding(BaseModel):
    index: int
    object: str = "embedding"
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: str = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class Model(BaseModel):
    """``mean``: taken off every score, of a model that has one. ``temperature``: of ``probability``."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "reward-model"
    max_model_len: int
    mean: float | None = None
    temperature: float = 1.0


class Models(BaseModel):
    object: str = "list"
    data: list[Model]


class State(BaseModel):
    status: str


class ErrorText(BaseModel):
    message: str
    type: str
    code: int


class Error(BaseModel):
    error: ErrorText
