# SPDX-License-Identifier: Apache-2.0
"""What the patches add to DeepSpeed-Chat, called as its steps call it."""

import argparse
import contextlib
import inspect
import itertools
import json
import math
import os
import pickle
import random
import resource
import signal
import stat
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import added
import models
import pytest
import reference
import tiny
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    """The folder that holds the package."""
    folder = added.assemble(tmp_path_factory.mktemp("added"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    added.forget()


@pytest.fixture(scope="module")
def drop_in(package):
    return added.module("model.reward_model")


# --- batches as wide as their texts ----------------------------------------------------------------------------------

WIDTH, PAD, TOKENS = 24, 3, 16  # --max_seq_len, the pad, the vocabulary
KINDS = ("ragged", "full", "identical", "pads inside", "pad is end")
LOSSES = [("token", False), ("token", True), ("sequence", False), ("sequence", True)]


@pytest.fixture(scope="module")
def batches(package):
    return added.module("data.reward_batch")


@pytest.fixture(scope="module", params=["llama", "opt"])
def backbone(request):
    """Causal, in float64, with weights as large as trained ones."""
    _, config_class, sizes = models.FAMILIES[request.param]
    config_class = getattr(transformers, config_class)
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": PAD}
    config = config_class(**sizes | special | {"vocab_size": TOKENS}, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention rounds its softmax to float32, and the rounding depends on the batch's width."""
    softmax = torch.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim=-1, dtype=None: softmax(scores, dim))


def padded(tokens):
    """(1, WIDTH) ids and mask, as the tokenizer gives them."""
    ids = torch.full((1, WIDTH), PAD)
    ids[0, : len(tokens)] = torch.tensor(tokens)
    return ids, (torch.arange(WIDTH) < len(tokens)).long()[None]


def row(chosen, rejected, margin=NAN):
    """A row of step 2's data set."""
    return (*padded(chosen), *padded(rejected), torch.tensor(margin))


def random_answer(generator, kind, prompt):
    tokens = prompt + [generator.randrange(PAD + 1, TOKENS) for _ in range(generator.randrange(1, 7))]
    if kind == "pads inside":
        for _ in range(generator.randrange(4)):
            tokens[generator.randrange(1, len(tokens))] = PAD
    if kind == "pad is end" and generator.random() < 0.8:  # the others are cut off at --max_seq_len
        tokens.append(PAD)
    return tokens


def random_rows(generator, kind, leading_pad, pairs=3):
    """Rows of one kind; none starts with the pad but for those of which all do."""
    rows = []
    for pair in range(pairs):
        prompt = [generator.randrange(PAD + 1, TOKENS) for _ in range(generator.randrange(1, 6))]
        prompt = [PAD] * leading_pad + prompt
        chosen, rejected = (random_answer(generator, kind, prompt) for _ in range(2))
        while torch.equal(padded(chosen)[0], padded(rejected)[0]):
            rejected = random_answer(generator, kind, prompt)
        if kind == "full" and pair == 0:
            chosen += [generator.randrange(PAD + 1, TOKENS) for _ in range(WIDTH - len(chosen))]
        rows.append(row(chosen, chosen if kind == "identical" and pair else rejected))
    return rows


def uncut(rows):
    """What upstream's DataCollatorReward makes of them."""
    ids, mask = (torch.cat([r[i] for r in rows] + [r[i + 2] for r in rows]) for i in (0, 1))
    return {"input_ids": ids, "attention_mask": mask}


def learnt(model, batch):
    """Loss, end scores and gradients."""
    model.zero_grad()
    outputs = model(**batch)
    outputs["loss"].backward()
    ends = torch.cat([outputs["chosen_mean_scores"], outputs["rejected_mean_scores"]])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs["loss"].detach(), "scores": ends.detach()} | gradients


def assert_cut_learns_the_same(drop_in, batches, backbone, rows, pads):
    for level, exclude in LOSSES:
        torch.manual_seed(1)
        model = drop_in.RewardModel(
            backbone, SimpleNamespace(pad_token_id=PAD), pads, loss_level=level, exclude_pads=exclude
        )
        cut = batches.RewardCollator(pads)(rows)
        torch.testing.assert_close(learnt(model, cut), learnt(model, uncut(rows)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads, leading_pad", [(0, False), (1, True), (1, False)])
def test_a_cut_batch_learns_what_the_uncut_one_does(pads, leading_pad, kind, backbone, drop_in, batches, exact_softmax):
    generator = random.Random(f"{pads} {leading_pad} {kind}")
    for _ in range(3):
        rows = random_rows(generator, kind, leading_pad)
        assert_cut_learns_the_same(drop_in, batches, backbone, rows, pads)


@pytest.mark.parametrize("pads", [0, 1])
def test_a_batch_is_as_wide_as_its_longest_text_and_the_pads_looked_for(pads, batches):
    collate = batches.RewardCollator(pads)
    rows = [row([5, 6, 7], [5, 6]), row([5], [5, 6, 7, 8, 9])]
    batch = collate(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 5 + pads + 1)
    assert torch.equal(batch["input_ids"], uncut(rows)["input_ids"][:, : 5 + pads + 1])
    assert torch.equal(batch["attention_mask"], uncut(rows)["attention_mask"][:, : 5 + pads + 1])
    for length in (WIDTH, WIDTH - 1):
        assert collate([row([5] * length, [6])])["input_ids"].shape == (2, WIDTH)
    assert collate([row([], [])])["input_ids"].shape == (2, WIDTH)


def test_margins_pass_in_the_order_of_their_rows(batches):
    rows = [row([5], [6], margin) for margin in (0.5, -2.0, 3.0)]
    assert batches.RewardCollator(margins_of=rows)(rows)["margin"].tolist() == [0.5, -2.0, 3.0]
    assert "margin" not in batches.RewardCollator()(rows)


@pytest.mark.parametrize("margin", [NAN, math.inf])
def test_a_missing_margin_matters_with_its_flag_alone(margin, batches):
    rows = [row([5], [6], 1.0), row([5], [6], margin)]
    batches.RewardCollator()(rows)
    with pytest.raises(ValueError, match="--margin column: 1 of 2 "):
        batches.RewardCollator(margins_of=rows)


def test_evaluation_rows_without_a_margin_are_scored(drop_in, batches):
    """One collator serves both data sets; an evaluation looks at the scores alone."""
    rows = [row([5, 6], [5, 7])]
    batch = batches.RewardCollator(margins_of=[row([5], [6], 1.0)])(rows)
    scores = drop_in.RewardModel(reference.TinyBackbone(), reference.TOKENIZER)(**batch)["chosen_mean_scores"]
    assert scores.isfinite().all()


@pytest.mark.parametrize("margin, number", [(2, 2.0), (-0.5, -0.5), ("1.5", 1.5), (None, NAN)])
def test_row_margin(margin, number, batches):
    read = batches.row_margin({"margin": margin})
    assert (read.shape, read.dtype) == ((), torch.float32)
    assert float(read) == pytest.approx(number, nan_ok=True)


def test_a_row_without_a_margin(batches):
    assert batches.row_margin({"prompt": "p"}).isnan()


@pytest.mark.parametrize("margin", ["much better", "", [1, 2]], ids=repr)
def test_a_margin_that_is_no_number_is_none(margin, batches):
    """Step 2 reads the column of every data set, also without --margin column."""
    assert batches.row_margin({"margin": margin}).isnan()


# --- rows on disk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def row_cache(package):
    return added.module("data.row_cache")


def phase_1(rows=5):
    """Texts of step 1, their pads' labels -100."""
    made = []
    for number in range(rows):
        mask = (torch.arange(7) < number + 1).long()
        ids = torch.arange(7) + 1000 * number
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return made


def phase_2(rows=5):
    """Pairs of step 2, every other one without a margin."""
    return [row([5, 6, number], [7] * (number + 1), NAN if number % 2 else number / 2) for number in range(rows)]


def phase_3(rows=5):
    """Prompts of step 3: as long as they are, and the pad."""
    lengths = [3, 1, 0, 6, 2][:rows]
    return [(torch.arange(n) + 300, torch.ones(n, dtype=torch.long), 50256) for n in lengths]


PHASES = {1: phase_1, 2: phase_2, 3: phase_3}


def assert_same_row(one, other):
    assert type(one) is type(other)
    assert len(one) == len(other)
    for key in one if isinstance(one, dict) else range(len(one)):
        if isinstance(one[key], torch.Tensor):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)
        else:
            assert (type(one[key]), one[key]) == (type(other[key]), other[key])


def saved(row_cache, rows, folder):
    row_cache.save_rows(rows, str(folder / "rows.safetensors"))
    return row_cache.SavedRows(str(folder / "rows.safetensors"))


def assert_round_trip(row_cache, rows, folder):
    read = saved(row_cache, rows, folder)
    assert len(read) == len(rows)
    for index in range(len(rows)):
        assert_same_row(rows[index], read[index])


@pytest.mark.parametrize("phase", PHASES)
def test_rows_come_back_as_they_were(phase, row_cache, tmp_path):
    assert_round_trip(row_cache, PHASES[phase](), tmp_path)
    assert_round_trip(row_cache, PHASES[phase](1), tmp_path)


@pytest.mark.parametrize("phase", PHASES)
def test_blended_data_come_back_in_their_order(phase, row_cache, tmp_path):
    rows = ConcatDataset([PHASES[phase](4), PHASES[phase](5)])
    assert_round_trip(row_cache, Subset(rows, [7, 0, 3, 8, 1]), tmp_path)


def test_no_rows(row_cache, tmp_path):
    read = saved(row_cache, Subset(phase_1(), []), tmp_path)
    assert (len(read), list(itertools.islice(read, 3))) == (0, [])
    with pytest.raises(IndexError):
        read[0]


def test_an_index_counts_as_a_lists_does(row_cache, tmp_path):
    rows = phase_3()
    read = saved(row_cache, rows, tmp_path)
    for index in range(-5, 0):
        assert_same_row(rows[index], read[index])
    for index in (5, -6):
        with pytest.raises(IndexError):
            read[index]
    assert len(list(itertools.islice(read, 9))) == 5  # a for loop over it ends


EDGES = [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**63 - 1, -1, -100, -(2**31), -(2**31) - 1]


@pytest.mark.parametrize("edge", EDGES)
def test_whole_numbers_of_any_size_are_kept(edge, row_cache, tmp_path):
    assert_round_trip(row_cache, [(torch.tensor([1, edge]), edge), (torch.tensor([0]), 1)], tmp_path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float64, torch.bfloat16])
def test_numbers_of_any_type_are_kept(dtype, row_cache, tmp_path):
    assert_round_trip(row_cache, [(torch.tensor([[1, 0, 3]]).to(dtype), torch.tensor(1).to(dtype))] * 2, tmp_path)


@pytest.mark.parametrize("phase", [1, 2])
def test_workers_read_the_rows(phase, row_cache, tmp_path):
    rows = PHASES[phase](5)
    loader = DataLoader(saved(row_cache, rows, tmp_path), num_workers=2, collate_fn=list)
    for one, (other,) in zip(rows, loader, strict=True):
        assert_same_row(one, other)


def test_rows_go_to_another_process(row_cache, tmp_path):
    read = pickle.loads(pickle.dumps(saved(row_cache, phase_2(), tmp_path)))  # how workers are spawned
    assert_same_row(phase_2()[1], read[1])


@pytest.mark.parametrize("phase", PHASES)
def test_the_file_holds_numbers_and_their_names_alone(phase, row_cache, tmp_path):
    saved(row_cache, PHASES[phase](), tmp_path)
    content = (tmp_path / "rows.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert set(header.pop("__metadata__")) == {"layout"}
    assert {tensor["dtype"] for tensor in header.values()} <= {"U8", "I32", "I64", "F32"}
    spans = sorted(tensor["data_offsets"] for tensor in header.values())
    ends = [0, *[end for _, end in spans]]
    assert [begin for begin, _ in spans] == ends[:-1]  # no byte between the tensors
    assert 8 + size + ends[-1] == len(content)


@contextlib.contextmanager
def no_room(row_cache):
    """A file may not grow beyond 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def stopped_half_way(row_cache):
    def save_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "save_file", save_file)
        yield


@contextlib.contextmanager
def stopped_at_the_end(row_cache):
    def replace(source, target):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache.os, "replace", replace)
        yield


@pytest.mark.parametrize("failure", [no_room, stopped_half_way, stopped_at_the_end], ids=lambda f: f.__name__)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_leaves_what_was_there(earlier, failure, row_cache, tmp_path):
    if earlier:
        saved(row_cache, phase_1(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((KeyboardInterrupt, SafetensorError)), failure(row_cache):
        row_cache.save_rows([(torch.arange(5000),)], str(tmp_path / "rows.safetensors"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- the folder of the rows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(folder)
    return folder


@pytest.fixture
def world(row_cache, tokenizer_folder, tmp_path):
    """Data, a tokenizer, and the folder they get; every call may change some of it."""
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "train" / "rows.arrow").write_text("one")
    (tmp_path / "train.json").write_text("one")

    def folder(paths=None, end="<|endoftext|>", tokenizer=None, **options):
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, **options)
        paths = paths or [tmp_path / "train.json", data, "Dahoas/rm-static"]
        return row_cache.cache_folder(str(tmp_path / "cache"), [str(path) for path in paths], tokenizer, end)

    return SimpleNamespace(folder=folder, data=data, file=tmp_path / "train.json", top=tmp_path)


def load(tokenizer_folder):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


def test_the_same_inputs_get_the_same_folder(world):
    assert world.folder() == world.folder()
    assert len(os.listdir(world.top / "cache")) == 1


FOLDER_ELSEWHERE = f"""
import sys
from {added.PACKAGE}.utils.data.row_cache import cache_folder
from transformers import AutoTokenizer
root, tokenizer, end, *paths = sys.argv[1:]
print(cache_folder(root, paths, AutoTokenizer.from_pretrained(tokenizer), end))
"""


def test_another_process_elsewhere_gets_the_same_folder(world, package, tokenizer_folder):
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    words = [world.top / "cache", tokenizer_folder, "<|endoftext|>", world.file, world.data, "Dahoas/rm-static"]
    there = added.start(package, FOLDER_ELSEWHERE, *words, cwd=world.data, PYTHONHASHSEED=seed)
    assert added.finish(there) == world.folder()


def test_where_it_runs_does_not_matter(world, monkeypatch):
    before = world.folder()
    monkeypatch.chdir(world.data)
    assert world.folder() == before


def change_file(world):
    world.file.write_text("two")


def change_file_in_folder(world):
    (world.data / "train" / "rows.arrow").write_text("two")


def rename_file_in_folder(world):
    (world.data / "train" / "rows.arrow").rename(world.data / "train" / "other.arrow")


def add_file_to_folder(world):
    (world.data / "state.json").write_text("")


@pytest.mark.parametrize(
    "change", [change_file, change_file_in_folder, rename_file_in_folder, add_file_to_folder], ids=lambda f: f.__name__
)
def test_changed_data_get_another_folder(change, world):
    before = world.folder()
    change(world)
    assert world.folder() != before


def test_a_file_that_reads_like_two_gets_another_folder(world):
    (world.data / "a").write_text("one")
    (world.data / "b").write_text("two")
    before = world.folder()
    (world.data / "b").unlink()
    (world.data / "a").write_text("oneb\0two")
    assert world.folder() != before


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_changed_data_behind_a_link_get_another_folder(linked, world):
    real = world.top / "real"
    real.mkdir()
    (real / "rows.arrow").write_text("one")
    if linked == "file":
        (world.data / "test.arrow").symlink_to(real / "rows.arrow")
    else:
        (world.data / "test").symlink_to(real)
    before = world.folder()
    (real / "rows.arrow").write_text("two")
    assert world.folder() != before


def test_a_link_to_nothing_among_the_data_is_no_matter(world):
    (world.data / ".#train.json").symlink_to("someone@somewhere.1234")  # how Emacs locks a file
    world.folder()


def test_a_link_to_another_of_the_folders_gets_another_folder(world):
    for year in ("2024", "2025"):
        (world.data / year).mkdir()
        (world.data / year / "rows.arrow").write_text(year)
    (world.data / "validation").symlink_to("2024")
    before = world.folder()
    (world.data / "validation").unlink()
    (world.data / "validation").symlink_to("2025")
    assert world.folder() != before


@contextlib.contextmanager
def at_most(seconds):
    def stop(*_):
        pytest.fail(f"still going after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_links_in_a_circle_are_followed_once(world):
    """Two of them, each way round again: 2^40 ways until the system gives up."""
    for name in ("one", "other"):
        (world.data / name).symlink_to(world.data)
    with at_most(5):
        world.folder()


def test_data_of_the_hub_go_by_their_name_and_in_order(world):
    names = ["Dahoas/rm-static", "Dahoas/full-hh-rlhf"]
    folders = {world.folder(paths) for paths in (names, names[::-1], names[:1], names[1:], [*names, names[0]])}
    assert len(folders) == 5


def test_local_jsonfile_is_the_data_folder_beside_the_package(world, package):
    data = package / "data"
    data.mkdir()
    (data / "train.json").write_text("one")
    before = world.folder(["local/jsonfile"])
    (data / "train.json").write_text("two")
    assert world.folder(["local/jsonfile"]) != before


def test_another_end_of_conversation_gets_another_folder(world):
    assert world.folder() != world.folder(end="</s>")


TOKENIZERS = {
    "added token": lambda tokenizer: tokenizer.add_tokens(["cat fish"]),
    "added special token": lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]}),
    "pad is end": lambda tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token),
    "pad is a word": lambda tokenizer: setattr(tokenizer, "pad_token", "the"),
    "other end": lambda tokenizer: setattr(tokenizer, "eos_token", "the"),
    "start token": lambda tokenizer: setattr(tokenizer, "bos_token", "the"),
}


@pytest.mark.parametrize("change", TOKENIZERS)
def test_a_changed_tokenizer_gets_another_folder(change, world, tokenizer_folder):
    tokenizer = load(tokenizer_folder)
    TOKENIZERS[change](tokenizer)
    assert world.folder(tokenizer=tokenizer) != world.folder()


OPTIONS = {
    "padding_side": "left",
    "truncation_side": "left",  # the start of a long text goes, not its end
    "split_special_tokens": True,  # the end token's name in a text is text
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_changed_rule_of_the_tokenizer_gets_another_folder(option, world, tokenizer_folder):
    words = {"max_length": 6, "truncation": True, "padding": "max_length"}
    texts = ["the cat", f"the cat {tiny.EOS} sat on the mat and the other cat"]
    plain, changed = (
        transformers.AutoTokenizer.from_pretrained(tokenizer_folder, **options)
        for options in ({}, {option: OPTIONS[option]})
    )
    assert plain(texts, **words)["input_ids"] != changed(texts, **words)["input_ids"]
    assert world.folder(tokenizer=plain) != world.folder(tokenizer=changed)


def test_another_vocabulary_gets_another_folder(world):
    other = tiny.tokenizer(sentences=["some quite different sentences of another data set, as many"])
    assert world.folder(tokenizer=tiny.tokenizer()) != world.folder(tokenizer=other)


def test_a_start_token_before_every_text_gets_another_folder(world):
    plain = tiny.tokenizer(bos_token=tiny.BOS)
    assert plain.get_vocab() == tiny.llama().get_vocab()
    assert world.folder(tokenizer=plain) != world.folder(tokenizer=tiny.llama())


def test_a_tokenizer_written_in_python(world):
    few, many = (transformers.ByT5Tokenizer(extra_ids=count) for count in (5, 9))
    assert not few.is_fast
    assert world.folder(tokenizer=few) == world.folder(tokenizer=transformers.ByT5Tokenizer(extra_ids=5))
    assert world.folder(tokenizer=few) != world.folder(tokenizer=many)


def test_merges_of_a_tokenizer_written_in_python(world):
    """One vocabulary, two ways to split a word."""
    (world.top / "vocab.json").write_text(json.dumps({"<unk>": 0, "ab</w>": 1, "a@@": 2, "b</w>": 3, "b": 4}))
    made = []
    for name, merges in (("merged", "a b</w>\n"), ("split", "")):
        (world.top / name).write_text("#version\n" + merges)
        made.append(transformers.CTRLTokenizer(str(world.top / "vocab.json"), str(world.top / name)))
    assert made[0].tokenize("ab") != made[1].tokenize("ab")
    assert world.folder(tokenizer=made[0]) != world.folder(tokenizer=made[1])


def test_a_call_of_the_tokenizer_changes_nothing(world, tokenizer_folder):
    """Rank 0 has tokenized the data of one step when it looks for those of the next."""
    tokenizer = load(tokenizer_folder)
    before = world.folder(tokenizer=tokenizer)
    for words in ({"max_length": 9, "padding": "max_length", "truncation": True}, {"padding": True}, {}):
        tokenizer(["the cat", "the cat sat on the mat"], **words)
        assert world.folder(tokenizer=tokenizer) == before


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_the_folders_are_ours_alone(umask, row_cache, tokenizer_folder, tmp_path):
    root = tmp_path / "data files"
    made = row_cache.cache_folder(str(root), ["x"], load(tokenizer_folder), "")
    assert Path(made).parent == root
    for folder in (root, Path(made)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_readable_folder_of_ours_is_used(world):
    (world.top / "cache").mkdir()
    (world.top / "cache").chmod(0o755)
    world.folder()


@pytest.mark.parametrize("inner", [False, True], ids=["root", "folder"])
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777], ids=oct)
def test_a_folder_that_others_may_write_to_is_refused(mode, inner, world):
    folder = Path(world.folder())
    folder = folder if inner else folder.parent
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=f"chmod go-w {folder}.* --data_output_path") as caught:
        world.folder()
    assert "\n" not in str(caught.value)
    folder.chmod(mode & ~0o22)  # what the message says
    world.folder()


@pytest.mark.parametrize("inner", [False, True], ids=["root", "folder"])
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_someone_else_is_refused(inner, world):
    folder = Path(world.folder())
    folder = folder if inner else folder.parent
    os.chown(folder, 65534, -1)
    with pytest.raises(PermissionError, match=r"user 65534.* --data_output_path") as caught:
        world.folder()
    assert str(folder) in str(caught.value)


# --- reward models of any age ----------------------------------------------------------------------------------------

OLD_BUFFERS = (
    "rwtransformer.h.0.attn.bias",
    "rwtransformer.h.1.attn.masked_bias",
    "rwtransformer.layers.0.attention.bias",
    "rwtransformer.layers.0.attention.masked_bias",
    "rwtransformer.layers.0.self_attn.rotary_emb.inv_freq",
    "rwtransformer.embeddings.position_ids",
)


@pytest.fixture(params=["opt", "gpt2"])
def reward(request, drop_in):
    _, config_class, sizes = models.FAMILIES[request.param]
    config = getattr(transformers, config_class)(**sizes, bos_token_id=None, eos_token_id=2)
    torch.manual_seed(0)
    return drop_in.RewardModel(transformers.AutoModel.from_config(config), SimpleNamespace(pad_token_id=PAD))


@pytest.fixture
def read(package, reward, tmp_path):
    """Save a state, and read it for the model."""

    def read(state):
        torch.save(state, tmp_path / "pytorch_model.bin")
        return added.module("model.reward_checkpoint").read_reward_checkpoint(
            str(tmp_path / "pytorch_model.bin"), reward
        )

    return read


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_models_own_state_comes_back(read, reward, capsys):
    state = reward.state_dict()
    assert_same_state(read(state), state)
    assert capsys.readouterr().out == ""


def test_the_prefix_of_before_october_2023(read, reward, capsys):
    state = reward.state_dict()
    old = {name.replace("rwtransformer.", "rwtranrsformer.", 1): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    assert_same_state(read(old), state)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("prefix", ["rwtransformer", "rwtranrsformer"])
def test_buffers_that_are_computed_now_are_no_matter(prefix, read, reward, capsys):
    state = reward.state_dict()
    loaded = read(state | {name.replace("rwtransformer", prefix): torch.zeros(2) for name in OLD_BUFFERS})
    ours = dict(reward.named_buffers())  # Transformers 4 keeps some of them, and loads none
    assert_same_state({name: tensor for name, tensor in loaded.items() if name not in ours}, state)
    assert capsys.readouterr().out == ""


def test_tensors_without_a_place_are_named_and_left_out(read, reward, capsys):
    state = reward.state_dict()
    assert_same_state(read(state | {"b.weight": torch.zeros(2), "a.weight": torch.zeros(2)}), state)
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 tensors" in line
    assert "a.weight" in line
    assert "pytorch_model.bin" in line


def test_a_missing_weight_is_named_and_counted(read, reward):
    state = reward.state_dict()
    gone = sorted(state)[3:6]
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as caught:
        read({name: tensor for name, tensor in state.items() if name not in gone})
    assert f"lacks 3 of the model's {len(state)} weights, {gone[0]} " in str(caught.value)


@pytest.mark.parametrize("state", [{}, {"model.embed_tokens.weight": torch.zeros(2)}])
def test_a_file_of_another_model(state, read, reward):
    with pytest.raises(ValueError, match=f"lacks {len(reward.state_dict())} .* holds {len(state)}"):
        read(state)


@pytest.mark.parametrize("shape", [(0,), (320, 33), (328, 32)], ids=str)
def test_a_weight_of_another_shape_is_named(shape, read, reward):
    state = reward.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError) as caught:
        read(state | {name: torch.zeros(shape)})
    for word in (name, str(shape), str(tuple(state[name].shape)), "pytorch_model.bin"):
        assert word in str(caught.value)


def test_a_vocabulary_that_was_cut_to_the_tokenizer_is_filled_up(read, reward):
    state = reward.state_dict()
    name = next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))
    loaded = read(state | {name: state[name][:312]})
    assert torch.equal(loaded[name][:312], state[name][:312])
    assert loaded[name].shape == state[name].shape
    assert not loaded[name][312:].any()


def test_under_zero_3_a_weight_has_the_shape_it_stands_for(read, reward):
    state = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    for parameter in reward.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert_same_state(read(state), state)
    with pytest.raises(ValueError, match="not gathered"):
        read(reward.state_dict())  # the placeholders, saved


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain pickle"])
def test_code_in_a_checkpoint_does_not_run(legacy, package, reward, tmp_path):
    file, sprung = tmp_path / "pytorch_model.bin", tmp_path / "sprung"
    state = reward.state_dict() | {"rwtransformer.trap": Trap(sprung)}
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        added.module("model.reward_checkpoint").read_reward_checkpoint(str(file), reward)
    assert not sprung.exists()
    torch.load(file, weights_only=False)
    assert sprung.exists()


# --- a folder's tokenizer --------------------------------------------------------------------------------------------

OURS = {"end_token_id": 2}  # in every config.json that DeepSpeed-Chat saves


@pytest.fixture
def tokenizer_of(package, tmp_path_factory):
    """Read the tokenizer of a folder of this name; ``special`` as in tiny.tokenizer."""

    def tokenizer_of(name, config=None, **special):
        folder = tmp_path_factory.mktemp("models") / name
        assert "llama" not in str(folder.parent)
        tiny.tokenizer(folder, **special)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
        return added.module("tokenizer_files").tokenizer_of_folder(str(folder), config or {}, None)

    return tokenizer_of


def test_the_pad_of_a_model_is_its_end_token(tokenizer_of):
    tokenizer = tokenizer_of("opt")
    assert (tokenizer.pad_token, tokenizer.padding_side) == (tiny.EOS, "right")
    tokenizer = tokenizer_of("a-llama", {"_name_or_path": "facebook/opt-350m"}, pad_token=None)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (tiny.EOS, "right")


NAMED_LLAMA = [("a-llama", {}), ("model", {"_name_or_path": "meta-llama/Llama-2-7b"})]


@pytest.mark.parametrize("name, config", NAMED_LLAMA)
def test_a_llama_without_a_pad_gets_one_of_its_own(name, config, tokenizer_of):
    tokenizer = tokenizer_of(name, config, pad_token=None)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("[PAD]", "right")
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == len(tiny.tokenizer(pad_token=None))


@pytest.mark.parametrize("name, config", NAMED_LLAMA)
def test_a_llama_keeps_its_pad(name, config, tokenizer_of):
    tokenizer = tokenizer_of(name, config)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (tiny.PAD, "right")


@pytest.mark.parametrize("name", ["opt", "a-llama"])
def test_what_a_step_saved_keeps_the_pad_it_was_trained_with(name, tokenizer_of):
    tokenizer = tokenizer_of(name, OURS)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (tiny.PAD, "right")


def test_a_saved_tokenizer_comes_back_whole(tokenizer_of, package):
    first = tokenizer_of("model", {"_name_or_path": "meta-llama/Llama-2-7b"}, pad_token=None)
    first.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})  # --add_eot_token
    folder = package / "output"
    first.save_pretrained(folder)
    again = added.module("tokenizer_files").tokenizer_of_folder(str(folder), OURS, None)
    assert again.get_vocab() == first.get_vocab()
    assert again.special_tokens_map == first.special_tokens_map
    assert again("the cat <|eot|>[PAD]")["input_ids"] == first("the cat <|eot|>[PAD]")["input_ids"]


@pytest.mark.parametrize("config, asked, warns", [
    ({"_name_or_path": "facebook/opt-350m"}, "facebook/opt-350m", False),
    ({"_name_or_path": ""}, None, True),
    ({}, None, True),
])  # fmt: skip
def test_a_folder_without_a_tokenizer(config, asked, warns, package, tmp_path, capsys):
    folder = str(tmp_path)
    found = added.module("tokenizer_files").tokenizer_of_folder(folder, config, lambda name: f"that of {name}")
    assert found == f"that of {asked or folder}"
    printed = capsys.readouterr().out
    assert (f"{folder}: no tokenizer_config.json" in printed) == warns
    assert len(printed.splitlines()) == warns


def test_a_byte_level_tokenizer_of_a_llama_keeps_its_spaces(package, tmp_path):
    folder = tmp_path / "a-llama"
    tiny.tokenizer(folder)
    transformers.LlamaConfig(**models.FAMILIES["llama"][2]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = added.module("tokenizer_files").tokenizer_of_folder(str(folder), config, None)
    for text in (*tiny.SENTENCES, " Human:  two spaces \n and a line"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


# --- launchers -------------------------------------------------------------------------------------------------------

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def launcher(package, monkeypatch):
    """launcher_rank, and the launchers' variables after it, of those that are given before."""

    def launcher(given, **variables):
        for name in added.LAUNCHER:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        rank = added.module("launch").launcher_rank(given)
        return rank, {name: os.environ[name] for name in added.LAUNCHER if name in os.environ}

    yield launcher
    for name in added.LAUNCHER:  # what it set itself, monkeypatch does not know of
        os.environ.pop(name, None)


@pytest.mark.parametrize("variables", [{}, {"LOCAL_RANK": "1", "WORLD_SIZE": "4"}])
@pytest.mark.parametrize("given", [0, 3])
def test_a_rank_on_the_command_line_wins(given, variables, launcher):
    assert launcher(given, **variables) == (given, variables)


def test_a_rank_in_the_environment(launcher):
    variables = {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert launcher(-1, **variables) == (3, variables)


def test_a_process_alone_gets_all_that_it_needs(launcher):
    rank, variables = launcher(-1)
    assert rank == 0
    assert variables.keys() == set(added.LAUNCHER)
    assert variables | ALONE == variables


@pytest.mark.parametrize("name, value", [("MASTER_PORT", "29555"), ("MASTER_ADDR", "10.0.0.1"), ("RANK", "2")])
def test_what_is_set_stays(name, value, launcher):
    rank, variables = launcher(-1, **{name: value})
    assert rank == 0
    assert variables == launcher(-1)[1] | {name: value}


GROUP = f"""
import pathlib, sys, time
import torch
from {added.PACKAGE}.utils.launch import launcher_rank
rank = launcher_rank(-1)
torch.distributed.init_process_group("gloo")
ours, other = (pathlib.Path(path) for path in sys.argv[1:])
ours.touch()
while not other.exists():
    time.sleep(0.05)
total = torch.tensor(3.0)
torch.distributed.all_reduce(total)
torch.distributed.barrier()
print(rank, torch.distributed.get_rank(), torch.distributed.get_world_size(), total.item())
"""


def test_two_runs_on_one_machine_do_not_meet(package, tmp_path):
    """Each has its process group open while the other has."""
    files = [tmp_path / "one", tmp_path / "other"]
    runs = [added.start(package, GROUP, *order) for order in (files, files[::-1])]
    try:
        assert [added.finish(run, timeout=120) for run in runs] == ["0 0 1 3.0"] * 2
    finally:
        for run in runs:
            run.kill()


# --- flags of the loss -----------------------------------------------------------------------------------------------


@pytest.fixture
def options(package):
    """What the reward model gets for these words on step 2's command line."""
    flags = added.module("reward_options")

    def options(*words):
        parser = argparse.ArgumentParser(prog="main.py")
        assert flags.add_reward_options(parser) is parser
        return flags.reward_options(parser.parse_args(words))

    return options


def test_without_a_flag_the_drop_in_has_its_own_defaults(options, drop_in):
    parameters = inspect.signature(drop_in.RewardModel).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    given = options()
    assert given.keys() == own.keys()
    given["score_penalty_weight"] = own["score_penalty_weight"]  # of no effect without a penalty
    assert given == own


FLAGS = [
    ([], {}),
    (["--margin", "0.5"], {"margin": 0.5}),
    (["--margin=-1"], {"margin": -1.0}),
    (["--margin", "-1"], {"margin": -1.0}),
    (["--margin", "column"], {"margin": 0.0}),
    (["--label_smoothing", "0.5"], {"label_smoothing": 0.5}),
    (["--label_smoothing", "0"], {"label_smoothing": 0.0}),
    (["--score_penalty", "center"], {"score_penalty": "center", "score_penalty_weight": 0.01}),
    (["--score_penalty", "l2"], {"score_penalty": "l2"}),
    (["--score_penalty", "zero_sum"], {"score_penalty": "zero_sum"}),
    (
        ["--score_penalty", "log_barrier", "--score_penalty_weight", "1e-3"],
        {"score_penalty": "log_barrier", "score_penalty_weight": 1e-3},
    ),
    (["--score_penalty_weight", "2"], {"score_penalty_weight": 2.0}),
    (["--loss_level", "sequence"], {"loss_level": "sequence"}),
    (["--loss_level", "token", "--exclude_pads"], {"loss_level": "token", "exclude_pads": True}),
]


@pytest.mark.parametrize("words, expected", FLAGS, ids=[" ".join(words) for words, _ in FLAGS])
def test_every_flag_reaches_the_reward_model(words, expected, options, drop_in):
    model = drop_in.RewardModel(reference.TinyBackbone(), reference.TOKENIZER, **options(*words))
    assert {name: getattr(model, name) for name in options()} == options() | expected
    model(torch.tensor([[5, 6, PAD], [5, 7, 8]]))["loss"].backward()


WRONG = [("--margin", "nan"), ("--margin", "inf"), ("--margin", "-inf"), ("--margin", "much"), ("--margin", "Column")]
WRONG += [("--label_smoothing", value) for value in ("0.6", "-0.1", "nan", "inf", "much", "column")]
WRONG += [("--score_penalty_weight", value) for value in ("0", "-0", "-0.01", "nan", "inf", "much", "column")]
WRONG += [("--score_penalty", "l1"), ("--loss_level", "word"), ("--margin", "")]


@pytest.mark.parametrize("flag, value", WRONG)
def test_a_wrong_value_is_refused_by_its_flag(flag, value, options, capsys):
    with pytest.raises(SystemExit) as caught:
        options(f"{flag}={value}")
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}:" in error


def test_help_names_every_flag(options, capsys):
    with pytest.raises(SystemExit) as caught:
        options("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in options())


# --- what step 2 counts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(package):
    return added.module("reward_training")


class Engine(nn.Module):
    """Scores looked up by the row's number, so coarse that some are equal."""

    device = torch.device("cpu")

    def __init__(self, rows):
        super().__init__()
        generator = torch.Generator().manual_seed(rows)
        self.chosen, self.rejected = torch.randint(0, 3, (2, rows), generator=generator) / 4

    def forward(self, input_ids):
        assert not self.training
        assert not torch.is_grad_enabled()
        numbers = input_ids[: len(input_ids) // 2, 0]
        return {"chosen_mean_scores": self.chosen[numbers], "rejected_mean_scores": self.rejected[numbers]}


def loader(rows, batch_size, sampler):
    def collate(numbers):
        return {"input_ids": torch.tensor(numbers * 2)[:, None]}

    return DataLoader(range(rows), batch_size=batch_size, sampler=sampler, collate_fn=collate)


def over_all_ranks(evaluate, loaders, monkeypatch):
    """What each rank returns: a first pass to learn what each has, a second in which all have the sum."""
    parts = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: parts.append(totals.clone()))
    for one in loaders:
        evaluate(one)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: totals.copy_(sum(parts)))
    return [evaluate(one) for one in loaders]


def slow_count(engine, numbers):
    """Mean scores, and the share in order, of rows counted one by one."""
    chosen, rejected = ([float(scores[n]) for n in numbers] for scores in (engine.chosen, engine.rejected))
    right = sum(c > r for c, r in zip(chosen, rejected))
    return tuple(sum(values) / len(numbers) if numbers else NAN for values in (chosen, rejected, [right]))


def assert_counts(counts, expected):
    for count in counts:
        assert count == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("eval_iters", [None, 1, 2, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_pair_counts_once_however_many_ranks(ranks, eval_iters, training, monkeypatch):
    for rows, batch_size, shuffle in itertools.product(range(10), (1, 2, 4), (False, True)):
        engine = Engine(rows)
        samplers = [DistributedSampler(range(rows), ranks, rank, shuffle=shuffle) for rank in range(ranks)]
        loaders = [loader(rows, batch_size, sampler) for sampler in samplers]
        seen = {n for sampler in samplers for n in list(sampler)[: eval_iters and eval_iters * batch_size]}
        counts = over_all_ranks(
            lambda one, engine=engine: training.evaluation_reward(engine.train(), one, eval_iters), loaders, monkeypatch
        )
        assert_counts(counts, slow_count(engine, seen))


@pytest.mark.parametrize("eval_iters", [None, 1, 2, 100])
def test_every_pair_counts_once_in_order(eval_iters, training, monkeypatch):
    for rows, batch_size in itertools.product(range(10), (1, 3)):
        engine = Engine(rows)
        loaders = [loader(rows, batch_size, SequentialSampler(range(rows)))]
        seen = range(rows)[: eval_iters and eval_iters * batch_size]
        counts = over_all_ranks(
            lambda one, engine=engine: training.evaluation_reward(engine.train(), one, eval_iters), loaders, monkeypatch
        )
        assert_counts(counts, slow_count(engine, seen))


def test_a_tie_is_not_in_order(training, monkeypatch):
    engine = Engine(4)
    engine.chosen, engine.rejected = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 3.0, 5.0]])
    loaders = [loader(4, 2, SequentialSampler(range(4)))]
    (counts,) = over_all_ranks(lambda one: training.evaluation_reward(engine, one), loaders, monkeypatch)
    assert counts == (2.5, 2.5, 0.25)


@pytest.mark.parametrize("distributed", [False, True])
def test_no_rows_to_evaluate_on(distributed, training, monkeypatch, capsys):
    sampler = DistributedSampler(range(0), 2, 1) if distributed else SequentialSampler(range(0))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: None)
    counts = training.evaluation_reward(Engine(0), loader(0, 2, sampler))
    assert all(math.isnan(count) for count in counts)
    assert len(counts) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert "--data_split" in line


