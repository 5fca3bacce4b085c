"""What a publisher says of a model is taken over; what is not known is not said."""

from pathlib import Path

import pytest

from pared.models.published import card_header, licence, published_facts, repository_of
from pared.models.source import ModelSource, find_model

CARD = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nbase_model: a/b\n---\n# A model\n"


def folder(place: Path, card: str | None = CARD, config: str = "{}") -> ModelSource:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(config)
    if card is not None:
        (place / "README.md").write_text(card)
    return find_model(str(place))


def test_a_licence_of_a_card_beside_the_weights_is_taken_over(tmp_path: Path) -> None:
    assert published_facts(folder(tmp_path)) == {"license": "other", "license_name": "llama3"}


def test_a_snapshot_of_the_hub_is_known_by_its_id_and_its_licence_is_linked(tmp_path: Path) -> None:
    place = tmp_path / "models--meta-llama--Llama-3" / "snapshots" / "0123abc"
    assert published_facts(folder(place)) == {
        "base_model": "meta-llama/Llama-3",
        "license": "other",
        "license_name": "llama3",
        "license_link": "https://huggingface.co/meta-llama/Llama-3/blob/main/LICENSE",
    }


def test_a_licence_in_the_configuration_is_taken_over(tmp_path: Path) -> None:
    assert published_facts(folder(tmp_path, None, '{"license": "MIT"}')) == {"license": "mit"}


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# no header",
        "---\n- a list\n---\n",
        "---\nlicense: [mit]\n---\n",
        "---\nlicense: a b\n---\n",
        "---\n: : :\n---\n",
    ],
)
def test_a_card_that_says_nothing_usable_says_nothing(card: str, tmp_path: Path) -> None:
    assert published_facts(folder(tmp_path, card)) == {}


def test_a_model_in_memory_says_nothing() -> None:
    assert published_facts(None) == {}


def test_a_hub_id_is_its_own_base_model() -> None:
    assert repository_of(ModelSource("owner/name", "owner/name", "Hugging Face Hub")) == "owner/name"


def test_a_header_ends_where_its_line_ends() -> None:
    assert card_header("---\nlicense: mit\n---\nlicense: gpl\n") == {"license": "mit"}


def test_a_link_that_is_whole_stays() -> None:
    assert licence({"license": "other", "license_link": "https://x.org/l"}, None)["license_link"] == "https://x.org/l"
