"""Where a named text is published: its data set on the Hub, for the metadata of a card."""

from pared.data.corpora import CORPORA
from pared.data.glue import GLUE, SPLITS
from pared.data.hub import HubSet
from pared.data.instructions import PREFIX, SETS
from pared.names import PART

GLUE_ON_HUB = "nyu-mll/glue"


def hub_set_of(name: str) -> HubSet | None:
    """Return the data set on the Hub that a text, instructions or labelled examples are of, wherever they were read.

    Args:
        name: as a recipe or a manifest has it.

    Returns:
        None for files of a user, and for what is on no hub (the embedded text, Penn Treebank).
    """
    name = PART.sub("", name)
    if name in CORPORA:
        return CORPORA[name].hub
    if name.startswith(PREFIX):
        known = SETS.get(name.removeprefix(PREFIX))
        return None if known is None else known.hub
    parts = name.split(":")
    if parts[0] == "glue" and len(parts) == 3 and parts[1] in GLUE and parts[2] in SPLITS:
        return HubSet(GLUE_ON_HUB, parts[1].partition("-")[0], parts[2])
    if len(parts) == 3 and all(parts) and parts[0] not in ("file", "ner", "python"):
        repository, _, config = parts[0].removesuffix("]").partition("[")
        return HubSet(repository, config or None, parts[1])
    return None