@pytest.mark.parametrize("group", range(1, 6))
@pytest.mark.parametrize("steps", range(1, 8))
def test_every_group_of_micro_batches_weighs_one(steps, group, training):
    boundaries = []
    engine = SimpleNamespace(
        gradient_accumulation_steps=lambda: group, set_gradient_accumulation_boundary=boundaries.append
    )
    weights = [training.accumulation_weight(engine, step, steps) for step in range(steps)]
    groups = [range(steps)[first : first + group] for first in range(0, steps, group)]
    assert [step for step in range(steps) if boundaries[step]] == [members[-1] for members in groups]
    assert len(boundaries) == steps
    for members in groups:
        assert sum(weights[step] / group for step in members) == pytest.approx(1)
        assert len({weights[step] for step in members}) == 1


ACCUMULATION = f"""
import json
import deepspeed, torch
from {added.PACKAGE}.utils.launch import launcher_rank
from {added.PACKAGE}.utils.reward_training import accumulation_weight

launcher_rank(-1)
deepspeed.init_distributed()
micro_batches = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(1))


def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss(scores):
    return scores.square().mean() + scores.mean()


plain, optimizer = made()
start = [parameter.detach().clone() for parameter in plain.parameters()]
for epoch in range(2):
    for group in ((0, 1, 2), (3, 4, 5), (6, 7)):
        optimizer.zero_grad()
        (sum(loss(plain(micro_batches[i])) for i in group) / len(group)).backward()
        optimizer.step()


def distance(one, other):
    return max(float((a.detach().cpu() - b.detach()).abs().max()) for a, b in zip(one, other))


found = {{"moved": distance(start, plain.parameters())}}
for stage in (1, 2, 3):
    model, optimizer = made()
    config = {{
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": {{"stage": stage}},
        "zero_allow_untested_optimizer": True,
    }}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for epoch in range(2):
        for step in range(8):
            value = loss(engine(micro_batches[step].to(engine.device)))
            engine.backward(value * accumulation_weight(engine, step, 8))
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        found[stage] = [distance(model.parameters(), plain.parameters()), engine.global_steps]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_deepspeed_steps_on_the_mean_of_every_group(package):
    """Groups of 3, 3 and 2 micro-batches, in two epochs."""
    found = json.loads(added.finish(added.start(package, ACCUMULATION)))
    assert found.pop("moved") > 0.1
    assert found.keys() == {"1", "2", "3"}
    for stage, (distance, steps) in found.items():
        assert distance < 1e-6, stage
        assert steps == 6
