"""How papers cut and average when they measure perplexity, so that their dense figures can be compared with ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pared.data.cutting import BLANK_LINES
from pared.data.texts import Text
from pared.errors import ParedError
from pared.names import require_known

if TYPE_CHECKING:  # which protocols there are is reported without them
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pared.data.windows import Windows

Averaging = Literal["token", "window"]
SPLITS = {"wikitext2": "test", "ptb": "test", "c4": "validation"}  # that papers measure on


@dataclass(frozen=True)
class Protocol:
    """How a text becomes a perplexity.

    Attributes:
        name: what users call it.
        source: whose code it is read from.
        length: tokens in a window; windows do not overlap.
        averaging: over all predicted tokens, or over windows, each of which counts the same.
        last: whether the rest at the end, shorter than a window, is one more window.
        joins: what documents are joined with, by corpus; a blank line for all others.
        documents: how many of a corpus are read, from the first; all of the others.
        windows: how many are taken of a corpus, from the first; all of the others.
        corpora: it is of.
    """

    name: str
    source: str
    length: int = 2048
    averaging: Averaging = "token"
    last: bool = False
    joins: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    corpora: tuple[str, ...] = ("wikitext2", "ptb", "c4")


# All tokenise the joined text once, with the special tokens the tokenizer adds itself: one at the start, if any.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("svd-llm", "AIoT-MLSys-Lab/SVD-LLM", documents={"c4": 2000}),
        Protocol("basis-sharing", "TUDa-HWAI/Basis_Sharing", averaging="window", last=True, documents={"c4": 2000}),
        Protocol(
            "wanda",
            "locuslab/wanda",
            joins={"c4": " "},
            documents={"c4": 1100},
            windows={"c4": 256},
            corpora=("wikitext2", "c4"),
        ),
        Protocol("gptq", "IST-DASLab/gptq", joins={"c4": " ", "ptb": " "}, documents={"c4": 1100}, windows={"c4": 256}),
    )
}


@dataclass(frozen=True)
class Cut:
    """A text cut by a protocol.

    Attributes:
        windows: of which the last may be shorter, then padded and masked.
        averaging: of the protocol.
        deviations: where it could not be kept to, in words.
    """

    windows: "Windows"
    averaging: Averaging
    deviations: tuple[str, ...]


def protocol_of(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        ParedError: there is none.
    """
    require_known("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def cut_by(protocol: Protocol, text: Text, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig") -> Cut:
    """Cut a text as a protocol says.

    Args:
        protocol: the protocol.
        text: the text.
        tokenizer: of the model.
        config: of the model; one with fewer positions than a window is long gets shorter windows.

    Raises:
        ParedError: the text is shorter than a window.
    """
    import torch

    from pared.data.lengths import positions_of
    from pared.data.windows import Windows, digest_of, padded

    corpus = text.name.partition(":")[0]
    deviations: list[str] = []
    wanted = protocol.documents.get(corpus)
    documents = text.documents[:wanted]
    if wanted is not None and len(documents) < wanted:
        deviations.append(f"{len(documents):,} documents of {text.origin} in place of {wanted:,}")
    split = text.name.partition(":")[2]
    if corpus in protocol.corpora and split and split != SPLITS[corpus]:
        deviations.append(f"{text.name!r} in place of {corpus}:{SPLITS[corpus]}")
    if corpus not in protocol.corpora:
        deviations.append(f"it says nothing of the text {text.name!r}, which is joined by blank lines")
    length = protocol.length
    positions = positions_of(config)
    if positions is not None and positions < length:
        deviations.append(f"windows of {positions} tokens, the most this model takes, in place of {length}")
        length = positions
    joined = protocol.joins.get(corpus, BLANK_LINES).join(documents)
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < length:
        raise ParedError(f"text {text.name!r} has {len(ids)} tokens, fewer than one window of {length} of the protocol "
                         f"{protocol.name}; use a longer text")  # fmt: skip
    whole = len(ids) // length
    taken = protocol.windows.get(corpus, 0)
    if whole < taken:
        deviations.append(f"{whole:,} windows, which is all there are, in place of {taken:,}")
    pieces = list(ids[: whole * length].view(whole, length))[: protocol.windows.get(corpus)]
    mask = None
    rest = ids[whole * length :]
    if protocol.last and len(rest) > 1:
        rows = [*(piece.tolist() for piece in pieces), rest.tolist()]
        tokens, mask = padded(rows, 0), padded([[1] * len(row) for row in rows], 0)
    else:
        tokens = torch.stack(pieces)
    windows = Windows(tokens, digest_of(tokens, mask), text.name, text.origin, text.stand_in, mask)
    return Cut(windows, protocol.averaging, tuple(deviations))
