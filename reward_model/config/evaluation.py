# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from reward_model.config.groups import COUNT, NOT_NEGATIVE, POSITIVE, Bounds, DataConfig, flag, require_page, set_of
from reward_model.config.reading import ReadingConfig, beta_flag


@dataclass(frozen=True)
class EvaluateConfig(ReadingConfig):
    """What to evaluate on, and how."""

    _argument_group_name: ClassVar[str] = "evaluation"
    _bounds: ClassVar[Bounds] = ReadingConfig._bounds | {
        "batch_size": COUNT, "tokens_per_batch": NOT_NEGATIVE, "max_samples": NOT_NEGATIVE, "temperature": POSITIVE,
        "num_proc": NOT_NEGATIVE, "beta": NOT_NEGATIVE,
    }  # fmt: skip

    data: list[str] = flag(
        (),
        metavar="[NAME=]PATH",
        aliases=("--dataset", "--eval_data_path"),
        help="The data: files, folders (their evaluation files) or hub names, as main.py takes them, and the published "
        "files of benchmarks. Entries with a name are sets of their own. Required.",
    )
    split: str | None = flag(None, metavar="NAME", help="The split of a hub name or a folder. Default: eval, test, ….")
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag; subset=COLUMN names subsets.")
    max_samples: int = flag(0, metavar="N", help="The most rows of a set, drawn at random; 0 takes all.")
    on_bad_row: Literal["stop", "skip"] = flag("stop", help="Stop at a row that cannot be used, or skip and count it.")
    batch_size: int = flag(32, metavar="N", help="The pairs that a process scores at once.")
    tokens_per_batch: int = flag(0, metavar="TOKENS", help="The most tokens of a forward pass, pads included.")
    attention: Literal["auto", "timed", "slices", "flex", "varlen", "dense", "separate"] = flag(
        "auto", help="How texts stand in rows; as main.py's flag."
    )
    temperature: float | None = flag(
        None, metavar="T", help="Judge σ(gap / T), in place of the temperature that the model was saved with."
    )
    beta: float | None = beta_flag()
    seed: int = flag(0, metavar="N", help="Of what is drawn: resamples, halves and folds.")
    json: bool = flag(False, help="Print one object of JSON in place of text.")
    output_dir: str | None = flag(
        None, metavar="FOLDER", help="Write evaluation.json there, and results in rewardbench's form where they fit."
    )
    report: str | None = flag(None, metavar="PAGE.html", help="Write what was found as a page with charts.")
    load_json: bool = flag(False, help="rewardbench's flag, without effect: files are known by what is in them.")
    data_output_path: str | None = flag(None, metavar="FOLDER", help="The cache of tokenized rows.")
    num_proc: int = flag(0, metavar="N", help="The processes that tokenize; 0 chooses.")
    local_rank: int = flag(-1, metavar="N", help="Set by launchers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "columns"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        DataConfig(columns=self.columns)  # refuses what is no FIELD=COLUMN
        require_page("--report", self.report)

    @property
    def sets(self) -> dict[str, list[str]]:
        """Name → paths, in the order of the first; '' has no name."""
        found: dict[str, list[str]] = {}
        for name, path in map(set_of, self.data):
            found.setdefault(name or "", []).append(path)
        return found
