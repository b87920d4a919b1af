# SPDX-License-Identifier: Apache-2.0
"""An assessment for people: lines of text, numbers in columns."""

from __future__ import annotations

from collections.abc import Iterator

from reward_model.common.words import counted
from reward_model.evaluation.calibration import NO_TEMPERATURE, doubt_temperature

SUBSETS_SHOWN = 12


def lines_of(found: dict) -> Iterator[str]:
    """What :func:`reward_model.evaluation.assessment.assess` found, with the names of the model and the data."""
    size = counted(found["pairs"], "pair") if found["pairs"] else counted(found["answers"], "answer")
    named = f" ({found['set']})" if found.get("set") else ""
    yield f"{found['model']} on {', '.join(found['data'])}{named}: {size} of {counted(found['prompts'], 'prompt')}"
    yield from _accuracy(found)
    yield from _scores(found)
    if "calibration" in found:
        yield from _calibration(found["calibration"])
    if "bounds" in found:
        yield from _bounds(found["bounds"])
    if novelty := found.get("novelty"):
        tells = f"; tells wrong pairs with AUROC {_share(novelty['wrong_auroc'])}" if "wrong_auroc" in novelty else ""
        novel = f"{novelty['novel']:.0%} of answers novel, at {novelty['threshold']:g} or above"
        yield _line("novelty", f"{novelty['mean']:.3f} on average, {novel}{tells}")
    yield from _length(found)
    for part in found.get("by_subset", [])[:SUBSETS_SHOWN]:
        yield _line(f"subset {part['subset'] or '(none)'}", f"{_share(part)}, {counted(part['pairs'], 'pair')}")
    if (more := len(found.get("by_subset", [])) - SUBSETS_SHOWN) > 0:
        yield _line("", f"{more} more subsets are in --json")
    if "by_margin" in found:
        bins = ", ".join(f"{b['value']:.3f} at {_range(b['low'], b['high'])}" for b in found["by_margin"])
        yield _line("by margin", bins)
    yield from _beyond_pairs(found)


def _accuracy(found: dict) -> Iterator[str]:
    if "accuracy" not in found:
        return
    ties = found["accuracy"]["ties"]
    yield _line("accuracy", _share(found["accuracy"]) + (f", {counted(ties, 'tie')} as half" if ties else ""))
    if found["accuracy"]["low"] is None:
        yield _line("", f"no interval: {counted(found['prompts'], 'prompt')}, whose pairs are no independent draws")
    if found.get("undecided"):
        yield _line("", f"without {counted(found['undecided'], 'row')} that hold no answer the better one")
    for base in found["baselines"]:
        yield _line("", f"{_share(base)} for {base['name']}")
    yield _line("loss", f"{found['loss']:.4f} (log 2 = 0.6931 for equal scores)")


def _scores(found: dict) -> Iterator[str]:
    parts = [f"{name} {of['mean']:.3f} ± {of['std']:.3f}" for name, of in found["scores"].items() if of["count"]]
    gap = f"; gap {found['gap']['mean']:.3f} ± {found['gap']['std']:.3f}" if "gap" in found else ""
    yield _line("scores", ", ".join(parts) + gap)


def _calibration(found: dict) -> Iterator[str]:
    names = {"raw": "σ(gap)", "tempered": "", "stored": ""}
    for name, of in ((name, found[name]) for name in names if name in found):
        what = names[name]
        if name == "tempered":
            what = f"σ(gap / {found['temperature']:.3f}), fitted on other prompts"
        elif name == "stored":
            whose = "as --temperature says" if found.get("is_given") else "as the model is saved"
            what = f"σ(gap / {found['stored_temperature']:.3f}), {whose}"
        errors = f"error {of['ece']:.4f} (largest {of['mce']:.3f}), Brier {of['brier']:.4f}, loss {of['log_loss']:.4f}"
        yield _line("calibration" if name == "raw" else "", f"{errors}: {what}")
        if name == "stored" and not found.get("is_given") and of["log_loss"] > found["raw"]["log_loss"]:
            worse = "here that is worse than none, and score and serve give probabilities by it"
            yield _line("", f"{worse}: take score_temperature out of config.json, or fit one on more pairs")
        if name == "stored" and (doubt := _doubt_stored(found)):
            yield _line("", f"as the model is saved: {doubt}")
    if "tempered" not in found:
        yield _line("", f"no temperature could be tried: {NO_TEMPERATURE}")
        return
    interval = None if found["temperature_low"] is None else (found["temperature_low"], found["temperature_high"])
    if doubt := doubt_temperature(found["temperature"], interval, found["fitted_on"]):
        yield _line("", doubt)


