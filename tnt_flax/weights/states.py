# SPDX-License-Identifier: Apache-2.0
"""Finds the networks among the tensors of a file, in any nesting and behind any prefix.

Trainers save a state dict under a key of their own, wrappers add a prefix to all names, and losses,
metrics, counters and a second network stand beside it. A network is recognized by the names of its
tensors (`name_tables`) alone; all else is accounted for by name.
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from tnt_flax.core.errors import InputError, did_you_mean, listed
from tnt_flax.weights import name_tables, names
from tnt_flax.weights.formats import StoredTensor, described, stored_tensor
from tnt_flax.weights.formats.restricted_pickle import DENSE, Stub

# Keys and prefixes of EMA weights: model_ema, state_dict_ema, ema.module., swa_model ...
EMA = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE)
# Modules that wrap others anywhere in a network: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Tensors that every network has, in each naming.
SENTENCE_POS, WORD_POS = (
    {names.place_of(naming, ours).name for naming in names.NAMINGS}
    for ours in ("sentence_pos", "word_pos")
)
ANCHORS = sorted(SENTENCE_POS | WORD_POS)
# Both have the width of the head's input, unlike `sentence_pos` of PyramidTNT.
LAST_NORM = {
    names.place_of(naming, f"norm/{leaf}").name
    for naming in names.NAMINGS
    for leaf in ("scale", "bias")
}
BEYOND = "not of the network"
EMPTY = "without values"
WITHOUT_HEAD_BIAS = ("mindspore", names.OURS)  # namings whose networks may have none
FEWEST = 8  # known names of a network
MOST_NETWORKS = 16  # in one dictionary
DEEPEST = 8  # nested dictionaries and lists


@dataclasses.dataclass(frozen=True)
class State:
    """The tensors of one network in a file, and what is stored beside them."""

    label: str  # keys of its dictionary, and its prefix if it is not the only network there
    naming: str  # one of `names.NAMINGS`
    prefix: str  # of its names in the file
    inside: dict[str, tuple[str, Any]]  # {name without prefix: (name in the file, value)}
    outside: dict[str, Any]  # other entries of the dictionary, by name in the file

    @property
    def is_ema(self) -> bool:
        return EMA.search(self.label) is not None


def choose(
    source: str, content: Any, weights: str, state: str | None
) -> tuple[State, str | None, list[str]]:
    """Returns a network of the file, "ema", "raw" or None if the file does not state it, and notes.

    Args:
        source: the file, for messages.
        content: nested dictionaries and lists of tensors, plain values and stubs.
        weights: "ema" or "raw", for files that hold both.
        state: the label of the network; None takes the only one.

    Raises:
        InputError: there is no network, or there are several to choose from.
    """
    states = find_states(content)
    if any("lora_A." in name for _, entries in _dictionaries(content) for name in entries):
        raise InputError(
            f"{source} holds a LoRA adapter: merge it into the network (peft's merge_and_unload) "
            "and save the state_dict"
        )
    by_label = {found.label: found for found in states}
    if not states:
        raise InputError(f"{source} {_why_none(content)}")
    if state is not None:
        if state.rstrip(".") not in by_label:
            close = did_you_mean(state, by_label)
            raise InputError(f"{source} has no state {state!r}{close}, but {_listed(states)}")
        chosen = by_label[state.rstrip(".")]
        return chosen, "ema" if chosen.is_ema else None, [f"took {chosen.label}", *_notes(chosen)]
    ema = [found for found in states if found.is_ema]
    raw = [found for found in states if not found.is_ema]
    if weights == "raw" and not raw:
        labels = listed([found.label for found in ema])
        raise InputError(f"{source} holds only EMA weights ({labels}): set weights='ema'")
    if len(raw) > 1 or (len(ema) > 1 and weights == "ema"):
        raise InputError(
            f"{source} holds several networks: {_listed(states)}; choose one with state='NAME' or "
            "--state=NAME (for a training run, convert it first)"
        )
    if ema and weights == "ema":
        taken = f"weights='raw' takes {raw[0].label or 'the others' if raw else 'nothing'}"
        note = f"took the EMA weights, {ema[0].label}; {taken}"
        return ema[0], "ema", [note, *_notes(ema[0])]
    (chosen,) = raw
    if not (chosen.label or ema):
        return chosen, None, _notes(chosen)
    beside = f"{ema[0].label} is there too" if ema else "there is no EMA"
    return chosen, "raw", [f"took {chosen.label or 'the others'}; {beside}", *_notes(chosen)]


def _notes(state: State) -> list[str]:
    notes = [f"removed the prefix {state.prefix!r}"] if state.prefix else []
    wrapped = [x for name, (x, _) in state.inside.items() if x != state.prefix + name]
    return notes + ([f"removed wrappers in names such as {wrapped[0]}"] if wrapped else [])


def _listed(states: list[State]) -> str:
    return listed([f"{s.label or '(top level)'} ({len(s.inside)} tensors)" for s in states])


def find_states(content: Any) -> list[State]:
    """Returns all networks in nested dictionaries and lists, in the order of the file."""
    states = []
    for path, entries in _dictionaries(content):
        found = _networks(entries)
        for state in found:
            parts = [*path, state.prefix.rstrip(".")] if found[1:] else path
            label = ".".join(filter(None, parts))
            states.append(dataclasses.replace(state, label=label))
    return states


def _dictionaries(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields the keys and the entries of each dictionary with named tensors."""
    visited, pending = set(), collections.deque([((), content)])
    while pending:
        path, value = pending.popleft()
        if id(value) in visited or len(path) > DEEPEST:
            continue
        visited.add(id(value))
        named = value if isinstance(value, dict) else dict(enumerate(value))
        entries = {key: stored_tensor(x) for key, x in named.items() if type(key) is str}
        if any(isinstance(x, StoredTensor | Stub) for x in entries.values()):
            yield path, entries
        nested = ((key, x) for key, x in named.items() if isinstance(x, dict | list | tuple))
        pending += [((*path, str(key)), x) for key, x in nested]


