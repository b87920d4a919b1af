# SPDX-License-Identifier: Apache-2.0
"""A reward model's ``pytorch_model.bin``, of any age, checked against the model that is to take it."""

import re

import torch

# buffers that old versions of Transformers saved and new ones compute: nothing is lost without them
COMPUTED = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|\.position_ids$")


def read_reward_checkpoint(path, model):
    """The state dict in ``path``, under the names of ``model``, and nothing that has no place there.

    The backbone's prefix was ``rwtranrsformer`` until October 2023. An embedding that was cut to the tokenizer's
    length, as step 2 did before it was patched, is filled up to the model's rows: no token has one of those.

    Raises:
        ValueError: a parameter of the model that the file lacks, or one of another shape. Loading then would leave
            random weights in place.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {re.sub(r"^rwtranrsformer\.", "rwtransformer.", name): tensor for name, tensor in state.items()}
    # under ZeRO 3 a parameter is an empty placeholder, and ds_shape is what it stands for
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the model's {len(wanted)} weights, {missing[0]} among them; "
            f"it holds {len(state)}, such as {next(iter(state), 'none')}"
        )
    _fill_up_vocabulary(state, wanted, model)
    wrong = [name for name, shape in wanted.items() if tuple(state[name].shape) != shape]
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, where the model has {wanted[wrong[0]]}"
            " (saved under ZeRO 3 and not gathered, or with another vocabulary)"
        )
    known = wanted.keys() | {name for name, _ in model.named_buffers()}
    unused = sorted(name for name in state if name not in known and not COMPUTED.search(name))
    if unused:
        print(f"{path}: {len(unused)} tensors have no place in the model, {unused[0]} among them", flush=True)
    return {name: tensor for name, tensor in state.items() if name in known}


def _fill_up_vocabulary(state, wanted, model):
    embedding = model.rwtransformer.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    rows, width = wanted[name]
    if state[name].dim() == 2 and len(state[name]) < rows and state[name].shape[1] == width:
        state[name] = torch.cat([state[name], state[name].new_zeros(rows - len(state[name]), width)])
