"""Rows of conversations, as text that the tokenizer's own chat template makes of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pared.errors import ParedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
FIELDS = ("messages", "conversations", "conversation")
# ShareGPT's names of speakers, and those of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bot": "assistant"}
EXPECTED = "{'role': ..., 'content': ...} or {'from': ..., 'value': ...}"


def is_conversation(row: object) -> bool:
    """Whether a row of JSON holds a conversation: a list, where a string of that name is a key or a number of one."""
    return isinstance(row, Mapping) and any(isinstance(row.get(field), list) for field in FIELDS)


def messages_of(which: str, row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a row as ``role`` and ``content``.

    Args:
        which: row it is, for messages.
        row: with ``messages`` (``role``, ``content``) or ``conversations`` (``from``, ``value``).

    Raises:
        ParedError: no messages, or one without a speaker and a text; names the row and the message.
    """
    field = next(field for field in FIELDS if isinstance(row.get(field), list))
    found = row[field]
    if not found:
        raise ParedError(f"{which}: expected {field!r} to be a list of messages {EXPECTED}, got {found!r:.60}")
    return [_message(f"{which}, message {number}", one) for number, one in enumerate(found, 1)]


def _message(which: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ParedError(f"{which}: expected {EXPECTED}, got {message!r:.60}")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    parts = isinstance(content, list) and all(isinstance(one, Mapping) and one.get("type") == "text" for one in content)
    if parts:
        content = "".join(str(one.get("text", "")) for one in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ParedError(f"{which}: expected {EXPECTED}, both strings; got {dict(message)!r:.100}")
    return {"role": ROLES.get(role, role), "content": content}


def rendered(
    which: str, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase | None", answer_follows: bool = False
) -> str:
    """Return a conversation as the text the model was trained on.

    Args:
        which: row it is, for messages.
        messages: the conversation.
        tokenizer: of the model, whose chat template is used.
        answer_follows: end where the model is to answer.

    Raises:
        ParedError: there is no tokenizer or it has no chat template, or the template does not take such a conversation.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ParedError(
            f"{which} is a conversation, and this model's tokenizer has no chat template to make a text of it; "
            "give it one (tokenizer.chat_template), or rows with a 'text'"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows)
    except Exception as error:  # templates are programs, with errors of their own
        raise ParedError(f"{which}: the tokenizer's chat template does not take this conversation "
                         f"({type(error).__name__}: {' '.join(str(error).split())[:160]})") from None  # fmt: skip
    return str(text)