def _networks(entries: Mapping[str, Any]) -> list[State]:
    """Returns the networks whose names share a prefix. What is in none is outside of each."""
    cleaned = {name: WRAPPERS.sub("", name) for name in entries}
    if len(set(cleaned.values())) < len(cleaned):  # wrapped and not, side by side
        cleaned = {name: name for name in entries}
    prefixes = dict.fromkeys(
        name.removesuffix(anchor)
        for name in cleaned.values()
        for anchor in ANCHORS
        if name == anchor or name.endswith(f".{anchor}")
    )
    free, found = dict(cleaned), []
    for prefix in sorted(prefixes, key=len, reverse=True)[:MOST_NETWORKS]:
        inside = {
            name.removeprefix(prefix): (stored, entries[stored])
            for stored, name in free.items()
            if name.startswith(prefix)
        }
        naming, known = names.detect_naming(inside)
        if known >= FEWEST and 2 * known > len(inside):
            # Names that WRAPPERS has not changed begin with the whole prefix.
            heads = [stored.removesuffix(name) for name, (stored, _) in inside.items()]
            found.append(State("", naming, os.path.commonprefix(heads), inside, {}))
            free = {stored: name for stored, name in free.items() if not name.startswith(prefix)}
    outside = {stored: entries[stored] for stored in free}
    order = {name: i for i, name in enumerate(entries)}
    found.sort(key=lambda state: min(order[stored] for stored, _ in state.inside.values()))
    return [dataclasses.replace(state, outside=outside) for state in found]


def _why_none(content: Any) -> str:
    """Continues a message about a file without a network."""
    candidates = [entries for _, entries in _dictionaries(content)]
    tensors = max(
        ([n for n, x in c.items() if _is_tensor(x)] for c in candidates), key=len, default=[]
    )
    if not tensors:
        top = content if isinstance(content, dict) else {}
        found = [
            ascii(key)[:50] + (f" ({described(x)})" if isinstance(x, Stub) else "")
            for key, x in top.items()
        ]
        kind = "nothing" if top is content else f"a {type(content).__name__}"
        what = listed(found) or kind
        return f"holds no set of named tensors, but {what}: save the network's state_dict()"
    naming, known = names.detect_naming(tensors)
    unknown = [name for name in tensors if not names.our_names(naming, name)]
    which = (
        f"; unknown are {', '.join(ascii(name)[:60] for name in unknown[:3])}" if unknown else ""
    )
    return (
        f"holds no known TNT: the best match, {naming}, has {known} of its {len(tensors)} tensors"
        f"{which}: give weights of TNT or PyramidTNT"
    )


# ------------------------------------------------------------------------------ each tensor


@dataclasses.dataclass
class Assigned:
    """What becomes of each entry of a state dict."""

    weights: dict[str, tuple[str, Any]]  # {name in its naming: (name in the file, tensor)}
    left_out: dict[str, str]  # {name in the file: reason}
    unexpected: dict[str, Any]  # tensors that the network does not have, by name in the file
    notes: list[str]


