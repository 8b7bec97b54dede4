"""Complete prompts, as training taught it: what ``generate``, ``evaluate`` and ``predict`` share.

An answer ends where an answer of the training data ended (``data/chats/turn_end.py``), and at what else the base model
ends with. Sampling settings that come with the base (a repetition penalty, for one) are left out: what is asked for
here is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from lit_lora.adapters.mixed_batch import adapters_by_row
from lit_lora.adapters.rounded_factors import rounded_factors
from lit_lora.base.shards import is_sharded
from lit_lora.data.chats.turn_end import TurnEnd, turn_end
from lit_lora.language_model.answering_attention import answering_attention
from lit_lora.language_model.full_batches import can_be_kept_full, complete_in_full_batches

PROMPTS_AT_A_TIME = 25
"""Where nothing else is asked for."""


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    """Without special tokens and what ended it."""
    cut: bool
    """Whether it was still going on at ``max_new_tokens``."""


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    end: TurnEnd,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
    progress: Callable[[int], None] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[Completion]:
    """Completions, in the order of the prompts.

    Args:
        model: in evaluation mode.
        tokenizer: as used for training.
        prompts: token ids of each prompt.
        end: where an answer ends.
        max_new_tokens: longest completion.
        batch_size: prompts at a time; those of similar length go together, padded on the left. On a CPU, greedily,
            prompts enter as answers come to their end. By default 25, and there what 16,384 tokens hold.
        temperature: 0 for the most likely token each time; above 0 to sample.
        top_p: sample from the smallest set of tokens of this total probability.
        streamer: as transformers has them; for one prompt.
        progress: called with the number of prompts that are done.
        adapters: name of the one that completes each prompt, None for the base alone; by default the active ones do.

    Raises:
        ValueError: if a prompt has a token that the model does not know, or adapters cannot be in one batch.
    """
    check_vocabulary(model, prompts)
    stops = stop_tokens(model, tokenizer, end)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[-1]
    if not temperature and streamer is None and can_be_kept_full(model):
        answers = _in_full_batches(
            model,
            prompts,
            adapters,
            progress,
            has_ended=lambda ids: ids[-1] in stops or _says(tokenizer, end.strings, ids),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        return [_completion(tokenizer, ids, stops, end.strings) for ids in answers]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        **{"do_sample": False, **sampling},
    )
    batch_size = PROMPTS_AT_A_TIME if batch_size is None else batch_size
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions = [Completion("", False)] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in indices)
        # On the CPU where shares lie in its memory: the model then brings to its device what it is given.
        ids = torch.full((len(indices), longest), pad_id, device=model.device)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            length = len(prompts[index])
            ids[row, longest - length :] = torch.tensor(prompts[index])
            mask[row, longest - length :] = 1
        criteria = [_StopStrings(tokenizer, end.strings, longest)] if end.strings else []
        by_row = nullcontext() if adapters is None else adapters_by_row(model, [adapters[index] for index in indices])
        with by_row, _ready_to_answer(model), _generating_by(model, config):
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                stopping_criteria=criteria,
                streamer=streamer,
                synced_gpus=is_sharded(model),  # processes run the model until the last of them has its answer
            )
        for index, written in zip(indices, output[:, longest:].tolist(), strict=True):
            completions[index] = _completion(tokenizer, written, stops, end.strings)
        if progress is not None:
            progress(start + len(indices))
    return completions


def counting_on(progress: Callable[[int], None] | None, num_before: int) -> Callable[[int], None] | None:
    """``progress`` for a part of the prompts, before which so many others were done."""
    return None if progress is None else lambda num_done: progress(num_before + num_done)


def _in_full_batches(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    adapters: Sequence[str | None] | None,
    progress: Callable[[int], None] | None,
    **options: Any,
) -> list[list[int]]:
    """Tokens after each prompt; one adapter after the other, since in a batch, too, each multiplies its rows alone."""
    answers: list[list[int]] = [[]] * len(prompts)
    num_done = 0
    for name in dict.fromkeys(adapters or [None]):
        indices = [index for index in range(len(prompts)) if adapters is None or adapters[index] == name]
        by_row = nullcontext() if adapters is None else adapters_by_row(model, [name])
        with by_row, _ready_to_answer(model):
            written = complete_in_full_batches(
                model, [prompts[index] for index in indices], progress=counting_on(progress, num_done), **options
            )
        num_done += len(indices)
        for index, ids in zip(indices, written, strict=True):
            answers[index] = ids
    return answers


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[dict[str, Any]], *, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Answer prompts of conversations, greedily.

    Args:
        model: in evaluation mode.
        tokenizer: as used for training.
        prompts: each with ``prompt_ids``, ``(1, L)``, and where there is one, ``reference``.
        max_new_tokens: longest answer, in tokens.

    Returns:
        For each ``prompt``, ``completion``, ``reference``, and whether it was ``cut``.
    """
    ids = [prompt["prompt_ids"][0].tolist() for prompt in prompts]
    completions = complete(model, tokenizer, ids, end=turn_end(tokenizer), max_new_tokens=max_new_tokens)
    return [
        {
            "prompt": tokenizer.decode(tokens, skip_special_tokens=True),
            "completion": completion.text,
            "reference": prompt.get("reference"),
            "cut": completion.cut,
        }
        for tokens, completion, prompt in zip(ids, completions, prompts, strict=True)
    ]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: TurnEnd) -> list[int]:
    """What ends an answer: the trained end, and what the base ends with as far as this tokenizer has it for that."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = own if isinstance(own, list) else [] if own is None else [own]
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [*end.ids, *(token for token in own if token in special and token not in end.ids)]


def check_vocabulary(model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        ValueError: if it has not.
    """
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    highest = max((token for ids in prompts for token in ids), default=0)
    if highest >= size:
        raise ValueError(
            f"token id {highest} is outside the model's vocabulary of {size}: the tokenizer is not the model's"
        )


