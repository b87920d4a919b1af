# SPDX-License-Identifier: Apache-2.0
"""``--push_to_hub``: before a run, whether its model may go to a repository of the hub; after it, the way there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from reward_model.common.errors import first_line, masked
from reward_model.common.logging import logger
from reward_model.config.groups import OutputConfig
from reward_model.training import model_card

BESIDE_THE_MODEL = (model_card.NAME,)  # evaluation.json and report.html have texts of the held-out data
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def repository(output: OutputConfig) -> str:
    """The repository that the flags name; without a namespace it is the user's."""
    return output.hub_model_id or Path(output.output_dir or "").resolve().name


def why_not(output: OutputConfig) -> str:
    """Why nothing could be pushed, in a line: asks the hub for the token's rights; empty: it could."""
    if name := next((name for name in OFFLINE if os.environ.get(name, "0").lower() in ("1", "true", "yes", "on")), ""):
        return f"--push_to_hub and {name} in the environment: take one of them away"
    name = repository(output)
    try:
        validate_repo_id(name)
        me = HfApi(token=output.hub_token).whoami()
    except HFValidationError as error:
        return f"--hub_model_id {name}: {first_line(error)}"
    except LocalTokenNotFoundError:
        return "--push_to_hub: there is no token; give --hub_token, set HF_TOKEN, or log in by hf auth login"
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            return "--push_to_hub: the hub does not take the token: make a new one that may write"
        return f"--push_to_hub: the hub does not answer: {_said(error, output)}"
    except Exception as error:  # of the library that asks, whichever that is
        return f"--push_to_hub: the hub does not answer: {_said(error, output)}"
    return _lacking(me, name)


def hindrance(output: OutputConfig) -> str:
    """:func:`why_not`, for a run that begins; one that goes on from a checkpoint only says it, and has nothing."""
    problem = why_not(output)
    if problem and any(Path(output.output_dir or "").glob("checkpoints/step-*")):
        logger.warning(f"{problem}; it is tried at the end of the run")
        return ""
    return problem


def _lacking(me: dict[str, Any], name: str) -> str:
    """Which right a token lacks, by what the hub says of it; empty: none that is known."""
    token = ((me.get("auth") or {}).get("accessToken")) or {}
    rights = [right for each in (token.get("fineGrained") or {}).get("scoped", []) for right in each["permissions"]]
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and "repo.write" not in rights):
        return "--push_to_hub: the token may only read: make one that may write"
    owner = name.partition("/")[0] if "/" in name else me["name"]
    roles = {me["name"]: "admin"} | {org["name"]: org.get("roleInOrg", "") for org in me.get("orgs", [])}
    if owner not in roles:
        return f"--hub_model_id {name}: the token is of {me['name']}, who is not in {owner}"
    if roles[owner] == "read":
        return f"--hub_model_id {name}: {me['name']} may only read in {owner}"
    return ""


def push(folder: Path, names: Sequence[str], output: OutputConfig, base: str) -> None:
    """Send the model, its card and what was found of it; if that fails, say the command that does it.

    Args:
        names: of what was saved in the folder, as :func:`reward_model.models.saving.save` gives them.
        base: the model that was trained. An adapter names it by its path, so that beside a local one it stays here.
    """
    names = [name for name in names if name != "adapter" or not os.path.exists(base)]
    patterns = [f"{name}/*" if (folder / name).is_dir() else name for name in names]
    patterns += [pattern for pattern in BESIDE_THE_MODEL if any(folder.glob(pattern))]
    name = repository(output)
    try:
        api = HfApi(token=output.hub_token)
        name = api.create_repo(name, private=output.hub_private_repo or None, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=patterns, commit_message="Reward model and tokenizer"
        )
    except Exception as error:  # the model is complete, whatever becomes of its copy
        words = ["hf", "upload", name, str(folder), "."]
        words += [word for pattern in patterns for word in ("--include", pattern)]
        words += ["--private"] * output.hub_private_repo
        logger.warning(f"not pushed to {name}: {_said(error, output)}; by hand: {shlex.join(words)}")
        return
    logger.info(f"pushed:  {api.endpoint}/{name}")


def _said(error: Exception, output: OutputConfig) -> str:
    """What an error says, without the token."""
    text = first_line(error)
    return masked(text.replace(output.hub_token, "***") if output.hub_token else text)
