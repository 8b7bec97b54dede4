"""``lit-lora push``: a finished adapter, with its model card, to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_lora.evaluation.push import Pushed


def push(
    source: str,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    not_proved: bool = False,
) -> Pushed:
    """Upload an adapter to the Hub; the token is that of hf auth login, or HF_TOKEN.

    Args:
        source: folder of a run, or of an adapter.
        repo: repository, OWNER/NAME; it is made where it is not there.
        private: let only its owner see it; a public repository that is there is refused.
        revision: branch to commit to, made where it is not there; main by default.
        message: of the commit.
        not_proved: also send the adapter of a run that is not proved.
    """
    from lit_lora.evaluation.push import push_adapter

    pushed = push_adapter(source, repo, private=private, revision=revision, message=message, not_proved=not_proved)
    print(f"{pushed.url} at {pushed.commit}")
    for note in pushed.notes:
        print(note)
    return pushed