def _doubt_stored(found: dict) -> str:
    """Whether the temperature that a model was saved with is of too few pairs, as its config.json says of it."""
    fit = found.get("stored_fit", {})
    pairs, low, high = (fit.get(name) for name in ("pairs", "low", "high"))
    if not isinstance(pairs, int):
        return ""
    is_known = all(isinstance(end, (int, float)) and end > 0 for end in (low, high))
    return doubt_temperature(found["stored_temperature"], (low, high) if is_known else None, pairs)


def _bounds(bounds: dict) -> Iterator[str]:
    gaps = f", of gaps {bounds['gap_std']:.3f}" if "gap_std" in bounds else ""
    yield _line("heads", f"{bounds['heads']}; standard deviation of scores {bounds['score_std']:.3f}{gaps}, on average")
    if "sure" not in bounds:
        return
    what = f"lower bound σ(gap − {bounds['beta']:g}·std) too high by"
    yield _line("", f"{what} {bounds['lower_bound_error']:.4f} on average (largest {bounds['largest']:.3f})")
    sure, unsure = (
        "none" if bounds[f"accuracy_{name}"] is None else f"{bounds[f'accuracy_{name}']:.4f}"
        for name in ("sure", "unsure")
    )
    yield _line("", f"accuracy {sure} of the {bounds['sure']:.0%} with |gap| > {bounds['beta']:g}·std, else {unsure}")
    bins = ", ".join(f"{b['value']:.3f} at {_range(b['low'], b['high'])}" for b in bounds["by_spread"])
    yield _line("by std of gap", f"accuracy {bins}")


def _length(found: dict) -> Iterator[str]:
    length = found["length"]
    said = f"correlation with the score {length['correlation']:.3f}"
    if "shorter_is_better" in length:
        part = length["shorter_is_better"]
        said += f"; accuracy {_share(part)} where the shorter answer is better ({counted(part['pairs'], 'pair')})"
    yield _line("length", said)


def _beyond_pairs(found: dict) -> Iterator[str]:
    if lists := found.get("lists"):
        regret = f", regret {lists['regret']:.4f}" if "regret" in lists else ""
        said = f"best of list {lists['best_of']:.4f}{regret}, τ {lists['kendall']:.4f}, ρ {lists['spearman']:.4f}"
        yield _line(counted(lists["lists"], "list"), f"{said}, NDCG {lists['ndcg']:.4f}")
    if points := found.get("points"):
        said = f"correlation {points['pearson']:.4f}, ρ {points['spearman']:.4f}"
        yield _line("targets", f"{said} with {counted(points['answers'], 'target')}")
    if same := found.get("specificity"):
        said = f"scores of answers held equal are {same['spread']:.3f} apart, {same['share']:.0%} of the whole spread"
        yield _line("specificity", f"{said} ({counted(same['groups'], 'group')})")


def compared_lines(found: dict) -> Iterator[str]:
    """How two models compare, as :func:`reward_model.evaluation.assessment.compared` has it, with their names."""
    between = "" if found["low"] is None else f" [{found['low']:+.4f}, {found['high']:+.4f}]"
    yield f"{found['one']} against {found['other']}: {found['value']:+.4f}{between} accuracy"
    only = f"{found['only_one']} right by the first alone, {found['only_other']} by the second alone"
    yield _line("McNemar", f"p = {found['p_value']:.3g}; {only}")


def _line(name: str, said: str) -> str:
    return f"  {name:14}{said}"


def _share(part: dict) -> str:
    between = "" if part["low"] is None else f" [{part['low']:.4f}, {part['high']:.4f}]"
    return f"{part['value']:.4f}{between}"


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