def assign(source: str, state: State, *, other_head: bool) -> Assigned:
    """Returns the tensors of the network and those to leave out, with reasons.

    A linear layer of another name becomes the head of a network that has none. A head of another
    kind is no part of the network. Integers of one element beside the network are counters.

    Args:
        source: the file, for messages.
        state: the network.
        other_head: the head will be replaced: tensors that do not belong to the network are left
            out. Otherwise only tensors outside of the prefix of a complete network are.

    Raises:
        InputError: an entry of the network is no tensor, or all are empty.
    """
    weights, left_out, others = {}, {}, dict(state.outside)
    kernel, bias = (
        names.place_of(state.naming, f"head/{leaf}").name for leaf in ("kernel", "bias")
    )
    known = {name for name in state.inside if names.our_names(state.naming, name)}
    body = {_root(name) for name in known - {kernel, bias}}
    for name, (stored, x) in state.inside.items():
        if reason := names.ignored_reason(state.naming, name):
            if reason == name_tables.ZERO and (not _is_tensor(x) or np.any(x.read())):
                raise InputError(f"{source}: {name} is not zero, unlike in published files")
            left_out[stored] = reason
        elif name in known or _root(name) in body:
            weights[name] = (stored, x)
        else:
            others[stored] = x
    _check_tensors(source, weights)
    for name in [name for name, (_, x) in weights.items() if 0 in x.shape]:
        left_out[weights.pop(name)[0]] = EMPTY
    left_out |= {stored: reason for stored, x in others.items() if (reason := _no_weight(x))}
    others = {stored: x for stored, x in others.items() if stored not in left_out}
    widths = {x.shape for name, (_, x) in weights.items() if name in LAST_NORM}
    head = {name: weights[name] for name in (kernel, bias) if name in weights}
    notes = []
    if head and not _is_head(state.naming, [x for _, x in head.values()], widths):
        others |= dict(head.values())
        weights = {name: x for name, x in weights.items() if name not in head}
    elif not head and (layer := _lone_linear(others, state.prefix, widths)):
        for name, leaf in ((kernel, f"{layer}.weight"), (bias, f"{layer}.bias")):
            weights[name] = (leaf, others.pop(leaf))
        notes.append(f"took {layer} as the head")
    complete = bool(state.prefix) and kernel in weights
    beyond = [s for s in others if other_head or (complete and s in state.outside)]
    left_out |= dict.fromkeys(beyond, BEYOND)
    for reason in dict.fromkeys(left_out.values()):
        group = [stored for stored, why in left_out.items() if why == reason]
        notes.append(f"{verb(reason)} {listed(group, limit=3)} ({reason})")
    unexpected = {stored: x for stored, x in others.items() if stored not in beyond}
    return Assigned(weights, left_out, unexpected, notes)


def verb(reason: str) -> str:
    """Returns what has been done with a tensor, for a message."""
    return "left out" if reason == BEYOND else "ignored"


def _check_tensors(source: str, weights: Mapping[str, tuple[str, Any]]) -> None:
    for stored, x in weights.values():
        if not _is_tensor(x):
            what = described(x) if isinstance(x, Stub) else f"a {type(x).__name__}"
            raise InputError(f"{source}: {stored!r} is not a tensor, but {what}: {DENSE}")
    if all(0 in x.shape for _, x in weights.values()):
        raise InputError(
            f"{source}: its tensors are empty, as in DeepSpeed's shards of ZeRO-3: join the shards "
            "by the zero_to_fp32.py in their folder"
        )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, StoredTensor)


def _root(name: str) -> str:
    return re.split("[./]", name, maxsplit=1)[0]


def _no_weight(x: Any) -> str | None:
    """Returns why an entry beside the network is no weight of any."""
    if not _is_tensor(x):
        return "not a tensor"
    if 0 in x.shape:
        return EMPTY
    is_counter = math.prod(x.shape) == 1 and np.dtype(x.dtype).kind in "biu"
    return "a counter" if is_counter else None


def _is_head(naming: str, tensors: Sequence[StoredTensor], widths: Set[tuple[int, ...]]) -> bool:
    """Whether `tensors` are a linear layer of such a width, with a bias if the naming has one."""
    shapes = [x.shape[::-1] if naming == names.OURS else x.shape for x in tensors]
    return (
        len(shapes) in ((1, 2) if naming in WITHOUT_HEAD_BIAS else (2,))
        and len(shapes[0]) == 2
        and shapes[0][1:] in widths
        and all(shape == shapes[0][:1] for shape in shapes[1:])
    )


def _lone_linear(
    others: Mapping[str, Any], prefix: str, widths: Set[tuple[int, ...]]
) -> str | None:
    """Returns the name of the only module that is one linear layer, such as "fc" or "head.1"."""
    modules: dict[str, list[str]] = {}
    for stored in others:
        modules.setdefault(_root(stored.removeprefix(prefix)), []).append(stored)
    found = []
    for module in modules.values():
        layer = module[0].rpartition(".")[0]
        leaves = [f"{layer}.weight", f"{layer}.bias"]
        if sorted(module) == sorted(leaves) and _is_head("", [others[n] for n in leaves], widths):
            found.append(layer)
    return found[0] if len(found) == 1 else None
