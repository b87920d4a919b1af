# SPDX-License-Identifier: Apache-2.0
"""Tokenized rows on disk: safetensors files, which hold numbers only, in a folder that nobody else can write to."""

import hashlib
import json
import os
import stat
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset


def cache_folder(root, data_paths, tokenizer, end_of_conversation_token):
    """A folder under ``root`` for these data and this tokenizer; made if it is not there.

    Its name depends on the content of local files, and on every token and rule of the tokenizer, so that changed rows
    or an added token never meet old ones. Data from the hub go by their name.

    Raises:
        PermissionError: ``root`` belongs to another user, or others may write to it.
    """
    root = _private_folder(root)
    key = hashlib.sha256()
    for path in data_paths:
        key.update(f"{path}\0{_content(path)}\0".encode())
    key.update(f"{_tokenizer_rules(tokenizer)}\0{end_of_conversation_token}".encode())
    return _private_folder(os.path.join(root, key.hexdigest()))


def _private_folder(path):
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.stat(path)
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            raise PermissionError(
                f"{path} belongs to user {found.st_uid}, who could plant rows there: "
                "give --data_output_path a folder of your own"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(
                f"{path}: others may write to it, and could plant rows there: "
                f"chmod go-w {path}, or give --data_output_path another folder"
            )
    return path


def _content(path):
    """SHA-256 of a local file or folder, or of what ``local/jsonfile`` stands for; empty for a name on the hub."""
    if "local/jsonfile" in path:  # applications/DeepSpeed-Chat/data, as in get_raw_dataset
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), *[os.pardir] * 3, "data")
    digest = hashlib.sha256()
    if os.path.isfile(path):
        names = [path]
    else:
        names, seen = [], set()
        for folder, folders, files in os.walk(path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # links can lead round in a circle
                digest.update(f"{os.path.relpath(folder, path)}\0{os.path.relpath(real, path)}\0".encode())
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            names += [os.path.join(folder, name) for name in sorted(files)]
    for name in filter(os.path.isfile, names):  # an editor's lock is a link to nothing
        digest.update(f"{os.path.relpath(name, path)}\0{os.path.getsize(name)}\0".encode())
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if names else ""


def _tokenizer_rules(tokenizer):
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    rules = {"class": type(tokenizer).__name__, "special": special}
    for name in ("padding_side", "truncation_side", "split_special_tokens"):
        rules[name] = getattr(tokenizer, name, None)
    if tokenizer.is_fast:
        rules["backend"] = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
            rules["backend"].pop(state, None)
    else:
        rules["vocabulary"] = tokenizer.get_vocab()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            rules["files"] = _content(folder)
    return json.dumps(rules, sort_keys=True)


def save_rows(rows, path):
    """Write a dataset: each row a dict or a tuple of tensors, (s,), (1, s) or (), or of plain integers.

    s may differ from row to row. The file appears whole or not at all.
    """
    rows = [rows[i] for i in range(len(rows))]
    named = rows and isinstance(rows[0], dict)
    fields = list(rows[0]) if named else list(range(len(rows[0]))) if rows else []
    tensors, layout = {}, []
    for position, field in enumerate(fields):
        values = [row[field] for row in rows]
        plain = isinstance(values[0], int)
        values = [torch.as_tensor(value) for value in values]
        ends = torch.tensor([value.numel() for value in values]).cumsum(0)
        flat = torch.cat([value.reshape(-1) for value in values])
        layout.append({"name": field, "plain": plain, "lead": values[0].dim() - 1, "dtype": str(flat.dtype)[6:]})
        tensors[f"{position}.values"], tensors[f"{position}.ends"] = _narrowed(flat), ends
    layout = {"rows": len(rows), "named": bool(named), "fields": layout}
    handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".rows-")
    os.close(handle)
    try:
        save_file(tensors, unfinished, metadata={"layout": json.dumps(layout)})
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _narrowed(values):
    """Whole numbers in the fewest bytes: a mask takes one per token instead of eight."""
    if values.dtype == torch.int64 and values.numel():
        for narrow in (torch.uint8, torch.int32):
            limits = torch.iinfo(narrow)
            if limits.min <= int(values.min()) and int(values.max()) <= limits.max:
                return values.to(narrow)
    return values


class SavedRows(Dataset):
    """The rows that :func:`save_rows` wrote, in their order and of their types."""

    def __init__(self, path):
        with safe_open(path, framework="pt") as file:
            layout = json.loads(file.metadata()["layout"])
            self.columns = [
                (file.get_tensor(f"{i}.values"), file.get_tensor(f"{i}.ends").tolist(), field)
                for i, field in enumerate(layout["fields"])
            ]
        self.size = layout["rows"]
        self.named = layout["named"]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        index = range(self.size)[index]
        row = {field["name"]: self._cell(values, ends, field, index) for values, ends, field in self.columns}
        return row if self.named else tuple(row.values())

    @staticmethod
    def _cell(values, ends, field, index):
        cell = values[ends[index - 1] if index else 0 : ends[index]].to(getattr(torch, field["dtype"]))
        if field["plain"]:
            return int(cell)
        return cell.reshape([1] * field["lead"] + [-1]) if field["lead"] >= 0 else cell.reshape(())
