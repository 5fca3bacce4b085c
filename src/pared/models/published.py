"""What the publisher of a model says of it: its place on the Hub and its licence, from its card or its header."""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, cast

from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.guarded import parse_yaml
from pared.models.source import QUIETLY, ModelSource

log = logging.getLogger(__name__)

CARD = "README.md"
HEADER = re.compile(r"\A---\s*\n(.*?\n)---\s*(\n|\Z)", re.DOTALL)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/[0-9a-f]+/?$")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
HUB = "https://huggingface.co/"
LONGEST_CARD = 2**20
LONGEST = 200  # characters of a field


class Facts(TypedDict, total=False):
    """What a card of what is made of a model says of it too; a link leads to a page."""

    base_model: str
    license: str
    license_name: str
    license_link: str


def published_facts(source: Any) -> Facts:
    """Return what the publisher of a model says of it, as far as that is known.

    Args:
        source: a :class:`~pared.models.source.ModelSource`; what is none, as a model in memory, says nothing.
    """
    if not isinstance(source, ModelSource):
        return {}
    if source.is_dequantised:
        return cast("Facts", _of_gguf(Path(source.place)))
    repository = repository_of(source)
    fields = {**source.fields(), **card_header(_card_of(source))}
    found = {"base_model": repository} if repository else {}
    return cast("Facts", found | licence(fields, repository))


def repository_of(source: ModelSource) -> str | None:
    """Return the id on the Hub of a named model, also of a snapshot in the Hub's cache; None of other folders."""
    if not path_of(source.place).is_dir():
        return source.place if REPOSITORY.fullmatch(source.place) else None
    snapshot = SNAPSHOT.search(path_of(source.place).absolute().as_posix())
    return f"{snapshot['owner']}/{snapshot['name']}" if snapshot else None


def card_header(text: str) -> dict[str, Any]:
    """Return the fields above a card's text; none where there are none that can be read."""
    if (header := HEADER.match(text)) is None:
        return {}
    with suppress(ParedError):
        found = parse_yaml(header[1], CARD)
        return found if isinstance(found, dict) else {}
    return {}


def licence(fields: Mapping[str, Any], repository: str | None) -> dict[str, str]:
    """Return the licence that a card or a configuration names, its fields as the Hub has them.

    Args:
        fields: fields of the card.
        repository: that a relative link is in; without it such a link leads nowhere, and is left out.
    """
    identifier = fields.get("license")
    if not isinstance(identifier, str) or not LICENSE.fullmatch(identifier.lower()):
        return {}
    found = {"license": identifier.lower()}
    name, link = fields.get("license_name"), fields.get("license_link")
    if isinstance(name, str) and 0 < len(name) <= LONGEST:
        found["license_name"] = name
    if isinstance(link, str) and 0 < len(link) <= LONGEST:
        if link.startswith(("https://", "http://")):
            found["license_link"] = link
        elif repository is not None:
            found["license_link"] = f"{HUB}{repository}/blob/main/{link}"
    return found


def _card_of(source: ModelSource) -> str:
    """Return the card that lies beside a model, empty where there is none."""
    path = path_of(source.place) / CARD
    if not path_of(source.place).is_dir():
        from transformers.utils import cached_file

        try:
            found = cached_file(source.place, CARD, **QUIETLY)
        except (OSError, ValueError) as error:
            log.info("the card of %s cannot be read (%s)", source.name, error)
            return ""
        if found is None:
            return ""
        path = Path(found)
    with suppress(OSError), path.open("rb") as file:
        return file.read(LONGEST_CARD).decode("utf-8", "replace").replace("\r\n", "\n")
    return ""


def _of_gguf(file: Path) -> dict[str, str]:
    """Return what the header of a GGUF file says of the model that it was made of."""
    from pared.models.gguf import header_of

    header = header_of(file).fields
    repository = None
    for key in ("general.source.repo_url", "general.source.huggingface.repository", "general.source.url"):
        address = header.get(key)
        name = address.removeprefix(HUB).rstrip("/") if isinstance(address, str) else ""
        if REPOSITORY.fullmatch(name):
            repository = name
            break
    fields = {"license": header.get("general.license"), "license_name": header.get("general.license.name"),
            "license_link": header.get("general.license.link")}  # fmt: skip
    return ({"base_model": repository} if repository else {}) | licence(fields, repository)