def cut_note(completions: Sequence[Completion], max_new_tokens: int) -> str:
    """A sentence on answers that did not come to their end; empty where all did."""
    num_cut = sum(completion.cut for completion in completions)
    if not num_cut:
        return ""
    were = "1 of 1 answers was" if len(completions) == 1 else f"{num_cut} of {len(completions)} answers were"
    return f"{were} cut at max_new_tokens={max_new_tokens}"


@contextmanager
def _generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """``generate`` fills what a call leaves open from the model's own config, which here says nothing else."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _ready_to_answer(model: PreTrainedModel) -> Iterator[None]:
    """What makes a token cheaper, and changes no answer."""
    with rounded_factors(model), answering_attention(model), _contiguous_into_head(model):
        yield


@contextmanager
def _contiguous_into_head(model: Any) -> Iterator[None]:
    """The head gets the last token of each prompt as a slice.

    torch (2.13) multiplies a slice by a frozen weight in a batch, with a copy of the head for each prompt: on a CPU
    2.8 s and 1.4 GB for 25 prompts in bfloat16, not 13 ms.
    """
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _completion(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int], strings: Sequence[str]
) -> Completion:
    length = next((place for place, token in enumerate(ids) if token in stops), None)
    text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    found = [text.index(string) for string in strings if string in text]
    return Completion(text[: min(found)] if found else text, length is None and not found)


def _says(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], ids: list[int]) -> bool:
    """Whether the newest of these tokens ended one of the strings."""
    if not strings:
        return False
    window = max(len(string.encode()) for string in strings) + 1  # a token is a byte or more
    text = tokenizer.decode(ids[-window:], skip_special_tokens=True)
    return any(string in text for string in strings)


class _StopStrings(StoppingCriteria):
    """Ends a row once one of these texts stands among what was generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], start: int) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        ended = [_says(self.tokenizer, self.strings, ids) for ids in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)
