"""A tokenizer as GGUF describes it: byte-level BPE alone, split into words in a way that llama.cpp has a name for.

llama.cpp has code for each way to split, and picks it by a name. Its own converter finds the name by what a tokenizer
makes of one text; here it is found by the rule itself, so that added tokens and other merges do not matter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

from gguf import GGUFWriter, TokenType

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "use_regex": True}
_PLAIN_BYTES = {"type": "ByteLevel", "use_regex": False}


def _split(digits: str) -> dict[str, Any]:
    pattern = {"Regex": f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_OTHERS}"}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


WORDS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [_split(r"\p{N}{1,3}"), _PLAIN_BYTES],
    "qwen2": [_split(r"\p{N}"), _PLAIN_BYTES],
}
"""llama.cpp's name -> the steps that split a text, as in ``tokenizer.json``."""

_IGNORES_MERGES = {"llama-bpe"}
"""Where llama.cpp takes a word that is a token as it is."""


class Vocabulary(NamedTuple):
    """What goes into the file."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    words: str
    """Name of the way to split."""
    adds_bos: bool
    adds_eos: bool
    ids: dict[str, int]
    """bos, eos, eot, pad, unk, as far as there are any."""
    chat_template: str | None


def vocabulary(tokenizer: Any, rows: int, ends: Collection[int] = ()) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: of transformers.
        rows: of the embedding, which may have more than there are tokens.
        ends: ids that end an answer.

    Raises:
        ValueError: naming what GGUF or llama.cpp have no word for.
    """
    if not tokenizer.is_fast:
        raise ValueError(_cannot("it is not a fast tokenizer"))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = _words(content)
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    stripping = [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if stripping:
        raise ValueError(_cannot(f"its token {stripping[0]!r} takes white space or word boundaries with it"))
    by_id = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    by_id |= {token_id: entry["content"] for token_id, entry in added.items()}
    if max(by_id) >= rows:
        raise ValueError(_cannot(f"it has token {max(by_id)}, and the model's embedding has {rows} rows"))
    types = []
    for token_id in range(rows):
        kind = TokenType.NORMAL if token_id in by_id else TokenType.UNUSED
        if token_id in added:
            kind = TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED
        types.append(int(kind))
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")}
    other_ends = [end for end in ends if end != ids["eos"]]
    ids["eot"] = other_ends[0] if other_ends else None
    adds_bos, adds_eos = _added_around(tokenizer)
    template = tokenizer.chat_template
    return Vocabulary(
        tokens=[by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)],
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]],
        words=words,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        ids={kind: token_id for kind, token_id in ids.items() if token_id is not None},
        chat_template=template if isinstance(template, str) else None,
    )


def write_vocabulary(writer: GGUFWriter, found: Vocabulary) -> None:
    """Put it into the metadata of a file."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.words)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    add = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id,
        "pad": writer.add_pad_token_id, "unk": writer.add_unk_token_id,
    }  # fmt: skip
    for kind, token_id in found.ids.items():
        add[kind](token_id)
    writer.add_add_bos_token(found.adds_bos)
    writer.add_add_eos_token(found.adds_eos)
    if found.chat_template is not None:
        writer.add_chat_template(found.chat_template)


def _words(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way that a ``tokenizer.json`` splits a text."""
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        what = "BPE with tokens for single bytes beside it" if model["type"] == "BPE" else model["type"]
        raise ValueError(_cannot(f"it is {what}, as of SentencePiece"))
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError(_cannot("its BPE has dropout, prefixes or suffixes"))
    steps = _steps(content["pre_tokenizer"])
    if any(step.get("add_prefix_space") for step in steps):
        raise ValueError(_cannot("it puts a space before a text"))
    plain = [{k: v for k, v in step.items() if k not in ("add_prefix_space", "trim_offsets")} for step in steps]
    found = [name for name, rule in WORDS.items() if rule == plain]
    if not model["merges"]:
        raise ValueError(_cannot("it has no merges, without which llama.cpp loads no file"))
    if not found:
        raise ValueError(_cannot(f"it splits words in another way than {', '.join(WORDS)}"))
    if bool(model.get("ignore_merges")) != (found[0] in _IGNORES_MERGES):
        raise ValueError(_cannot(f"ignore_merges is {model.get('ignore_merges')}, not as of {found[0]}"))
    normalizer = content["normalizer"]
    if normalizer == {"type": "NFC"}:
        warnings.warn(
            "the tokenizer normalizes text (NFC) and llama.cpp does not: text with combining characters may become "
            "other tokens there",
            UserWarning,
            stacklevel=4,
        )
    elif normalizer is not None:
        raise ValueError(_cannot(f"it normalizes text ({normalizer['type']})"))
    return found[0]


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether it puts its first and its last token around a text."""
    bare, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [*([bos] if before else []), *bare, *([eos] if after else [])]:
            return before, after
    raise ValueError(_cannot(f"it makes {whole} of a text of {bare}: only a first and a last token can be said"))


def _cannot(reason: str) -> str:
    return f"this tokenizer cannot be written as GGUF: {reason}. Serve the merged model with transformers or vLLM"
