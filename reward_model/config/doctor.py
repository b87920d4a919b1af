# SPDX-License-Identifier: Apache-2.0
"""The flags of ``reward-model doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reward_model.common.errors import UserError
from reward_model.config.groups import COUNT, POSITIVE, Bounds, DataConfig, Group, flag, require_page

WITH_STRENGTHS = ("remove", "flip", "soften", "margin")  # what makes a cleaned set
CLEANING = ("drop_repetitions", *WITH_STRENGTHS)
OUTPUTS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class DoctorConfig(Group):
    """What is looked at beside the training data, what is made of it, and where it is written."""

    _argument_group_name: ClassVar[str] = "doctor"
    _bounds: ClassVar[Bounds] = {
        "max_seq_len": COUNT, "remove": (0, 1, True), "flip": (0, 1, True), "temperature": POSITIVE,
    }  # fmt: skip

    eval_data_path: list[str] = flag(
        (),
        metavar="PATH",
        help="The rows to evaluate on, as main.py's flag. Default: those that the data brings, if any.",
    )
    columns: list[str] = flag((), metavar="FIELD=COLUMN", help="As main.py's flag, such as prompt=question.")
    split: str | None = flag(None, metavar="NAME", help="The split to train on. Default: train.")
    eval_split: str | None = flag(None, metavar="NAME", help="The split to evaluate on. Default: eval, test, ….")
    chat: bool = flag(False, help="As main.py's flag: plain text becomes messages.")
    tokenizer: str | None = flag(
        None,
        metavar="MODEL",
        aliases=("--model_name_or_path",),
        help="A tokenizer, a folder or a hub name: also look at what is left of the texts once they are cut. "
        "--model_name_or_path is the same.",
    )
    chat_template: str | None = flag(
        None, metavar="FILE|human_assistant", help="A chat template in place of the tokenizer's own."
    )
    max_seq_len: int = flag(512, metavar="TOKENS", help="With a tokenizer: the longest text, as main.py's flag.")
    trust_remote_code: bool = flag(False, help="Run the code that a tokenizer brings. Look at it first.")
    seed: int = flag(0, metavar="N", help="Of what is drawn: rows of PATH:2000, and resamples for intervals.")
    strict: bool = flag(False, help="Exit status 1 for doubtful findings, too.")
    json: bool = flag(False, help="Print one object of JSON in place of text.")
    report: str | None = flag(
        None, metavar="PAGE.html", help="Write what was found as a page with charts, and as JSON beside it."
    )
    output: str | None = flag(
        None,
        metavar="FILE",
        help="Write the training rows there, as they are but for the next five flags, of which the last four need "
        "strengths; .jsonl or .jsonl.gz. Rows that cannot be used are left out.",
    )
    drop_repetitions: bool = flag(
        False,
        help="Leave out rows whose judgements are all there before, but for white space. Rows that contradict another "
        "one stay.",
    )
    flip: float = flag(
        0.0, metavar="SHARE", help="Swap the answers of this share of the pairs, those of the lowest strength."
    )
    remove: float = flag(
        0.0, metavar="SHARE", help="Leave out this share of the pairs, those of the lowest strength after --flip's."
    )
    soften: bool = flag(
        False, help="Write σ(strength / --temperature) as the probability of each pair, for --label_smoothing column."
    )
    margin: bool = flag(
        False, help="Write the strength, 0 where it is below, as the margin of each pair, for --margin column."
    )
    temperature: float = flag(1.0, metavar="T", help="With --soften: what strengths are divided by.")
    debug: bool = flag(False, help="Show tracebacks, and what libraries print.")

    def __post_init__(self) -> None:
        for name in ("eval_data_path", "columns"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        super().__post_init__()
        DataConfig(columns=self.columns, eval_data_path=self.eval_data_path)  # refuses what main.py refuses
        asked = [f"--{name}" for name in CLEANING if getattr(self, name)]
        if asked and not self.output:
            raise UserError(f"{asked[0]} needs --output, the file of the cleaned set")
        if self.output and not asked:
            names = ", ".join(f"--{name}" for name in CLEANING[:-1])
            raise UserError(f"--output needs {names} or --{CLEANING[-1]}: there is nothing else to write")
        if self.output and not self.output.endswith(OUTPUTS):
            raise UserError(f"--output {self.output}: end it with {' or '.join(OUTPUTS)}")
        require_page("--report", self.report)
        if self.remove + self.flip >= 1:
            raise UserError(f"--flip {self.flip:g} and --remove {self.remove:g} take all pairs")
        if self.temperature != 1.0 and not self.soften:
            raise UserError("--temperature goes with --soften, which is not given")
        for name in ("chat_template", "trust_remote_code"):
            if getattr(self, name) and not self.tokenizer:
                raise UserError(f"--{name} is of a tokenizer: give --tokenizer")

    @property
    def cleans(self) -> bool:
        """Whether a cleaned set is asked for."""
        return self.output is not None

    @property
    def needs_strengths(self) -> bool:
        """Whether what is asked for goes by strengths."""
        return any(getattr(self, name) for name in WITH_STRENGTHS)

    @property
    def names(self) -> dict[str, str]:
        """Field → the column that holds it."""
        return DataConfig(columns=self.columns).names

    @property
    def evaluation_paths(self) -> list[str]:
        """The paths of all evaluation sets."""
        sets = DataConfig(eval_data_path=self.eval_data_path).eval_sets
        return [path for paths in sets.values() for path in paths]
